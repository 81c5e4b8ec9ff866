"""Address guides q(a | M, x): which slot explains a target."""

from __future__ import annotations

import abc
import math
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vmem._utils.checks import Positive, Share, Size
from pyro_vmem._utils.precision import full_precision, no_autocast
from pyro_vmem.distributions import SparseCategorical
from pyro_vmem.memory import EncodedMemory, Template
from pyro_vmem.parts.address_priors import AddressPrior, UniformPrior, over_slots
from pyro_vmem.parts.encoders import Encoder
from pyro_vmem.parts.layers import Join, unit
from pyro_vmem.parts.part import Part

__all__ = ["AddressGuide", "DefensiveGuide", "EncoderGuide", "KeyedGuide", "PairwiseGuide", "SimilarityGuide"]


class AddressGuide(Part):
    r"""An address guide :math:`q(a | M, x)`: which slot explains the target."""

    @abc.abstractmethod
    def forward(self, memory: EncodedMemory, x: Template) -> dist.Categorical:
        r"""
        Arguments:
            memory: The memory :math:`M`, with :math:`S` slots.
            x: The target with its features, with leading shape `(*, B)`.

        Returns:
            A categorical over :math:`S` slots, with batch shape `(*, B)`.
        """


class KeyedGuide(AddressGuide):
    r"""A guide by inner products of a query and keys: :math:`q(a = s | M, x) \propto \exp(\langle q_x, k_s \rangle)`.

    :class:`IndexedGuide` computes the keys of all slots once and searches them.
    """

    @abc.abstractmethod
    def keys(self, features: Tensor) -> Tensor:
        r"""The keys :math:`k_s`, `(*, E)`, of templates with features `(*, F)`."""

    @abc.abstractmethod
    def queries(self, features: Tensor) -> Tensor:
        r"""The queries :math:`q_x`, `(*, E)`, of targets with features `(*, F)`."""

    def scores(self, template: Template, x: Template) -> Tensor:
        r"""The score :math:`\langle q_x, k_s \rangle` of each pair of template and target; leading shapes broadcast."""
        # No matrix product: autocast would round it to half precision.
        return (self.keys(template.features) * self.queries(x.features)).sum(-1)

    def forward(self, memory: EncodedMemory, x: Template) -> dist.Categorical:
        keys, query = self.keys(memory.features), self.queries(x.features)
        with no_autocast(keys):
            logits = (keys @ query.unsqueeze(-1)).squeeze(-1) if memory.per_datapoint else query @ keys.mT
        return over_slots(logits, memory)


