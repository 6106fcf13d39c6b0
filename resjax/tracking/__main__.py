"""Follows one run beside its training: `python -m resjax.tracking TRACKER RUN`."""

import sys
from pathlib import Path

from resjax.terminal import standard_streams
from resjax.tracking.process import follow_parent

if __name__ == "__main__":
    with standard_streams() as keep_going:
        keep_going()
        code = follow_parent(sys.argv[1], Path(sys.argv[2]))
    sys.exit(code)
