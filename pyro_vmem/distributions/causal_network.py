"""The network of a causal likelihood, on the pixels before each pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_vmem._utils.checks import Few, Size

__all__ = ["CausalNetwork"]


class CausalNetwork(nn.Module):
    r"""Features :math:`u_i(x_{<i})` of the preceding pixels, and logits from them and the output of a decoder.

    The preceding pixels are the rows above and the pixels to the left, within `radius` in each direction. The features
    depend on the observation only, so they are computed once for all latents and addresses. Only the last layer depends
    on both:

    .. math:: \mathrm{logit}_i = d_i + W\, \mathrm{relu}(h_i + u_i(x_{<i})), \qquad (d, h) = \mathrm{decoder}(z, m_a)

    Arguments:
        channels: The channels of an image, independent given the preceding pixels.
        context: The number of features per pixel, and of the outputs :math:`h` of the decoder.
        hidden: The width of the hidden layers.
        radius: How far the network sees to the left, to the right and above, in pixels.

    Example:
        >>> network = CausalNetwork(channels=1, context=8)
        >>> past = network(torch.rand(5, 3, 1, 28, 28))
        >>> past.shape, network.logits(torch.rand(7, 5, 3, 9, 28, 28), past).shape
        (torch.Size([5, 3, 8, 28, 28]), torch.Size([7, 5, 3, 1, 28, 28]))
    """

    def __init__(self, channels: Size, context: Size = 8, hidden: Size = 64, radius: Few = 5) -> None:
        super().__init__()
        self.channels, self.context, self.radius = channels, context, radius
        self.window = (radius + 1, 2 * radius + 1)
        self.first = nn.Linear(channels * self.window[0] * self.window[1], hidden)
        self.second = nn.Linear(hidden, hidden)
        self.third = nn.Linear(hidden, context)
        self.out = nn.Linear(context, channels, bias=False)
        before = torch.ones(self.window, dtype=torch.bool)
        before[-1, radius:] = False  # the pixel itself and those after it in its row
        self.register_buffer("before", before.flatten().repeat(channels), persistent=False)
        self.out.weight.data.mul_(0.1)  # the decoder dominates at initialisation

    before: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """The features before every pixel: images `(*, C, H, W)` to `(*, context, H, W)`."""
        height, width = x.shape[-2:]
        columns = F.unfold(self.pad(x.reshape(-1, *x.shape[-3:])), self.window).mT  # (N, H W, C window)
        features = self.of_windows(columns).mT.unflatten(-1, (height, width))
        return features.reshape(*x.shape[:-3], *features.shape[1:])

    def pad(self, images: Tensor) -> Tensor:
        """Images `(*, C, H, W)` with blank margins, so every pixel has a full window."""
        return F.pad(images, (self.radius, self.radius, self.radius, 0))

    def of_windows(self, windows: Tensor) -> Tensor:
        """Features `(*, F)` of pixels, from their neighbourhoods `(*, C * window)`; only pixels before them count."""
        weight = self.first.weight * self.before
        hidden = F.relu(F.linear(windows, weight, self.first.bias))
        hidden = F.relu(hidden + self.second(hidden))
        past: Tensor = self.third(hidden)
        return past

    def logits(self, output: Tensor, past: Tensor) -> Tensor:
        """The logits of all pixels.

        Arguments:
            output: The output of the decoder, with shape `(*, C + context, H, W)`.
            past: The features, with shape `(*, context, H, W)`; leading shapes broadcast.

        Returns:
            Logits, with shape `(*, C, H, W)`.
        """
        own, context = output.split([self.channels, self.context], dim=-3)
        return own + self.out(F.relu(context + past).movedim(-3, -1)).movedim(-1, -3)
