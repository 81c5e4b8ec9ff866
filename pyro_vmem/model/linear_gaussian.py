"""The reference model: a linear-Gaussian memory model with known evidence and posteriors."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyro_vmem._utils.checks import Positive, Size
from pyro_vmem.memory import EncodedMemory, Memory, Template
from pyro_vmem.model.vma import VMA
from pyro_vmem.parts import (
    AddressGuide,
    AddressPrior,
    Decoder,
    LatentGuide,
    LatentPrior,
    Likelihood,
    Part,
    UniformPrior,
    over_slots,
)

__all__ = ["LinearGaussianMemory"]


class LinearGaussianMemory(nn.Module):
    r"""A memory model that is linear and Gaussian given the address, so its evidence and posteriors are known.

    Generative process::

        a ~ p(a | M)                              # any address prior
        z ~ N(C m_a + d, diag(tau^2))
        x ~ N(W z + V m_a + b, s^2 I)

    Hence :math:`p(x | m_a) = N(x;\, W (C m_a + d) + V m_a + b,\; W \mathrm{diag}(\tau^2) W^\top + s^2 I)`, and the
    evidence :math:`p(x | M)` and the posteriors of a and z follow in closed form. Check estimators against it. The idea
    comes from the linear-Gaussian simulator of `sbi`.

    Arguments:
        dim: The length :math:`X` of an observation, and of a template.
        latent_dim: The length :math:`D` of the latent.
        noise: The scale :math:`s > 0` of the likelihood.
        address_prior: :math:`p(a | M)`; uniform by default.
        generator: Draws the matrices. The same state gives the same model.

    Example:
        >>> model = LinearGaussianMemory(dim=3, latent_dim=2, generator=torch.Generator().manual_seed(0))
        >>> memory, x = Memory(torch.randn(5, 3)), torch.randn(4, 3)
        >>> model.log_evidence(memory, x).shape, model.address_posterior(memory, x).probs.shape
        (torch.Size([4]), torch.Size([4, 5]))
        >>> model.vma(exact=True).generate(memory, 2).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        dim: Size = 3,
        latent_dim: Size = 2,
        noise: Positive = 0.5,
        address_prior: AddressPrior | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()

        def matrix(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator) / math.sqrt(columns))

        self.dim, self.latent_dim = dim, latent_dim
        self.to_latent = matrix(latent_dim, dim)  # C
        self.latent_offset = nn.Parameter(torch.randn(latent_dim, generator=generator))  # d
        self.latent_log_scale = nn.Parameter(0.3 * torch.randn(latent_dim, generator=generator))  # log tau
        self.loading = matrix(dim, latent_dim)  # W
        self.skip = matrix(dim, dim)  # V
        self.offset = nn.Parameter(torch.randn(dim, generator=generator))  # b
        self.log_noise = nn.Parameter(torch.tensor(noise).log())  # log s
        self.address_prior = address_prior or UniformPrior()

    # Closed forms

    def slot_log_evidence(self, memory: Memory, x: Float[Tensor, "B X"]) -> Tensor:
        r""":math:`\log p(x | m_a)` of targets `(B, X)` from each slot of a memory, in nats, with shape `(B, S)`."""
        _check_finite(x=x)
        mean = self.latent_mean(memory.templates) @ self.loading.mT + memory.templates @ self.skip.mT + self.offset
        scaled = self.loading * self.latent_log_scale.exp()
        identity = torch.eye(self.dim, dtype=x.dtype, device=x.device)
        covariance = scaled @ scaled.mT + (2 * self.log_noise).exp() * identity
        # one batch dim for targets, one for slots
        log_prob: Tensor = dist.MultivariateNormal(mean, covariance).log_prob(x.unsqueeze(-2))
        return log_prob

    def log_evidence(self, memory: Memory, x: Float[Tensor, "B X"]) -> Tensor:
        r""":math:`\log p(x | M) = \log \sum_a p(a | M)\, p(x | m_a)` of each target, in nats, `(B,)`."""
        return self._log_joint(memory, x).logsumexp(-1)

    def address_posterior(self, memory: Memory, x: Float[Tensor, "B X"]) -> dist.Categorical:
        r""":math:`p(a | x, M) \propto p(a | M)\, p(x | m_a)`, one categorical per target, with batch shape `(B,)`."""
        return over_slots(self._log_joint(memory, x), memory)

    def latent_posterior(
        self, x: Float[Tensor, "*#batch X"], template: Float[Tensor, "*#batch X"]
    ) -> dist.MultivariateNormal:
        r""":math:`p(z | x, m_a)`, a Gaussian with precision :math:`\mathrm{diag}(\tau^{-2}) + W^\top W / s^2`.

        Arguments:
            x: The targets, with shape `(*, X)`.
            template: The templates :math:`m_a`, with shape `(*, X)`; leading dims broadcast.
        """
        _check_finite(x=x, template=template)
        prior_precision = torch.diag_embed((-2 * self.latent_log_scale).exp())
        noise_precision = (-2 * self.log_noise).exp()
        precision = prior_precision + noise_precision * self.loading.mT @ self.loading
        residual = x - template @ self.skip.mT - self.offset
        information = self.latent_mean(template) @ prior_precision + noise_precision * residual @ self.loading
        mean = torch.linalg.solve(precision, information.unsqueeze(-1)).squeeze(-1)
        return dist.MultivariateNormal(mean, precision_matrix=precision)

    def latent_mean(self, template: Float[Tensor, "*batch X"]) -> Tensor:
        r"""The mean :math:`C m_a + d` of :math:`p(z | m_a)`: `(*, X)` to `(*, D)`."""
        return template @ self.to_latent.mT + self.latent_offset

    def _log_joint(self, memory: Memory, x: Tensor) -> Tensor:
        encoded = EncodedMemory(memory, Template(memory.templates, memory.templates))
        return self.address_prior(encoded).logits + self.slot_log_evidence(memory, x)

    # The same model as a VMA

    def vma(
        self,
        exact: bool = True,
        address_guide: AddressGuide | None = None,
        latent_guide: LatentGuide | None = None,
        name: str = "vma",
    ) -> VMA:
        """This model as a VMA, which shares its parameters with the closed forms.

        Arguments:
            exact: Whether the guide is the exact posterior. If false, give both guides.
            address_guide: A guide of the address, in place of the exact posterior.
            latent_guide: A guide of the latent, in place of the exact posterior.
            name: The prefix of its parameters in Pyro's parameter store.

        Raises:
            ValueError: If `exact` is false and a guide is missing.
        """
        if not exact and (address_guide is None or latent_guide is None):
            raise ValueError("exact: False needs both address_guide and latent_guide; give them, or exact=True.")
        return VMA(
            self.address_prior,
            _LinearPrior(self),
            _LinearLikelihood(_LinearDecoder(self)),
            address_guide or _ExactAddressGuide(self),
            latent_guide or _ExactLatentGuide(self),
            name=name,
        )


