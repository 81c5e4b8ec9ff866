"""The trainer: what moves, what does not, and that a run can be stopped and resumed."""

import math
import os
import signal
from functools import partial
from typing import get_args

import pyro
import pytest
import torch
from pyro.infer import TraceGraph_ELBO
from small_run import equal, rows, same_state, sampler, small_vma, weights

import pyro_vmem as pv
from pyro_vmem._utils.files import versions_of
from pyro_vmem.infer.by_name import Objective
from pyro_vmem.train import callbacks as training
from pyro_vmem.train import load_checkpoint, save_checkpoint


def test_training_improves_the_bound_on_held_out_classes():
    vma = small_vma()
    before = pv.validate(vma, sampler(seed=1))
    result = pv.fit(vma, sampler(), steps=150, validation=sampler(seed=1), validate_every=50, progress=False)
    after = pv.validate(vma, sampler(seed=1))
    assert after["bound"] > before["bound"] + 5
    assert after["bound"] == pytest.approx(result.best_bound, abs=0.5)  # best weights; full precision here
    assert [row["step"] for row in result.history] == [50, 100, 150]
    assert {"bound", "reconstruction", "kl_a", "kl_z", "val_bound", "val_hit_rate", "lr"} <= set(result.history[0])


def test_every_parameter_moves_and_validation_moves_none():
    vma = small_vma()
    before = weights(vma)
    pv.validate(vma, sampler())
    assert equal(before, weights(vma))
    pv.fit(vma, sampler(), steps=3, progress=False)
    still = [name for name, tensor in vma.state_dict().items() if torch.equal(before[name], tensor)]
    assert still == []


@pytest.mark.parametrize("objective", [*get_args(Objective), pyro.infer.Trace_ELBO(num_particles=2)])
def test_every_objective_trains(objective):
    vma = small_vma(ink=0.01)  # far from the data's share of ink, a third
    before = pv.validate(vma, sampler())["bound"]
    pv.fit(vma, sampler(), objective, steps=60, progress=False, precision="float32")
    assert pv.validate(vma, sampler())["bound"] > before + 3


def test_same_seed_same_numbers_and_another_seed_others():
    runs = []
    for seed in (0, 0, 1):
        vma = small_vma()
        pv.fit(vma, sampler(), steps=5, seed=seed, progress=False)
        runs.append(weights(vma))
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


def test_global_state_is_left_alone():
    torch.manual_seed(11)
    expected = torch.rand(1)
    vma = small_vma()
    torch.manual_seed(11)
    pv.fit(vma, sampler(), steps=2, validation=sampler(seed=1), validate_every=1, progress=False)
    assert torch.equal(torch.rand(1), expected)
    assert list(pyro.get_param_store().keys()) == []


def test_steps_look_no_parameter_up_in_pyros_store(monkeypatch):
    looked_up = []
    monkeypatch.setattr(pyro, "param", lambda name, value: (looked_up.append(name), value)[1])
    counts = []
    for steps in (1, 4):
        looked_up.clear()
        pv.fit(small_vma(), sampler(), steps=steps, progress=False)
        counts.append(len(looked_up))
    assert counts[0] == counts[1] > 0  # the check before the first step looks at each


def test_two_models_side_by_side_share_nothing():
    """Trained in turn under the same name, each ends where it would have ended alone."""
    alone = small_vma(seed=1)
    pv.fit(alone, sampler(), steps=4, progress=False)
    one, two = small_vma(seed=1), small_vma(seed=2)
    pv.fit(two, sampler(seed=1), steps=3, progress=False)
    pv.fit(one, sampler(), steps=4, progress=False)
    pv.fit(two, sampler(seed=1), steps=3, progress=False)
    assert equal(weights(alone), weights(one))


