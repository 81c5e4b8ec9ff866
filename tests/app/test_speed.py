"""The machine's ceiling: what is counted and what is left alone. No timings."""

import time
from types import SimpleNamespace

import pytest
import torch

import pyro_vmem as pv
from pyro_vmem.app import speed as module
from pyro_vmem.app.speed import Speed, clock, keep_freed_memory, measure_speed
from pyro_vmem.parts import MLPDecoder


def mlp_vma(dim=5, latent_dim=2, num_features=5):
    network = MLPDecoder((dim,), latent_dim, num_features, hidden=(7,))
    return pv.VMA.for_vectors(dim, latent_dim, num_features, likelihood=pv.GaussianDecoder(network))


def clock_of(now):
    """Stands in for the module `time`, whichever of its clocks is read."""
    return SimpleNamespace(perf_counter=now, process_time=now)


@pytest.fixture
def ticks(monkeypatch):
    """A clock on which every run takes one second."""
    now = iter(range(10**6))
    monkeypatch.setattr(module, "time", clock_of(lambda: float(next(now))))


def test_operations_are_those_of_the_matrix_products() -> None:
    vma = mlp_vma()
    products = [m.weight.numel() for m in vma.likelihood.network.modules() if isinstance(m, torch.nn.Linear)]
    speed = measure_speed(vma, pv.Memory(torch.rand(3, 5)), [4], seconds=0, precision="float32")
    assert speed.flops_per_decode == 2 * sum(products) > 0
    assert measure_speed(vma, pv.Memory(torch.rand(3, 5)), [40], seconds=0).flops_per_decode == speed.flops_per_decode


def test_rates_are_counts_over_seconds_and_the_best_size_counts(ticks) -> None:
    speed = measure_speed(mlp_vma(), pv.Memory(torch.rand(3, 5)), [4, 9, 6], seconds=0)
    assert speed.decodes_per_second == 9
    assert speed.batch_size == 9
    assert speed.matmul_flops_per_second == 2 * 1024**3


def test_shares() -> None:
    speed = Speed(decodes_per_second=100.0, batch_size=8, flops_per_decode=30, matmul_flops_per_second=6e3)
    assert speed.flops_per_second == 3000
    assert speed.share_of_matmul == 0.5


def test_the_first_run_does_not_count(monkeypatch) -> None:
    times = iter([0.0, 0.0, 0.1, 1.0, 4.0, 4.0, 9.0, 10.0])  # the start, runs of 0.1, 3 and 5 seconds, the end
    monkeypatch.setattr(module, "time", clock_of(lambda: next(times)))
    assert module._fastest(lambda: None, torch.device("cpu"), 0.0) == 3.0


@pytest.mark.parametrize("per_datapoint", [False, True])
def test_changes_nothing(per_datapoint) -> None:
    vma = mlp_vma()
    memory = pv.Memory(torch.rand(2, 3, 5) if per_datapoint else torch.rand(3, 5), per_datapoint=per_datapoint)
    before, state = {name: p.clone() for name, p in vma.state_dict().items()}, torch.get_rng_state()
    measure_speed(vma, memory, [4], seconds=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], p) for name, p in vma.state_dict().items())


def test_bad_arguments() -> None:
    vma, memory = mlp_vma(), pv.Memory(torch.rand(3, 5))
    for sizes in ([], [4, 0]):
        with pytest.raises(ValueError, match="batch_sizes: expected numbers of at least 1"):
            measure_speed(vma, memory, sizes)
    with pytest.raises(ValueError, match="memory: its templates"):
        measure_speed(vma, pv.Memory(torch.rand(3, 4)))


class Library:
    """A C library whose `mallopt` accepts values up to a limit; without limit it has no such function."""

    def __init__(self, limit) -> None:
        self.options = {}
        if limit is not None:
            self.mallopt = lambda name, value: int(value <= limit and self.options.update({name: value}) is None)


@pytest.mark.parametrize(
    ("limit", "done", "options"),
    [
        (1 << 31, True, {-3: 1 << 30, -1: (1 << 31) - 1}),
        (1 << 25, False, {-3: 1 << 25}),
        (None, False, {}),
    ],
)
def test_freed_memory_is_kept_where_the_c_library_can(monkeypatch, limit, done, options) -> None:
    library = Library(limit)
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setattr(module.ctypes, "CDLL", lambda _: library)
    assert keep_freed_memory() is done
    assert library.options == options
    monkeypatch.setattr(module.sys, "platform", "darwin")
    assert not keep_freed_memory()


def test_one_thread_is_timed_by_what_it_worked(monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert clock(torch.device("cpu")) is time.process_time
    assert clock(torch.device("cuda")) is time.perf_counter
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert clock(torch.device("cpu")) is time.perf_counter
