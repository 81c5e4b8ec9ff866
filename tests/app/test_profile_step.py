"""Where the time of a step goes: that parts add up, what is counted as what, and that nothing is changed."""

from types import SimpleNamespace

import pytest
import torch
from small_run import equal, sampler, small_vma, weights

import pyro_vmem as pv
from pyro_vmem.app import speed
from pyro_vmem.app.profile_step import PARTS, StepProfile, profile_step


def test_operations_are_those_of_the_parts():
    vma, episode = small_vma(), sampler()[0]
    profile = profile_step(vma, episode, steps=1, num_particles=3)
    assert tuple(profile.seconds) == tuple(profile.flops) == PARTS
    assert profile.decodes == 3 * len(episode.x)
    assert profile.targets == len(episode.x)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        vma.template_encoder(episode.memory.templates)
    assert profile.flops["encode memory"] == counter.get_total_flops() > 0
    assert profile.flops["encode x"] * episode.memory.num_slots == counter.get_total_flops() * len(episode.x)
    forward = [profile.flops[part] for part in ("encode memory", "encode x", "address", "latent", "decode")]
    assert min(forward) > 0
    # each product has one with respect to the weights, and one with respect to the inputs if these are not images
    assert sum(forward) < profile.flops["backward"] <= 2 * sum(forward)
    assert profile.flops["optimizer"] == profile.flops["read"] == 0


def test_every_moment_belongs_to_one_part(monkeypatch):
    ticks = iter(range(10**6))  # a clock that a look at moves on by a second
    now = lambda: float(next(ticks))  # noqa: E731
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=now, process_time=now))
    profile = profile_step(small_vma(), sampler()[0], steps=2)
    assert all(seconds >= 1 for seconds in profile.seconds.values())
    # memory and targets are encoded once, the address and the latent have a prior and a guide, both read a template;
    # the likelihood is made, has its density and the decoder within; the optimizer clips and moves
    assert {
        part: profile.seconds[part] for part in ("encode x", "address", "latent", "read", "decode", "backward")
    } == {
        "encode x": 1,
        "address": 2,
        "latent": 2,
        "read": 2,
        "decode": 1,
        "backward": 1,
    }
    assert profile.seconds["likelihood"] == 3
    assert profile.seconds["optimizer"] == 2


@pytest.mark.parametrize("objective", ["vimco", "enumerate"])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_changed(objective, training):
    vma = small_vma().train(training)
    before, state, attributes = weights(vma), torch.get_rng_state(), set(vars(vma))
    profile_step(vma, sampler()[0], objective, steps=1)
    assert equal(before, weights(vma))
    assert torch.equal(state, torch.get_rng_state())
    assert set(vars(vma)) == attributes
    assert vma.training is training
    assert all(p.grad is None for p in vma.parameters())
    assert not any("forward" in vars(module) for module in vma.modules())
    assert torch.autograd.backward.__module__ == "torch.autograd"
    assert torch.nn.utils.clip_grad_norm_.__module__ == "torch.nn.utils.clip_grad"


def test_rates_and_words():
    flops = dict.fromkeys(PARTS, 0) | {"decode": 2 * 10**9, "backward": 4 * 10**9}
    profile = StepProfile(dict.fromkeys(PARTS, 0.01), flops, 1.2e11, 50, 200, "cpu", "bfloat16")
    assert profile.seconds_a_step == pytest.approx(0.1)
    assert profile.flops_per_second == pytest.approx(6e10)
    assert profile.share_of_matmul == pytest.approx(0.5)
    assert ("decode", "10.0", "10%", "2.00") in profile.table()
    assert "500 targets a second, 60 GFLOP/s, 50% of the 120" in profile.sentence()
    summary = profile.summary()
    assert sum(row["share"] for row in summary["rows"]) == pytest.approx(1)
    assert summary["flop_share"] == pytest.approx(0.5)


def test_bad_arguments():
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        profile_step(small_vma(), sampler()[0], steps=0)
    with pytest.raises(ValueError, match="memory"):
        profile_step(small_vma(), pv.data.Episode(pv.Memory(torch.rand(3, 4)), torch.rand(2, 4), torch.zeros(2)))