@pytest.mark.parametrize("stop", [2, 3])
def test_resume_is_the_uninterrupted_run_bit_for_bit(tmp_path, monkeypatch, stop):
    settings = {"steps": 6, "validation": sampler(seed=1), "validate_every": 2, "progress": False}
    whole = small_vma()
    expected = pv.fit(whole, sampler(), out=tmp_path / "whole", **settings)

    class Stops:
        """A sampler at which somebody presses Ctrl-C."""

        def __getitem__(self, index):
            if index == stop - 1:
                signal.raise_signal(signal.SIGINT)
            return sampler()[index]

    first = pv.fit(small_vma(), Stops(), out=tmp_path / "parts", **settings)
    assert first.interrupted
    assert first.steps == stop
    resumed = small_vma(seed=9)  # other weights, to be replaced
    result = pv.fit(resumed, sampler(), out=tmp_path / "parts", resume=True, **settings)
    assert not result.interrupted
    assert result.steps == 6
    assert equal(weights(whole), weights(resumed))
    assert rows(result.history) == rows(expected.history)
    assert same_state(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("objective", [o for o in get_args(Objective) if o not in ("vimco", "auto")])
def test_every_objective_resumes_bit_for_bit(tmp_path, objective):
    settings = {"steps": 4, "validate_every": 2, "progress": False}
    pv.fit(small_vma(), sampler(), objective, out=tmp_path / "whole", **settings)
    for _ in range(4):
        result = pv.fit(
            small_vma(),
            sampler(),
            objective,
            out=tmp_path / "parts",
            resume=True,
            callbacks=[pv.train.StopAfter(1e-5)],
            **settings,
        )
    assert not result.interrupted
    assert same_state(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("validate_every", [1, 2])
def test_pieces_of_any_length_add_up_to_the_whole_run_bit_for_bit(tmp_path, validate_every):
    settings = {"steps": 5, "validation": sampler(seed=1), "validate_every": validate_every, "progress": False}
    whole = small_vma()
    expected = pv.fit(whole, sampler(), out=tmp_path / "whole", **settings)
    lengths = []
    for piece in range(5):
        vma = small_vma(seed=piece)  # replaced by the weights of the piece before
        result = pv.fit(
            vma, sampler(), out=tmp_path / "parts", resume=True, callbacks=[pv.train.StopAfter(1e-5)], **settings
        )
        lengths.append((result.steps, result.interrupted))
    assert lengths == [(1, True), (2, True), (3, True), (4, True), (5, False)]
    assert equal(weights(whole), weights(vma))
    assert rows(result.history) == rows(expected.history)
    assert same_state(tmp_path / "whole", tmp_path / "parts")
    with pytest.warns(RuntimeWarning, match="resume: the run is over, after 5 steps"):
        assert pv.fit(vma, sampler(), out=tmp_path / "parts", resume=True, **settings).steps == 5
    assert equal(weights(whole), weights(vma))


def test_a_run_is_not_overwritten(tmp_path):
    pv.fit(small_vma(), sampler(), steps=1, out=tmp_path, progress=False)
    before = (tmp_path / "last.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"out: .* already holds a run. Pass resume=True"):
        pv.fit(small_vma(), sampler(), steps=1, out=tmp_path, progress=False)
    assert (tmp_path / "last.safetensors").read_bytes() == before


def test_what_a_run_writes_can_be_loaded(tmp_path):
    vma = small_vma()
    pv.fit(vma, sampler(), steps=4, validation=sampler(seed=1), validate_every=2, out=tmp_path, progress=False)
    names = [".lock", "best.safetensors", "history.csv", "last-1.safetensors", "last.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert equal(weights(vma), weights(pv.load(tmp_path)))
    last = pv.load(tmp_path / "last.safetensors")
    assert last.spec() == vma.spec()
    rows = (tmp_path / "history.csv").read_text().splitlines()
    assert rows[0].startswith("step,seconds,bound")
    assert len(rows) == 3


@pytest.mark.parametrize("select", ["best", "last"])
def test_the_selected_weights_are_kept(select, tmp_path, monkeypatch):
    """The bound gets worse after the first validation: what was best then is kept, or the last is."""
    bounds = iter([-10.0, -20.0, -30.0])
    vma, seen = small_vma(), []

    def validate(vma, episodes):
        seen.append(weights(vma))
        return {"bound": next(bounds)}

    monkeypatch.setattr(training, "validate", validate)
    how = {"validation": sampler(seed=1), "validate_every": 1, "select": select, "out": tmp_path, "progress": False}
    result = pv.fit(vma, sampler(), steps=3, **how)
    assert result.best_bound == -10.0
    for found in (vma, pv.load(tmp_path)):
        assert equal(weights(found), seen[0 if select == "best" else 2])
        assert not equal(weights(found), seen[2 if select == "best" else 0])


def test_kl_warmup_and_learning_rate_follow_their_schedules():
    vma = small_vma()
    rows = pv.fit(
        vma,
        sampler(),
        steps=8,
        kl_schedule=pv.train.LinearRise(0.2, 0.5),
        lr=0.01,
        schedule=pv.train.WarmupCosine(2),
        validate_every=1,
        progress=False,
    ).history
    assert [round(row["kl_weight"], 6) for row in rows] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0]
    expected = [0.01 * min(1, (i + 1) / 2) * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert [row["lr"] for row in rows] == pytest.approx(expected)


def frozen_terms(objective, weight, steps):
    """The mean terms of steps with the same weights, the same noise and a constant weight of KL(z)."""
    config = pv.TrainingConfig(steps=steps, lr=1e-12, kl_schedule=pv.train.Constant(weight), precision="float32")
    vma = small_vma()
    torch.manual_seed(0)
    for parameter in vma.parameters():  # at initialisation KL(z) is nearly zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    trainer, episodes = pv.Trainer(vma, objective, config), sampler()
    torch.manual_seed(1)
    terms = [trainer.step(episodes[i % 8]) for i in range(steps)]
    return vma, {name: sum(t[name] for t in terms) / steps for name in terms[0]}


@pytest.mark.parametrize("objective", ["vimco", "rws", "iwae", "reinforce", "rao-blackwell"])
def test_bound_and_terms_do_not_depend_on_the_weight_of_the_latents_kl(objective):
    full = frozen_terms(objective, 1.0, 8)[1]
    assert full["kl_z"] > 0.5
    assert "tempered_bound" not in full
    for weight in (0.0, 0.3):
        found = frozen_terms(objective, weight, 8)[1]
        for name, value in full.items():
            assert found[name] == pytest.approx(value, abs=2e-3), name
        assert found["tempered_bound"] > found["bound"] + 0.1


def test_the_bound_of_training_and_that_of_validation_agree_in_expectation():
    """On the same episodes with the same weights and number of particles, at a weight far below one."""
    vma, found = frozen_terms(pv.infer.VIMCO_ELBO(8, max_plate_nesting=1), 0.1, 160)
    validated = sum(pv.validate(vma, sampler(), seed=seed)["bound"] for seed in range(10)) / 10
    assert found["bound"] == pytest.approx(validated, abs=0.15)
    assert found["tempered_bound"] > validated + 0.2


def test_a_time_budget_ends_the_run():
    result = pv.fit(small_vma(), sampler(), minutes=0.02, progress=False)
    assert 1 <= result.steps < 20_000
    assert result.history  # the last record is there whenever it ends


def test_a_run_without_a_better_bound_ends_early_and_a_resumed_one_counts_on(tmp_path, monkeypatch, capsys):
    bounds = iter([-10.0, -9.0, -9.5, -9.0, -8.0])  # the fourth is as good as the second, and so no better
    monkeypatch.setattr(training, "validate", lambda *_: {"bound": next(bounds)})
    settings = {"steps": 9, "patience": 2, "validation": sampler(seed=1), "validate_every": 1, "out": tmp_path}
    second = []
    watch = pv.train.Log(lambda step, row: second.append(weights(vma)) if step == 2 else None)
    vma = small_vma()
    result = pv.fit(vma, sampler(), **settings, callbacks=[watch, pv.train.StopAfter(1e-5)], progress=False)
    for step in range(1, 4):
        assert (result.steps, result.interrupted) == (step, True)
        vma = small_vma()
        callbacks = [watch] if step == 3 else [watch, pv.train.StopAfter(1e-5)]
        result = pv.fit(vma, sampler(), **settings, callbacks=callbacks, resume=True)
    assert (result.steps, result.interrupted, result.best_bound) == (4, False, -9.0)
    assert equal(weights(vma), second[0])
    assert "Ended after 4 steps by early stopping (patience 2)." in capsys.readouterr().err
    with pytest.warns(RuntimeWarning, match="the run is over, after 4 steps"):
        assert pv.fit(small_vma(), sampler(), **settings, resume=True, progress=False).steps == 4
    settings |= {"patience": 3, "callbacks": [pv.train.StopAfter(1e-5)]}  # more patience is a reason to go on
    with pytest.warns(RuntimeWarning, match=r"goes on with patience=3 \(was 2\)"):
        assert pv.fit(small_vma(), sampler(), **settings, resume=True, progress=False).steps == 5


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"steps": 0}, r"steps: expected a whole number of at least 1, got 0"),
        ({"patience": 0, "validation": sampler()}, r"patience: expected a whole number of at least 1 or None, got 0"),
        ({"patience": 2}, "patience: got 2, but there is no validation. Pass validation="),
        ({"minutes": -1.0}, r"minutes: expected a number above 0 or None, got \-1\.0"),
        ({"lr": 0.0}, r"lr: expected a positive number, got 0\.0"),
        ({"clip_norm": 0.0}, "clip_norm: expected a number"),
        ({"validate_every": 0}, "validate_every: expected a whole number"),
        ({"objective": "elbo"}, r"objective: expected 'auto' or 'vimco' or 'rws' or 'iwae' or .*, got 'elbo'"),
        ({"precision": "half"}, r"precision: expected 'auto' or 'bfloat16' or 'float32', got 'half'"),
    ],
)
def test_bad_arguments_leave_the_model_alone(kwargs, match):
    vma = small_vma()
    before = weights(vma)
    with pytest.raises(ValueError, match=match):
        pv.fit(vma, sampler(), progress=False, **kwargs)
    assert equal(before, weights(vma))


