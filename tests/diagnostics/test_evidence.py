"""Evidence estimates against the reference model, where the truth is known."""

import math
import warnings
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_vmem as pv
from pyro_vmem.data import EpisodeSampler, FewShotDataset
from pyro_vmem.diagnostics import (
    Evidence,
    RefineConfig,
    contribution,
    diagnose,
    estimate_evidence,
    evaluate,
    log_evidence,
    slot_log_evidence,
    weights,
)
from pyro_vmem.diagnostics.evidence_refined import log_joint_of_latent
from pyro_vmem.diagnostics.pathfinder import OptimizationPath, moments
from pyro_vmem.diagnostics.weights import sample_counts
from pyro_vmem.parts import over_slots
from pyro_vmem.testing import assert_unbiased

pytestmark = pytest.mark.usefixtures("float64")

METHODS = ["exact-address", "sampled", "top-k"]
ALL = [*METHODS, "refined"]


class Off(pv.LatentGuide):
    """The exact posterior of the latent, moved and scaled by shares of its standard deviation."""

    def __init__(self, reference, shift=0.0, scale=1.0):
        super().__init__()
        self.reference, self.latent_dim, self.shift, self.scale = reference, reference.latent_dim, shift, scale

    def forward(self, x, template):
        exact = self.reference.latent_posterior(x.raw, template.raw)
        return dist.Normal(exact.mean + self.shift * exact.stddev, self.scale * exact.stddev).to_event(1)


class Sharpened(pv.AddressGuide):
    """The exact posterior of the address at a power: too sure of itself above 1."""

    def __init__(self, reference, power):
        super().__init__()
        self.reference, self.power = reference, power

    def forward(self, memory, x):
        return over_slots(self.power * self.reference.address_posterior(memory, x.raw).logits, memory)


def case(exact, slots=6, targets=5, per_datapoint=False, **latent):
    """The reference model, a guide of it, a memory and targets; `latent` says how far the latent's guide is off."""
    torch.manual_seed(0)
    reference = pv.LinearGaussianMemory(generator=torch.Generator().manual_seed(0))
    guides = {}
    if not exact:
        guides = {
            "address_guide": pv.SimilarityGuide(3, normalise="memory", temperature=1.0, tied=False),
            "latent_guide": Off(reference, **latent) if latent else pv.GaussianGuide(2, num_features=3),
        }
    templates = torch.randn(targets, slots, 3) if per_datapoint else torch.randn(slots, 3)
    memory = pv.Memory(templates, per_datapoint=per_datapoint)
    return reference, reference.vma(exact=exact, **guides), memory, torch.randn(targets, 3)


def path_from_guide(vma, x, template):
    """A path from the guide of the latent to the mode of its posterior."""
    return OptimizationPath(
        log_joint_of_latent(vma, x, template), *moments(vma.latent_guide(vma.encode_x(x), template))
    )


