"""What a lookup gains and what the memory is worth, in nats."""

from pyro_vmem.diagnostics.evidence import log_evidence, slot_log_evidence
from pyro_vmem.diagnostics.few_shot import FewShotEvaluation, evaluate
from pyro_vmem.diagnostics.information import address_entropy, information_gain

__all__ = [
    "FewShotEvaluation",
    "address_entropy",
    "evaluate",
    "information_gain",
    "log_evidence",
    "slot_log_evidence",
]
