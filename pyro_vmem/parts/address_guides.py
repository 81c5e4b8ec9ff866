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
    r"""An address guide :math:`q(a | M, x)`: the recogniser of the slot."""

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

    Keys of many slots can be computed beforehand and searched, which :class:`IndexedGuide` does.
    """

    @abc.abstractmethod
    def keys(self, features: Tensor) -> Tensor:
        r"""The keys :math:`k_s`, `(*, E)`, of templates with features `(*, F)`."""

    @abc.abstractmethod
    def queries(self, features: Tensor) -> Tensor:
        r"""The queries :math:`q_x`, `(*, E)`, of targets with features `(*, F)`."""

    def scores(self, template: Template, x: Template) -> Tensor:
        r""":math:`\langle q_x, k_s \rangle` of templates and targets one by one; leading shapes broadcast."""
        # not a matrix product, which autocast would round
        return (self.keys(template.features) * self.queries(x.features)).sum(-1)

    def forward(self, memory: EncodedMemory, x: Template) -> dist.Categorical:
        keys, query = self.keys(memory.features), self.queries(x.features)
        with no_autocast(keys):
            logits = (keys @ query.unsqueeze(-1)).squeeze(-1) if memory.per_datapoint else query @ keys.mT
        return over_slots(logits, memory)


class SimilarityGuide(KeyedGuide):
    r"""The slot whose embedding is most similar to the target's.

    .. math:: q(a = s | M, x) \propto \exp(\langle h(m_s), g(x) \rangle / (\|h(m_s)\| \, \tau))

    `normalise` says which of the two embeddings is divided by its norm: the memory's (`"memory"`), both (`"cosine"`) or
    neither (`"dot"`). The paper's guide is `normalise="memory", temperature=1.0, tied=False`. The default has one
    embedding for both, so that before any training a target already looks up what resembles it: with weights of their
    own, there is nothing at first from which the lookup could be learned. One embedding of a shared memory serves the
    whole minibatch, so the cost is :math:`O(S B E)`.

    References:
        | Variational Memory Addressing in Generative Models (Bornschein et al., 2017), section 3.2
        | https://arxiv.org/abs/1709.07116

    Arguments:
        num_features: The length :math:`F` of a feature vector, of templates as of targets.
        embed_dim: The length :math:`E` of an embedding.
        normalise: `"cosine"`, `"memory"` or `"dot"`.
        temperature: The temperature :math:`\tau > 0` to start from; it is learned.
        tied: Whether :math:`h` and :math:`g` share their weights.

    Raises:
        ValueError: If `normalise` is none of the three, or `temperature` is not positive.

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

    # Similarities decide between slots, so they are not rounded to half precision.

    def keys(self, features: Tensor) -> Tensor:
        keys = full_precision(self.embed_memory(features))
        return keys if self.normalise == "dot" else unit(keys)

    def queries(self, features: Tensor) -> Tensor:
        query = full_precision(self.embed_x(features))
        return (unit(query) if self.normalise == "cosine" else query) / self.temperature


class PairwiseGuide(AddressGuide):
    r"""A network's score of each pair of target and template: :math:`q(a = s | M, x) \propto \exp(r(x, m_s))`.

    .. math:: r(x, m) = v^\top \mathrm{relu}(W f(x) + U f(m) + b)

    :math:`f` are features divided by their norm. It can learn what resemblance means, where :class:`SimilarityGuide`
    measures it in an embedding. Each pair has a hidden layer of its own, so the cost is :math:`O(S B H)` in time and
    memory. It starts with :math:`U = -W` and :math:`v < 0`, minus a distance: before any training nothing is more
    probable than a template like the target, and there is something from which the lookup can be learned.

    References:
        | Learning to Compare: Relation Network for Few-Shot Learning (Sung et al., 2018) https://arxiv.org/abs/1711.06025
        | The form is that of: Neural Machine Translation by Jointly Learning to Align and Translate
        | (Bahdanau, Cho, Bengio, 2015), appendix A.1.2 https://arxiv.org/abs/1409.0473

    Arguments:
        num_features: The length :math:`F` of a feature vector, of templates as of targets.
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
            self.score.weight.fill_(-50 / hidden)  # about -20 times the distance: encoders start with features alike

    def forward(self, memory: EncodedMemory, x: Template) -> dist.Categorical:
        keys, query = unit(memory.features), unit(x.features).unsqueeze(-2)
        with no_autocast(keys):
            return over_slots(self.score(self.join(query, keys).relu()).squeeze(-1), memory)


class DefensiveGuide(AddressGuide):
    r"""Another guide mixed with a prior: :math:`(1 - \epsilon)\, q(a | M, x) + \epsilon\, p(a | M)`.

    No slot in use is ever less than :math:`\epsilon\, p(a | M)` probable, so importance weights
    :math:`p(a | M) / q(a | M, x)` are at most :math:`1 / \epsilon`, whatever the guide believes: a guide that is sure
    of the wrong slot still visits the right one. It also gives a :class:`TruncatedGuide` full support.

    References:
        | Weighted Average Importance Sampling and Defensive Mixture Distributions (Hesterberg, 1995)
        | https://doi.org/10.1080/00401706.1995.10484303

    Arguments:
        inner: The guide that is mixed.
        share: The share :math:`\epsilon` of the prior, in (0, 1).
        prior: The prior :math:`p(a | M)`, which belongs to the guide. Default: the uniform one.

    Raises:
        ValueError: If `share` is not between 0 and 1.

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
    r"""Another guide that reads features of its own: :math:`q(a | M, x)` by an encoder that no other part shares.

    Features that the decoder shares have to serve it too. A guide with its own can be trained further, on a model that
    stays as it is: freeze the rest, `vma.requires_grad_(False); vma.address_guide.requires_grad_(True)`. It costs one
    more encoding of each template and target.

    With `views`, target and templates are looked at together in up to eight ways, turned by quarter turns :math:`g` and
    then mirrored, and the guide is the geometric mean of what it says of each:

    .. math:: q(a | M, x) \propto \prod_g q(a | g M, g x)^{1 / V}

    which is the same whichever way the whole episode is turned. It costs `views` encodings instead of one, and helps
    a guide that was trained on turned and mirrored images as well.

    References:
        | Inference Suboptimality in Variational Autoencoders (Cremer, Li, Duvenaud, 2018), on what a guide misses
        | beside a model that stays | https://arxiv.org/abs/1801.03558

    Arguments:
        inner: The guide that reads the features.
        encoder: What makes them, of templates and targets alike.
        views: In how many ways images are looked at: 1, the four quarter turns, or these and their mirror images, 8.

    Raises:
        ValueError: If `views` is not 1, 4 or 8, or is more than 1 and the encoder's images are not square.

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
        seen = [self._seen(memory, x, view) for view in range(self.views)]
        if self.views == 1:
            return seen[0]
        return over_slots(torch.stack([q.logits for q in seen]).mean(0), memory)

    def _seen(self, memory: EncodedMemory, x: Template, view: int) -> dist.Categorical:
        templates, targets = (_turned(images, view) for images in (memory.templates, x.raw))
        return self.inner(EncodedMemory(memory, self.encoder(templates)), self.encoder(targets))


def _turned(images: Tensor, view: int) -> Tensor:
    """Images after `view` quarter turns, mirrored before these from the fifth view on."""
    if view == 0:
        return images
    return torch.rot90(images.flip(-1) if view >= 4 else images, view % 4, (-2, -1))
