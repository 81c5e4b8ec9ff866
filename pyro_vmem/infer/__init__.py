"""Objectives for models with discrete local latents: `pyro.infer.ELBO` subclasses."""

from pyro_vmem.infer.base import ParticleELBO
from pyro_vmem.infer.capabilities import Capabilities, capabilities, check_objective
from pyro_vmem.infer.enumeration import EnumerationCost, EnumGuard
from pyro_vmem.infer.iwae import IWAE_ELBO
from pyro_vmem.infer.named import Objective, choose_objective, named_objective
from pyro_vmem.infer.noise import share_noise
from pyro_vmem.infer.particles import Particles, draw_particles
from pyro_vmem.infer.rao_blackwell import RaoBlackwell_ELBO
from pyro_vmem.infer.reinforce import Reinforce_ELBO
from pyro_vmem.infer.rws import RWS_ELBO
from pyro_vmem.infer.scaling import scale_sites
from pyro_vmem.infer.terms import Terms
from pyro_vmem.infer.vimco import VIMCO_ELBO

__all__ = [
    "IWAE_ELBO",
    "RWS_ELBO",
    "VIMCO_ELBO",
    "Capabilities",
    "EnumGuard",
    "EnumerationCost",
    "Objective",
    "ParticleELBO",
    "Particles",
    "RaoBlackwell_ELBO",
    "Reinforce_ELBO",
    "Terms",
    "capabilities",
    "check_objective",
    "choose_objective",
    "draw_particles",
    "named_objective",
    "scale_sites",
    "share_noise",
]
