"""Simulation-based calibration: whether a guide is as confident as it should be.

Data are drawn from the model itself, so that the true latents are known.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Categorical
from tqdm.auto import tqdm

from pyro_vmem._utils.checks import Count, NonNegativeInt, Share, checked
from pyro_vmem._utils.random_state import seeded
from pyro_vmem.diagnostics.program_diagnosis import as_rows, data_dims, sample_sites
from pyro_vmem.memory import Memory
from pyro_vmem.model import VMA

__all__ = ["Calibration", "sbc"]

Verdict = Literal["calibrated", "too narrow", "too wide", "biased", "not uniform"]

_CHUNK = 256  # simulations at once


@dataclass(frozen=True, eq=False)
class Calibration:
    r"""Ranks of the true latents among draws from the guide, from :func:`sbc`: uniform if the guide is exact.

    Attributes:
        ranks: Of each latent site, integers in 0..L, `(N, D)`: one row per simulation, one column per coordinate.
        num_draws: The number :math:`L` of draws.
        claimed_probability: Of each categorical site, :math:`\sum_a q(a)^2`, the probability of the true value that
            the guide expects to give; `(N, D)`.
        true_probability: The probability :math:`q(a^*)` of the true value; `(N, D)`. If the guide is exact, both have
            the same mean.
    """

    ranks: dict[str, Tensor]
    num_draws: int
    claimed_probability: dict[str, Tensor]
    true_probability: dict[str, Tensor]

    @property
    def uniformity(self) -> dict[str, Tensor]:
        r"""P-values of the :math:`\chi^2` test that ranks are uniform, by coordinate, `(D,)`, not corrected."""
        return {name: _uniformity(ranks, self.num_draws) for name, ranks in self.ranks.items()}

    @property
    def p_values(self) -> dict[str, Tensor]:
        """The smallest p-value of `uniformity`, `bias` and `spread` by coordinate, `(D,)`, corrected by Bonferroni.

        The latter two see a small error of the guide long before the bins of the first do.
        """
        found, scores = {}, (self.bias, self.spread)
        for name, uniformity in self.uniformity.items():
            of_scores = [torch.special.erfc(score[name].abs() / math.sqrt(2)) for score in scores if name in score]
            tests = torch.stack([uniformity, *of_scores])
            found[name] = (len(tests) * tests.amin(0)).clamp(max=1.0)
        return found

    @property
    def adjusted_p_values(self) -> dict[str, Tensor]:
        """`p_values` by Holm's method: corrected for the number of coordinates of the site, `(D,)`."""
        return {name: _holm(p) for name, p in self.p_values.items()}

    @property
    def bias(self) -> dict[str, Tensor]:
        """The distance of the mean rank from the middle, in standard errors, `(D,)`, of sites that are not categorical.

        It is positive where the truth is above the draws of the guide.
        """
        names = [name for name in self.ranks if name not in self.true_probability]
        return {name: _score(self._centred(name), self._grid()) for name in names}

    @property
    def spread(self) -> dict[str, Tensor]:
        """How far the ranks are towards the ends, in standard errors, `(D,)`: positive if the guide is too narrow."""
        scores = {}
        for name in self.ranks:
            centred, grid = self._centred(name), self._grid()
            # The rank of a categorical counts more probable values, so overconfidence shows at one end only.
            ordered = name in self.true_probability
            scores[name] = _score(centred, grid) if ordered else _score(centred.square(), grid.square())
        return scores

    @checked
    def verdicts(self, level: Share = 0.01) -> dict[str, Verdict]:
        """Names the fault of each site, by the worst coordinate whose ranks are not uniform.

        Arguments:
            level: The probability, per site, that an exact guide is called wrong, or a bound on it.
        """
        bias, spread, adjusted = self.bias, self.spread, self.adjusted_p_values
        return {
            name: _verdict(adjusted[name] < level, bias.get(name, torch.zeros_like(spread[name])), spread[name])
            for name in self.ranks
        }

    def summary(self, level: float = 0.01) -> dict[str, dict[str, float | str]]:
        """Returns a row per site: its verdict, smallest adjusted p-value, largest scores and mean probabilities."""
        verdicts, spread, bias = self.verdicts(level), self.spread, self.bias
        rows: dict[str, dict[str, float | str]] = {}
        for name, p in self.adjusted_p_values.items():
            rows[name] = {"verdict": verdicts[name], "p_value": float(p.min()), "spread": _largest(spread[name])}
            if name in bias:
                rows[name]["bias"] = _largest(bias[name])
            else:
                rows[name]["claimed_probability"] = float(self.claimed_probability[name].mean())
                rows[name]["true_probability"] = float(self.true_probability[name].mean())
        return rows

    def _centred(self, name: str) -> Tensor:
        return (self.ranks[name].double() + 0.5) / (self.num_draws + 1) - 0.5

    def _grid(self) -> Tensor:
        """All values of a centred rank."""
        return (torch.arange(self.num_draws + 1, dtype=torch.float64) + 0.5) / (self.num_draws + 1) - 0.5


