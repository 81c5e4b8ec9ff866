"""What an estimate of the evidence is worth, by each method with the same number of decoder passes.

On the reference model, where the truth is known, with guides that are off in the address or in the latent: the mean gap
to the truth, its root mean square, and what the estimate says of itself (standard error, effective sample size, k-hat),
each by one method alone; how often stated 95 % intervals hold the truth when better methods are taken up to the default
budget, and how often the error is unknown; and how many decoder passes each method needs for the error of sampled
addresses with all passes.
On letters, after a short training: decoder passes per second, and targets per second at the standard error of sampling
with all passes. Standard errors are those of the targets that know theirs; where few do, the higher evidence is better.
`refined` counts a gradient as two decoder passes. `benchmarks.refined` is about models that were trained for long.
    python -m benchmarks.evidence
    python -m benchmarks.evidence --json --slots [16,1024]
    python -m benchmarks.evidence --only_coverage true --packaged [omniglot28]
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any, cast, get_args

import pyro
import pyro.distributions as dist
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

import pyro_vmem as pv
from benchmarks import command
from benchmarks.timing import clock
from pyro_vmem.diagnostics.evidence import Evidence, Method, estimate_evidence, log_evidence
from pyro_vmem.memory import EncodedMemory, Template
from pyro_vmem.parts import over_slots

# The exact posteriors at a power (addresses), and moved by standard deviations (latents).
GUIDES = {"address uniform": (0.0, 0.0), "address too sure": (3.0, 0.0), "latent off": (1.0, 1.0)}
COVERED_GUIDES = {"good": (1.0, 0.0), **GUIDES, "latent far off": (1.0, 2.0)}


class Tempered(pv.AddressGuide):
    """The exact posterior of the address at a power: uniform at 0, overconfident above 1."""

    def __init__(self, reference: pv.LinearGaussianMemory, power: float) -> None:
        super().__init__()
        self.reference, self.power = reference, power

    def forward(self, memory: EncodedMemory, x: Template) -> dist.Categorical:
        """As of `AddressGuide`."""
        return over_slots(self.power * self.reference.address_posterior(memory, x.raw).logits, memory)


class Moved(pv.LatentGuide):
    """A diagonal Gaussian around the exact posterior of the latent, a fifth too wide, its mean off by `shift` sd."""

    def __init__(self, reference: pv.LinearGaussianMemory, shift: float) -> None:
        super().__init__()
        self.reference, self.latent_dim, self.shift = reference, reference.latent_dim, shift

    def forward(self, x: Template, template: Template) -> dist.Distribution:
        """As of `LatentGuide`."""
        exact = self.reference.latent_posterior(x.raw, template.raw)
        return dist.Normal(exact.mean + self.shift * exact.stddev, 1.2 * exact.stddev).to_event(1)


def reference(slots: int, power: float, shift: float, targets: int) -> tuple[pv.VMA, pv.Memory, Tensor, Tensor]:
    """The reference model with such a guide, a memory, targets from the model, and their exact evidence."""
    torch.manual_seed(slots)
    model = pv.LinearGaussianMemory(dim=8, latent_dim=4, generator=torch.Generator().manual_seed(0))
    memory = pv.Memory(1.5 * torch.randn(slots, 8))
    x = model.vma().generate(memory, targets)
    vma = model.vma(address_guide=Tempered(model, power), latent_guide=Moved(model, shift))
    return vma, memory, x, model.log_evidence(memory, x).detach()


def letters(steps: int, slots: int) -> tuple[pv.VMA, pv.Memory, Tensor]:
    """A small convolutional model on glyphs after some steps of VIMCO, and an episode of classes it never saw."""
    train, test = pv.data.glyphs().split(seed=0)
    torch.manual_seed(0)
    vma = pv.VMA.for_images(train.image_shape, latent_dim=16, num_features=64, width=16)
    if steps:
        pv.fit(vma, pv.data.EpisodeSampler(train, n_way=16, k_shot=1, n_query=2, seed=0), steps=steps)
    episode = pv.data.EpisodeSampler(test, n_way=slots, k_shot=1, n_query=1, seed=0)[0]
    return vma, episode.memory, episode.x


def stated_errors(evidence: Evidence) -> dict[str, float]:
    """The errors that an estimate states of itself."""
    summary = evidence.summary()
    return {
        "standard_error": float(evidence.standard_error.square().nanmean().sqrt()),
        "ess": summary["ess"],
        "khat_above": summary["khat_above"],
        "unreliable": summary["error_unknown"],
    }


def against_truth(slots: int, guide: str, decodes: int, targets: int) -> list[dict[str, Any]]:
    """A row a method."""
    vma, memory, x, truth = reference(slots, *GUIDES[guide], targets)
    rows = []
    for method in get_args(Method):
        evidence = estimate_evidence(vma, memory, x, decodes, method, budget=0, seed=0, warn=False)
        gap = truth - evidence.log_evidence
        covered = (gap.abs() < 1.96 * evidence.standard_error)[~evidence.unknown]
        row = {
            "gap": float(gap.mean()),
            "rmse": float(gap.square().mean().sqrt()),
            "covered": float(covered.float().mean()),
        }
        rows.append(
            {"case": f"reference, |M| = {slots}", "guide": guide, "method": method, **row, **stated_errors(evidence)}
        )
    return rows


def coverage_row(
    case: str, guide: str, method: Method, evidence: Evidence, truth: Tensor, truth_error: Tensor | float = 0.0
) -> dict[str, Any]:
    """How often intervals hold the truth, among targets that state one; a truth that is estimated has an error too."""
    known = ~evidence.unknown
    reach = ((evidence.interval[1] - evidence.log_evidence).square() + (1.96 * truth_error) ** 2).sqrt()
    covered = ((evidence.log_evidence - truth).abs() <= reach)[known].double()
    return {
        **{"case": case, "guide": guide, "method": method, "decodes": evidence.num_samples},
        "covered": float(covered.mean()) if len(covered) else None,
        "stated": len(covered),
        "unknown": float(evidence.unknown.double().mean()),
        "decodes_spent": evidence.decodes / len(truth) / evidence.num_samples,
    }


def coverage_on_reference(slots: int, decodes: int, targets: int) -> list[dict[str, Any]]:
    """A row a guide and method, with the default budget."""
    rows = []
    for guide, off in COVERED_GUIDES.items():
        vma, memory, x, truth = reference(slots, *off, targets)
        for method in get_args(Method):
            evidence = estimate_evidence(vma, memory, x, decodes, method, seed=1, max_decodes=8192, warn=False)
            rows.append(coverage_row(f"reference, |M| = {slots}", guide, method, evidence, truth))
    return rows


def coverage_of_packaged(name: str, slots: int, decodes: int, targets: int, long: int) -> list[dict[str, Any]]:
    """The same of a packaged model on glyphs, against four long runs of `refined`, whose spread is its error."""
    vma = pv.VMA.from_pretrained(name)
    glyphs = pv.data.glyphs(size=vma.event_shape[-1])
    episode = pv.data.EpisodeSampler(glyphs, n_way=slots, k_shot=1, n_query=1, seed=0)[0]
    memory, x = episode.memory, episode.x[:targets]
    runs = torch.stack([log_evidence(vma, memory, x, long // 4, "refined") for _ in range(4)])
    truth, error = runs.logsumexp(0) - math.log(4), runs.std(0) / 2
    rows = []
    for method in ("exact-address", "refined"):
        evidence = estimate_evidence(vma, memory, x, decodes, cast(Method, method), seed=1, warn=False)
        rows.append(coverage_row(f"{name}, |M| = {slots}", "trained", cast(Method, method), evidence, truth, error))
    return rows


def at_equal_error(slots: int, guide: str, decodes: int, targets: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each other method: the fewest decoder passes at which its error is that of sampling addresses.

    The error is the root mean square over targets and repeats. Decodes are doubled, from the fewest that there can be.
    """
    vma, memory, x, truth = reference(slots, *GUIDES[guide], targets)

    def rmse(count: int, method: Method) -> float:
        runs = [estimate_evidence(vma, memory, x, count, method, budget=0, seed=r, warn=False) for r in range(repeats)]
        return float(torch.stack([run.log_evidence - truth for run in runs]).square().mean().sqrt())

    sampled, rows = rmse(decodes, "sampled"), []
    for method, least in (("exact-address", slots), ("top-k", min(slots, 9)), ("refined", 48)):
        count = least
        while count < decodes and rmse(count, cast(Method, method)) > sampled:
            count *= 2
        needed = count if count < decodes else None
        rows.append(
            {
                **{"case": f"reference, |M| = {slots}", "guide": guide, "method": method, "rmse_sampled": sampled},
                "decodes_at_equal_error": needed,
                "times_fewer_decodes": decodes / needed if needed else None,
            }
        )
    return rows


