"""Bad input, and how each is refused: one table for the tests and for `python -m benchmarks.faults`.

A case is refused if its call raises that very error, with a message that names what was wrong, where, and what was
expected or is to be done; if it leaves no half-written file; and if it changes no model.
"""

import contextlib
import io
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyro
import torch
from PIL import Image
from pyro.infer import RenyiELBO, ReweightedWakeSleep, TraceEnum_ELBO, config_enumerate
from small_run import blobs, sampler, small_vma

import pyro_vmem as pv
from pyro_vmem.app import cli
from pyro_vmem.data import EpisodeSampler, FewShotDataset, RecallSampler, from_folder, from_npz, merge_episodes, mnist
from pyro_vmem.data import omniglot as read_omniglot
from pyro_vmem.diagnostics import diagnose, evaluate, information_gain, log_evidence, pareto_k
from pyro_vmem.infer.annealing import scale_sites
from pyro_vmem.infer.by_name import named_objective
from pyro_vmem.train import LinearRise, StopAfter, Trainer, WarmupCosine, load_checkpoint, save_checkpoint
from pyro_vmem.train.checkpoint import load_newest

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """Bad input, and the error that it has to raise."""

    name: str
    call: Callable[[Path], Any]
    error: type[Exception]
    match: str

    def problem(self, folder: Path) -> str:
        """What is wrong with how it is refused; nothing if all is well."""
        before = _state()
        marker = folder / "evil"
        with (
            mock.patch.dict(os.environ, {"EVIL": str(marker)}),
            mock.patch.object(Trainer, "step", side_effect=AssertionError("it trained")),  # or that may take hours
            pyro.get_param_store().scope(),
        ):
            try:
                self.call(folder)
            except Exception as error:
                if type(error) is not self.error:
                    return f"raised {type(error).__name__}: {error}"
                if not re.search(self.match, str(error), re.DOTALL):
                    return f"said {str(error)!r}, expected {self.match!r}"
            else:
                return "was accepted"
        if marker.exists():
            return "ran what was in a file"
        if any(path.name.endswith(".tmp") for path in folder.rglob("*")) or (folder / "out").exists():
            return f"left {sorted(str(path) for path in folder.rglob('*'))}"
        if not all(torch.equal(one, two) for one, two in zip(before, _state(), strict=True)):
            return "changed a model"
        return ""

    def is_refused(self, folder: Path) -> bool:
        """Whether it is refused as it should be."""
        return not self.problem(folder)


CASES: list[Case] = []


def refused(
    group: str, error: type[Exception], cases: dict[str, tuple[Callable[[Path], Any], str]], prefix: str = ""
) -> None:
    """Adds cases: what is passed in, and what the message has to say after the prefix."""
    CASES.extend(Case(f"{group}: {name}", call, error, prefix + match) for name, (call, match) in cases.items())


# Models, memories and data to pass bad input to

with torch.random.fork_rng(devices=[]):
    VECTORS = pv.VMA.for_vectors(3, latent_dim=2, num_features=4, hidden=(4,))
    PICTURES = small_vma()
    T, X = torch.rand(4, 3), torch.rand(2, 3)
MEMORY = pv.Memory(T, labels=torch.tensor([0, 0, 1, 1]))
UNLABELLED = pv.Memory(T)
MASKED = pv.Memory(T, mask=torch.tensor([True, False, True, True]))
DATA, EPISODES = blobs(), sampler()
SPEC = VECTORS.spec()["init_args"]
ALL = torch.ones(2, 3, dtype=torch.bool)


def _state() -> list[torch.Tensor]:
    return [tensor.clone() for vma in (VECTORS, PICTURES) for tensor in vma.state_dict().values()]


class Evil:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ('touch "$EVIL"',)


EVIL_SPEC = {"class_path": "os.system", "init_args": {"command": 'touch "$EVIL"'}}

# Training


def fit(**changes: Any) -> Callable[[Path], Any]:
    settings = {"vma": PICTURES, "episodes": EPISODES, "objective": "vimco", "steps": 1, "progress": False} | changes

    def call(folder: Path) -> Any:
        given = {
            name: value(folder) if callable(value) and name == "out" else value for name, value in settings.items()
        }
        return pv.fit(**({"out": folder / "out"} | given))

    return call


NUMBERS: dict[str, tuple[list[Any], str]] = {
    "steps": ([0, -1, 2.5, NAN, "ten", None], r"expected a whole number"),
    "minutes": ([-1.0, NAN, "x"], r"expected a number above 0 or None, got"),
    "lr": ([0.0, -1.0, NAN, INF, "fast"], r"expected a positive number, got"),
    "clip_norm": ([0.0], r"expected a number above 0, got 0"),
    "validate_every": ([0, 1.5], r"expected a whole number"),
    "seed": (["a", 1.5, -1], r"expected a whole number.*, got"),
    "precision": (["half"], r"expected 'auto' or 'bfloat16' or 'float32', got 'half'"),
    "objective": (["elbo", 3, None], r"expected 'auto' or 'vimco' .* or ELBO, got"),
}
for argument, (values, said) in NUMBERS.items():
    refused("fit", ValueError, {f"{argument}={v!r}": (fit(**{argument: v}), said) for v in values}, f"^{argument}: ")

BROKEN = small_vma()
with torch.no_grad():
    BROKEN.get_parameter("latent_prior.network.0.weight").fill_(NAN)
FROZEN = small_vma().requires_grad_(False)


def a_file(folder: Path) -> Path:
    return put(folder / "file", b"x")


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


