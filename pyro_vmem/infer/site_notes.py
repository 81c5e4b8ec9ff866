"""The notes that a proposal leaves at a guide's site, and that the particles read.

They are keys of the site's `infer` dict, the one place where Pyro lets a handler keep something beside a value.
"""

from __future__ import annotations

__all__ = ["OWN", "PATH"]

# The PathWeight of a value: by which factor its gradient is multiplied on its way to the guide.
PATH = "pyro_vmem_path"
# The guide's own distribution, where the value was drawn from another one, such as a defensive mixture.
OWN = "pyro_vmem_own"