def for_an_error(slots: int, guide: str, targets: int, error: float, most: int) -> list[dict[str, Any]]:
    """A row a method: the decoder passes and seconds until the root mean square error over targets is this small.

    Decodes are doubled, up to the most; a row that does not get there has the error and seconds of the last.
    """
    vma, memory, x, truth = reference(slots, *GUIDES[guide], targets)
    now, rows = clock(x.device), []
    for method, least in (("sampled", 64), ("exact-address", slots), ("top-k", 64), ("refined", 64)):
        count, rmse = least // 2, float("inf")
        while rmse > error and 2 * count <= most:
            count *= 2
            start = now()
            found = estimate_evidence(vma, memory, x, count, cast(Method, method), budget=0, seed=1, warn=False)
            seconds, rmse = now() - start, float((found.log_evidence - truth).square().mean().sqrt())
        row = {
            "slots": slots,
            "targets": targets,
            "guide": guide,
            "method": method,
            "decodes": found.decodes // targets,
        }
        rows.append(row | {"seconds": seconds, "rmse": rmse, "reached": rmse <= error})
    for row in rows:
        ends = row["reached"] and rows[0]["reached"]
        for name in ("decodes", "seconds"):
            row[f"times_fewer_{name}"] = rows[0][name] / row[name] if ends else None
    return rows


