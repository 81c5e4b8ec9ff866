"""Every objective at the same number of decodes: bias and noise of the address guide's gradient, and who learns fast.

Noise: the variance of the gradient of the address guide's parameters, summed over parameters, and its signal-to-noise
ratio, the norm of the mean over the square root of that variance; on the reference model and on images, with the guide
at initialisation and trained. Objectives have different gradients, so `snr_ratio` (over VIMCO's) compares better than
variances.

A learned control variate is trained on each case first, for three steps per draw of the gradient.

Bias, on the reference model at initialisation (of a trained guide's gradient only rare draws are left): the
distance of the mean gradient from the exact one, as a share of its norm and in standard errors (the largest over
parameters). What it is compared with is the gradient of what the objective states: the ELBO, the posterior's KL for
wake-sleep, and the K-particle bound where all S^K draws can be summed. Truncation is compared with the whole ELBO: its
bias is what truncation leaves out.

Race, on the reference model: after the same seconds of processor time from the same start, how far the guide's bound is
below the exact evidence, in nats per datapoint, on held-out data.

    python -m benchmarks.estimators
    python -m benchmarks.estimators --json --repeats 400 --figure docs/objectives.png
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer import TraceEnum_ELBO, config_enumerate
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

import pyro_vmem as pv
from benchmarks import command
from pyro_vmem.infer import (
    IWAE_ELBO,
    RELAX_ELBO,
    RWS_ELBO,
    VIMCO_ELBO,
    ParticleELBO,
    RaoBlackwell_ELBO,
    Reinforce_ELBO,
    UnorderedSet_ELBO,
)
from pyro_vmem.infer.elbo import log_mean_exp

DECODES = 4
MOST_STATES = 5000  # draws of K addresses that are summed to get the exact gradient of a K-particle bound

Loss = Callable[[pv.VMA, pv.Memory, Tensor], Tensor]


@dataclass
class Sampled:
    """The loss of an objective of particles."""

    elbo: ParticleELBO

    def __call__(self, vma: pv.VMA, memory: pv.Memory, x: Tensor) -> Tensor:
        """The loss in nats, summed over the datapoints."""
        loss: Tensor = self.elbo.differentiable_loss(vma.model, vma.guide, vma.encode(memory), x)
        return loss

    def parameters(self) -> list[Tensor]:
        """The parameters of the objective itself: those of a learned control variate, if it has one."""
        return list(self.elbo.module.parameters()) if self.elbo.module is not None else []


def summed(vma: pv.VMA, memory: pv.Memory, x: Tensor) -> Tensor:
    """The loss of stock enumeration."""
    guide = config_enumerate(vma.guide, "parallel", expand=True)
    return TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(vma.model, guide, vma.encode(memory), x)


def truncated(vma: pv.VMA, memory: pv.Memory, x: Tensor) -> Tensor:
    """The loss of stock enumeration over the most probable addresses."""
    return summed(with_guide(vma, pv.TruncatedGuide(vma.address_guide, DECODES)), memory, x)


def with_guide(vma: pv.VMA, guide: pv.AddressGuide) -> pv.VMA:
    """The same model with another address guide."""
    return pv.VMA(
        vma.address_prior, vma.latent_prior, vma.likelihood, guide, vma.latent_guide, vma.template_encoder, name="other"
    )


def objectives() -> dict[str, Loss]:
    """Each with four decoder passes per datapoint, but for `enumerate`."""
    return {
        "vimco": Sampled(VIMCO_ELBO(DECODES, max_plate_nesting=1)),
        "vimco, geometric": Sampled(VIMCO_ELBO(DECODES, "geometric", max_plate_nesting=1)),
        "iwae": Sampled(IWAE_ELBO(DECODES, max_plate_nesting=1)),
        "rws": Sampled(RWS_ELBO(DECODES, max_plate_nesting=1)),
        "rws, defensive": Sampled(RWS_ELBO(DECODES, defensive=0.2, max_plate_nesting=1)),
        "reinforce": Sampled(Reinforce_ELBO(DECODES, max_plate_nesting=1)),
        "rao-blackwell": Sampled(RaoBlackwell_ELBO(DECODES - 1, max_plate_nesting=1)),
        "without replacement": Sampled(UnorderedSet_ELBO(DECODES, max_plate_nesting=1)),
        "relax": Sampled(RELAX_ELBO(DECODES, max_plate_nesting=1)),
        "truncated": truncated,
        "enumerate": summed,
    }


# Models


def reference(slots: int, trained: bool) -> tuple[pv.VMA, pv.Memory, Tensor]:
    """The reference model with a similarity guide; trained on the exact ELBO, which has no noise of its own."""
    torch.manual_seed(slots)
    model = pv.LinearGaussianMemory(dim=8, latent_dim=2, generator=torch.Generator().manual_seed(0))
    vma = model.vma(address_guide=pv.SimilarityGuide(8, embed_dim=8, normalise="dot", temperature=1.0, tied=False))
    memory = pv.Memory(torch.randn(slots, 8))
    x = torch.cat([vma.model(memory) for _ in range(64)]).detach()
    if trained:
        optimizer = torch.optim.Adam(vma.address_guide.parameters(), lr=0.02)
        for _ in range(600):
            log_q, log_joint = states(vma, memory, x)
            optimizer.zero_grad()
            (-(log_q.exp() * (log_joint - log_q)).sum(-1).mean()).backward()
            optimizer.step()
    return vma, memory, x


def states(vma: pv.VMA, memory: pv.Memory, x: Tensor) -> tuple[Tensor, Tensor]:
    """log q(a | M, x) and log p(a, x | M) of every slot, each `(B, S)`; the reference model's, in closed form."""
    encoded = vma.encode(memory)
    model = vma.latent_prior.reference
    log_joint = vma.address_prior(encoded).logits + model.slot_log_evidence(memory, x)
    return vma.address_guide(encoded, vma.encode_x(x)).logits, log_joint.detach()


