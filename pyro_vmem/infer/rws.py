"""Reweighted wake-sleep, weighted per datapoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.distributions import Bernoulli, Categorical, OneHotCategorical
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent

from pyro_vmem._utils.checks import Count, Fraction
from pyro_vmem.distributions import SparseCategorical
from pyro_vmem.infer.doubly_reparameterised import depends_on, is_delta
from pyro_vmem.infer.elbo import ParticleELBO, log_mean_exp
from pyro_vmem.infer.particles import OWN, Particles, samples

__all__ = ["RWS_ELBO"]


@dataclass(repr=False, eq=False)
class RWS_ELBO(ParticleELBO):
    r"""Reweighted wake-sleep: the model maximises the importance-weighted bound, the guide fits the posterior.

    .. math:: \nabla_\theta = \sum_k \tilde w_k \nabla \log p(x, h_k), \qquad
        \nabla_\phi = \sum_k \tilde w_k \nabla \log q(h_k | x)

    The first is the gradient of :math:`L = \log \frac{1}{K} \sum_k w_k` with respect to the model, exactly in
    expectation; the second (the wake phase of the guide) is a self-normalised estimate of that of
    :math:`-KL(p(h | x) \| q(h | x))`, off by :math:`O(1/K)`. No score function is needed, so it still learns where the
    learning signal of :class:`VIMCO_ELBO` is weak. Weights are per datapoint; `pyro.infer.ReweightedWakeSleep` forms
    one weight for the whole minibatch.

    Two options:

    - `pathwise`: reparameterised latents get the gradient of :math:`L` through their values, and only the others get
      the wake phase. Without this option an untrained decoder does not learn to use the latent.
    - `defensive`: discrete latents are drawn from :math:`(1 - \delta)\, q + \delta\, \mathrm{uniform}`, so that values
      that the guide excludes are still tried. Weights use the mixture, and q is trained. With `top`, the uniform
      distribution covers only the most probable values. Sites may be categorical, one-hot or Bernoulli. Each
      independent element is mixed on its own.

    References:
        | Reweighted Wake-Sleep (Bornschein & Bengio, 2015), equations 5 and 8 | https://arxiv.org/abs/1406.2751
        | Revisiting Reweighted Wake-Sleep (Le et al., 2019), sections 3 and 4 | https://arxiv.org/abs/1805.10469

    Arguments:
        num_particles: The number :math:`K \ge 2` of particles.
        pathwise: Whether reparameterised latents are differentiated through.
        dreg: Whether that gradient is doubly reparameterised, as in :class:`VIMCO_ELBO`; needs `pathwise`.
        defensive: The share :math:`\delta` of the uniform distribution, in [0, 1).
        top: The number of most probable values that the uniform distribution covers. Default: all.
        backward: The number of particles per datapoint that the gradient of the model uses; see :class:`ParticleELBO`.
        vectorize_particles: Whether all particles are drawn in one pass.
        max_plate_nesting: As in `pyro.infer.ELBO`.

    Raises:
        ValueError: If `num_particles` is less than 2 (a single particle has weight one, whatever it is), `defensive` or
            `top` is out of range, or `dreg` is without `pathwise`; at the first loss, if a discrete latent cannot be
            mixed, a guide is a point with no density and not `pathwise`, or, with `pathwise`, a discrete latent's
            guide depends on a latent that is differentiated through.

    Example:
        >>> import pyro_vmem as pv
        >>> vma = pv.VMA.for_vectors(5)
        >>> elbo = RWS_ELBO(8, pathwise=True, defensive=0.1)
        >>> elbo.terms(vma.model, vma.guide, pv.Memory(torch.randn(6, 5)), torch.randn(3, 5)).bound.shape
        torch.Size([3])
    """

    discrete: ClassVar[str] = "wake phase"
    least_particles: ClassVar[int] = 2
    weighted: ClassVar[bool] = True
    global_latents: ClassVar[bool] = False  # weights compare draws of one datapoint, and a global latent has one draw
    bias: ClassVar[str] = "guide: self-normalised, O(1/K)"

    pathwise: bool = False
    dreg: bool = False
    defensive: Fraction = 0.0
    top: Count | None = None

    def __post_init__(self) -> None:
        if self.top is not None and not self.defensive:
            raise ValueError(f"top: it has no effect without a share; got {self.top}. Pass defensive=0.1, or no top.")
        if self.dreg and not self.pathwise:
            raise ValueError("dreg: no latent is differentiated through. Pass pathwise=True, or dreg=False.")
        super().__post_init__()

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        if self.defensive:
            guide = _Defensive(self.defensive, self.top)(guide)
        if not self.pathwise:
            guide = _Detached()(guide)
        traces = super()._get_trace(model, guide, args, kwargs)
        self._train_by_wake_phase(traces[1])
        return traces

    def _train_by_wake_phase(self, guide_trace: Trace) -> None:
        """Makes the score of each site that the wake phase trains its own log q; raises a `ValueError` if it cannot."""
        sites = {name: site for name, site in samples(guide_trace).items() if not site["is_observed"]}
        values = {name: site["value"] for name, site in sites.items() if site["value"].requires_grad}
        for name, site in sites.items():
            if is_delta(site) or (self.pathwise and site["fn"].has_rsample):
                continue
            # What the wake phase trains is log q itself: the guide's own, if it was drawn from another, and nothing
            # where it is masked, while a score function belongs to whatever depends on the value, masked or not.
            own = site["infer"][OWN].log_prob(site["value"]) if OWN in site["infer"] else site["unscaled_log_prob"]
            own = scale_and_mask(own, mask=site["mask"])
            site["score_parts"] = site["score_parts"]._replace(score_function=own)
            # The wake phase holds latents fixed; where a discrete one's guide depends on the value of another, the same
            # log q would have to send the bound's gradient through that value, and the wake phase's not.
            if found := depends_on(site["log_prob"], values):
                raise ValueError(
                    f"pathwise: the guide of {name!r}, which the wake phase trains, depends on the value of "
                    f"{found[0]!r}, which is differentiated through. Use pathwise=False, or VIMCO_ELBO."
                )

    def estimate(self, particles: Particles) -> tuple[Tensor, Tensor]:
        log_weights = particles.log_weights
        share = log_weights.detach().softmax(0)
        particles.weight_paths(share)
        # What the wake phase trains has no part in the bound's own gradient.
        awake, of_bound = particles.score, log_weights
        for name in awake:
            of_bound = of_bound + particles.log_guide[name] - particles.log_guide[name].detach()
        wake = sum((share * log_q for log_q in awake.values()), torch.zeros_like(share)).sum(0)
        return log_mean_exp(log_weights), log_mean_exp(of_bound) + wake


class _Detached(Messenger):
    """Draws reparameterised sites without a gradient, also for the sites that are drawn after them."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["value"] is not None or not msg["fn"].has_rsample:
            return
        value = msg["fn"](*msg["args"], **msg["kwargs"])
        if is_delta(msg) and value.requires_grad:
            raise ValueError(
                f"guide: site {msg['name']!r} is a point that is learned, and the wake phase learns densities. Use "
                "pathwise=True, or VIMCO_ELBO."
            )
        msg["value"] = value.detach()


