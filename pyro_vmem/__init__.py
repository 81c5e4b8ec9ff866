"""Variational memory addressing in Pyro: generative models that look things up in a memory."""

from pyro_vmem import baselines, data, diagnostics, index, infer, nn
from pyro_vmem._version import __version__
from pyro_vmem.addressing import (
    AddressGuide,
    AddressPrior,
    ClassBalancedPrior,
    ContentPrior,
    DefensiveGuide,
    EncoderGuide,
    IndexedGuide,
    KeyedGuide,
    LearnedPrior,
    PairwiseGuide,
    SimilarityGuide,
    TemperedPrior,
    TruncatedGuide,
    UniformPrior,
    over_slots,
)
from pyro_vmem.build import build, load
from pyro_vmem.flows import FlowGuide, FlowPrior
from pyro_vmem.index import AddressIndex, ExactIndex, FaissIndex
from pyro_vmem.keys import KeyRefresher, add_templates, index_memory, staleness
from pyro_vmem.latent import (
    FullCovarianceGuide,
    FullCovariancePrior,
    GaussianGuide,
    LatentGuide,
    LatentPrior,
    StandardPrior,
    TemplatePrior,
)
from pyro_vmem.likelihood import (
    BernoulliDecoder,
    CategoricalDecoder,
    CausalBernoulliDecoder,
    DiscretisedLogisticDecoder,
    GaussianDecoder,
    Likelihood,
)
from pyro_vmem.memory import EncodedMemory, Memory, Template
from pyro_vmem.packed import LazyMemory, PackedMemory
from pyro_vmem.part import Part
from pyro_vmem.pretrained import from_pretrained, model_card, pretrained_names
from pyro_vmem.reference import LinearGaussianMemory
from pyro_vmem.sharded import ShardedIndex, ShardedMemory
from pyro_vmem.templates import ExtraTemplates, LearnedTemplates, Templates
from pyro_vmem.training import FitResult, fit
from pyro_vmem.validation import validate
from pyro_vmem.vma import VMA

__all__ = [
    "VMA",
    "AddressGuide",
    "AddressIndex",
    "AddressPrior",
    "BernoulliDecoder",
    "CategoricalDecoder",
    "CausalBernoulliDecoder",
    "ClassBalancedPrior",
    "ContentPrior",
    "DefensiveGuide",
    "DiscretisedLogisticDecoder",
    "EncodedMemory",
    "EncoderGuide",
    "ExactIndex",
    "ExtraTemplates",
    "FaissIndex",
    "FitResult",
    "FlowGuide",
    "FlowPrior",
    "FullCovarianceGuide",
    "FullCovariancePrior",
    "GaussianDecoder",
    "GaussianGuide",
    "IndexedGuide",
    "KeyRefresher",
    "KeyedGuide",
    "LatentGuide",
    "LatentPrior",
    "LazyMemory",
    "LearnedPrior",
    "LearnedTemplates",
    "Likelihood",
    "LinearGaussianMemory",
    "Memory",
    "PackedMemory",
    "PairwiseGuide",
    "Part",
    "ShardedIndex",
    "ShardedMemory",
    "SimilarityGuide",
    "StandardPrior",
    "TemperedPrior",
    "Template",
    "TemplatePrior",
    "Templates",
    "TruncatedGuide",
    "UniformPrior",
    "__version__",
    "add_templates",
    "baselines",
    "build",
    "data",
    "diagnostics",
    "fit",
    "from_pretrained",
    "index",
    "index_memory",
    "infer",
    "load",
    "model_card",
    "nn",
    "over_slots",
    "pretrained_names",
    "staleness",
    "validate",
]
