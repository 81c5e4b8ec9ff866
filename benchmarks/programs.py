"""Six Pyro programs by every objective: is its gradient right, biased as it declares, or is the program refused?

Each program of `benchmarks.examples` is made so small that the sum over all values of its latents is known, with its
gradient. An objective's loss and gradients are drawn many times, and their means compared with that. A cell says

- `exact`: all are within five standard errors; in brackets, the largest distance in standard errors;
- `biased`: the loss and the model's gradient are within five, the guide's is not, and the objective declares a bias;
- `refused`: the objective raises an error, with its reason below the table;
- `WRONG`: none of these.

The cost is the processor time of a step on the Bayesian mixture with 100,000 points, 200 of them in a step, as a ratio
to that of `TraceGraph_ELBO`: the median of steps in turn. An epoch of the same minibatches costs as much more or less.

    python -m benchmarks.programs
    python -m benchmarks.programs --json --draws 50
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import TraceGraph_ELBO, config_enumerate
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import command, examples
from pyro_vmem.infer import (
    IWAE_ELBO,
    RELAX_ELBO,
    RWS_ELBO,
    VIMCO_ELBO,
    DisARM_ELBO,
    EnumGuard,
    GlobalDraws_ELBO,
    RaoBlackwell_ELBO,
    Reinforce_ELBO,
    StraightThrough_ELBO,
    UnorderedSet_ELBO,
)
from pyro_vmem.infer.exhaustive import exhaustive_bound

# Each of the site whose values may be summed.
OBJECTIVES: dict[str, Callable[[str], Any]] = {
    "vimco": lambda site: VIMCO_ELBO(2),
    "vimco, dreg": lambda site: VIMCO_ELBO(2, dreg=True),
    "vimco, backward": lambda site: VIMCO_ELBO(2, backward=1),
    "iwae": lambda site: IWAE_ELBO(2),
    "rws": lambda site: RWS_ELBO(2),
    "rws, pathwise": lambda site: RWS_ELBO(2, pathwise=True),
    "reinforce": lambda site: Reinforce_ELBO(2),
    "rao-blackwell": lambda site: RaoBlackwell_ELBO(1, site),
    "unordered set": lambda site: UnorderedSet_ELBO(2, site),
    "disarm": lambda site: DisARM_ELBO(2),
    "relax": lambda site: RELAX_ELBO(2),
    "straight-through": lambda site: StraightThrough_ELBO(2),
    "enumerate": lambda site: EnumGuard(),
    "global draws": lambda site: GlobalDraws_ELBO(VIMCO_ELBO(2), 2),
}


@dataclass(frozen=True)
class Case:
    """A small program.

    Attributes:
        make: Makes it, and two or so datapoints.
        site: The discrete latent that an objective of one site is asked to sum.
        copies: How many copies of the data stand for as many draws; one, if they would share a latent.
        along: The dim of the data that the copies are made along.
        nodes: The nodes of the sum, for each number that is continuous.
        of_guide: Whether a parameter of that name is the guide's.
    """

    make: Callable[[], tuple[nn.Module, Tensor]]
    site: str
    of_guide: Callable[[str], bool]
    copies: int = 200
    along: int = 0
    nodes: int = 8


def starting(*names: str) -> Callable[[str], bool]:
    """Whether a name starts with one of these."""
    return lambda name: name.startswith(names)


CASES = {
    "Bayesian mixture": Case(
        lambda: (examples.BayesianMixture(2), torch.tensor([-0.8, 1.3])),
        "k",
        starting("loc", "log_width", "log_shape"),
        copies=1,
        nodes=4,
    ),
    "semi-supervised": Case(
        lambda: (examples.SemiSupervised(2, 2, 1, 3), torch.tensor([[0.3, -0.5], [1.0, 0.7]])),
        "y",
        starting("classifier", "encoder"),
        nodes=16,
    ),
    "topics": Case(
        lambda: (examples.TopicModel(2, 3, 3), torch.tensor([[0, 2], [1, 2]])),
        "topic",
        starting("logits", "shares"),
        copies=1,
        along=1,
        nodes=6,
    ),
    "belief network": Case(
        lambda: (examples.SigmoidBelief(3, 2, 2), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])),
        "lower",
        starting("seen", "up"),
    ),
    "hidden Markov": Case(
        lambda: (examples.HiddenMarkov(2, 3), torch.tensor([[0.4, -1.0, 0.8], [1.2, 0.5, -0.3]])),
        "k_0",
        starting("sees", "follows"),
    ),
    "air": Case(
        lambda: (small_air(), torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)).round()),
        "here_0",
        starting("see", "next", "encode"),
        nodes=2,
    ),
}


def points(count: int) -> Tensor:
    """Draws of a mixture of three Gaussians on the line: at -4, 0 and 5, of width 0.7 and shares 0.2, 0.5 and 0.3."""
    generator = torch.Generator().manual_seed(0)
    which = torch.multinomial(torch.tensor([0.2, 0.5, 0.3]), count, replacement=True, generator=generator)
    return torch.tensor([-4.0, 0.0, 5.0])[which] + 0.7 * torch.randn(count, generator=generator)


def small_air() -> examples.AIR:
    """Two steps, one number of appearance; objects are there as often as not."""
    air = examples.AIR(4, 2, steps=2, what=1, hidden=3)
    with torch.no_grad():
        # Places off the grid of pixels and almost sure: linear interpolation has a kink wherever two pixels meet.
        air.next[-1].bias.copy_(torch.tensor([0.3, 0.5, 0.27, -0.33, -3.0, -3.0, -3.0]))
        air.encode[-1].bias[1] = -2.0
    return air


@contextmanager
def double() -> Iterator[None]:
    """Double precision by default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def row_of(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    """A loss and its gradient as one vector."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return torch.cat([loss.detach().reshape(1), *(part.flatten() for part in parts)])


def measure(case: Case, make: Callable[[str], Any], draws: int, exact: dict[Any, Tensor]) -> dict[str, Any]:
    """What an objective does with a program: a verdict, the largest distance, and the standard error as a share."""
    torch.manual_seed(0)
    program, x = case.make()
    names, parameters = zip(*program.named_parameters(), strict=True)
    elbo, guide = make(case.site), program.guide
    if isinstance(elbo, EnumGuard):
        guide = config_enumerate(guide, "parallel", expand=True)
    repeated = torch.cat([x] * case.copies, case.along)
    try:
        rows = [
            row_of(elbo.differentiable_loss(program.model, guide, repeated) / case.copies, parameters)
            for _ in range(draws)
        ]
    except (ValueError, NotImplementedError) as error:
        return {"verdict": "refused", "reason": str(error).split("\n")[0]}
    particles = next(
        (int(e.num_particles) for e in (elbo, getattr(elbo, "local", elbo)) if getattr(e, "weighted", 0)), 1
    )
    if particles not in exact:
        bound = exhaustive_bound(elbo, program.model, program.guide, x, nodes=case.nodes)
        exact[particles] = row_of(-bound, parameters)
    samples, target = torch.stack(rows), exact[particles]
    error = samples.std(0) / draws**0.5
    away = (samples.mean(0) - target).abs() / (error + 1e-9 * target.abs().max())
    of_guide = torch.tensor(
        [False, *(case.of_guide(n) for n, p in zip(names, parameters, strict=True) for _ in range(p.numel()))]
    )
    bias, furthest = getattr(elbo, "bias", ""), float(away.max())
    if bias:
        verdict = "biased" if float(away[~of_guide].max()) <= 5 < furthest else "WRONG"
    else:
        verdict = "exact" if furthest <= 5 else "WRONG"
    noise = float(error[1:].norm() / target[1:].norm())
    return {"verdict": verdict, "away": furthest, "noise": noise, "bias": bias}


def cost(steps: int) -> dict[str, float]:
    """The time of a step on a large mixture, as a ratio to that of `TraceGraph_ELBO`."""
    objectives = {"TraceGraph_ELBO": TraceGraph_ELBO(), "vimco, 4 samples": VIMCO_ELBO(4)}
    objectives |= {"rao-blackwell, k = 2": RaoBlackwell_ELBO(2, "k"), "reinforce, 4 samples": Reinforce_ELBO(4)}
    x, mixture = points(100_000), examples.BayesianMixture(3, batch=200)
    seconds: dict[str, list[float]] = {name: [] for name in objectives}
    for _ in range(steps):
        for name, elbo in objectives.items():
            start = time.process_time()
            mixture.zero_grad()
            elbo.loss_and_grads(mixture.model, mixture.guide, x)
            seconds[name].append(time.process_time() - start)
    base = seconds["TraceGraph_ELBO"][1:]  # the first step finds out about plates
    return {
        name: round(statistics.median(own / other for own, other in zip(rows[1:], base, strict=True)), 2)
        for name, rows in seconds.items()
    }


def main(
    draws: int = 20, steps: int = 30, only: list[str] | None = None, by: list[str] | None = None
) -> dict[str, Any]:
    """Compares all of them.

    Args:
        draws: How many losses are drawn, each of 200 copies of the data; five times as many where these share a latent.
        steps: How many steps of each objective are timed.
        only: The programs; by default all.
        by: The objectives; by default all.
    """
    rows = []
    with torch.random.fork_rng(devices=[]):
        with pyro.get_param_store().scope():
            costs = cost(steps)
        with double():
            for name, case in CASES.items():
                exact: dict[Any, Tensor] = {}
                for objective, make in OBJECTIVES.items():
                    if name in (only or CASES) and objective in (by or OBJECTIVES):
                        with pyro.get_param_store().scope():
                            count = draws if case.copies > 1 else 5 * draws
                            rows.append({"program": name, "objective": objective, **measure(case, make, count, exact)})
    return {"draws": draws, "torch": torch.__version__, "cost": costs, "rows": rows}


def show(result: dict[str, Any]) -> None:
    """Objectives by programs, and why some are refused."""
    rows, console = result["rows"], Console()
    programs = list(dict.fromkeys(row["program"] for row in rows))
    table, reasons = Table("objective", *programs), dict.fromkeys(row["reason"] for row in rows if "reason" in row)
    numbers = {reason: i + 1 for i, reason in enumerate(reasons)}
    for objective in dict.fromkeys(row["objective"] for row in rows):
        cells = []
        for row in (row for row in rows if row["objective"] == objective):
            note = f"[{numbers[row['reason']]}]" if "reason" in row else f"({row['away']:.1f})"
            cells.append(f"{row['verdict']} {note}")
        table.add_row(objective, *cells)
    console.print(table)
    for reason, i in numbers.items():
        console.print(f"[{i}] {reason}", markup=False)
    console.print("A step on the mixture over TraceGraph_ELBO's:", result["cost"])


if __name__ == "__main__":
    command(main, show)
