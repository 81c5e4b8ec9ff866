"""The reproduction of published tables: recipes, pieces that add up, cells that are what they say, and the page."""

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import pyro_vmem as pv
from benchmarks import checkpoints, figures, pictures, pretrained, recipes, reproduce, tables
from benchmarks.published import LIKELIHOODS
from pyro_vmem import data
from pyro_vmem.app import Experiment, experiment
from pyro_vmem.train import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.long


def args(class_path, **init_args):
    return {"class_path": class_path, "init_args": init_args}


@pytest.fixture(autouse=True)
def patterns(monkeypatch):
    """Small images: each class a random pattern, each drawing the pattern with a few pixels turned over."""
    monkeypatch.setattr(Experiment, "datasets", lambda self: (drawn(24, 0), drawn(12, 1), drawn(12, 2)))


def drawn(classes, seed, drawings=20):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(classes, 1, 1, 8, 8, generator=generator) > 0.7
    flips = torch.rand(classes, drawings, 1, 8, 8, generator=generator) > 0.97
    pixels = (images ^ flips).flatten(0, 1).to(torch.uint8) * 255
    return data.FewShotDataset(pixels, torch.arange(classes).repeat_interleave(drawings))


def changed(recipe, **values):
    """A recipe with some settings of its own, or of its experiment, changed."""
    own = {field.name for field in dataclasses.fields(recipe)}
    experiment = dataclasses.replace(recipe.experiment, **{n: v for n, v in values.items() if n not in own})
    return dataclasses.replace(recipe, experiment=experiment, **{n: v for n, v in values.items() if n in own})


def new_model(recipe, model="vma", side=8, start=None):
    memory = pv.Memory(torch.zeros(64, 1, side, side))
    episode = data.Episode(memory, torch.full((2, 1, side, side), 0.1), torch.zeros(2, dtype=torch.long))
    return dataclasses.replace(recipe.experiment, model=model, start=start).new_model(episode)


@pytest.fixture
def folders(tmp_path):
    return {"out": str(tmp_path / "results"), "runs": str(tmp_path / "runs")}


def rows_of(folders, table="smoke"):
    return json.loads((tmp(folders) / f"{table}.json").read_text())["rows"]


def tmp(folders):
    return Path(folders["out"])


@pytest.mark.parametrize("name", recipes.tables())
def test_every_recipe_has_cells_that_its_protocol_has(name):
    recipe = recipes.read(name)
    assert recipe.run is None or recipes.read(recipe.run).run is None
    dataset = data.FewShotDataset(
        torch.zeros(700 * 20, 1, 1, 1), torch.arange(700).repeat_interleave(20)
    )  # as many classes and drawings as the largest set has
    for n_classes, shots, _ in recipe.cells():
        episodes = recipe.test_episodes(dataset, n_classes, shots, num_targets=32)
        assert sum(len(e.x) for e in reproduce.batches(episodes, 32)) >= 32
    for model in experiment.MODELS:
        built = new_model(recipe, model, side=26 if name in ("zholus", "vma-45-5") else 28)
        assert recipes.model_name(built) == model


def test_a_recipe_that_is_not_there():
    with pytest.raises(ValueError, match=r"table: expected one of baselines, .*gmn, .*got 'gnm'"):
        recipes.read("gnm")


def test_weights_are_those_of_the_seed():
    recipe = recipes.read("smoke")
    torch.manual_seed(5)
    one = new_model(recipe)
    torch.manual_seed(6)
    two = new_model(recipe)
    assert checkpoints.fingerprint(one.state_dict()) == checkpoints.fingerprint(two.state_dict())
    other = new_model(changed(recipe, seed=1))
    assert checkpoints.fingerprint(one.state_dict()) != checkpoints.fingerprint(other.state_dict())