def test_precisions_agree():
    bounds = {}
    for precision in ("float32", "bfloat16"):
        vma = small_vma()
        pv.fit(vma, sampler(), steps=100, precision=precision, progress=False)
        bounds[precision] = pv.validate(vma, sampler(seed=1))["bound"]
    assert bounds["bfloat16"] == pytest.approx(bounds["float32"], abs=2.0)


def test_a_model_that_no_checkpoint_can_name_is_refused_before_training(tmp_path):
    reference = pv.LinearGaussianMemory(dim=64)
    with pytest.raises(ValueError, match=r"vma: a part was built from an argument that is not plain data"):
        pv.fit(reference.vma(), sampler(), steps=1, out=tmp_path / "run", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_result_repr():
    assert repr(pv.FitResult(1200, 61.0, [], -101.25)) == "FitResult(1,200 steps in 61 s, best bound -101.25 nats)"
    assert repr(pv.FitResult(3, 1.0, interrupted=True)) == "FitResult(3 steps in 1 s, interrupted)"


def test_auto_says_what_it_chose(capsys):
    result = pv.fit(small_vma(), sampler(), "auto", steps=1)
    assert result.chosen.startswith("objective VIMCO_ELBO(num_particles=4): 6 values of 'a' are too many to sum")
    assert result.chosen in capsys.readouterr().err
    truncated = small_vma()
    truncated = pv.VMA(
        truncated.address_prior,
        truncated.latent_prior,
        truncated.likelihood,
        pv.TruncatedGuide(truncated.address_guide, k=3),
        truncated.latent_guide,
        truncated.template_encoder,
    )
    result = pv.fit(truncated, sampler(), "auto", steps=1, progress=False)
    assert result.chosen.startswith("objective UnorderedSet_ELBO(num_particles=3): 3 values of 'a' can be summed")
    assert pv.fit(small_vma(), sampler(), "vimco", steps=1, progress=False).chosen == ""


def test_an_objective_that_would_not_train_the_guide_is_refused_before_the_first_step():
    vma = small_vma()
    before = {name: p.clone() for name, p in vma.named_parameters()}
    with pytest.raises(ValueError, match=r"objective: RenyiELBO gives the guide's discrete sites \['a'\] no gradient"):
        pv.fit(vma, sampler(), pyro.infer.RenyiELBO(alpha=0.0, num_particles=4), steps=3, progress=False)
    assert all(torch.equal(before[name], p) for name, p in vma.named_parameters())


def test_enumeration_logs_the_parts_of_the_bound_and_draws_no_number_of_the_run(monkeypatch):
    """As the other objectives do: on the last episode, because its loss has no parts."""
    settings = {"steps": 4, "validate_every": 2, "progress": False}
    vma, without = small_vma(), small_vma()
    history = pv.fit(vma, sampler(), "enumerate", **settings).history
    assert [row["step"] for row in history] == [2, 4]
    for row in history:
        assert row["reconstruction"] < 0
        assert row["kl_a"] >= 0
        assert abs(row["kl_z"]) < 1  # of draws
    monkeypatch.setattr(pv.Trainer, "_of_bound", lambda *_: {})
    assert "kl_a" not in pv.fit(without, sampler(), "enumerate", **settings).history[0]
    assert equal(weights(vma), weights(without))


def test_stock_enumeration_sums_addresses_without_being_asked():
    """`TraceEnum_ELBO` as it is passed would sample them: the guide is marked for it."""
    losses = [
        pv.fit(small_vma(), sampler(), objective, steps=2, progress=False, out=None, seed=1)
        for objective in (pyro.infer.TraceEnum_ELBO(max_plate_nesting=1), "enumerate")
    ]
    assert losses[0].history[-1]["bound"] == pytest.approx(losses[1].history[-1]["bound"])


def test_a_learned_baseline_is_trained_and_resumed(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, memory, x):
            return self.weight.expand(len(x))

    def run(steps, resume):
        net = Net()
        elbo = pv.infer.Reinforce_ELBO(1, net, max_plate_nesting=1)
        pv.fit(
            small_vma(),
            sampler(),
            elbo,
            steps=steps,
            out=tmp_path / "run",
            resume=resume,
            progress=False,
            callbacks=[pv.train.StopAfter(60)],
        )
        return net.weight

    first = run(3, False).item()
    assert first != 0.0
    with pytest.warns(RuntimeWarning, match="resume: the run is over, after 3 steps"):
        resumed = run(3, True)
    assert resumed.item() == first


def test_what_is_returned_of_an_interrupted_run_has_its_latest_terms(tmp_path):
    result = pv.fit(
        small_vma(),
        sampler(),
        steps=5,
        out=tmp_path,
        validate_every=10,
        callbacks=[pv.train.StopAfter(1e-5)],
        progress=False,
    )
    assert result.interrupted
    assert [row["step"] for row in result.history] == [1]
    assert result.history[0]["bound"] < 0


@pytest.mark.parametrize("keep", [1, 3])
def test_so_many_checkpoints_are_kept(tmp_path, keep):
    pv.fit(
        small_vma(),
        sampler(),
        steps=5,
        validate_every=1,
        callbacks=[pv.train.Checkpoints(tmp_path, keep)],
        progress=False,
    )
    paths = versions_of(tmp_path / "last.safetensors")
    assert [load_checkpoint(path)[1]["result"]["steps"] for path in paths] == [5, 4, 3][:keep]


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path):
    settings = {"steps": 6, "validate_every": 2, "progress": False}
    pv.fit(small_vma(), sampler(), out=tmp_path / "whole", **settings)
    for _ in range(4):
        pv.fit(
            small_vma(),
            sampler(),
            out=tmp_path / "parts",
            resume=True,
            callbacks=[pv.train.StopAfter(1e-5)],
            **settings,
        )
    last = tmp_path / "parts" / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.warns(RuntimeWarning, match=r"is not a whole safetensors file .* Going on from last-1.safetensors"):
        result = pv.fit(small_vma(), sampler(), out=tmp_path / "parts", resume=True, **settings)
    assert result.steps == 6
    assert same_state(tmp_path / "whole", tmp_path / "parts")
    for path in versions_of(last):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"None of 'last.safetensors', 'last-1.safetensors' can be read"):
        pv.fit(small_vma(), sampler(), out=tmp_path / "parts", resume=True, **settings)


