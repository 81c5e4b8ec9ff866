"""Measured numbers in words: the verdict of a run, and the rows of its table of results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from string import Template

__all__ = ["QUANTITIES", "result_rows", "verdict"]

_IGNORED_SHARE = 0.05  # of log C: below it the guide tells no classes apart
_LEAST_WORTH = 1.0  # nats
_ERRORS = 3.0  # standard errors above zero

# Rows of the table: the key of the metric, its name and what it means.
_NATS = (
    ("nll", "NLL", "Negative log-likelihood, lower is better; an upper bound, from $samples samples of z a slot."),
    ("nll_wrong_memory", "NLL, wrong memory", "The same pictures, with as many templates of other classes."),
    ("memory_worth_nats", "Worth of the memory", "What right templates save over wrong ones; at 0 they are not used."),
)
_GAINS = (
    (
        "information_gain",
        "Information gain",
        "KL from the prior p(a | M) to the guide q(a | M, x). At 0 the guide ignores the picture; "
        "log C = $ceiling nats tell the class.",
    ),
    (
        "information_gain_exact",
        "Information gain, exact",
        "The same for p(a | x, M): what the model itself could tell.",
    ),
)
_HITS = (
    ("hit_rate", "Hit rate", "How often the class that the guide finds most probable is right."),
    ("hit_rate_exact", "Hit rate, exact", "The same for p(a | x, M)."),
)
QUANTITIES = _NATS + _GAINS + _HITS


def verdict(metrics: Mapping[str, float], noun: str = "character") -> str:
    r"""Says in a sentence what the numbers mean, also when they are bad.

    The guide is said to ignore the picture if its information gain is under 5 % of :math:`\log C`, and the memory not
    to be used if it is worth less than 1 nat, or is not 3 standard errors above 0.

    Arguments:
        metrics: The items of `FewShotEvaluation.summary()`; information in nats.
        noun: What a class is.

    Returns:
        A sentence or two.

    Example:
        >>> metrics = {"n_way": 20, "k_shot": 1, "chance": 0.05, "hit_rate": 0.71, "hit_rate_se": 0.02}
        >>> metrics |= {"information_gain": 2.4, "memory_worth_nats": 17.2, "memory_worth_nats_se": 0.5}
        >>> print(verdict(metrics))
        With 20 unseen characters in memory, the right one is found 71 % of the time (chance 5 %); the lookup gains
        2.4 of 3.0 nats, and the memory is worth 17.2 nats a picture.
    """
    ways, shots = round(metrics["n_way"]), round(metrics["k_shot"])
    worth, error = metrics["memory_worth_nats"], metrics["memory_worth_nats_se"]
    gain, ceiling = metrics["information_gain"], math.log(ways)
    used = f"the memory is worth {worth:.1f} nats a picture"
    unused = ""
    if worth < _LEAST_WORTH:
        degree = "hardly" if worth > _ERRORS * error else "not"
        unused = (
            f"The memory is {degree} used: right templates are worth {_signed(worth)} nats a picture over wrong ones."
        )
    elif math.isnan(error):
        unused = f"The memory seems worth {worth:.1f} nats a picture, but one episode gives no standard error."
    elif worth < _ERRORS * error:
        unused = (
            f"The memory is not shown to be used: it is worth {worth:.1f} ± {error:.1f} nats a picture, less than "
            f"{_ERRORS:.0f} standard errors above 0."
        )
    if ways == 1:
        return f"With one unseen {noun} in memory there is no class to look up. " + (unused or f"{_capital(used)}.")
    examples = f", {shots} examples each" if shots > 1 else ""
    found = f"the right one is found {_percent(metrics['hit_rate'])} of the time (chance {_percent(metrics['chance'])})"
    if metrics["hit_rate"] - metrics["chance"] < _ERRORS * metrics["hit_rate_se"]:
        found += ", which is not clearly better than guessing"
    lead = f"With {ways} unseen {noun}s in memory{examples}, {found}"
    gains = f"gains {gain:.1f} of {ceiling:.1f} nats"
    if shots > 1:
        gains = f"gains {gain:.1f} nats, where {ceiling:.1f} tell the class and {math.log(ways * shots):.1f} the slot"
    if gain < _IGNORED_SHARE * ceiling:
        ignores = f"The guide ignores the picture it is given: its lookup gains {gain:.2f} of {ceiling:.1f} nats."
        return f"{ignores} {lead}. {unused or _capital(used) + '.'}"
    return f"{lead}; the lookup {gains}. {unused}" if unused else f"{lead}; the lookup {gains}, and {used}."


def result_rows(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """The rows of a table of results.

    Arguments:
        metrics: The items of `FewShotEvaluation.summary()`; information in nats.

    Returns:
        The name of each quantity, its value with standard error and unit (a line for each unit), and its meaning.

    Raises:
        ValueError: If metrics are missing.

    Example:
        >>> metrics = dict.fromkeys([f"{name}{end}" for name, _, _ in QUANTITIES for end in ("", "_se")], 1.0)
        >>> result_rows(metrics | {"n_way": 20, "k_shot": 1, "chance": 0.05, "num_samples": 10})[0][:2]
        ('NLL', '1.0 ± 1.0 nats')
    """
    names = [key for key, _, _ in QUANTITIES]
    needed = [*names, *(f"{name}_se" for name in names), "n_way", "k_shot", "chance", "num_samples"]
    if missing := [name for name in needed if name not in metrics]:
        raise ValueError(f"metrics: {missing} are missing. Give those of FewShotEvaluation.summary().")
    ceiling, chance = math.log(metrics["n_way"]), _percent(metrics["chance"])

    def measured(key: str, digits: int, scale: float = 1.0) -> str:
        value, error = scale * metrics[key], scale * metrics[f"{key}_se"]
        return _signed(value, digits) + ("" if math.isnan(error) else f" ± {error:.{digits}f}")

    values = {key: f"{measured(key, 1)} nats" for key, _, _ in _NATS}
    slots = math.log(metrics["n_way"] * metrics["k_shot"])
    for key, _, _ in _GAINS:
        share = f"\n{_percent(metrics[key] / slots)} of log |M|" if slots > 0 else ""
        values[key] = f"{measured(key, 2)} nats\n{_signed(metrics[key] / math.log(2), 2)} bits{share}"
    values |= {key: f"{measured(key, 1, 100)} %\nchance {chance}" for key, _, _ in _HITS}
    words = {"samples": f"{metrics['num_samples']:.0f}", "ceiling": f"{ceiling:.2f}"}
    return [(name, values[key], Template(text).substitute(words)) for key, name, text in QUANTITIES]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _percent(share: float) -> str:
    return f"{_signed(100 * share, 0)} %"


def _signed(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")
