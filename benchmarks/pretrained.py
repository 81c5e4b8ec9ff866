"""Puts the model of a table into the package: weights in half precision, and a card made of the table's figures.

python -m benchmarks.pretrained lookup omniglot28
python -m benchmarks.pretrained zholus omniglot26
python -m benchmarks.pretrained vma-45-5 omniglot26-maxpool
python -m benchmarks.pretrained gmn-distinct-shots omniglot28-independent
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

import pyro_vmem as pv
from benchmarks import command
from benchmarks.recipes import read
from benchmarks.reproduce import trained
from benchmarks.tables import CLASSIFIED, best, classification, facts, few_shot, scaling
from pyro_vmem._utils.files import write_atomically
from pyro_vmem._utils.precision import autocast
from pyro_vmem.train import save_checkpoint

CARD = """# {name}

A VMA of Omniglot characters; load it with `pyro_vmem.VMA.from_pretrained("{name}")`.

```
{model}
```

## Data

Trained on {train} characters of {alphabets} alphabets of Omniglot (Lake, Salakhutdinov, Tenenbaum, 2015), whole classes
also turned by 90, 180 and 270 degrees and mirrored; validated on {validation} characters of other alphabets{seen};
{test} characters of the evaluation alphabets were neither trained nor validated on. Images are {shape}, binary, ink
is 1, made as protocol `{protocol}` makes them (`pyro_vmem.data.protocol("{protocol}")`).{warped}

## Figures

{figures}

Rounding the weights to half precision changed the bound on validation episodes by {rounding:+.3f} nats.

## Limits

- It knows pen strokes on a blank ground, one pixel to three wide, as the protocol samples them. Other fonts, sizes or
  ways of scaling an image are outside of what it was trained on; NLL on them says little.
{pixels}- It was last trained with at most {slots} slots in memory{absent}.
{guide}
## File

`{name}.safetensors`, Apache License 2.0 as the package. SHA-256:
`{digest}`.
"""
CAUSAL = """\
- Each pixel is drawn given those before it: a draw takes as many steps as there are pixels. Much of a low NLL is owed
  to that; models whose pixels are independent given the latent do not have it.
"""
SEEN = " ({} of which the weights that it began with were trained on)"
ABSENT = ", always with the target's class among them"
WARPED = """ In {:.0%} of the episodes
that it was last trained on they were under random affine maps, of whole classes and of each image
(`pyro_vmem.data.WarpedEpisodes`)."""
GUIDE = """- What was trained last was q(a | x, M) alone: the likelihoods above were measured with the guide that
  the model was first trained with.
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
    weights = Path(out, f"{name}.safetensors")
    halves = {n: t.half() if t.is_floating_point() else t for n, t in vma.state_dict().items()}
    save_checkpoint(weights, halves, {"spec": vma.spec(), "protocol": protocol})
    with autocast(torch.device("cpu"), "auto"):
        bounds = [pv.validate(model, held_out)["bound"] for model in (vma, pv.load(weights))]
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
        figures="\n\n".join(figures(path) for path in measured if path.exists()),
        rounding=bounds[1] - bounds[0],
        slots=max(kind.n_way * kind.k_shot for kind in kinds),
        absent="" if any(kind.n_absent for kind in kinds) else ABSENT,
        guide=GUIDE if experiment.only else "",
        pixels=CAUSAL if experiment.pixels == "causal" else "",
        warped=WARPED.format(sum(warps) / len(warps)) if any(warps) else "",
    )
    with write_atomically(Path(out, f"{name}.md")) as aside:
        aside.write_text(text, encoding="utf-8")
    return {"weights": str(weights), "megabytes": weights.stat().st_size / 1e6, "rounding": bounds[1] - bounds[0]}


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
        tables = [few_shot(result["recipe"]["protocol"], rows, method, []) for method in methods]
    return "\n\n".join([f"{result['recipe']['title']}. {facts(result, rows)}", *tables])


def show(result: dict[str, Any]) -> None:
    """Where it is, and what it cost."""
    sys.stdout.write(
        f"{result['weights']}: {result['megabytes']:.1f} MB; rounding moved the bound by {result['rounding']:+.3f}\n"
    )


if __name__ == "__main__":
    command(main, show)
