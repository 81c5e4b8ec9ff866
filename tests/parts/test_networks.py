"""The networks: any image size, any leading dims, and what each is documented to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_vmem import VMA, Memory, Template
from pyro_vmem.parts import (
    ConvDecoder,
    ConvEncoder,
    Encoder,
    FlatEncoder,
    MLPDecoder,
    MLPEncoder,
    WarpDecoder,
    log_odds,
)
from pyro_vmem.parts.decoders import _blur, _weighed
from pyro_vmem.parts.layers import Doubling, Join, Residual, as_images, half_size, in_patches, mlp

SIZES = [(1, 28, 28), (1, 26, 26), (1, 7, 5), (1, 1, 1), (3, 8, 8), (3, 5, 9), (2, 1, 12), (1, 2, 3)]
LEADING = [(), (7,), (5, 7), (3, 1, 7)]
NUM_FEATURES, D, WIDTH = 6, 3, 4

ENCODERS: dict[str, Any] = {
    "FlatEncoder": lambda shape: FlatEncoder(shape),
    "MLPEncoder": lambda shape: MLPEncoder(shape, NUM_FEATURES, (8,)),
    "ConvEncoder": lambda shape: ConvEncoder(shape, NUM_FEATURES, WIDTH),
}
DECODERS: dict[str, Any] = {
    "MLPDecoder": lambda shape, **more: MLPDecoder(shape, D, NUM_FEATURES, (8,), **more),
    "ConvDecoder": lambda shape, **more: ConvDecoder(shape, D, NUM_FEATURES, (WIDTH, 2 * WIDTH), WIDTH, **more),
    "ConvDecoder-no-skips": lambda shape, **more: ConvDecoder(shape, D, NUM_FEATURES, None, WIDTH, **more),
    "WarpDecoder": lambda shape, **more: WarpDecoder(shape, D, NUM_FEATURES, (WIDTH, 2 * WIDTH), WIDTH, **more),
    "WarpDecoder-no-skips": lambda shape, **more: WarpDecoder(shape, D, NUM_FEATURES, None, WIDTH, **more),
}


def seen(shape: tuple[int, ...], *leading: int) -> Template:
    """Templates with features and maps, as the convolutional encoder makes them."""
    template: Template = ConvEncoder(shape, NUM_FEATURES, WIDTH)(torch.rand(*leading, *shape))
    return template


def sine(height: int, width: int) -> Tensor:
    y, x = torch.linspace(0, 3, height)[:, None], torch.linspace(0, 2, width)
    return (torch.sin(2 * y) * torch.cos(3 * x + y))[None]


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("shape", SIZES)
def test_encoders_take_any_image_size(name: str, shape: tuple[int, int, int]) -> None:
    encoder: Encoder = ENCODERS[name](shape)
    template = encoder(torch.rand(3, *shape))
    assert template.features.shape == (3, encoder.num_features)
    assert encoder.event_shape == shape
    half = half_size(shape[1:])
    sizes = [half, half_size(half)]
    expected = [(3, c, *size) for c, size in zip(encoder.map_channels, sizes, strict=False)]
    assert [tuple(m.shape) for m in template.maps] == expected


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("leading", LEADING)
def test_decoders_make_any_image_size(name: str, shape: tuple[int, int, int], leading: tuple[int, ...]) -> None:
    decoder = DECODERS[name](shape)
    out = decoder(torch.randn(*leading, D), seen(shape, *leading))
    assert out.shape == (*leading, *shape)
    assert torch.isfinite(out).all()
    assert decoder.event_shape == shape


@pytest.mark.parametrize("event_shape", [(8,), (2, 3), (4, 2, 2, 1)])
def test_perceptrons_take_any_event_shape(event_shape: tuple[int, ...]) -> None:
    template = MLPEncoder(event_shape, NUM_FEATURES, ())(torch.rand(5, 7, *event_shape))
    assert template.features.shape == (5, 7, NUM_FEATURES)
    assert torch.equal(FlatEncoder(event_shape)(template.raw).features, template.raw.reshape(5, 7, -1))
    assert MLPDecoder(event_shape, D, NUM_FEATURES, (4, 5))(torch.randn(7, D), template).shape == (5, 7, *event_shape)


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 8, 8)])
def test_images_do_not_depend_on_each_other(name: str, shape: tuple[int, int, int]) -> None:
    """Not through the order of memory either: images are folded channels last, and unfolded."""
    if name in ENCODERS:
        x, network = torch.rand(5, 7, *shape), ENCODERS[name](shape)
        together, alone = network(x), network(x[2, 3])
        torch.testing.assert_close(together.features[2, 3], alone.features)
        for ours, single in zip(together.maps, alone.maps, strict=True):
            torch.testing.assert_close(ours[2, 3], single)
    else:
        z, template, network = torch.randn(5, 7, D), seen(shape, 5, 7), DECODERS[name](shape)
        row = Template(template.raw[2, 3], template.features[2, 3], tuple(m[2, 3] for m in template.maps))
        torch.testing.assert_close(network(z, template)[2, 3], network(z[2, 3], row))


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 7, 5)])
def test_weights_are_contiguous_and_used(name: str, shape: tuple[int, int, int]) -> None:
    """Pyro's parameter store copies weights that are not contiguous, and would train the copies."""
    network = (ENCODERS | DECODERS)[name](shape)
    if name in ENCODERS:
        template = network(torch.rand(16, *shape))
        outputs = [template.features, *template.maps]
    else:
        template = seen(shape, 16)
        maps = tuple(torch.randn_like(m) for m in template.maps)  # an untrained encoder's may be zero
        outputs = [network(torch.randn(16, D), Template(template.raw, template.features, maps))]
    loss = torch.stack([(out * torch.randn_like(out)).sum() for out in outputs]).sum()
    if loss.requires_grad:
        loss.backward()
    # Behind a second convolution that starts at zero, the first of a residual block has nothing to learn yet.
    waiting = {id(p) for block in network.modules() if isinstance(block, Residual) for p in block.first.parameters()}
    for parameter_name, parameter in network.named_parameters():
        assert parameter.is_contiguous(), parameter_name
        assert parameter.grad is not None, parameter_name
        assert (parameter.grad.abs().sum() > 0) == (id(parameter) not in waiting), parameter_name


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 7, 5), (1, 1, 1)])
def test_outputs_start_around_their_level(name: str, shape: tuple[int, int, int]) -> None:
    z, template, outputs = torch.randn(4, D), seen(shape, 4), []
    for level in (0.5, -2.0):
        torch.manual_seed(0)
        outputs.append(DECODERS[name](shape, level=level)(z, template))
    torch.testing.assert_close(outputs[1], outputs[0] - 2.5)