def estimate(*args, **kwargs):
    """By one method, whatever its errors are."""
    return estimate_evidence(*args, budget=0, warn=False, **kwargs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_decodes", [1, 7, 4096])
@pytest.mark.parametrize("per_datapoint", [False, True])
def test_with_the_exact_guide_one_sample_is_enough(method, max_decodes, per_datapoint):
    reference, vma, memory, x = case(True, per_datapoint=per_datapoint)
    exact = reference.log_evidence(memory, x).detach()
    torch.testing.assert_close(log_evidence(vma, memory, x, 1, method, k=2, max_decodes=max_decodes), exact)
    evidence = estimate(vma, memory, x, 30, method, k=2, max_decodes=max_decodes)
    torch.testing.assert_close(evidence.log_evidence, exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(evidence.standard_error, torch.zeros(5), rtol=0, atol=1e-5)
    assert ((evidence.khat == -math.inf) | evidence.khat.isnan()).all()
    slots = slot_log_evidence(vma, memory, x, 2, max_decodes=max_decodes)
    torch.testing.assert_close(slots, reference.slot_log_evidence(memory, x).detach())


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("decodes", [6, 24])
def test_with_any_guide_the_estimate_of_the_density_is_unbiased(method, decodes):
    """exp of the estimate is unbiased: over many targets that are the same, its mean is p(x | M)."""
    reference, vma, memory, x = case(False)
    copies = 2500
    for target in x[:2]:
        estimates = log_evidence(vma, memory, target.expand(copies, -1), decodes, method, k=2, max_decodes=50_000).exp()
        exact = reference.log_evidence(memory, target[None]).detach().exp()
        assert_unbiased(estimates.unsqueeze(-1), exact, resolution=0.1)


@pytest.mark.parametrize("method", ALL)
def test_standard_error_is_the_spread_of_repeated_estimates(method, monkeypatch):
    """What weights tell, whether it is believed or not."""
    monkeypatch.setattr(weights, "unknown", lambda khat, error: error.isnan())
    monkeypatch.setattr(weights, "MISSING_SHARE", 1.0)
    reference, vma, memory, x = case(False, scale=1.5)
    copies = 1200
    for target in x[:2]:
        repeated = target.expand(copies, -1)
        evidence = estimate(vma, memory, repeated, 300, method, k=2, max_decodes=50_000)
        spread = float(evidence.log_evidence.std())
        # the standard error of a standard deviation is its share 1 / sqrt(2 R): 2 %
        known = ~evidence.unknown
        assert known.double().mean() > 0.9
        assert float(evidence.standard_error[known].square().mean().sqrt()) == pytest.approx(spread, rel=5 * 0.02)
        # 95 % within two standard errors, up to 5 of the share's own, 0.006, and the bias of a logarithm
        gap = evidence.log_evidence - reference.log_evidence(memory, target[None]).detach()
        covered = gap.abs() < 1.96 * evidence.standard_error
        assert float(covered[known].double().mean()) == pytest.approx(0.95, abs=0.035)


def test_where_the_latent_guide_is_off_refining_takes_far_fewer_decodes():
    reference, _, memory, x = case(True, slots=3)
    vma = reference.vma(latent_guide=Off(reference, shift=3.0))
    repeated = x.repeat(200, 1)
    exact = reference.log_evidence(memory, repeated).detach()
    cases = {("refined", 48), ("sampled", 960)}
    error = {
        m: float((exact - log_evidence(vma, memory, repeated, n, m, max_decodes=50_000)).square().mean().sqrt())
        for m, n in cases
    }
    assert error["refined"] < 0.5 * error["sampled"]


def test_refined_slots_need_no_luck_where_the_latent_guide_is_exact():
    """All four slots are refined, and the mixture is of three times the same Gaussian."""
    reference, vma, memory, x = case(True, slots=4)
    found = estimate(vma, memory, x, 200, "refined", seed=0)
    torch.testing.assert_close(found.log_evidence, reference.log_evidence(memory, x).detach())
    torch.testing.assert_close(found.standard_error, torch.zeros(5), rtol=0, atol=1e-6)


def test_a_path_ends_in_the_posterior_of_a_gaussian_model():
    reference, _, memory, x = case(True)
    vma = reference.vma(latent_guide=Off(reference, shift=1.5, scale=2.0))
    template = vma.encode(memory).read(torch.tensor([[0] * 5, [3] * 5]))
    target = vma.encode_x(x)
    exact = reference.latent_posterior(x, template.raw)
    path = path_from_guide(vma, x, template)
    halfway, last = path.advance(4).normal_approximation, path.advance(8).normal_approximation
    torch.testing.assert_close(last.mean, exact.mean.detach(), rtol=0, atol=1e-3)
    guide = vma.latent_guide(target, template)
    guide = dist.MultivariateNormal(guide.mean, scale_tril=guide.stddev.diag_embed())
    exact = dist.MultivariateNormal(exact.mean, exact.covariance_matrix.expand(2, 5, 2, 2))
    by_guide, by_halfway, by_last = (kl_divergence(exact, other) for other in (guide, halfway, last))
    assert (by_last < 0.5 * by_guide).all()
    assert (by_halfway < by_guide).all()


def test_going_on_with_some_slots_is_a_path_of_those():
    reference, _, memory, x = case(True)
    vma = reference.vma(latent_guide=Off(reference, shift=1.5, scale=2.0))
    encoded = vma.encode(memory)
    slots, rows = torch.tensor([[0] * 5, [1] * 5, [3] * 5]), torch.tensor([[2, 0, 1, 2, 0], [0, 1, 2, 1, 2]])
    kept = slots.gather(0, rows)
    path = path_from_guide(vma, x, encoded.read(slots)).advance(3)
    path.select(rows, log_joint_of_latent(vma, x, encoded.read(kept))).advance(6)
    alone = path_from_guide(vma, x, encoded.read(kept)).advance(6)
    torch.testing.assert_close(path.normal_approximation.mean, alone.normal_approximation.mean)
    torch.testing.assert_close(path.normal_approximation.scale_tril, alone.normal_approximation.scale_tril)
    torch.testing.assert_close(path.laplace_log_evidence, alone.laplace_log_evidence)


def test_laplace_evidence_is_that_of_the_slot_where_the_guides_spread_is_exact():
    reference, _, memory, x = case(True)
    vma = reference.vma(latent_guide=Off(reference, shift=1.5))
    slots = torch.arange(3)[:, None].expand(3, 5)
    found = path_from_guide(vma, x, vma.encode(memory).read(slots)).advance(12).laplace_log_evidence
    exact = reference.latent_posterior(x, memory.templates[slots])
    # Laplace's approximation is exact, but for the volume of a diagonal guide
    volume = vma.latent_guide(vma.encode_x(x), vma.encode(memory).read(slots)).stddev.log().sum(-1)
    volume = volume - exact.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    truth = torch.stack([reference.log_evidence(pv.Memory(memory.templates[[a]]), x) for a in range(3)])
    torch.testing.assert_close(found, (truth + volume).detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_samples", [1, 50, 200])
def test_refining_counts_a_gradient_as_two_decodes(num_samples):
    _, vma, memory, x = case(False, slots=20)
    made = []
    vma.likelihood.register_forward_hook(
        lambda module, inputs, output: made.append(output.batch_shape.numel() * (2 if inputs[0].requires_grad else 1))
    )
    evidence = estimate(vma, memory, x, num_samples, "refined", max_decodes=60)
    assert sum(made) == evidence.decodes == max(num_samples, 48) * 5


def test_a_gradient_on_the_path_takes_two_decodes_as_it_is_of_the_latent_alone():
    vma = pv.VMA.for_images((1, 8, 8), latent_dim=3, num_features=8, width=2)
    x = torch.rand(4, 1, 8, 8).round()
    template = vma.encode(pv.Memory(x)).read(torch.arange(4))

    class Convolutions(TorchDispatchMode):
        """How many there are forward, and which gradients are asked of those backward: input, weight and bias."""

        def __init__(self):
            super().__init__()
            self.forward, self.backward = 0, []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.forward += func is torch.ops.aten.convolution.default
            if func is torch.ops.aten.convolution_backward.default:
                self.backward.append(tuple(args[-1]))
            return func(*args, **(kwargs or {}))

    with Convolutions() as found:
        path_from_guide(vma, x, template).advance(4)
    assert 0 < len(found.backward) <= found.forward
    assert set(found.backward) == {(True, False, False)}


def test_refining_reaches_slots_that_the_guide_excludes():
    reference, rough, memory, x = case(False, slots=12)  # more than are tried
    vma = reference.vma(address_guide=pv.TruncatedGuide(rough.address_guide, k=1))
    repeated = x[:1].repeat(10_000, 1)
    ratio = (
        log_evidence(vma, memory, repeated, 48, "refined", max_decodes=50_000)
        - reference.log_evidence(memory, repeated).detach()
    ).exp()
    assert_unbiased(ratio.view(40, -1).mean(1), torch.ones(()), resolution=0.05)


def test_refining_takes_any_guide_of_the_latent():
    """One that does not know its moments: those of draws are begun from."""
    reference, _, memory, x = case(True)

    class Unknown(Off):
        def forward(self, x, template):
            q_z = super().forward(x, template)
            return dist.TransformedDistribution(q_z, [torch.distributions.AffineTransform(0.0, 1.0, event_dim=1)])

    vma = reference.vma(latent_guide=Unknown(reference, shift=1.0))
    repeated = x[:1].repeat(4000, 1)
    ratio = (
        log_evidence(vma, memory, repeated, 48, "refined", max_decodes=50_000)
        - reference.log_evidence(memory, repeated).detach()
    ).exp()
    assert_unbiased(ratio.view(40, -1).mean(1), torch.ones(()), resolution=0.05)


def mean_gaps(reference, vma, memory, x, decodes, copies=400, **kwargs):
    """The mean gap to the truth of each method at the same decodes, and the error of the difference to sampling."""
    repeated = x.repeat(copies, 1)
    exact = reference.log_evidence(memory, repeated).detach()
    gaps = {m: (exact - log_evidence(vma, memory, repeated, decodes, m, **kwargs)).view(copies, -1) for m in METHODS}
    differences = {m: (gaps["sampled"] - gaps[m]).mean(1) for m in METHODS}
    error = {m: float(d.std()) / copies**0.5 for m, d in differences.items()}
    return {m: float(gap.mean()) for m, gap in gaps.items()}, error


def test_where_the_address_guide_is_off_summing_addresses_is_tighter():
    reference, rough, memory, x = case(False)
    vma = reference.vma(address_guide=rough.address_guide)  # only the address guide is off
    gap, error = mean_gaps(reference, vma, memory, x, 24)
    assert gap["sampled"] - gap["exact-address"] > 5 * error["exact-address"]
    assert gap["exact-address"] == pytest.approx(0, abs=1e-9)
    assert gap["sampled"] - gap["top-k"] > -5 * error["top-k"]


def test_where_the_latent_guide_is_off_summing_addresses_is_as_tight():
    """A first draw finds the slots that matter, so the others cost one sample each, not an equal share."""
    reference, _, memory, x = case(True, slots=32)
    vma = reference.vma(latent_guide=Off(reference, shift=1.0))
    gap, error = mean_gaps(reference, vma, memory, x, 512, copies=60, k=4)
    assert gap["exact-address"] - gap["sampled"] < 5 * error["exact-address"]
    even = (reference.log_evidence(memory, x).detach() - evenly(vma, memory, x.repeat(60, 1), 16).view(60, -1)).mean()
    assert gap["exact-address"] < 0.5 * even


def evenly(vma, memory, x, num_samples):
    """The evidence from as many samples at every slot."""
    log_prior = vma.address_prior(vma.encode(memory)).logits
    return (log_prior + slot_log_evidence(vma, memory, x, num_samples)).logsumexp(-1)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_where_both_guides_are_off_it_is_tighter_than_sampling(shift):
    reference, rough, memory, x = case(False)
    vma = reference.vma(address_guide=rough.address_guide, latent_guide=Off(reference, shift=shift))
    gap, error = mean_gaps(reference, vma, memory, x, 48)
    assert gap["sampled"] - gap["exact-address"] > 3 * error["exact-address"]


def test_first_draws_have_no_part_in_the_estimate():
    """Unbiased although a slot whose first draw came out low is sampled less."""
    reference, rough, memory, x = case(False)
    vma = reference.vma(address_guide=rough.address_guide, latent_guide=Off(reference, shift=0.7))
    repeated = x[:1].repeat(20_000, 1)
    ratio = (log_evidence(vma, memory, repeated, 24) - reference.log_evidence(memory, repeated).detach()).exp()
    assert_unbiased(ratio.view(40, -1).mean(1), torch.ones(()), resolution=0.02)


def test_top_slots_correct_a_guide_that_is_too_sure():
    reference, _, memory, x = case(True, slots=32)
    vma = reference.vma(address_guide=Sharpened(reference, 3.0))
    repeated = x.repeat(200, 1)
    exact = reference.log_evidence(memory, repeated).detach()
    error = {m: (exact - log_evidence(vma, memory, repeated, 64, m)).square().mean().sqrt() for m in METHODS}
    assert error["top-k"] < 0.5 * error["sampled"]


@pytest.mark.parametrize("k", [6, 50])
def test_top_k_of_all_slots_is_the_exact_sum(k):
    _, vma, memory, x = case(False)
    every, top = (estimate(vma, memory, x, 60, method, k=k, seed=3) for method in ("exact-address", "top-k"))
    for name in ("log_evidence", "standard_error", "ess", "khat"):
        torch.testing.assert_close(getattr(top, name), getattr(every, name), rtol=0, atol=0, equal_nan=True)
    assert (top.decodes, top.method) == (every.decodes, "top-k")


def test_no_stratum_is_starved():
    mass = torch.tensor([[0.999, 0.001, 0.0, 0.0], [0.1, 0.1, 0.1, 0.7], [0.25, 0.25, 0.25, 0.25]])
    counts = sample_counts(80, mass)
    assert counts.sum(-1).tolist() == [80, 80, 80]
    # half of an equal share and half of the guide's, rounded down by one at most
    assert (counts >= 80 / 4 / 2 - 1).all()
    assert (counts >= 80 * mass / 2 - 1).all()
    assert sample_counts(8, mass).tolist() == [[2, 2, 2, 2]] * 3
    assert sample_counts(4, mass).tolist() == [[1, 1, 1, 1]] * 3
    assert sample_counts(7, mass).min() == 1


def test_more_samples_come_closer():
    reference, vma, memory, x = case(False)
    exact = reference.log_evidence(memory, x).detach()
    gap = {n: (exact - log_evidence(vma, memory, x, n)).abs().mean() for n in (6, 6000)}
    assert gap[6000] < 0.2 * gap[6]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 5])
def test_masked_slots_have_no_part(method, k):
    reference, vma, memory, x = case(True)
    masked = pv.Memory(memory.templates, mask=torch.tensor([True] * 4 + [False] * 2))
    expected = reference.log_evidence(pv.Memory(memory.templates[:4]), x).detach()
    torch.testing.assert_close(log_evidence(vma, masked, x, 12, method, k=k), expected)
    if method == "exact-address":
        assert estimate(vma, masked, x, 12, method).decodes == 12 * 5  # none at slots that are not in use
    # one mask a datapoint: the last has a single slot
    mask = torch.arange(6) < torch.tensor([[4], [6], [2], [3], [1]])
    each = pv.Memory(memory.templates.expand(5, -1, -1), mask=mask)
    rows = [reference.log_evidence(pv.Memory(memory.templates[row]), x[i, None]) for i, row in enumerate(mask)]
    torch.testing.assert_close(log_evidence(vma, each, x, 12, method, k=k), torch.cat(rows).detach())


def test_masked_slots_have_no_part_in_refining():
    reference, vma, memory, x = case(True)
    mask = torch.arange(6) < torch.tensor([[4], [6], [2], [3], [1]])
    rows = [reference.log_evidence(pv.Memory(memory.templates[row]), x[i, None]) for i, row in enumerate(mask)]
    each = pv.Memory(memory.templates.expand(5, -1, -1), mask=mask)
    found = estimate(vma, each, x, 400, "refined", seed=0)
    gap = (found.log_evidence - torch.cat(rows).detach()).abs()
    assert (gap <= 4 * found.standard_error + 1e-9).all()
    assert found.standard_error.max() < 0.05  # a fifth of the least that one more slot could add
    # Four or fewer slots are all refined, and the guide is exact there.
    torch.testing.assert_close(gap[[0, 2, 3, 4]], torch.zeros(4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("num_samples", "max_decodes"), [(1, 4096), (50, 13), (50, 120), (50, 4096)])
def test_decodes_are_counted_and_bounded(method, num_samples, max_decodes):
    _, vma, memory, x = case(False)
    made = []
    vma.likelihood.register_forward_hook(lambda module, inputs, output: made.append(output.batch_shape.numel()))
    evidence = estimate(vma, memory, x, num_samples, method, k=2, max_decodes=max_decodes)
    assert sum(made) == evidence.decodes
    assert max(made) <= max_decodes
    each = {"exact-address": max(num_samples, 6), "sampled": num_samples, "top-k": max(num_samples, 3)}
    assert evidence.decodes == each[method] * len(x)
    assert evidence.num_samples == num_samples


@pytest.mark.parametrize("method", ALL)
def test_nothing_is_changed_and_a_seed_repeats_it(method):
    _, vma, memory, x = case(False)
    before, state = {name: p.clone() for name, p in vma.named_parameters()}, torch.get_rng_state()
    first, second = (estimate(vma, memory, x, 12, method, k=2, seed=1).log_evidence for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second)
    assert not torch.equal(first, estimate(vma, memory, x, 12, method, k=2, seed=2).log_evidence)
    assert not first.requires_grad
    assert all(torch.equal(before[name], p) for name, p in vma.named_parameters())
    log_evidence(vma, memory, x, 12, method)
    assert not torch.equal(torch.get_rng_state(), state)  # without a seed, the global state is drawn from


@pytest.mark.parametrize("method", ALL)
def test_half_precision_of_networks_leaves_densities_in_full(method):
    torch.set_default_dtype(torch.float32)  # the fixture puts back what was before
    vma = pv.VMA.for_images((1, 8, 8), latent_dim=4, width=4)
    memory, x = pv.Memory(torch.rand(6, 1, 8, 8).round()), torch.rand(5, 1, 8, 8).round()
    full = estimate(vma, memory, x, 300, method, k=2, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        around = estimate(vma, memory, x, 300, method, k=2, seed=0)
        undone = estimate(vma, memory, x, 300, method, k=2, seed=0, precision="float32")
    inside = estimate(vma, memory, x, 300, method, k=2, seed=0, precision="bfloat16")
    assert torch.equal(around.log_evidence, inside.log_evidence)
    assert torch.equal(undone.log_evidence, full.log_evidence)
    assert not torch.equal(around.log_evidence, full.log_evidence)
    for name in ("log_evidence", "standard_error", "ess", "khat"):
        assert getattr(around, name).dtype == torch.float32
    # bfloat16 has 8 bits: 64 pixels of 0.7 nats, each off by some 1e-3
    torch.testing.assert_close(around.log_evidence, full.log_evidence, rtol=0, atol=0.3)


def test_a_guide_that_is_too_narrow_is_warned_of():
    reference, _, memory, x = case(True)
    vma = reference.vma(latent_guide=Off(reference, scale=0.15))
    with pytest.warns(UserWarning, match="hang on few large weights") as caught:
        evidence = estimate_evidence(vma, memory, x, 1200, budget=0, seed=0)
    (warning,) = caught
    high = int((evidence.khat > 0.7).sum())
    assert high >= 3
    assert f"the errors of {int(evidence.unknown.sum())} of 5 estimates are unknown" in str(warning.message)
    assert Path(warning.filename) == Path(__file__)
    assert evidence.summary()["khat_above"] == high / 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate_evidence(vma, memory, x, 1200, seed=0, warn=False)
        log_evidence(vma, memory, x, 1200)
        estimate_evidence(reference.vma(latent_guide=Off(reference, scale=1.3)), memory, x, 1200, seed=0)


class Box(pv.Likelihood):
    """Gives a target outside of the unit cube no probability."""

    def forward(self, z, template):
        low = torch.zeros(*torch.broadcast_shapes(z.shape[:-1], template.leading_shape), 3)
        return dist.Uniform(low, 1.0, validate_args=False).to_event(1)


def test_too_few_samples_for_a_k_hat_are_warned_of():
    """Four samples at each slot of a rough guide: no tail can be fitted, but the standard error tells."""
    reference, _, memory, x = case(True)
    vma = reference.vma(latent_guide=Off(reference, shift=3.0, scale=0.5))
    with pytest.warns(UserWarning, match="hang on few large weights"):
        evidence = estimate_evidence(vma, memory, x.repeat(20, 1), 24, budget=0, seed=0)
    assert not (evidence.khat > 0.7).any()
    assert evidence.unknown.all()


@pytest.mark.parametrize("method", ALL)
def test_an_estimate_that_is_not_finite_is_never_silent(method):
    _, vma, memory, x = case(True)
    vma.likelihood = Box(vma.likelihood.network)
    x = 0.5 + torch.tensor([0.0, 0.0, 9.0, 0.0, 9.0]).unsqueeze(-1).expand(-1, 3)
    for function in (estimate, log_evidence):
        with pytest.warns(UserWarning, match=r"2 of 5 estimates are not finite \(target 2: -inf\)"):
            values = function(vma, memory, x, 60, method)
    assert values.isinf().tolist() == [False, False, True, False, True]


def test_what_rests_on_the_evidence_is_not_silent_either():
    _, vma, memory, x = case(True)
    vma.likelihood = Box(vma.likelihood.network)
    x = 0.5 + torch.tensor([0.0, 9.0, 0.0]).unsqueeze(-1).expand(-1, 3)
    pytest.importorskip("xarray")
    with pytest.warns(UserWarning, match=r"1 of 3 estimates are not finite \(target 1: -inf\)") as caught:
        diagnose(vma, memory, x, num_samples=2, per_slot=2)
    assert caught[0].filename == __file__  # the line that asked


@pytest.mark.parametrize("part", ["template_encoder", "likelihood"])
def test_a_model_that_is_not_finite_is_not_measured(part):
    vma = pv.VMA.for_vectors(3, latent_dim=2, num_features=4, hidden=(4,))
    next(vma.get_submodule(part).parameters()).data.fill_(math.inf)
    episodes = EpisodeSampler(FewShotDataset(torch.randn(12, 3), torch.arange(12) % 4), 2, 1, 1)
    memory, x = episodes[0].memory, episodes[0].x
    for measure in (
        lambda: evaluate(vma, episodes, 1, 1, progress=False),
        lambda: diagnose(vma, memory, x),
        lambda: contribution(vma, memory, x),
    ):
        with pytest.raises(ValueError, match=r"^vma: '.*' holds values that are not finite\. Build or load it again"):
            measure()


def test_summary_by_hand():
    evidence = Evidence(
        torch.tensor([-1.0, -3.0, -8.0]),
        torch.tensor([math.nan, 0.0, 0.1]),
        torch.tensor([1.0, 2.0, 6.0]),
        torch.tensor([0.9, -math.inf, math.nan]),
        num_samples=10,
        method="sampled",
        decodes=30,
    )
    assert evidence.nll.tolist() == [1.0, 3.0, 8.0]
    expected = {"nll": 4.0, "nll_se": math.sqrt(13 / 3), "monte_carlo_se": math.nan, "ess": 3.0, "khat_above": 1 / 3}
    expected |= {"error_unknown": 1 / 3, "num_samples": 10, "decodes": 30, "num_targets": 3}
    assert evidence.summary() == pytest.approx(expected, nan_ok=True)
    assert evidence.unknown.tolist() == [True, False, False]
    low, high = evidence.interval
    assert low.isnan().tolist() == high.isnan().tolist() == [True, False, False]
    assert low[1] == high[1] == -3.0
    # Student's 0.975 quantile of 1 / 0.1^2 = 100 degrees of freedom, from a table
    torch.testing.assert_close(high[2] + 8.0, torch.tensor(0.19840), rtol=0, atol=1e-5)
    assert "error unknown for 33%" in repr(evidence)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"method": "exact"}, r"method: expected 'exact\-address' or 'sampled' or 'top\-k' .*, got 'exact'"),
        ({"num_samples": 0, "method": "sampled"}, r"num_samples: expected a whole number in \[1, 10,000,000\], got 0"),
        ({"max_decodes": 0}, r"max_decodes: expected a whole number in \[1, 10,000,000\], got 0"),
        ({"k": 0, "method": "top-k"}, r"k: expected a whole number in \[1, 10,000,000\], got 0"),
    ],
)
def test_bad_arguments(kwargs, match):
    _, vma, memory, x = case(True)
    with pytest.raises(ValueError, match=match):
        log_evidence(vma, memory, x, **kwargs)
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 3\)"):
        log_evidence(vma, memory, x[0])


