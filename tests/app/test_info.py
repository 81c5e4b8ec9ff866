"""`pyro-vmem info`: what is here, and what a run, a file or a part is."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch

import pyro_vmem as pv
from pyro_vmem.app import cli, experiment
from pyro_vmem.app.info import about
from pyro_vmem.data import FewShotDataset

pytest.importorskip("jsonargparse")


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["info", *words]) == 0
    return capsys.readouterr().out


def test_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "omniglot").mkdir()
    (tmp_path / "omniglot" / "images_background.zip").touch()
    monkeypatch.setenv("PYRO_VMEM_DATA", str(tmp_path))
    facts = json.loads(said(capsys, "--json"))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["pyro_vmem"] == pv.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert "bfloat16" in facts["devices"]["cpu"]
    assert facts["data"]["omniglot"] == str(tmp_path / "omniglot" / "images_background.zip")
    assert facts["data"]["mnist"] == "not found"
    text = said(capsys)
    assert f"torch      {torch.__version__}" in text
    assert "mnist           not found" in text


def test_extras_say_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "zuko":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    lines = ["zuko>=1; extra == 'flows'", "pyyaml; extra == 'cli'", "torch", "ruff; extra == 'test'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert about()["extras"] == {"cli": "installed", "flows": "lacks zuko"}


def test_a_run_and_its_files(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    images = torch.randint(2, (24, 1, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8) * 255
    dataset = FewShotDataset(images.expand(-1, 6, -1, -1, -1).flatten(0, 1), torch.arange(24).repeat_interleave(6))
    monkeypatch.setattr(experiment.data, "glyphs", lambda size, seed: dataset)
    monkeypatch.chdir(tmp_path)
    words = "train --out run --steps 2 --n_way 3 --k_shot 2 --n_query 1 --width 4 --latent_prior StandardPrior"
    assert cli.main(words.split()) == 0
    capsys.readouterr()
    facts = json.loads(said(capsys, "run", "--json"))
    assert facts["run"] == "glyphs, vimco, seed 0"
    assert facts["settings"] == {
        **{"steps": 2, "n_way": 3, "k_shot": 2, "n_query": 1, "width": 4},
        "latent_prior": "StandardPrior",
    }
    assert facts["trained"].startswith("FitResult(2 steps in")
    assert {"best.safetensors", "last.safetensors", "history.csv", "experiment.json"} <= set(facts["files"])
    assert facts["model"] == repr(pv.load("run")).splitlines()
    assert "q(a | M,x)" in said(capsys, "run")
    last, best = (json.loads(said(capsys, f"run/{name}.safetensors", "--json")) for name in ("last", "best"))
    assert last["run"].startswith("to resume from, after 2 steps")
    assert "run" not in best
    assert best["model"] == last["model"] == facts["model"]


def test_a_part(capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(said(capsys, "SimilarityGuide", "--json"))
    assert facts["part"] == "pyro_vmem.parts.address_guides.SimilarityGuide"
    assert "AddressGuide" in facts["kind"]
    assert facts["arguments"]["temperature"] == "float = 0.1"
    assert "The slot whose embedding is most similar to the target's." in facts["text"]
    assert "embed_dim     int = 64" in said(capsys, "SimilarityGuide")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("SimilarityGuied", "Did you mean 'SimilarityGuide'? Choices: "),
        ("no/such/run", "what: there is no file and no folder 'no/such/run'."),
        ("model.safetensors", "what: there is no file and no folder 'model.safetensors'."),
        (".", "run: there is no run in '.'"),
    ],
)
def test_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["info", what]) == 2
    assert message in capsys.readouterr().err
