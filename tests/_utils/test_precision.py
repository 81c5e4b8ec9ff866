"""Half precision: taken where the processor has it, and nowhere else by itself."""

import platform
from pathlib import Path

import pytest
import torch

from pyro_vmem._utils import precision
from pyro_vmem._utils.precision import autocast, has_bfloat16

CPU = torch.device("cpu")


@pytest.mark.parametrize("flags", [(), ("_is_avx512_bf16_supported",), ("_is_amx_tile_supported",)])
def test_auto_is_what_the_processors_flags_say(monkeypatch, flags):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in flags, raising=False)
    with autocast(CPU, "auto"):
        assert torch.is_autocast_enabled("cpu") is bool(flags)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="flags are read on Linux, x86"
)
def test_the_flags_are_those_of_this_processor():
    # torch's questions are not public: were they renamed, half precision would silently be given up
    known = Path("/proc/cpuinfo").read_text().split()
    assert has_bfloat16(CPU) is ("avx512_bf16" in known or "amx_tile" in known)


@pytest.mark.parametrize(("name", "enabled"), [("bfloat16", True), ("float32", False)])
def test_a_precision_that_is_named_is_taken_whatever_the_processor_has(monkeypatch, name, enabled):
    for has in (True, False):
        monkeypatch.setattr(precision, "has_bfloat16", lambda device, has=has: has)
        with autocast(CPU, name):
            assert torch.is_autocast_enabled("cpu") is enabled
