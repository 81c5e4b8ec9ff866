"""The gain of a lookup, the contribution of a memory, and the reliability of these figures.

Nothing here trains: the weights of a model stay as they are. The functions share some arguments: `vma` is the model
with its guide, `memory` is the memory :math:`M`, and `x` are the targets, with shape `(B, *event)`. `seed` seeds all
draws and leaves the global random state as it is. `max_decodes` is the number of decoder passes that are held in memory
at once: on a CPU more are slower, on a GPU faster. `progress` shows a progress bar.
"""

from pyro_vmem._utils.checks import check_entries
from pyro_vmem.diagnostics.address_quality import ReliabilityCurve, calibration_error, hit_rate
from pyro_vmem.diagnostics.calibration import Calibration, sbc
from pyro_vmem.diagnostics.contribution import Contribution, contribution
from pyro_vmem.diagnostics.diagnose import diagnose
from pyro_vmem.diagnostics.evidence import Evidence, estimate_evidence, log_evidence
from pyro_vmem.diagnostics.evidence_bounds import EvidenceBounds, evidence_bounds
from pyro_vmem.diagnostics.evidence_refined import RefineConfig
from pyro_vmem.diagnostics.export import to_arviz, to_datatree
from pyro_vmem.diagnostics.few_shot import FewShotEvaluation, evaluate
from pyro_vmem.diagnostics.information import InformationSummary, information_gain
from pyro_vmem.diagnostics.one_shot import OneShotErrors, one_shot_errors
from pyro_vmem.diagnostics.sample_quality import SampleQuality, sample_quality
from pyro_vmem.diagnostics.slot_weights import slot_log_evidence
from pyro_vmem.diagnostics.weights import pareto_k

__all__ = [
    "Calibration",
    "Contribution",
    "Evidence",
    "EvidenceBounds",
    "FewShotEvaluation",
    "InformationSummary",
    "OneShotErrors",
    "RefineConfig",
    "ReliabilityCurve",
    "SampleQuality",
    "calibration_error",
    "contribution",
    "diagnose",
    "estimate_evidence",
    "evaluate",
    "evidence_bounds",
    "hit_rate",
    "information_gain",
    "log_evidence",
    "one_shot_errors",
    "pareto_k",
    "sample_quality",
    "sbc",
    "slot_log_evidence",
    "to_arviz",
    "to_datatree",
]
check_entries(globals(), methods=True)