def _check_finite(**values: Tensor) -> None:
    for name, value in values.items():
        if value.numel() == 0 or not bool(value.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers, got NaN, infinite values or none.")


class _OfReference(Part):
    """The base class of the parts of this model as a VMA."""

    def __init__(self, reference: LinearGaussianMemory) -> None:
        super().__init__()
        self.reference, self.latent_dim = reference, reference.latent_dim
        self.event_shape: tuple[int, ...] = (reference.dim,)


class _LinearPrior(_OfReference, LatentPrior):
    def forward(self, template: Template) -> dist.Distribution:
        scale = self.reference.latent_log_scale.exp()
        return dist.Normal(self.reference.latent_mean(template.raw), scale).to_event(1)


class _LinearDecoder(_OfReference, Decoder):
    def forward(self, z: Tensor, template: Template) -> Tensor:
        r = self.reference
        return z @ r.loading.mT + template.raw @ r.skip.mT + r.offset


class _LinearLikelihood(Likelihood):
    def forward(self, z: Tensor, template: Template) -> dist.Distribution:
        assert isinstance(self.network, _LinearDecoder)
        return dist.Normal(self.network(z, template), self.network.reference.log_noise.exp()).to_event(1)


class _ExactAddressGuide(_OfReference, AddressGuide):
    def forward(self, memory: EncodedMemory, x: Template) -> dist.Categorical:
        return self.reference.address_posterior(memory, x.raw)


class _ExactLatentGuide(_OfReference, LatentGuide):
    def forward(self, x: Template, template: Template) -> dist.Distribution:
        return self.reference.latent_posterior(x.raw, template.raw)