def on_letters(
    vma: pv.VMA, memory: pv.Memory, x: Tensor, decodes: int, repeats: int, trained: bool
) -> list[dict[str, Any]]:
    """A row a method, timed in turn."""
    methods: tuple[Method, ...] = get_args(Method)
    seconds: dict[str, float] = {}
    found: dict[str, Evidence] = {}
    for repeat in range(repeats):
        for method in methods:
            start = time.perf_counter()
            found[method] = estimate_evidence(vma, memory, x, decodes, method, budget=0, seed=repeat, warn=False)
            # the least disturbed run: machines drift
            seconds[method] = min(seconds.get(method, float("inf")), time.perf_counter() - start)
    rows = []
    for method in methods:
        row = {"log_evidence": float(found[method].log_evidence.mean()), **stated_errors(found[method])}
        worth = (stated_errors(found["sampled"])["standard_error"] / row["standard_error"]) ** 2
        rows.append(
            {
                "case": f"letters, |M| = {memory.num_slots}",
                "guide": "trained" if trained else "as built",
                "method": method,
                **row,
                "decodes_per_second": found[method].decodes / seconds[method],
                "targets_per_second": len(x) / seconds[method],
                "targets_per_second_at_equal_error": len(x) / seconds[method] * worth,
                "times_fewer_decodes": worth,
            }
        )
    return rows


def main(
    slots: list[int] | None = None,
    decodes: int = 1024,
    targets: int = 120,
    letter_slots: int = 32,
    letter_targets: int = 8,
    letter_steps: int = 300,
    repeats: int = 2,
    covered_decodes: int = 256,
    packaged: list[str] | None = None,
    long: int = 4000,
    only_coverage: bool = False,
    error: float = 0.1,
    error_slots: int = 200,
    error_targets: int = 1000,
    error_decodes: int = 8192,
    only_error: bool = False,
) -> dict[str, Any]:
    """Measures all of it.

    Args:
        slots: The numbers of slots of the reference model; by default 16, 64 and 256.
        decodes: Decoder passes per target, by every method.
        targets: Targets of the reference model.
        letter_slots: Letters in memory.
        letter_targets: Letters whose evidence is estimated.
        letter_steps: Training steps of the model on letters.
        repeats: Timed runs a method on letters, and runs of each estimate whose errors are compared.
        covered_decodes: Decodes a target that estimates ask for whose intervals are compared with the truth.
        packaged: Packaged models whose intervals are compared with long runs too, on `letter_targets` glyphs.
        long: Decodes a target of these long runs.
        only_coverage: Whether to measure nothing but how often intervals hold the truth.
        error: The root mean square error, in nats, until which decoder passes and seconds are counted,
        error_slots: with so many slots,
        error_targets: for so many targets,
        error_decodes: up to so many decoder passes per target.
        only_error: Whether to measure nothing but these.
    """
    rows: list[dict[str, Any]] = []
    equal: list[dict[str, Any]] = []
    coverage: list[dict[str, Any]] = []
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
        to_error: list[dict[str, Any]] = []
        for guide in [] if only_coverage else tqdm(GUIDES, desc="to an error", file=sys.stderr):
            to_error += for_an_error(error_slots, guide, error_targets, error, error_decodes)
        if only_error:
            return {"torch": torch.__version__, "error": error, "to_error": to_error}
        for count in tqdm(slots or [16, 64, 256], desc="coverage", file=sys.stderr):
            coverage += coverage_on_reference(count, max(covered_decodes, count), targets)
        for name in packaged or []:
            coverage += coverage_of_packaged(name, letter_slots, covered_decodes, letter_targets, long)
        if only_coverage:
            return {"torch": torch.__version__, "coverage": coverage}
        cases = [(count, guide) for count in slots or [16, 64, 256] for guide in GUIDES]
        for count, guide in tqdm(cases, desc="reference", file=sys.stderr):
            rows += against_truth(count, guide, decodes, targets)
            equal += at_equal_error(count, guide, decodes, targets, repeats)
        vma, memory, x = letters(letter_steps, letter_slots)
        rows += on_letters(vma, memory, x[:letter_targets], decodes, repeats, letter_steps > 0)
    return {
        "decodes": decodes,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "at_equal_error": equal,
        "coverage": coverage,
        "error": error,
        "to_error": to_error,
    }


