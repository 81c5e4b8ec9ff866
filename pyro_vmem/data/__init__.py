"""Images by class and alphabet, and the episodes drawn from them."""

from pyro_vmem.data.dataset import FewShotDataset
from pyro_vmem.data.episodes import Episode, EpisodeSampler
from pyro_vmem.data.glyphs import glyphs
from pyro_vmem.data.omniglot import omniglot
from pyro_vmem.data.sources import from_folder, from_npz, mnist

__all__ = [
    "Episode",
    "EpisodeSampler",
    "FewShotDataset",
    "from_folder",
    "from_npz",
    "glyphs",
    "mnist",
    "omniglot",
]
