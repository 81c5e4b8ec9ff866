"""What the reference says of every public name: shapes, units, errors and source, held by reading code beside text."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from pyro.infer import ELBO

from pyro_vmem import AddressGuide, AddressPrior, LatentGuide, LatentPrior, Likelihood, Part, Templates
from pyro_vmem.parts import Decoder, Encoder

ROOT = Path(__file__).parent.parent.parent
SHAPE = re.compile(r"\(\S*[A-Z*]|\(\w+,|shape|scalar|as of|`\(\)`")
UNITS = re.compile(r"\bnats?\b|\bbits?\b")
IN_NATS = re.compile(r"elbo|evidence|information_gain|nll|loss|contribution|entropy", re.IGNORECASE)
KINDS = (AddressGuide, AddressPrior, LatentGuide, LatentPrior, Likelihood, Templates, Encoder, Decoder)
# Nobody's idea in particular.
NO_SOURCE = {
    *("UniformPrior", "StandardPrior", "GaussianGuide", "BernoulliDecoder", "GaussianDecoder", "UniformGuide"),
    *("FlatEncoder", "MLPEncoder", "MLPDecoder", "ConvEncoder", "ConvDecoder", "TruncatedGuide", "EnumGuard"),
    *("SoftAttentionDecoder", "SoftAttentionGuide"),  # the source stands at SoftAttentionVAE
}


def in_reference() -> dict[str, Any]:
    """The classes and functions of the reference, by the name that they have there."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {full: value for page in module.public_names().values() for full, value in page.items()}
    return {full: value for full, value in found.items() if inspect.isclass(value) or inspect.isfunction(value)}


REFERENCE = in_reference()


def functions() -> Iterator[tuple[str, FunctionType, str]]:
    """Each function and method in the reference, with the text that is to describe it; for `__init__`, the class's."""
    for full, value in REFERENCE.items():
        if inspect.isfunction(value):
            yield full, value, inspect.getdoc(value) or ""
            continue
        for name, member in vars(value).items():
            member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if inspect.isfunction(member) and (
                not name.startswith("_") or (name == "__init__" and "Protocol" not in str(value.__bases__))
            ):
                bound = getattr(value, name)
                text = value.__doc__ if name == "__init__" else inspect.getdoc(bound) or inspect.getdoc(member)
                yield f"{full}.{name}", member, text or ""


FUNCTIONS = list(functions())


def raised(function: FunctionType) -> set[str]:
    """The errors that a function's own lines raise."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except OSError:  # a dataclass's
        return set()
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    return {name for name in names if name[0].isupper() and name != "NotImplementedError"}


def tensors(function: FunctionType) -> list[str]:
    """The arguments that are tensors or arrays, and `return` where the result is."""
    signature = inspect.signature(function)
    annotations = {p.name: str(p.annotation) for p in signature.parameters.values()}
    annotations["return"] = str(signature.return_annotation)
    plain = {name: re.sub(r"Callable\[.*", "", annotation) for name, annotation in annotations.items()}
    return [name for name, annotation in plain.items() if re.search(r"\bTensor\b|\bNDArray\b", annotation)]


def test_there_is_something_to_read() -> None:
    assert len(REFERENCE) > 150
    assert sum(bool(raised(function)) for _, function, _ in FUNCTIONS) > 60
    assert sum(bool(tensors(function)) for _, function, _ in FUNCTIONS) > 60


def test_errors_are_named() -> None:
    silent = [
        (name, error)
        for name, function, text in FUNCTIONS
        for error in raised(function)
        if error not in text and "as of" not in text
    ]
    assert silent == []


def test_tensors_have_shapes() -> None:
    # `forward` has those of its base class, `__init__` of a dataclass those of its attributes.
    without = [
        (name, found)
        for name, function, text in FUNCTIONS
        if (found := tensors(function)) and not name.endswith(".forward") and not SHAPE.search(text)
    ]
    assert without == []


def test_what_is_in_nats_says_so() -> None:
    names = [(name, text) for name, _, text in FUNCTIONS if IN_NATS.search(name.rpartition(".")[2])]
    assert len(names) > 10
    assert [name for name, text in names if not UNITS.search(text)] == []


def test_parts_and_objectives_have_a_source() -> None:
    without = {
        value.__name__
        for value in REFERENCE.values()
        if inspect.isclass(value) and issubclass(value, (*KINDS, ELBO)) and not inspect.isabstract(value)
        if not re.search(r"References:|\(.+, (?:19|20)\d\d\)", value.__doc__ or "")
    }
    assert without == NO_SOURCE & {value.__name__ for value in REFERENCE.values()}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_page_of_parts_has_each_with_its_reason(kind: type[Part]) -> None:
    """A line of a table; or of the text, for what is beside the point there."""
    page = (ROOT / "docs" / "parts.md").read_text()
    parts = {
        value.__name__
        for value in REFERENCE.values()
        if inspect.isclass(value) and issubclass(value, kind) and not inspect.isabstract(value)
    }
    assert parts
    for name in parts:
        lines = [line for line in page.splitlines() if re.search(rf"\.{name}`", line)]
        assert lines, f"{name} is not in docs/parts.md"
        # Of a table's line, both what it is and when to take it.
        for line in lines:
            assert not line.startswith("|") or all(len(cell.strip()) > 5 for cell in line.strip("|").split("|")), name
