"""Baselines of the VMA: no memory, soft attention over the memory, and statistics of the whole memory."""

from __future__ import annotations

from typing import Any, Self

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vmem._utils.checks import Size
from pyro_vmem._utils.precision import full_precision, no_autocast
from pyro_vmem.memory import EncodedMemory, Memory, Template
from pyro_vmem.model.vma import VMA
from pyro_vmem.parts import (
    AddressGuide,
    Decoder,
    Encoder,
    LatentGuide,
    LatentPrior,
    Likelihood,
    SimilarityGuide,
    StandardPrior,
    UniformPrior,
    over_slots,
)

__all__ = [
    "NoMemoryVAE",
    "SetStatisticsVAE",
    "SoftAttentionDecoder",
    "SoftAttentionGuide",
    "SoftAttentionVAE",
    "UniformGuide",
]


class UniformGuide(AddressGuide):
    r"""The uniform guide :math:`q(a | M, x) = 1/S`. With a uniform prior :math:`KL(a)` is zero.

    Example:
        >>> memory = Memory(torch.rand(4, 8))
        >>> UniformGuide()(EncodedMemory(memory, Template(memory.templates, torch.rand(4, 16))),
        ...     Template(torch.rand(3, 8), torch.rand(3, 16))).probs.shape
        torch.Size([3, 4])
    """

    def forward(self, memory: EncodedMemory, x: Template) -> dist.Categorical:
        return over_slots(memory.templates.new_zeros(*x.leading_shape, memory.num_slots), memory)


class _Baseline(VMA):
    """A model with the networks of a VMA. Its addresses are uniform in model and guide, and never read."""

    def __init__(
        self,
        latent_prior: LatentPrior,
        likelihood: Likelihood,
        latent_guide: LatentGuide,
        template_encoder: Encoder | None = None,
        x_encoder: Encoder | None = None,
        name: str = "vma",
    ) -> None:
        super().__init__(
            UniformPrior(), latent_prior, likelihood, UniformGuide(), latent_guide, template_encoder, x_encoder, name
        )

    @classmethod
    def like(cls, vma: VMA) -> Self:
        """The baseline with the networks of a VMA, weights included.

        Arguments:
            vma: An untrained model. The baseline shares its networks.
        """
        return cls(StandardPrior(vma.latent_dim), vma.likelihood, vma.latent_guide, vma.template_encoder, vma.x_encoder)

    @classmethod
    def for_images(cls, *args: Any, **kwargs: Any) -> Self:
        """As :meth:`VMA.for_images`."""
        return cls.like(VMA.for_images(*args, **kwargs))

    @classmethod
    def for_vectors(cls, *args: Any, **kwargs: Any) -> Self:
        """As :meth:`VMA.for_vectors`."""
        return cls.like(VMA.for_vectors(*args, **kwargs))


class NoMemoryVAE(_Baseline):
    r"""A variational autoencoder: a VMA whose memory is ignored.

    Generative process::

        z ~ N(0, I)
        x ~ p(x | z, t)      # t: one learned template instead of the memory

    The networks are those of a VMA. The site `"a"` exists but has no effect, so every function for a VMA works here.
    The evidence does not depend on the memory, and :math:`KL(a)` is zero.

    The arguments are those of :class:`VMA`, without the parts of the address.

    Example:
        >>> vae = NoMemoryVAE.for_images((1, 12, 10), latent_dim=4)
        >>> vae.generate(Memory(torch.rand(3, 1, 12, 10)), 2).shape
        torch.Size([2, 1, 12, 10])
    """

    def _add_networks(self) -> None:
        self.template = nn.Parameter(torch.zeros(self.event_shape))

    def _encode(self, memory: Memory, reads: int | None) -> EncodedMemory:
        # As a memory of one slot, `(1, *)` or `(B, 1, *)`, without a copy.
        shared = self.template_encoder(self.template).map(lambda t: t.expand(*memory.batch_shape, 1, *t.shape))
        return _OneTemplate(memory, shared)


