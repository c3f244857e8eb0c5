"""`python -m splitkern`."""

import sys

from splitkern.cli import main

if __name__ == "__main__":
    sys.exit(main())