refused(
    "fit",
    ValueError,
    {
        "one particle": (
            lambda d: pv.infer.VIMCO_ELBO(1),
            r"^num_particles: VIMCO_ELBO needs at least 2, got 1\. For one particle",
        ),
        "backward through all": (
            lambda d: pv.infer.VIMCO_ELBO(4, backward=4),
            r"^backward: expected fewer than the 4 .* got 4\.",
        ),
        "a share of more than all": (lambda d: LinearRise(share=1.5), r"^share: expected a number in \[0, 1\], got 1"),
        "a warm-up of less than nothing": (
            lambda d: WarmupCosine(-5),
            r"^warmup: expected a whole number of at least 0, got -5",
        ),
        "no time": (lambda d: StopAfter(0.0), r"^minutes: expected a number above 0, got 0"),
        "config and settings": (
            fit(config=pv.TrainingConfig(), steps=3),
            r"^steps: give it in the config, or all settings as arguments; got both",
        ),
        "RenyiELBO": (
            fit(objective=RenyiELBO(0.0, 4)),
            r"^objective: RenyiELBO gives .*\['a'\] no gradient\. Use IWAE",
        ),
        "ReweightedWakeSleep": (
            fit(objective=ReweightedWakeSleep(4)),
            r"^objective: .* one weight for all 12 .* Use RWS",
        ),
        "a file as out": (fit(out=a_file), r"^out: cannot write to the folder '.*file' .* Name another one"),
        "out in a file": (
            fit(out=lambda d: a_file(d) / "run"),
            r"^out: cannot write to the folder '.*run' .* Name another",
        ),
        "out where nothing can be written": (
            fit(out="/proc"),
            r"^out: cannot write to the folder '/proc' .* Name another",
        ),
        "out in /proc": (fit(out="/proc/none/run"), r"^out: cannot write to the folder '/proc/none/run'"),
        "no episodes": (fit(episodes=[]), r"^episodes: got 0, but 1 are needed\. Give more"),
        "too few episodes": (
            fit(episodes=[EPISODES[0]], steps=3),
            r"^episodes: got 1, but 3 are needed\. .* fewer steps",
        ),
        "None for episodes": (
            fit(episodes=None),
            r"^episodes: expected Dataset\[Episode\], got None\. See help\(fit\)",
        ),
        "a data set for episodes": (
            fit(episodes=DATA),
            r"^episodes: expected Dataset\[Episode\], got FewShotDataset\. See",
        ),
        "tuples for episodes": (fit(episodes=[(1, 2)]), r"^episodes: expected each to be a .*Episode, got tuple\. Use"),
        "no validation": (fit(validation=[]), r"^validation: got 0, but 1 are needed"),
        "numbers to validate": (fit(validation=[1]), r"^validation: expected each to be a .*Episode, got int\. Use"),
        "another module": (
            fit(vma=torch.nn.Linear(2, 2)),
            r"^vma: expected VMA, got Linear\. See help",
        ),
        "a model of vectors": (fit(vma=VECTORS), r"^memory: its templates \(6, 1, 8, 8\) .* this model's are \(3,\)"),
        "frozen parameters": (fit(vma=FROZEN), r"^vma: all parameters are frozen\. Unfreeze"),
        "NaN in the weights": (
            fit(vma=BROKEN),
            r"^vma: 'latent_prior.network.0.weight' holds .* not finite\. Build or",
        ),
        "validate nothing": (
            lambda _: pv.validate(PICTURES, EPISODES, 0),
            r"^num_episodes: expected a whole number in",
        ),
    },
)

# Memories, models and what is asked of them

refused(
    "Memory",
    ValueError,
    {
        "integers": (
            lambda _: pv.Memory(torch.ones(3, 2).long()),
            r"templates: expected a tensor of dtype Float .*Use templates.float\(\)",
        ),
        "complex": (
            lambda _: pv.Memory(T + 1j),
            r"templates: expected a tensor of dtype Float .* got a tensor of torch.complex64",
        ),
        "no slot": (
            lambda _: pv.Memory(torch.zeros(0, 3)),
            r"templates: expected shape .* at least one slot, got \(0, 3\)",
        ),
        "no slot dim": (
            lambda _: pv.Memory(torch.rand(3)),
            r"templates: expected shape .* got \(3,\)\. A scalar event",
        ),
        "NaN": (lambda _: pv.Memory(T * NAN), "templates: found NaN or infinite values. Clean them"),
        "infinity": (lambda _: pv.Memory(T + INF), "templates: found NaN or infinite values. Clean them"),
        "too few labels": (
            lambda _: pv.Memory(T, torch.arange(3)),
            r"labels: expected shape \(4,\), .* got \(3,\)\. For",
        ),
        "labels of floats": (
            lambda _: pv.Memory(T, torch.rand(4)),
            r"labels: expected a tensor of dtype Integer .* Use labels.long\(\)",
        ),
        "mask of floats": (lambda _: pv.Memory(T, mask=torch.ones(4)), r"mask: expected .* Use mask.bool\(\)"),
        "mask too long": (
            lambda _: pv.Memory(T, mask=torch.ones(5).bool()),
            r"mask: expected shape \(4,\), .* got \(5,\)",
        ),
        "all masked": (lambda _: pv.Memory(T, mask=torch.zeros(4).bool()), "mask: no slot is in use. A memory needs"),
        "classes without labels": (lambda _: UNLABELLED.by_class(X), r"labels: .* got none\. Make the memory with"),
    },
    "^",
)
refused(
    "model",
    ValueError,
    {
        "a tensor for memory": (
            lambda _: VECTORS.model(T, X),
            r"memory: expected Memory, got a tensor .* Use",
        ),
        "other templates": (
            lambda _: VECTORS.model(pv.Memory(torch.rand(4, 5)), X),
            r"memory: its templates \(4, 5\) hold events of shape \(5,\), this model's are \(3,\)",
        ),
        "one memory per datapoint, not said": (
            lambda _: VECTORS.model(pv.Memory(torch.rand(2, 4, 3)), X),
            r"memory: .* pass Memory\(..., per_datapoint=True\)",
        ),
        "another dtype": (
            lambda _: VECTORS.model(pv.Memory(T.double()), X.double()),
            r"memory: the dtype of its templates is torch.float64, .* Convert one",
        ),
        "other targets": (
            lambda _: VECTORS.model(MEMORY, torch.rand(2, 5)),
            r"x: expected shape \(B, 3\) .* got \(2, 5\)",
        ),
        "one target": (
            lambda _: VECTORS.guide(MEMORY, torch.rand(3)),
            r"x: expected shape .* One target alone is x\[None\]",
        ),
        "no target": (lambda _: VECTORS.guide(MEMORY, torch.rand(0, 3)), r"x: expected shape \(B, 3\) .* got \(0, 3\)"),
        "targets of another dtype": (lambda _: VECTORS.model(MEMORY, X.double()), r"x: its dtype .* Convert one"),
        "NaN": (lambda _: VECTORS.guide(MEMORY, X * NAN), r"x: found NaN or infinite values\. Clean or drop"),
        "infinity": (lambda _: VECTORS.guide(MEMORY, X + INF), r"x: found NaN or infinite values\. Clean or drop"),
        "grey pixels": (
            lambda _: PICTURES.model(pv.Memory(torch.rand(3, 1, 8, 8)), torch.rand(2, 1, 8, 8)),
            r"x: BernoulliDecoder expects binary values, .* Binarise them",
        ),
        "memories of others": (
            lambda _: VECTORS.model(pv.Memory(torch.rand(3, 4, 3), per_datapoint=True), X),
            r"x: got 2 targets, but one memory for each of 3 datapoints, .* Give each",
        ),
    },
    "^",
)
refused(
    "VMA",
    ValueError,
    {
        "generate nothing": (lambda _: VECTORS.generate(MEMORY, 0), r"n: expected .*, got 0"),
        "generate from no slot": (
            lambda _: VECTORS.generate(MEMORY, 1, 7),
            r"address: .* slot in use out of 0\.\.3, got 7",
        ),
        "generate from slot -1": (
            lambda _: VECTORS.generate(MEMORY, 1, -1),
            r"address: expected a whole number of at least 0 or None, got -1",
        ),
        "generate from a masked slot": (
            lambda _: VECTORS.generate(MASKED, 1, 1),
            r"address: expected a slot in use .* got 1",
        ),
        "generate from other templates": (
            lambda _: VECTORS.generate(pv.Memory(torch.rand(4, 5))),
            r"memory: its templates \(4, 5\)",
        ),
        "complete a mask of floats": (
            lambda _: VECTORS.complete(MEMORY, X, torch.ones(2, 3)),
            r"mask: expected a tensor of dtype Bool .*, got a tensor of torch.float32 .* Use mask.bool\(\)",
        ),
        "complete another mask": (
            lambda _: VECTORS.complete(MEMORY, X, torch.ones(2, 5).bool()),
            r"mask: \(2, 5\) does not broadcast with x \(2, 3\)",
        ),
        "complete without particles": (
            lambda _: VECTORS.complete(MEMORY, X, ALL, num_particles=0),
            r"num_particles: expected .*, got 0",
        ),
        "complete in no round": (lambda _: VECTORS.complete(MEMORY, X, ALL, rounds=0), r"rounds: expected .*, got 0"),
        "classify without labels": (
            lambda _: VECTORS.classify(UNLABELLED, X),
            r"memory: classify needs labels, .* Make it",
        ),
        "classify other targets": (lambda _: VECTORS.classify(MEMORY, torch.rand(2, 2)), r"x: expected shape \(B, 3\)"),
        "no such decoder": (
            lambda _: pv.VMA.for_images(decoder="x"),
            r"decoder: expected 'warp' or 'conv', got 'x'",
        ),  # type: ignore[arg-type]
        "pictures without channels": (
            lambda _: pv.VMA.for_images((28, 28)),
            r"image_shape: .* got \(28, 28\)\. For one ch",
        ),
        "pictures without rows": (
            lambda _: pv.VMA.for_images((1, 0, 8)),
            r"image_shape: expected .* got .*\(1, 0, 8\)",
        ),
        "no ink": (
            lambda _: pv.VMA.for_images((1, 8, 8), ink=0.0),
            r"ink: expected a number in \(0, 1\), got 0\.0",
        ),
        "NaN ink": (
            lambda _: pv.VMA.for_images((1, 8, 8), ink=NAN),
            r"ink: expected a number in \(0, 1\), got nan",
        ),
        "no hidden layer": (
            lambda _: pv.VMA.for_vectors(3, hidden=()),
            r"hidden: expected at least one .* Try hidden=",
        ),
        "latents of two lengths": (
            lambda _: pv.VMA.for_vectors(3, latent_prior=pv.StandardPrior(5)),
            r"latent_guide: its latent_dim is 8, the latent_prior's is 5\. Give both the same",
        ),
        "an encoder of pictures": (
            lambda _: pv.VMA.for_vectors(3, template_encoder=PICTURES.template_encoder),
            r"template_encoder: .* shape \(1, 8, 8\), the likelihood makes \(3,\)\. Give both the same",
        ),
        "a guide of no slot": (
            lambda _: pv.TruncatedGuide(VECTORS.address_guide, k=0),
            r"k: expected .*, got 0",
        ),
        "temperature 0": (lambda _: pv.SimilarityGuide(4, temperature=0.0), r"temperature: expected a positive number"),
        "scale 0": (
            lambda _: pv.GaussianDecoder(VECTORS.likelihood.network, scale=0.0),
            r"scale: expected a positive number.*, got 0\.0",
        ),
    },
    "^",
)


