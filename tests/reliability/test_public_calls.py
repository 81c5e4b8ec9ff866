"""Each public function with one argument replaced by something wrong: an error that names an argument, or none.

The calls come from the examples in the docstrings, so a new function is tried without a line here.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import re
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import pyro
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from public_calls import Call, entries, recorded
from torch import Tensor, nn

# A training step makes these in numbers, so their arguments are not looked at.
UNCHECKED = {"pyro_vmem.Template", "pyro_vmem.EncodedMemory", "pyro_vmem.over_slots", "pyro_vmem.memory.Hits"}
# A valid call, or the example that leads to it, takes seconds; bad_input.py has cases of most of these.
LONG = {
    "pyro_vmem.fit",
    "pyro_vmem.build",
    "pyro_vmem.load",
    "pyro_vmem.Trainer",
    "pyro_vmem.validate",
    "pyro_vmem.data.glyphs",
    "pyro_vmem.diagnostics.evaluate",
    "pyro_vmem.diagnostics.to_arviz",
}

# Not yet mended: their arguments are of classes that only type checkers import, or of none.
OPEN = {name for name in entries() if name.startswith("pyro_vmem.plots.")} | {
    "pyro_vmem.infer.check_objective",
    "pyro_vmem.infer.choose",
    "pyro_vmem.train.save_checkpoint",
}


class Late(BaseException):
    """A call that does not end."""


def ring(*_: Any) -> None:
    raise Late


def wrong(value: Any, optional: bool) -> dict[str, Any]:
    """What a value is replaced by, by name."""
    found: dict[str, Any] = {"an object": object(), "an empty dict": {}}
    if not optional and value is not None:
        found["None"] = None
    if isinstance(value, Tensor):
        found |= {"a meta tensor": value.to("meta"), "a sparse tensor": value.detach().to_sparse(), "a text": "none"}
    elif isinstance(value, int | float) and not isinstance(value, bool):
        found |= {"2.5": 2.5, "-1": -1, "10**12": 10**12, "NaN": math.nan, "a text": "none"}
    elif isinstance(value, nn.Module):
        found["its class"] = type(value)
    return found


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """A folder and a parameter store of its own, and at most so many seconds."""
    before = signal.signal(signal.SIGALRM, ring)
    with (
        pyro.get_param_store().scope(),
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        signal.alarm(20)
        try:
            yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)


def problem(call: Call, name: str, value: Any) -> str:
    """What is wrong with how a call goes; nothing if all is well."""
    modules = [argument for argument in call.arguments.values() if isinstance(argument, nn.Module)]
    before = [tensor.clone() for module in modules for tensor in module.state_dict().values()]
    try:
        with apart():
            call(**{name: value})
    except Late:
        return "did not end"
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        names = "|".join(map(re.escape, inspect.signature(call.function).parameters))
        if not re.search(rf"\b({names})\b", str(error)):
            return f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    after = [tensor for module in modules for tensor in module.state_dict().values()]
    return "" if all(torch.equal(one, two) for one, two in zip(before, after, strict=True)) else "changed a model"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(entries().keys() - UNCHECKED - LONG - OPEN))
def test_a_wrong_argument_is_named(name: str) -> None:
    call = recorded(name)
    if call is None:
        pytest.skip("no example calls it")
    parameters = inspect.signature(call.function).parameters
    cases = [
        (argument, what, value)
        for argument, valid in call.arguments.items()
        if parameters[argument].kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        for what, value in wrong(valid, parameters[argument].default is None).items()
    ]
    if not cases:
        pytest.skip("it takes no arguments")

    @settings(max_examples=12, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(cases))
    def one(case: tuple[str, str, Any]) -> None:
        argument, what, value = case
        assert problem(call, argument, value) == "", f"{argument} was {what}"

    one()


def test_an_error_that_names_nothing_is_noticed() -> None:
    def root(area: Any) -> float:
        return math.sqrt(area)

    assert problem(Call(root, {"area": 4.0}), "area", "none").startswith("TypeError: must be real")
