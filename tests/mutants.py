"""Thirty faults put into the code one by one, and the test of `make test` that catches each.

`python tests/mutants.py` writes tests/mutants.md, five minutes on one core. A fault that no test catches is an error.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
NEEDED = ("pyro_vmem", "tests", "benchmarks", "conftest.py", "pyproject.toml")

# A file, what stands in it once, what stands there instead, and the file of tests, by default all of its folder.
MUTANTS = [
    ("infer/vimco.py", "bound - leave_one_out(", "bound + leave_one_out(", "test_vimco.py"),
    ("infer/vimco.py", "math.log(count - 1)", "math.log(count)", "test_vimco.py"),
    ("infer/vimco.py", "keepdim=True) / (count - 1)", "keepdim=True) / count", "test_vimco.py"),
    ("infer/rws.py", "share = log_weights.detach().softmax(0)", "share = log_weights.softmax(0)", ""),
    ("infer/rws.py", "(1 - self.share) * q + self.share", "self.share * q + self.share", ""),
    (
        "infer/iwae.py",
        "particles.score_sum(bound.detach()",
        "particles.score_sum(-bound.detach()",
        "test_objectives.py",
    ),
    ("infer/reinforce.py", "* count / (count - 1)", "* (count - 1) / count", "test_objectives.py"),
    ("infer/rao_blackwell.py", "(1.0 - q_top.sum", "(1.1 - q_top.sum", "test_objectives.py"),
    ("infer/unordered_set.py", "(signal - baseline) * log_q", "(signal + baseline) * log_q", "test_more_estimators.py"),
    ("infer/disarm.py", "[noise, 1 - noise]", "[noise, noise]", "test_more_estimators.py"),
    ("infer/elbo.py", "loss = -particles.scale * value.sum()", "loss = -value.sum()", ""),
    (
        "infer/resampled_backward.py",
        "factor = 1 / (elbo.backward",
        "factor = 1 / (2 * elbo.backward",
        "test_resampled_backward.py",
    ),
    ("diagnostics/weights.py", "return self._variances.sum(0).sqrt()", "return self._variances.sum(0)", ""),
    ("diagnostics/weights.py", "(self.counts - 1).clamp(min=1)", "self.counts.clamp(min=1)", ""),
    ("diagnostics/information.py", "(log_q - log_p))", "(log_q + log_p))", "test_information.py"),
    ("diagnostics/information.py", "return -(log_q.exp()", "return (log_q.exp()", "test_information.py"),
    ("diagnostics/calibration.py", "rank = below + (torch", "rank = 1 + below + (torch", "test_calibration.py"),
    ("diagnostics/calibration.py", "(probs * (probs > own))", "(probs * (probs >= own))", "test_calibration.py"),
    (
        "diagnostics/contribution.py",
        "_without_each(joint) - _without",
        "_without_each(joint) + _without",
        "test_contribution.py",
    ),
    ("diagnostics/address_quality.py", "(accuracy - mean).abs()", "(accuracy - mean)", "test_address_quality.py"),
    ("diagnostics/slot_weights.py", "mT - math.log(num_samples)", "mT", ""),
    ("diagnostics/evidence.py", "log_evidence + half_width(error) < least", "log_evidence < least", ""),
    ("memory/memory.py", "offset = num_slots * torch", "offset = 0 * torch", ""),
    ("memory/packed.py", "return rows.to(dtype) / 255", "return rows.to(dtype) / 256", ""),
    ("memory/packed.py", "is_added = at >= len(self.packed)", "is_added = at > len(self.packed)", ""),
    ("memory/growing.py", "self._used[0] == before and", "", "test_changes.py"),
    ("memory/encoded.py", "all(map(torch.equal, kept.weights", "any(map(torch.equal, kept.weights", ""),
    ("memory/index.py", "top.indices + start", "top.indices", "test_index.py"),
    ("memory/index.py", "self._index.update_vectors(slots", "(lambda *_: None)(slots", "test_index.py"),
    ("memory/index.py", "        self._hide(slots.cpu())\n", "", "test_index.py"),
]


def caught_by(folder: Path, file: str, was: str, becomes: str, tests: str) -> str | None:
    """The first test that fails when the code is changed so."""
    path = folder / "pyro_vmem" / file
    source = path.read_text()
    if source.count(was) != 1:
        raise ValueError(f"{file}: expected {was!r} once, got it {source.count(was)} times.")
    path.write_text(source.replace(was, becomes))
    call = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not long", "-p", "no:cacheprovider"]
    call.append(f"tests/{Path(file).parent}/{tests}")
    try:
        output = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False).stdout
    finally:
        path.write_text(source)
    found = re.search(r"^(?:FAILED|ERROR) tests/(\S+\.py::\w+)", output, re.MULTILINE)
    return found and found[1]


def main() -> None:
    """Tries all, and writes the table."""
    lines = ["# Faults and the tests that catch them", "", "Written by `python tests/mutants.py`.", ""]
    lines += ["| file | was | becomes | caught by |", "|---|---|---|---|"]
    missed = 0
    with tempfile.TemporaryDirectory() as made:
        for name in NEEDED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, Path(made, name))
        for file, was, becomes, tests in MUTANTS:
            test = caught_by(Path(made), file, was, becomes, tests)
            missed += test is None
            cells = [f"`{text.strip()}`" if text.strip() else "nothing" for text in (file, was, becomes, test or "")]
            lines.append(f"| {' | '.join(cells)} |")
            sys.stderr.write(f"{lines[-1]}\n")
    (Path(__file__).parent / "mutants.md").write_text("\n".join(lines) + "\n")
    if missed:
        sys.exit(f"{missed} faults were not caught.")


if __name__ == "__main__":
    main()
