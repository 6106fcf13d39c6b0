"""Downloads a file over HTTP; it appears whole or not at all.

After a lost connection the download continues where it stopped, if the server supports that. A
server that sends next to nothing, or without end, is given up, and a redirect leads to https only.
"""

import http.client
import secrets
import shutil
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from resjax.errors import UserError, one_line

ATTEMPTS = 5
TIMEOUT_SECONDS = 60.0  # of an attempt in which fewer than `LEAST_BYTES` arrive
LEAST_BYTES = 1 << 16
BLOCK_BYTES = 1 << 20
LARGEST_BYTES = 16 << 30  # of a file whose size the server does not say


def download(url: str, path: Path, announce: Callable[[str], None], otherwise: str) -> None:
    """Downloads `url` to `path`, whose folder exists.

    Args:
      url: of the file.
      path: where the file goes; nothing is left there if the download fails.
      announce: called with one line that contains the URL and the size.
      otherwise: completes the error message "download it elsewhere and ...".

    Raises:
      UserError: the server refuses, cannot be reached, redirects to plain http, or ended the
        connection too often; or the file does not fit on the disk.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # others may download too
    try:
        with partial.open("wb") as file:
            _download(url, file, announce)
        partial.replace(path)
    except (OSError, ValueError, http.client.InvalidURL) as error:  # ValueError: not a URL
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise UserError(
            f"{url}: cannot be downloaded: {reason}; download it elsewhere and {otherwise}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _download(url: str, file: BinaryIO, announce: Callable[[str], None]) -> None:
    size, validator, lost = 0, None, ""
    for attempt in range(ATTEMPTS):
        request = urllib.request.Request(url)
        if file.tell() and validator:
            request.add_header("Range", f"bytes={file.tell()}-")
            request.add_header("If-Range", validator)  # the whole file if it has changed
        try:
            with (
                _watched(file.tell) as opener,
                opener.open(request, timeout=TIMEOUT_SECONDS) as response,
            ):
                if response.status != http.HTTPStatus.PARTIAL_CONTENT:
                    file.seek(0)
                    file.truncate()
                    size = _stated_size(response.headers)
                    _require_space(size, file)
                    validator = response.headers.get("ETag") or response.headers["Last-Modified"]
                if not attempt:
                    announce(f"downloading {url} ({size / 1e6:,.1f} MB)")
                _copy(response, file, size or LARGEST_BYTES)
        except http.client.InvalidURL:
            raise
        except (ConnectionError, TimeoutError, http.client.HTTPException) as error:
            lost = f" ({one_line(error, 100)})"
            continue
        if not size or file.tell() == size:
            return
    raise OSError(f"the connection ended after {file.tell():,} of {size:,} bytes{lost}")


def _stated_size(headers: Any) -> int:
    """Returns the size in bytes, or 0 if the server does not say a number."""
    text = headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else 0


def _require_space(size: int, file: BinaryIO) -> None:
    free = shutil.disk_usage(Path(file.name).parent).free
    if size > free:
        raise OSError(f"needs {size / 1e6:,.0f} MB, and the disk has {free / 1e6:,.0f}")


def _copy(response: http.client.HTTPResponse, file: BinaryIO, largest: int) -> None:
    while block := response.read1(BLOCK_BYTES):
        if file.tell() + len(block) > largest:
            raise OSError(f"the server sends more than {largest:,} bytes")
        file.write(block)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to https, or to the same scheme and host."""

    def redirect_request(self, req: Any, *answer: Any) -> urllib.request.Request | None:
        response, *_, newurl = answer
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme != "https" and (new.scheme, new.hostname) != (old.scheme, old.hostname):
            response.close()
            raise urllib.error.URLError(f"it redirects to {newurl}, which is not https")
        return super().redirect_request(req, *answer)


@contextmanager
def _watched(progress: Callable[[], int]) -> Iterator[urllib.request.OpenerDirector]:
    """Yields an opener whose connections end when too few bytes arrive in `TIMEOUT_SECONDS`.

    A socket's own timeout starts again with every byte.
    """
    sockets: list[socket.socket] = []
    ended = threading.Event()

    def watch() -> None:
        before = progress()
        while not ended.wait(TIMEOUT_SECONDS):
            if progress() - before < LEAST_BYTES:
                for each in sockets:
                    with suppress(OSError):
                        each.shutdown(socket.SHUT_RDWR)
            before = progress()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield urllib.request.build_opener(_Redirects, *_recording_handlers(sockets))
    finally:
        ended.set()
        watcher.join()
        for each in sockets:
            each.close()


def _recording_handlers(sockets: list[socket.socket]) -> list[urllib.request.BaseHandler]:
    """Returns handlers that add the socket of every connection to a list."""

    class Plain(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            sockets.append(self.sock)

    class Secure(http.client.HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            sockets.append(self.sock)

    class PlainHandler(urllib.request.HTTPHandler):
        def http_open(self, req: Any) -> http.client.HTTPResponse:
            return self.do_open(Plain, req)

    class SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, req: Any) -> http.client.HTTPResponse:
            return self.do_open(Secure, req, context=ssl.create_default_context())

    return [PlainHandler(), SecureHandler()]
