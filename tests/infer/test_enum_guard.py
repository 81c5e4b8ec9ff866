"""Enumeration is priced before it is paid for."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate

import pyro_vmem as pv
from pyro_vmem.infer import EnumGuard, enumeration


def case(slots=40, batch=6):
    torch.manual_seed(0)
    vma = pv.VMA.for_vectors(5)
    return (
        vma,
        config_enumerate(vma.guide, "parallel", expand=True),
        pv.Memory(torch.randn(slots, 5)),
        torch.randn(batch, 5),
    )


def saved_bytes(vma, guide, memory, x):
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    return enumeration.saved_bytes(lambda: elbo.differentiable_loss(vma.model, guide, memory, x))


@pytest.mark.parametrize(("slots", "batch"), [(40, 6), (300, 20)])
def test_the_estimate_is_what_the_whole_enumeration_keeps(slots, batch):
    vma, guide, memory, x = case(slots, batch)
    cost = EnumGuard(max_plate_nesting=1).cost(vma.model, guide, memory, x)
    assert cost.values == slots
    assert cost.gigabytes * 1e9 == pytest.approx(saved_bytes(vma, guide, memory, x), rel=0.1)


def test_two_enumerated_sites_multiply():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Categorical(torch.ones(7)))
            b = pyro.sample("b", dist.Categorical(torch.ones(5)))
            pyro.sample("x", dist.Normal((a + 7 * b).float(), 1.0), obs=x)

    @config_enumerate
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("a", dist.Categorical(torch.ones(7)))
            pyro.sample("b", dist.Categorical(torch.ones(5)))

    assert EnumGuard(max_plate_nesting=1).cost(model, guide, torch.randn(3)).values == 35


def test_within_the_limits_it_is_stock_enumeration():
    vma, guide, memory, x = case()
    torch.manual_seed(1)
    ours = EnumGuard(max_plate_nesting=1).differentiable_loss(vma.model, guide, memory, x)
    torch.manual_seed(1)
    stock = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(vma.model, guide, memory, x)
    assert torch.equal(ours, stock)  # and pricing it drew nothing from the global generator
    SVI(vma.model, guide, pyro.optim.Adam({"lr": 0.01}), EnumGuard(max_plate_nesting=1)).step(memory, x)


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        ({"max_gigabytes": 1e-5}, r"enumeration: 40 values, about .* GB per step; the limit is 1e-05 GB\. Sum"),
    ],
)
def test_what_is_too_much_is_refused_before_it_is_done(limits, match):
    vma, guide, memory, x = case()
    before = [p.clone() for p in vma.parameters()]
    svi = SVI(vma.model, guide, pyro.optim.Adam({"lr": 0.01}), EnumGuard(max_plate_nesting=1, **limits))
    with pytest.raises(ValueError, match=match):
        svi.step(memory, x)
    assert all(torch.equal(one, other) for one, other in zip(before, vma.parameters(), strict=True))


def test_a_larger_memory_is_priced_anew(monkeypatch):
    vma, guide, memory, x = case(slots=4)
    cost = EnumGuard(max_plate_nesting=1).cost(vma.model, guide, memory, x).gigabytes
    elbo = EnumGuard(max_gigabytes=3 * cost, max_plate_nesting=1)
    elbo.loss(vma.model, guide, memory, x)
    priced = []
    monkeypatch.setattr(elbo, "cost", lambda *args: priced.append(args) or EnumGuard.cost(elbo, *args))
    elbo.loss(vma.model, guide, memory, x)
    assert priced == []  # the same shapes: no second time
    with pytest.raises(ValueError, match="enumeration: 400 values"):
        elbo.loss(vma.model, guide, case(slots=400)[2], x)


def test_the_default_limit_is_what_is_free(monkeypatch):
    vma, guide, memory, x = case()
    monkeypatch.setattr(enumeration, "_free_bytes", lambda device: 1e3)
    with pytest.raises(ValueError, match="the limit is 9e-07 GB"):
        EnumGuard(max_plate_nesting=1).loss(vma.model, guide, memory, x)


def test_free_bytes():
    assert 1e6 < enumeration._free_bytes(torch.device("cpu")) < 1e15


def test_free_bytes_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(enumeration, "Path", lambda name: tmp_path / "none")
    assert enumeration._free_bytes(torch.device("cpu")) == math.inf


def test_the_limit_is_positive():
    with pytest.raises(ValueError, match="max_gigabytes: expected a positive number or None, got 0"):
        EnumGuard(max_gigabytes=0.0)


def test_repr_and_text():
    assert repr(EnumGuard(max_gigabytes=2.0)) == "EnumGuard(max_gigabytes=2.0)"
    assert str(enumeration.EnumerationCost(1000, 1.5)) == "1,000 values, about 1.5 GB per step"