CONFIGS = [
    RefineConfig(max_slots=1, tried_share=0.3),
    RefineConfig(decodes_per_slot=60, gradients=(3, 5, 8), mixture=(0.4, 0.2, 0.2, 0.2)),
    RefineConfig(start_gradients=1, gradients=(1,), mixture=(0.5, 0.5), guide_share=0.9, equal_share=0.5),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_refining_is_unbiased_however_its_decodes_are_spent(config):
    reference, vma, memory, x = case(False, shift=0.5, scale=1.3)
    repeated = x[:1].repeat(3000, 1)
    exact = reference.log_evidence(memory, repeated).detach()
    found = estimate(vma, memory, repeated, 60, "refined", refine=config, seed=0, max_decodes=50_000)
    assert found.decodes == 60 * 3000
    assert_unbiased((found.log_evidence - exact).exp().view(40, -1).mean(1), torch.ones(()), resolution=0.1)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"max_slots": 0}, r"max_slots: expected a whole number in \[1, 10,000,000\], got 0"),
        ({"guide_share": 1.5}, r"guide_share: expected a number in \(0, 1\), got 1\.5"),
        ({"gradients": (8, 4)}, "gradients: expected increasing numbers"),
        ({"gradients": (1, 4)}, "gradients: expected at least start_gradients, 2"),
        ({"mixture": (0.5, 0.5)}, "mixture: expected 3 positive shares that add up to 1"),
        ({"decodes_per_slot": 47}, "decodes_per_slot: expected at least 48, .* got 47"),
    ],
)
def test_what_cannot_be_spent_is_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        RefineConfig(**kwargs)


