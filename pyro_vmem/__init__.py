"""Variational memory addressing in Pyro: generative models that look things up in a memory."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyro_vmem._utils.version import __version__

if TYPE_CHECKING:
    from pyro_vmem import config, data, diagnostics, distributions, infer, memory, model, parts, plots, train
    from pyro_vmem.config.build import build, load
    from pyro_vmem.memory import EncodedMemory, Memory, PackedMemory, Template
    from pyro_vmem.model import VMA, LinearGaussianMemory, baselines
    from pyro_vmem.parts import (
        AddressGuide,
        AddressPrior,
        BernoulliDecoder,
        CategoricalDecoder,
        CausalBernoulliDecoder,
        ClassBalancedPrior,
        ContentPrior,
        DefensiveGuide,
        DiscretisedLogisticDecoder,
        EncoderGuide,
        ExtraTemplates,
        FlowGuide,
        FlowPrior,
        FullCovarianceGuide,
        FullCovariancePrior,
        GaussianDecoder,
        GaussianGuide,
        IndexedGuide,
        LatentGuide,
        LatentPrior,
        LearnedPrior,
        LearnedTemplates,
        Likelihood,
        PairwiseGuide,
        Part,
        SimilarityGuide,
        StandardPrior,
        TemperedPrior,
        TemplatePrior,
        Templates,
        TruncatedGuide,
        UniformPrior,
        over_slots,
    )
    from pyro_vmem.train import FitResult, Trainer, TrainingConfig, validate
    from pyro_vmem.train.fit import fit

__all__ = [
    "VMA",
    "AddressGuide",
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
    "ExtraTemplates",
    "FitResult",
    "FlowGuide",
    "FlowPrior",
    "FullCovarianceGuide",
    "FullCovariancePrior",
    "GaussianDecoder",
    "GaussianGuide",
    "IndexedGuide",
    "LatentGuide",
    "LatentPrior",
    "LearnedPrior",
    "LearnedTemplates",
    "Likelihood",
    "LinearGaussianMemory",
    "Memory",
    "PackedMemory",
    "PairwiseGuide",
    "Part",
    "SimilarityGuide",
    "StandardPrior",
    "TemperedPrior",
    "Template",
    "TemplatePrior",
    "Templates",
    "Trainer",
    "TrainingConfig",
    "TruncatedGuide",
    "UniformPrior",
    "__version__",
    "baselines",
    "build",
    "config",
    "data",
    "diagnostics",
    "distributions",
    "fit",
    "infer",
    "load",
    "memory",
    "model",
    "over_slots",
    "parts",
    "plots",
    "train",
    "validate",
]

_FOLDERS = ("config", "data", "diagnostics", "distributions", "infer", "memory", "model", "parts", "plots", "train")


def __getattr__(name: str) -> Any:
    """Imports public names lazily, so that `pyro-vmem --help` does not import torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _FOLDERS:
        return import_module(f"pyro_vmem.{name}")
    folders = (import_module(f"pyro_vmem.{folder}") for folder in ("memory", "parts", "model", "train", "config"))
    globals()[name] = value = next(getattr(folder, name) for folder in folders if hasattr(folder, name))
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
