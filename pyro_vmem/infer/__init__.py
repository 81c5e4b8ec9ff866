"""Objectives for models with discrete local latents: `pyro.infer.ELBO` subclasses."""

from pyro_vmem._utils.checks import check_entries
from pyro_vmem.infer.by_name import check_objective
from pyro_vmem.infer.disarm import DisARM_ELBO
from pyro_vmem.infer.elbo import ParticleELBO, Terms
from pyro_vmem.infer.enumeration import EnumGuard
from pyro_vmem.infer.global_draws import GlobalDraws_ELBO
from pyro_vmem.infer.iwae import IWAE_ELBO
from pyro_vmem.infer.particles import Particles
from pyro_vmem.infer.rao_blackwell import RaoBlackwell_ELBO
from pyro_vmem.infer.recommend import Choice, choose
from pyro_vmem.infer.reinforce import Reinforce_ELBO
from pyro_vmem.infer.relax import RELAX_ELBO
from pyro_vmem.infer.rws import RWS_ELBO
from pyro_vmem.infer.straight_through import StraightThrough_ELBO
from pyro_vmem.infer.unordered_set import UnorderedSet_ELBO
from pyro_vmem.infer.vimco import VIMCO_ELBO

__all__ = [
    "IWAE_ELBO",
    "RELAX_ELBO",
    "RWS_ELBO",
    "VIMCO_ELBO",
    "Choice",
    "DisARM_ELBO",
    "EnumGuard",
    "GlobalDraws_ELBO",
    "ParticleELBO",
    "Particles",
    "RaoBlackwell_ELBO",
    "Reinforce_ELBO",
    "StraightThrough_ELBO",
    "Terms",
    "UnorderedSet_ELBO",
    "check_objective",
    "choose",
]
check_entries(globals(), in_steps=("Particles", "Terms"))