def twice(_: Path) -> None:
    VECTORS.model(MEMORY, X)
    pv.VMA.for_vectors(3, latent_dim=2, num_features=4, hidden=(4,)).model(MEMORY, X)


refused("VMA", RuntimeError, {"a second one of that name": (twice, r"^Pyro's parameter store already holds .* Call")})
refused(
    "Memory",
    IndexError,
    {
        "an address beyond": (
            lambda _: pv.Memory(torch.rand(2, 3, 3), per_datapoint=True).read(torch.tensor([3, 0])),
            r"^a: expected addresses in 0\.\.2, got 0\.\.3",
        )
    },
)

# Objectives and diagnostics

GUIDE = config_enumerate(VECTORS.guide, "parallel", expand=True)
refused(
    "objective",
    ValueError,
    {
        "VIMCO of one": (
            lambda _: pv.infer.VIMCO_ELBO(1),
            r"num_particles: VIMCO_ELBO needs at least 2, got 1\. For one",
        ),
        "VIMCO baseline": (
            lambda _: pv.infer.VIMCO_ELBO(2, "x"),
            r"baseline: expected 'arithmetic' or 'geometric', got",
        ),  # type: ignore[arg-type]
        "RWS of one": (lambda _: pv.infer.RWS_ELBO(1), r"num_particles: RWS_ELBO needs at least 2, got 1"),
        "Reinforce baseline": (
            lambda _: pv.infer.Reinforce_ELBO(2, "x"),
            r"baseline: expected 'leave-one-out' or .* or nn.Module, got 'x'",
        ),  # type: ignore[arg-type]
        "Reinforce of one": (lambda _: pv.infer.Reinforce_ELBO(1), r"num_particles: .* at least 2, got 1\. For one"),
        "Reinforce decay": (
            lambda _: pv.infer.Reinforce_ELBO(1, "average", 1.0),
            r"decay: expected .*\[0, 1\), got 1\.0",
        ),
        "Rao-Blackwell of none": (lambda _: pv.infer.RaoBlackwell_ELBO(0), r"k: expected .*, got 0"),
        "a negative scale": (lambda _: scale_sites({"z": -1.0}), r"scales: .* got -1\.0 for site 'z'"),
        "a scale of NaN": (lambda _: scale_sites({"z": NAN}), r"scales: .* got nan for site 'z'"),
        "no memory to enumerate in": (lambda _: pv.infer.EnumGuard(0.0), r"max_gigabytes: expected a positive number"),
        "too much to enumerate": (
            lambda _: pv.infer.EnumGuard(1e-9, max_plate_nesting=1).loss(VECTORS.model, GUIDE, MEMORY, X),
            r"enumeration: 4 values, .* the limit is 1e-09 GB\. Sum fewer values",
        ),
        "no such name": (lambda _: named_objective("x"), r"objective: expected one of .* got 'x'"),  # type: ignore[arg-type]
        "half a particle": (
            lambda _: pv.infer.VIMCO_ELBO(2.5),
            r"num_particles: expected a whole number in .*, got 2\.5",
        ),
        "no site to enumerate": (
            lambda _: pv.infer.check_objective(TraceEnum_ELBO(), VECTORS.model, VECTORS.guide, MEMORY, X),
            r"objective: TraceEnum_ELBO would sample .*\['a'\] .* Pass config_enumerate",
        ),
        "no data plate": (
            lambda _: pv.infer.VIMCO_ELBO(2, max_plate_nesting=1).loss(no_plate, no_plate),
            r"model and guide: expected all sample sites in one data plate, .* Wrap the local latents",
        ),
    },
    "^",
)
refused(
    "diagnostics",
    ValueError,
    {
        "gain of two memories": (
            lambda _: information_gain(X, torch.rand(2, 5)),
            r"p_logits: expected .* \(2, 5\), where q_logits has shape \(2, 3\)",
        ),
        "no weights": (lambda _: pareto_k(torch.zeros(0, 3)), r"log_weights: expected .* K >= 1 samples"),
        "no samples": (
            lambda _: log_evidence(VECTORS, MEMORY, X, 0),
            r"num_samples: expected a whole number in \[1, 10,000,000\], got 0",
        ),
        "no such method": (
            lambda _: log_evidence(VECTORS, MEMORY, X, 9, "x"),
            r"method: expected 'exact-address' or .* 'x'",
        ),  # type: ignore[arg-type]
        "top none": (lambda _: log_evidence(VECTORS, MEMORY, X, 9, "top-k", k=0), r"k: expected .*, got 0"),
        "no decodes": (
            lambda _: log_evidence(VECTORS, MEMORY, X, 9, max_decodes=0),
            r"max_decodes: expected .*, got",
        ),
        "other targets": (lambda _: log_evidence(VECTORS, MEMORY, torch.rand(2, 9), 9), r"x: expected shape \(B, 3\)"),
        "a tensor for memory": (lambda _: log_evidence(VECTORS, T, X, 9), r"memory: expected Memory, got a tensor"),  # type: ignore[arg-type]
        "evaluate nothing": (
            lambda _: evaluate(PICTURES, EPISODES, 0, 10),
            r"num_episodes: expected .*, got 0",
        ),
        "evaluate without samples": (lambda _: evaluate(PICTURES, EPISODES, 1, 0), r"num_samples: expected .*, got"),
        "diagnose without samples": (
            lambda _: diagnose(VECTORS, MEMORY, X, num_samples=0),
            r"num_samples: expected .*, got",
        ),
    },
    "^",
)


