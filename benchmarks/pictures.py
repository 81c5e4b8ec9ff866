"""Pictures of the paper, drawn by a table's model: lookups among unseen characters, and new examples of each.

python -m benchmarks.pictures lookup
python -m benchmarks.pictures mnist-learned    # a learned memory: every slot, and samples from it
python -m benchmarks.pictures omniglot28       # docs/lookup.png, the picture of the README, by the packaged model
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import pyro_vmem as pv
from benchmarks import command
from benchmarks.recipes import Recipe, read
from benchmarks.reproduce import trained
from pyro_vmem import plots
from pyro_vmem._utils.files import write_atomically
from pyro_vmem.config.pretrained import pretrained_names, protocol_of
from pyro_vmem.data import Episode, EpisodeSampler, FewShotDataset, protocol
from pyro_vmem.plots._style import GREEN, MID_TONE, ORANGE

IMAGES = 5000  # whose digits tell what a learned slot is for


def lookup_histogram(vma: pv.VMA, recipe: Recipe, seed: int) -> Figure:
    """q(a | x, M) over a memory of eight classes with ten examples each, and the templates on top."""
    episode = EpisodeSampler(recipe.experiment.datasets()[2], n_way=8, k_shot=10, n_query=1, seed=seed)[0]
    memory, probs = looked_up(vma, episode)
    assert memory.labels is not None
    slots = memory.labels.argsort(stable=True)
    figure, shown = Figure(figsize=(9, 6.2), layout="constrained"), 6
    axes = figure.subplots(len(probs), 2 + shown, width_ratios=[1, 7] + shown * [1])
    for number, target in enumerate(episode.labels.argsort().tolist()):
        row = axes[number]
        q, right = probs[target], memory.labels == episode.labels[target]
        plots.images(row[0], episode.x[target : target + 1])
        row[1].bar(
            range(len(q)), q[slots].tolist(), width=1.0, color=[GREEN if r else ORANGE for r in right[slots].tolist()]
        )
        row[1].set(ylim=(0, 1), yticks=(0, 1), xlim=(-0.5, len(q) - 0.5))
        row[1].set_xticks([10 * n - 0.5 for n in range(9)], [])  # where classes end
        row[1].spines[["top", "right"]].set_visible(False)
        for ax, slot in zip(row[2:], q.argsort(descending=True)[:shown].tolist(), strict=True):
            plots.images(ax, memory.templates[slot : slot + 1])
            ax.set_title(f"{100 * q[slot]:.0f} %", fontsize=8, color=GREEN if right[slot] else ORANGE, pad=2)
    axes[0, 0].set_title("target x", fontsize=9)
    axes[0, 1].set_title("q(a | x, M); green: slots of the target's class", fontsize=9)
    axes[-1, 1].set_xlabel("80 slots, ten of each class", fontsize=9)
    return figure


def one_shot(vma: pv.VMA, recipe: Recipe, seed: int) -> Figure:
    """Twelve unseen characters, ten new examples of each."""
    memory = EpisodeSampler(recipe.experiment.datasets()[2], n_way=12, k_shot=1, n_query=1, seed=seed)[0].memory
    samples = torch.stack([vma.generate(memory, 10, address=slot) for slot in range(memory.num_slots)])
    figure = Figure(figsize=(6.5, 6.5))
    return plots.one_shot_generations(figure, memory.templates, samples)


@torch.no_grad()
def learned_slots(vma: pv.VMA, recipe: Recipe, seed: int) -> Figure:
    """Every learned template, by the digit that is looked up there most, and what is drawn from it."""
    held_out = recipe.experiment.datasets()[2]
    some = torch.randperm(len(held_out))[:IMAGES]
    images, digits = held_out.images[some], held_out.classes[some]
    memory = vma.encode(pv.Memory(torch.zeros(1, *vma.event_shape)))
    targets = map(vma.encode_x, held_out.to_float(images).split(256))
    found = [vma.address_guide(memory, x).probs.argmax(-1) for x in targets]
    counts = torch.zeros(memory.num_slots, int(digits.max()) + 1).index_put_(
        (torch.cat(found), digits), torch.tensor(1.0), accumulate=True
    )
    order = torch.stack([counts.sum(-1) == 0, counts.argmax(-1), -counts.amax(-1)]).T.tolist()  # unused ones last
    slots = sorted(range(memory.num_slots), key=order.__getitem__)
    rows = -(-memory.num_slots // 4)
    columns = [slots[first : first + rows] for first in range(0, len(slots), rows)]
    figure = Figure(figsize=(10, 10 * rows / 30))
    for part, chosen in zip(figure.subfigures(1, len(columns), squeeze=False)[0], columns, strict=True):
        templates = memory.templates[chosen].clamp(0, 1)
        samples = torch.stack([vma.generate(memory, 6, address=slot, mean=True) for slot in chosen])
        plots.one_shot_generations(part, templates, samples)
    return figure


@torch.no_grad()
def readme(vma: pv.VMA, test: FewShotDataset, seed: int) -> Figure:
    """The first six targets of an episode: where each is looked up, the gain in nats, and draws from the best slot."""
    episode = EpisodeSampler(test, n_way=20, k_shot=1, n_query=1, seed=seed)[0]
    encoded = vma.encode(episode.memory)
    q = vma.address_guide(encoded, vma.encode_x(episode.x))
    gains = pv.diagnostics.information_gain(q.logits, vma.address_prior(encoded).logits)
    labels, rows, shown, draws = episode.memory.labels, 6, 4, 4
    assert labels is not None
    figure = Figure(figsize=(8.2, 6.0))
    # A column apiece for the target, a gap, the templates, the gain and the draws.
    widths = [1, 0.3, *[1] * shown, 1.4, *[1] * draws]
    axes = figure.subplots(rows, len(widths), width_ratios=widths)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.94, bottom=0.03, hspace=0.32, wspace=0.12)
    for ax in axes.flat:
        ax.set_axis_off()
    for row, x, label, probs, gain in zip(axes, episode.x, episode.labels, q.probs, gains.tolist(), strict=False):
        slots = probs[: len(labels)].argsort(descending=True)[:shown].tolist()  # without the learned slot
        plots.images(row[0], x[None], columns=1)
        for ax, slot in zip(row[2:], slots, strict=False):
            colour, weight = (GREEN, "bold") if labels[slot] == label else (MID_TONE, "normal")
            plots.images(ax, episode.memory.templates[slot : slot + 1], columns=1)
            _write(ax, percent(float(probs[slot])), y=-0.05, va="top", color=colour, weight=weight)
            if labels[slot] == label:
                frame = {"fill": False, "color": GREEN, "linewidth": 2.5, "clip_on": False}
                ax.add_patch(Rectangle((0, 0), 1, 1, transform=ax.transAxes, **frame))
        _write(row[2 + shown], f"{gain:.2f} nats", y=0.5, va="center")
        for ax, sample in zip(row[3 + shown :], vma.generate(episode.memory, draws, address=slots[0]), strict=True):
            plots.images(ax, sample[None], columns=1)
    titles = {0: "target", 3: "most probable templates", 2 + shown: "gain", 4 + shown: "new drawings of the first"}
    height = axes[0, 0].get_position().y1 + 0.015
    for column, title in titles.items():
        box = axes[0, column].get_position()
        # A title over several columns stands over the middle of the group.
        x = box.x1 + 0.005 if column in (3, 4 + shown) else (box.x0 + box.x1) / 2
        figure.text(x, height, title, ha="center", fontsize=11)
    return figure


def _write(ax: Axes, text: str, **where: Any) -> None:
    ax.text(0.5, where.pop("y"), text, transform=ax.transAxes, ha="center", fontsize=10, **where)


def percent(probability: float) -> str:
    """A probability as a figure shows it."""
    return "<1 %" if probability < 0.01 else ">99 %" if probability > 0.99 else f"{100 * probability:.0f} %"


PICTURES: dict[str, Callable[[pv.VMA, Recipe, int], Figure]] = {"histogram": lookup_histogram, "one-shot": one_shot}
OF_LEARNED: dict[str, Callable[[pv.VMA, Recipe, int], Figure]] = {"slots": learned_slots}


@torch.no_grad()
def looked_up(vma: pv.VMA, episode: Episode) -> tuple[pv.Memory, torch.Tensor]:
    """The memory that was given, and the guide's probabilities of its slots."""
    memory = vma.encode(episode.memory)
    return episode.memory, vma.address_guide(memory, vma.encode_x(episode.x)).probs[:, : episode.memory.num_slots]