class SetStatisticsVAE(_Baseline):
    r"""A memory summarised by statistics of all its templates, without addresses.

    Generative process::

        s = rho( mean_a phi(h(m_a)) )    # pooled features; and the mean template, for a decoder that warps it
        z ~ p(z | s)
        x ~ p(x | z, s)

    The guide is :math:`q(z | x, s)`. Unlike in the neural statistician, the context has no latent. The networks are
    those of a VMA, with :math:`\phi` and :math:`\rho` added. The site `"a"` exists but has no effect, so every function
    for a VMA works here, and :math:`KL(a)` is zero.

    References:
        | Towards a Neural Statistician (Edwards, Storkey, 2017), section 3, on the statistic network
        | https://arxiv.org/abs/1606.02185
        | Deep Sets (Zaheer et al., 2017) https://arxiv.org/abs/1703.06114

    The arguments are those of :class:`VMA`, without the parts of the address. The parts read the statistics instead of
    a template.

    Example:
        >>> model = SetStatisticsVAE.for_images((1, 12, 10), latent_dim=4)
        >>> model.generate(Memory(torch.rand(3, 1, 12, 10)), 2).shape
        torch.Size([2, 1, 12, 10])
    """

    def _add_networks(self) -> None:
        num_features = self.template_encoder.num_features
        self.phi = nn.Sequential(nn.Linear(num_features, num_features), nn.ReLU())
        self.rho = nn.Linear(num_features, num_features)

    @classmethod
    def like(cls, vma: VMA) -> Self:
        return cls(vma.latent_prior, vma.likelihood, vma.latent_guide, vma.template_encoder, vma.x_encoder)

    def _encode(self, memory: Memory, reads: int | None) -> EncodedMemory:
        each: Template = self.template_encoder(memory.templates)
        features = self.rho(_mean(memory, self.phi(each.features)))
        return _OneTemplate(
            memory, Template(_mean(memory, each.raw), features, tuple(_mean(memory, m) for m in each.maps))
        )


class SoftAttentionVAE(_Baseline):
    r"""Soft attention: a mixture of all templates, with weights from the latent.

    Generative process::

        z ~ N(0, I)
        w = softmax_a <h(m_a), g(z)> / ||h(m_a)||
        x ~ p(x | z, sum_a w_a m_a)      # the features of templates are mixed with the same weights

    The guide :math:`q(z | x, M)` mixes the templates with weights from the target. Here z also carries where to look,
    at a cost in :math:`KL(z)`. The networks are those of a VMA, with two added for the weights. The site `"a"` exists
    but has no effect, so every function for a VMA works here, and :math:`KL(a)` is zero. The paper makes this
    comparison.

    References:
        | Variational Memory Addressing in Generative Models (Bornschein, Mnih, Zoran, Rezende, 2017)
        | https://arxiv.org/abs/1709.07116

    The arguments are those of :class:`VMA`, without the parts of the address. :meth:`like` turns any likelihood and any
    latent guide into ones with attention.

    Example:
        >>> model = SoftAttentionVAE.for_images((1, 12, 10), latent_dim=4)
        >>> model.generate(Memory(torch.rand(3, 1, 12, 10)), 2).shape
        torch.Size([2, 1, 12, 10])
    """

    @classmethod
    def like(cls, vma: VMA) -> Self:
        num_features = vma.template_encoder.num_features
        network = SoftAttentionDecoder(vma.likelihood.network, num_features)
        return cls(
            StandardPrior(vma.latent_dim),
            type(vma.likelihood)(**(vma.likelihood.arguments() | {"network": network})),
            SoftAttentionGuide(vma.latent_guide, num_features),
            vma.template_encoder,
            vma.x_encoder,
        )

    def _encode(self, memory: Memory, reads: int | None) -> EncodedMemory:
        return _ReadAsAWhole(memory, self.template_encoder(memory.templates))