def no_plate() -> None:
    pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))


# Data in memory

IMAGES, CLASSES = (torch.arange(96).reshape(6, 1, 4, 4) * 2).byte(), torch.tensor([0, 0, 1, 1, 2, 2])


def dataset(images: Any = IMAGES, classes: Any = CLASSES, *rest: Any, **kwargs: Any) -> Callable[[Path], Any]:
    return lambda _: FewShotDataset(images, classes, *rest, **kwargs)


def split(**how: Any) -> Callable[[Path], Any]:
    return lambda _: DATA.split(**({"by": "class"} | how))


refused(
    "FewShotDataset",
    ValueError,
    {
        "a list": (dataset([1]), r"classes: expected .* \(N\), got .* \(6,\), where images has shape \(1,\)"),
        "no images": (dataset(IMAGES[:0], CLASSES[:0]), r"images: got shape \(0, 1, 4, 4\), expected"),
        "numbers": (dataset(torch.rand(6)), r"images: got shape \(6,\), expected \(N, C, H, W\) or \(N, D\)"),
        "int64": (dataset(IMAGES.long()), r"images: got torch.int64, expected torch.uint8"),
        "0 and 1": (dataset((IMAGES > 99).byte()), r"images: got uint8 values 0 and 1, .* Multiply by 255"),
        "NaN": (dataset(IMAGES * NAN), r"images: got NaN or infinite values, .* Drop or fill"),
        "classes of floats": (
            dataset(IMAGES, CLASSES.float()),
            r"classes: expected a tensor of dtype Integer .* got .* torch.float32 .* Use classes.long\(\)",
        ),
        "too few classes": (
            dataset(IMAGES, CLASSES[:4]),
            r"classes: expected .*, got .* \(4,\), where images has shape \(6, 1, 4, 4\)",
        ),
        "class -1": (dataset(IMAGES, CLASSES - 1), r"classes: got indices -1\.\.1, expected 0 to 1"),
        "an empty class": (dataset(IMAGES, CLASSES * 2), r"classes: class 1 \('1'\) is empty, .* Leave it out"),
        "too few names": (dataset(IMAGES, CLASSES, ["a", "b"]), r"classes: got indices 0\.\.2, expected 0 to 1"),
        "a name twice": (dataset(IMAGES, CLASSES, list("aba")), r"class_names: got 'a' more than once"),
        "unicode names twice": (dataset(IMAGES, CLASSES, ["Ω", "ж", "Ω"]), r"class_names: got 'Ω' more than once"),
        "too few alphabets": (dataset(alphabets=torch.tensor([0, 0])), r"alphabets: got shape \(2,\), expected \(3,\)"),
        "an empty alphabet": (
            dataset(alphabets=torch.tensor([0, 0, 2])),
            r"alphabets: alphabet 1 .* is empty, .* Leave",
        ),
        "an alphabet twice": (
            dataset(alphabets=torch.tensor([0, 0, 1]), alphabet_names=["x", "x"]),
            r"alphabet_names: got 'x' more than once",
        ),
        "subset of none": (
            lambda _: DATA.subset([]),
            r"class_indices: expected a tensor of dtype Integer .*, got \[\]",
        ),
        "subset with one twice": (lambda _: DATA.subset([1, 1]), r"class_indices: got a class more than once"),
        "subset beyond": (lambda _: DATA.subset([99]), r"class_indices: got values 99\.\.99, expected 0 to 15"),
        "split by what": (split(by="x"), r"by: expected 'alphabet' or 'class', got 'x'"),
        "split of one alphabet": (split(by="alphabet"), r"by: .* one alphabet .* Use by='class'"),
        "split of nothing": (split(test=0.0), r"test: expected a number in \(0, 1\) or Sequence\[str\], got 0\.0"),
        "split of all": (split(test=1.0), r"test: expected a number in \(0, 1\) .*, got 1\.0"),
        "split of NaN": (split(test=NAN), r"test: expected a number .*, got nan"),
        "split by a string": (split(test="3"), r"test: expected .* Sequence\[str\], got '3'\. See"),
        "split by no class": (split(test=["zz"]), r"test: got 'zz', expected names of class groups such as '0'"),
        "split by all classes": (
            split(test=DATA.class_names),
            r"test: got 16 of 16 names, expected at least one on each",
        ),
    },
    "^",
)
WIDE = FewShotDataset(torch.rand(30, 1, 4, 6), torch.arange(30) % 3)
refused(
    "EpisodeSampler",
    ValueError,
    {
        "no ways": (lambda _: EpisodeSampler(DATA, 0), r"n_way: expected .*, got 0"),
        "too many ways": (lambda _: EpisodeSampler(DATA, 17, 1, 1), r"n_way: got 17, expected at most 16, .* Lower it"),
        "no shots": (lambda _: EpisodeSampler(DATA, 2, 0), r"k_shot: expected .*, got 0"),
        "no queries": (lambda _: EpisodeSampler(DATA, 2, 1, 0), r"n_query: expected .*, got 0"),
        "too many drawings": (lambda _: EpisodeSampler(DATA, 2, 4, 3), r"k_shot \+ n_query: got 4 \+ 3, .* Lower them"),
        "seed -1": (
            lambda _: EpisodeSampler(DATA, 2, 1, 1, -1),
            r"seed: expected a whole number of at least 0, got -1",
        ),
        "pictures that are not square": (
            lambda _: EpisodeSampler(WIDE, 2, 1, 1, rotate=True),
            r"rotate, flip: got images of shape \(1, 4, 6\), .* Pass rotate=False",
        ),
        "no episodes": (
            lambda _: EpisodeSampler(DATA, 2, 1, 1, num_episodes=0),
            r"num_episodes: expected .*, got 0",
        ),
        "too few other classes": (
            lambda _: EpisodeSampler(DATA, 9, 1, 1).distractors(0),
            r"n_way: got 9, .* Lower n_way",
        ),
        "merge nothing": (lambda _: merge_episodes([]), r"episodes: expected one target each .* got .*\[\]"),
        "merge many targets": (lambda _: merge_episodes([EPISODES[0]]), r"episodes: expected one target each"),
        "no such protocol": (lambda _: pv.data.protocol("gnm"), r"name: got 'gnm', expected one of 'gmn'"),
        "no such cell": (lambda _: pv.data.protocol("gmn").episodes(DATA, 0), r"n_classes: expected .*, got 0"),
        "no memory": (lambda _: RecallSampler(DATA, 0), r"memory_size: expected a whole number in \[1, .*, got 0"),
    },
    "^",
)
refused(
    "EpisodeSampler",
    IndexError,
    {
        "episode -1": (lambda _: EPISODES[-1], r"^index: got -1, expected 0 to"),
        "after the last": (
            lambda _: EpisodeSampler(DATA, 2, 1, 1, num_episodes=3)[3],
            r"^index: got 3, expected 0 to 2",
        ),
    },
)

