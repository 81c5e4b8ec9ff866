"""The export for ArviZ 0.x and 1.x: its layout, its numbers against the reference model, and what ArviZ makes of it."""

import sys

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vmem as pv
from pyro_vmem.diagnostics import diagnose, to_arviz, to_datatree
from pyro_vmem.diagnostics.weights import StratifiedWeights
from pyro_vmem.parts import LatentGuide
from pyro_vmem.testing import assert_unbiased

xarray = pytest.importorskip("xarray")
pytestmark = pytest.mark.usefixtures("float64")


class Moved(LatentGuide):
    """The exact posterior of z, moved and wider."""

    def __init__(self, reference):
        super().__init__()
        self.reference, self.latent_dim = reference, reference.latent_dim

    def forward(self, x, template):
        exact = self.reference.latent_posterior(x.raw, template.raw)
        return dist.MultivariateNormal(exact.mean + 0.3, scale_tril=1.5 * exact.scale_tril)


def case(per_datapoint=False, slots=6, targets=4, rough=False, **kwargs):
    torch.manual_seed(0)
    reference = pv.LinearGaussianMemory(generator=torch.Generator().manual_seed(0))
    templates = torch.randn(targets, slots, 3) if per_datapoint else torch.randn(slots, 3)
    memory = pv.Memory(templates, per_datapoint=per_datapoint, **kwargs)
    return reference, reference.vma(latent_guide=Moved(reference) if rough else None), memory, torch.randn(targets, 3)


def tensor(variable):
    return torch.as_tensor(variable.values)


def draws(tree, group, name):
    """`(draw, datapoint, ...)`"""
    return tensor(tree[group][name])[0]


SAMPLED = {"a": ("chain", "draw", "datapoint"), "z": ("chain", "draw", "datapoint", "z_dim")}


@pytest.mark.parametrize("per_datapoint", [False, True])
def test_groups_dims_and_attributes(per_datapoint):
    shape = (4, 6) if per_datapoint else (6,)
    labels, mask = torch.arange(6).expand(shape), (torch.arange(6) < 5).expand(shape)
    _, vma, memory, x = case(per_datapoint, labels=labels, mask=mask)
    tree = to_datatree(vma, memory, x, num_samples=30, per_slot=5, labels=torch.arange(4), seed=5)
    slot = ("datapoint", "slot") if per_datapoint else ("slot",)
    layout = {group: {name: v.dims for name, v in child.data_vars.items()} for group, child in tree.children.items()}
    diagnostics = layout.pop("vi_diagnostics")
    assert layout == {
        "posterior": SAMPLED,
        "prior": SAMPLED,
        "posterior_predictive": {"x": ("chain", "draw", "datapoint", "x_dim_0")},
        "sample_stats": {"log_weight": ("chain", "draw", "datapoint")},
        "observed_data": {"x": ("datapoint", "x_dim_0")},
        "constant_data": {
            "template": (*slot, "x_dim_0"),
            "slot_label": slot,
            "slot_in_use": slot,
            "label": ("datapoint",),
        },
    }
    assert diagnostics["address_exact"] == ("datapoint", "slot")
    wanted = "information_gain address_entropy kl_z elbo log_evidence ess khat hit"
    assert {name: diagnostics[name] for name in wanted.split()} == dict.fromkeys(wanted.split(), ("datapoint",))
    sizes = {"chain": 1, "draw": 30, "datapoint": 4, "slot": 6, "z_dim": 2, "x_dim_0": 3}
    for child in tree.children.values():
        assert {dim: sizes[dim] for dim in child.sizes} == dict(child.sizes)
        assert set(child.coords) == set(child.sizes)
        assert not set(child.data_vars) & set(sizes)  # a variable never has the name of a dim
    for facts in (tree.attrs, tree["posterior"].attrs):
        assert facts["inference_library"] == "pyro_vmem"
        assert facts["inference_library_version"] == pv.__version__
        assert facts["torch_version"] == torch.__version__
        assert (facts["num_samples"], facts["seed"]) == (30, 5)
        assert facts["model"] == repr(vma)
    assert torch.equal(tensor(tree["observed_data"]["x"]), x)
    assert torch.equal(tensor(tree["constant_data"]["template"]), memory.templates)
    assert torch.equal(tensor(tree["constant_data"]["slot_in_use"]), memory.mask)


def test_images_have_a_dim_for_each_of_theirs():
    torch.set_default_dtype(torch.float32)
    vma = pv.VMA.for_images((1, 8, 6), latent_dim=3, width=4)
    tree = to_datatree(vma, pv.Memory(torch.rand(4, 1, 8, 6)), torch.zeros(2, 1, 8, 6), num_samples=5, per_slot=0)
    predicted = tree["posterior_predictive"]["x"]
    assert predicted.dims == ("chain", "draw", "datapoint", "x_dim_0", "x_dim_1", "x_dim_2")
    assert predicted.shape == (1, 5, 2, 1, 8, 6)
    assert set(predicted.values.flatten()) <= {0.0, 1.0}
    assert tree["constant_data"]["template"].dims == ("slot", "x_dim_0", "x_dim_1", "x_dim_2")