# Errors that are right or unknown

GUIDES = {
    "good": {"scale": 1.2},
    "address too sure": {"scale": 1.2, "power": 3.0},
    "latent off": {"scale": 1.2, "shift": 2.0},
}


def off(guide, slots=12, targets=150):
    """A reference model with a guide that is off, a memory, targets from the model and their exact evidence."""
    torch.manual_seed(1)
    reference = pv.LinearGaussianMemory(dim=6, latent_dim=3, generator=torch.Generator().manual_seed(0))
    latent = {name: value for name, value in GUIDES[guide].items() if name != "power"}
    address = Sharpened(reference, GUIDES[guide].get("power", 1.0))
    vma = reference.vma(address_guide=address, latent_guide=Off(reference, **latent))
    memory = pv.Memory(1.5 * torch.randn(slots, 6))
    x = vma.generate(memory, targets)
    return vma, memory, x, reference.log_evidence(memory, x).detach()


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("guide", GUIDES)
def test_stated_intervals_cover_the_truth(method, guide):
    vma, memory, x, truth = off(guide)
    found = estimate_evidence(vma, memory, x, 250, method, seed=0, max_decodes=50_000, warn=False)
    low, high = found.interval
    known = ~found.unknown
    covered = ((low < truth) & (truth < high))[known].double()
    assert len(covered) >= 60
    # 90 %, up to three binomial standard errors of so many targets
    assert covered.mean() > 0.9 - 3 * math.sqrt(0.9 * 0.1 / len(covered))


