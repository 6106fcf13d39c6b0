"""A download is the published file or nothing, whatever the connection does."""

import http.server
import threading

import pytest

from resjax.download import ATTEMPTS, download
from resjax.errors import UserError

CONTENT = bytes(range(256)) * 40


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT and drops the connection after `server.sends` bytes."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.server.ranges.append(self.headers["Range"])
        if self.path != "/file":
            return self.send_error(404)
        first = 0
        if self.headers["If-Range"] == self.server.etag and self.headers["Range"]:
            first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(CONTENT) - first))
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        self.end_headers()
        self.wfile.write(CONTENT[first:][: self.server.sends])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.sends, server.etag, server.ranges = len(CONTENT), '"1"', []
        server.url = f"http://127.0.0.1:{server.server_port}/file"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def fetch(url, path):
    lines = []
    download(url, path, lines.append, "name it")
    return lines


def test_a_download_announces_its_size_once(server, tmp_path):
    assert fetch(server.url, tmp_path / "file") == [f"downloading {server.url} (0.0 MB)"]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_dropped_download_continues_where_it_stopped(server, tmp_path):
    server.sends = 4000
    assert len(fetch(server.url, tmp_path / "file")) == 1
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=4000-", "bytes=8000-"]


@pytest.mark.parametrize("path", ["file", "gone"])
def test_a_download_that_fails_leaves_nothing_and_says_why(server, tmp_path, path):
    server.sends, server.etag = 4000, None  # without a validator every attempt starts again
    url = server.url.replace("file", path)
    with pytest.raises(UserError) as refused:
        fetch(url, tmp_path / "file")
    reason = {"file": "the connection ended after 4,000 of 10,240 bytes", "gone": "Not Found"}
    expected = f"{url}: cannot be downloaded: {reason[path]}; download it elsewhere and name it"
    assert str(refused.value) == expected
    assert len(server.ranges) == (ATTEMPTS if path == "file" else 1)
    assert not list(tmp_path.iterdir())