# Folders and files of pictures


def png(path: Path, size: tuple[int, int] = (6, 6), mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)
    return path


def png_bytes(size: tuple[int, int] = (105, 105)) -> bytes:
    file = io.BytesIO()
    Image.new("1", size, 1).save(file, "PNG")
    return file.getvalue()


def huge_png(side: int) -> bytes:
    """A small file that says it is a huge picture."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def folder_with(spoil: Callable[[Path], Any], **how: Any) -> Callable[[Path], Any]:
    """Reads a folder of two classes that was spoilt."""

    def call(folder: Path) -> Any:
        for name in ("a", "b"):
            png(folder / "in" / name / "1.png")
        spoil(folder / "in")
        return from_folder(folder / "in", **how)

    return call


def nothing(_: Path) -> None:
    """Leaves a folder as it is."""


def without_permission(folder: Path) -> Any:
    with mock.patch.object(Path, "iterdir", side_effect=PermissionError(13, "Permission denied", str(folder))):
        return from_folder(folder)


refused(
    "from_folder",
    ValueError,
    {
        "nothing in it": (lambda d: from_folder(d), r"path: .* holds no image, expected path/<class>/\*"),
        "images beside classes": (folder_with(lambda d: png(d / "3.png")), r"path: .*in holds images itself, expected"),
        "classes beside alphabets": (folder_with(lambda d: png(d / "c/x/1.png")), r"path: .* is not a folder of class"),
        "an empty class": (
            folder_with(lambda d: (d / "c").mkdir()),
            r"path: the class folder .*c holds no image.* Remove",
        ),
        "a truncated PNG": (
            folder_with(lambda d: put(d / "a/2.png", png_bytes()[:50])),
            r"path: cannot read .*a/2\.png .* Replace or remove it",
        ),
        "0 bytes": (
            folder_with(lambda d: put(d / "a/2.png", b"")),
            r"path: cannot read .*a/2\.png .* Replace or remove",
        ),
        "text": (
            folder_with(lambda d: put(d / "a/2.png", b"hello")),
            r"path: cannot read .*a/2\.png .* Replace or remove",
        ),
        "a unicode name": (folder_with(lambda d: put(d / "a/Ω.png", b"x")), r"path: cannot read .*a/Ω\.png"),
        "two sizes": (
            folder_with(lambda d: png(d / "a/2.png", (5, 6))),
            r"path: .* is 6x5 and .* is 6x6 .* Pass size=",
        ),
        "a link out of it": (
            folder_with(lambda d: (d / "a/2.png").symlink_to(png(d.parent / "secret.png"))),
            r"path: .*a/2\.png is a link out of .* Copy what it points to",
        ),
        "a linked class": (
            folder_with(lambda d: (d / "c").symlink_to(png(d.parent / "secret/1.png").parent)),
            r"path: .*c is a link out of .* Copy what it points to",
        ),
        "a huge picture": (
            folder_with(lambda d: put(d / "a/2.png", huge_png(60_000))),
            r"path: cannot read .*a/2\.png .*3600000000 pixels.* Replace or remove it",
        ),
        "floats for pixels": (
            folder_with(lambda d: Image.new("F", (6, 6), 0.5).save(d / "a/2.tif")),
            r"path: cannot read .*a/2\.tif \(pixels of 32 bits, mode 'F', .* Replace or remove it",
        ),
        "integers of 32 bits for pixels": (
            folder_with(lambda d: Image.new("I", (6, 6), 255).save(d / "a/2.tif")),
            r"path: cannot read .*a/2\.tif \(pixels of 32 bits, mode 'I', .* Replace or remove it",
        ),
        "size 0": (folder_with(nothing, size=(0, 4)), r"size: expected tuple\[a whole number .*, got \(0, 4\)"),
        "one size": (folder_with(nothing, size=(4,)), r"size: expected tuple\[a whole number .*, got \(4,\)"),
        "red ink": (folder_with(nothing, ink="red"), r"ink: expected 'dark' or 'light', got 'red'"),
        "threshold 1": (
            folder_with(nothing, threshold=1.0),
            r"threshold: expected a number in \[0, 1\) or None, got 1\.0",
        ),
        "threshold NaN": (
            folder_with(nothing, threshold=NAN),
            r"threshold: expected a number in \[0, 1\) or None, got nan",
        ),
    },
    "^",
)
refused(
    "from_folder",
    FileNotFoundError,
    {
        "no such folder": (lambda d: from_folder(d / "none"), r"^path: got .*none, expected a folder of class folders"),
        "a file": (lambda d: from_folder(a_file(d)), r"^path: got .*file, expected a folder of class folders"),
    },
)
refused("from_folder", PermissionError, {"no permission": (without_permission, r"Permission denied: '.*'")})

NPZ_IMAGES, NPZ_CLASSES = np.zeros((3, 4, 4), np.uint8), np.array([0, 0, 1])


def npz(**arrays: Any) -> Callable[[Path], Any]:
    def call(folder: Path) -> Any:
        np.savez(folder / "a.npz", **({"images": NPZ_IMAGES, "classes": NPZ_CLASSES} | arrays))
        return from_npz(folder / "a.npz")

    return call


def npz_of(content: bytes) -> Callable[[Path], Any]:
    return lambda folder: from_npz(put(folder / "a.npz", content))


def spoilt_npz(spoil: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    file = io.BytesIO()
    np.savez(file, images=NPZ_IMAGES, classes=NPZ_CLASSES)
    return npz_of(spoil(file.getvalue()))


def npz_bomb() -> bytes:
    """An array that says it is of 16 TB."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({10**12}, 4, 4), }}".ljust(117) + "\n"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(
            "images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(9)
        )
        archive.writestr("classes.npy", b"")
    return file.getvalue()


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


