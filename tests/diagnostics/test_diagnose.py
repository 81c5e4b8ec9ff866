"""The dataset of diagnostics against closed forms of the reference model, and on Pyro programs that are no VMA."""

import math
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vmem as pv
from pyro_vmem.diagnostics import diagnose, information_gain
from pyro_vmem.parts import AddressGuide, LatentGuide, over_slots

xarray = pytest.importorskip("xarray")
pytestmark = pytest.mark.usefixtures("float64")


class Perturbed(AddressGuide):
    """The exact posterior of a, to the power `sharpness`."""

    def __init__(self, reference, sharpness):
        super().__init__()
        self.reference, self.sharpness = reference, sharpness

    def forward(self, memory, x):
        return over_slots(self.sharpness * self.reference.address_posterior(memory, x.raw).logits, memory)


class Wide(LatentGuide):
    """The exact posterior of z, wider and moved, whose KL to the exact one has a closed form."""

    def __init__(self, reference, shift=0.3, stretch=1.3):
        super().__init__()
        self.reference, self.shift, self.stretch, self.latent_dim = reference, shift, stretch, reference.latent_dim

    def forward(self, x, template):
        exact = self.reference.latent_posterior(x.raw, template.raw)
        return dist.MultivariateNormal(exact.mean + self.shift, scale_tril=self.stretch * exact.scale_tril)


def case(per_datapoint=False, slots=6, targets=5, **kwargs):
    torch.manual_seed(0)
    reference = pv.LinearGaussianMemory(generator=torch.Generator().manual_seed(0))
    templates = torch.randn(targets, slots, 3) if per_datapoint else torch.randn(slots, 3)
    return reference, pv.Memory(templates, per_datapoint=per_datapoint, **kwargs), torch.randn(targets, 3)


def tensor(variable):
    return torch.as_tensor(variable.values)