def test_pieces_add_up_and_cells_are_evaluated_once(folders, tmp_path):
    pieces = 0
    while not reproduce.main("smoke", minutes=1e-5, evaluate=False, **folders)["rows"]:
        pieces += 1
        steps = checkpoints.progress(tmp_path / "runs" / "smoke" / "vma")["steps"]
        assert steps == pieces
        if steps == 6:
            break
    whole = {"out": str(tmp_path / "whole"), "runs": str(tmp_path / "whole-runs")}
    result = reproduce.main("smoke", **whole)
    last = [tmp_path / runs / "smoke" / "vma" / "last.safetensors" for runs in ("runs", "whole-runs")]
    one, two = (
        {name: tensor for name, tensor in load_checkpoint(path)[0].items() if not name.startswith("best.")}
        for path in last  # a piece that ends is validated, so more steps may have been the best one
    )
    assert checkpoints.fingerprint(one) == checkpoints.fingerprint(two)

    # one cell, then the time is up; then the others
    some = reproduce.main("smoke", minutes=1e-9, methods=["sampled"], **folders)["rows"]
    assert some == []
    first = reproduce.main("smoke", classes=[1], shots=[4], methods=["sampled"], **folders)["rows"]
    assert len(first) == 1
    written = (tmp(folders) / "smoke.json").read_text()
    assert reproduce.main("smoke", classes=[1], shots=[4], methods=["sampled"], **folders)["rows"] == first
    assert (tmp(folders) / "smoke.json").read_text() == written
    rows = reproduce.main("smoke", **folders)["rows"]
    assert rows[0] == first[0]
    assert len(rows) == len(result["rows"]) == 8
    # what is known of the run stays where only its weights are left
    known = json.loads((tmp(folders) / "smoke.json").read_text())["runs"]["vma"]
    again = reproduce.main("smoke", train=False, evaluate=True, classes=[1], out=folders["out"], runs="none")
    assert again["runs"]["vma"] == known
    assert known["steps"] == 6
    assert {(r["n_classes"], r["shots"], r["method"]) for r in rows} == set(recipes.read("smoke").cells())
    assert result["recipe"]["num_targets"] == 12
    assert result["recipe"]["experiment"]["n_way"] == 6


def test_all_models_of_a_recipe_are_trained_and_evaluated_unless_one_is_named(folders, monkeypatch):
    smoke = recipes.read("smoke")
    several = dataclasses.replace(smoke, models=["vma", "set-statistics"])
    monkeypatch.setattr(reproduce, "read", {"smoke": several}.get)
    cell = {"classes": [1], "shots": [4], "methods": ["sampled"]}
    assert [r["model"] for r in reproduce.main("smoke", "set-statistics", **cell, **folders)["rows"]] == [
        "set-statistics"
    ]
    result = reproduce.main("smoke", **cell, **folders)
    assert [r["model"] for r in result["rows"]] == ["set-statistics", "vma"]
    one, two = result["rows"]
    assert one["nll"] != two["nll"]
    assert one["kl_a"] == 0 < two["kl_a"]
    assert set(result["runs"]) == {"vma", "set-statistics"}
    assert all(run["steps"] == 6 for run in result["runs"].values())


