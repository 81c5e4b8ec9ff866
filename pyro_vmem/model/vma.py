"""Variational memory addressing: the five parts as a Pyro model and guide."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal, Self

import pyro
import torch
from jaxtyping import Bool, Float
from pyro.poutine.util import is_validation_enabled
from torch import Tensor
from torch.profiler import record_function

from pyro_vmem._utils.checks import Count, NonNegative, NonNegativeInt, Share, Size, checked, converted
from pyro_vmem._utils.param_store import ONE_LOSS, register
from pyro_vmem.distributions.sparse_categorical import sparse_parts
from pyro_vmem.memory import EncodedMemory, Memory, Template
from pyro_vmem.model.checks import check_parts
from pyro_vmem.model.completion import complete
from pyro_vmem.model.lookup import Lookup, lookup
from pyro_vmem.parts import (
    AddressGuide,
    AddressPrior,
    BernoulliDecoder,
    CausalBernoulliDecoder,
    ConvDecoder,
    ConvEncoder,
    Decoder,
    Encoder,
    FlatEncoder,
    GaussianDecoder,
    GaussianGuide,
    LatentGuide,
    LatentPrior,
    Likelihood,
    MLPDecoder,
    MLPEncoder,
    Part,
    SimilarityGuide,
    TemplatePrior,
    Templates,
    UniformPrior,
    WarpDecoder,
    log_odds,
)
from pyro_vmem.parts.layers import check_image_shape

__all__ = ["VMA"]


class VMA(Part):
    r"""Variational memory addressing: a generative model with an external memory.

    Generative process::

        a ~ p(a | M)         # address: which slot
        z ~ p(z | m_a)       # latent: how the template is varied
        x ~ p(x | z, m_a)    # observation

    Guide::

        a ~ q(a | M, x)      # the target guides the lookup
        z ~ q(z | x, m_a)

    :meth:`model` and :meth:`guide` are ordinary Pyro programs with sites `"a"`, `"z"`, `"x"` in a plate `"data"`; the
    VMA itself is an ordinary `torch.nn.Module`. Observations have shape `(B, *event)`.

    References:
        | Variational Memory Addressing in Generative Models (Bornschein, Mnih, Zoran, Rezende, 2017)
        | https://arxiv.org/abs/1709.07116

    Arguments:
        address_prior: :math:`p(a | M)`.
        latent_prior: :math:`p(z | m_a)`.
        likelihood: :math:`p(x | z, m_a)`.
        address_guide: :math:`q(a | M, x)`.
        latent_guide: :math:`q(z | x, m_a)`.
        template_encoder: Computes the features of templates. Default: the flattened template.
        x_encoder: Computes the features of targets. Default: the template encoder.
        name: The prefix of this model's parameters in Pyro's parameter store.
        templates: Learned slots, which change each memory before it is read. Default: none.

    Raises:
        ValueError: If the parts do not fit together.

    Example:
        >>> from pyro.infer import SVI
        >>> from pyro.optim import Adam
        >>> from pyro_vmem.infer import VIMCO_ELBO
        >>> vma = VMA.for_vectors(dim=5)
        >>> svi = SVI(vma.model, vma.guide, Adam({"lr": 1e-3}), loss=VIMCO_ELBO(num_particles=4))
        >>> loss = svi.step(Memory(torch.randn(10, 5)), torch.randn(3, 5))
        >>> vma.generate(Memory(torch.randn(10, 5)), 2).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        address_prior: AddressPrior,
        latent_prior: LatentPrior,
        likelihood: Likelihood,
        address_guide: AddressGuide,
        latent_guide: LatentGuide,
        template_encoder: Encoder | None = None,
        x_encoder: Encoder | None = None,
        name: str = "vma",
        templates: Templates | None = None,
    ) -> None:
        super().__init__()
        self.address_prior = address_prior
        self.latent_prior = latent_prior
        self.likelihood = likelihood
        self.address_guide = address_guide
        self.latent_guide = latent_guide
        self.template_encoder = template_encoder or FlatEncoder(likelihood.event_shape)
        self.x_encoder = x_encoder
        self.name = name
        self.templates = templates
        for role in ("template_encoder", "x_encoder", "templates"):
            part = getattr(self, role)
            if part is not None and tuple(part.event_shape) != tuple(self.event_shape):
                raise ValueError(
                    f"{role}: it is for observations of shape {tuple(part.event_shape)}, the likelihood makes "
                    f"{tuple(self.event_shape)}. Give both the same."
                )
        if latent_prior.latent_dim != latent_guide.latent_dim:
            raise ValueError(
                f"latent_guide: its latent_dim is {latent_guide.latent_dim}, the latent_prior's is "
                f"{latent_prior.latent_dim}. Give both the same."
            )
        self._add_networks()
        check_parts(self)

    def _add_networks(self) -> None:
        """Makes the networks that a subclass has beside the parts; then the parts are checked together."""

    @staticmethod
    def from_pretrained(name: str) -> VMA:
        """A trained model that comes with the package; see :func:`pyro_vmem.config.from_pretrained`."""
        # Imported late: packaged models come after this module in the order of imports.
        vma: VMA = importlib.import_module("pyro_vmem.config").from_pretrained(name)
        return vma

    @classmethod
    @checked
    def for_images(
        cls,
        image_shape: Sequence[Size] = (1, 28, 28),
        latent_dim: Size = 32,
        num_features: Size = 128,
        width: Size = 32,
        decoder: Literal["warp", "conv"] = "warp",
        pixels: Literal["independent", "causal"] = "independent",
        ink: Share = 0.1,
        **parts: Any,
    ) -> VMA:
        """A convolutional VMA for binary images; raises a `ValueError` if given parts do not fit.

        Arguments:
            image_shape: `(channels, height, width)`; any size.
            latent_dim: The length `D` of the latent.
            num_features: The length `F` of the features of templates and targets.
            width: The channels of the convolutions at half resolution.
            decoder: `"warp"`, or `"conv"` for a decoder that does not warp the template.
            pixels: `"independent"`, or `"causal"`: each pixel also depends on the preceding ones. Their density is
                better, their draws are slower.
            ink: The mean of the images, in (0, 1), which is the initial mean of the decoder.
            parts: Any argument of :class:`VMA`, instead of the default part.

        Example:
            >>> VMA.for_images((1, 12, 10), latent_dim=4).generate(Memory(torch.rand(3, 1, 12, 10)), 2).shape
            torch.Size([2, 1, 12, 10])
        """
        image_shape = check_image_shape(image_shape)
        decoders = {"warp": WarpDecoder, "conv": ConvDecoder}
        likelihoods = {"independent": (BernoulliDecoder, 0), "causal": (CausalBernoulliDecoder, 8)}
        likelihood, more = likelihoods[pixels]
        sizes = (latent_dim, num_features, (width, 2 * width), width, image_shape[0] + more)
        defaults: dict[str, Any] = {
            "address_prior": UniformPrior(),
            "latent_prior": TemplatePrior(latent_dim, num_features),
            "likelihood": likelihood(decoders[decoder](image_shape, *sizes, level=log_odds(ink))),
            "address_guide": SimilarityGuide(num_features),
            "latent_guide": GaussianGuide(latent_dim, num_features),
            "template_encoder": ConvEncoder(image_shape, num_features, width),
        }
        return cls(**(defaults | parts))

    @classmethod
    @checked
    def for_vectors(
        cls, dim: Size, latent_dim: Size = 8, num_features: Size = 64, hidden: tuple[Size, ...] = (64,), **parts: Any
    ) -> VMA:
        """A VMA of multilayer perceptrons for real vectors.

        Arguments:
            dim: The length of one observation.
            latent_dim: The length `D` of the latent.
            num_features: The length `F` of the features of templates and targets.
            hidden: The widths of the hidden layers of every network.
            parts: Any argument of :class:`VMA`, instead of the default part.

        Example:
            >>> VMA.for_vectors(5).classify(Memory(torch.rand(3, 5), labels=torch.arange(3)), torch.rand(7, 5)).shape
            torch.Size([7, 3])
        """
        defaults: dict[str, Any] = {
            "address_prior": UniformPrior(),
            "latent_prior": TemplatePrior(latent_dim, num_features, hidden),
            "likelihood": GaussianDecoder(MLPDecoder((dim,), latent_dim, num_features, hidden)),
            "address_guide": SimilarityGuide(num_features),
            "latent_guide": GaussianGuide(latent_dim, num_features, hidden),
            "template_encoder": MLPEncoder((dim,), num_features, hidden),
        }
        return cls(**(defaults | parts))

    def replace(self, **parts: Any) -> Self:
        """A model with some parts replaced. It shares everything else with this one, weights included.

        Training one of the two trains what they share; `copy.deepcopy(vma).replace(...)` shares nothing. Both have the
        same name in Pyro's parameter store. To train both in `SVI` loops, give another `name`.

        Arguments:
            parts: Any argument of this class.

        Raises:
            ValueError: If there is no such argument, or the parts do not fit together.

        Example:
            >>> from pyro_vmem import PairwiseGuide
            >>> vma = VMA.for_vectors(5)
            >>> other = vma.replace(address_guide=PairwiseGuide(64), name="pairwise")
            >>> other.address_guide, other.likelihood is vma.likelihood
            (PairwiseGuide(num_features=64), True)
        """
        return self._with(parts)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one observation, and of one template."""
        return self.likelihood.event_shape

    @property
    def latent_dim(self) -> int:
        """The length :math:`D` of :math:`z`."""
        return self.latent_prior.latent_dim

    # The two Pyro programs

    def model(self, memory: Memory, x: Tensor | None = None) -> Tensor:
        r"""The generative process :math:`p(a | M)\, p(z | m_a)\, p(x | z, m_a)`.

        Arguments:
            memory: The memory :math:`M`.
            x: The targets, with shape `(B, *event)`. Default: generates one observation per memory.

        Returns:
            The observations, with shape `(*, B, *event)`.

        Raises:
            ValueError: If memory or x do not have this model's shape, dtype or range of values.
            RuntimeError: If the parameter store holds other parameters under this model's name.
        """
        memory, x, batch_size = self._enter(memory, x)
        with pyro.plate("data", batch_size, dim=-1):
            a = pyro.sample("a", self.address_prior(memory))
            template = memory.read(a)
            z = pyro.sample("z", self.latent_prior(template))
            with record_function("decode"):
                p_x = self.likelihood(z, template)
            observed: Tensor = pyro.sample("x", p_x, obs=x)
        return observed

    def guide(self, memory: Memory, x: Tensor | None = None) -> None:
        r"""The guide :math:`q(a | M, x)\, q(z | x, m_a)`. Without targets it is the prior.

        Arguments, shapes and errors are those of :meth:`model`.
        """
        memory, x, batch_size = self._enter(memory, x)
        target = None if x is None else self.encode_x(x)
        with pyro.plate("data", batch_size, dim=-1):
            q_a = self.address_prior(memory) if target is None else self.address_guide(memory, target)
            template = memory.read(pyro.sample("a", q_a))
            q_z = self.latent_prior(template) if target is None else self.latent_guide(target, template)
            pyro.sample("z", q_z)

    def encode(self, memory: Memory, reads: int | None = None) -> EncodedMemory:
        """The memory with the features of its templates. An encoded memory is returned unchanged.

        `svi.step(vma.encode(memory), x)` encodes once for guide and model; gradients flow through it. `reads` is the
        largest number of templates that will be read. If it is less than the number of slots, each template is encoded
        when it is read.
        """
        return memory if isinstance(memory, EncodedMemory) else self._encode(memory, reads)

    def _encode(self, memory: Memory, reads: int | None) -> EncodedMemory:
        if memory.index is not None:
            memory.index.check_model(self, self.fingerprint)
        if self.templates is not None:
            memory = self.templates(memory)
        few = reads is not None and reads < memory.num_slots and not memory.per_datapoint
        if few or not memory.store.is_decoded:
            return EncodedMemory(memory, self.template_encoder)
        with record_function("encode memory"):
            return EncodedMemory(memory, self.template_encoder(memory.templates))

    def fingerprint(self) -> str:
        """A short hash of the weights that the keys of an index depend on: template encoder and address guide."""
        digest = hashlib.sha256()
        for part in (self.template_encoder, self.address_guide):
            for weight in part.state_dict().values():
                digest.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def encode_x(self, x: Float[Tensor, "..."]) -> Template:
        """Targets `(*, *event)` with their features; raises a `ValueError` if they have another shape."""
        if tuple(x.shape[max(x.dim() - len(self.event_shape), 0) :]) != tuple(self.event_shape):
            raise ValueError(f"x: expected shape (*, {str(tuple(self.event_shape))[1:-1]}), got {tuple(x.shape)}.")
        with record_function("encode x"):
            features: Template = (self.x_encoder or self.template_encoder)(x)
        return features

    def compile(self, *args: Any, **settings: Any) -> None:
        """Compiles encoders and decoder in place by `torch.compile`, which takes the arguments.

        The programs stay Python. Weights, their names and saved models do not change. On a GPU,
        `mode="reduce-overhead"` starts the networks as CUDA graphs.
        """
        for part in (self.template_encoder, self.x_encoder, *self.likelihood.modules()):
            if isinstance(part, Encoder | Decoder):
                part.compile(*args, **settings)

    # Uses of a trained model

    def save(self, path: str | Path) -> None:
        """Writes weights and spec to one file that :func:`pyro_vmem.load` reads; see :func:`pyro_vmem.config.save`."""
        importlib.import_module("pyro_vmem.config").save(self, path)

    @torch.no_grad()
    @checked
    def lookup(self, memory: Memory, x: Float[Tensor, "B ..."], k: Count = 3) -> Lookup:
        r"""Looks up targets: returns :math:`q(a | M, x)`, the prior, the information gain and the most probable slots.

        Arguments:
            memory: The memory :math:`M`.
            x: The targets, with shape `(B, *event)`.
            k: How many of the most probable slots to return per target.

        Raises:
            ValueError: If memory or x do not fit.

        Example:
            >>> found = VMA.for_vectors(5).lookup(Memory(torch.randn(10, 5)), torch.randn(3, 5))
            >>> found.slots.shape, found.gain.shape
            (torch.Size([3, 3]), torch.Size([3]))
        """
        self.check(memory, x)
        encoded = self.encode(memory)
        return lookup(self.address_guide(encoded, self.encode_x(x)), self.address_prior(encoded), encoded, x, k)

    @torch.no_grad()
    @checked
    def posterior_predictive(
        self, memory: Memory, x: Float[Tensor, "B ..."], n: Count = 1, mean: bool = False
    ) -> Tensor:
        r"""Draws new observations :math:`x' \sim p(x' | z, m_a)` with :math:`a, z \sim q(a, z | x, M)`.

        Arguments:
            memory: The memory :math:`M`.
            x: The targets, with shape `(B, *event)`.
            n: How many draws per target.
            mean: Whether to return the mean of :math:`p(x' | z, m_a)` for each draw of :math:`a, z`.

        Returns:
            The observations, with shape `(n, B, *event)`.

        Raises:
            ValueError: If memory or x do not fit.

        Example:
            >>> VMA.for_vectors(5).posterior_predictive(Memory(torch.randn(10, 5)), torch.randn(3, 5), n=4).shape
            torch.Size([4, 3, 5])
        """
        self.check(memory, x)
        encoded, target = self.encode(memory), self.encode_x(x)
        template = encoded.read(self.address_guide(encoded, target).sample(torch.Size([n])))
        p_x = self.likelihood(self.latent_guide(target, template).sample(), template)
        return self.likelihood.draw(p_x, mean)

    def reconstruct(self, memory: Memory, x: Tensor) -> Tensor:
        r"""The mean of :math:`p(x' | z, m_a)` for one draw of :math:`a, z` from the guide, with shape `(B, *event)`.

        Arguments and errors are those of :meth:`posterior_predictive`.
        """
        return self.posterior_predictive(memory, x, mean=True)[0]

    @torch.no_grad()
    @checked
    def generate(
        self,
        memory: Memory,
        n: Count = 1,
        address: NonNegativeInt | None = None,
        mean: bool = False,
        *,
        temperature: NonNegative = 1.0,
        best_of: Count = 1,
    ) -> Tensor:
        r"""Draws :math:`x \sim p(x | M)`, or :math:`x \sim p(x | m_a)` at a given address.

        A temperature :math:`\tau < 1` or `best_of` above 1 trade diversity for draws that are easier to recognise; they
        are then no draws of :math:`p(x | M)`.

        Arguments:
            memory: The memory :math:`M`, shared or per datapoint.
            n: How many draws.
            address: The slot to read. By default each draw samples its own from the address prior.
            mean: Whether to return the mean of :math:`p(x | z, m_a)` instead of a draw, so that binary images become
                grey. For causal pixels: the mean of each pixel given a draw of the preceding ones.
            temperature: The factor :math:`\tau` of the distance of z from the mean of :math:`p(z | m_a)`.
            best_of: The number of candidates per draw, of which that with the largest :math:`q(a | M, x)` at its own
                address is kept.

        Returns:
            The draws, with shape `(n, *event)`, or `(n, B, *event)` for one memory per datapoint.

        Raises:
            ValueError: If `address` is not a slot in use, or the memory does not fit.
        """
        self.check(memory, None)
        n *= best_of
        encoded = self.encode(memory, reads=n)
        if address is None:
            a = self.address_prior(encoded).sample(torch.Size([n]))
        else:
            in_range = address < encoded.num_slots
            if not in_range or (encoded.mask is not None and not bool(encoded.mask[..., address].all())):
                raise ValueError(f"address: expected a slot in use out of 0..{encoded.num_slots - 1}, got {address}.")
            a = torch.full((n, *encoded.batch_shape), address, device=encoded.device)
        template = encoded.read(a)
        p_z = self.latent_prior(template)
        z = p_z.sample()
        if temperature != 1:
            z = p_z.mean + temperature * (z - p_z.mean)
        x = self.likelihood.draw(self.likelihood(z, template), mean)
        if best_of == 1:
            return x
        # One candidate of each draw at a time, as datapoints that share a memory, or have one each.
        candidates = zip(x.unflatten(0, (best_of, -1)), a.unflatten(0, (best_of, -1)), strict=True)
        score = torch.stack([self._log_q(encoded, each, at) for each, at in candidates])
        best = score.argmax(0, keepdim=True).reshape(1, *score.shape[1:], *[1] * len(self.event_shape))
        return x.unflatten(0, (best_of, -1)).take_along_dim(best, 0).squeeze(0)

    def _log_q(self, memory: EncodedMemory, x: Tensor, a: Tensor) -> Tensor:
        r""":math:`\log q(a | M, x)` of draws `(n, *event)`, or `(n, B, *event)`, at their addresses."""
        if not memory.per_datapoint:
            return self.address_guide(memory, self.encode_x(x)).log_prob(a)
        return torch.stack(
            [self.address_guide(memory, self.encode_x(row)).log_prob(at) for row, at in zip(x, a, strict=True)]
        )

    @torch.no_grad()
    @checked
    def complete(
        self,
        memory: Memory,
        x: Float[Tensor, "B ..."],
        mask: Bool[Tensor, "..."],
        num_particles: Count = 64,
        rounds: Count = 4,
        mean: bool = False,
    ) -> Tensor:
        r"""Fills in the missing part of each target by a draw from :math:`p(a, z, x_{mis} | x_{obs}, M)`.

        Each candidate slot has particles of its own. They start from its prior. In each round, the slot completes the
        target, and the guide given this completion draws the next particles. Weights use the observed part only. A
        slot is drawn at the end, by its weight. If several slots explain the observed part, the draws show all of them.

        Arguments:
            memory: The memory :math:`M`.
            x: The targets, with shape `(B, *event)`; missing values are ignored.
            mask: True where a value is observed; broadcasts with `x`.
            num_particles: The least number of particles per target and round, divided between the slots. If memory has
                more slots than this, the most probable ones by the guide are the candidates.
            rounds: The number of rounds after the first, which draws from the prior.
            mean: Whether the last round fills in the mean of the likelihood instead of a draw.

        Returns:
            The completed targets, with shape `(B, *event)`; observed values are unchanged.

        Raises:
            ValueError: If `mask` does not broadcast, or memory or x do not fit.
        """
        try:
            mask = mask.expand_as(x)
        except RuntimeError as error:
            raise ValueError(f"mask: {tuple(mask.shape)} does not broadcast with x {tuple(x.shape)}.") from error
        self.check(memory, blank := torch.where(mask, x, torch.zeros_like(x)))
        return complete(self, self.encode(memory), blank, mask, num_particles, rounds, mean)

    @torch.no_grad()
    @checked
    def classify(self, memory: Memory, x: Float[Tensor, "B ..."]) -> Tensor:
        r"""The probability of each class in memory: :math:`\sum_{a: c_a = c} q(a | M, x)`.

        Arguments:
            memory: The memory :math:`M`, with labels.
            x: The targets, with shape `(B, *event)`.

        Returns:
            Probabilities, with shape `(B, C)`. The columns are the sorted classes, `memory.labels.unique()`. Learned
            slots are the class -1, in the first column.

        Raises:
            ValueError: If the memory has no labels, or memory or x do not fit.
        """
        if memory.labels is None:
            raise ValueError("memory: classify needs labels, got none. Make it with Memory(templates, labels).")
        self.check(memory, x)
        encoded = self.encode(memory)
        parts = sparse_parts(self.address_guide(encoded, self.encode_x(x)))
        return sum((encoded.by_class(probs, slots) for probs, slots in parts[1:]), encoded.by_class(*parts[0]))

    def _enter(self, memory: Memory, x: Tensor | None) -> tuple[EncodedMemory, Tensor | None, int]:
        """Registers the parameters with Pyro, checks the input, encodes the memory and counts the datapoints."""
        register(self.name, self)
        x = converted(x)  # Pyro's objectives pass on what they are given
        done, this = ONE_LOSS.get(), (id(self), id(memory), id(x))
        if is_validation_enabled() and (done is None or this not in done):
            self.check(memory, x)
            if done is not None:
                done.add(this)
        return self.encode(memory), x, len(x) if x is not None else memory.batch_shape.numel()

    def check(self, memory: Memory, x: Float[Tensor, "..."] | None) -> None:
        """Raises a `ValueError` if memory or x do not have this model's shape, dtype or range of values."""
        if not isinstance(memory, Memory):
            raise ValueError(f"memory: expected Memory, got {type(memory).__name__}. Use Memory(templates).")
        expected, dtype = tuple(self.event_shape), memory.dtype
        shape = (*memory.batch_shape, memory.num_slots, *memory.event_shape)
        if tuple(memory.event_shape) != expected:
            hint = ""
            if shape[2:] == expected and not memory.per_datapoint:
                hint = " For one memory per datapoint, `(B, S, *event)`, pass Memory(..., per_datapoint=True)."
            raise ValueError(
                f"memory: its templates {shape} hold events of shape {tuple(memory.event_shape)}, "
                f"this model's are {expected}.{hint}"
            )
        weight = next(self.parameters(), None)
        if weight is not None and dtype != weight.dtype and not torch.is_autocast_enabled(memory.device.type):
            raise ValueError(
                f"memory: the dtype of its templates is {dtype}, that of this model's weights {weight.dtype}. "
                f"Convert one: `memory.to({weight.dtype})`, or the model as any module."
            )
        if x is None:
            return
        if tuple(x.shape[1:]) != expected or x.dim() != len(expected) + 1 or len(x) == 0:
            raise ValueError(
                f"x: expected shape (B, {', '.join(map(str, expected))}) to go with memory templates "
                f"{shape}, got {tuple(x.shape)}. One target alone is x[None]."
            )
        if x.dtype != dtype:
            raise ValueError(
                f"x: its dtype {x.dtype} is not that of the memory's templates, {dtype}. Convert one: `x.to({dtype})`."
            )
        if memory.per_datapoint and memory.batch_shape.numel() != len(x):
            raise ValueError(
                f"x: got {len(x)} targets, but one memory for each of {memory.batch_shape.numel()} datapoints, "
                f"templates {shape}. Give each target its memory, or all a shared one."
            )
        if not bool(torch.isfinite(x).all()):
            raise ValueError("x: found NaN or infinite values. Clean or drop those targets.")
        self.likelihood.check(x)

    def __repr__(self) -> str:
        def size(module: torch.nn.Module | None) -> str:
            return f"{0 if module is None else sum(p.numel() for p in module.parameters()):,}"

        roles = {
            "p(a | M)": self.address_prior,
            "p(z | m_a)": self.latent_prior,
            "p(x | z,m_a)": self.likelihood,
            "q(a | M,x)": self.address_guide,
            "q(z | x,m_a)": self.latent_guide,
            "features of m": self.template_encoder,
            "features of x": self.x_encoder,
        } | ({} if self.templates is None else {"slots of M": self.templates})
        lines = []
        for role, part in roles.items():
            # 88 columns, so that notebooks break no line.
            first, *rest = wrap("as those of m" if part is None else repr(part), 60, subsequent_indent="  ")
            lines += [f"  {role:<13} {first:<60}  {size(part):>9}", *(f"{'':16}{line}" for line in rest)]
        head = f"{self.name!r}: x {tuple(self.event_shape)}, z ({self.latent_dim},), {size(self)} parameters"
        return "\n".join([f"{type(self).__name__}({head}", *lines, ")"])
