"""Files that appear whole or not at all, so that a reader never meets half a report."""

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> Path:
    """Writes `content` to `path`, replacing what was there, and returns `path`.

    The text (as UTF-8) or bytes go to a temporary file in the same folder first, are flushed to
    the disk and then renamed, which is atomic.

    Raises:
        OSError: if the folder cannot be made or written; `path` is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            # mkstemp makes files for their owner alone; a report is for whoever may read DIR.
            os.fchmod(file.fileno(), 0o644)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path
