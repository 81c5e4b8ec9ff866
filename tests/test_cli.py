"""Every command on a toy run, as a user would call it."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

import pyro_vmem as pv
from pyro_vmem import cli, experiment
from pyro_vmem.data import FewShotDataset

KEYS = {
    "hit_rate",
    "chance",
    "information_gain",
    "information_gain_share",
    "memory_worth_nats",
    "nll",
    "nll_se",
    "seconds",
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A small data set in place of the glyphs, and an empty working folder."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(60, 1, 1, 8, 8, generator=generator) > 0.7
    flips = torch.rand(60, 10, 1, 8, 8, generator=generator) > 0.97
    images = (patterns ^ flips).flatten(0, 1).to(torch.uint8) * 255
    alphabets = torch.arange(60) // 10
    dataset = FewShotDataset(images, torch.arange(60).repeat_interleave(10), alphabets=alphabets)
    monkeypatch.setattr(experiment.data, "glyphs", lambda seed: dataset)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = ["--ways", "4", "--episodes", "2", "--samples", "1"]


def test_demo_then_evaluate_then_sample(toy, capsys):
    assert cli.main(["demo", "--steps", "3", "--json", *SMALL]) == 0
    out = capsys.readouterr().out
    metrics = json.loads(out.splitlines()[-1])
    assert metrics.keys() >= KEYS
    assert metrics["chance"] == 0.25
    assert metrics["steps"] == 3
    assert "Worth of the memory" in out
    run = toy / "runs" / "demo"
    names = {path.name for path in run.iterdir()}
    assert names >= {"report.html", "metrics.json", "best.safetensors", "last.safetensors", "experiment.json"}
    assert json.loads((run / "metrics.json").read_text()) == metrics
    assert f"{metrics['nll']:.1f}" in (run / "report.html").read_text()

    assert cli.main(["evaluate", "runs/demo", "--json", *SMALL]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["nll"] == metrics["nll"]  # same model, same episodes, same samples

    assert cli.main(["sample", "runs/demo", "--rows", "3", "--columns", "2"]) == 0
    assert cli.main(["sample", "runs/demo", "--rows", "2", "--mean", "false", "--out", "pixels.png"]) == 0
    assert (toy / "pixels.png").exists()
    assert (run / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_the_reports_command_gives_the_same_numbers_again(toy, capsys):
    words = ["demo", "--steps", "2", "--seed", "4", "--eval-seed", "6", *SMALL]
    assert cli.main([*words, "--json"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    page = (toy / "runs" / "demo" / "report.html").read_text()
    assert "seed 6" in page  # of the episodes
    command = re.search(r"pyro-vmem (demo [^<]*)", page.split("How to repeat it")[1]).group(1)
    assert cli.main([*command.split(), "--json"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["nll"] == first["nll"]


def test_a_second_demo_takes_another_folder(toy, capsys):
    for _ in range(2):
        assert cli.main(["demo", "--steps", "1", *SMALL]) == 0
    assert {path.name for path in (toy / "runs").iterdir()} == {"demo", "demo-2"}


def test_same_seed_same_numbers_another_seed_others(toy, capsys):
    results = []
    for seed in ("0", "0", "5"):
        cli.main(["demo", "--steps", "2", "--seed", seed, "--json", *SMALL])
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    one, two, other = ({k: v for k, v in r.items() if "seconds" not in k} for r in results)
    assert one == two
    assert one["nll"] != other["nll"]


def test_train_and_resume(toy, capsys):
    assert cli.main(["train", "--out", "run", "--steps", "2", "--n-way", "4", "--width", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 2
    assert cli.main(["train", "--out", "run", "--steps", "2"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert cli.main(["train", "--out", "run", "--resume"]) == 0
    assert experiment.Experiment.read("run").width == 4
    assert pv.load("run").likelihood.network.arguments()["width"] == 4


def test_interrupted_demo_still_reports(toy, capsys, monkeypatch):
    """Ctrl-C in training ends it early, and the rest goes on with what was learned."""
    original = pv.data.EpisodeSampler.__getitem__

    def stops(self, index):
        if index == 2 and self.n_way == 16:
            raise KeyboardInterrupt
        return original(self, index)

    monkeypatch.setattr(pv.data.EpisodeSampler, "__getitem__", stops)
    assert cli.main(["demo", "--steps", "50", *SMALL]) == 0
    assert "Interrupted after 2 steps; the run is kept." in capsys.readouterr().err
    assert (toy / "runs" / "demo" / "report.html").exists()


def test_interrupt_elsewhere_exits_130(toy, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment.Experiment, "train", interrupted)
    assert cli.main(["train", "--out", "run"]) == 130


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["evaluate", "no/such/run"], 2, "no run in 'no/such/run'"),
        (["sample", "no/such/run"], 2, "no checkpoint"),
        (["train", "--out", "r", "--data", "folder"], 2, "data_root: data='folder' needs the place"),
        (["train", "--out", "r", "--data", "npz", "--data-root", "no.npz"], 2, "no.npz"),
        (["train", "--out", "r", "--steps", "0"], 2, "steps: expected a positive number"),
        (["train", "--out", "r", "--n-way", "500"], 2, "n_way"),
        (["demo", "--data", "omniglot", "--data-root", "nowhere"], 2, "nowhere"),
    ],
)
def test_errors_of_use_say_what_and_leave_nothing(toy, capsys, words, code, message):
    assert cli.main(words) == code
    assert message in capsys.readouterr().err
    assert list(toy.iterdir()) == []


@pytest.mark.parametrize("module", ["jsonargparse", "matplotlib", "rich"])
def test_a_missing_extra_is_named_before_anything_is_done(toy, capsys, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["demo", "--steps", "1"]) == 2
    assert f"this feature needs {module}: pip install 'pyro_vmem[" in capsys.readouterr().err
    assert list(toy.iterdir()) == []


@pytest.mark.parametrize("words", [[], ["fly"], ["demo", "--minute"], ["demo", "--steps", "many"], ["evaluate"]])
def test_unknown_words_exit_2_with_usage(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "usage: pyro-vmem" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "train", "evaluate", "sample"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"    pyro-vmem {command}" in capsys.readouterr().out


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "pyro_vmem", "evaluate", "no/such/run"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
