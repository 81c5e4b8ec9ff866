"""Models made of parts: the VMA, the baselines and the linear-Gaussian reference."""

from pyro_vmem._utils.checks import check_entries
from pyro_vmem.model.baselines import (
    NoMemoryVAE,
    SetStatisticsVAE,
    SoftAttentionDecoder,
    SoftAttentionGuide,
    SoftAttentionVAE,
    UniformGuide,
)
from pyro_vmem.model.indexing import KeyRefresher, Staleness, add_templates, index_memory, staleness
from pyro_vmem.model.linear_gaussian import LinearGaussianMemory
from pyro_vmem.model.lookup import Lookup
from pyro_vmem.model.vma import VMA

__all__ = [
    "VMA",
    "KeyRefresher",
    "LinearGaussianMemory",
    "Lookup",
    "NoMemoryVAE",
    "SetStatisticsVAE",
    "SoftAttentionDecoder",
    "SoftAttentionGuide",
    "SoftAttentionVAE",
    "Staleness",
    "UniformGuide",
    "add_templates",
    "index_memory",
    "staleness",
]
check_entries(globals(), methods=True)
