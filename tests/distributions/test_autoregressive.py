"""Causal pixels against sums over all images of a few pixels."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import pyro_vmem as pv
from pyro_vmem.distributions import CausalBernoulli, CausalNetwork
from pyro_vmem.parts import ConvDecoder, WarpDecoder

HEIGHT, WIDTH, CONTEXT = 3, 3, 4
DRAWS = 20_000


def network(channels: int = 1) -> CausalNetwork:
    """A network whose pixels depend on each other."""
    made = CausalNetwork(channels, CONTEXT, hidden=8, radius=2)
    for parameter in made.parameters():
        parameter.data.normal_()
    return made


def all_images(channels: int = 1) -> Tensor:
    pixels = itertools.product([0.0, 1.0], repeat=channels * HEIGHT * WIDTH)
    return torch.tensor(list(pixels)).view(-1, channels, HEIGHT, WIDTH)


@pytest.fixture
def causal(float64: None) -> CausalBernoulli:
    return CausalBernoulli(torch.randn(1 + CONTEXT, HEIGHT, WIDTH), network())


def test_probabilities_of_all_images_sum_to_one(causal: CausalBernoulli) -> None:
    torch.testing.assert_close(causal.log_prob(all_images()).exp().sum(), torch.tensor(1.0))


def test_probabilities_of_two_channels_sum_to_one(float64: None) -> None:
    images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=8))).view(-1, 2, 2, 2)
    p = CausalBernoulli(torch.randn(2 + CONTEXT, 2, 2), network(channels=2))
    torch.testing.assert_close(p.log_prob(images).exp().sum(), torch.tensor(1.0))


@pytest.mark.parametrize("radius", [1, 2, 5])
def test_a_pixel_depends_on_all_pixels_before_it_in_its_window_and_on_no_other(radius: int, float64: None) -> None:
    made = CausalNetwork(1, CONTEXT, hidden=64, radius=radius)
    x = torch.rand(1, 6, 7, requires_grad=True)
    past = made(x)
    for row, column in itertools.product(range(6), range(7)):
        (gradient,) = torch.autograd.grad(past[:, row, column].square().sum(), x, retain_graph=True)
        rows, columns = torch.meshgrid(torch.arange(6), torch.arange(7), indexing="ij")
        near = (rows >= row - radius) & ((columns - column).abs() <= radius)
        before = (rows < row) | ((rows == row) & (columns < column))
        assert torch.equal(gradient[0] != 0, near & before)


def test_draws_have_the_probabilities_of_the_density(causal: CausalBernoulli) -> None:
    torch.manual_seed(0)
    images = all_images()
    powers = 2 ** torch.arange(HEIGHT * WIDTH).flip(0)
    counts = (causal.sample(torch.Size([DRAWS])).flatten(1).long() @ powers).bincount(minlength=len(images))
    expected = DRAWS * causal.log_prob(images).exp().detach()
    often = expected > 5
    chi_squared = ((counts - expected).square() / expected)[often].sum()
    degrees = float(often.sum())
    assert abs(chi_squared - degrees) < 5 * (2 * degrees) ** 0.5


def test_probabilities_given_a_draw_are_right_on_average(causal: CausalBernoulli) -> None:
    torch.manual_seed(0)
    images = all_images()
    exact = (images * causal.log_prob(images).exp()[:, None, None, None]).sum(0)
    means = causal.probs_given_draw((2000,))
    error = means.std(0) / 2000**0.5
    # What happens less often than once in 2000 draws does not show in the error.
    assert bool(((means.mean(0) - exact).abs() < 5 * error + 3 / 2000).all())


def test_what_is_filled_in_is_weighted_by_the_probability_of_what_is_known(causal: CausalBernoulli) -> None:
    torch.manual_seed(0)
    x, known = torch.zeros(1, HEIGHT, WIDTH), torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
    known[0, 1], known[0, 2, 2], x[0, 1, 1], x[0, 2, 2] = True, True, 1.0, 1.0
    images = all_images()
    agree = ((images == x) | ~known).flatten(1).all(1)
    probability = causal.log_prob(images).exp() * agree
    filled, log_weight = causal.fill(x.expand(DRAWS, 1, HEIGHT, WIDTH), known)
    assert bool((torch.where(known, filled, x) == x).all())
    weight = log_weight.exp()
    assert abs(weight.mean() - probability.sum()) < 5 * weight.std() / DRAWS**0.5
    # weighted, the images filled in are of the posterior
    posterior = (images * probability[:, None, None, None]).sum(0)
    values = filled * weight[:, None, None, None]
    assert bool(((values.mean(0) - posterior).abs() < 5 * values.std(0) / DRAWS**0.5 + 1e-9).all())


def test_leading_shapes_broadcast(float64: None) -> None:
    p, x = CausalBernoulli(torch.randn(5, 3, 1 + CONTEXT, HEIGHT, WIDTH), network()), all_images()[[3, 77, 300]]
    each = [
        [CausalBernoulli(o, p.network).log_prob(image) for o, image in zip(row, x, strict=True)] for row in p.output
    ]
    torch.testing.assert_close(p.log_prob(x), torch.stack([torch.stack(row) for row in each]))
    assert p.expand(torch.Size([2, 5, 3])).log_prob(x).shape == (2, 5, 3)
    assert p.sample(torch.Size([4])).shape == (4, 5, 3, 1, HEIGHT, WIDTH)


def test_values_that_are_not_binary_are_refused() -> None:
    p = CausalBernoulli(torch.zeros(1 + CONTEXT, HEIGHT, WIDTH), network(), validate_args=True)
    with pytest.raises(ValueError, match="support"):
        p.log_prob(torch.full((1, HEIGHT, WIDTH), 0.5))


def test_it_starts_near_what_the_decoder_alone_says() -> None:
    torch.manual_seed(0)
    decoder = ConvDecoder((1, 6, 5), 3, 6, (2, 4), width=2, out_channels=9, level=pv.parts.log_odds(0.2))
    template = pv.parts.ConvEncoder((1, 6, 5), 6, 2)(torch.rand(1, 6, 5))
    p = pv.CausalBernoulliDecoder(decoder)(torch.randn(40, 3), template)
    assert decoder.event_shape == (9, 6, 5)
    assert abs(p.output[:, 0].sigmoid().mean() - 0.2) < 0.1
    assert abs(p.output[:, 1:].mean()) < 0.5  # no image, so not moved to the log-odds of ink
    assert bool(((p.probs(torch.zeros(1, 6, 5))[:, 0] - p.output[:, 0].sigmoid()).abs() < 0.1).all())


def test_a_model_with_causal_pixels_completes_what_it_is_shown() -> None:
    torch.manual_seed(0)
    vma = pv.VMA.for_images((1, 12, 10), latent_dim=4, width=4, pixels="causal")
    memory, x = pv.Memory((torch.rand(3, 1, 12, 10) < 0.2).float()), (torch.rand(2, 1, 12, 10) < 0.2).float()
    mask = torch.zeros(12, 10, dtype=torch.bool)
    mask[:6] = True
    for mean in (False, True):
        filled = vma.complete(memory, x, mask, num_particles=3, rounds=2, mean=mean)
        assert torch.equal(filled[..., :6, :], x[..., :6, :])
        assert bool(((filled == 0) | (filled == 1)).all()) != mean
    assert vma.generate(memory, 2, mean=True).shape == (2, 1, 12, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 0}, r"context: expected a whole number in \[1, 1,048,576\], got 0"),
        ({"radius": 0}, r"radius: expected a whole number in \[1, 1000\], got 0"),
        ({"hidden": -1}, r"hidden: expected a whole number in \[1, 1,048,576\], got \-1"),
        (
            {"context": 9},
            r"network: expected images with more than context=9 channels, got outputs of shape \(9, 6, 5\)",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, float], message: str) -> None:
    decoder = WarpDecoder((1, 6, 5), 3, 6, (2, 4), width=2, out_channels=9)
    with pytest.raises(ValueError, match=message):
        pv.CausalBernoulliDecoder(decoder, **arguments)  # type: ignore[arg-type]