class _OneTemplate(EncodedMemory):
    """A memory that reads the same template at every address: the only slot of `encoded`."""

    def read(self, a: Tensor) -> Template:  # type: ignore[override]  # as of EncodedMemory
        return super().read(torch.zeros_like(a))


class _ReadAsAWhole(EncodedMemory):
    """A memory that reads all templates at every address."""

    def read(self, a: Tensor) -> Template:  # type: ignore[override]  # as of EncodedMemory
        return _Whole(self, torch.broadcast_shapes(a.shape, self.batch_shape))


class _Whole(Template):
    """All templates of a memory, as one item that is read. Weights of the slots turn it into a template."""

    def __init__(self, memory: EncodedMemory, leading: torch.Size) -> None:
        self.memory, encoded = memory, memory.encoded
        raw, features = (
            values.new_zeros(()).expand(*leading, *event)
            for values, event in ((encoded.raw, memory.event_shape), (encoded.features, encoded.features.shape[-1:]))
        )
        super().__init__(raw, features)  # It has no content without weights.

    def mixture(self, weights: Tensor) -> Template:
        """The mixture of templates with weights `(*, S)`."""
        encoded, shared = self.memory.encoded, not self.memory.per_datapoint

        def mix(values: Tensor) -> Tensor:
            event = values.shape[1:] if shared else values.shape[2:]
            rows = values.reshape(*values.shape[: values.dim() - len(event)], -1)
            w = weights.to(values.dtype)
            mixed = w @ rows if shared else torch.einsum("...bs,bse->...be", w, rows)
            return mixed.reshape(*mixed.shape[:-1], *event)

        with no_autocast(weights):
            raw = mix(encoded.raw)
        return Template(raw, mix(encoded.features), tuple(mix(m) for m in encoded.maps))


class SoftAttentionDecoder(Decoder):
    """A decoder on a mixture of the templates, with weights from the latent."""

    def __init__(self, inner: Decoder, num_features: Size) -> None:
        super().__init__()
        self.inner, self.num_features = inner, num_features
        self.event_shape, self.latent_dim = inner.event_shape, inner.latent_dim
        self.query = nn.Sequential(nn.Linear(self.latent_dim, num_features), nn.ReLU())
        self.attention = SimilarityGuide(num_features, normalise="memory", temperature=1.0, tied=False)

    def forward(self, z: Tensor, template: Template) -> Tensor:
        assert isinstance(template, _Whole)
        weights = self.attention(template.memory, Template(z, self.query(z))).probs
        return self.inner(z, template.mixture(weights))


class SoftAttentionGuide(LatentGuide):
    """A latent guide that sees the weighted average of all templates; the target gives the weights."""

    def __init__(self, inner: LatentGuide, num_features: Size) -> None:
        super().__init__()
        self.inner, self.num_features, self.latent_dim = inner, num_features, inner.latent_dim
        self.attention = SimilarityGuide(num_features)

    def forward(self, x: Template, template: Template) -> dist.Distribution:
        assert isinstance(template, _Whole)
        q = self.inner(x, template.mixture(self.attention(template.memory, x).probs))
        return q.expand(torch.broadcast_shapes(q.batch_shape, template.leading_shape))


def _mean(memory: Memory, values: Tensor) -> Tensor:
    """The mean of `values`, `(S, *)` or `(B, S, *)`, over the slots in use: `(1, *)` or `(B, 1, *)`."""
    dim = len(memory.batch_shape)
    exact = full_precision(values)
    if memory.mask is None:
        return exact.mean(dim, keepdim=True).to(values.dtype)
    shares = memory.mask.to(exact.dtype) / memory.slots_in_use.unsqueeze(-1)
    shares = shares.reshape(*shares.shape, *[1] * (exact.dim() - shares.dim()))
    return (shares * exact).sum(dim, keepdim=True).to(values.dtype)
