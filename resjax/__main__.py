"""The command `resjax`, and `python -m resjax`."""

import sys

from resjax.machine import restart_with_huge_pages

COMPUTE = {"train", "sweep", "evaluate", "predict", "features", "probe"}
"""The commands that run networks."""


def main() -> int:
    """Runs one command and returns its exit code."""
    if COMPUTE.intersection(sys.argv[1:2]):
        restart_with_huge_pages()
    from resjax import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