@torch.no_grad()
def sbc(
    program: VMA | tuple[Any, Any],
    *args: Any,
    num_simulations: Count = 1000,
    num_draws: Count = 99,
    seed: NonNegativeInt = 0,
    progress: bool = False,
    **kwargs: Any,
) -> Calibration:
    r"""Runs simulation-based calibration: ranks latents of the model among draws from the guide.

    .. math:: (a^*, z^*, x^*) \sim p(a, z, x | M), \qquad
        r_d = \#\{l : z_{l,d} < z^*_d\}, \quad z_1, \ldots, z_L \sim q(z | x^*, m_{a^*})

    Ranks are uniform on 0..L if the guide is the exact posterior. They crowd at both ends if it is too narrow, in the
    middle if it is too wide, and at one end if it is biased. Each site is ranked given the true values of the sites
    before it. The values of a categorical are ordered by the probability of the guide, the most probable first, and
    equal ones at random. Its ranks crowd at the high end if the guide is overconfident ("too narrow").

    A guide that ignores the data and is the prior is calibrated too. So is one that is right for each coordinate and
    wrong about their correlation. :func:`diagnose` measures the loss by the guide.

    References:
        | Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts, Betancourt, Simpson,
        | Vehtari, Gelman, 2018), algorithm 1 | https://arxiv.org/abs/1804.06788
        | Simulation-Based Calibration Checking for Bayesian Computation: The Choice of Test Quantities Shapes
        | Sensitivity (Modrák et al., 2023), on ordering by a quantity that depends on the data, and on ties
        | https://arxiv.org/abs/2211.02383

    Arguments:
        program: A VMA, or a pair `(model, guide)` of Pyro programs with the same arguments.
        args: Of a VMA, the memory :math:`M`. Of a pair, the arguments of both, including the observations, which the
            simulated ones replace.
        num_simulations: How many simulations :math:`N`, at least 20; a run of a pair makes as many as its plate holds.
        num_draws: The number :math:`L` of draws of the guide.
        seed: Seeds simulations, draws and ties; the global random state stays as it is.
        kwargs: Keyword arguments of a pair.

    Raises:
        ValueError: If the guide lacks a site, the model observes something else than its arguments, or the memory does
            not fit.

    Example:
        >>> import pyro_vmem as pv
        >>> reference = pv.LinearGaussianMemory(generator=torch.Generator().manual_seed(0))
        >>> memory = pv.Memory(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
        >>> sbc(reference.vma(exact=True), memory, num_simulations=500).verdicts()
        {'a': 'calibrated', 'z': 'calibrated'}
    """
    if num_simulations < 20:
        raise ValueError(f"num_simulations: expected at least 20, got {num_simulations}. 1000 are usual.")
    ranks: dict[str, list[Tensor]] = {}
    claimed: dict[str, list[Tensor]] = {}
    true: dict[str, list[Tensor]] = {}
    done = 0
    with seeded(seed), tqdm(total=num_simulations, desc="calibrating", disable=not (progress and sys.stderr)) as bar:
        simulations = (
            _simulate_vma(program, *args, num_simulations=num_simulations, **kwargs)
            if isinstance(program, VMA)
            else _simulate_pair(*program, args, kwargs)
        )
        while done < num_simulations:
            rows = 0
            for name, (q, truth, dims) in next(simulations).items():
                if isinstance(q, Categorical):
                    rank, expected, reached = _rank_by_probability(q, truth, num_draws)
                    claimed.setdefault(name, []).append(as_rows(expected, dims))
                    true.setdefault(name, []).append(as_rows(reached, dims))
                else:
                    draws = q.sample(torch.Size([num_draws]))
                    below, ties = (draws < truth).sum(0), (draws == truth).sum(0)
                    rank = below + (torch.rand(ties.shape, device=ties.device) * (ties + 1)).long().clamp(max=num_draws)
                ranks.setdefault(name, []).append(as_rows(rank, dims, len(q.event_shape)))
                rows = len(ranks[name][-1])
            done += rows
            bar.update(rows)

    def joined(columns: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat(parts)[:num_simulations].cpu() for name, parts in columns.items()}

    return Calibration(joined(ranks), num_draws, joined(claimed), joined(true))


# Of each site: the distribution of the guide given the simulated data and the true values of the sites before it, the
# true value, and the batch dims that are simulations.
_Simulations = Iterator[dict[str, tuple[Any, Tensor, tuple[int, ...]]]]


