"""What every test and doctest starts from; the tests have more of it in their own conftest."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pyro
import pytest

import pyro_vmem  # noqa: F401  # before its files are collected one by one, or some of them are imported twice


@pytest.fixture(autouse=True)
def _param_store() -> Iterator[None]:
    """An empty parameter store, whatever ran before."""
    with pyro.get_param_store().scope():
        yield


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Each test has its own seed, so that none depends on the others that run."""
    pyro.set_rng_seed(zlib.crc32(request.node.nodeid.encode()))