def test_a_cell_is_the_evidence_of_the_protocols_episodes(folders, tmp_path):
    (row,) = reproduce.main("smoke", classes=[2], shots=[1], methods=["exact-address"], **folders)["rows"]
    vma = pv.load(tmp_path / "runs" / "smoke" / "vma")
    assert isinstance(vma.address_guide, pv.TruncatedGuide)
    vma.address_guide = vma.address_guide.inner
    test = recipes.read("smoke").experiment.datasets()[2]
    episodes = data.protocol("gmn-distinct").episodes(test, 2, 1, num_episodes=12)
    batch = data.merge_episodes(list(episodes))
    found = pv.diagnostics.estimate_evidence(
        vma, batch.memory, batch.x, 20, "exact-address", budget=0, seed=0, precision="auto", max_decodes=250, warn=False
    )
    assert row["nll"] == pytest.approx(float(found.nll.mean()), rel=1e-4)
    assert row["nll_se"] == pytest.approx(float(found.nll.std()) / math.sqrt(12), rel=1e-4)
    assert row["num_targets"] == row["num_episodes"] == 12
    present = (batch.memory.labels == batch.labels[:, None]).any(-1)
    assert row["class_in_memory"] == pytest.approx(float(present.float().mean()), rel=1e-4)
    assert 0 < row["class_in_memory"] < 1
    assert row["nll_in_memory"] == pytest.approx(float(found.nll[present].mean()), rel=1e-4)
    assert row["nll_absent"] == pytest.approx(float(found.nll[~present].mean()), rel=1e-4)
    slots = vma.address_guide(vma.encode(batch.memory), vma.encode_x(batch.x)).probs
    by_class = [[p[lab == c].sum() for c in lab.unique()] for p, lab in zip(slots, batch.memory.labels, strict=True)]
    top = [lab.unique()[torch.stack(p).argmax()] for p, lab in zip(by_class, batch.memory.labels, strict=True)]
    hits = (torch.stack(top) == batch.labels)[present].float().mean()
    assert row["hit_rate"] == pytest.approx(float(hits), rel=1e-4)
    assert row["copy_rate"] == 0.0
    with np.load(tmp(folders) / "smoke.npz") as arrays:
        np.testing.assert_allclose(arrays[reproduce.array_name(row)], found.nll.numpy(), rtol=1e-5)


def test_few_shot_classification(folders, monkeypatch):
    smoke = recipes.read("smoke")
    how = {"n_classes": [5], "shots": [1, 5], "per_class": True, "methods": ["sampled"]}
    recipe = changed(smoke, protocol="whole-memory", num_samples=1, num_targets=64, **how)
    monkeypatch.setattr(reproduce, "read", {"classification": recipe}.get)
    rows = reproduce.main("classification", **folders)["rows"]
    assert [(r["n_classes"], r["shots"], r["num_episodes"]) for r in rows] == [(5, 5, 16), (5, 25, 16)]
    assert all(0.2 < r["hit_rate"] <= 1.0 and r["hit_rate_se"] < 0.2 for r in rows)
    tables.main(folders["out"], folders["out"] + "/page/results.md", folders["out"] + "/page/results")
    page = (tmp(folders) / "page" / "results.md").read_text()
    one, five = (f"{100 * r['hit_rate']:.1f} ± {100 * r['hit_rate_se']:.1f} %" for r in rows)
    assert f"| **VMA, this library**, q(a \\| M, x), the guide alone | {one} | {five} |  |  |" in page
    assert "| recalled | 91% | 97% | 77% | 90% |" in page


def test_the_address_guide_of_an_evaluation_sees_all_slots(folders, tmp_path):
    reproduce.main("smoke", evaluate=False, **folders)
    vma = reproduce.trained(recipes.read("smoke"), tmp_path / "runs" / "smoke" / "vma", tmp_path / "nowhere")
    memory = vma.encode(pv.Memory(torch.rand(5, 1, 8, 8)))
    assert (vma.address_guide(memory, vma.encode_x(torch.ones(1, 1, 8, 8))).probs > 0).all()


def test_a_trained_model_is_trained_further_on_other_kinds_of_episodes(folders, tmp_path, monkeypatch):
    smoke = recipes.read("smoke")
    more = [{"n_way": 2, "k_shot": 1, "n_absent": 3}, {"n_way": 1, "k_shot": 1, "n_absent": 1}]
    run = tmp_path / "runs" / "smoke" / "vma"
    kinds = {"more": more, "held_out": None, "start": str(run)}
    further = changed(smoke, steps=4, lr=1e-9, kl_schedule=args("LinearRise", start=1.0), **kinds)
    episodes, held_out = further.experiment.episodes()
    assert [(e.memory.num_slots, len(e.x)) for e in map(episodes.__getitem__, range(4))] == [
        *[(12, 12), (2, 20), (1, 8), (12, 12)]
    ]
    assert [e.memory.num_slots for e in map(held_out.__getitem__, range(3))] == [12, 2, 1]
    monkeypatch.setattr(reproduce, "read", {"smoke": smoke, "further": further}.get)
    reproduce.main("smoke", evaluate=False, **folders)
    first = pv.load(run).state_dict()
    elsewhere = str(run.rename(tmp_path / "elsewhere"))
    reproduce.main("further", evaluate=False, start=elsewhere, **folders)
    second = pv.load(tmp_path / "runs" / "further" / "vma").state_dict()
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_table_of_another_tables_model_is_evaluated_without_being_asked(folders, monkeypatch):
    smoke = recipes.read("smoke")
    other = changed(smoke, run="smoke", steps=10**6)
    monkeypatch.setattr(reproduce, "read", {"smoke": smoke, "other": other}.get)
    reproduce.main("smoke", evaluate=False, **folders)
    assert len(reproduce.main("other", classes=[1], shots=[1], methods=["sampled"], **folders)["rows"]) == 1


