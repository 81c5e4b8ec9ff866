"""Draws the gallery: `python -m docs.gallery` writes docs/gallery/*.png and docs/gallery.md; two minutes, no download.

A small model is trained on letters for half a minute. The reference model is used where a figure needs known answers.
Each picture is drawn by the line of code that the page shows under it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "gallery"
DPI = 200  # pictures are shown at half of their pixels, so they are sharp on fine displays


@dataclass(frozen=True)
class Picture:
    """One picture of the gallery.

    Attributes:
        name: The name of its file.
        text: What it shows, in a sentence.
        code: The line that draws it, on `ax` or on `figure`.
        size: Width and height in inches.
        crop: Whether to cut the figure to what is drawn, in place of laying it out.
    """

    name: str
    text: str
    code: str
    size: tuple[float, float] = (4.6, 3.4)
    crop: bool = False


PICTURES = (
    Picture(
        "graphical_model",
        "The sites of a Pyro program, their dependencies, and the plates. Observed sites are grey. A square is an "
        "argument of the program.",
        'plots.graphical_model(ax, relations, ["M"])',
        (3.4, 3.0),
    ),
    Picture(
        "lookups",
        "Targets beside the templates that the guide finds most probable; the bars are its probabilities and, below, "
        "those of the exact posterior.",
        "plots.lookups(figure, x[:4], memory.templates, q[:4], memory.labels, labels[:4], max_slots=6, exact=p[:4])",
        (4.6, 5.0),
        crop=True,
    ),
    Picture(
        "address_heat_map",
        "The probability of every slot for every target, both sorted by class. Frames mark the right class.",
        "plots.address_heat_map(ax, q, memory.labels, labels)",
    ),
    Picture(
        "information_gain_histogram",
        "The information gain of each lookup, of the guide and of the exact posterior. The lines are log |M|, which "
        "identifies the slot, and log C, which identifies the class.",
        "plots.information_gain_histogram(ax, gain, num_slots=64, num_classes=16, exact=gain_exact)",
    ),
    Picture(
        "information_gain_against_slots",
        "The information gain as the memory grows, with its maximum.",
        "plots.information_gain_against_slots(ax, sizes, gains, errors, exact=gains_exact)",
    ),
    Picture(
        "evidence_by_memory",
        "The evidence of the same targets under the right memory, one of other classes, and one of the same ink "
        "without structure.",
        'plots.evidence_by_memory(ax, {"right": right, "wrong": wrong, "shuffled": shuffled})',
        (4.6, 2.5),
    ),
    Picture(
        "learning_curves",
        "The bound against steps, in training and on held-out classes.",
        'plots.learning_curves(ax, history, ["bound", "val_bound"])',
    ),
    Picture(
        "learning_curves_kl",
        "The cost of the address and of the latent, KL(a) and KL(z).",
        'plots.learning_curves(ax, history, ["kl_a", "val_kl_a", "kl_z", "val_kl_z"])',
    ),
    Picture(
        "one_shot_generations",
        "New examples of characters that the model has seen once, each row from one template.",
        "plots.one_shot_generations(figure, memory.templates[:4], samples)",
        (4.6, 3.2),
        crop=True,
    ),
    Picture(
        "completions",
        "The lower half of unseen images, completed by the model with its memory.",
        "plots.completions(figure, x[:4], mask, filled)",
        (4.6, 3.2),
        crop=True,
    ),
    Picture(
        "images",
        "The templates of a memory.",
        "plots.images(ax, memory.templates[:40], columns=10)",
        (4.6, 1.9),
        crop=True,
    ),
    Picture(
        "reliability_diagram",
        "Accuracy of the guide against its confidence.",
        "plots.reliability_diagram(ax, curve.confidence, curve.accuracy, curve.count)",
        (4.0, 4.2),
    ),
    Picture(
        "khat_scatter",
        "k-hat of each datapoint: above 0.7, importance sampling with the guide is unreliable. This guide is too "
        "narrow by a third.",
        "plots.khat_scatter(ax, evidence.khat)",
    ),
    Picture(
        "sbc_histograms",
        "Simulation-based calibration of an exact guide, of one that is too narrow, and of one that is shifted.",
        "plots.sbc_histograms(figure, ranks, num_draws=99)",
        (6.6, 2.6),
    ),
)

HEAD = """# Gallery

Figures are functions of arrays and rows. They take the Axes or Figure to draw on and return it. They change no global
settings, and they take data, not a model. Text, axes and background follow your matplotlib settings. The pictures here
were drawn under `plots.ON_ANY_PAGE`, so that one file works on white and on dark pages:

```python
import matplotlib
from matplotlib.figure import Figure
from pyro_vmem import plots

with matplotlib.rc_context(plots.ON_ANY_PAGE):
    figure = Figure((4.6, 3.4), layout="constrained")
    plots.learning_curves(figure.subplots(), history)
    figure.savefig("curves.png", dpi=200)
```

