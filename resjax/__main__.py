"""Lets `python -m resjax` do what `resjax` does."""

import sys

from resjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