def test_figures_of_other_weights_are_forgotten(folders, tmp_path):
    cell = {"classes": [1], "shots": [1], "methods": ["sampled"]}
    reproduce.main("smoke", **cell, **folders)
    old = rows_of(folders)
    other = {"out": folders["out"], "runs": str(tmp_path / "other")}
    reproduce.fit(changed(recipes.read("smoke"), seed=1).experiment, tmp_path / "other" / "run")
    reproduce.main("smoke", run=str(tmp_path / "other" / "run"), **cell, **other)
    new = rows_of(folders)
    assert len(old) == len(new) == 1
    assert old[0]["weights"] != new[0]["weights"]


def test_shared_memories_and_recall(folders, monkeypatch):
    smoke = recipes.read("smoke")
    per_class = {"n_classes": [1, 8], "shots": [1], "per_class": True}
    shared = changed(smoke, protocol="whole-memory", **per_class)
    recall = changed(smoke, protocol="recall", recall=True, n_way=12, k_shot=1, n_query=6, **per_class)
    monkeypatch.setattr(reproduce, "read", {"scaling": shared, "mnist-recall": recall}.get)
    rows = reproduce.main("scaling", **folders)["rows"]
    assert [(r["n_classes"], r["shots"], r["num_targets"], r["num_episodes"]) for r in rows] == [
        *[(1, 1, 12, 3), (8, 8, 12, 3)] * 2
    ]
    assert all(r["class_in_memory"] == 1.0 and r["copy_rate"] == 0.0 for r in rows)
    rows = reproduce.main("mnist-recall", **folders)["rows"]
    assert [(r["n_classes"], r["num_targets"]) for r in rows] == [(1, 12), (8, 16)] * 2
    assert all(r["copy_rate"] == r["class_in_memory"] == 1.0 for r in rows)
    tables.main(folders["out"], folders["out"] + "/page/results.md", folders["out"] + "/page/results")
    page = (tmp(folders) / "page" / "results.md").read_text()
    assert "| ideal: log \\|M\\| | 1 | 0.00 | 2.08 |" in page
    assert f"| KL(a) | 1 | {rows[0]['kl_a']:.2f} | {rows[1]['kl_a']:.2f} |" in page
    history = {"step": [5, 10], "val_bound": [-9.0, -6.0], "val_kl_a": [1.0, 5.5]}
    training, test = figures.plot_recall(rows[:2], history, 256).axes
    assert [line.get_ydata()[-1] for line in training.lines] == pytest.approx([6.0, 5.5, math.log(256)])
    assert [line.get_ydata()[-1] for line in test.lines] == pytest.approx(
        [rows[1]["nll"], rows[1]["kl_a"], math.log(8)]
    )
    with np.load(tmp(folders) / "scaling.npz") as arrays:
        one, eight = (arrays[f"vma/{c}/{c}/sampled/20/12/0"] for c in (1, 8))
    above = (eight - one - math.log(8)).reshape(3, 4).mean(1)
    assert f"| above it, paired | 1 |  | {above.mean():+.2f} ± {above.std(ddof=1) / math.sqrt(3):.2f} |" in page
    assert "columns: slots in memory" in page
    assert "columns: classes in memory" in page


