"""The trainer: what moves, what does not, and that a run can be stopped and resumed."""

import math
from typing import get_args

import pyro
import pytest
import torch

import pyro_vmem as pv
from pyro_vmem import training
from pyro_vmem.data import EpisodeSampler, FewShotDataset
from pyro_vmem.history import summarise


def blobs(classes=16, drawings=6, seed=0):
    """Each class a random pattern, each drawing the pattern with a few pixels turned over."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(classes, 1, 1, 8, 8, generator=generator) > 0.7
    flips = torch.rand(classes, drawings, 1, 8, 8, generator=generator) > 0.97
    images = (patterns ^ flips).flatten(0, 1).to(torch.uint8) * 255
    return FewShotDataset(images, torch.arange(classes).repeat_interleave(drawings))


def sampler(seed=0):
    return EpisodeSampler(blobs(seed=seed), n_way=6, k_shot=1, n_query=2, seed=seed)


def small_vma(seed=0, **kwargs):
    torch.manual_seed(seed)
    return pv.VMA.for_images((1, 8, 8), latent_dim=4, num_features=16, width=4, **kwargs)


def weights(vma):
    return {name: tensor.clone() for name, tensor in vma.state_dict().items()}


def equal(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


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


@pytest.mark.parametrize("objective", [*get_args(pv.infer.Objective), pyro.infer.Trace_ELBO(num_particles=2)])
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
            if index == stop:
                raise KeyboardInterrupt
            return sampler()[index]

    first = pv.fit(small_vma(), Stops(), out=tmp_path / "parts", **settings)
    assert first.interrupted
    assert first.steps == stop
    resumed = small_vma(seed=9)  # other weights, to be replaced
    result = pv.fit(resumed, sampler(), out=tmp_path / "parts", resume=True, **settings)
    assert not result.interrupted
    assert result.steps == 6
    assert equal(weights(whole), weights(resumed))
    assert result.history[-1]["bound"] != 0
    assert result.history[-1]["val_bound"] == expected.history[-1]["val_bound"]


@pytest.mark.parametrize("validate_every", [1, 2])
def test_pieces_of_any_length_add_up_to_the_whole_run_bit_for_bit(tmp_path, validate_every):
    settings = {"steps": 5, "validation": sampler(seed=1), "validate_every": validate_every, "progress": False}
    whole = small_vma()
    expected = pv.fit(whole, sampler(), out=tmp_path / "whole", **settings)
    lengths = []
    for piece in range(5):
        vma = small_vma(seed=piece)  # replaced by the weights of the piece before
        result = pv.fit(vma, sampler(), out=tmp_path / "parts", resume=True, piece_minutes=1e-5, **settings)
        lengths.append((result.steps, result.interrupted))
    assert lengths == [(1, True), (2, True), (3, True), (4, True), (5, False)]
    assert equal(weights(whole), weights(vma))
    assert [row["step"] for row in result.history] == [1, 2, 3, 4, 5]
    assert result.history[-1]["val_bound"] == expected.history[-1]["val_bound"]
    # A run that is over is not trained on.
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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.safetensors", "history.csv", "last.safetensors"]
    assert equal(weights(vma), weights(pv.load(tmp_path)))
    last = pv.load(tmp_path / "last.safetensors")
    assert last.spec() == vma.spec()
    rows = (tmp_path / "history.csv").read_text().splitlines()
    assert rows[0].startswith("step,seconds,bound")
    assert len(rows) == 3


def test_the_best_weights_are_kept(tmp_path, monkeypatch):
    """The bound gets worse after the first validation: what was best then is what the model holds at the end."""
    bounds = iter([-10.0, -20.0, -30.0])
    monkeypatch.setattr(training, "validate", lambda vma, episodes: {"bound": next(bounds)})
    vma, seen = small_vma(), []
    original = training._Run.record

    def record(self, *args):
        seen.append(weights(self.vma))
        original(self, *args)

    monkeypatch.setattr(training._Run, "record", record)
    result = pv.fit(vma, sampler(), steps=3, validation=sampler(seed=1), validate_every=1, progress=False)
    assert result.best_bound == -10.0
    assert equal(weights(vma), seen[0])
    assert not equal(weights(vma), seen[2])


def test_kl_warmup_and_learning_rate_follow_their_schedules():
    vma = small_vma()
    rows = pv.fit(
        vma, sampler(), steps=8, kl_warmup=0.5, kl_start=0.2, lr=0.01, lr_warmup=2, validate_every=1, progress=False
    ).history
    assert [round(row["kl_weight"], 6) for row in rows] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0]
    expected = [0.01 * min(1, (i + 1) / 2) * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert [row["lr"] for row in rows] == pytest.approx(expected)


def test_the_latents_kl_is_reported_without_its_weight():
    vma = small_vma()
    episode = sampler()[0]
    elbo = pv.infer.VIMCO_ELBO(4, max_plate_nesting=1)
    torch.manual_seed(0)
    plain = summarise(elbo.terms(vma.model, vma.guide, episode.memory, episode.x))
    model, guide = (pv.infer.scale_sites({"z": 0.3})(fn) for fn in (vma.model, vma.guide))
    torch.manual_seed(0)
    weighted = summarise(elbo.terms(model, guide, episode.memory, episode.x), 0.3)
    assert weighted["kl_z"] == pytest.approx(plain["kl_z"], rel=1e-4)


def test_a_time_budget_ends_the_run():
    result = pv.fit(small_vma(), sampler(), minutes=0.02, progress=False)
    assert 1 <= result.steps < 20_000
    assert result.history  # the last record is there whenever it ends


def test_a_loss_that_is_not_finite_stops_the_run():
    vma = small_vma()
    with torch.no_grad():
        next(vma.latent_prior.parameters()).fill_(math.nan)
    with pytest.raises((FloatingPointError, ValueError)):
        pv.fit(vma, sampler(), steps=1, progress=False)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"steps": 0}, "steps: expected a number in"),
        ({"minutes": -1.0}, "minutes: expected a number in"),
        ({"piece_minutes": 0.0}, "piece_minutes: expected a number in"),
        ({"kl_warmup": 1.5}, r"kl_warmup: expected a number in \[0, 1\], got 1.5"),
        ({"kl_start": -0.1}, r"kl_start: expected a number in \[0, 1\], got -0.1"),
        ({"lr": 0.0}, "lr: expected a number"),
        ({"clip_norm": 0.0}, "clip_norm: expected a number"),
        ({"validate_every": 0}, "validate_every: expected a number"),
        ({"objective": "elbo"}, "objective: expected one of .*'vimco'.*got 'elbo'"),
        ({"precision": "half"}, "precision: expected 'auto', 'bfloat16' or 'float32', got 'half'"),
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
    assert result.chosen.startswith("objective 'vimco': 6 values are too many to sum at 4 decodes")
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
    assert result.chosen == "objective 'enumerate': 3 values can be summed at no more than 4 decodes"
    assert pv.fit(small_vma(), sampler(), "vimco", steps=1, progress=False).chosen == ""


def test_an_objective_that_would_not_train_the_guide_is_refused_before_the_first_step():
    vma = small_vma()
    before = {name: p.clone() for name, p in vma.named_parameters()}
    with pytest.raises(ValueError, match=r"objective: RenyiELBO gives the guide's discrete sites \['a'\] no gradient"):
        pv.fit(vma, sampler(), pyro.infer.RenyiELBO(alpha=0.0, num_particles=4), steps=3, progress=False)
    assert all(torch.equal(before[name], p) for name, p in vma.named_parameters())


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
            small_vma(), sampler(), elbo, steps, out=tmp_path / "run", resume=resume, progress=False, piece_minutes=60
        )
        return net.weight

    first = run(3, False).item()
    assert first != 0.0
    resumed = run(3, True)
    assert resumed.item() == first
