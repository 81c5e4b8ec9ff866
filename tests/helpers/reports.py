"""Reports of made-up numbers: a short one, and all that may be in one."""

import dataclasses
import math

import torch

from pyro_vmem.app.report import Report

METRICS = {
    **{"nll": 98.31, "nll_se": 0.42, "nll_wrong_memory": 115.53, "nll_wrong_memory_se": 0.61},
    **{"memory_worth_nats": 17.22, "memory_worth_nats_se": 0.53},
    **{"information_gain": 2.41, "information_gain_se": 0.03},
    **{"information_gain_exact": 2.74, "information_gain_exact_se": 0.02},
    **{"hit_rate": 0.712, "hit_rate_se": 0.021, "hit_rate_exact": 0.803, "hit_rate_exact_se": 0.018},
    **{"chance": 0.05, "n_way": 20, "k_shot": 1, "num_samples": 10, "num_episodes": 20, "num_targets": 400},
    "error_unknown": 0.0,
    **{"training_seconds": 181.7, "steps": 4000},
    **{"evaluation_seconds": 24.6, "decodes": 160_000, "decodes_per_second": 6504.1},
    **{"kl_z": 12.34, "kl_z_se": 0.25, "mutual_information": 2.3, "mutual_information_se": 0.03},
    **{"calibration_error": 0.0712},
}


def a_report(**changes) -> Report:
    generator = torch.Generator().manual_seed(0)
    m = torch.rand(20, 1, 8, 8, generator=generator)
    q = torch.rand(3, 20, generator=generator).softmax(-1)
    report = Report(
        title="A run",
        facts={"data": "glyphs", "seed": "0"},
        metrics=METRICS,
        history=[{"step": s, "bound": -120.0 + s, "val_bound": -121.0 + s, "kl_a": 1.0, "lr": 0.1} for s in (5, 9)],
        information_gain={
            "gain": 3 * torch.rand(4, 5, generator=generator),
            "exact": 3 * torch.rand(4, 5, generator=generator),
            "num_slots": 20,
            "num_classes": 20,
        },
        lookup={
            "targets": m[:3],
            "target_labels": torch.tensor([0, 1, int(q[2].argmax())]),
            "templates": m,
            "labels": torch.arange(20),
            "probabilities": q,
        },
        generation={"templates": m[:2], "samples": m[:10].reshape(2, 5, 1, 8, 8)},
        command="pyro-vmem demo --seed 0",
    )
    return dataclasses.replace(report, **changes)


def everything() -> dict[str, object]:
    """The contents of the sections that a page need not have."""
    lookup = a_report().lookup
    q = lookup["probabilities"]
    p = q.flip(-1)
    three = torch.tensor([0.2, 0.5, 0.9])
    return {
        "lookup": lookup | {"exact": p},
        "addresses": {name: lookup[name] for name in ("labels", "target_labels")} | {"probabilities": q, "exact": p},
        "completion": {
            "targets": lookup["targets"],
            "mask": torch.arange(8) < 4,
            "samples": lookup["templates"][:12].reshape(3, 4, 1, 8, 8),
        },
        "evidence": {"right": -three, "wrong": -30 * three, "blank": -3000 * three},
        "reliability": {"confidence": three, "accuracy": three.square(), "count": torch.tensor([1, 2, 3])},
        "khat": torch.tensor([0.3, 0.9, math.inf, math.nan]),
    }
