"""Where weights come from: a path, the web, or Hugging Face's hub; fetched once, then offline.

What the web gave lies in a cache, $RESJAX_CACHE or else ~/.cache/resjax, sealed with its digest;
what the hub gave in the hub's own cache.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from urllib.parse import urldefrag, urlsplit

from resjax.disk import (
    DamagedError,
    describe_disk_error,
    digest,
    verify_checksums,
    write_checksums,
)
from resjax.download import download
from resjax.errors import UserError, one_line
from resjax.transfer.files import BESIDE, INDEX, WHOLE

_HUB = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
# Of a repository, which may hold the same weights for several libraries.
_WANTED = [WHOLE, INDEX, "model-*-of-*.safetensors", *BESIDE.values()]
# torch.hub's convention: the first digits of the SHA-256 end the name, as in resnet50-0676ba61.pth.
_NAMED_DIGEST = re.compile(r"-([0-9a-f]{8,64})\.(pth|pt)$")
_PATIENCE = 10  # seconds
_LOOPBACK = {"127.0.0.1", "::1", "localhost"}


def cache_folder() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "resjax"
    return Path(os.environ.get("RESJAX_CACHE") or default).expanduser()


def local(source: str, announce: Callable[[str], None]) -> Path:
    """The file or folder that a source names, on this machine.

    Args:
      source: a path; `https://...`, which may end in `#sha256=` and digits of a digest; or
        `hub:OWNER/NAME`, which may end in `@REVISION`.
      announce: is told, in one line, what is fetched.

    Raises:
      UserError: it cannot be had, is not what its digest says, or is no source.
    """
    if source.startswith("hub:"):
        return _from_hub(source)
    if source.startswith(("https://", "http://")):
        return _from_web(source, announce)
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(
            f"{source}: no such file or folder; other sources begin with https:// or hub:"
        )
    return path


def _from_web(source: str, announce: Callable[[str], None]) -> Path:
    url, fragment = urldefrag(source)
    parts = urlsplit(url)
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        raise UserError(f"{source}: http:// can be changed on its way; use https://")
    kind, _, expected = fragment.partition("=")
    if fragment and (kind != "sha256" or not re.fullmatch(r"[0-9a-f]{8,64}", expected)):
        raise UserError(f"{source}: what follows # must be sha256= and 8 to 64 digits of a digest")
    name = re.sub(r"[^\w.-]", "_", PurePosixPath(parts.path).name).lstrip(".") or "weights"
    if not fragment and (named := _NAMED_DIGEST.search(name)):
        expected = named[1]

    folder = cache_folder() / "weights" / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / name
    try:
        if not _is_whole(path):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            download(url, path, announce, "name the file")
            write_checksums(folder)
    except OSError as error:
        raise UserError(
            f"{url}: cannot be fetched: {describe_disk_error(error)}; have it fetched elsewhere "
            "and name the file"
        ) from error
    if not (found := digest(path)).startswith(expected):
        shutil.rmtree(folder)
        raise UserError(
            f"{url}: has SHA-256 {found[: len(expected)]}, not {expected}; it is damaged or "
            "another file"
        )
    return path


def _is_whole(path: Path) -> bool:
    try:
        verify_checksums(path.parent)
    except DamagedError:
        return False
    return path.is_file()


def _from_hub(source: str) -> Path:
    named = _HUB.fullmatch(source.removeprefix("hub:"))
    if named is None:
        raise UserError(
            f"{source}: a source on the hub is hub:OWNER/NAME or hub:OWNER/NAME@REVISION"
        )
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError as error:
        raise UserError(
            f"{source}: needs huggingface_hub; install it with pip install 'resjax[hub]'"
        ) from error
    name, revision = named["name"], named["revision"]
    # snapshot_download waits without end for a hub that takes the connection and says nothing.
    refusal = None
    try:
        HfApi().repo_info(name, revision=revision, timeout=_PATIENCE)
    except Exception as error:  # of whichever HTTP library the client is built on
        refusal = error
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=_WANTED,
            local_files_only=refusal is not None,
        )
    except Exception as error:
        why = one_line(refusal or error)
        raise UserError(
            f"{source}: cannot be had from the hub ({why}), and was not fetched before"
        ) from error
    return Path(folder)