READ, SET = (
    r"path: cannot read .*a\.npz \(.*\), expected an .npz archive of plain arrays",
    r"path: .*a\.npz does not hold a data ",
)
refused(
    "from_npz",
    ValueError,
    {
        "0 bytes": (npz_of(b""), READ),
        "text": (npz_of(b"hello"), READ),
        "truncated": (spoilt_npz(lambda b: b[:-30]), READ),
        "a byte changed": (spoilt_npz(lambda b: b[:150] + bytes([b[150] ^ 255]) + b[151:]), READ + "|CRC"),
        "a pickle": (npz_of(pickle.dumps(Evil())), READ),
        "an array of objects": (npz(images=np.array([Evil()] * 3, dtype=object)), READ),
        "a zip bomb": (npz_of(npz_bomb()), READ),
        "zip slip": (npz_of(zipped(**{"../evil.npy": b"x"})), r"path: .* holds the arrays \['../evil'\], expected"),
        "arrays that are not known": (npz(labels=NPZ_CLASSES), r"path: .* holds the arrays .*'labels'\], expected"),
        "too few classes": (
            npz(classes=NPZ_CLASSES[:2]),
            SET + r".* classes: expected .* got .* \(2,\), where images has shape \(3, 1, 4, 4\)",
        ),
        "class -1": (npz(classes=NPZ_CLASSES - 1), SET + r".* classes: got indices -1"),
        "an empty class": (npz(classes=NPZ_CLASSES * 2), SET + r".* is empty, .* Leave it out"),
        "classes of floats": (
            npz(classes=NPZ_CLASSES * 1.0),
            SET + r".* classes: expected .* Integer .*, got .* torch.float64",
        ),
        "classes in a table": (npz(classes=NPZ_CLASSES[None]), SET + r".* classes: got shape \(1, 3\)"),
        "0 and 1": (npz(images=NPZ_IMAGES + 1), SET + r".* values 0 and 1, .* Multiply by 255"),
        "NaN": (npz(images=NPZ_IMAGES * NAN), SET + r".* NaN or infinite values, .* Drop or fill"),
        "int64": (npz(images=NPZ_IMAGES.astype(np.int64)), SET + r".* images: got torch.int64, expected"),
        "no images": (
            npz(images=NPZ_IMAGES[:0], classes=NPZ_CLASSES[:0]),
            SET + r".* images: got shape \(0, 1, 4, 4\)",
        ),
        "a name twice": (npz(class_names=["a", "a"]), SET + r".* class_names: got 'a' more than once"),
        "names and indices": (
            npz(classes=np.array(list("xyy")), class_names=["x", "y"]),
            SET + r".* expected none where",
        ),
        "too few alphabets": (npz(alphabets=[0]), SET + r".* alphabets: got shape \(1,\), expected \(2,\)"),
    },
    "^",
)
refused(
    "from_npz", FileNotFoundError, {"no file": (lambda d: from_npz(d / "x"), r"^path: got .*x, expected an .npz file")}
)

DIGITS: dict[str, Any] = {str(digit): np.ones((2, 28, 28), np.float32) for digit in range(10)}


def digits(**arrays: Any) -> Callable[[Path], Any]:
    def call(folder: Path) -> Any:
        np.savez(folder / "binmnist_train.npz", **arrays)
        return mnist(folder)

    return call


def no_root(_: Path) -> Any:
    with mock.patch.dict(os.environ):
        os.environ.pop("PYRO_VMEM_DATA", None)
        return mnist()


refused(
    "mnist",
    ValueError,
    {
        "no root": (no_root, r"root: got None and .* PYRO_VMEM_DATA is not set; .* Pass root="),
        "a digit alone": (
            digits(**{"0": DIGITS["0"]}),
            r"root: .* holds the arrays \['0'\], expected one for each digit",
        ),
        "another size": (
            digits(**DIGITS | {"3": np.ones((2, 27, 28))}),
            r"root: .* array '3' of shape \(2, 27, 28\), exp",
        ),
        "grey": (digits(**DIGITS | {"3": np.ones((2, 28, 28)) / 2}), r"root: .* array '3' .* values 0 and 1"),
        "not a zip": (
            lambda d: mnist(put(d / "binmnist_train.npz", b"PK").parent),
            r"root: cannot read .*binmnist_train",
        ),
    },
    "^",
)
refused("mnist", FileNotFoundError, {"nothing there": (lambda d: mnist(d), r"^root: got .* Pass download=True")})

DRAWING = "images_background/Greek/character01/0001_01.png"


def drawings(**files: bytes) -> Callable[[Path], Any]:
    """Reads Omniglot from a folder with these files."""

    def call(folder: Path) -> Any:
        for name, content in files.items():
            put(folder / name, content)
        return read_omniglot(folder, subset="background", cache_dir=folder / "cache")

    return call


def archive(**members: bytes) -> Callable[[Path], Any]:
    return drawings(**{"images_background.zip": zipped(**members)})