@pytest.mark.parametrize("per_datapoint", [False, True])
def test_draws_are_those_of_the_guide_and_of_the_prior(per_datapoint):
    """With the exact guide, moments of draws are those of closed forms."""
    reference, vma, memory, x = case(per_datapoint)
    tree = to_datatree(vma, memory, x, num_samples=5000, per_slot=0, max_decodes=1000)
    posterior = reference.address_posterior(memory, x)
    templates = memory.templates.transpose(0, 1) if per_datapoint else memory.templates.unsqueeze(1)
    z_mean = reference.latent_posterior(x, templates).mean.detach()  # (S, B, D)
    for group, probs, mean in (
        ("posterior", posterior.probs.detach(), z_mean),
        ("prior", torch.full((4, 6), 1 / 6), reference.latent_mean(templates).detach().expand_as(z_mean)),
    ):
        a, z = draws(tree, group, "a"), draws(tree, group, "z")
        share = torch.nn.functional.one_hot(a, 6).double().mean(0)
        assert ((share - probs).abs() < 5 * (probs * (1 - probs) / 5000).sqrt() + 5 / 5000).all()
        assert_unbiased(z - mean[a, torch.arange(4)], torch.zeros(4, 2))
        assert_unbiased(z, (probs.mT.unsqueeze(-1) * mean).sum(0))
    torch.testing.assert_close(
        draws(tree, "sample_stats", "log_weight"), reference.log_evidence(memory, x).detach().expand(5000, 4)
    )
    a, z = draws(tree, "posterior", "a"), draws(tree, "posterior", "z")
    template = memory.read(a)
    predicted_mean = (z @ reference.loading.mT + template @ reference.skip.mT + reference.offset).detach()
    residual = draws(tree, "posterior_predictive", "x") - predicted_mean
    assert_unbiased(residual, torch.zeros(4, 3))
    assert_unbiased(residual.square(), (2 * reference.log_noise).exp().detach().expand(4, 3))


def test_weights_and_diagnostics_come_from_the_draws_of_the_tree():
    reference, vma, memory, x = case(rough=True)
    tree = to_datatree(vma, memory, x, num_samples=50)
    a, z = draws(tree, "posterior", "a"), draws(tree, "posterior", "z")
    log_weight, template = draws(tree, "sample_stats", "log_weight"), memory.read(a)
    likelihood = dist.Normal(
        z @ reference.loading.mT + template @ reference.skip.mT + reference.offset, reference.log_noise.exp()
    )
    p_z = dist.Normal(reference.latent_mean(template), reference.latent_log_scale.exp())
    q_z = Moved(reference)(pv.Template(x, x), pv.Template(template, template))
    log_joint = likelihood.log_prob(x).sum(-1) + p_z.log_prob(z).sum(-1) - torch.tensor(6.0).log()
    by_hand = log_joint - reference.address_posterior(memory, x).log_prob(a) - q_z.log_prob(z)
    torch.testing.assert_close(log_weight, by_hand.detach())
    found = tree["vi_diagnostics"]
    torch.testing.assert_close(tensor(found["ess_sampled"]), StratifiedWeights.unstratified(log_weight).ess)
    torch.testing.assert_close(tensor(found["elbo"]), log_weight.mean(0))
    # those that diagnose draws are others, of the same guide
    assert found["information_gain"].equals(diagnose(vma, memory, x, num_samples=50)["information_gain"])


def test_weighted_draws_stand_for_the_exact_posterior():
    reference, vma, memory, x = case(rough=True)
    template = memory.templates.unsqueeze(1)
    mean = reference.latent_posterior(x, template).mean.detach()
    exact = (reference.address_posterior(memory, x).probs.detach().mT.unsqueeze(-1) * mean).sum(0)
    tree = to_datatree(vma, memory, x, num_samples=20_000, per_slot=0, max_decodes=100_000)
    z, log_weight = draws(tree, "posterior", "z"), draws(tree, "sample_stats", "log_weight")
    for weights, unbiased in ((torch.zeros_like(log_weight).softmax(0), False), (log_weight.softmax(0), True)):
        found = (weights.unsqueeze(-1) * z).sum(0)
        error = (weights.unsqueeze(-1) * (z - found)).square().sum(0).sqrt()
        assert bool(((found - exact).abs() < 5 * error).all()) == unbiased


