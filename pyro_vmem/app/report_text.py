"""Measured numbers in words: the verdict on a run, and the rows of its tables.

The command line prints these texts, and the report shows them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from string import Template

__all__ = [
    "DIAGNOSTICS",
    "IGNORED_SHARE",
    "LEAST_WORTH",
    "QUANTITIES",
    "diagnostic_rows",
    "problems",
    "result_rows",
    "speed_sentence",
    "verdict",
]

IGNORED_SHARE = 0.05
"""The share of log C that lookups tell about the target; below it the address guide is said to ignore the target."""

LEAST_WORTH = 1.0
"""Nats that a right memory is worth over a wrong one; below it the memory is said not to be used."""

UNKNOWN_SHARE = 0.05
"""The share of targets whose evidence has an unknown error, above which no conclusion rests on the evidence."""

_ERRORS = 3.0  # standard errors above zero

_GAIN = (
    "KL from the prior p(a | M) to the guide q(a | M, x). At 0 the guide ignores the picture; log C = $ceiling nats "
    "tell the class."
)

Row = tuple[str, str, int, str, str]
"""The key of a metric, its name, its digits, its unit and its meaning."""

QUANTITIES: tuple[Row, ...] = (
    ("nll", "NLL", 1, "nats", "Negative log-likelihood, lower is better; a bound from $samples samples of z per slot."),
    ("nll_wrong_memory", "NLL, wrong memory", 1, "nats", "The same pictures, with as many templates of other classes."),
    ("memory_worth_nats", "Worth of the memory", 1, "nats", "What right templates save over wrong ones."),
    ("information_gain", "Information gain", 2, "nats", _GAIN),
    (
        "information_gain_exact",
        "Information gain, exact",
        2,
        "nats",
        "The same for p(a | x, M), the model's own posterior.",
    ),
    ("hit_rate", "Hit rate", 1, "%", "How often the class that the guide finds most probable is right."),
    ("hit_rate_exact", "Hit rate, exact", 1, "%", "The same for p(a | x, M)."),
)
"""The rows of the table of results."""

DIAGNOSTICS: tuple[Row, ...] = (
    ("elbo", "ELBO", 1, "nats", "The one-sample bound: reconstruction minus information gain minus KL(z)."),
    ("reconstruction", "Reconstruction", 1, "nats", "E log p(x | z, m_a) over the guide."),
    ("kl_z", "KL(z)", 1, "nats", "What the latent adds to the template; at 0 it is not used."),
    ("mutual_information", "Mutual information", 2, "nats", "The part of the gain that tells targets apart."),
    ("marginal_kl", "Marginal term", 2, "nats", "The rest of it: slots that are looked up whatever the target is."),
    ("perplexity", "Slots in play", 1, "", "How many a lookup hesitates between: exp of the entropy of q(a | M, x)."),
    ("slots_never_first", "Slots never first", 1, "", "Slots, of $slots, that are the first choice for no target."),
    ("top5_rate", "Top-5 hit rate", 1, "%", "How often the right class is among the guide's five most probable."),
    ("top5_rate_exact", "Top-5 hit rate, exact", 1, "%", "The same for p(a | x, M)."),
    ("calibration_error", "Calibration error", 3, "", "The guide's class probabilities against how often it is right."),
    ("kl_exact_to_guide", "KL, exact to guide", 2, "nats", "What the guide misses of p(a | x, M)."),
    ("rank_correlation", "Rank correlation", 2, "", "Of the slots by the guide and by p(a | x, M); at most 1."),
    ("monte_carlo_se", "Monte Carlo error", 2, "nats", "The part of the NLL's error that more samples would remove."),
    ("ess", "Effective samples", 1, "", "What a picture's NLL rests on, of $decodes decoder passes at $slots slots."),
    (
        "error_unknown",
        "Error unknown",
        1,
        "%",
        "Pictures whose NLL hangs on a few large weights: it is likely too high. Above 5 %, no conclusion rests on it.",
    ),
)
"""The rows of the table of diagnostics; a row is left out where its metric is missing or NaN."""


def problems(metrics: Mapping[str, float]) -> list[str]:
    r"""Lists what is wrong with a run, in plain sentences: the guide ignores the target, or the memory is not used.

    The address guide is said to ignore the target if its lookups tell less than 5 % of :math:`\log C` about it
    (`IGNORED_SHARE`): the mutual information of address and target where it was measured, else the information gain.
    The memory is said not to be used if it is worth less than 1 nat (`LEAST_WORTH`) over a wrong one, and not shown to
    be used if that is not 3 standard errors above 0.

    `metrics` are the items of `FewShotEvaluation.summary()`. The worst sentence comes first; without problems there
    is none.

    Example:
        >>> metrics = {"n_way": 20, "k_shot": 1, "information_gain": 2.9, "mutual_information": 0.02}
        >>> problems(metrics | {"memory_worth_nats": 17.2, "memory_worth_nats_se": 0.5})
        ['The address guide ignores the target: it looks up the same slots whatever the target is.']
    """
    found = []
    gain, ceiling = metrics["information_gain"], math.log(metrics["n_way"])
    told = metrics.get("mutual_information", gain)
    if metrics["n_way"] > 1 and min(told, gain) < IGNORED_SHARE * ceiling:
        reason = f"its lookups gain {gain:.2f} of {ceiling:.1f} nats"
        if gain >= IGNORED_SHARE * ceiling:
            reason = "it looks up the same slots whatever the target is"
        found.append(f"The address guide ignores the target: {reason}.")
    worth, error = metrics["memory_worth_nats"], metrics["memory_worth_nats_se"]
    if worth < LEAST_WORTH:
        degree = "hardly" if worth > _ERRORS * error else "not"
        found.append(
            f"The memory is {degree} used: right templates are worth {_signed(worth)} nats per picture over wrong ones."
        )
    elif math.isnan(error):
        found.append(f"The memory seems worth {worth:.1f} nats per picture, but one episode gives no standard error.")
    elif worth < _ERRORS * error:
        found.append(
            f"The memory is not shown to be used: it is worth {worth:.1f} ± {error:.1f} nats per picture, less than "
            f"{_ERRORS:.0f} standard errors above 0."
        )
    return found


def verdict(metrics: Mapping[str, float], noun: str = "character") -> str:
    r"""Says in a few sentences what the metrics mean; the :func:`problems` come first, `noun` is what a class is.

    What the memory is worth is a difference of evidence: it is left out, with the reason, where the error of the
    evidence is unknown for more than 5 % of the targets (`UNKNOWN_SHARE`).

    Example:
        >>> metrics = {"n_way": 20, "k_shot": 1, "chance": 0.05, "hit_rate": 0.71, "hit_rate_se": 0.02}
        >>> metrics |= {"information_gain": 2.4, "memory_worth_nats": 17.2, "memory_worth_nats_se": 0.5}
        >>> print(verdict(metrics))
        With 20 unseen characters in memory, the right one is found 71 % of the time (chance 5 %); the lookup gains
        2.4 of 3.0 nats, and the memory is worth 17.2 nats per picture.
    """
    ways, shots = round(metrics["n_way"]), round(metrics["k_shot"])
    gain, ceiling = metrics["information_gain"], math.log(ways)
    wrong = problems(metrics)
    ignores = any("ignores the target" in sentence for sentence in wrong)
    used = f"the memory is worth {metrics['memory_worth_nats']:.1f} nats per picture"
    if any(sentence.startswith("The memory") for sentence in wrong):
        used = ""
    unknown, untold = metrics.get("error_unknown", 0.0), []
    if used and unknown > UNKNOWN_SHARE:
        used = ""
        untold = [
            f"What the memory is worth is not stated: for {_percent(unknown)} of the pictures the error of the "
            "evidence is unknown."
        ]
    if ways == 1:
        closing = f"With one unseen {noun} in memory there is no class to look up."
        return " ".join([*wrong, closing, *([f"{_capital(used)}."] if used else []), *untold])
    examples = f", {shots} examples each" if shots > 1 else ""
    found = f"the right one is found {_percent(metrics['hit_rate'])} of the time (chance {_percent(metrics['chance'])})"
    if metrics["hit_rate"] - metrics["chance"] < _ERRORS * metrics["hit_rate_se"]:
        found += ", which is not clearly better than guessing"
    lead = f"With {ways} unseen {noun}s in memory{examples}, {found}"
    gains = f"gains {gain:.1f} of {ceiling:.1f} nats"
    if shots > 1:
        gains = f"gains {gain:.1f} nats, where {ceiling:.1f} tell the class and {math.log(ways * shots):.1f} the slot"
    if not ignores:
        lead += f"; the lookup {gains}"
        if used:
            return " ".join([*wrong, f"{lead}, and {used}."])
    return " ".join([*wrong, f"{lead}.", *([f"{_capital(used)}."] if used else []), *untold])


def result_rows(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """The table of results, what a run is judged by: name, value with standard error and unit, and meaning.

    Raises:
        ValueError: If metrics are missing.

    Example:
        >>> metrics = dict.fromkeys([f"{key}{end}" for key, *_ in QUANTITIES for end in ("", "_se")], 1.0)
        >>> result_rows(metrics | {"n_way": 20, "k_shot": 1, "chance": 0.05, "num_samples": 10})[0][:2]
        ('NLL', '1.0 ± 1.0 nats')
    """
    names = [key for key, *_ in QUANTITIES]
    needed = [*names, *(f"{name}_se" for name in names), "n_way", "k_shot", "chance", "num_samples"]
    if missing := [name for name in needed if name not in metrics]:
        raise ValueError(f"metrics: {missing} are missing. Give those of FewShotEvaluation.summary().")
    slots = math.log(metrics["n_way"] * metrics["k_shot"])
    rows = []
    for key, name, value, meaning in _rows(QUANTITIES, metrics):
        if key.startswith("information_gain"):
            share = f"\n{_percent(metrics[key] / slots)} of log |M|" if slots > 0 else ""
            value += f"\n{_signed(metrics[key] / math.log(2), 2)} bits{share}"
        elif key.startswith("hit_rate"):
            value += f"\nchance {_percent(metrics['chance'])}"
        rows.append((name, value, meaning))
    return rows


def diagnostic_rows(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """The table of diagnostics, in the columns of :func:`result_rows`; metrics that are missing or NaN have no row.

    Example:
        >>> diagnostic_rows({"kl_z": 12.34, "kl_z_se": 0.5, "n_way": 20, "k_shot": 1, "num_samples": 10})[0][:2]
        ('KL(z)', '12.3 ± 0.5 nats')
    """
    rows = [row for row in DIAGNOSTICS if not math.isnan(metrics.get(row[0], math.nan))]
    return [(name, value, meaning) for _, name, value, meaning in _rows(rows, metrics)]


def speed_sentence(metrics: Mapping[str, float]) -> str:
    """Says how long an evaluation took, and how many decoder passes per second that is.

    Example:
        >>> print(speed_sentence({"evaluation_seconds": 25.0, "decodes": 160_000, "decodes_per_second": 6400.0}))
        The evaluation took 25 s for 160,000 decoder passes, 6,400 per second.
    """
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


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _percent(share: float) -> str:
    return f"{_signed(100 * share, 0)} %"


def _signed(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")
