"""Downloads weights from the web or Hugging Face's hub once; then they are available offline.

Files from the web are cached with their digests in $RESJAX_CACHE, by default ~/.cache/resjax; those
from the hub in the hub's own cache.
"""

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from urllib.parse import urldefrag, urlsplit

from resjax.disk import DamagedError, digest, verify_checksums, write_checksums
from resjax.download import download
from resjax.errors import UserError, one_line
from resjax.text import user_path
from resjax.transfer.files import INDEX, METADATA_FILES, WHOLE

HUB_TIMEOUT_SECONDS = 10
_HUB = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
# A repository may hold the same weights for several libraries; these files are enough.
_HUB_FILES = [WHOLE, INDEX, "model-*-of-*.safetensors", *METADATA_FILES.values()]
# torch.hub's convention: the first digits of the SHA-256 end the name, as in resnet50-0676ba61.pth.
_DIGEST_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.(pth|pt)$")
_LOOPBACK = {"127.0.0.1", "::1", "localhost"}


def cache_folder() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "resjax"
    return user_path(os.environ.get("RESJAX_CACHE") or default)


def fetch(source: str, announce: Callable[[str], None]) -> Path:
    """Returns the local path of a file or folder, after downloading it if necessary.

    Args:
      source: a path; `https://...`, which may end in `#sha256=` and 8 to 64 digits of the digest;
        or `hub:OWNER/NAME`, which may end in `@REVISION`.
      announce: called with one line before a download.

    Raises:
      UserError: the source is not valid, cannot be downloaded, or has another digest.
    """
    if source.startswith("hub:"):
        return _from_hub(source)
    if source.startswith(("https://", "http://")):
        return _from_web(source, announce)
    path = user_path(source)
    if not path.exists():
        raise UserError(
            f"{source}: no such file or folder; other sources begin with https:// or hub:"
        )
    return path


def _from_web(source: str, announce: Callable[[str], None]) -> Path:
    url, fragment = urldefrag(source)
    parts = urlsplit(url)
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        raise UserError(f"{source}: http:// files can be changed in transit; use https://")
    kind, _, expected = fragment.partition("=")
    if fragment and (kind != "sha256" or not re.fullmatch(r"[0-9a-f]{8,64}", expected)):
        raise UserError(f"{source}: what follows # must be sha256= and 8 to 64 digits of a digest")
    name = re.sub(r"[^\w.-]", "_", PurePosixPath(parts.path).name).lstrip(".") or "weights"
    if not fragment and (match := _DIGEST_IN_NAME.search(name)):
        expected = match[1]

    folder = cache_folder() / "weights" / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / name
    if not _is_cached(path):
        new = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}")
        try:
            new.mkdir(parents=True)
            download(url, new / name, announce, "name the file")
            write_checksums(new)
            if not _is_cached(path):  # by another process meanwhile
                shutil.rmtree(folder, ignore_errors=True)
                new.rename(folder)
        except OSError as error:
            if not _is_cached(path):
                text = f"{folder}: cannot write to this folder: {error.strerror}"
                raise UserError(text) from error
        finally:
            shutil.rmtree(new, ignore_errors=True)
    if not (found := digest(path)).startswith(expected):
        shutil.rmtree(folder)
        raise UserError(
            f"{url}: has SHA-256 {found[: len(expected)]}, not {expected}; it is damaged or "
            "another file"
        )
    return path


def _is_cached(path: Path) -> bool:
    try:
        verify_checksums(path.parent)
    except DamagedError:
        return False
    return path.is_file()


def _from_hub(source: str) -> Path:
    match = _HUB.fullmatch(source.removeprefix("hub:"))
    if match is None:
        raise UserError(
            f"{source}: a source on the hub is hub:OWNER/NAME or hub:OWNER/NAME@REVISION"
        )
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError as error:
        raise UserError(
            f"{source}: needs huggingface_hub; install it with pip install 'resjax[hub]'"
        ) from error
    name, revision = match["name"], match["revision"]
    # snapshot_download has no timeout for a hub that accepts the connection and does not answer.
    unavailable = None
    try:
        HfApi().repo_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # the type depends on the client's HTTP library
        unavailable = error
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=_HUB_FILES,
            local_files_only=unavailable is not None,
        )
    except Exception as error:
        reason = one_line(unavailable or error)
        raise UserError(
            f"{source}: cannot be downloaded from the hub ({reason}), and is not in its cache"
        ) from error
    return Path(folder)
