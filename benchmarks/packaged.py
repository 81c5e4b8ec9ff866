"""What the packaged models are worth: likelihood and lookup, one-shot classification, and draws.

All is measured on characters of the evaluation alphabets of Omniglot, with memories of one drawing of each of 20
characters. A right memory is compared with one of other characters. A one-shot trial has 20 characters of one alphabet,
as in the challenge, drawn at random here. Another model, of `benchmarks.recogniser`, judges draws beside real drawings
of the same characters.

    python -m benchmarks.recogniser --out recogniser.safetensors
    python -m benchmarks.packaged recogniser.safetensors
    python -m benchmarks.packaged recogniser.safetensors --models [omniglot28] --json
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

import pyro_vmem as pv
from benchmarks import command
from benchmarks.recogniser import accuracy, load
from pyro_vmem.config.pretrained import protocol_of
from pyro_vmem.data import EpisodeSampler
from pyro_vmem.diagnostics import evaluate, one_shot_errors, sample_quality

EVALUATED = ("nll", "memory_worth_nats", "information_gain", "kl_z", "hit_rate", "hit_rate_exact")
DRAWN = ("recognised", "recognised_real", "diversity", "diversity_real", "diversity_ratio")
WAYS_TO_DRAW: dict[str, dict[str, Any]] = {
    "as they are": {},
    "best of 4": {"best_of": 4},
    "half the spread of z": {"temperature": 0.5},
}


def main(
    recogniser: str,
    models: list[str] | None = None,
    episodes: int = 25,
    samples: int = 100,
    trials: int = 20,
    drawn_episodes: int = 5,
) -> dict[str, Any]:
    """Measures each model.

    Args:
        recogniser: The weights that `benchmarks.recogniser` wrote.
        models: Names of packaged models; all by default.
        episodes: Episodes of 20 characters with two targets each.
        samples: Samples of z per slot, for the likelihood; a fifth of them per pair of a one-shot trial.
        trials: One-shot trials.
        drawn_episodes: Episodes of 20 characters with four draws each.
    """
    judge, rows = load(recogniser), []
    for name in tqdm(models or pv.pretrained_names(), desc="models", file=sys.stderr):
        vma = pv.VMA.from_pretrained(name)
        test = pv.data.protocol(protocol_of(name)).datasets()[2]
        sampler = EpisodeSampler(test, n_way=20, k_shot=1, n_query=2)
        figures = evaluate(vma, sampler, num_episodes=episodes, num_samples=samples).summary()
        row = {"model": name} | {
            key: figures[key] for each in EVALUATED for key in (each, f"{each}_se") if key in figures
        }
        within = pv.data.within_alphabet_trials(test, trials)
        row["one_shot"] = one_shot_errors(vma, within, max(1, samples // 5)).summary()
        many = EpisodeSampler(test, n_way=20, k_shot=1, n_query=5, seed=1)
        drawn = [many[i] for i in range(drawn_episodes)]
        row["draws"] = [
            {"how": how} | sample_quality(vma, drawn, judge, **ways).summary() for how, ways in WAYS_TO_DRAW.items()
        ]
        rows.append(row)
    right, error = accuracy(judge, pv.data.protocol("whole-memory").datasets()[2])
    return {"recogniser": {"accuracy": right, "standard_error": error}, "samples": samples, "rows": rows}


def show(result: dict[str, Any]) -> None:
    """A column for each model."""
    judge = result["recogniser"]
    title = f"20 unseen characters; the recogniser is right for {judge['accuracy']:.1%} ± {judge['standard_error']:.1%}"
    table = Table("", *(row["model"] for row in result["rows"]), title=title, title_justify="left")
    for name in EVALUATED:
        table.add_row(name, *(f"{row[name]:.3g} ± {row[f'{name}_se']:.2g}" for row in result["rows"]))
    for name in ("guide", "evidence", "two_way"):
        cells = (f"{row['one_shot'][name]:.1%} ± {row['one_shot'][f'{name}_se']:.1%}" for row in result["rows"])
        table.add_row(f"one-shot error, {name}", *cells)
    for number, how in enumerate(WAYS_TO_DRAW):
        for name in DRAWN:
            table.add_row(f"{name}, {how}", *(f"{row['draws'][number][name]:.3f}" for row in result["rows"]))
    Console().print(table)


if __name__ == "__main__":
    command(main, show)