def test_a_level_is_the_log_odds_of_a_mean() -> None:
    assert torch.tensor(log_odds(0.2)).sigmoid().item() == pytest.approx(0.2)
    for mean in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"mean: expected a number in \(0, 1\), got (0\.0|1\.0|nan)"):
            log_odds(mean)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_look_at_the_latent_and_at_the_template(name: str) -> None:
    decoder = DECODERS[name]((1, 7, 5))
    z, template = torch.randn(2, D), seen((1, 7, 5), 2)
    other = Template(template.raw.flip(0), template.features.flip(0), tuple(m.flip(0) for m in template.maps))
    out = decoder(z, template)
    assert not torch.allclose(out, decoder(z.flip(0), template))
    assert not torch.allclose(out, decoder(z, other))


# The warp


def warped(decoder: WarpDecoder, raw: Tensor) -> Tensor:
    """The template as the decoder sees it after the warp."""
    template = Template(raw, torch.zeros(len(raw), NUM_FEATURES))
    hidden = F.relu(decoder.coarse(torch.randn(len(raw), D), template, raw.shape[:1]))
    grid = decoder._grid(decoder.affine(hidden.mean((-2, -1))), decoder.field(hidden))
    return F.grid_sample(raw, grid, align_corners=False)


def warp_decoder(shape: tuple[int, int, int]) -> WarpDecoder:
    decoder = WarpDecoder(shape, D, NUM_FEATURES, None, WIDTH, level=0.0)
    for layer in (decoder.affine, decoder.field):
        torch.nn.init.zeros_(layer.weight)
    return decoder


@pytest.mark.parametrize("shape", SIZES)
def test_without_a_warp_the_template_is_not_moved(shape: tuple[int, int, int]) -> None:
    decoder, raw = warp_decoder(shape), torch.rand(4, *shape)
    torch.testing.assert_close(warped(decoder, raw), raw)


def test_without_a_warp_the_shown_template_is_the_template() -> None:
    shape = (3, 7, 5)
    decoder, raw, z = warp_decoder(shape), torch.rand(4, *shape), torch.randn(4, D)
    features = torch.zeros(4, NUM_FEATURES)
    torch.nn.init.zeros_(decoder.fine.out.weight)  # no drawing over it
    torch.nn.init.zeros_(decoder.show.weight)
    with torch.no_grad():
        for channel in range(3):
            decoder.show.weight[channel, channel] = 2.0
    torch.testing.assert_close(decoder(z, Template(raw, features)), 2 * raw)


@pytest.mark.parametrize(("dx", "dy"), [(1, 0), (0, 2), (-1, 1)])
def test_an_affine_shift_moves_the_template_by_pixels(dx: int, dy: int) -> None:
    shape = (1, 10, 8)
    decoder, raw = warp_decoder(shape), torch.rand(2, *shape)
    with torch.no_grad():
        decoder.affine.bias.copy_(torch.tensor([0, 0, 2 * dx / 8, 0, 0, 2 * dy / 10]))
    expected = raw.roll((-dy, -dx), (-2, -1))
    torch.testing.assert_close(warped(decoder, raw)[..., 2:-2, 1:-1], expected[..., 2:-2, 1:-1])


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 7, 5)])
def test_a_constant_field_moves_the_template_as_a_shift_does(shape: tuple[int, int, int]) -> None:
    by_affine, by_field = warp_decoder(shape), warp_decoder(shape)
    raw = sine(*shape[1:])[None]
    shift = torch.tensor([0.2, -0.1])
    with torch.no_grad():
        by_affine.affine.bias[[2, 5]] = shift
        by_field.field.bias.copy_(shift)
    torch.testing.assert_close(warped(by_field, raw), warped(by_affine, raw))
    assert not torch.allclose(warped(by_field, raw), raw)


