"""The swappable parts of a model: modules that return a Pyro distribution, and the networks inside them."""

from pyro_vmem._utils.checks import check_entries
from pyro_vmem.parts.address_guides import (
    AddressGuide,
    DefensiveGuide,
    EncoderGuide,
    KeyedGuide,
    PairwiseGuide,
    SimilarityGuide,
)
from pyro_vmem.parts.address_priors import (
    AddressPrior,
    ClassBalancedPrior,
    ContentPrior,
    LearnedPrior,
    TemperedPrior,
    UniformPrior,
    over_slots,
)
from pyro_vmem.parts.decoders import ConvDecoder, Decoder, MLPDecoder, WarpDecoder, log_odds
from pyro_vmem.parts.encoders import ConvEncoder, Encoder, FlatEncoder, MLPEncoder
from pyro_vmem.parts.flows import FlowGuide, FlowPrior
from pyro_vmem.parts.latents import (
    FullCovarianceGuide,
    FullCovariancePrior,
    GaussianGuide,
    LatentGuide,
    LatentPrior,
    StandardPrior,
    TemplatePrior,
)
from pyro_vmem.parts.learned_templates import ExtraTemplates, LearnedTemplates, Templates
from pyro_vmem.parts.likelihoods import (
    BernoulliDecoder,
    CategoricalDecoder,
    CausalBernoulliDecoder,
    DiscretisedLogisticDecoder,
    GaussianDecoder,
    Likelihood,
)
from pyro_vmem.parts.part import Part
from pyro_vmem.parts.truncated_guides import IndexedGuide, TruncatedGuide

__all__ = [
    "AddressGuide",
    "AddressPrior",
    "BernoulliDecoder",
    "CategoricalDecoder",
    "CausalBernoulliDecoder",
    "ClassBalancedPrior",
    "ContentPrior",
    "ConvDecoder",
    "ConvEncoder",
    "Decoder",
    "DefensiveGuide",
    "DiscretisedLogisticDecoder",
    "Encoder",
    "EncoderGuide",
    "ExtraTemplates",
    "FlatEncoder",
    "FlowGuide",
    "FlowPrior",
    "FullCovarianceGuide",
    "FullCovariancePrior",
    "GaussianDecoder",
    "GaussianGuide",
    "IndexedGuide",
    "KeyedGuide",
    "LatentGuide",
    "LatentPrior",
    "LearnedPrior",
    "LearnedTemplates",
    "Likelihood",
    "MLPDecoder",
    "MLPEncoder",
    "PairwiseGuide",
    "Part",
    "SimilarityGuide",
    "StandardPrior",
    "TemperedPrior",
    "TemplatePrior",
    "Templates",
    "TruncatedGuide",
    "UniformPrior",
    "WarpDecoder",
    "log_odds",
    "over_slots",
]
check_entries(globals(), in_steps=("over_slots",))
