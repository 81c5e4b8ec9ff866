"""Specs of some parts: what is not given is what fits; in Python, in files and on the command line."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pyro_vmem as pv
from pyro_vmem import VMA, AddressGuide
from pyro_vmem.app import Experiment, cli, experiment, sources
from pyro_vmem.app.experiment import PARTS
from pyro_vmem.app.words import quoted, split_words, with_changes
from pyro_vmem.data import FewShotDataset
from pyro_vmem.infer import VIMCO_ELBO

yaml = pytest.importorskip("yaml")
pytest.importorskip("jsonargparse")
SHAPE, D, F, W = (1, 9, 7), 3, 10, 4


def images() -> VMA:
    return VMA.for_images(SHAPE, D, F, W, ink=0.3)


def args(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


# Specs that name no length and no shape, and what becomes of them.
FITTING: dict[str, tuple[dict[str, Any], str]] = {
    "the part inside": (
        {"address_guide": args("TruncatedGuide", k=3)},
        "TruncatedGuide(inner=SimilarityGuide(num_features=10), k=3)",
    ),
    "inside of that": (
        {"address_guide": args("DefensiveGuide", inner=args("TruncatedGuide", inner="PairwiseGuide"))},
        "DefensiveGuide(inner=TruncatedGuide(inner=PairwiseGuide(num_features=10)), prior=UniformPrior())",
    ),
    "an argument alone": (
        {"address_guide": {"init_args": {"temperature": 2}}},
        "SimilarityGuide(num_features=10, temperature=2.0)",
    ),
    "the same class": ({"likelihood": "BernoulliDecoder"}, f"level={pv.parts.log_odds(0.3):.4g}"),
    "the latent": ({"latent_prior": "StandardPrior"}, "StandardPrior(latent_dim=3)"),
    "a network": ({"likelihood": {"init_args": {"network": "ConvDecoder"}}}, "map_channels=(4, 8)"),
    "an encoder": ({"x_encoder": "MLPEncoder"}, "MLPEncoder(event_shape=(1, 9, 7), num_features=10)"),
    "learned slots": (
        {"templates": args("ExtraTemplates", num_slots=2)},
        "ExtraTemplates(num_slots=2, event_shape=(1, 9, 7))",
    ),
    "a prior": ({"address_prior": args("TemperedPrior", inner="LearnedPrior")}, "inner=LearnedPrior(num_features=10)"),
    "a likelihood": ({"likelihood": "GaussianDecoder"}, "GaussianDecoder(network=WarpDecoder(image_shape=(1, 9, 7)"),
    "nothing": ({}, "SimilarityGuide"),
}


@pytest.mark.parametrize("name", FITTING)
def test_what_is_not_given_fits(name: str) -> None:
    spec, shown = FITTING[name]
    base = images()
    vma = pv.build(spec, like=base)
    assert shown in " ".join(repr(part) for part in vma.children())
    memory, x = pv.Memory(torch.rand(5, *SHAPE).round()), torch.rand(2, *SHAPE).round()
    assert torch.isfinite(VIMCO_ELBO(2, max_plate_nesting=1).differentiable_loss(vma.model, vma.guide, memory, x))
    assert pv.build(vma.spec()).spec() == vma.spec()
    for role in PARTS:
        assert (getattr(vma, role) is getattr(base, role)) == (role not in spec), role


def test_a_model_that_was_trained_keeps_the_weights_of_what_stays(tmp_path: Path) -> None:
    path = tmp_path / "parts.yaml"
    path.write_text("address_guide: {class_path: TruncatedGuide, init_args: {k: 4}}")
    base = images()
    vma = pv.build(path, like=base)
    assert vma.address_guide.inner is base.address_guide
    assert vma.latent_guide is base.latent_guide


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"adress_guide": "PairwiseGuide"}, "spec: VMA has no argument 'adress_guide'. Did you mean 'address_guide'?"),
        (
            {"address_guide": "PairwisGuide"},
            "spec.address_guide: expected the name of an AddressGuide, got 'PairwisGuide'. Did you mean "
            "'PairwiseGuide'? Choices: ",
        ),
        ({"address_guide": args("TruncatedGuide", n=1)}, "TruncatedGuide has no argument 'n'. Its arguments: inner, k"),
        ({"address_guide": {"init_args": {"k": 1}}}, "SimilarityGuide has no argument 'k'."),
        ({"latent_prior": {"init_args": {"latent_dim": 5}}}, "its latent_dim is 3, the latent_prior's is 5"),
        ({"templates": "ExtraTemplates"}, "spec.templates: ExtraTemplates needs num_slots."),
        ({"templates": {"init_args": {"num_slots": 3}}}, "spec.templates: expected the name of a Templates, or"),
        (args("VMA"), "spec: with like, expected parts by name, got a whole model. Give its init_args."),
    ],
)
def test_what_does_not_fit_is_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pv.build(spec, like=images())


# Words


def test_words_of_parts_there_and_back() -> None:
    spec = args("DefensiveGuide", share=0.5, inner=args("TruncatedGuide", k=2, inner={"init_args": {"hidden": None}}))
    words = shlex.split(quoted({"address_guide": spec}))
    others, changes = split_words(["a", *words, "--b", "c"], ["address_guide"])
    assert others == ["a", *words[:2], "--b", "c"]
    assert with_changes(words[1], changes["address_guide"]) == spec


def test_words_may_be_written_as_in_a_file() -> None:
    words = ["--g.class_path=A", "--g.init_args.inner.class_path", "B", "--g.init_args.inner.init_args.k=-1"]
    _, changes = split_words(words, ["g"])
    assert with_changes(None, changes["g"]) == args("A", inner=args("B", k=-1))


# The command line


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    patterns = torch.randint(2, (24, 1, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8) * 255
    dataset = FewShotDataset(patterns.expand(-1, 6, -1, -1, -1).flatten(0, 1), torch.arange(24).repeat_interleave(6))
    monkeypatch.setattr(sources.data, "glyphs", lambda size, seed: dataset)
    monkeypatch.chdir(tmp_path)
    return tmp_path


QUICK = ["--steps", "2", "--n_way", "3", "--k_shot", "2", "--n_query", "1", "--width", "4", "--latent_dim", "5"]


def test_train_with_parts_by_name(toy: Path) -> None:
    words = ["--address_guide", "TruncatedGuide", "--address-guide.k", "3", "--latent_prior=StandardPrior"]
    assert cli.main(["train", *QUICK, "--objective", "enumerate", *words, "--likelihood.network.level=-1.5"]) == 0
    vma = pv.load("runs/train")
    assert repr(vma.address_guide) == "TruncatedGuide(inner=SimilarityGuide(), k=3)"
    assert repr(vma.latent_prior) == "StandardPrior(latent_dim=5)"
    assert vma.likelihood.network.arguments()["level"] == -1.5
    assert Experiment.read("runs/train").address_guide == args("TruncatedGuide", k=3)
    assert cli.main(["train", *QUICK]) == 0
    assert (toy / "runs" / "train-2").exists()
    # What the report prints gives the same experiment again.
    run = Experiment.read("runs/train")
    command = run._command(2, Path("again"), experiment.Evaluation()).splitlines()[0]
    assert "--latent_prior StandardPrior --likelihood.network.level -1.5 --address_guide TruncatedGuide" in command
    assert cli.main(command.split()[1:]) == 0
    assert Experiment.read("again") == run


def test_a_file_and_words_over_it(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", *QUICK, "--address_guide", "TruncatedGuide", "--address_guide.k", "3"]
    assert cli.main([*words, "--print_config"]) == 0
    text = capsys.readouterr().out
    assert list(toy.iterdir()) == []
    (toy / "run.yaml").write_text(text)
    words = ["train", "--config", "run.yaml", "--out", "run", "--address_guide.inner", "PairwiseGuide", "--seed", "4"]
    assert cli.main([*words, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == yaml.safe_load(text) | {
        "out": "run",
        "seed": 4,
        "address_guide": args("TruncatedGuide", k=3, inner="PairwiseGuide"),
    }
    assert cli.main(words) == 0
    assert repr(pv.load("run").address_guide) == "TruncatedGuide(inner=PairwiseGuide(), k=3)"
    assert (Experiment.read("run").seed, Experiment.read("run").width) == (4, 4)


def test_a_part_of_ones_own(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (toy / "my_parts_of_test.py").write_text(
        "import pyro_vmem as pv\n\n\nclass MyGuideOfTest(pv.SimilarityGuide):\n    '''My own.'''\n"
    )
    words = ["train", *QUICK, "--out", "run", "--address_guide", "my_parts_of_test.MyGuideOfTest"]
    assert cli.main(words) == 2  # neither the words nor a file import anything
    assert "Module 'my_parts_of_test' is not imported" in capsys.readouterr().err
    assert "my_parts_of_test" not in sys.modules
    before = list(sys.path)
    try:
        assert cli.main([*words, "--import", "my_parts_of_test"]) == 0
        assert type(pv.load("run").address_guide).__name__ == "MyGuideOfTest"
    finally:
        sys.modules.pop("my_parts_of_test", None)
    assert sys.path == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--address_guide", "TruncatedGuied"], "Did you mean 'TruncatedGuide'? Choices: DefensiveGuide,"),
        (["--address_guide", "os.system"], "expected the name of an AddressGuide, got 'os.system'. Choices:"),
        (["--likelihood", "UniformPrior"], "got 'UniformPrior', which is an AddressPrior. Choices: BernoulliDecoder"),
        (["--address_guide.temprature", "1"], "has no argument 'temprature'. Did you mean 'temperature'?"),
        (
            ["--address_guide.temperature", "hot"],
            "temperature: expected a positive number, got 'hot' (str).",
        ),
        (["--address_guide.temperature"], "--address_guide.temperature: expected a value after it, got none."),
        (["--address_guide.temperature=["], "--address_guide.temperature: '[' is not a value (while parsing"),
        (["--import", "no_such_module_of_test"], "import: No module named 'no_such_module_of_test'"),
        (["--resume"], "resume: which run?"),
    ],
)
def test_errors_list_the_choices_and_leave_nothing(
    toy: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(["train", *QUICK, *words]) == 2
    assert message in capsys.readouterr().err
    assert list(toy.iterdir()) == []


def test_arguments_of_parts_are_for_train_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "run", "--address_guide.k", "3"]) == 2
    assert "address_guide: this command has no such option" in capsys.readouterr().err


def test_a_hostile_file_runs_nothing(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (toy / "evil_of_test.py").write_text("open('marker', 'w')")
    for part in ("evil_of_test.Evil", args("evil_of_test.Evil"), args("subprocess.call", args=["touch", "marker"])):
        (toy / "run.yaml").write_text(yaml.safe_dump({"address_guide": part}))
        assert cli.main(["train", *QUICK, "--config", "run.yaml"]) == 2
        assert "address_guide: expected the name of an AddressGuide" in capsys.readouterr().err
    (toy / "run.yaml").write_text("address_guide: !!python/object/apply:os.system ['touch marker']")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--config", "run.yaml"])
    assert "--config: not valid YAML: could not determine a constructor" in capsys.readouterr().err
    assert {path.name for path in toy.iterdir()} == {"evil_of_test.py", "run.yaml"}


def test_help_lists_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for cls in (pv.SimilarityGuide, pv.TruncatedGuide, pv.LearnedPrior, pv.FlowGuide, pv.ExtraTemplates):
        assert cls.__name__ in text
    assert issubclass(pv.TruncatedGuide, AddressGuide)