def assert_values(variable, expected, tolerance=1e-5):
    torch.testing.assert_close(tensor(variable), expected.detach(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("per_datapoint", [False, True])
@pytest.mark.parametrize("max_decodes", [3, 4096])
def test_with_the_exact_guide_all_is_known(per_datapoint, max_decodes):
    reference, memory, x = case(per_datapoint)
    dataset = diagnose(reference.vma(), memory, x, num_samples=30, per_slot=4, max_decodes=max_decodes)
    posterior = reference.address_posterior(memory, x)
    prior = torch.zeros(6)
    gain = information_gain(posterior.logits, prior)
    for name in ("information_gain", "information_gain_exact"):
        assert_values(dataset[name], gain)
    assert_values(dataset.information_gain_exact_se, torch.zeros(5))
    assert_values(dataset.information_gap, torch.zeros(5))
    assert_values(dataset.information_share, gain / math.log(6))
    assert_values(dataset.address_entropy, posterior.entropy())
    assert_values(dataset.perplexity, posterior.entropy().exp())
    for name in ("kl_exact_to_guide", "kl_guide_to_exact", "elbo_gap", "log_evidence_se", "elbo_se"):
        assert_values(dataset[name], torch.zeros(5))
    for name in ("log_evidence", "log_evidence_sampled", "elbo"):
        assert_values(dataset[name], reference.log_evidence(memory, x))
    assert_values(dataset.ess_sampled, torch.full((5,), 30.0))
    assert (dataset.khat_sampled == -math.inf).all()
    for name in ("address_guide", "address_exact"):
        assert_values(dataset[name], posterior.probs)
    assert_values(dataset.address_prior, torch.full((5, 6), 1 / 6))
    for name in ("top", "top_exact"):
        assert_values(dataset[name], posterior.probs.argmax(-1))


def test_a_rough_guide_is_measured_within_its_standard_errors():
    reference, memory, x = case(targets=40)
    vma = reference.vma(address_guide=Perturbed(reference, 2.0), latent_guide=Wide(reference))
    dataset = diagnose(vma, memory, x, num_samples=2000, per_slot=500, max_decodes=50_000)
    exact, evidence = reference.address_posterior(memory, x), reference.log_evidence(memory, x).detach()
    guide = dist.Categorical(logits=2.0 * exact.logits)
    prior = torch.zeros(6)

    def assert_within(name, expected, error, z=3.0):
        known = ~tensor(dataset[error]).isnan()  # draws of a guide that is too sure do not tell of every error
        assert known.double().mean() > 0.5, name
        score = ((tensor(dataset[name]) - expected.detach()) / tensor(dataset[error]))[known]
        # 3 standard errors on average over targets, whose draws are independent; 5 for each
        assert abs(float(score.mean())) < z / math.sqrt(len(score)), name
        assert float(score.abs().max()) < 5, name
        assert 0.7 < float(score.std()) < 1.4, name  # the standard errors are what the errors are

    gap = information_gain(guide.logits, prior) - information_gain(exact.logits, prior)
    assert (gap.abs() > 0.02).sum() > 30
    assert_within("information_gap", gap, "information_gain_exact_se")
    assert_within("log_evidence", evidence, "log_evidence_se")
    assert_within("log_evidence_sampled", evidence, "log_evidence_sampled_se")
    assert_values(dataset.kl_exact_to_guide, dist.kl.kl_divergence(exact, guide), 0.1)

    # the bound, in closed form: the evidence minus what each half of the guide costs
    address = dist.kl.kl_divergence(guide, exact)
    template = memory.templates.unsqueeze(1)
    target = pv.Template(x, x)
    q_z = Wide(reference)(target, pv.Template(template, template))
    latent = (guide.probs * dist.kl.kl_divergence(q_z, reference.latent_posterior(x, template)).mT).sum(-1)
    assert_within("elbo", evidence - address - latent, "elbo_se")
    assert_values(dataset.kl_guide_to_exact, address, 0.1)
    p_z = dist.MultivariateNormal(reference.latent_mean(template), torch.diag((2 * reference.latent_log_scale).exp()))
    kl_z = (guide.probs * dist.kl.kl_divergence(q_z, p_z).mT).sum(-1)
    assert_values(dataset.kl_z, kl_z, 0.3)
    terms = tensor(dataset.reconstruction) - tensor(dataset.kl_z) - tensor(dataset.information_gain)
    assert_values(dataset.elbo, terms, 0.2)  # the closed form of the information gain is not in the elbo's draws
    assert (dataset.information_gain_exact_se > 0).all()
    assert (dataset.ess_sampled < 1999).all()


def test_reliability_of_summed_and_sampled_evidence():
    """A guide that is sure of the wrong slot: summing all slots finds the evidence, its draws do not."""
    reference, memory, x = case(targets=30)
    vma = reference.vma(address_guide=Perturbed(reference, -8.0))
    dataset = diagnose(vma, memory, x, num_samples=400, per_slot=30)
    evidence = reference.log_evidence(memory, x)
    assert_values(dataset.log_evidence, evidence)
    assert float((evidence.detach() - tensor(dataset.log_evidence_sampled)).mean()) > 1.0
    assert (dataset.kl_exact_to_guide > 1.0).mean() > 0.9


def test_without_slots_the_evidence_is_the_sampled_one():
    reference, memory, x = case()
    dataset = diagnose(reference.vma(latent_guide=Wide(reference)), memory, x, per_slot=0)
    assert not {name for name in dataset.data_vars if "exact" in name or name == "information_gap"}
    for name in ("log_evidence", "log_evidence_se", "ess", "khat"):
        sampled = dataset[f"{name}_sampled" if name != "log_evidence_se" else "log_evidence_sampled_se"]
        assert (dataset[name] == sampled).all()
    assert dataset.attrs["method"] == "sampled"
    assert dataset.attrs["decodes"] == 200 * 5


@pytest.mark.parametrize("per_datapoint", [False, True])
def test_slots_not_in_use_have_no_part(per_datapoint):
    if per_datapoint:
        mask = torch.ones(5, 6, dtype=torch.bool)
        mask[0, 4:], mask[1:, 5] = False, False
    else:
        mask = torch.tensor([True] * 4 + [False] * 2)
    reference, memory, x = case(per_datapoint, mask=mask)
    vma = reference.vma(address_guide=Perturbed(reference, 1.5))
    dataset = diagnose(vma, memory, x, num_samples=30, per_slot=5)
    used = mask.expand(5, 6)
    for name in ("address_guide", "address_exact", "address_prior"):
        assert (tensor(dataset[name])[~used] == 0).all()
        torch.testing.assert_close(tensor(dataset[name]).sum(-1), torch.ones(5))
    assert_values(dataset.log_evidence, reference.log_evidence(memory, x))
    assert_values(dataset.address_exact, reference.address_posterior(memory, x).probs)
    assert_values(dataset.information_share, tensor(dataset.information_gain) / used.sum(-1).log())
    assert dataset.kl_exact_to_guide.max() < 10
    # one target's memory without its empty slots says the same
    rows = memory.templates[0, :4] if per_datapoint else memory.templates[:4]
    alone = diagnose(vma, pv.Memory(rows), x[:1], num_samples=30, per_slot=5)
    for name in ("information_gain", "information_gain_exact", "information_gap", "kl_exact_to_guide"):
        assert_values(alone[name], tensor(dataset[name])[:1], 1e-9)
        assert float(alone[name][0]) != 0


def test_a_slot_not_in_use_that_explains_the_target_far_better():
    reference, _, x = case(targets=2)
    far, near = torch.full((2, 1, 3), 300.0), torch.zeros(2, 2, 3)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    far[1], near[1] = 0.0, 0.0
    memory = pv.Memory(torch.cat([far, far, near[:, :1]], 1), mask=mask)
    dataset = diagnose(reference.vma(), memory, x, num_samples=30, per_slot=30)
    assert (reference.slot_log_evidence(memory, x)[0, 2] - reference.slot_log_evidence(memory, x)[0, 0]) > 2e4
    assert_values(dataset.address_exact, torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]))
    assert_values(dataset.log_evidence, reference.slot_log_evidence(memory, x)[:, 0])
    assert dataset.khat.notnull().all()