def test_a_selection_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="select: expected 'best' or 'last', got 'first'"):
        pv.fit(small_vma(), sampler(), steps=1, select="first")


def test_the_best_weights_are_written_again_if_they_were_lost(tmp_path, monkeypatch):
    bounds = iter([-10.0, -20.0, -30.0])
    monkeypatch.setattr(training, "validate", lambda vma, episodes: {"bound": next(bounds)})
    settings = {"validation": sampler(seed=1), "validate_every": 1, "progress": False, "out": tmp_path, "steps": 3}
    first = small_vma()
    pv.fit(first, sampler(), callbacks=[pv.train.StopAfter(1e-5)], **settings)
    (tmp_path / "best.safetensors").unlink()
    pv.fit(small_vma(), sampler(), resume=True, **settings)
    assert equal(weights(first), weights(pv.load(tmp_path / "best.safetensors")))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"decoder": "conv"}, "vma: the run had another one: 'likelihood.*' has shape .* there and none here"),
        ({"x_encoder": pv.parts.ConvEncoder((1, 8, 8), 16, 4)}, "vma: .* 'x_encoder.* has shape none there and"),
    ],
)
def test_a_run_of_another_model_is_not_resumed(tmp_path, change, match):
    pv.fit(small_vma(), sampler(), steps=1, out=tmp_path, progress=False)
    other = small_vma(**change)
    before = weights(other)
    with pytest.raises(ValueError, match=match):
        pv.fit(other, sampler(), steps=2, out=tmp_path, resume=True, progress=False)
    assert equal(before, weights(other))