def test_a_memory_that_is_learned(folders, tmp_path, monkeypatch):
    smoke = recipes.read("smoke")
    how = {"n_classes": [8], "shots": [1], "per_class": True, "methods": ["sampled"], "protocol": "recall"}
    sizes = {"recall": True, "n_way": 12, "k_shot": 1, "n_query": 6, "steps": 2}
    slots = args("LearnedTemplates", num_slots=9)
    recipe = changed(smoke, **how, **sizes, address_guide=None, templates=slots)
    episode = recipe.experiment.episodes()[0][0]
    images = episode.memory.templates
    assert torch.equal(recipe.experiment.new_model(episode).templates.values, images[:9])
    monkeypatch.setattr(reproduce, "read", {"mnist-learned": recipe}.get)
    monkeypatch.setattr(pictures, "read", {"mnist-learned": recipe}.get)
    (row,) = reproduce.main("mnist-learned", **folders)["rows"]
    learned = pv.load(tmp_path / "runs" / "mnist-learned" / "vma")
    assert 0 < (learned.templates.values - images[:9]).abs().max() < 0.1
    assert 0 <= row["kl_a"] <= math.log(9)
    assert row["copy_rate"] == row["class_in_memory"] == 0
    drawn = pictures.main("mnist-learned", folders["out"], out=folders["out"] + "/page/results")["pictures"]
    assert [Path(path).name for path in drawn] == ["mnist-learned-slots.png"]
    tables.main(folders["out"], folders["out"] + "/page/results.md", folders["out"] + "/page/results")
    page = (tmp(folders) / "page" / "results.md").read_text()
    of_bound = " | ".join(f"{row[name]:.2f}" for name in ("kl_a", "kl_z", "reconstruction"))
    assert f"| 8 | {reproduce.figure(row)} | {of_bound} |" in page
    assert "(results/mnist-learned-slots.png)" in page


def test_the_bound_by_examples_a_class(folders, monkeypatch):
    smoke = recipes.read("smoke")
    how = {"n_classes": [2], "shots": [1, 3, 2], "per_class": True, "methods": ["sampled"]}
    monkeypatch.setattr(reproduce, "read", {"breakdown": changed(smoke, protocol="whole-memory", **how)}.get)
    rows = reproduce.main("breakdown", **folders)["rows"]
    tables.main(folders["out"], folders["out"] + "/page/results.md", folders["out"] + "/page/results")
    page = (tmp(folders) / "page" / "results.md").read_text()
    ordered = sorted(rows, key=lambda row: row["shots"])
    assert [row["shots"] for row in ordered] == [2, 4, 6]
    assert "| KL(a) | 2 | " + " | ".join(f"{row['kl_a']:.2f}" for row in ordered) + " |" in page
    assert "(results/breakdown-by-examples.png)" in page
    assert "(results/breakdown.png)" not in page
    kl_a, kl_z, nll = figures.plot_breakdown(rows).axes
    for axes, key in ((kl_a, "kl_a"), (kl_z, "kl_z"), (nll, "nll")):
        assert axes.lines[0].get_xydata().tolist() == [[n, row[key]] for n, row in zip((1, 2, 3), ordered, strict=True)]
    assert kl_a.lines[1].get_ydata().tolist() == pytest.approx([math.log(2), math.log(4), math.log(6)])