@pytest.mark.long
def test_sampled_addresses_of_an_overconfident_guide_have_the_error_of_the_slots_they_miss(monkeypatch):
    monkeypatch.setitem(GUIDES, "far too sure", {"scale": 1.2, "power": 5.0})
    vma, memory, x, truth = off("far too sure", slots=24, targets=1200)
    found = estimate_evidence(vma, memory, x, 250, "sampled", seed=0, max_decodes=50_000, warn=False)
    low, high = found.interval
    covered = ((low < truth) & (truth < high))[~found.unknown].double()
    assert len(covered) > 1100
    assert covered.mean() > 0.9  # without the slots' posterior it is 0.88, two standard errors below


def test_with_a_budget_the_right_error_is_found_by_better_methods():
    vma, memory, x, truth = off("latent off")
    alone, found = (
        estimate_evidence(vma, memory, x, 250, budget=budget, seed=0, max_decodes=50_000, warn=False)
        for budget in (0, 1000)
    )
    assert alone.unknown.double().mean() > 0.9
    assert found.unknown.double().mean() < 0.3
    assert (found.log_evidence - truth).abs().mean() < 0.2 * (alone.log_evidence - truth).abs().mean()
    assert alone.decodes == 250 * len(x)
    assert alone.decodes < found.decodes <= 1250 * len(x)