NO_ZIP, NO_DRAWING = (
    r"root: .*\.zip is not a readable zip archive .* Remove it",
    r"root: .* holds no drawing, expected .* remove",
)
refused(
    "omniglot",
    ValueError,
    {
        "no such subset": (lambda d: read_omniglot(d, subset="x"), r"subset: expected 'all' or .* got 'x'"),  # type: ignore[arg-type]
        "no such size": (lambda d: read_omniglot(d, resize="x"), r"resize: expected 'index28' or .* got 'x'"),  # type: ignore[arg-type]
        "text as a zip": (drawings(**{"images_background.zip": b"hello"}), NO_ZIP),
        "an empty zip": (drawings(**{"images_background.zip": b""}), NO_ZIP),
        "a truncated zip": (drawings(**{"images_background.zip": zipped(**{DRAWING: png_bytes()})[:-20]}), NO_ZIP),
        "no drawing": (archive(**{"readme.txt": b"x"}), NO_DRAWING),
        "zip slip": (
            archive(**{"images_background/../../evil/1.png": png_bytes(), "../../evil.png": b"x"}),
            NO_DRAWING,
        ),
        "an absolute name": (archive(**{f"/{DRAWING}": png_bytes()}), NO_DRAWING),
        "a zip bomb": (
            archive(**{DRAWING: bytes(20_000_000)}),
            r"root: cannot read .*0001_01.png \(20000000 bytes\), .* Repl",
        ),
        "text as a drawing": (archive(**{DRAWING: b"hello"}), r"root: cannot read .*0001_01.png .* Replace the file"),
        "another size": (
            archive(**{DRAWING: png_bytes((28, 28))}),
            r"root: .* is 28x28, expected 105x105\. For images",
        ),
        "a truncated PNG": (
            drawings(**{DRAWING: png_bytes()[:30]}),
            r"root: cannot read .*0001_01.png .* Replace the file",
        ),
        "0 bytes": (drawings(**{DRAWING: b""}), r"root: cannot read .*0001_01.png .* Replace the file"),
        "a large file": (
            drawings(**{DRAWING: bytes(2 << 20)}),
            r"root: cannot read .*2097152 bytes.* Replace the file",
        ),
    },
    "^",
)
refused("omniglot", FileNotFoundError, {"nothing there": (drawings(), r"^root: got .* Pass download=True")})

# Specs and checkpoints


def spec(**changes: Any) -> Callable[[Path], Any]:
    return lambda _: pv.build(SPEC | changes)


def spec_file(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: pv.build(put(folder / name, content))


PRIOR = r"spec\.address_prior: expected the name of an AddressPrior, got "
refused(
    "build",
    ValueError,
    {
        "nothing": (lambda _: pv.build(None), r"spec: expected Mapping\[str, Any\] or str or Path, got None"),  # type: ignore[arg-type]
        "a list": (lambda _: pv.build([1]), r"spec: expected Mapping\[str, Any\] or str or Path, got \[1\]"),  # type: ignore[arg-type]
        "no file": (lambda d: pv.build(d / "x.yaml"), r"spec: there is no file '.*x\.yaml'\. Give a dict"),
        "a folder": (lambda d: pv.build(d), r"spec: there is no file"),
        "broken YAML": (spec_file("x.yaml", b"a: [1"), r"spec: '.*x\.yaml' is not valid .yaml .* Correct it"),
        "broken JSON": (spec_file("x.json", b"{"), r"spec: '.*x\.json' is not valid .json .* Correct it"),
        "a list in a file": (spec_file("x.yaml", b"- 1"), r"spec: '.*' holds list, expected a mapping"),
        "an empty file": (spec_file("x.yaml", b""), r"spec: '.*' holds NoneType, expected a mapping"),
        "YAML that runs code": (
            spec_file("x.yaml", b"a: !!python/object/apply:os.system ['touch \"$EVIL\"']"),
            r"spec: '.*' is not valid .yaml .* could not determine a constructor|spec: .* is not valid",
        ),
        "a missing part": (
            lambda _: pv.build({n: v for n, v in SPEC.items() if n != "likelihood"}),
            r"spec: VMA needs likelihood\. Add what is missing",
        ),
        "no part": (lambda _: pv.build({}), r"spec: VMA needs address_prior, .* Add what is missing"),
        "an unknown part": (
            spec(adress_prior="UniformPrior"),
            r"spec: VMA has no argument .* Did you mean 'address_prior'",
        ),
        "a misspelt class": (spec(address_prior="UniformPior"), PRIOR + r"'UniformPior'\. Did you mean 'UniformPrior'"),
        "another kind of part": (
            spec(address_prior="SimilarityGuide"),
            PRIOR + r".* which is an? \w+Guide\. Choices",
        ),
        "an abstract class": (spec(address_prior="AddressPrior"), PRIOR + r".* Choices: "),
        "what is no part": (spec(address_prior=EVIL_SPEC), PRIOR + r"'os\.system'\. Choices: "),
        "an unknown argument": (
            spec(address_prior={"class_path": "UniformPrior", "init_args": {"x": 1}}),
            r"spec\.address_prior: UniformPrior has no argument 'x'\. Its arguments",
        ),
        "a word for a number": (
            spec(address_guide={"class_path": "SimilarityGuide", "init_args": {"num_features": "four"}}),
            r"spec\.address_guide\.num_features: expected a whole number .*, got 'four'",
        ),
        "a flag for a number": (
            spec(latent_prior={"class_path": "StandardPrior", "init_args": {"latent_dim": True}}),
            r"spec\.latent_prior\.latent_dim: expected a whole number .*, got True",
        ),
        "NaN": (
            spec(address_guide={"class_path": "SimilarityGuide", "init_args": {"num_features": 4, "temperature": NAN}}),
            r"spec\.address_guide\.temperature: expected a positive number, got nan",
        ),
        "a part that is null": (
            spec(likelihood=None),
            r"spec\.likelihood: expected the name of a Likelihood, .* got None",
        ),
        "a number for a part": (spec(likelihood=3), r"spec\.likelihood: expected the name of a Likelihood, .* got 3"),
        "more keys": (
            lambda _: pv.build({"class_path": "VMA", "init_args": SPEC, "more": 1}),
            r"spec: expected class_path and init_args, got 'more'",
        ),
        "no VMA": (
            lambda _: pv.build({"class_path": "UniformPrior"}),
            r"spec: expected the name of a VMA, got 'UniformP",
        ),
        "latents of two lengths": (
            spec(latent_prior={"class_path": "StandardPrior", "init_args": {"latent_dim": 9}}),
            r"spec\.latent_guide: its latent_dim is 2, the latent_prior's is 9",
        ),
    },
    "^",
)


def checkpoint(
    read: Callable[[Path], Any],
    spoil: Callable[[bytes], bytes] = lambda content: content,
    tensors: Any = None,
    data: Any = None,
) -> Callable[[Path], Any]:
    """Reads a checkpoint that was spoilt."""

    def call(folder: Path) -> Any:
        path = folder / "best.safetensors"
        save_checkpoint(path, tensors or VECTORS.state_dict(), {"spec": VECTORS.spec()} if data is None else data)
        return read(put(path, spoil(path.read_bytes())))

    return call


def resumed(name: str) -> Callable[[Path], Any]:
    """Puts another file in the place of a run's checkpoint, and resumes."""

    def read(path: Path) -> Any:
        path.rename(path.with_name("last.safetensors"))
        try:
            return pv.fit(VECTORS, VECTOR_EPISODES, steps=1, out=path.parent, resume=True, progress=False)
        finally:
            assert (path.parent / "last.safetensors").exists(), name

    return read


VECTOR_EPISODES = EpisodeSampler(FewShotDataset(torch.rand(12, 3), torch.arange(12) % 3), 2, 1, 1)
WHOLE, PICKLED = (
    r"path: '.*' is not a whole safetensors file .* Delete it and use another",
    r"path: .* looks like a pickle, which",
)
OTHER = {name: tensor[..., :1].clone() if tensor.dim() else tensor for name, tensor in VECTORS.state_dict().items()}
for reader in (load_checkpoint, pv.load):
    refused(
        reader.__name__,
        ValueError,
        {
            "0 bytes": (checkpoint(reader, lambda _: b""), WHOLE),
            "truncated": (checkpoint(reader, lambda b: b[:-9]), WHOLE),
            "more bytes": (checkpoint(reader, lambda b: b + b"x"), WHOLE),
            "text": (checkpoint(reader, lambda _: b"hello"), WHOLE),
            "a bit turned over": (
                checkpoint(reader, lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]),
                r"path: .*corrupted",
            ),
            "a block of zeros": (
                checkpoint(reader, lambda b: b[:-512] + bytes(512)),
                r"path: '.*' is corrupted: .* checksum",
            ),
            "a pickle": (checkpoint(reader, lambda _: pickle.dumps(Evil())), PICKLED),
            "torch.save": (checkpoint(reader, lambda _: torch_saved(Evil())), PICKLED),
            "a foreign file": (
                checkpoint(reader, lambda _: foreign("pt")),
                r"path: .* has format 'pt', .* Give a checkpoint",
            ),
            "a file of the future": (
                checkpoint(reader, lambda _: foreign("pyro_vmem/99")),
                r"path: .* has format 99, .* Update pyro_vmem",
            ),
        },
        "^",
    )
    refused(
        reader.__name__,
        FileNotFoundError,
        {
            "nothing there": (
                lambda d, reader=reader: reader(d / "x"),
                r"^path: there is no checkpoint at .* Give the file",
            ),
            "an empty folder": (
                lambda d, reader=reader: reader(d),
                r"^path: there is no checkpoint at .* Give the file",
            ),
        },
    )
