"""Every command on a toy run, as a user would call it."""

import functools
import html
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import pyro_vmem as pv
from pyro_vmem.app import cli, commands, experiment, sources
from pyro_vmem.config import pretrained
from pyro_vmem.data import FewShotDataset
from pyro_vmem.train import save_checkpoint

KEYS = {
    "hit_rate",
    "chance",
    "information_gain",
    "information_gain_share",
    "memory_worth_nats",
    "nll",
    "nll_se",
    "seconds",
    "mutual_information",
    "top5_rate",
    "calibration_error",
    "kl_z",
    "reconstruction",
    "decodes_per_second",
    "reliability",
    "verdict",
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
    monkeypatch.setattr(sources.data, "glyphs", lambda size, seed: dataset)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def undrawn(monkeypatch):
    """No figures, which take longer than all else and are looked at elsewhere."""
    monkeypatch.setattr(experiment, "write_report", lambda path, report: path.write_text(report.title))
    monkeypatch.setattr(experiment, "lookups", lambda *_, **__: None)


SMALL = ["--ways", "4", "--episodes", "2", "--samples", "1"]


def strictly(text):
    """JSON as the standard has it, without NaN and Infinity."""

    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.long
def test_demo_then_evaluate_then_sample(toy, capsys):
    assert cli.main(["demo", "--steps", "3", "--json", *SMALL]) == 0
    said = capsys.readouterr()
    metrics = strictly(said.out)  # nothing else is on stdout
    assert metrics.keys() >= KEYS
    assert metrics["chance"] == 0.25
    assert metrics["steps"] == 3
    assert "Worth of the memory" in said.err
    run = toy / "runs" / "demo"
    names = {path.name for path in run.iterdir()}
    assert names >= {"report.html", "metrics.json", "best.safetensors", "last.safetensors", "experiment.json"}
    assert strictly((run / "metrics.json").read_text()) == metrics
    page = (run / "report.html").read_text()
    assert f"{metrics['nll']:.1f}" in page
    assert html.escape(metrics["verdict"]) in page
    assert "The evaluation took" in page

    assert cli.main(["evaluate", "runs/demo", "--json", *SMALL]) == 0
    again = strictly(capsys.readouterr().out)
    assert again["nll"] == metrics["nll"]  # same model, same episodes, same samples
    assert again.keys() >= KEYS
    assert len(again["reliability"]["count"]) == len(again["reliability"]["accuracy"])
    assert sum(again["reliability"]["count"]) == again["num_targets"]
    assert again["contribution"].keys() >= {"worth_wrong", "worth_shuffled", "worth_blank", "slot_largest"}
    assert {site: row["verdict"] for site, row in again["calibration"].items()}.keys() == {"a", "z"}
    assert "q(a) is" in page

    assert cli.main(["sample", "runs/demo", "--rows", "3", "--columns", "2"]) == 0
    options = "--rows 2 --mean false --best-of 2 --temperature 0.5 --out pixels.png"
    assert cli.main(["sample", "runs/demo", *options.split()]) == 0
    assert (toy / "pixels.png").exists()
    assert (run / "samples.png").read_bytes().startswith(b"\x89PNG")

    capsys.readouterr()
    assert cli.main(["challenge", "runs/demo", "--ways", "5", "--samples", "1", "--json"]) == 0
    said = capsys.readouterr()
    errors = strictly(said.out)
    assert errors["num_targets"] == 20 * errors["n_way"] == 100  # twenty trials of the run's own validation alphabets
    assert 0 <= errors["two_way"] <= 1
    assert "both directions" in said.err


def test_without_json_the_table_is_on_stdout(toy, undrawn, capsys):
    assert cli.main(["demo", "--steps", "1", *SMALL]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", "runs/demo", *SMALL]) == 0
    said = capsys.readouterr()
    assert "Worth of the memory" in said.out
    assert "The evaluation took" in said.out
    assert "{" not in said.out


def test_one_episode_has_null_for_its_error(toy, undrawn, capsys):
    assert cli.main(["demo", "--steps", "1", "--json", *SMALL, "--episodes", "1"]) == 0
    metrics = strictly(capsys.readouterr().out)
    assert metrics["nll_se"] is None
    assert metrics["nll"] > 0


@pytest.mark.long
def test_report_of_a_run_that_was_trained(toy, capsys):
    words = ["train", "--out", "run", "--steps", "2", "--n-way", "4", "--width", "4", "--seed", "3"]
    assert cli.main(words) == 0
    assert not (toy / "run" / "report.html").exists()
    assert cli.main(["report", "run", "--json", *SMALL]) == 0
    said = capsys.readouterr()
    metrics = strictly(said.out)
    assert metrics.keys() >= KEYS
    assert metrics["steps"] == 2
    assert "Report: run/report.html" in said.err
    page = (toy / "run" / "report.html").read_text()
    for heading in ("What the model fills in", "What the memory contributes", "Information gain", "Training"):
        assert f"<h2>{heading}</h2>" in page
    # Its options are not the demo's, so it is repeated in two commands.
    commands = html.unescape(re.search(r"<code>([^<]*)</code>", page).group(1)).splitlines()
    assert commands[1] == "pyro-vmem report run --ways 4 --episodes 2 --samples 1"
    before = strictly((toy / "run" / "metrics.json").read_text())
    shutil.rmtree(toy / "run")
    for command in commands:
        assert cli.main(command.split()[1:]) == 0
    assert strictly((toy / "run" / "metrics.json").read_text())["nll"] == before["nll"]


def test_report_needs_a_trained_run(toy, capsys):
    assert cli.main(["train", "--out", "run", "--steps", "1", "--n-way", "4", "--width", "4"]) == 0
    (toy / "run" / "history.csv").unlink()
    assert cli.main(["report", "run", *SMALL]) == 2
    assert "'run/history.csv' is missing" in capsys.readouterr().err


def test_history_is_what_training_wrote(tmp_path):
    rows = [{"step": 500, "seconds": 5.5, "bound": -9.0}, {"step": 700, "seconds": 8.0, "val_bound": -7.5}]
    lines = ["step,seconds,bound,val_bound", "500,5.5,-9.0,", "700,8.0,,-7.5"]
    (tmp_path / "history.csv").write_text("\n".join(lines) + "\n")
    result = experiment.read_result(tmp_path)
    assert (result.steps, result.seconds, result.best_bound) == (700, 8.0, -7.5)
    assert result.history == rows


@pytest.mark.long
def test_the_reports_command_gives_the_same_numbers_again(toy, capsys):
    words = ["demo", "--steps", "2", "--seed", "4", "--eval-seed", "6", *SMALL]
    assert cli.main([*words, "--json"]) == 0
    first = strictly(capsys.readouterr().out)
    page = (toy / "runs" / "demo" / "report.html").read_text()
    assert "seed 6" in page  # of the episodes
    command = re.search(r"pyro-vmem (demo [^<]*)", page.split("How to repeat it")[1]).group(1)
    assert cli.main([*command.split(), "--json"]) == 0
    again = strictly(capsys.readouterr().out)
    assert again["nll"] == first["nll"]


def test_a_pretrained_demo_trains_nothing_and_says_so(toy, capsys, monkeypatch):
    vma = pv.VMA.for_images((1, 8, 8), latent_dim=4, num_features=16, width=4)
    save_checkpoint(toy / "weights" / "small.safetensors", vma.state_dict(), {"spec": vma.spec(), "protocol": "gmn"})
    monkeypatch.setattr(pretrained, "_WEIGHTS", toy / "weights")
    assert cli.main(["demo", "--pretrained", "small", "--json", *SMALL]) == 0
    assert strictly(capsys.readouterr().out)["steps"] == 0
    page = (toy / "runs" / "demo" / "report.html").read_text()
    assert "Not trained here." in page
    assert "pyro-vmem demo --data glyphs --pretrained small --seed 0" in html.unescape(page)
    kept = pv.load(toy / "runs" / "demo").state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in vma.state_dict().items())
    assert cli.main(["demo", "--pretrained", "smal", *SMALL]) == 2
    assert "expected one of 'small', got 'smal'" in capsys.readouterr().err
    assert not (toy / "runs" / "demo-2").exists()


def test_a_second_demo_takes_another_folder(toy, undrawn, capsys):
    for _ in range(2):
        assert cli.main(["demo", "--steps", "1", *SMALL]) == 0
    assert {path.name for path in (toy / "runs").iterdir()} == {"demo", "demo-2"}


@pytest.mark.long
def test_same_seed_same_numbers_another_seed_others(toy, undrawn, capsys):
    results = []
    for seed in ("0", "0", "5"):
        cli.main(["demo", "--steps", "2", "--seed", seed, "--json", *SMALL])
        results.append(strictly(capsys.readouterr().out))
    one, two, other = ({k: v for k, v in r.items() if "second" not in k} for r in results)
    assert one == two
    assert one["nll"] != other["nll"]


def test_train_and_resume(toy, capsys):
    assert cli.main(["train", "--out", "run", "--steps", "2", "--n-way", "4", "--width", "4", "--json"]) == 0
    assert strictly(capsys.readouterr().out)["steps"] == 2
    assert cli.main(["train", "--out", "run", "--steps", "2"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    with pytest.warns(RuntimeWarning, match="resume: the run is over, after 2 steps"):
        assert cli.main(["train", "--out", "run", "--resume", "--steps", "9"]) == 0
    assert "The run keeps its own settings. Without effect: --steps." in capsys.readouterr().err
    assert experiment.Experiment.read("run").width == 4
    assert pv.load("run").likelihood.network.arguments()["width"] == 4


def test_interrupted_demo_still_reports(toy, undrawn, capsys, monkeypatch):
    """Ctrl-C in training ends it early, and the rest goes on with what was learned."""
    original = pv.data.EpisodeSampler.__getitem__

    def stops(self, index):
        if index == 2 and self.n_way == 32:
            signal.raise_signal(signal.SIGINT)
        return original(self, index)

    monkeypatch.setattr(pv.data.EpisodeSampler, "__getitem__", stops)
    assert cli.main(["demo", "--steps", "50", *SMALL]) == 0
    assert "Interrupted after 3 steps; the run is kept." in capsys.readouterr().err
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
        (["report", "no/such/run"], 2, "no run in 'no/such/run'"),
        (["sample", "no/such/run"], 2, "no checkpoint"),
        (["train", "--out", "r", "--data", "folder"], 2, "--data_root: --data 'folder' needs the place"),
        (["train", "--out", "r", "--data", "npz", "--data-root", "no.npz"], 2, "no.npz"),
        (["train", "--out", "r", "--steps", "0"], 2, "steps: expected a whole number of at least 1, got 0"),
        (["train", "--out", "r", "--n-way", "500"], 2, "n_way"),
        (["demo", "--data", "omniglot", "--data-root", "nowhere"], 2, "nowhere"),
        (["train", "--out", "r", "--data", "folder", "--data-root", "nowhere"], 2, "train: --data_root: got nowhere"),
        (["train", "--out", "r", "--resume"], 2, "train: --out: there is no run in 'r'"),
        (["train", "--out", "r", "--address_guide", "Similar"], 2, "train: --address_guide: expected the name"),
    ],
)
def test_errors_of_use_say_what_and_leave_nothing(toy, capsys, words, code, message):
    assert cli.main(words) == code
    assert message in capsys.readouterr().err
    assert list(toy.iterdir()) == []


@pytest.mark.parametrize("module", ["matplotlib", "rich"])
def test_a_missing_extra_is_named_before_anything_is_done(toy, capsys, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["demo", "--steps", "1"]) == 2
    assert f"this feature needs {module}: pip install '.[" in capsys.readouterr().err
    assert list(toy.iterdir()) == []


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.split()[-1] == pv.__version__


@pytest.mark.parametrize("words", [[], ["fly"], ["demo", "--minute"], ["demo", "--steps", "many"], ["evaluate"]])
def test_unknown_words_exit_2_with_one_line(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("pyro-vmem")
    assert said.endswith("--help.\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--stepz", "3"], "unrecognized arguments: --stepz 3. Did you mean '--steps'?"),
        (["trian"], "Did you mean 'train'?"),
        (["train", "--steps", "many"], "--steps: expected int, got 'many'."),
        (["train", "--data", "glyhs"], "got 'glyhs'. Did you mean 'glyphs'?"),
        (["evaluate"], "run: expected the folder of a run, got none."),
        (["train", "--config", "no.yaml"], "train: --config: there is no file"),
    ],
)
def test_errors_of_use_say_what_was_meant(words, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["demo", "--help"], ["train", "--stepz", "3"], ["trian"]])
def test_help_and_errors_of_use_wait_for_no_torch(words):
    code = (
        "import sys\nfrom pyro_vmem.app.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        "found = {'torch', 'pyro', 'numpy', 'matplotlib'} & sys.modules.keys()\nassert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [*cli.COMMANDS])
