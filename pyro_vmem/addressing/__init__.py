"""Which slot: address priors p(a | M) and address guides q(a | M, x)."""

from pyro_vmem.addressing.base import UNUSED_LOGIT, AddressGuide, AddressPrior, over_slots
from pyro_vmem.addressing.guides import DefensiveGuide, EncoderGuide, KeyedGuide, PairwiseGuide, SimilarityGuide
from pyro_vmem.addressing.priors import ClassBalancedPrior, ContentPrior, LearnedPrior, TemperedPrior, UniformPrior
from pyro_vmem.addressing.sparse import MixedCategorical, TruncatedCategorical, sparse_probs
from pyro_vmem.addressing.top_and_rest import top_and_rest
from pyro_vmem.addressing.truncated import IndexedGuide, TruncatedGuide

__all__ = [
    "UNUSED_LOGIT",
    "AddressGuide",
    "AddressPrior",
    "ClassBalancedPrior",
    "ContentPrior",
    "DefensiveGuide",
    "EncoderGuide",
    "IndexedGuide",
    "KeyedGuide",
    "LearnedPrior",
    "MixedCategorical",
    "PairwiseGuide",
    "SimilarityGuide",
    "TemperedPrior",
    "TruncatedCategorical",
    "TruncatedGuide",
    "UniformPrior",
    "over_slots",
    "sparse_probs",
    "top_and_rest",
]
