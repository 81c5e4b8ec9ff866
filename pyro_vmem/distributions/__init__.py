"""Distributions that Pyro lacks."""

from pyro_vmem._utils.checks import check_entries
from pyro_vmem.distributions.autoregressive import CausalBernoulli
from pyro_vmem.distributions.causal_network import CausalNetwork
from pyro_vmem.distributions.discretised import CategoricalLevels, DiscretisedLogistic
from pyro_vmem.distributions.sparse_categorical import MixedCategorical, SparseCategorical, TruncatedCategorical
from pyro_vmem.distributions.uniform_categorical import UniformCategorical

__all__ = [
    "CategoricalLevels",
    "CausalBernoulli",
    "CausalNetwork",
    "DiscretisedLogistic",
    "MixedCategorical",
    "SparseCategorical",
    "TruncatedCategorical",
    "UniformCategorical",
]
check_entries(globals(), in_steps=__all__)