def test_the_first_warp_is_small() -> None:
    decoder = WarpDecoder((1, 28, 28), D, NUM_FEATURES, None, WIDTH)
    raw = sine(28, 28)[None]
    inner = (..., slice(3, -3), slice(3, -3))
    assert (warped(decoder, raw) - raw)[inner].abs().mean() < 0.1 * raw.abs().mean()


# Layers


def test_residual_starts_as_the_identity_up_to_its_bias() -> None:
    block, x = Residual(3), torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(block(x) - x, block.second.bias[:, None, None].expand_as(x))


def test_join_is_one_linear_layer_on_both() -> None:
    join, first, second = Join(3, 4, 5), torch.randn(7, 1, 3), torch.randn(6, 4)
    weight = torch.cat([join.first.weight, join.second.weight], dim=1)
    both = torch.cat([first.expand(7, 6, 3), second.expand(7, 6, 4)], dim=-1)
    torch.testing.assert_close(join(first, second), F.linear(both, weight, join.first.bias))


def test_mlp_has_no_activation_at_the_end() -> None:
    network = mlp(4, 8, 3)
    assert [type(layer).__name__ for layer in network] == ["Linear", "ReLU", "Linear"]
    assert len(mlp(4, 3)) == 1


def test_as_images_folds_leading_dims_and_lays_channels_last() -> None:
    x = torch.rand(2, 3, 4, 5, 6)
    images = as_images(x)
    assert torch.equal(images, x.flatten(0, 1))
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_half_size_rounds_up() -> None:
    assert [half_size(size) for size in [(28, 28), (7, 5), (1, 1)]] == [(14, 14), (4, 3), (1, 1)]


def is_channels_last(x: Tensor) -> bool:
    """By its strides, where there is more than one channel and more than one pixel."""
    return x.stride(1) == 1 and x.shape[1] > 1


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 9, 6), (3, 8, 8)])
@pytest.mark.parametrize("decoder", ["warp", "conv"])
def test_every_convolution_gets_channels_last(shape: tuple[int, int, int], decoder: Any) -> None:
    # the other layout is several times slower, and nothing else would tell
    vma = VMA.for_images(shape, latent_dim=D, width=WIDTH, decoder=decoder)
    convolutions = [module for module in vma.modules() if isinstance(module, torch.nn.Conv2d)]
    seen_by: list[bool] = []
    for module in convolutions:
        module.register_forward_pre_hook(lambda _, inputs: seen_by.append(is_channels_last(inputs[0])))
    memory = vma.encode(Memory(torch.rand(5, *shape)))
    vma.likelihood(torch.randn(2, 3, D), memory.read(torch.zeros(2, 3, dtype=torch.long)))
    assert len(seen_by) >= len(convolutions) - 3  # `show` and two skips are linear layers of pixels
    assert all(seen_by)


def test_patches_are_those_of_pixel_unshuffle() -> None:
    images = torch.rand(2, 3, 5, 8)
    assert torch.equal(in_patches(images), F.pixel_unshuffle(F.pad(images, (0, 0, 0, 1)), 2))


def test_doubling_is_a_convolution_and_pixel_shuffle() -> None:
    double, images = Doubling(6, 3), as_images(torch.randn(2, 6, 5, 4))
    plain = F.pixel_shuffle(F.conv2d(images, double.weight, double.bias), 2)
    torch.testing.assert_close(double(images), plain)
    assert is_channels_last(double(images))


@pytest.mark.parametrize("shape", SIZES)
def test_the_grid_is_that_of_affine_grid_and_interpolation(shape: tuple[int, int, int]) -> None:
    decoder = DECODERS["WarpDecoder"](shape)
    affine, field = torch.randn(3, 6), torch.randn(3, 2, *half_size(half_size(shape[1:])))
    size = shape[1:]
    straight = F.affine_grid(torch.eye(2, 3) + affine.view(3, 2, 3), [3, 1, *size], align_corners=False)
    bent = F.interpolate(field, size=size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    torch.testing.assert_close(decoder._grid(affine, field), straight + bent)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(decoder._grid(affine, field), straight + bent)


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("shape", SIZES)
def test_blurs_are_average_pools(shape: tuple[int, int, int], size: int) -> None:
    images = torch.rand(2, *shape)
    torch.testing.assert_close(_blur(images, size), F.avg_pool2d(images, size, stride=1, padding=size // 2))


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 1), (3, 9), (9, 3)])
def test_weighed_channels_are_a_convolution(inputs: int, outputs: int) -> None:
    weight, images = torch.randn(outputs, inputs, 1, 1), torch.randn(5, inputs, 4, 6)
    torch.testing.assert_close(_weighed(weight, images), torch.nn.functional.conv2d(images, weight))
