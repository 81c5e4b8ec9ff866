"""Pictures of docs/results.md: lookups among unseen characters, draws beside real drawings, completions.

python -m benchmarks.pictures omniglot28       # by the packaged model; also docs/lookup.png, the picture of the README
python -m benchmarks.pictures mnist-learned    # a learned memory: every slot, and samples from it
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
from benchmarks.recipes import read
from benchmarks.reproduce import trained
from pyro_vmem import plots
from pyro_vmem._utils.files import write_atomically
from pyro_vmem.config.pretrained import pretrained_names, protocol_of
from pyro_vmem.data import Episode, EpisodeSampler, FewShotDataset, protocol
from pyro_vmem.plots._image_rows import SPLIT, STEP, as_colours, draw_image, image_canvas
from pyro_vmem.plots._style import BLUE, GREEN, MID_TONE, ORANGE

IMAGES = 5000  # whose digits tell what a learned slot is for


def lookup_histogram(vma: pv.VMA, test: FewShotDataset, seed: int) -> Figure:
    """q(a | M, x) over a memory of eight classes with ten examples each, and the templates on top."""
    episode = EpisodeSampler(test, n_way=8, k_shot=10, n_query=1, seed=seed)[0]
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
    axes[0, 1].set_title("q(a | M, x); green: slots of the target's class", fontsize=9)
    axes[-1, 1].set_xlabel("80 slots, ten of each class", fontsize=9)
    return figure


def draws_beside_real(vma: pv.VMA, test: FewShotDataset, seed: int) -> Figure:
    """Unseen characters: the one drawing in memory, others by people, and draws of the model from that slot."""
    rows, shown = 10, 6
    episode = EpisodeSampler(test, n_way=rows, k_shot=1, n_query=shown, seed=seed)[0]
    memory = episode.memory
    assert memory.labels is not None
    figure, right = Figure((7.6, 5.8)), SPLIT + shown * STEP + SPLIT - STEP
    ax, font = image_canvas(figure, right + shown * STEP, 0.5 + rows * STEP)
    titles = {0.5: "memory", SPLIT + shown * STEP / 2: "other people", right + shown * STEP / 2: "the model"}
    for place, title in titles.items():
        ax.text(place, 0.3, title, ha="center", fontsize=font)
    for row, label in enumerate(memory.labels.tolist()):
        top = 0.5 + row * STEP
        samples = vma.generate(episode.memory, shown, address=row)
        draw_image(ax, 0, top, as_colours("templates", memory.templates[row : row + 1])[0], BLUE, font / 4)
        for left, images in ((SPLIT, episode.x[episode.labels == label]), (right, samples)):
            for place, image in enumerate(as_colours("images", images)):
                draw_image(ax, left + place * STEP, top, image)
    return figure


def completed(vma: pv.VMA, test: FewShotDataset, seed: int) -> Figure:
    """The lower half of unseen characters, filled in with one drawing of each of twelve characters in memory."""
    episode = EpisodeSampler(test, n_way=12, k_shot=1, n_query=1, seed=seed)[0]
    x = episode.x[:8]
    mask = (torch.arange(x.shape[-2]) < x.shape[-2] // 2)[:, None].expand(x.shape[1:])
    filled = torch.stack([vma.complete(episode.memory, x, mask) for _ in range(6)], 1)
    return plots.completions(Figure((5.4, 5.2)), x, mask, filled)


@torch.no_grad()
def learned_slots(vma: pv.VMA, test: FewShotDataset, seed: int) -> Figure:
    """Every learned template, by the digit that is looked up there most, and what is drawn from it."""
    some = torch.randperm(len(test))[:IMAGES]
    images, digits = test.images[some], test.classes[some]
    memory = vma.encode(pv.Memory(torch.zeros(1, *vma.event_shape)))
    targets = map(vma.encode_x, test.to_float(images).split(256))
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


Draw = Callable[[pv.VMA, FewShotDataset, int], Figure]
PICTURES: dict[str, Draw] = {"lookups": lookup_histogram, "draws": draws_beside_real, "completions": completed}
OF_LEARNED: dict[str, Draw] = {"slots": learned_slots}


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
        table: The table whose model it is, or a packaged model, which also draws the picture of the README.
        results: The folder of results.
        run: The folder of the run; by default the weights in the folder of results.
        out: The folder of the pictures.
        seed: Seeds episodes and draws.
    """
    wanted: dict[Path, Draw] = {}
    if table in pretrained_names():
        vma, test = pv.VMA.from_pretrained(table), protocol(protocol_of(table)).datasets()[2]
        wanted[Path(out).parent / "lookup.png"] = readme
    else:
        recipe = read(table)
        vma = trained(recipe, Path(run or "no/such/run"), Path(results, "checkpoints", f"{recipe.run or table}-vma"))
        test = recipe.experiment.datasets()[2]
    is_learned = isinstance(vma.templates, pv.LearnedTemplates)
    of_model = OF_LEARNED if is_learned else PICTURES
    wanted |= {Path(out, f"{table}-{name}.png"): draw for name, draw in of_model.items()}
    for path, draw in wanted.items():
        style = plots.ON_ANY_PAGE if draw is readme else {}
        with torch.random.fork_rng(devices=()), matplotlib.rc_context(style), write_atomically(path) as aside:
            torch.manual_seed(seed)
            draw(vma, test, seed).savefig(aside, format="png", dpi=150 if draw is readme else 130)
    return {"pictures": [str(path) for path in wanted]}


def show(result: dict[str, Any]) -> None:
    """Where they are."""
    sys.stdout.write("\n".join(result["pictures"]) + "\n")


if __name__ == "__main__":
    command(main, show)