class SimilarityGuide(KeyedGuide):
    r"""Prefers the slot whose embedding is most similar to that of the target.

    .. math:: q(a = s | M, x) \propto \exp(\langle h(m_s), g(x) \rangle / (\|h(m_s)\| \, \tau))

    The cost is :math:`O(S B E)` for :math:`S` slots and :math:`B` targets. The guide of the paper is
    `normalise="memory", temperature=1.0, tied=False`. By default :math:`h` and :math:`g` are one network, so that an
    untrained guide already finds similar templates. With two networks, training has no signal to start from.

    References:
        | Variational Memory Addressing in Generative Models (Bornschein et al., 2017), section 3.2
        | https://arxiv.org/abs/1709.07116

    Arguments:
        num_features: The length :math:`F` of the feature vectors.
        embed_dim: The length :math:`E` of an embedding.
        normalise: Which embeddings are divided by their norm: both (`"cosine"`), only :math:`h` (`"memory"`) or none
            (`"dot"`).
        temperature: The initial temperature :math:`\tau > 0`; it is learned.
        tied: Whether :math:`h` and :math:`g` share their weights.

    Example:
        >>> from pyro_vmem import EncodedMemory, Memory, Template
        >>> memory = Memory(torch.rand(4, 8))
        >>> encoded = EncodedMemory(memory, Template(memory.templates, torch.rand(4, 16)))
        >>> SimilarityGuide(16)(encoded, Template(torch.rand(3, 8), torch.rand(3, 16))).logits.shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        num_features: Size = 128,
        embed_dim: Size = 64,
        normalise: Literal["memory", "cosine", "dot"] = "cosine",
        temperature: Positive = 0.1,
        tied: bool = True,
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.embed_memory = nn.Linear(num_features, embed_dim)
        self.embed_x = self.embed_memory if tied else nn.Linear(num_features, embed_dim)
        self.log_temperature = nn.Parameter(torch.tensor(temperature).log())

    @property
    def temperature(self) -> Tensor:
        r"""The temperature :math:`\tau`, a scalar."""
        return self.log_temperature.exp()

    # Full precision: small differences of similarity decide between slots.

    def keys(self, features: Tensor) -> Tensor:
        keys = full_precision(self.embed_memory(features))
        return keys if self.normalise == "dot" else unit(keys)

    def queries(self, features: Tensor) -> Tensor:
        query = full_precision(self.embed_x(features))
        return (unit(query) if self.normalise == "cosine" else query) / self.log_temperature.exp()


class PairwiseGuide(AddressGuide):
    r"""Scores each pair of target and template by a network: :math:`q(a = s | M, x) \propto \exp(r(x, m_s))`.

    .. math:: r(x, m) = v^\top \mathrm{relu}(W f(x) + U f(m) + b)

    :math:`f` are features divided by their norm. Unlike :class:`SimilarityGuide`, it learns the measure of similarity.
    The cost is :math:`O(S B H)` in time and memory. It starts with :math:`U = -W` and :math:`v < 0`, minus a distance,
    so an untrained guide already finds similar templates.

    References:
        | Learning to Compare: Relation Network for Few-Shot Learning (Sung et al., 2018) https://arxiv.org/abs/1711.06025
        | The form is that of: Neural Machine Translation by Jointly Learning to Align and Translate
        | (Bahdanau, Cho, Bengio, 2015), appendix A.1.2 https://arxiv.org/abs/1409.0473

    Arguments:
        num_features: The length :math:`F` of the feature vectors.
        hidden: The width :math:`H` of the hidden layer.

    Example:
        >>> from pyro_vmem import EncodedMemory, Memory, Template
        >>> memory = Memory(torch.rand(4, 8))
        >>> encoded = EncodedMemory(memory, Template(memory.templates, torch.rand(4, 16)))
        >>> PairwiseGuide(16)(encoded, Template(torch.rand(3, 8), torch.rand(3, 16))).logits.shape
        torch.Size([3, 4])
    """

    def __init__(self, num_features: Size = 128, hidden: Size = 64) -> None:
        super().__init__()
        self.join = Join(num_features, num_features, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)
        with torch.no_grad():
            self.join.first.weight.normal_()
            self.join.second.weight.copy_(-self.join.first.weight)
            self.join.first.bias.zero_()
            self.score.weight.fill_(-50 / hidden)  # about -20 times the distance: untrained features are similar

    def forward(self, memory: EncodedMemory, x: Template) -> dist.Categorical:
        keys, query = unit(memory.features), unit(x.features).unsqueeze(-2)
        with no_autocast(keys):
            return over_slots(self.score(self.join(query, keys).relu()).squeeze(-1), memory)


class DefensiveGuide(AddressGuide):
    r"""Another guide mixed with a prior: :math:`(1 - \epsilon)\, q(a | M, x) + \epsilon\, p(a | M)`.

    Every slot in use has at least the probability :math:`\epsilon\, p(a | M)`, so importance weights
    :math:`p(a | M) / q(a | M, x)` are at most :math:`1 / \epsilon`. A guide that is confident in the wrong slot still
    visits the right one. The mixture also gives a :class:`TruncatedGuide` full support.

    References:
        | Weighted Average Importance Sampling and Defensive Mixture Distributions (Hesterberg, 1995)
        | https://doi.org/10.1080/00401706.1995.10484303

    Arguments:
        inner: The guide :math:`q(a | M, x)`.
        share: The share :math:`\epsilon` of the prior, in (0, 1).
        prior: The prior :math:`p(a | M)` of the mixture. Default: uniform.

    Example:
        >>> from pyro_vmem import EncodedMemory, Memory, Template
        >>> memory = Memory(torch.rand(4, 8))
        >>> encoded = EncodedMemory(memory, Template(memory.templates, torch.rand(4, 16)))
        >>> q = DefensiveGuide(SimilarityGuide(16, temperature=1e-3), share=0.2)
        >>> print(f"{q(encoded, Template(torch.rand(3, 8), torch.rand(3, 16))).probs.min():.3f}")
        0.050
    """

    def __init__(self, inner: AddressGuide, share: Share = 0.05, prior: AddressPrior | None = None) -> None:
        super().__init__()
        self.inner, self.share, self.prior = inner, share, prior or UniformPrior()

    def forward(self, memory: EncodedMemory, x: Template) -> dist.Categorical:
        q, p = self.inner(memory, x), self.prior(memory)
        if isinstance(q, SparseCategorical):
            return q.mixed_with(p, self.share)
        own = q.logits + math.log1p(-self.share)
        return over_slots(torch.logaddexp(own, p.logits + math.log(self.share)), memory)


class EncoderGuide(AddressGuide):
    r"""Another guide with an encoder of its own, which no other part shares.

    Shared features have to serve the decoder too. With its own encoder the guide can be trained alone, on a frozen
    model: `vma.requires_grad_(False); vma.address_guide.requires_grad_(True)`. The cost is one more encoding of each
    template and target.

    With `views`, :math:`V` transforms :math:`g` (quarter turns and mirror images) are applied to templates and target
    together. The guide is the geometric mean over them:

    .. math:: q(a | M, x) \propto \prod_g q(a | g M, g x)^{1 / V}

    It does not depend on how the whole episode is turned. The cost is :math:`V` encodings. It helps if the inner guide
    was trained on turned and mirrored images.

    References:
        | Inference Suboptimality in Variational Autoencoders (Cremer, Li, Duvenaud, 2018), on guides retrained for a
        | frozen model | https://arxiv.org/abs/1801.03558

    Arguments:
        inner: The guide that reads the features.
        encoder: The encoder of templates and targets.
        views: The number :math:`V` of views: 1, 4 (quarter turns) or 8 (mirror images as well).

    Raises:
        ValueError: If `views` is not 1, 4 or 8, or is more than 1 and the images of the encoder are not square.

    Example:
        >>> from pyro_vmem import EncodedMemory, Memory
        >>> from pyro_vmem.parts import FlatEncoder, MLPEncoder
        >>> shared, own = FlatEncoder((8,)), MLPEncoder((8,), num_features=16)
        >>> memory, x = Memory(torch.rand(4, 8)), torch.rand(3, 8)
        >>> q = EncoderGuide(SimilarityGuide(16), own)
        >>> q(EncodedMemory(memory, shared(memory.templates)), shared(x)).logits.shape
        torch.Size([3, 4])
    """

    def __init__(self, inner: AddressGuide, encoder: Encoder, views: Literal[1, 4, 8] = 1) -> None:
        super().__init__()
        shape = encoder.event_shape
        if views > 1 and (len(shape) != 3 or shape[1] != shape[2]):
            raise ValueError(f"views: {views} need square images (C, H, H), the encoder's are {shape}. Pass views=1.")
        self.inner, self.encoder, self.views = inner, encoder, views

    def forward(self, memory: EncodedMemory, x: Template) -> dist.Categorical:
        seen = []
        for view in range(self.views):
            templates, targets = (self.encoder(_turned(images, view)) for images in (memory.templates, x.raw))
            seen.append(self.inner(EncodedMemory(memory, templates), targets))
        return seen[0] if self.views == 1 else over_slots(torch.stack([q.logits for q in seen]).mean(0), memory)


def _turned(images: Tensor, view: int) -> Tensor:
    """Images after `view` quarter turns; from the fifth view on they are mirrored first."""
    if view == 0:
        return images
    return torch.rot90(images.flip(-1) if view >= 4 else images, view % 4, (-2, -1))
