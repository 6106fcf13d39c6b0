"""Reads files in a process of limited memory and time, as the tests of hostile files do.

    python tests/limits.py MODULE:FUNCTION MEGABYTES FILE...

prints a JSON object for each file: `path`, `seconds`, and `outcome`, the message of a UserError,
"" if the function returned, or the traceback of anything else. The memory is what the process may
allocate beyond what it has after its imports.
"""

import importlib
import json
import resource
import sys
import time
import traceback
from pathlib import Path

from resjax.errors import UserError


def main() -> None:
    name, megabytes, *paths = sys.argv[1:]
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    if (statm := Path("/proc/self/statm")).is_file():  # macOS limits no process's memory
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        limit = used + int(megabytes) * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    for path in paths:
        start, outcome = time.monotonic(), ""
        try:
            function(Path(path))
        except UserError as error:
            outcome = str(error)
        except BaseException:
            outcome = traceback.format_exc()
        print(json.dumps({"path": path, "seconds": time.monotonic() - start, "outcome": outcome}))


if __name__ == "__main__":
    main()