def _simulate_vma(vma: VMA, memory: Memory, *, num_simulations: int) -> _Simulations:
    vma.check(memory, None)
    encoded = vma.encode(memory)
    p_a = vma.address_prior(encoded)
    size = torch.Size([] if encoded.per_datapoint else [min(num_simulations, _CHUNK)])
    while True:
        a = p_a.sample(size)
        template = encoded.read(a)
        z = vma.latent_prior(template).sample()
        target = vma.encode_x(vma.likelihood(z, template).sample())
        yield {"a": (vma.address_guide(encoded, target), a, (-1,)), "z": (vma.latent_guide(target, template), z, (-1,))}


def _simulate_pair(model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Simulations:
    while True:
        sites = sample_sites(poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs))
        latents = {name: site for name, site in sites.items() if not site["infer"].get("was_observed")}
        new_args, new_kwargs = list(args), dict(kwargs)
        for name, site in sites.items():
            if name in latents:
                continue
            observed, simulated = site["infer"]["obs"], site["value"]
            positions = [i for i, arg in enumerate(args) if arg is observed]
            keys = [key for key, arg in kwargs.items() if arg is observed]
            if not positions and not keys:
                raise ValueError(
                    f"model: what its site {name!r} observes is none of its arguments, so the guide cannot be given "
                    "simulated data. Observe an argument as it is: pyro.sample(..., obs=x)."
                )
            for position in positions:
                new_args[position] = simulated
            for key in keys:
                new_kwargs[key] = simulated
        truth = {name: site["value"] for name, site in latents.items()}
        guide_sites = sample_sites(poutine.trace(poutine.condition(guide, truth)).get_trace(*new_args, **new_kwargs))
        missing = [name for name in latents if name not in guide_sites]
        if missing:
            raise ValueError(
                f"guide: it has no sample site {missing[0]!r}, which the model leaves unobserved; its sites are "
                f"{sorted(guide_sites)}. Add one."
            )
        dims = data_dims([*sites.values(), *guide_sites.values()])
        yield {name: (guide_sites[name]["fn"], truth[name], dims) for name in latents}


# Ranks


def _rank_by_probability(q: Categorical, truth: Tensor, num_draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rank of the true value without draws, and the probabilities that the guide expects of it and gives to it."""
    probs = q.probs
    own = probs.gather(-1, truth.unsqueeze(-1))
    more = (probs * (probs > own)).sum(-1)
    equal = (probs * (probs == own)).sum(-1)
    level = more + torch.rand_like(more) * equal
    rank = (level * (num_draws + 1)).long().clamp(0, num_draws)
    return rank, probs.square().sum(-1), own.squeeze(-1)


# Statistics of ranks


def _uniformity(ranks: Tensor, num_draws: int) -> Tensor:
    """P-values of Pearson's test, in up to 20 bins of at least 10 expected ranks each."""
    num_bins = max(2, min(20, len(ranks) // 10, num_draws + 1))
    bin_of = torch.arange(num_draws + 1) * num_bins // (num_draws + 1)
    expected = torch.bincount(bin_of, minlength=num_bins).double() * len(ranks) / (num_draws + 1)
    counts = torch.stack([torch.bincount(bin_of[column], minlength=num_bins) for column in ranks.mT])
    statistic = ((counts - expected).square() / expected).sum(-1)
    # The survival function of chi-square.
    return torch.special.gammaincc(torch.full_like(statistic, (num_bins - 1) / 2), statistic / 2)


def _holm(p_values: Tensor) -> Tensor:
    ordered, order = p_values.sort()
    factors = torch.arange(len(p_values), 0, -1, dtype=p_values.dtype)
    adjusted = (ordered * factors).clamp(max=1.0).cummax(0).values
    return torch.empty_like(adjusted).scatter(0, order, adjusted)


def _score(values: Tensor, all_values: Tensor) -> Tensor:
    """The distance of each column's mean from that of the uniform distribution on all values, in standard errors."""
    scale = all_values.std(unbiased=False) / math.sqrt(len(values))
    return (values.mean(0) - all_values.mean()) / scale


def _verdict(flagged: Tensor, bias: Tensor, spread: Tensor) -> Verdict:
    if not bool(flagged.any()):
        return "calibrated"
    size = torch.maximum(bias.abs(), spread.abs()).masked_fill(~flagged, -1.0)
    worst = int(size.argmax())
    if float(size[worst]) < 3:  # neither mean nor spread explains it
        return "not uniform"
    if float(bias[worst].abs()) > float(spread[worst].abs()):
        return "biased"
    return "too narrow" if float(spread[worst]) > 0 else "too wide"


def _largest(scores: Tensor) -> float:
    return float(scores[scores.abs().argmax()])
