"""Threads of one process: what measures takes turns, a second training run is refused, and no number is wrong."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyro
import pytest
import torch
from small_run import equal, sampler, small_vma, weights

import pyro_vmem as pv
from pyro_vmem._utils.one_thread import one_thread

THREADS = 4
VMA = small_vma()
MEMORY, X = sampler()[0].memory, sampler()[0].x

# Each draws random numbers, from a seed of its own.
MEASURED: dict[str, Callable[[], Any]] = {
    "evaluate": lambda: pv.diagnostics.evaluate(VMA, sampler(), 1, 2, progress=False).summary()["nll"],
    "validate": lambda: pv.validate(VMA, sampler(), num_episodes=1)["bound"],
    "diagnose": lambda: pv.diagnostics.diagnose(VMA, MEMORY, X, seed=0).log_evidence.values.tolist(),
    "estimate_evidence": lambda: pv.diagnostics.estimate_evidence(VMA, MEMORY, X, 20, seed=0, warn=False).log_evidence,
}


def same(one: Any, two: Any) -> bool:
    return torch.equal(torch.as_tensor(one), torch.as_tensor(two))


def in_threads(work: Callable[[], Any], times: int) -> list[Any]:
    with ThreadPoolExecutor(THREADS) as pool:
        return [done.result() for done in [pool.submit(work) for _ in range(times)]]


@pytest.mark.parametrize("name", MEASURED)
def test_what_is_measured_in_threads_is_what_is_measured_alone(name: str) -> None:
    alone, state = MEASURED[name](), torch.get_rng_state()
    assert all(same(found, alone) for found in in_threads(MEASURED[name], 12))
    assert torch.equal(torch.get_rng_state(), state)


def test_all_at_once_too() -> None:
    alone = {name: work() for name, work in MEASURED.items()}
    with ThreadPoolExecutor(THREADS) as pool:
        found = [(name, pool.submit(work)) for _ in range(3) for name, work in MEASURED.items()]
    assert all(same(done.result(), alone[name]) for name, done in found)


def test_two_runs_in_threads_are_right_or_refused() -> None:
    alone = small_vma()
    pv.fit(alone, sampler(), steps=4, progress=False)
    right = refused = 0
    for _ in range(6):
        barrier = threading.Barrier(2)

        def train(vma: pv.VMA, barrier: threading.Barrier = barrier) -> bool | RuntimeError:
            barrier.wait()
            try:
                pv.fit(vma, sampler(), steps=4, progress=False)
            except RuntimeError as error:
                return error
            return equal(weights(vma), weights(alone))

        with ThreadPoolExecutor(2) as pool:
            outcomes = list(pool.map(train, [small_vma(), small_vma()]))
        for outcome in outcomes:
            if isinstance(outcome, RuntimeError):
                assert str(outcome).startswith("threads: another thread of this process is training.")
                refused += 1
            else:
                assert outcome is True
                right += 1
    assert right >= 6  # one of each two at least
    assert right + refused == 12
    assert list(pyro.get_param_store().keys()) == []
    assert pyro.poutine.runtime._PYRO_STACK == []
    again = small_vma()
    pv.fit(again, sampler(), steps=4, progress=False)
    assert equal(weights(again), weights(alone))


def test_a_thread_that_measures_while_another_trains_is_told_so() -> None:
    """From within a run it may be done: its callbacks measure in the thread that trains."""
    found: list[Any] = []

    class Asks(pv.train.Callback):
        def after_step(self, trainer: pv.Trainer, episode: pv.data.Episode) -> None:
            found.append(MEASURED["validate"]())
            with ThreadPoolExecutor(1) as pool:
                found.append(pool.submit(MEASURED["validate"]).exception())

    alone, asked = small_vma(), small_vma()
    pv.fit(alone, sampler(), steps=1, progress=False)
    pv.fit(asked, sampler(), steps=1, callbacks=[Asks()], progress=False)
    assert found[0] == MEASURED["validate"]()
    assert isinstance(found[1], RuntimeError)
    assert str(found[1]).endswith("Wait until that run is over, or start a process for each.")
    assert equal(weights(alone), weights(asked))


def test_a_process_that_is_forked_meanwhile_waits_for_nobody() -> None:
    inside, over = threading.Event(), threading.Event()

    def hold() -> None:
        with one_thread(trains=True):
            inside.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        with one_thread(trains=True):
            os._exit(7)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    finally:
        over.set()
        thread.join()