`python -m docs.gallery` draws this page again. It trains a model for half a minute on letters of many scripts, and uses
the reference model where a figure needs known answers.
"""


def page() -> str:
    """The text of docs/gallery.md."""
    parts = [HEAD]
    for picture in PICTURES:
        width = round(100 * picture.size[0])
        parts.append(
            f"## {picture.name}\n\n{picture.text}\n\n"
            f'<img src="gallery/{picture.name}.png" width="{width}" alt="{picture.text}">\n\n'
            f"```python\n{picture.code}\n```\n"
        )
    return "\n".join(parts)


def contents() -> dict[str, Any]:
    """The arrays that the pictures show, by the names in their code."""
    import torch

    import pyro_vmem as pv

    train, test = pv.data.glyphs().split(by="alphabet", test=0.2, seed=0)
    torch.manual_seed(0)
    vma = pv.VMA.for_images(train.image_shape, latent_dim=16, width=16)
    held_out = pv.data.EpisodeSampler(test, n_way=16, k_shot=4, n_query=2, seed=1)
    sampler = pv.data.EpisodeSampler(train, n_way=16, k_shot=4, n_query=4, seed=0)
    result = pv.fit(vma, sampler, steps=600, validation=held_out, validate_every=60)
    names: dict[str, Any] = {"history": result.history}

    episode = held_out[0]
    memory, x = vma.encode(episode.memory), episode.x
    diagnosed = pv.diagnostics.diagnose(vma, memory, x, num_samples=25, per_slot=5)
    q, p = (torch.tensor(diagnosed[name].values) for name in ("address_guide", "address_exact"))
    names |= {"memory": memory, "x": x, "labels": episode.labels, "q": q, "p": p}

    evaluation = pv.diagnostics.evaluate(vma, held_out, num_episodes=5, num_samples=2)
    names |= {"gain": evaluation.information_gain, "gain_exact": evaluation.information_gain_exact}
    names["curve"] = evaluation.reliability

    found = pv.diagnostics.contribution(vma, memory, x, wrong=held_out.distractors(0), num_samples=3)
    names |= {name: found.evidence[name] for name in ("right", "wrong", "shuffled")}

    rows = []
    for ways in (2, 4, 8, 16, 32, 64):
        sized = pv.data.EpisodeSampler(test, n_way=ways, k_shot=1, n_query=1, seed=2)
        summary = pv.diagnostics.evaluate(vma, sized, num_episodes=max(2, 64 // ways), num_samples=2).summary()
        rows.append(
            [ways, *(summary[k] for k in ("information_gain", "information_gain_se", "information_gain_exact"))]
        )
    names |= dict(zip(("sizes", "gains", "errors", "gains_exact"), map(list, zip(*rows, strict=True)), strict=True))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        names["samples"] = torch.stack([vma.generate(memory, 6, address=slot, mean=True) for slot in range(4)])
        names["mask"] = (torch.arange(28) < 14)[:, None]
        filled = vma.complete(memory, x[:4].repeat_interleave(5, 0), names["mask"], mean=True)
        names["filled"] = filled.unflatten(0, (4, 5))
    return names | reference()


def reference() -> dict[str, Any]:
    """What the reference model tells of guides that are off by a known amount."""
    import pyro.distributions as dist
    import torch
    from pyro.infer.inspect import get_model_relations

    import pyro_vmem as pv

    class Off(pv.LatentGuide):
        """The exact posterior of the latent, with its scale multiplied and its mean moved by shares of its scale."""

        def __init__(self, model: Any, scale: float, shift: float) -> None:
            super().__init__()
            self.model, self.latent_dim, self.scale, self.shift = model, model.latent_dim, scale, shift

        def forward(self, x: Any, template: Any) -> Any:
            exact = self.model.latent_posterior(x.raw, template.raw)
            return dist.Normal(exact.mean + self.shift * exact.stddev, self.scale * exact.stddev).to_event(1)

    torch.manual_seed(0)
    model = pv.LinearGaussianMemory(dim=4, latent_dim=1, generator=torch.Generator().manual_seed(0))
    memory = pv.Memory(torch.randn(8, 4))
    ranks = {}
    for name, scale, shift in (("exact", 1.0, 0.0), ("too narrow", 0.75, 0.0), ("shifted", 1.0, 0.25)):
        vma = model.vma(latent_guide=Off(model, scale, shift))
        ranks[name] = pv.diagnostics.sbc(vma, memory, num_simulations=1000, num_draws=99).ranks["z"]
    narrow = model.vma(latent_guide=Off(model, 0.67, 0.0))
    x = narrow.generate(memory, 80)
    evidence = pv.diagnostics.estimate_evidence(narrow, memory, x, 400, "sampled", budget=0, seed=0, warn=False)
    relations = get_model_relations(narrow.model, (memory, x))
    return {"ranks": ranks, "evidence": evidence, "relations": relations}


def draw(picture: Picture, names: dict[str, Any]) -> bytes:
    """The picture as a PNG file."""
    import matplotlib
    from matplotlib.figure import Figure
    from PIL import Image

    from pyro_vmem import plots

    with matplotlib.rc_context(plots.ON_ANY_PAGE):
        figure = Figure(picture.size, layout=None if picture.crop else "constrained")
        own = {"plots": plots, "figure": figure}
        if "(ax" in picture.code:
            own["ax"] = figure.add_axes((0, 0, 1, 1)) if picture.crop else figure.subplots()
        eval(picture.code, names | own)
        raw, small = io.BytesIO(), io.BytesIO()
        crop: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.05} if picture.crop else {}
        figure.savefig(raw, format="png", dpi=DPI, **crop)
    with Image.open(raw) as image:  # 256 colours will do
        image.quantize(256, Image.Quantize.FASTOCTREE).save(small, format="png", optimize=True)
    return small.getvalue()


def main() -> None:
    """Draws all pictures and writes the page."""
    names = contents()
    FOLDER.mkdir(exist_ok=True)
    for picture in PICTURES:
        (FOLDER / f"{picture.name}.png").write_bytes(draw(picture, names))
    FOLDER.with_suffix(".md").write_text(page())


if __name__ == "__main__":
    main()
