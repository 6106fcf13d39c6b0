"""Downloads a file over HTTP; it appears whole or not at all.

After a lost connection the download continues where it stopped, if the server supports that.
"""

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from resjax.errors import UserError

ATTEMPTS = 5
TIMEOUT_SECONDS = 60
BLOCK_BYTES = 1 << 20


def download(url: str, path: Path, announce: Callable[[str], None], otherwise: str) -> None:
    """Downloads `url` to `path`, whose folder exists.

    Args:
      url: of the file.
      path: where the file goes; nothing is left there if the download fails.
      announce: called with one line that contains the URL and the size.
      otherwise: completes the error message "download it elsewhere and ...".

    Raises:
      UserError: the server refuses, cannot be reached, or ended the connection too often; or the
        file cannot be written.
    """
    partial = path.with_name(f"{path.name}.part")
    try:
        with partial.open("wb") as file:
            _download(url, file, announce)
        partial.rename(path)
    except OSError as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise UserError(
            f"{url}: cannot be downloaded: {reason}; download it elsewhere and {otherwise}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _download(url: str, file: BinaryIO, announce: Callable[[str], None]) -> None:
    size, validator = 0, None
    for attempt in range(ATTEMPTS):
        request = urllib.request.Request(url)
        if file.tell() and validator:
            request.add_header("Range", f"bytes={file.tell()}-")
            request.add_header("If-Range", validator)  # the whole file if it has changed
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                if response.status != http.HTTPStatus.PARTIAL_CONTENT:
                    file.seek(0)
                    file.truncate()
                    size = int(response.headers.get("Content-Length", 0))
                    validator = response.headers.get("ETag") or response.headers["Last-Modified"]
                if not attempt:
                    announce(f"downloading {url} ({size / 1e6:,.1f} MB)")
                while block := response.read(BLOCK_BYTES):
                    file.write(block)
        except (ConnectionError, TimeoutError, http.client.HTTPException):
            continue
        if not size or file.tell() == size:
            return
    raise OSError(f"the connection ended after {file.tell():,} of {size:,} bytes")