def test_the_line_that_a_memory_with_more_classes_is_held_against():
    rows = [
        {"model": model, "n_classes": c, "shots": 4 * c, "method": "sampled", "nll": 90.0 + c, "num_targets": 9}
        for model in ("no-memory", "vma", "soft-attention")
        for c in (8, 1)
    ]
    (axes,) = figures.plot_scaling(rows, "baselines").axes
    solid, dotted = ([line for line in axes.lines if line.get_linestyle() == style] for style in ("-", ":"))
    names = ("VMA, this library", "soft-attention memory", "VAE without memory")
    assert [line.get_label() for line in solid] == [f"{name}, 4 examples per class" for name in names]
    assert len(dotted) == 2  # the autoencoder does not see how many there are
    for line in dotted:
        assert line.get_ydata().tolist() == pytest.approx([91, 91 + math.log(8)])
    assert "hit rate" in tables.scaling("baselines", [rows[2] | {"hit_rate": 1.0, "nll_se": 1.0}], Path("none.npz"))
    assert "hit rate" not in tables.scaling("baselines", [rows[0] | {"hit_rate": 1.0, "nll_se": 1.0}], Path("none.npz"))


def test_the_page_is_what_the_results_give(tmp_path):
    root = Path(__file__).parent.parent.parent
    shutil.copytree(root / "docs" / "results", tmp_path / "results")  # with what benchmarks.pictures drew
    tables.main(str(root / "results"), str(tmp_path / "results.md"), str(tmp_path / "results"))
    assert (tmp_path / "results.md").read_text() == (root / "docs" / "results.md").read_text()


def test_what_goes_into_the_repository_can_be_gone_on_with(folders, tmp_path):
    run, stem = tmp_path / "runs" / "smoke" / "vma", tmp(folders) / "checkpoints" / "smoke-vma"
    reproduce.main("smoke", minutes=1e-5, **folders)
    files = sorted(path.name for path in stem.parent.iterdir())
    assert files == ["smoke-vma-optimizer.safetensors", "smoke-vma.safetensors"]
    exact, data_exact = load_checkpoint(run / "last.safetensors")
    assert checkpoints.unpack(stem, tmp_path / "again")
    again, data_again = load_checkpoint(tmp_path / "again" / "last.safetensors")
    assert {n for n in exact if not n.startswith("best.")} == set(again)
    for name, tensor in again.items():
        assert tensor.dtype == exact[name].dtype
        if "exp_avg" in name:
            torch.testing.assert_close(tensor, exact[name], rtol=2**-8, atol=1e-30)
        else:
            assert torch.equal(tensor, exact[name])
    assert data_again["result"]["steps"] == data_exact["result"]["steps"] == 1
    # on a fresh clone there is no run, and the next piece begins with what was packed
    fresh = {"out": folders["out"], "runs": str(tmp_path / "fresh")}
    reproduce.main("smoke", minutes=1e-5, **fresh)
    assert checkpoints.progress(tmp_path / "fresh" / "smoke" / "vma")["steps"] == 2
    reproduce.main("smoke", evaluate=False, **fresh)
    assert [path.name for path in stem.parent.iterdir()] == ["smoke-vma.safetensors"]  # the best weights alone
    best = load_checkpoint(tmp_path / "fresh" / "smoke" / "vma" / "best.safetensors")[0]
    packed = load_checkpoint(stem.with_suffix(".safetensors"))[0]
    assert checkpoints.fingerprint(best) == checkpoints.fingerprint(packed)
    assert pv.load(stem.with_suffix(".safetensors")).spec() == pv.load(run).spec()


def test_packed_files_of_different_steps_are_refused(folders, tmp_path):
    run, stem = tmp_path / "runs" / "smoke" / "vma", tmp_path / "packed"
    reproduce.main("smoke", minutes=1e-5, **folders)
    checkpoints.pack(run, stem, finished=False)
    keep = (tmp_path / "packed-optimizer.safetensors").read_bytes()
    reproduce.main("smoke", minutes=1e-5, **folders)
    checkpoints.pack(run, stem, finished=False)
    (tmp_path / "packed-optimizer.safetensors").write_bytes(keep)
    with pytest.raises(ValueError, match=r"it is of step 1, packed\.safetensors of 2"):
        checkpoints.unpack(stem, tmp_path / "again")
    assert not checkpoints.unpack(tmp_path / "nothing", tmp_path / "again")


