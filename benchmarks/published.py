"""Published few-shot likelihoods, once: what `python -m benchmarks.tables` puts beside ours.

NLL in nats per image. Marks: "seen", read in the source; "quoted", read in a source that quotes it; "recalled", from
memory of the source and to be checked before anything rests on it.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ACCURACY", "CURVES", "LIKELIHOODS", "Published"]


@dataclass(frozen=True)
class Published:
    """A row of a published table.

    Attributes:
        who: Whose figures, of which model.
        protocol: The protocol that they were measured under, as far as its source says.
        n_classes: Classes in memory; None where there is no memory.
        nll: NLL by the number of items in memory, all classes together.
        mark: "seen", "quoted" or "recalled".
        note: What has to be said with it.
    """

    who: str
    protocol: str
    n_classes: int | None
    nll: dict[int, float]
    mark: str
    note: str = ""


_T = (1, 2, 3, 4, 5, 10, 19)
_UNRESOLVED = "28x28 or 26x26: its source does not settle which images"


def _vma(n_classes: int, mark: str, *nll: float) -> Published:
    return Published("VMA (Bornschein et al., 2017), table 1", "unresolved", n_classes, _row(nll), mark, _UNRESOLVED)


def _zholus(n_classes: int, *nll: float) -> Published:
    note = "1.12 M parameters, 100,000 steps of 256 targets, two GPUs"
    return Published("re-implementation by artemZholus (PyTorch)", "zholus", n_classes, _row(nll), "seen", note)


def _gmn(who: str, n_classes: int, nll: dict[int, float]) -> Published:
    return Published(who, "gmn", n_classes, nll, "seen", "a target may be a copy of an item")


def _row(nll: tuple[float, ...]) -> dict[int, float]:
    return dict(zip(_T, nll, strict=True))


LIKELIHOODS = [
    _vma(1, "quoted", 86.5, 83.0, 79.6, 79.0, 76.5, 76.2, 73.9),
    _vma(2, "quoted", 87.5, 83.3, 80.9, 79.3, 79.1, 77.0, 75.0),
    _vma(4, "recalled", 87.5, 83.3, 81.2, 80.7, 79.5, 78.6, 76.7),
    _vma(8, "recalled", 89.6, 85.1, 81.5, 81.9, 81.3, 79.8, 77.0),
    _zholus(1, 85.23, 79.77, 77.50, 76.17, 75.30, 73.21, 71.83),
    _zholus(2, 85.19, 82.67, 80.06, 78.48, 77.53, 75.22, 73.54),
    _gmn(
        "GMN v1 (Bartunov, Vetrov, 2017), trained with C = 2", 1, {0: 89.3, 1: 83.4, 2: 79.6, 3: 77.2, 4: 75.3, 9: 66.7}
    ),
    _gmn(
        "GMN v1 (Bartunov, Vetrov, 2017), trained with C = 2", 2, {0: 89.2, 1: 86.6, 2: 85.0, 3: 83.5, 4: 81.6, 9: 75.9}
    ),
    _gmn(
        "GMN v1 (Bartunov, Vetrov, 2017), trained with C = 2", 4, {0: 88.8, 1: 88.0, 2: 87.9, 3: 86.6, 4: 85.6, 9: 82.5}
    ),
    _gmn('GMN "average" model, which cannot copy', 1, {1: 83.9, 2: 82.3, 3: 81.8, 4: 81.1, 9: 80.3}),
    Published("VAE without memory (of the GMN paper)", "gmn", None, {0: 89.2}, "seen"),
]

CURVES = {
    (
        "scaling",
        "baselines",
    ): "Up to 144 classes the VMA stays near the line of the one-class NLL + log C. Soft attention degrades quickly.",
    ("breakdown",): "With more examples per class, KL(a) rises from 2.0 to 4.5, KL(z) falls from 28.2 to 21.8 and NLL "
    "from 75.1 to 69.1, on its own images.",
    ("vma-45-5",): "NLL is 90.8 without memory, 73.4 with the best soft attention and 68.8 with the best VMA.",
    ("mnist-learned",): "KL(a) is about 2.5 nats for 64 to 1,024 learned templates.",
    (
        "mnist-recall",
    ): "Bound and KL(a) approach log 256 = 5.55 nats after about 100,000 steps. With up to 2,048 unseen "
    "images in memory NLL stays close to log 2048 = 7.62.",
}
"""What VMA (Bornschein et al., 2017) says of its curves, by our tables of the same; recalled."""

ACCURACY = {(5, 1): 0.91, (5, 5): 0.97, (20, 1): 0.77, (20, 5): 0.90}
"""Few-shot classification by q(a | M, x), by (ways, shots): VMA (Bornschein et al., 2017); recalled."""
