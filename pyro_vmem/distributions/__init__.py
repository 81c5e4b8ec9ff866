"""Distributions that Pyro lacks."""

from pyro_vmem._utils.checks import check_entries
from pyro_vmem.distributions.autoregressive import CausalBernoulli
from pyro_vmem.distributions.causal_network import CausalNetwork
from pyro_vmem.distributions.discretised import CategoricalLevels, DiscretisedLogistic
from pyro_vmem.distributions.masking import UNUSED_LOGIT, excluding
from pyro_vmem.distributions.sparse_categorical import (
    MixedCategorical,
    SparseCategorical,
    TruncatedCategorical,
    sparse_parts,
    top,
    top_and_rest,
)

__all__ = [
    "UNUSED_LOGIT",
    "CategoricalLevels",
    "CausalBernoulli",
    "CausalNetwork",
    "DiscretisedLogistic",
    "MixedCategorical",
    "SparseCategorical",
    "TruncatedCategorical",
    "excluding",
    "sparse_parts",
    "top",
    "top_and_rest",
]
check_entries(globals(), in_steps=__all__)