def test_the_page_has_our_figures_the_published_ones_and_their_difference(folders, tmp_path, monkeypatch):
    cells = {"classes": [1], "shots": [1, 4]}
    for model in ("vma", "no-memory"):
        reproduce.main("smoke", model, **cells, **folders)
    # as if the images were Omniglot's
    content = json.loads((tmp(folders) / "smoke.json").read_text())
    content["recipe"]["protocol"] = content["recipe"]["experiment"]["data"] = "zholus"
    (tmp(folders) / "zholus.json").write_text(json.dumps(content))
    (tmp(folders) / "smoke.npz").rename(tmp(folders) / "zholus.npz")
    (tmp(folders) / "smoke.json").unlink()
    result = tables.main(folders["out"], str(tmp_path / "results.md"), str(tmp_path / "figures"))
    page = (tmp_path / "results.md").read_text()
    assert len(result["rows"]) == 8
    for row in result["rows"]:
        assert f"{row['nll']:.2f} ± {row['nll_se']:.2f}" in page
    assert "| re-implementation by artemZholus (PyTorch) (seen) | 1 | 85.23 | 76.17 |" in page
    assert "| unresolved | quoted | 1 |  | 86.5 | 83 |" in page
    assert page.count("86.5") - page.partition("## How to read")[0].count("86.5") == 1  # published figures stand once
    assert (tmp_path / "figures" / "zholus.png").stat().st_size > 5000
    with np.load(tmp(folders) / "zholus.npz") as arrays:
        difference = arrays["no-memory/1/4/sampled/20/12/0"] - arrays["vma/1/4/sampled/20/12/0"]
    error = difference.std(ddof=1) / math.sqrt(12)
    assert f"C = 1, T = 4, sampled: {difference.mean():+.2f} ± {error:.2f}" in page


def test_of_a_cell_the_closest_row_is_shown():
    cell = {"model": "vma", "n_classes": 1, "shots": 1, "method": "sampled"}
    rows = [cell | {"num_targets": n, "num_samples": k} for n, k in [(100, 10), (1000, 10), (1000, 100), (64, 1000)]]
    assert tables.best(rows) == [rows[2]]


def test_published_rows_fall_with_items_in_memory_as_far_as_their_sources_do():
    assert len({(row.who, row.protocol, row.n_classes) for row in LIKELIHOODS}) == len(LIKELIHOODS) == 11
    assert {row.mark for row in LIKELIHOODS} == {"seen", "quoted", "recalled"}
    for row in LIKELIHOODS:
        nll = [row.nll[t] for t in sorted(row.nll)]
        assert sum(later > earlier for earlier, later in itertools.pairwise(nll)) <= 1, row.who
        assert all(60 < value < 100 for value in nll)


def test_numbers_that_json_lacks_and_lines():
    assert reproduce._short(math.nan) is None
    assert reproduce._short(123.456789) == 123.46
    value = {"a": {"b": [1, 2], "c": {"d": None}}, "rows": [{"x": 1}, {"x": 2}], "empty": []}
    assert json.loads(reproduce._lines(value)) == value
    assert '  "rows"' not in reproduce._lines(value)
    assert '{"x": 1}' in reproduce._lines(value)