def images(data: str, steps: int) -> tuple[pv.VMA, pv.Memory, Tensor]:
    """A small convolutional model, after some steps of VIMCO."""
    whole = pv.data.glyphs() if data == "letters" else pv.data.omniglot(subset="background")
    train, _ = whole.split(seed=0)
    episodes = pv.data.EpisodeSampler(train, n_way=16, k_shot=1, n_query=2, seed=0)
    torch.manual_seed(0)
    vma = pv.VMA.for_images(train.image_shape, latent_dim=16, num_features=64, width=16)
    if steps:
        pv.fit(vma, episodes, steps=steps)
    episode = episodes[10**6]
    return vma, episode.memory, episode.x


# Bias and noise


def gradient(loss: Tensor, vma: pv.VMA, datapoints: int) -> Tensor:
    """The gradient of the loss per datapoint, of the address guide's parameters."""
    grads = torch.autograd.grad(loss / datapoints, list(vma.address_guide.parameters()))
    return torch.cat([g.flatten() for g in grads])


def train_control(loss: Sampled, vma: pv.VMA, memory: pv.Memory, x: Tensor, steps: int) -> None:
    """Trains an objective's own parameters on a model that stays as it is."""
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        for parameter, grad in zip(
            loss.parameters(), torch.autograd.grad(loss(vma, memory, x), loss.parameters()), strict=True
        ):
            parameter.grad = grad
        optimizer.step()


def exact_gradient(name: str, vma: pv.VMA, memory: pv.Memory, x: Tensor) -> Tensor | None:
    """The gradient of what an objective states, on the reference model; `None` if too many states would be summed."""
    log_q, log_joint = states(vma, memory, x)
    if name.startswith("rws"):
        bound = (log_joint.softmax(-1) * log_q).sum(-1)
    elif name.startswith(("vimco", "iwae")):
        if memory.num_slots**DECODES > MOST_STATES:
            return None
        draws = torch.cartesian_prod(*[torch.arange(memory.num_slots)] * DECODES)
        log_weights = (log_joint - log_q)[:, draws]
        bound = (log_q[:, draws].sum(-1).exp() * log_mean_exp(log_weights, -1)).sum(-1)
    else:
        bound = (log_q.exp() * (log_joint - log_q)).sum(-1)
    return gradient(-bound.sum(), vma, len(x))