def test_a_run_that_trained_other_parameters_is_not_resumed(tmp_path):
    pv.fit(small_vma(), sampler(), steps=1, out=tmp_path, progress=False)
    frozen = small_vma()
    frozen.template_encoder.requires_grad_(False)
    before = weights(frozen)
    with pytest.raises(ValueError, match=r"vma: .* trained other parameters: template_encoder.*Freeze and unfreeze"):
        pv.fit(frozen, sampler(), steps=2, out=tmp_path, resume=True, progress=False)
    assert equal(before, weights(frozen))


def test_another_objectives_network_is_not_resumed(tmp_path):
    elbo = pv.infer.Reinforce_ELBO(1, "average", max_plate_nesting=1)
    pv.fit(small_vma(), sampler(), elbo, steps=1, out=tmp_path, progress=False)
    match = r"objective: the run had another one: 'mean' has shape \(\) of torch.float32 there and none here"
    with pytest.raises(ValueError, match=match):
        pv.fit(small_vma(), sampler(), "vimco", steps=2, out=tmp_path, resume=True, progress=False)


def test_the_state_of_another_optimizer_is_not_resumed(tmp_path):
    settings = {"steps": 2, "out": tmp_path, "progress": False, "resume": True}
    pv.fit(small_vma(), sampler(), **settings)
    model = small_vma()
    before = weights(model)
    with pytest.raises(ValueError, match="optimizer: the run was trained by Adam, whose state SGD cannot continue"):
        pv.fit(model, sampler(), optimizer=torch.optim.SGD, **settings)
    assert equal(before, weights(model))


