"""`python -m fusion`: the same command line as the console script."""

import sys

from fusion.cli import main

if __name__ == "__main__":
    sys.exit(main())
