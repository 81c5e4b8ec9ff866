"""Each public function or method with one argument replaced by something wrong: an error names an argument, or none.

The calls come from the examples in the docstrings, so a new function is tried without a line here.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import os
import re
import signal
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pyro
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from public_calls import Call, call_of, entries, methods
from pyro.infer import ELBO
from torch import Tensor, nn

import pyro_vmem as pv

EXAMPLES = int(os.environ.get("PYRO_VMEM_FUZZ", "4"))  # per entry
SECONDS = 20  # of processor time, after which a call counts as one without end


class Late(BaseException):
    """A call that does not end."""


class Trains(BaseException):
    """A call that was accepted, and would now train."""


def ring(*_: Any) -> None:
    raise Late


def wrong(value: Any, optional: bool) -> dict[str, Any]:
    """What a value is replaced by, by name."""
    found: dict[str, Any] = {
        "an object": object(),
        "an empty dict": {},
        "a list of objects": [object()],
        "a text": "none",
    }
    found |= {} if optional or value is None else {"None": None}
    if isinstance(value, Tensor):
        found |= {"a meta tensor": value.to("meta"), "a sparse tensor": value.detach().to_sparse()}
        found |= {"another dtype": value.long() if value.is_floating_point() else value.float(), "complex": value + 1j}
        found |= {"a number": 1.5, "a scalar": value.new_zeros(()), "one more dim": value[None]}
        found |= {"no rows": value[:0], "rows left out": value[1:]} if value.dim() else {}
        found |= {"NaN": torch.full(value.shape, math.nan)} if value.dim() else {}
    elif isinstance(value, int | float) and not isinstance(value, bool):
        found |= {"2.5": 2.5, "-1": -1, "0": 0, "10**12": 10**12, "NaN": math.nan, "infinity": math.inf}
    elif isinstance(value, list | tuple):
        found |= {"nothing": (), "negative": (-1,)}
    elif isinstance(value, nn.Module | pv.Memory | ELBO):
        found["its class"] = type(value)
    return found


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """A folder and a parameter store of its own, no training, and at most so many seconds."""
    before = signal.signal(signal.SIGPROF, ring)
    with (
        mock.patch.object(pv.Trainer, "step", side_effect=Trains),
        pyro.get_param_store().scope(),
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            yield
        except Trains:
            pass
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)


def problem(call: Call, name: str, value: Any) -> str:
    """What is wrong with how a call goes; nothing if all is well."""
    modules = [argument for argument in call.arguments.values() if isinstance(argument, nn.Module)]
    before = [tensor.clone() for module in modules for tensor in module.state_dict().values()]
    try:
        with apart():
            call(**{name: value})
    except Late:
        return "did not end"
    except Exception as error:
        names = "|".join(map(re.escape, inspect.signature(call.function).parameters))
        names += "|out" * ("state" in call.arguments)  # of a run, whose states are in checkpoints
        if not re.match(rf"(Expected parameter )?({names})\b", str(error)):  # as torch's distributions say it
            return f"{type(error).__name__}: {error}"
    after = [tensor for module in modules for tensor in module.state_dict().values()]
    return "" if all(torch.equal(one, two) for one, two in zip(before, after, strict=True)) else "changed a model"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(entries() | methods()))
def test_a_wrong_argument_is_named(name: str) -> None:
    call = call_of(name)
    if call.arguments.get("self", call) is None:
        pytest.skip("only the library makes what it is a method of")
    parameters = inspect.signature(call.function).parameters
    cases = [
        (argument, what, value)
        for argument, valid in call.arguments.items()
        if argument != "self"
        if parameters[argument].kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        for what, value in wrong(valid, parameters[argument].default is None).items()
    ]
    if not cases:
        pytest.skip("it takes no arguments")

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.sampled_from(cases))
    def one(case: tuple[str, str, Any]) -> None:
        argument, what, value = case
        assert problem(call, argument, value) == "", f"{argument} was {what}"

    one()


def test_an_error_that_names_nothing_is_noticed() -> None:
    def root(area: Any) -> float:
        return math.sqrt(area)

    assert problem(Call(root, {"area": 4.0}), "area", "none").startswith("TypeError: must be real")