def show_coverage(rows: list[dict[str, Any]]) -> None:
    """How often 95 % intervals hold the truth, and how often there is none."""
    title = "Stated 95 % intervals that hold the truth, with better methods taken up to the default budget"
    headings = ("decodes asked", "times spent", "covered", "of targets", "error unknown")
    table = Table("case", "guide", "method", *headings, title=title, title_justify="left")
    for row in rows:
        covered = "-" if row["covered"] is None else f"{row['covered']:.0%}"
        spent, unknown = f"{row['decodes_spent']:.1f}", f"{row['unknown']:.0%}"
        table.add_row(
            row["case"], row["guide"], row["method"], f"{row['decodes']}", spent, covered, f"{row['stated']}", unknown
        )
    stated = sum(row["stated"] for row in rows)
    held = sum(row["stated"] * (row["covered"] or 0.0) for row in rows)
    Console().print(table)
    Console().print(f"In all, {held / max(stated, 1):.1%} of {stated} stated intervals hold the truth.")


def show_to_error(rows: list[dict[str, Any]], error: float) -> None:
    """Decoder passes and seconds until the error is small."""
    title = f"Decoder passes per target and seconds until the RMSE is {error} nats, {rows[0]['slots']} slots"
    headings = ("decodes", "seconds", "RMSE", "times fewer decodes", "times faster")
    table = Table("guide off", "method", *headings, title=title, title_justify="left")
    for row in rows:
        ratios = [f"{row[n]:.1f}" if row[n] else "-" for n in ("times_fewer_decodes", "times_fewer_seconds")]
        over = "" if row["reached"] else "over "
        table.add_row(
            row["guide"],
            row["method"],
            f"{over}{row['decodes']}",
            f"{row['seconds']:.2f}",
            f"{row['rmse']:.3f}",
            *ratios,
        )
    Console().print(table)


def show(result: dict[str, Any]) -> None:
    """Coverage, gaps to the truth and speed as one table each."""
    if "to_error" in result:
        show_to_error(result["to_error"], result["error"])
    if "coverage" not in result:
        return
    show_coverage(result["coverage"])
    if "rows" not in result:
        return
    methods = get_args(Method)
    known = [row for row in result["rows"] if "gap" in row]
    title = f"log p(x | M), {result['decodes']} decoder passes per target: gap to the truth (standard error), nats"
    table = Table("case", "guide off", *methods, title=title, title_justify="left")
    for start in range(0, len(known), len(methods)):
        rows = known[start : start + len(methods)]
        cells = [f"{row['gap']:.3f} ({row['standard_error']:.3f})" for row in rows]
        table.add_row(rows[0]["case"], rows[0]["guide"], *cells)
    timed = [row for row in result["rows"] if "gap" not in row]
    title = f"{timed[0]['case']}, guide {timed[0]['guide']}: targets per second, by equal passes and equal errors"
    headings = ("log p(x | M)", "standard error", "unreliable", "decodes/s", "targets/s", "at equal errors")
    speed = Table("method", *headings, title=title, title_justify="left")
    for row in timed:
        rates = ("decodes_per_second", "targets_per_second", "targets_per_second_at_equal_error")
        cells = [f"{row['log_evidence']:.2f}", f"{row['standard_error']:.3f}", f"{row['unreliable']:.0%}"]
        speed.add_row(row["method"], *cells, *(f"{row[name]:.4g}" for name in rates))
    title = f"Decoder passes for the error of {result['decodes']} sampled addresses, and how many times fewer"
    fewer = Table(
        "case", "guide off", "method", "RMSE, nats", "decodes", "times fewer", title=title, title_justify="left"
    )
    for row in result["at_equal_error"]:
        counts = [
            f"{row[name]:.4g}" if row[name] else "-" for name in ("decodes_at_equal_error", "times_fewer_decodes")
        ]
        fewer.add_row(row["case"], row["guide"], row["method"], f"{row['rmse_sampled']:.3f}", *counts)
    for each in (table, fewer, speed):
        Console().print(each)


if __name__ == "__main__":
    command(main, show)