def test_hits_are_of_classes():
    """Two slots of one class beat a single slot that is the most probable."""
    reference, _, x = case()
    memory = pv.Memory(torch.randn(6, 3), labels=torch.tensor([7, 7, 3, 3, 3, 5]))
    posterior = reference.address_posterior(memory, x)
    top = memory.labels.unique()[memory.by_class(posterior.probs).argmax(-1)]
    labels = top.clone()
    labels[:2] = 9  # a class that is not in memory
    dataset = diagnose(reference.vma(), memory, x, labels=labels)
    assert dataset.hit.values.tolist() == [False, False, True, True, True]
    assert dataset.hit_exact.values.tolist() == dataset.hit.values.tolist()
    assert "hit_exact" not in diagnose(reference.vma(), memory, x, labels=labels, per_slot=0)
    assert "hit" not in diagnose(reference.vma(), memory, x)


def test_every_variable_is_described_and_the_attributes_say_how_it_was_made():
    reference, memory, x = case()
    vma = reference.vma()
    dataset = diagnose(vma, memory, x, num_samples=30, per_slot=4, seed=7)
    assert dict(dataset.sizes) == {"datapoint": 5, "slot": 6}
    assert set(dataset.coords) == {"datapoint", "slot"}
    for name, variable in dataset.data_vars.items():
        assert variable.attrs["units"] in ("nats", "1"), name
        assert variable.attrs["long_name"], name
        assert variable.dims in (("datapoint",), ("datapoint", "slot")), name
        assert name not in dataset.dims
    facts = dataset.attrs
    assert facts["decodes"] == 5 * (30 + 6 * 4)
    assert facts["decodes_per_second"] == pytest.approx(facts["decodes"] / facts["seconds"])
    assert (facts["num_slots"], facts["num_samples"], facts["per_slot"], facts["seed"]) == (6, 30, 4, 7)
    assert facts["model"] == repr(vma)
    assert facts["pyro_vmem_version"] == pv.__version__


def test_the_same_seed_gives_the_same_figures_and_nothing_else_changes():
    reference, memory, x = case()
    vma = reference.vma(latent_guide=Wide(reference))
    before = {name: p.clone() for name, p in vma.named_parameters()}
    state = torch.get_rng_state()
    first, second = (diagnose(vma, memory, x, num_samples=30, per_slot=4) for _ in range(2))
    assert first.equals(second)
    assert not first.equals(diagnose(vma, memory, x, num_samples=30, per_slot=4, seed=1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in vma.named_parameters())
    assert not list(pyro.get_param_store().keys())


def test_images_in_single_precision():
    torch.set_default_dtype(torch.float32)
    vma = pv.VMA.for_images((1, 8, 8), latent_dim=3, width=4)
    memory = pv.Memory(torch.rand(4, 1, 8, 8), labels=torch.arange(4))
    dataset = diagnose(vma, memory, (torch.rand(3, 1, 8, 8) > 0.5).float(), labels=torch.arange(3), num_samples=30)
    assert dataset.information_gain.dtype == "float32"
    assert all(bool(variable.notnull().all()) for variable in dataset.data_vars.values())


def test_bad_arguments(monkeypatch):
    reference, memory, x = case()
    vma = reference.vma()
    for name in ("num_samples", "max_decodes"):
        with pytest.raises(ValueError, match=f"{name}: expected a whole number"):
            diagnose(vma, memory, x, **{name: 0})
    for per_slot in (-1, 10**12):
        with pytest.raises(ValueError, match=rf"per_slot: expected .* \[1, 10,000,000\] or 0, got {per_slot}"):
            diagnose(vma, memory, x, per_slot=per_slot)
    for episodes, message in (
        ([object()], "each to be a .*Episode, got object"),
        ({}, r"Dataset\[Episode\], got dict"),
    ):
        with pytest.raises(ValueError, match=f"episodes: expected {message}"):
            pv.diagnostics.evaluate(vma, episodes, progress=False)
    with pytest.raises(ValueError, match="x: expected shape"):
        diagnose(vma, memory, x[0])
    with pytest.raises(ValueError, match="labels: the memory has none"):
        diagnose(vma, memory, x, labels=torch.zeros(5).long())
    labelled = pv.Memory(memory.templates, torch.arange(6))
    with pytest.raises(ValueError, match=r"labels: expected shape \(5,\), one per target, got \(4,\)"):
        diagnose(vma, labelled, x, labels=torch.zeros(4).long())
    with pytest.raises(TypeError, match="unexpected keyword argument 'per_slots'"):
        diagnose(vma, memory, x, per_slots=3)
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ImportError, match=r"pip install '.\[arviz\]'"):
        diagnose(vma, memory, x)


