"""Puts the model of a table into the package: weights in half precision, and a card made of the table's figures.

python -m benchmarks.pretrained lookup omniglot28
python -m benchmarks.pretrained zholus omniglot26
python -m benchmarks.pretrained gmn-distinct-shots omniglot28-independent
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

import pyro_vmem as pv
from benchmarks import command
from benchmarks.recipes import read
from benchmarks.reproduce import trained
from benchmarks.tables import CLASSIFIED, PACKAGED, best, classification, facts, few_shot, scaling, worth
from pyro_vmem._utils.files import write_atomically
from pyro_vmem._utils.precision import autocast
from pyro_vmem.train import save_checkpoint

CARD = """# {name}

A VMA of Omniglot characters. `pyro_vmem.VMA.from_pretrained("{name}")` loads it.

```
{model}
```

## Data

The training set has {train} characters of {alphabets} alphabets of Omniglot (Lake, Salakhutdinov, Tenenbaum, 2015).
Whole classes were also rotated by 90, 180 and 270 degrees, and mirrored.
Validation used {validation} characters of other alphabets{seen}.
The {test} characters of the evaluation alphabets were used for neither. Images are {shape}, binary,
and ink is 1. `pyro_vmem.data.protocol("{protocol}")` makes them.{warped}

## Figures

{figures}

Rounding the weights to half precision changed the bound on validation episodes by {rounding:+.3f} nats.

## Limits

- All training images are pen strokes on a blank ground, one to three pixels wide. The NLL of images that were drawn or
  resized in another way says little.
{pixels}- In the last stage of training, memory had at most {slots} slots{absent}.
{guide}
## File

`{name}.safetensors`, Apache License 2.0, as the package. SHA-256:
`{digest}`.
"""
CAUSAL = """\
- Each pixel is predicted from the pixels before it. A draw takes as many steps as there are pixels. Much of the low NLL
  comes from this. Models with independent pixels lack this advantage.
"""
SEEN = ", {} of which were in the training set of\nan earlier stage"
ABSENT = ", and the target's class was always among them"
WARPED = """
In {:.0%} of the episodes of the last stage, random affine maps changed whole classes and each image
(`pyro_vmem.data.WarpedEpisodes`)."""
GUIDE = """- The last stage of training changed the address guide q(a | M, x) only. The likelihoods above were measured
  with the guide of the stage before.
"""


def main(table: str, name: str, results: str = "results", out: str = "pyro_vmem/weights") -> dict[str, Any]:
    """Writes `<name>.safetensors` and `<name>.md`.

    Args:
        table: The table whose model it is.
        name: What it is loaded by.
        results: The folder of results.
        out: Where the package keeps its models.
    """
    recipe = read(table)
    experiment = recipe.experiment
    began = Path(experiment.start).stem.removesuffix("-vma") if experiment.start else None
    # of a model whose guide alone was trained further, the figures of before count too
    tables = [began, table] if experiment.only and began else [table]
    kinds = experiment.kinds
    warps = [kind.warp for kind in kinds]
    protocol = read(tables[0]).protocol
    train, validation, test = experiment.datasets()
    _, held_out = experiment.episodes()
    vma = trained(recipe, Path("no/such/run"), Path(results, "checkpoints", f"{table}-vma"))
    weights, card = Path(out, f"{name}.safetensors"), Path(out, f"{name}.md")
    is_packaged = not Path(results, "checkpoints", f"{table}-vma.safetensors").exists()  # rounded already
    if not is_packaged:
        halves = {n: t.half() if t.is_floating_point() else t for n, t in vma.state_dict().items()}
        save_checkpoint(weights, halves, {"spec": vma.spec(), "protocol": protocol})
    with autocast(torch.device("cpu"), "auto"):
        bounds = [pv.validate(model, held_out)["bound"] for model in (vma, pv.load(weights))]
    rounding = bounds[1] - bounds[0]
    if is_packaged and (before := re.search(r"validation episodes by ([-+.\d]+) nats", card.read_text())):
        rounding = float(before[1])
    measured = [Path(results, f"{name}.json") for name in tables]
    begun = set(read(began).experiment.datasets()[0].class_names) if began else set()
    seen = len(begun.intersection(validation.class_names))
    text = CARD.format(
        name=name,
        digest=hashlib.sha256(weights.read_bytes()).hexdigest(),
        model=vma,
        train=train.num_classes,
        alphabets=len(train.alphabet_names),
        validation=validation.num_classes,
        test=test.num_classes,
        seen=SEEN.format(seen) if seen else "",
        shape=" x ".join(str(n) for n in vma.event_shape[1:]),
        protocol=protocol,
        figures="\n\n".join([*(figures(path) for path in measured if path.exists()), *quality(name)]),
        rounding=rounding,
        slots=max(kind.n_way * kind.k_shot for kind in kinds),
        absent="" if any(kind.n_absent for kind in kinds) else ABSENT,
        guide=GUIDE if experiment.only else "",
        pixels=CAUSAL if experiment.pixels == "causal" else "",
        warped=WARPED.format(sum(warps) / len(warps)) if any(warps) else "",
    )
    with write_atomically(card) as aside:
        aside.write_text(text, encoding="utf-8")
    return {"weights": str(weights), "megabytes": weights.stat().st_size / 1e6, "rounding": rounding}


def quality(name: str) -> list[str]:
    """What `benchmarks.packaged` measured of a model."""
    rows = [row for row in json.loads(PACKAGED.read_text())["rows"] if row["model"] == name]
    said = "One drawing of each of 20 unseen characters in memory (`python -m benchmarks.packaged`)."
    return [f"{said}\n\n{worth(rows)}"] if rows else []


def figures(path: Path) -> str:
    """What was measured of a table's model, and how, by the file of its results."""
    result = json.loads(path.read_text())
    rows = [row for row in best(result["rows"]) if row["model"] == "vma"]
    if path.stem in CLASSIFIED:
        tables = [classification(rows)]
    elif result["recipe"]["per_class"]:
        tables = [scaling(path.stem, rows, path.with_suffix(".npz"))]
    else:
        methods = dict.fromkeys(row["method"] for row in rows)
        tables = [few_shot(rows, method, []) for method in methods]
    return "\n\n".join([f"{result['recipe']['title']}. {facts(result, rows)}", *tables])


def show(result: dict[str, Any]) -> None:
    """Where it is, and what it cost."""
    sys.stdout.write(
        f"{result['weights']}: {result['megabytes']:.1f} MB; rounding moved the bound by {result['rounding']:+.3f}\n"
    )


if __name__ == "__main__":
    command(main, show)