def test_help_has_examples_and_json(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"    pyro-vmem {command}" in said
    assert "--json" in said


@pytest.mark.parametrize("command", [*cli.COMMANDS])
@pytest.mark.parametrize("as_json", [True, False])
def test_ctrl_c_in_any_command_exits_130_without_a_traceback(command, as_json, capsys, monkeypatch):
    def interrupting(fn):
        @functools.wraps(fn)
        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        return interrupted

    monkeypatch.setattr(cli, "COMMANDS", {name: interrupting(fn) for name, fn in cli.COMMANDS.items()})
    words = ["run"] if "run" in inspect.signature(cli.COMMANDS[command]).parameters else []
    assert cli.main([command, *words, *["--json"] * as_json]) == 130
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "Interrupted; what was written before is kept.\n"


def test_training_that_was_interrupted_exits_130_and_is_kept(toy, capsys, monkeypatch):
    original = pv.data.EpisodeSampler.__getitem__

    def stops(self, index):
        if index == 2 and self.seed == 0:
            signal.raise_signal(signal.SIGINT)
        return original(self, index)

    words = ["train", "--out", "run", "--steps", "4", "--n-way", "4", "--width", "4", "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(pv.data.EpisodeSampler, "__getitem__", stops)
        assert cli.main(words) == 130
    assert strictly(capsys.readouterr().out).items() >= {"steps": 3, "interrupted": True}.items()
    assert cli.main([*words, "--resume"]) == 0
    assert strictly(capsys.readouterr().out).items() >= {"steps": 4, "interrupted": False}.items()


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "pyro_vmem", "evaluate", "no/such/run"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_two_commands_that_start_together_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    processes = types.SimpleNamespace(first=lambda decide: decide())
    with (
        commands._new_folder(None, "runs/train", processes) as one,
        commands._new_folder(None, "runs/train", processes) as two,
    ):
        assert (one.as_posix(), two.as_posix()) == ("runs/train", "runs/train-2")
    with pytest.raises(ValueError, match="cannot begin"), commands._new_folder(None, "runs/train", processes):
        raise ValueError("cannot begin")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["train", "train-2"]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("Pass resume=True to go on.", "Pass --resume to go on."),
        ("go on with resume=True (--resume), with fewer workers", "go on with --resume, with fewer workers"),
        ("out: 'a' holds a run.", "--out: 'a' holds a run."),
        ("workers=0 loads here", "--workers 0 loads here"),
        ("import it first, or pass trusted_modules=['mine']", "pass --import mine"),
        ("name: expected one of 'a=1'", "name: expected one of 'a=1'"),
    ],
)
def test_errors_are_in_the_words_of_the_command_line(message, said):
    assert cli._in_words(message, {"resume", "out", "workers"}) == said


def test_quiet_prints_the_result_alone_and_the_plan_comes_first(toy, capsys):
    words = ["train", "--steps", "1", "--n-way", "4", "--width", "4"]
    assert cli.main([*words, "--out", "a", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.main([*words, "--out", "b"]) == 0
    said = capsys.readouterr().err
    assert re.match(r"Training [\d,]+ parameters for 1 steps on cpu: glyphs, 16 targets and 16 slots per step.", said)
    assert "\r" not in said


def test_help_is_for_readers_of_a_terminal(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    said = capsys.readouterr().out
    assert "`" not in said
    assert ":class:" not in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_result_that_cannot_be_printed_is_an_error(toy):
    code = (
        "import sys\nfrom pyro_vmem.app import cli\n"
        'def nothing(run: str, quiet: bool = False) -> dict:\n    """Does nothing."""\n    return {\'a\': 1}\n'
        "cli.COMMANDS['sample'] = nothing\nsys.exit(cli.main(['sample', 'run', '--json']))"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "the result could not be printed" in done.stderr
    assert "Exception ignored" not in done.stderr