# Pairs of Pyro programs

WEIGHTS, LOCS, SCALE = [0.5, 0.3, 0.2], [-1.0, 0.0, 1.5], 0.7


def mixture(x, size=None):
    with pyro.plate("data", size or len(x), subsample_size=len(x), dim=-1):
        k = pyro.sample("k", dist.Categorical(torch.tensor(WEIGHTS)))
        pyro.sample("x", dist.Normal(torch.tensor(LOCS)[k], SCALE), obs=x)


def joint(x):
    return torch.tensor(WEIGHTS).log() + dist.Normal(torch.tensor(LOCS), SCALE).log_prob(x[:, None])


def assignment(sharpness):
    def guide(x, size=None):
        with pyro.plate("data", size or len(x), subsample_size=len(x), dim=-1):
            pyro.sample("k", dist.Categorical(logits=sharpness * joint(x)))

    return guide


@pytest.mark.parametrize("size", [None, 100])
@pytest.mark.parametrize("max_decodes", [5, 50, 4096])  # one draw at a time, 7 of 25, all
def test_a_mixture_with_its_exact_guide(size, max_decodes):
    x = torch.linspace(-2, 2, 7)
    kwargs = {} if size is None else {"size": size}
    dataset = diagnose((mixture, assignment(1.0)), x, site="k", num_samples=25, max_decodes=max_decodes, **kwargs)
    posterior, entropy = joint(x).softmax(-1), torch.distributions.Categorical(logits=joint(x)).entropy()
    assert_values(dataset.information_gain, information_gain(joint(x), torch.tensor(WEIGHTS).log()))
    assert_values(dataset.information_share, tensor(dataset.information_gain) / math.log(3))
    assert_values(dataset.address_entropy, entropy)
    assert_values(dataset.perplexity, entropy.exp())
    assert_values(dataset.address_guide, posterior)
    assert_values(dataset.top, posterior.argmax(-1))
    for name in ("elbo", "log_evidence"):
        assert_values(dataset[name], joint(x).logsumexp(-1))
    for name in ("elbo_gap", "elbo_se", "log_evidence_se"):
        assert_values(dataset[name], torch.zeros(7))
    assert_values(dataset.ess, torch.full((7,), 25.0))
    assert dataset.attrs["site"] == "k"
    assert dataset.attrs["num_samples"] == 25
    assert dataset.attrs["decodes"] == 175
    for variable in dataset.data_vars.values():
        assert variable.attrs["units"] in ("nats", "1")


def test_a_mixture_with_a_rough_guide():
    x = torch.linspace(-2, 2, 20)
    dataset = diagnose((mixture, assignment(0.5)), x, site="k", num_samples=2000)
    q = 0.5 * joint(x)
    assert_values(dataset.information_gain, information_gain(q, torch.tensor(WEIGHTS).log()))
    elbo = (q.softmax(-1) * (joint(x) - q.log_softmax(-1))).sum(-1)
    for name, expected in (("elbo", elbo), ("log_evidence", joint(x).logsumexp(-1))):
        score = (tensor(dataset[name]) - expected) / tensor(dataset[f"{name}_se"])
        assert abs(float(score.mean())) < 3 / math.sqrt(20)
        assert float(score.abs().max()) < 5
    reconstruction = (q.softmax(-1) * dist.Normal(torch.tensor(LOCS), SCALE).log_prob(x[:, None])).sum(-1)
    assert_values(dataset.reconstruction, reconstruction, 0.2)