def test_a_slot_that_leaves_no_trace_in_weights_is_found():
    """A guide that is sure of a wrong slot: weights of its draws are even, and far too low."""
    vma, memory, x, truth = off("good", targets=40)
    vma.address_guide = Sharpened(vma.address_guide.reference, -20.0)
    alone, found = (
        estimate_evidence(vma, memory, x, 200, "sampled", budget=budget, seed=0, max_decodes=50_000, warn=False)
        for budget in (0, 800)
    )
    wrong = alone.interval[1] < truth  # NaN is not
    assert wrong.double().mean() > 0.2
    assert (found.interval[1] < truth)[~found.unknown].double().mean() < 0.2
    unchecked = estimate_evidence(vma, memory, x, 200, "sampled", budget=11, seed=0, max_decodes=50_000, warn=False)
    assert unchecked.unknown.all()  # twelve slots are more than the budget reaches


def test_a_lucky_target_does_not_know_its_error():
    """All have the same guide: where half of the weights have no variance, the others did not draw the large ones."""
    poor, good = torch.full((3,), 0.6), torch.full((2,), 0.1)
    error = torch.full((5,), 0.1)
    assert weights.unknown(torch.cat([poor, good]), error).all()
    assert not weights.unknown(torch.cat([poor[:2], good, good[:1]]), error).any()
    alone = torch.tensor([0.71, math.inf, math.nan])
    assert [bool(weights.unknown(k[None], error[:1])) for k in alone] == [True, True, True]
    assert not weights.unknown(torch.tensor([math.nan]), torch.tensor([0.0]))  # weights that are equal


def test_without_normal_latents_nothing_is_refined():
    """A normal approximation has no density outside of the support: the sum over slots is drawn again instead."""

    class Positive(pv.LatentGuide):
        latent_dim = 2

        def forward(self, x, template):
            leading = torch.broadcast_shapes(x.leading_shape, template.leading_shape)
            return dist.LogNormal(torch.zeros(*leading, 2), 1.0).to_event(1)

    _, vma, memory, x = case(True)
    vma.latent_guide = Positive()
    found = estimate_evidence(vma, memory, x, 18, seed=0, warn=False)  # too few to tell
    assert found.decodes == (18 + 4 * 18) * len(x)