def measure(vma: pv.VMA, memory: pv.Memory, x: Tensor, repeats: int, with_bias: bool) -> list[dict[str, Any]]:
    """A row an objective."""
    rows = []
    for name, loss in objectives().items():
        if isinstance(loss, Sampled) and loss.parameters():
            train_control(loss, vma, memory, x, steps=3 * repeats)
        count = repeats if name not in ("enumerate", "truncated") else min(repeats, 20)  # hardly any noise
        draws = torch.stack([gradient(loss(vma, memory, x), vma, len(x)) for _ in range(count)])
        variance, mean = float(draws.var(0).sum()), draws.mean(0)
        # the mean's own noise is in its squared norm: take it out
        signal = max(float(mean.square().sum()) - variance / count, 0.0)
        row = {
            "objective": name,
            "decodes": memory.num_slots if name == "enumerate" else DECODES,
            "variance": variance,
            "snr": (signal / variance) ** 0.5 if variance else None,
        }
        target = exact_gradient(name, vma, memory, x) if with_bias else None
        if target is not None:
            off = max(float((mean - target).square().sum()) - variance / count, 0.0)
            error = (draws.var(0) / count).sqrt() + 1e-6 * target.norm() + 1e-9
            row["bias_share"] = off**0.5 / float(target.norm())
            row["bias_in_standard_errors"] = float(((mean - target).abs() / error).max())
        rows.append(row)
    vimco = rows[0]
    for row in rows:
        row["variance_ratio"] = vimco["variance"] / row["variance"] if row["variance"] else None
        row["snr_ratio"] = row["snr"] / vimco["snr"] if row["snr"] and vimco["snr"] else None
    return rows


# Race


def race(slots: int, seconds: float) -> list[dict[str, Any]]:
    """The gap of each objective's guide to the exact evidence after the same time; a row an objective."""
    rows = []
    for name, loss in objectives().items():
        pyro.clear_param_store()
        vma, memory, _ = reference(slots, trained=False)
        own = loss.parameters() if isinstance(loss, Sampled) else []
        optimizer = torch.optim.Adam([*vma.address_guide.parameters(), *own], lr=0.02)
        torch.manual_seed(1)

        def draw(vma: pv.VMA = vma, memory: pv.Memory = memory) -> Tensor:
            with torch.no_grad():
                a = torch.randint(memory.num_slots, (64,))
                template = vma.encode(memory).read(a)
                drawn: Tensor = vma.likelihood(vma.latent_prior(template).sample(), template).sample()
                return drawn

        held_out = torch.cat([draw() for _ in range(16)])
        steps, start = 0, time.process_time()
        while time.process_time() - start < seconds:
            x = draw()
            optimizer.zero_grad()
            (loss(vma, memory, x) / len(x)).backward()
            optimizer.step()
            steps += 1
        guide = pv.TruncatedGuide(vma.address_guide, DECODES) if name == "truncated" else vma.address_guide
        with torch.no_grad():
            log_q, log_joint = states(with_guide(vma, guide), memory, held_out)
            bound = (log_q.exp() * (log_joint - log_q)).sum(-1)
            gap = log_joint.logsumexp(-1) - bound
        rows.append(
            {
                "slots": slots,
                "objective": name,
                "steps": steps,
                "gap_nats": float(gap.mean()),
                "gap_nats_se": float(gap.std() / math.sqrt(len(gap))),
            }
        )
    return rows