def nested(x):
    """A site that depends on another one, and an inner plate of sites."""
    with pyro.plate("data", len(x), dim=-1):
        j = pyro.sample("j", dist.Categorical(torch.tensor([0.2, 0.8])))
        k = pyro.sample("k", dist.Categorical(torch.tensor([[0.5, 0.5], [0.9, 0.1]])[j]))
        with pyro.plate("inner", 3, dim=-2):
            pyro.sample("i", dist.Categorical(torch.ones(4) / 4))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)


def nested_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        j = pyro.sample("j", dist.Categorical(torch.tensor([0.5, 0.5])))
        pyro.sample("k", dist.Categorical(torch.tensor([[0.2, 0.8], [0.7, 0.3]])[j]))
        with pyro.plate("inner", 3, dim=-2):
            pyro.sample("i", dist.Categorical(torch.tensor([0.4, 0.3, 0.2, 0.1])))
        pyro.sample("z", dist.Normal(0.5 * x, 0.8))


def test_a_site_that_depends_on_another_is_averaged_over_it():
    x = torch.linspace(-1, 1, 4)
    dataset = diagnose((nested, nested_guide), x, site="k", num_samples=4000)
    q, p = torch.tensor([[0.2, 0.8], [0.7, 0.3]]), torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    gain = (q * (q / p).log()).sum(-1).mean().expand(4)
    assert_values(dataset.information_gain, gain, 0.01)
    assert_values(dataset.address_guide, q.mean(0).expand(4, 2), 0.02)
    assert_values(dataset.kl_j, 0.5 * torch.tensor([0.5 / 0.2, 0.5 / 0.8]).log().sum().expand(4), 1e-9)
    kl_z = dist.kl.kl_divergence(dist.Normal(0.5 * x, 0.8), dist.Normal(0.0, 1.0))
    assert_values(dataset.kl_z, kl_z, 0.05)


def test_several_addresses_a_datapoint_are_summed():
    dataset = diagnose((nested, nested_guide), torch.zeros(4), site="i", num_samples=30)
    q = torch.tensor([0.4, 0.3, 0.2, 0.1])
    assert_values(dataset.information_gain, 3 * (q * (4 * q).log()).sum().expand(4))
    assert_values(dataset.address_entropy, -3 * (q * q.log()).sum().expand(4))
    assert "address_guide" not in dataset


def test_a_pair_without_a_categorical_site():
    dataset = diagnose((nested, nested_guide), torch.zeros(4), site=None, num_samples=30)
    assert {"kl_i", "kl_j", "kl_k", "kl_z", "elbo", "log_evidence"} <= set(dataset.data_vars)
    assert "information_gain" not in dataset


def test_a_vma_as_a_pair_says_the_same():
    reference, memory, x = case()
    vma = reference.vma(address_guide=Perturbed(reference, 2.0), latent_guide=Wide(reference))
    whole, pair = diagnose(vma, memory, x), diagnose((vma.model, vma.guide), memory, x, num_samples=2000)
    for name in ("information_gain", "information_share", "address_entropy", "address_guide", "top"):
        assert_values(pair[name], tensor(whole[name]))
    error = (tensor(pair.elbo_se).square() + tensor(whole.elbo_se).square()).sqrt()
    assert ((tensor(pair.elbo) - tensor(whole.elbo)).abs() < 5 * error).all()
    assert_values(pair.kl_z, tensor(whole.kl_z), 0.5)


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")  # which Pyro says first
def test_bad_pairs():
    x = torch.zeros(4)
    with pytest.raises(ValueError, match=r"no latent site 'a' in common; the guide has \['k'\]"):
        diagnose((mixture, assignment(1.0)), x)
    with pytest.raises(ValueError, match=r"'z' is a Normal in the guide.*categorical sites: \['i', 'j', 'k'\]"):
        diagnose((nested, nested_guide), x, site="z")
    with pytest.raises(ValueError, match="guide: it has no sample site 'k'"):
        diagnose((mixture, lambda x: None), x, site="k")
    with pytest.raises(ValueError, match="labels: they are compared with those of a VMA's memory"):
        diagnose((mixture, assignment(1.0)), x, site="k", labels=x.long())
    with pytest.raises(ValueError, match=r"num_samples: expected a whole number in \[1, 10,000,000\], got 0"):
        diagnose((mixture, assignment(1.0)), x, site="k", num_samples=0)
