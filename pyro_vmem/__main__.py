"""`python -m pyro_vmem` is `pyro-vmem`."""

import sys

from pyro_vmem.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
