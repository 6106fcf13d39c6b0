"""A download is the published file or nothing, whatever the connection does."""

import contextlib
import http.server
import socketserver
import threading
import time

import pytest

from resjax import download as module
from resjax.download import ATTEMPTS, download
from resjax.errors import UserError

CONTENT = bytes(range(256)) * 40


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT and drops the connection after `server.sends` bytes."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.server.ranges.append(self.headers["Range"])
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/file")
            return self.end_headers()
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
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def fetch(url, path):
    lines = []
    download(url, path, lines.append, "name it")
    return lines


def test_a_download_announces_its_size_once(server, tmp_path):
    assert fetch(server.url, tmp_path / "file") == [f"downloading {server.url} (0.0 MB)"]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_two_downloads_of_a_file_at_once_do_not_mix(server, tmp_path, monkeypatch):
    copy = module._copy

    def copy_beside_another(*args):
        monkeypatch.setattr(module, "_copy", copy)
        fetch(server.url, tmp_path / "file")
        copy(*args)

    monkeypatch.setattr(module, "_copy", copy_beside_another)
    fetch(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


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


# Servers that do not follow the rules.


@pytest.fixture
def answering(monkeypatch, tmp_path):
    """Downloads from a server that answers with raw bytes: returns the error and the seconds."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def answering(write, url="http://127.0.0.1:{port}/file"):
        class Raw(socketserver.StreamRequestHandler):
            def handle(self):
                self.rfile.readline()
                with contextlib.suppress(OSError):
                    write(self.wfile)

        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Raw) as server:
            server.daemon_threads, server.block_on_close = True, False
            port = server.server_address[1]
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            start = time.monotonic()
            with pytest.raises(UserError) as refused:
                fetch(url.format(port=port), tmp_path / "file")
            server.shutdown()
        assert "\n" not in str(refused.value)
        assert not list(tmp_path.iterdir())
        return str(refused.value), time.monotonic() - start

    return answering


def response(*headers, status="HTTP/1.1 200 OK"):
    return "\r\n".join([status, *headers, "", ""]).encode("latin-1")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"garbage\r\n\r\n", "BadStatusLine"),
        (b"HTTP/1.1 abc OK\r\n\r\n", "BadStatusLine"),
        (b"", "the connection ended after 0 of 0 bytes"),
        (response("Content-Length: 99999999999999"), "and the disk has"),
        (response("Content-Length: 10") + b"1234", "the connection ended after 4 of 10 bytes"),
        (response("X: y" * 30_000), "the connection ended"),
        (response(*["X: y"] * 300), "got more than 100 headers"),
        (response("Transfer-Encoding: chunked") + b"xyz\r\n", "the connection ended"),
        (response(status="HTTP/1.1 404 \x1b[31mred"), "[31mred"),
        (response("Location: http://example.com/x", status="HTTP/1.1 302 F"), "is not https"),
        (response("Location: ftp://127.0.0.1/x", status="HTTP/1.1 302 F"), "ftp"),
        (response("Location: file:///etc/passwd", status="HTTP/1.1 302 F"), "file"),
    ],
)
def test_an_answer_that_breaks_the_rules_is_one_line(answering, answer, message):
    refused, _ = answering(lambda out: out.write(answer))
    assert message in refused


@pytest.mark.parametrize("length", ["abc", "-5", "1e9", "9" * 400, "\xb2"])
def test_a_size_that_is_no_number_is_not_known(length, monkeypatch, tmp_path, answering):
    monkeypatch.setattr(module, "LARGEST_BYTES", 3)
    answer = response(f"Content-Length: {length}") + b"1234"
    refused, _ = answering(lambda out: out.write(answer))
    assert "the server sends more than 3 bytes" in refused


def test_a_file_without_end_is_given_up(answering, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_BYTES", 10 << 20)

    def endless(out):
        out.write(response())
        while True:
            out.write(bytes(1 << 16))

    refused, _ = answering(endless)
    assert "the server sends more than 10,485,760 bytes" in refused


@pytest.mark.parametrize("head", [b"", response("Content-Length: 1000")])
def test_a_server_that_drips_is_given_up(answering, monkeypatch, head):
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.3)

    def drip(out):
        out.write(head)
        while True:
            out.write(b"H")
            out.flush()
            time.sleep(0.05)

    refused, seconds = answering(drip)
    assert "the connection ended" in refused
    assert seconds < 10 * ATTEMPTS * 0.3


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:{port}/a b\x01", "http://127.0.0.1:x/", "http://a..b/"]
)
def test_what_is_not_a_url_is_one_line(answering, url):
    refused, _ = answering(lambda out: None, url)
    assert "cannot be downloaded" in refused


def test_a_redirect_to_the_same_host_is_followed(server, tmp_path):
    moved = server.url.replace("/file", "/moved")
    fetch(moved, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
