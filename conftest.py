"""What every doctest starts from; the tests have more of it in their own conftest."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pytest

import pyro_vmem  # noqa: F401  # before its files are collected one by one, or some of them are imported twice


@pytest.fixture(autouse=True)
def _param_store() -> Iterator[None]:
    """An empty parameter store, whatever ran before."""
    with pyro.get_param_store().scope():
        yield