def test_the_same_seed_gives_the_same_tree_and_nothing_else_changes():
    _, vma, memory, x = case(rough=True)
    state = torch.get_rng_state()
    first, second, other = (to_datatree(vma, memory, x, num_samples=30, seed=s) for s in (0, 0, 1))
    assert first.equals(second)
    assert not first.equals(other)
    assert torch.equal(state, torch.get_rng_state())
    assert not list(pyro.get_param_store().keys())


def test_netcdf_keeps_all(tmp_path):
    pytest.importorskip("h5netcdf")
    labels, mask = torch.arange(6), torch.arange(6) < 5
    _, vma, memory, x = case(labels=labels, mask=mask)
    tree = to_datatree(vma, memory, x, num_samples=30, labels=torch.arange(4))
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    with xarray.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as read:
        assert set(read.children) == set(tree.children)
        for group, child in tree.children.items():
            xarray.testing.assert_identical(read[group].to_dataset().load(), child.to_dataset())
        assert read.attrs == tree.attrs


def test_bad_arguments(monkeypatch):
    _, vma, memory, x = case()
    with pytest.raises(ValueError, match=r"num_samples: expected a whole number in \[1, 10,000,000\], got 0"):
        to_datatree(vma, memory, x, num_samples=0)
    with pytest.raises(ValueError, match="x: expected shape"):
        to_datatree(vma, memory, x[0])
    with pytest.raises(ValueError, match="labels: the memory has none"):
        to_datatree(vma, memory, x, labels=torch.zeros(4).long())
    tree = to_datatree(vma, memory, x, num_samples=30)
    for module, call in (("arviz", lambda: to_arviz(tree)), ("xarray", lambda: to_datatree(vma, memory, x))):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"needs {module}: pip install '.\[arviz\]'"):
            call()


# What ArviZ makes of it; that it uses what matplotlib has deprecated is its own business

of_arviz = pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")


@pytest.fixture(scope="module")
def az():
    pytest.importorskip("matplotlib").use("Agg")
    return pytest.importorskip("arviz")


def is_datatree_based(az):
    return int(az.__version__.split(".")[0]) >= 1


@pytest.fixture
def data():
    _, vma, memory, x = case(labels=torch.arange(6))
    return vma, memory, x, to_arviz(to_datatree(vma, memory, x, num_samples=400, labels=torch.arange(4)))


def test_it_is_what_the_installed_arviz_works_on(az, data):
    vma, memory, x, made = data
    assert isinstance(made, xarray.DataTree if is_datatree_based(az) else az.InferenceData)
    groups = set(made.children) if is_datatree_based(az) else set(made.groups())
    assert groups == {
        "posterior",
        "prior",
        "posterior_predictive",
        "sample_stats",
        "observed_data",
        "constant_data",
        "vi_diagnostics",
    }
    tree = to_datatree(vma, memory, x, num_samples=400, labels=torch.arange(4))
    again = to_arviz(tree)
    assert type(again) is type(made)
    for one in (made, again):
        z = one["posterior"]["z"]
        assert z.shape == (1, 400, 4, 2)
        assert z.equals(tree["posterior"]["z"])
        assert one["vi_diagnostics"]["khat_sampled"].equals(tree["vi_diagnostics"]["khat_sampled"])
        assert one.attrs["inference_library"] == "pyro_vmem"


def test_summary(az, data):
    *_, made = data
    table = az.summary(made, kind="stats", round_to="none")
    assert list(table.index) == [f"a[{b}]" for b in range(4)] + [f"z[{b}, {d}]" for b in range(4) for d in range(2)]
    z = tensor(made["posterior"]["z"])[0]
    assert table["mean"].astype(float).tolist()[4:] == pytest.approx(z.mean(0).flatten().tolist())


@of_arviz
def test_plots(az, data):
    import matplotlib.pyplot as plt

    *_, made = data
    if is_datatree_based(az):
        az.plot_dist(made, var_names=["z"], coords={"datapoint": 0}, backend="matplotlib")
        az.plot_forest(made, var_names=["z"], backend="matplotlib")
    else:
        az.plot_posterior(made, var_names=["z"], coords={"datapoint": [0]})
        az.plot_forest(made, var_names=["z"], combined=True)
    try:
        assert len(plt.get_fignums()) == 2
        assert all(any(axes.has_data() for axes in plt.figure(n).axes) for n in plt.get_fignums())
    finally:
        plt.close("all")


def test_netcdf_of_arviz(az, data, tmp_path):
    pytest.importorskip("h5netcdf")
    *_, made = data
    path = tmp_path / "data.nc"
    if is_datatree_based(az):
        made.to_netcdf(path, engine="h5netcdf")
        read = az.from_netcdf(path, engine="h5netcdf")
    else:
        made.to_netcdf(str(path), engine="h5netcdf")
        read = az.from_netcdf(str(path), engine="h5netcdf")
    for group in ("posterior", "sample_stats", "vi_diagnostics"):
        for name, variable in made[group].data_vars.items():
            assert variable.equals(read[group][name]), (group, name)
