"""Through how many files and functions of the package a training step goes: what a reader of one has to follow.

Of the second step, so that nothing is counted that is done once. Functions are told apart by file and qualified name;
lambdas, generators and, before Python 3.12, comprehensions are functions too. A generator that goes on is called again.

    python -m benchmarks.calls --list
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import pyro
from torch.utils.data import Dataset

import pyro_vmem as pv

PACKAGE = Path(pv.__file__).resolve().parent
PARTICLES, STEPS = 4, 3


class Calls(Counter[tuple[str, str]]):
    """How often each function of the package is entered, by file and name."""

    def see(self, frame, event, _) -> None:
        """What `sys.setprofile` calls."""
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(PACKAGE):
            self[str(file.relative_to(PACKAGE)), frame.f_code.co_qualname] += 1


class Watched(Dataset):
    """Episodes made beforehand: what is counted begins as the second is handed over, and ends as the third is due."""

    def __init__(self, episodes: list[pv.data.Episode], calls: Calls) -> None:
        self.episodes, self.calls = episodes, calls

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, index: int) -> pv.data.Episode:
        sys.setprofile(self.calls.see if index == 1 else None)
        return self.episodes[index]


def main() -> None:
    """Counts both kinds of a step."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calls", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    parser.add_argument("--list", action="store_true", help="Print the functions by file, with their calls.")
    options = parser.parse_args()
    pyro.set_rng_seed(0)
    train, _ = pv.data.glyphs(size=12, drawings=12).split(seed=0)
    sampler = pv.data.EpisodeSampler(train, n_way=4, k_shot=1, n_query=1, seed=0)
    episodes, vma = [sampler[i] for i in range(STEPS)], pv.VMA.for_images((1, 12, 12), latent_dim=4, width=4)
    steps = {"svi.step(vma.encode(memory), x)": Calls(), "a step inside fit": Calls()}
    in_loop, in_fit = steps.values()
    elbo = pv.infer.VIMCO_ELBO(num_particles=PARTICLES, max_plate_nesting=1)
    svi = pyro.infer.SVI(vma.model, vma.guide, pyro.optim.Adam({"lr": 1e-3}), loss=elbo)
    for index in range(STEPS):
        episode = Watched(episodes, in_loop)[index]
        svi.step(vma.encode(episode.memory), episode.x)
    pv.fit(vma, Watched(episodes, in_fit), elbo, steps=STEPS, progress=False)
    rows = [
        {"step": name, "files": len({file for file, _ in calls}), "functions": len(calls), "calls": calls.total()}
        for name, calls in steps.items()
    ]
    if options.json:
        sys.stdout.write(json.dumps({"python": sys.version.split()[0], "rows": rows}) + "\n")
        return
    for row, calls in zip(rows, steps.values(), strict=True):
        sys.stdout.write(f"{row['step']}: {row['files']} files, {row['functions']} functions, {row['calls']} calls\n")
        for (file, name), count in sorted(calls.items()) if options.list else ():
            sys.stdout.write(f"  {file}  {name}  {count}\n")


if __name__ == "__main__":
    main()