def test_a_model_alone_is_no_run(tmp_path):
    settings = {"steps": 2, "validation": sampler(seed=1), "out": tmp_path, "progress": False}
    pv.fit(small_vma(), sampler(), **settings)
    (tmp_path / "best.safetensors").replace(tmp_path / "last.safetensors")
    with pytest.raises(ValueError, match=r"out: the checkpoint holds a model but no run to resume"):
        pv.fit(small_vma(), sampler(), resume=True, **settings)


def test_changed_settings_are_told(tmp_path):
    """By name: settings, objective, and the data, of which the first episode is compared."""
    pv.fit(small_vma(), sampler(), steps=1, out=tmp_path, progress=False)
    changed = {"lr": 0.01, "out": tmp_path, "resume": True, "progress": False, "precision": "float32"}
    elbo = pv.infer.VIMCO_ELBO(6, max_plate_nesting=1)
    match = r"objective='VIMCO_ELBO\(.*6.* steps=2 \(was 1\), lr=0.01 \(was 0.003\), precision=.* first training"
    with pytest.warns(RuntimeWarning, match=match):
        pv.fit(small_vma(), sampler(seed=1), elbo, steps=2, **changed)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"objective": TraceGraph_ELBO()}, {"objective": TraceGraph_ELBO(num_particles=3)}),
        (
            {"optimizer": lambda p, lr: torch.optim.SGD(p, lr=lr)},
            {"optimizer": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)},
        ),
    ],
)
def test_what_has_no_text_of_its_own_is_told_apart_too(tmp_path, before, now):
    settings = {"steps": 1, "out": tmp_path, "progress": False, "resume": True}
    pv.fit(small_vma(), sampler(), **before, **settings)
    with pytest.warns(RuntimeWarning) as caught:
        pv.fit(small_vma(), sampler(), **before, **settings)
    assert [str(warning.message) for warning in caught] == [
        "resume: the run is over, after 1 steps. To train the model further, load it and start a run in another folder."
    ]
    with pytest.warns(RuntimeWarning) as caught:
        pv.fit(small_vma(), sampler(), **now, **settings)
    assert f"goes on with {min(now)}=" in str(caught[0].message)


@pytest.mark.parametrize("first", [True, False])
def test_a_validation_that_is_new_or_gone_is_told(tmp_path, first):
    """The best weights are then chosen in another way."""
    stop, settings = [pv.train.StopAfter(1e-5)], {"steps": 2, "out": tmp_path, "progress": False}
    with_one = {"validation": sampler(1)}
    pv.fit(small_vma(), sampler(), callbacks=stop, **settings, **(with_one if first else {}))
    match = "first validation episode=None" if first else r"first validation episode='\w+' \(was None\)"
    with pytest.warns(RuntimeWarning, match=match):
        pv.fit(small_vma(), sampler(), resume=True, **settings, **({} if first else with_one))


