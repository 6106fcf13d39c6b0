"""Files from the web, whole or not at all."""

import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path


def download(url: str, path: Path, announce: Callable[[str], None]) -> None:
    """Fetches `url` into `path`, whose folder is there; says so, with the size.

    Raises:
      OSError: it cannot be had, or the connection ended early; says why. No file is left.
    """
    partial = path.with_name(f"{path.name}.part")
    try:
        with urllib.request.urlopen(url, timeout=60) as response, partial.open("wb") as out:
            size = int(response.headers.get("Content-Length", 0))
            announce(f"fetching {url} ({size / 1e6:,.1f} MB)")
            while block := response.read(1 << 20):
                out.write(block)
            if size and out.tell() != size:
                raise OSError(f"the connection ended after {out.tell():,} of {size:,} bytes")
        partial.rename(path)
    except urllib.error.URLError as error:
        if isinstance(error, urllib.error.HTTPError):  # which holds its connection
            error.close()
        raise OSError(str(error.reason)) from error
    finally:
        partial.unlink(missing_ok=True)
