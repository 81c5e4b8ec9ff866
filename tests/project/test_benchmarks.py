"""Every benchmark runs, in small, and prints what it says it prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyro_vmem as pv
from benchmarks import packaged, recogniser
from benchmarks.load import over_and_over
from benchmarks.refined import ratio

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent.parent

# A benchmark and the options that make it small; a new one is one line here.
SMALL = {
    "evidence": [
        *("--slots", "[3]", "--decodes", "12", "--targets", "4"),
        *("--letter_slots", "3", "--letter_targets", "2", "--letter_steps", "0", "--repeats", "1"),
        *("--error_slots", "3", "--error_targets", "4", "--error_decodes", "64"),
    ],
    "refined": ["--decodes", "64", "--targets", "2", "--repeats", "2", "--long", "1", "--cases", "1"],
    "estimators": ["--repeats", "3", "--slots", "[4, 8]", "--image_steps", "0", "--race_seconds", "0.01"],
    "faults": [
        *("--kills", "4", "--kills_of_two", "1", "--full_disks", "1", "--corruptions", "20", "--soak_steps", "20"),
        *("--sequences_of_faults", "2", "--thread_runs", "1"),
    ],
    "scaling": ["--slots", "[50, 1100]", "--width", "4", "--batch", "4", "--repeats", "1", "--hnsw_slots", "0"],
    "growth": ["--slots", "[1100]", "--width", "4", "--batch", "4", "--steps", "1"],
    "time_to_quality": ["--seconds", "0.1", "--size", "12", "--width", "2", "--validations", "1"],
    "ranks": ["--steps", "2", "--repeats", "1", "--ways", "2", "--queries", "1", "--width", "2"],
    "load": ["--seconds", "0.01", "--repeats", "1", "--width", "2"],
    "gpu": ["--device", "cpu", "--batch", "[16]", "--width", "2", "--steps", "1"],
    "backward": ["--repeats", "2", "--steps", "1", "--width", "2"],
    "step": ["--targets", "2", "--slots", "3", "--size", "9", "--width", "4", "--repeats", "2"],
    "profile_step": ["--targets", "2", "--slots", "3", "--size", "9", "--width", "4", "--steps", "1"],
    "precision": ["--pairs", "2", "--steps", "1", "--width", "2", "--episodes", "1"],
    "calls": [],
    "overhead": ["--repeats", "2"],
    "programs": ["--draws", "10", "--steps", "3", "--only", "['hidden Markov']", "--by", "['vimco', 'disarm']"],
    "air": ["--minutes", "0.02", "--test", "20", "--batch", "2"],
    "belief_network": ["--samples", "[2, 3]", "--steps", "2", "--test", "10", "--layer", "4"],
    "objectives": ["--seconds", "0.1", "--episodes", "1", "--timed_steps", "1"],
}


NO_COMMANDS = {"__init__", "timing", "killing", "sequences", "hostile", "examples"}

# Those that read Omniglot or MNIST.
READS = {"refined", "belief_network"}

# Those whose figures no page shows.
NOT_KEPT = {"profile_step"}

# These go together: the second reads what the first wrote.
IN_TURN = ("recogniser", "packaged")

# What reproduces published tables is tested in test_reproduce.py.
REPRODUCTION = {"reproduce", "tables", "figures", "recipes", "checkpoints", "published", "pictures", "pretrained"}


def test_every_benchmark_is_listed():
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - NO_COMMANDS
    assert names == set(SMALL) | REPRODUCTION | set(IN_TURN)


@pytest.mark.parametrize("name", SMALL)
def test_benchmark_prints_json(name):
    if name in READS and "PYRO_VMEM_DATA" not in os.environ:
        pytest.skip("PYRO_VMEM_DATA is not set, and this benchmark reads what is there")
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *SMALL[name], "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["rows"]
    if name not in NOT_KEPT:
        kept = ROOT / "docs" / "benchmarks" / f"{name}.json"
        assert result.keys() >= json.loads(kept.read_text()).keys()


@pytest.mark.skipif("PYRO_VMEM_DATA" not in os.environ, reason="PYRO_VMEM_DATA is not set, and these read Omniglot")
def test_packaged_models_are_measured(tmp_path):
    weights = str(tmp_path / "recogniser.safetensors")
    judged = recogniser.main(steps=2, out=weights)
    assert 0.0 < judged["accuracy"] <= 1.0
    few = {"episodes": 2, "samples": 1, "trials": 2, "drawn_episodes": 2}
    found = packaged.main(weights, ["omniglot28-independent"], **few)
    kept = json.loads((ROOT / "docs" / "benchmarks" / "packaged.json").read_text())
    assert found.keys() == kept.keys()
    assert found["rows"][0].keys() == kept["rows"][0].keys()
    packaged.show(found)


def test_without_a_gpu_its_benchmark_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == "device: no GPU is here that torch can use. Run this benchmark where there is one.\n"


def test_the_ratio_of_errors_has_an_interval_that_shrinks_with_targets():
    sampled = torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    found, (low, high) = ratio(sampled / 4, sampled)
    assert (found, low, high) == pytest.approx((0.5, 0.5, 0.5))  # of the same targets, so it is known exactly
    others = sampled.roll(1) / 4
    found, (low, high) = ratio(others, sampled)
    _, (lower, higher) = ratio(others[:20], sampled[:20])
    assert low < 0.5 < high
    assert (higher - lower) / (high - low) == pytest.approx(400**0.5 / 20**0.5, rel=0.3)


def test_a_source_with_an_end_is_loaded_over_and_over():
    dataset = pv.data.FewShotDataset(torch.rand(40, 3), torch.arange(40) % 8)
    episodes = pv.data.EpisodeSampler(dataset, n_way=4, k_shot=1, n_query=1, num_episodes=2)
    found = [episode.x for episode, _ in zip(over_and_over(episodes), range(5), strict=False)]
    assert all(torch.equal(x, episodes[index % 2].x) for index, x in enumerate(found))
    assert len(found) == 5