def main(
    table: str, results: str = "results", run: str | None = None, out: str = "docs/results", seed: int = 0
) -> dict[str, Any]:
    """Draws them.

    Args:
        table: The table whose model it is, or a packaged model, which draws the picture of the README.
        results: The folder of results.
        run: The folder of the run; by default the weights in the folder of results.
        out: The folder of the pictures.
        seed: Seeds episodes and draws.
    """
    if table in pretrained_names():
        test = protocol(protocol_of(table)).datasets()[2]
        path = Path(out).parent / "lookup.png"
        with torch.random.fork_rng(devices=()), matplotlib.rc_context(plots.ON_ANY_PAGE):
            torch.manual_seed(seed)
            with write_atomically(path) as aside:
                readme(pv.VMA.from_pretrained(table), test, seed).savefig(aside, format="png", dpi=150)
        return {"pictures": [str(path)]}
    recipe = read(table)
    vma = trained(recipe, Path(run or "no/such/run"), Path(results, "checkpoints", f"{recipe.run or table}-vma"))
    is_learned = isinstance(vma.templates, pv.LearnedTemplates)
    paths = []
    with torch.random.fork_rng(devices=[]):
        for name, draw in (OF_LEARNED if is_learned else PICTURES).items():
            torch.manual_seed(seed)
            paths.append(Path(out, f"{table}-{name}.png"))
            with write_atomically(paths[-1]) as aside:
                draw(vma, recipe, seed).savefig(aside, format="png", dpi=130)
    return {"pictures": [str(path) for path in paths]}


def show(result: dict[str, Any]) -> None:
    """Where they are."""
    sys.stdout.write("\n".join(result["pictures"]) + "\n")


if __name__ == "__main__":
    command(main, show)
