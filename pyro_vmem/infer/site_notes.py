"""The notes that a proposal leaves at a guide's site, and that the particles read.

They are keys of the site's `infer` dict, the one place where Pyro lets a handler keep something beside a value.
"""

from __future__ import annotations

__all__ = ["OWN", "PATH", "RELAXED", "SCORE"]

# The PathWeight of a value: by which factor its gradient is multiplied on its way to the guide.
PATH = "pyro_vmem_path"
# The guide's own distribution, where the value was drawn from another one, such as a defensive mixture.
OWN = "pyro_vmem_own"
# What the gradient of a control variate adds to a site's score function, three numbers for each draw.
RELAXED = "pyro_vmem_relaxed"
# The distribution whose log-probability, up to its value, is a site's score function.
SCORE = "pyro_vmem_score"
