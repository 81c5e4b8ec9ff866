"""Objectives for models with discrete local latents: `pyro.infer.ELBO` subclasses."""

from pyro_vmem.infer.particles import Particles, draw_particles
from pyro_vmem.infer.scaling import scale_sites
from pyro_vmem.infer.terms import Terms
from pyro_vmem.infer.vimco import VIMCO_ELBO

__all__ = ["VIMCO_ELBO", "Particles", "Terms", "draw_particles", "scale_sites"]