def test_a_guide_with_features_of_its_own_is_trained_on_a_model_that_stays(folders, tmp_path, monkeypatch):
    smoke = recipes.read("smoke")
    first = changed(smoke, pixels="causal", templates=args("ExtraTemplates", num_slots=1))
    wake = args("RWS_ELBO", num_particles=6, pathwise=True, defensive=0.5, top=8)
    own_features = args("EncoderGuide", encoder=args("ConvEncoder"))
    start = str(tmp_path / "runs" / "first" / "vma")
    further = changed(first, start=start, only="address_guide", objective=wake, warp=True, lr=1e-2, steps=3)
    further = changed(further, address_guide=own_features, views=4)
    monkeypatch.setattr(reproduce, "read", {"first": first, "further": further}.get)
    reproduce.main("first", evaluate=False, **folders)
    cell = {"classes": [2], "shots": [4], "methods": ["sampled"]}
    reproduce.main("further", **cell, **folders)
    before, after = (pv.load(tmp_path / "runs" / name / "vma") for name in ("first", "further"))
    assert isinstance(after.address_guide, pv.EncoderGuide)
    assert after.address_guide.views == 1  # it looks in several ways once it is trained
    seen = reproduce.trained(further, tmp_path / "runs" / "further" / "vma", tmp_path / "none")
    assert seen.address_guide.views == 4
    frozen = {n: t for n, t in before.state_dict().items() if not n.startswith("address_guide")}
    assert frozen
    for name, tensor in frozen.items():
        assert torch.equal(tensor, after.state_dict()[name]), name
    for name, tensor in before.template_encoder.state_dict().items():  # it began with the features that were there
        assert 0 < (after.address_guide.encoder.state_dict()[name] - tensor).abs().max() < 0.1
    (row,) = rows_of(folders, "further")
    assert row["kl_a"] >= 0
    assert math.isfinite(row["kl_z"])
    assert row["reconstruction"] < 0


def test_weights_are_taken_as_far_as_they_fit(tmp_path):
    smoke = recipes.read("smoke")
    begun, causal = new_model(smoke), changed(smoke, pixels="causal")
    save_checkpoint(tmp_path / "begun.safetensors", begun.state_dict(), {"spec": begun.spec()})
    taken = new_model(causal, start=str(tmp_path / "begun.safetensors")).state_dict()
    fresh = new_model(causal).state_dict()
    for name, tensor in begun.state_dict().items():
        assert torch.equal(taken[name][: len(tensor)] if tensor.dim() else taken[name], tensor)
    wider = [name for name, tensor in begun.state_dict().items() if tensor.shape != fresh[name].shape]
    assert {name.rpartition(".")[0] for name in wider} == {"likelihood.network.fine.out", "likelihood.network.show"}
    for name in wider:
        rest = len(begun.state_dict()[name])
        assert torch.equal(taken[name][rest:], fresh[name][rest:])


def test_pictures_and_package_are_of_a_tables_model(folders, tmp_path, capsys):
    reproduce.main("smoke", classes=[1], shots=[1], methods=["sampled"], **folders)
    drawn = pictures.main("smoke", folders["out"], out=str(tmp_path / "page" / "results"))["pictures"]
    assert {path.rpartition("/")[2] for path in drawn} == {
        f"smoke-{kind}.png" for kind in ("lookups", "draws", "completions")
    }
    assert all(Path(path).stat().st_size > 5000 for path in drawn)
    packed = pretrained.main("smoke", "small", folders["out"], str(tmp_path / "weights"))
    assert abs(packed["rounding"]) < 0.1
    card = (tmp_path / "weights" / "small.md").read_text()
    (row,) = rows_of(folders)
    assert card.startswith("# small\n")
    assert reproduce.figure(row) in card
    vma, halves = (
        reproduce.trained(recipes.read("smoke"), tmp_path / "runs" / "smoke" / "vma", tmp_path),
        pv.load(packed["weights"]),
    )
    assert halves.spec() == vma.spec()
    for name, tensor in vma.state_dict().items():
        assert torch.equal(halves.state_dict()[name], tensor.half().float())


def test_the_readmes_picture_shows_probabilities_gains_and_new_drawings():
    torch.manual_seed(0)
    classes = torch.arange(44) % 22
    dataset = pv.data.FewShotDataset((torch.rand(44, 1, 8, 8) < 0.3).float(), classes)
    figure = pictures.readme(pv.VMA.for_images((1, 8, 8), latent_dim=2, num_features=8, width=4), dataset, seed=0)
    texts = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert sum(text.endswith(" nats") for text in texts) == 6
    assert sum(text.endswith("%") for text in texts) == 6 * 4
    assert sum(len(ax.images) for ax in figure.axes) == 6 * (1 + 4 + 4)
    assert [pictures.percent(p) for p in (0.001, 0.25, 0.999)] == ["<1 %", "25 %", ">99 %"]
