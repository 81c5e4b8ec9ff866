"""Networks compiled for training steps: what changes, which is nothing that is kept."""

import pytest
import torch
from small_run import equal, sampler, small_vma, weights

import pyro_vmem as pv
from pyro_vmem.train.compiling import Compiled, check_compiler


@pytest.fixture
def compilations(monkeypatch):
    """Stands in for the compiler, and counts the calls of what it made."""
    calls = []

    def stand_in(function):
        def compiled(*args):
            calls.append(type(function.__self__).__name__)
            return function(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", stand_in)
    return calls


def test_a_run_is_the_same_and_goes_through_what_was_compiled(compilations, tmp_path):
    plain, compiled = small_vma(), small_vma()
    pv.fit(plain, sampler(), steps=3, progress=False)
    assert compilations == []
    pv.fit(compiled, sampler(), steps=3, progress=False, compile=True, out=tmp_path, validation=sampler(seed=1))
    assert equal(weights(plain), weights(compiled))
    # memory and targets are encoded, and there is one decode for all particles; validation and what follows are plain
    assert compilations == 3 * ["ConvEncoder", "ConvEncoder", "WarpDecoder"]
    pv.load(tmp_path).encode_x(torch.rand(2, *plain.event_shape))
    compiled.encode_x(torch.rand(2, *plain.event_shape))
    assert len(compilations) == 9
    assert compiled.spec() == plain.spec()


def test_an_error_within_leaves_the_networks_as_they_were(compilations):
    vma = small_vma()
    with pytest.raises(ValueError, match="x: "), Compiled(vma):
        vma.check(pv.Memory(torch.rand(2, *vma.event_shape)), vma.encode_x(torch.rand(1, *vma.event_shape)).features)
    assert compilations == ["ConvEncoder"]
    vma.encode_x(torch.rand(2, *vma.event_shape))
    assert compilations == ["ConvEncoder"]


def test_without_a_compiler_the_error_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"compile: .*'no-such-compiler'.*compile=False"):
        check_compiler()
    with pytest.raises(ValueError, match="compile: "):
        pv.fit(small_vma(), sampler(), steps=1, progress=False, compile=True)
    pv.fit(small_vma(), sampler(), steps=1, progress=False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_encoder_and_decoder_are_one_graph_each(precision):
    # traced as for the compiler, by which whatever Python cannot be compiled is found, and run without it
    vma = small_vma()
    images, slots = torch.rand(5, *vma.event_shape), torch.tensor([[0, 4, 3], [1, 1, 2]])
    encode, decode = (
        torch.compile(module, fullgraph=True, backend="eager")
        for module in (vma.template_encoder, vma.likelihood.network)
    )
    with pv.precision.autocast(images.device, precision), torch.no_grad():
        template = pv.EncodedMemory(pv.Memory(images), encode(images)).read(slots)
        z = torch.randn(2, 3, vma.latent_dim)
        torch.testing.assert_close(template.features, vma.encode(pv.Memory(images)).read(slots).features)
        torch.testing.assert_close(decode(z, template), vma.likelihood.network(z, template))
