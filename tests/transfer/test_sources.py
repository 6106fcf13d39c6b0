"""Sources of weights are downloaded once, verified, and then available offline."""

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import save

from resjax import download
from resjax.errors import UserError
from resjax.transfer import sources

CONTENT = b"weights" * 100
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and records requests."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        super().do_GET()


def serve(handler):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.asked = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A server of one folder, and an empty cache."""
    monkeypatch.setenv("RESJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "web"
    folder.mkdir()
    with serve(partial(Handler, directory=str(folder))) as server:
        server.folder = folder
        yield server
        server.shutdown()


def fetch(source, told=None):
    return sources.fetch(source, (told if told is not None else []).append)


def refusal(source):
    with pytest.raises(UserError) as refused:
        fetch(source)
    (line,) = str(refused.value).splitlines()
    return line


def test_a_missing_path_is_refused(tmp_path):
    (tmp_path / "w.pth").touch()
    assert fetch(str(tmp_path / "w.pth")) == tmp_path / "w.pth"
    assert fetch(str(tmp_path)) == tmp_path
    assert "gone.pth: no such file or folder" in refusal(str(tmp_path / "gone.pth"))


def test_a_downloaded_file_is_available_offline(web):
    (web.folder / f"net-{DIGEST[:8]}.pth").write_bytes(CONTENT)
    url, told = f"{web.url}/net-{DIGEST[:8]}.pth", []
    path = fetch(url, told)
    assert path.read_bytes() == CONTENT
    assert path.name == f"net-{DIGEST[:8]}.pth"
    assert told == [f"downloading {url} (0.0 MB)"]
    web.shutdown()
    web.server_close()
    assert fetch(url, told) == path
    assert len(told) == 1
    assert "cannot be downloaded: " in refusal(f"{web.url}/other.pth")


def test_a_damaged_file_in_the_cache_is_downloaded_again(web):
    (web.folder / "net.pth").write_bytes(CONTENT)
    path = fetch(f"{web.url}/net.pth")
    path.write_bytes(CONTENT[:-1])
    assert fetch(f"{web.url}/net.pth") == path
    assert path.read_bytes() == CONTENT
    assert len(web.asked) == 2


def test_two_processes_that_download_a_file_at_once_both_get_it(web, tmp_path, monkeypatch):
    (web.folder / "net.pth").write_bytes(CONTENT)
    copy, paths = download._copy, []

    def copy_beside_another(*args):
        monkeypatch.setattr(download, "_copy", copy)
        paths.append(fetch(f"{web.url}/net.pth"))
        copy(*args)

    monkeypatch.setattr(download, "_copy", copy_beside_another)
    paths.append(fetch(f"{web.url}/net.pth"))
    assert paths[0] == paths[1]
    assert paths[0].read_bytes() == CONTENT
    assert {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {
        "net.pth",
        "SHA256SUMS",
    }


@pytest.mark.parametrize(
    "asked", ["net-00000000.pth", f"net.pth#sha256={'0' * 64}", "net.pth#sha256=00000000"]
)
def test_a_file_with_another_digest_is_refused_and_deleted(asked, web, tmp_path):
    (web.folder / asked.partition("#")[0]).write_bytes(CONTENT)
    assert f"has SHA-256 {DIGEST[:8]}" in refusal(f"{web.url}/{asked}")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_an_explicit_digest_overrides_that_of_the_name(web):
    (web.folder / "net-00000000.pth").write_bytes(CONTENT)
    assert fetch(f"{web.url}/net-00000000.pth#sha256={DIGEST}").read_bytes() == CONTENT


def test_a_missing_file_on_the_server_leaves_nothing(web, tmp_path):
    assert "cannot be downloaded: File not found" in refusal(f"{web.url}/gone.pth")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_invalid_sources_are_refused_without_a_request(web):
    assert "use https://" in refusal("http://example.com/net.pth")
    assert "what follows # must be sha256=" in refusal(f"{web.url}/net.pth#md5=0")
    assert "is hub:OWNER/NAME" in refusal("hub:../secret/file/name")
    assert not web.asked


def test_a_missing_huggingface_hub_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'resjax[hub]'" in refusal("hub:owner/net")


FILES = {
    "model.safetensors": save({"w": np.ones(2, np.float32)}),
    "config.json": b"{}",
    "pytorch_model.bin": b"not wanted",
}
COMMIT = "0123456789" * 4


class Hub(Handler):
    """Answers the requests of the hub's client for one repository, owner/net."""

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.server.asked.append(self.path)
        self.answer(True)

    def answer(self, whole):
        path = self.path.partition("?")[0]
        files = [
            {"type": "file", "path": name, "size": len(content), "oid": name}
            for name, content in FILES.items()
        ]
        described = {
            "id": "owner/net",
            "sha": COMMIT,
            "siblings": [{"rfilename": name} for name in FILES],
        }
        name = path.rpartition("/")[2]
        if path.startswith(f"/api/models/owner/net/tree/{COMMIT}"):
            content = json.dumps(files).encode()
        elif path in ("/api/models/owner/net", "/api/models/owner/net/revision/main"):
            content = json.dumps(described).encode()
        elif path == f"/owner/net/resolve/{COMMIT}/{name}" and name in FILES:
            content = FILES[name]
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if whole:
            self.wfile.write(content)


PROGRAM = """
import sys
from resjax.errors import UserError
from resjax.transfer.files import read_arrays
from resjax.transfer import sources

sources.HUB_TIMEOUT_SECONDS = 2
try:
    path = sources.fetch(sys.argv[1], print)
    print(path, *sorted(read_arrays(path).arrays))
except UserError as error:
    print(error)
"""


def test_a_repository_of_the_hub_is_available_offline_after_the_first_time(tmp_path):
    def ask(source, url, **options):
        # The client reads its environment when it is imported.
        environment = os.environ | {
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
            "no_proxy": "127.0.0.1",
        }
        command = [sys.executable, "-c", PROGRAM, source]
        done = subprocess.run(
            command, env=environment | options, capture_output=True, text=True, timeout=120
        )
        (line,) = done.stdout.splitlines() or [done.stderr]
        return line

    with serve(Hub) as hub:
        first = ask("hub:owner/net", hub.url)
        assert first.endswith(f"{COMMIT} w")
        assert not any("pytorch_model.bin" in path for path in hub.asked)
        assert "hub:owner/gone: cannot be downloaded from the hub (RepositoryNotFound" in ask(
            "hub:owner/gone", hub.url
        )
        hub.shutdown()
    start = time.monotonic()
    assert ask("hub:owner/net", hub.url) == first
    assert ask("hub:owner/net", hub.url, HF_HUB_OFFLINE="1") == first
    assert "cannot be downloaded from the hub (ConnectError" in ask("hub:owner/other", hub.url)
    assert time.monotonic() - start < 60

    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert ask("hub:owner/net", url) == first
        assert time.monotonic() - start < 30