def test_a_model_of_another_kind_with_the_same_weights_is_not_resumed(tmp_path):
    """Of the same shapes everywhere, so that only the specs tell them apart."""
    pv.fit(small_vma(), sampler(), steps=1, out=tmp_path, progress=False)
    other = small_vma()
    other = other.replace(address_prior=pv.TemperedPrior(pv.UniformPrior(), 0.5))
    with pytest.raises(ValueError, match=r"vma: the run trained another model\. It differs in address_prior"):
        pv.fit(other, sampler(), steps=1, out=tmp_path, resume=True, progress=False)


def test_a_model_of_another_precision_is_not_resumed(tmp_path):
    pv.fit(small_vma(), sampler(), steps=1, out=tmp_path, progress=False)

    class Double:
        def __getitem__(self, index):
            episode = sampler()[index]
            return pv.data.Episode(episode.memory.to(torch.float64), episode.x.double(), episode.labels)

    with pytest.raises(ValueError, match=r"vma: .* of torch.float32 there and .* of torch.float64 here"):
        pv.fit(small_vma().double(), Double(), steps=2, out=tmp_path, resume=True, progress=False)


def test_another_number_of_threads_is_told(tmp_path):
    """Sums are then taken in another order, so that the run is the same but for rounding."""
    stop, settings = [pv.train.StopAfter(1e-5)], {"steps": 3, "out": tmp_path, "progress": False}
    pv.fit(small_vma(), sampler(), callbacks=stop, **settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(RuntimeWarning, match=rf"goes on with threads={threads + 1} \(was {threads}\)\.$"):
            pv.fit(small_vma(), sampler(), resume=True, **settings)
    finally:
        torch.set_num_threads(threads)


def test_a_relative_folder_stays_where_it_was_though_the_process_moves(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    class Moves:
        def __getitem__(self, index):
            os.chdir(tmp_path / "elsewhere")
            return sampler()[index]

    pv.fit(small_vma(), Moves(), steps=2, validate_every=1, out="run", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "run"]
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert (tmp_path / "run" / "last.safetensors").exists()


@pytest.mark.parametrize("left", ["best.safetensors", "history.csv"])
def test_anything_of_a_run_makes_a_folder_a_run(tmp_path, left):
    settings = {"steps": 2, "validation": sampler(1), "out": tmp_path, "progress": False}
    pv.fit(small_vma(), sampler(), **settings)
    for path in tmp_path.iterdir():
        if path.name not in (left, ".lock"):
            path.unlink()
    before = (tmp_path / left).read_bytes()
    with pytest.raises(ValueError, match="already holds a run"):
        pv.fit(small_vma(), sampler(), **settings)
    with pytest.raises(ValueError, match=rf"resumed: last.safetensors is missing, and \['{left}'\] are there"):
        pv.fit(small_vma(), sampler(), resume=True, **settings)
    assert (tmp_path / left).read_bytes() == before


def test_a_damaged_checkpoint_is_set_aside_and_not_shifted_over_the_good_one(tmp_path):
    settings = {"steps": 6, "validate_every": 2, "progress": False, "out": tmp_path}
    pv.fit(small_vma(), sampler(), callbacks=[pv.train.StopAfter(1e-5)], **settings)
    pv.fit(small_vma(), sampler(), callbacks=[pv.train.StopAfter(1e-5)], resume=True, **settings)
    (tmp_path / "last.safetensors").write_bytes(b"damaged")
    with pytest.warns(RuntimeWarning, match="Going on from last-1"):
        pv.fit(small_vma(), sampler(), callbacks=[pv.train.StopAfter(1e-5)], resume=True, **settings)
    assert (tmp_path / "last-damaged.safetensors").read_bytes() == b"damaged"
    steps = [load_checkpoint(path)[1]["result"]["steps"] for path in versions_of(tmp_path / "last.safetensors")]
    assert steps == [2, 1]


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=6)


OPTIMIZERS = {
    "AdamW": partial(torch.optim.AdamW, weight_decay=0.1),
    "SGD": partial(torch.optim.SGD, momentum=0.9),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", [pv.train.WarmupCosine(2), cosine, one_cycle])
def test_a_users_optimizer_and_scheduler_train_and_resume_bit_for_bit(tmp_path, optimizer, schedule):
    config = pv.TrainingConfig(steps=6, lr=1e-3, optimizer=OPTIMIZERS[optimizer], schedule=schedule)
    settings = {"config": config, "validate_every": 1, "progress": False}
    whole = small_vma()
    history = pv.fit(whole, sampler(), out=tmp_path / "whole", **settings).history
    if schedule is cosine:
        expected = [1e-3 * 0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
        assert [row["lr"] for row in history] == pytest.approx(expected)
    stop = [pv.train.StopAfter(1e-5)]
    for seed in range(6):
        parts = small_vma(seed=seed)
        pv.fit(parts, sampler(), out=tmp_path / "parts", resume=True, callbacks=stop, **settings)
    assert equal(weights(whole), weights(parts))
    assert same_state(tmp_path / "whole", tmp_path / "parts")


def test_the_optimizer_takes_the_step_that_torch_s_takes():
    """One step of plain SGD is the clipped gradient times the learning rate."""
    config = pv.TrainingConfig(
        steps=2, lr=0.5, optimizer=torch.optim.SGD, schedule=pv.train.Constant(), clip_norm=0.25, precision="float32"
    )
    vma = small_vma()
    before = [p.detach().clone() for p in vma.parameters()]
    pv.Trainer(vma, "vimco", config).step(sampler()[0])
    after = [p.detach() for p in vma.parameters()]
    moved = sum((a - b).square().sum() for a, b in zip(before, after, strict=True)).sqrt()
    assert float(moved) == pytest.approx(0.5 * 0.25, rel=1e-4)


def test_episodes_without_labels():
    class Unlabelled:
        def __getitem__(self, index):
            episode = sampler()[index]
            return pv.data.Episode(pv.Memory(episode.memory.templates), episode.x)

    result = pv.fit(small_vma(), Unlabelled(), steps=2, validation=Unlabelled(), progress=False)
    assert "val_bound" in result.history[-1]
    assert "val_hit_rate" not in result.history[-1]


@pytest.mark.parametrize("change", [lambda labels: labels.unsqueeze(-1), lambda labels: labels.float()])
def test_labels_that_would_give_another_hit_rate_are_refused(change):
    episode = sampler()[0]
    with pytest.raises(ValueError, match=r"labels: expected a tensor of dtype Integer and shape \(B\)"):
        pv.data.Episode(episode.memory, episode.x, change(episode.labels))


def test_only_the_generators_of_the_model_s_device_are_copied(monkeypatch):
    asked = []
    fork = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices=None: (asked.append(devices), fork(devices))[1])
    pv.fit(small_vma(), sampler(), steps=1, validation=sampler(1), progress=False)
    assert [] in asked


def test_a_log_gets_each_row_and_one_that_fails_ends_nothing():
    rows = []

    def broken(step, row):
        raise ConnectionError("the service is down")

    logs = [pv.train.Log(broken), pv.train.Log(lambda step, row: rows.append((step, row["bound"])))]
    with pytest.warns(RuntimeWarning, match=r"log: broken failed \(ConnectionError: the service is down\)"):
        history = pv.fit(small_vma(), sampler(), steps=4, validate_every=2, callbacks=logs, progress=False).history
    assert rows == [(row["step"], row["bound"]) for row in history]
    with pytest.raises(ValueError, match=r"callbacks: expected Sequence\[Callback\], got \["):
        pv.fit(small_vma(), sampler(), steps=1, callbacks=[print], progress=False)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_the_mode_that_the_caller_is_in_changes_nothing(mode):
    settings = {"steps": 2, "validate_every": 1, "progress": False}
    alone, inside, held_out = small_vma(), small_vma(), sampler(1)
    pv.fit(alone, sampler(), validation=held_out, **settings)
    episodes = sampler()
    with mode():
        pv.fit(inside, episodes, validation=held_out, **settings)
    assert equal(weights(alone), weights(inside))


def test_a_run_can_be_resumed_from_its_first_file_on(tmp_path, monkeypatch):
    written = []

    def save(path, *arguments):
        written.append(path.name)
        save_checkpoint(path, *arguments)

    monkeypatch.setattr(training, "save_checkpoint", save)
    settings = {"progress": False, "steps": 1, "validate_every": 1, "validation": sampler(1), "out": tmp_path}
    pv.fit(small_vma(), sampler(), **settings)
    assert written == ["last.safetensors", "best.safetensors"]
    best = load_checkpoint(tmp_path / "best.safetensors")[0]
    (tmp_path / "best.safetensors").unlink()  # as of a run that was killed between the two
    with pytest.warns(RuntimeWarning, match="the run is over"):
        pv.fit(small_vma(), sampler(), resume=True, **settings)
    for name, tensor in load_checkpoint(tmp_path / "best.safetensors")[0].items():
        assert torch.equal(tensor, best.pop(name)), name
    assert not best