def main(
    repeats: int = 100,
    slots: list[int] | None = None,
    image_steps: int = 400,
    race_seconds: float = 1.5,
    figure: str | None = None,
) -> dict[str, Any]:
    """Measures all of it.

    Args:
        repeats: Draws of each gradient.
        slots: The numbers of slots of the reference model; by default 4, 16, 64, 256 and 1,024.
        image_steps: Training steps of the models on letters and on Omniglot; none with 0.
        race_seconds: The training time of each objective in the race.
        figure: Where to draw signal-to-noise ratios and the race against the number of slots; nowhere by default.
    """
    sizes = slots or [4, 16, 64, 256, 1024]
    cases: list[tuple[str, bool, Any]] = []
    for count in sizes:
        cases += [(f"reference, |M| = {count}", trained, (reference, count, trained)) for trained in (False, True)]
    for data in ["letters", *["omniglot"] * ("PYRO_VMEM_DATA" in os.environ)]:
        cases += [(f"{data}, |M| = 16", bool(steps), (images, data, steps)) for steps in {0, image_steps}]
    rows, raced = [], []
    with torch.random.fork_rng(devices=[]):
        for name, trained, (make, *arguments) in tqdm(cases, desc="noise", file=sys.stderr):
            with pyro.get_param_store().scope():
                vma, memory, x = make(*arguments)
                torch.manual_seed(0)
                found = measure(vma, memory, x, repeats, with_bias=make is reference and not trained)
                rows += [{"case": name, "slots": memory.num_slots, "trained": trained, **row} for row in found]
        for count in tqdm(sizes, desc="race", file=sys.stderr):
            with pyro.get_param_store().scope():
                raced += race(count, race_seconds)
    result = {
        "decodes": DECODES,
        "repeats": repeats,
        "race_seconds": race_seconds,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "race": raced,
    }
    if figure is not None:
        draw_figure(result).savefig(figure, dpi=160, bbox_inches="tight")
    return result


def draw_figure(result: dict[str, Any]) -> Figure:
    """Against the number of slots: signal over noise at initialisation, variance once trained, and the race."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    noise, variance, race_axes = figure.subplots(1, 3)
    for index, name in enumerate(objectives()):
        style: dict[str, Any] = {
            "color": f"C{index}" if index < 10 else "black",
            "marker": "o",
            "markersize": 4,
            "label": name,
        }
        own = [row for row in result["rows"] if row["objective"] == name and "reference" in row["case"]]
        for axes, trained, key in ((noise, False, "snr"), (variance, True, "variance_ratio")):
            # what is summed has no noise but that of rounding
            seen = [r for r in own if r["trained"] == trained and r[key] and (r["snr"] or 0) < 1e4]
            if name not in ("enumerate", "truncated"):
                axes.plot([row["slots"] for row in seen], [row[key] for row in seen], **style)
        run = [row for row in result["race"] if row["objective"] == name]
        race_axes.plot([row["slots"] for row in run], [row["gap_nats"] for row in run], **style)
    for axes, title, label in (
        (noise, "Guide at initialisation", "signal over noise of its gradient"),
        (variance, "Guide trained", "variance of VIMCO over own"),
        (race_axes, f"{result['race_seconds']:g} s of training", "gap to log p(x | M), nats"),
    ):
        axes.set_title(title, loc="left")
        axes.set(xscale="log", yscale="log", xlabel="slots |M|", ylabel=label)
        axes.set_xticks(sorted({row["slots"] for row in result["race"]}), minor=False)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3)
    noise.set_yticks([0.2, 0.5, 1, 2, 5], minor=False)
    noise.yaxis.set_major_formatter("{x:g}")
    noise.yaxis.minorticks_off()
    figure.legend(*race_axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def show(result: dict[str, Any]) -> None:
    """Signal-to-noise ratios, biases and the race as tables."""
    console, names = Console(width=max(Console().width, 160)), list(objectives())
    for key, title, shown in (
        ("snr", "signal over noise", "{:.3g}"),
        ("bias_share", "bias, as a share of the exact gradient's norm", "{:.1%}"),
    ):
        table = Table("case", "guide", *names, title=title, title_justify="left")
        for start in range(0, len(result["rows"]), len(names)):
            rows = result["rows"][start : start + len(names)]
            if any(row.get(key) is not None for row in rows):
                cells = [shown.format(row[key]) if row.get(key) is not None else "-" for row in rows]
                table.add_row(rows[0]["case"], "trained" if rows[0]["trained"] else "as built", *cells)
        console.print(table)
    table = Table("slots", *names, title=f"nats below the evidence after {result['race_seconds']:g} s")
    for start in range(0, len(result["race"]), len(names)):
        rows = result["race"][start : start + len(names)]
        table.add_row(str(rows[0]["slots"]), *[f"{row['gap_nats']:.3f}" for row in rows])
    console.print(table)


if __name__ == "__main__":
    command(main, show)
