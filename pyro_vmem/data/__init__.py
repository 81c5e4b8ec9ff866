"""Data sets of images by class and alphabet, and episodes drawn from them."""

from pyro_vmem._utils.checks import check_entries
from pyro_vmem.data.dataset import FewShotDataset
from pyro_vmem.data.episodes import Episode, EpisodeSampler, MixedEpisodes, merge_episodes
from pyro_vmem.data.glyphs import glyphs
from pyro_vmem.data.image_folder import from_folder
from pyro_vmem.data.library import LibraryEpisodes
from pyro_vmem.data.mnist import mnist
from pyro_vmem.data.npz import from_npz
from pyro_vmem.data.omniglot import omniglot
from pyro_vmem.data.one_shot_trials import OneShotTrial, one_shot_trials, within_alphabet_trials
from pyro_vmem.data.protocols import PROTOCOLS, Protocol, ProtocolEpisodes, protocol
from pyro_vmem.data.recall import RecallSampler
from pyro_vmem.data.warped import Affine, WarpedEpisodes

__all__ = [
    "PROTOCOLS",
    "Affine",
    "Episode",
    "EpisodeSampler",
    "FewShotDataset",
    "LibraryEpisodes",
    "MixedEpisodes",
    "OneShotTrial",
    "Protocol",
    "ProtocolEpisodes",
    "RecallSampler",
    "WarpedEpisodes",
    "from_folder",
    "from_npz",
    "glyphs",
    "merge_episodes",
    "mnist",
    "omniglot",
    "one_shot_trials",
    "protocol",
    "within_alphabet_trials",
]
check_entries(globals(), in_steps=("Episode",), methods=True)
