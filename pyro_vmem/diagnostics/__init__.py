"""What a lookup gains, what the memory is worth, and how far such figures can be trusted.

Nothing here trains: the weights of a model stay as they are.
"""

from pyro_vmem._utils.checks import check_entries
from pyro_vmem.diagnostics.address_quality import (
    Agreement,
    ReliabilityCurve,
    agreement,
    calibration_error,
    hit_rate,
    top_k_hit_rate,
)
from pyro_vmem.diagnostics.calibration import Calibration, sbc
from pyro_vmem.diagnostics.contribution import Contribution, contribution, slot_contribution
from pyro_vmem.diagnostics.diagnose import diagnose
from pyro_vmem.diagnostics.evidence import Evidence, estimate_evidence, log_evidence
from pyro_vmem.diagnostics.evidence_bounds import EvidenceBounds, evidence_bounds
from pyro_vmem.diagnostics.evidence_indexed import TopKBounds, top_k_bounds
from pyro_vmem.diagnostics.evidence_refined import RefineConfig
from pyro_vmem.diagnostics.export import to_arviz, to_datatree
from pyro_vmem.diagnostics.few_shot import FewShotEvaluation, evaluate
from pyro_vmem.diagnostics.information import InformationSummary, address_entropy, information_gain, information_summary
from pyro_vmem.diagnostics.slot_weights import slot_log_evidence
from pyro_vmem.diagnostics.weights import effective_sample_size, pareto_k, standard_error

__all__ = [
    "Agreement",
    "Calibration",
    "Contribution",
    "Evidence",
    "EvidenceBounds",
    "FewShotEvaluation",
    "InformationSummary",
    "RefineConfig",
    "ReliabilityCurve",
    "TopKBounds",
    "address_entropy",
    "agreement",
    "calibration_error",
    "contribution",
    "diagnose",
    "effective_sample_size",
    "estimate_evidence",
    "evaluate",
    "evidence_bounds",
    "hit_rate",
    "information_gain",
    "information_summary",
    "log_evidence",
    "pareto_k",
    "sbc",
    "slot_contribution",
    "slot_log_evidence",
    "standard_error",
    "to_arviz",
    "to_datatree",
    "top_k_bounds",
    "top_k_hit_rate",
]

check_entries(globals())
