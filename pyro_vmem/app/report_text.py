"""Measured numbers in words: the verdict on a run, and the rows of its tables.

The command line prints these texts, and the report shows them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from string import Template

__all__: list[str] = []

IGNORED_SHARE = 0.05  # of log C; the address guide ignores the target if its lookups tell less about it
LEAST_WORTH = 1.0  # nats; the memory is not used if it is worth less over a wrong one
UNKNOWN_SHARE = 0.05  # of the targets; if the error of more is unknown, no conclusion rests on the evidence
_ERRORS = 3.0  # a difference is shown if it is so many standard errors above zero

_GAIN = (
    "KL from the prior p(a | M) to the guide q(a | M, x). At 0 the guide ignores the image; identifying the "
    "class takes log C = $ceiling nats."
)

# The key of a metric, its name, its digits, its unit and its meaning.
Row = tuple[str, str, int, str, str]

# The rows of the table of results.
QUANTITIES: tuple[Row, ...] = (
    ("nll", "NLL", 1, "nats", "Negative log-likelihood, lower is better; a bound from $samples samples of z per slot."),
    ("nll_wrong_memory", "NLL, wrong memory", 1, "nats", "The same images, with as many templates of other classes."),
    ("memory_worth_nats", "Worth of the memory", 1, "nats", "What right templates save over wrong ones."),
    ("information_gain", "Information gain", 2, "nats", _GAIN),
    (
        "information_gain_exact",
        "Information gain, exact",
        2,
        "nats",
        "The same for p(a | x, M), the model's own posterior.",
    ),
    ("hit_rate", "Accuracy", 1, "%", "Share of images whose class is the guide's most probable one; the hit rate."),
    ("hit_rate_exact", "Accuracy, exact", 1, "%", "The same for p(a | x, M)."),
)
# The rows of the table of diagnostics; a row is left out where its metric is missing or NaN.
DIAGNOSTICS: tuple[Row, ...] = (
    ("elbo", "ELBO", 1, "nats", "The one-sample bound: reconstruction minus information gain minus KL(z)."),
    ("reconstruction", "Reconstruction", 1, "nats", "E log p(x | z, m_a) over the guide."),
    ("kl_z", "KL(z)", 1, "nats", "What the latent adds to the template; at 0 it is not used."),
    ("mutual_information", "Mutual information", 2, "nats", "The part of the gain that tells targets apart."),
    (
        "marginal_kl",
        "Marginal term",
        2,
        "nats",
        "The rest of the gain: slots that are looked up whatever the target is.",
    ),
    (
        "perplexity",
        "Slots in play",
        1,
        "",
        "The exponential of the entropy of q(a | M, x): how many slots a lookup considers.",
    ),
    ("slots_never_first", "Slots never first", 1, "", "Of $slots slots, those that are most probable for no target."),
    ("top5_rate", "Top-5 accuracy", 1, "%", "How often the right class is among the guide's five most probable."),
    ("top5_rate_exact", "Top-5 accuracy, exact", 1, "%", "The same for p(a | x, M)."),
    ("calibration_error", "Calibration error", 3, "", "The guide's class probabilities against how often it is right."),
    ("kl_exact_to_guide", "KL, exact to guide", 2, "nats", "What the guide misses of p(a | x, M)."),
    ("rank_correlation", "Rank correlation", 2, "", "Of the slots by the guide and by p(a | x, M); at most 1."),
    ("monte_carlo_se", "Monte Carlo error", 2, "nats", "The part of the NLL's error that more samples would remove."),
    ("ess", "Effective samples", 1, "", "What an image's NLL rests on, of $decodes decoder passes at $slots slots."),
    (
        "error_unknown",
        "Error unknown",
        1,
        "%",
        "Images whose NLL rests on a few large weights and is likely too high. Above 5 %, draw no conclusion from it.",
    ),
)


def problems(metrics: Mapping[str, float]) -> list[str]:
    """Lists the faults of a run in plain sentences, by the items of `FewShotEvaluation.summary()`."""
    found = []
    gain, ceiling = metrics["information_gain"], math.log(metrics["n_way"])
    # A guide that always looks up the same slots has a gain, but no mutual information with the target.
    told = metrics.get("mutual_information", gain)
    if metrics["n_way"] > 1 and min(told, gain) < IGNORED_SHARE * ceiling:
        reason = f"its lookups gain {gain:.2f} of {ceiling:.1f} nats"
        if gain >= IGNORED_SHARE * ceiling:
            reason = "it looks up the same slots whatever the target is"
        found.append(f"The address guide ignores the target: {reason}.")
    if unreliable(metrics):
        return found
    worth, error = metrics["memory_worth_nats"], metrics["memory_worth_nats_se"]
    if worth < LEAST_WORTH:
        degree = "hardly" if worth > _ERRORS * error else "not"
        found.append(
            f"The memory is {degree} used: right templates are worth {_signed(worth)} nats per image over wrong ones."
        )
    elif math.isnan(error):
        found.append(f"The memory seems worth {worth:.1f} nats per image, but one episode gives no standard error.")
    elif worth < _ERRORS * error:
        found.append(
            f"The memory is not shown to be used: it is worth {worth:.1f} ± {error:.1f} nats per image, less than "
            f"{_ERRORS:.0f} standard errors above 0."
        )
    return found


def unreliable(metrics: Mapping[str, float]) -> str:
    """Says why no conclusion may rest on the evidence, such as that on the worth of the memory; empty if one may."""
    unknown = metrics.get("error_unknown", 1.0)
    if unknown <= UNKNOWN_SHARE:
        return ""
    return f"for {_percent(unknown)} of the images the error of the evidence is unknown"


def verdict(metrics: Mapping[str, float]) -> str:
    """Says in a few sentences what the metrics mean; the :func:`problems` come first."""
    ways, shots = round(metrics["n_way"]), round(metrics["k_shot"])
    gain, ceiling = metrics["information_gain"], math.log(ways)
    wrong = problems(metrics)
    ignores = any("ignores the target" in sentence for sentence in wrong)
    used, untold = "", []
    if reason := unreliable(metrics):
        untold = [f"What the memory is worth is not stated: {reason}."]
    elif not any(sentence.startswith("The memory") for sentence in wrong):
        used = f"the memory is worth {metrics['memory_worth_nats']:.1f} nats per image"
    separately = [f"T{used[1:]}."] if used else untold
    if ways == 1:
        closing = "With one unseen character in memory there is no class to look up."
        return " ".join([*wrong, closing, *separately])
    examples = f", {shots} examples each" if shots > 1 else ""
    found = f"the right one is found {_percent(metrics['hit_rate'])} of the time (chance {_percent(metrics['chance'])})"
    if metrics["hit_rate"] - metrics["chance"] < _ERRORS * metrics["hit_rate_se"]:
        found += ", which is not clearly better than guessing"
    lead = f"With {ways} unseen characters in memory{examples}, {found}"
    gains = f"gains {gain:.1f} of {ceiling:.1f} nats"
    if shots > 1:
        gains = f"gains {gain:.1f} nats (the class takes {ceiling:.1f}, the slot {math.log(ways * shots):.1f})"
    if not ignores:
        lead += f"; the lookup {gains}"
        if used:
            return " ".join([*wrong, f"{lead}, and {used}."])
    return " ".join([*wrong, f"{lead}.", *separately])


def result_rows(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """The table of results: name, value with standard error and unit, and meaning."""
    names = [key for key, *_ in QUANTITIES]
    needed = [*names, *(f"{name}_se" for name in names), "n_way", "k_shot", "chance", "num_samples"]
    if missing := [name for name in needed if name not in metrics]:
        raise ValueError(f"metrics: {missing} are missing. Give those of FewShotEvaluation.summary().")
    slots = math.log(metrics["n_way"] * metrics["k_shot"])
    rows = []
    for key, name, value, meaning in _rows(QUANTITIES, metrics):
        if key == "memory_worth_nats" and (reason := unreliable(metrics)):
            value, meaning = "not stated", f"{meaning[:-1]}; {reason}."
        if key.startswith("information_gain"):
            share = f"\n{_percent(metrics[key] / slots)} of log |M|" if slots > 0 else ""
            value += f"\n{_signed(metrics[key] / math.log(2), 2)} bits{share}"
        elif key.startswith("hit_rate"):
            value += f"\nchance {_percent(metrics['chance'])}"
        rows.append((name, value, meaning))
    return rows


def diagnostic_rows(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """The table of diagnostics, in the columns of :func:`result_rows`."""
    rows = [row for row in DIAGNOSTICS if not math.isnan(metrics.get(row[0], math.nan))]
    return [(name, value, meaning) for _, name, value, meaning in _rows(rows, metrics)]


def speed_sentence(metrics: Mapping[str, float]) -> str:
    """Says how long an evaluation took."""
    return (
        f"The evaluation took {metrics['evaluation_seconds']:,.0f} s for {metrics['decodes']:,.0f} decoder passes, "
        f"{metrics['decodes_per_second']:,.0f} per second."
    )


def _rows(rows: Iterable[Row], metrics: Mapping[str, float]) -> Iterator[tuple[str, str, str, str]]:
    """For each row its key, its name, its value with standard error and unit, and its meaning in full."""
    slots = metrics["n_way"] * metrics["k_shot"]
    words = {"slots": f"{slots:.0f}", "decodes": f"{slots * metrics['num_samples']:,.0f}"}
    words |= {"samples": f"{metrics['num_samples']:.0f}", "ceiling": f"{math.log(metrics['n_way']):.2f}"}
    for key, name, digits, unit, meaning in rows:
        scale = 100 if unit == "%" else 1
        value, error = scale * metrics[key], scale * metrics.get(f"{key}_se", math.nan)
        text = _signed(value, digits) + ("" if math.isnan(error) else f" ± {error:.{digits}f}")
        yield key, name, f"{text} {unit}".strip(), Template(meaning).substitute(words)


def _percent(share: float) -> str:
    return f"{_signed(100 * share, 0)} %"


def _signed(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")