class _Defensive(Messenger):
    """Draws discrete sites from a mixture of the guide and the uniform distribution."""

    def __init__(self, share: float, top: int | None) -> None:
        super().__init__()
        self.share, self.top = share, top

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["is_observed"] or site_is_subsample(msg) or fn.has_rsample:
            return
        msg["fn"] = self._mixed(fn, msg["name"])
        msg["infer"] = {**msg["infer"], OWN: fn}

    def _mixed(self, fn: Any, name: str) -> Any:
        if isinstance(fn, Independent):
            return self._mixed(fn.base_dist, name).to_event(fn.reinterpreted_batch_ndims)
        if isinstance(fn, torch.distributions.Bernoulli):
            return Bernoulli(self._with_uniform(torch.stack([1 - fn.probs, fn.probs], -1))[..., 1])
        if isinstance(fn, torch.distributions.OneHotCategorical):
            return OneHotCategorical(self._with_uniform(fn.probs))
        if isinstance(fn, SparseCategorical):  # a row of all values for each datapoint would be a large matrix
            if self.top is not None:
                return fn.mixed_with_its_top(self.top, self.share)
            kept, _ = fn.parts()[0]
            return fn.mixed_with(Categorical(logits=kept.new_zeros(fn.param_shape[-1])), self.share)
        if isinstance(fn, torch.distributions.Categorical):
            return Categorical(self._with_uniform(fn.probs))
        raise ValueError(
            f"defensive: site {name!r} is a {type(fn).__name__}, and there is a uniform distribution only for "
            "Categorical, OneHotCategorical and Bernoulli, also in Independent. Use defensive=0."
        )

    def _with_uniform(self, q: Tensor) -> Tensor:
        uniform = torch.full_like(q, 1 / q.shape[-1])
        if self.top is not None and self.top < q.shape[-1]:
            uniform = torch.zeros_like(q).scatter(-1, q.topk(self.top, dim=-1).indices, 1 / self.top)
        return (1 - self.share) * q + self.share * uniform