refused(
    "load",
    ValueError,
    {
        "no model": (checkpoint(pv.load, data={}), r"path: '.*' holds no model\. Give a checkpoint that"),
        "other weights": (
            checkpoint(pv.load, tensors={"w": X}),
            r"path: the weights in '.*' are not those of the model",
        ),
        "weights of other shapes": (checkpoint(pv.load, tensors=OTHER), r"path: the weights in '.*' are not those of"),
        "a model that is no part": (
            checkpoint(pv.load, data={"spec": EVIL_SPEC}),
            r"spec: expected the name of a VMA, got",
        ),
    },
    "^",
)
refused(
    "resume",
    ValueError,
    {
        "a model without a run": (
            checkpoint(resumed("model")),
            r"out: .* holds a model but no run to resume\. Load it",
        ),
        "a run without random state": (
            checkpoint(resumed("state"), data={"spec": {}, "result": {}}),
            r"^out: the checkpoint .*holds a model but no run",
        ),
        "another model": (
            checkpoint(
                resumed("other"),
                tensors={f"model.{n}": t for n, t in OTHER.items()} | {"random_state": torch.get_rng_state()},
                data={"spec": {}, "result": {}, "settings": {}, "optimizer": {}},
            ),
            r"vma: the run had another one: '.*' has shape .* Build it as it was",
        ),
        "nothing that can be read": (
            checkpoint(resumed("text"), lambda _: b"hello"),
            r"path: .* None of .* can be read\. Start",
        ),
        "several that cannot": (
            lambda d: (
                [put(d / f"last{n}.safetensors", b"") for n in ("", "-1")] and load_newest(d / "last.safetensors")
            ),
            r"path: .* None of 'last.safetensors', 'last-1.safetensors' can be read\. Start again",
        ),
    },
    "^",
)


def torch_saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def foreign(name: str) -> bytes:
    from safetensors.torch import save

    return save({"w": torch.ones(2)}, {"format": name, "data": "{}"})


# The command line


class CommandError(Exception):
    """A command that ended with exit code 2, and what it said."""


def command(*words: str) -> Callable[[Path], Any]:
    """Runs a command in a folder; `@` stands for the folder."""

    def call(folder: Path) -> None:
        said = io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                code: Any = cli.main([word.replace("@", str(folder)) for word in words])
            except SystemExit as error:
                code = error.code
        if code == 2:
            raise CommandError(said.getvalue())

    return call


def train(*words: str) -> Callable[[Path], Any]:
    return command("train", "--out", "@/out", *words)


refused(
    "command",
    CommandError,
    {
        "none": (command(), r"expected \"command\" to be one of|required|is required"),
        "no such command": (command("trian"), r"trian"),
        "no such option": (train("--stesp", "3"), r"stesp"),
        "no steps": (train("--steps", "0"), r"pyro-vmem train: --steps: expected a whole number of at least 1, got 0"),
        "a word for steps": (train("--steps", "many"), r"steps.*many"),
        "half a step": (train("--steps", "1.5"), r"steps.*1\.5"),
        "a negative lr": (train("--lr", "-1"), r"pyro-vmem train: --lr: expected a positive number, got -1"),
        "no time": (train("--minutes", "-1"), r"pyro-vmem train: --minutes: expected a number above 0 or None, got -1"),
        "no latent": (train("--latent-dim", "0"), r"latent_dim: expected a positive number.*, got 0"),
        "a negative width": (train("--width", "-4"), r"width: expected a positive number, got -4"),
        "no such decoder": (train("--decoder", "x"), r"decoder.*'?x'?"),
        "no such objective": (train("--objective", "elbo"), r"objective.*elbo"),
        "no such data": (train("--data", "cifar"), r"data.*cifar"),
        "a folder that is not named": (train("--data", "folder"), r"--data_root: --data 'folder' needs the place"),
        "a folder that is missing": (
            train("--data", "folder", "--data-root", "@/none"),
            r"--data_root: got .*none, expected a",
        ),
        "a file that is missing": (
            train("--data", "npz", "--data-root", "@/x.npz"),
            r"--data_root: got .*x\.npz, expected",
        ),
        "Omniglot that is missing": (
            train("--data", "omniglot", "--data-root", "@/x"),
            r"root: got .*x, .* Pass download",
        ),
        "no run to resume": (train("--resume"), r"--out: there is no run in '.*out' .* Train one first"),
        "no run to evaluate": (command("evaluate", "@/none"), r"run: there is no run in '.*none' .* Train one first"),
        "evaluate what": (command("evaluate"), r"run"),
        "no run to sample": (command("sample", "@/none"), r"path: there is no checkpoint at '.*none'\. Give"),
        "no run to report": (command("report", "@/none"), r"run: there is no run in '.*none' .* Train one first"),
        "a demo of no time": (
            command("demo", "--out", "@/out", "--minutes", "-1"),
            r"pyro-vmem demo: --minutes: expected",
        ),
        "a demo of no data": (command("demo", "--out", "@/out", "--data", "x"), r"data.*x"),
        "a word for a seed": (command("demo", "--out", "@/out", "--seed", "x"), r"seed.*x"),
    },
)
