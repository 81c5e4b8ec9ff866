"""Figures of memories, addresses and training.

Each function draws arrays on the Axes, or on the empty figure or subfigure, that it is given, and returns it. Arrays
are torch tensors or NumPy arrays. Images are `(C, H, W)` in [0, 1], with one channel (1 is ink, drawn dark) or three
channels (colours). Text, axes and background follow the matplotlib settings of the caller. Data colours suit
colour-blind readers, on white and on dark pages. `ON_ANY_PAGE` has settings for a figure that goes on both.
"""

from pyro_vmem._utils.checks import check_entries
from pyro_vmem.plots._style import ON_ANY_PAGE
from pyro_vmem.plots.addresses import address_heat_map, lookups
from pyro_vmem.plots.calibration import khat_scatter, reliability_diagram, sbc_histograms
from pyro_vmem.plots.curves import learning_curves
from pyro_vmem.plots.graphical_model import graphical_model
from pyro_vmem.plots.information import evidence_by_memory, information_gain_against_slots, information_gain_histogram
from pyro_vmem.plots.pictures import completions, images, one_shot_generations

__all__ = [
    "ON_ANY_PAGE",
    "address_heat_map",
    "completions",
    "evidence_by_memory",
    "graphical_model",
    "images",
    "information_gain_against_slots",
    "information_gain_histogram",
    "khat_scatter",
    "learning_curves",
    "lookups",
    "one_shot_generations",
    "reliability_diagram",
    "sbc_histograms",
]
check_entries(globals())
