"""A real docker-registry on loopback, and a wire before it that counts, breaks and changes what passes."""

from __future__ import annotations

import http.client
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest
from typing_extensions import override

from edge.store.digest import Digest

PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class Registry:
    """One that runs."""

    root: Path
    port: int

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def blob(self, digest: Digest) -> Path:
        """Where its disk has a blob."""
        return self.root / "docker/registry/v2/blobs/sha256" / digest.hex[:2] / digest.hex / "data"


@contextmanager
def docker_registry(root: Path, more: Mapping[str, Mapping[str, object]] | None = None) -> Generator[Registry]:
    """Run one until the block ends; what it had under `root` before is there again.

    Args:
        more: Of its configuration, by the sections' names.
    """
    if shutil.which("docker-registry") is None:
        pytest.skip("docker-registry is not installed")
    port = free_port()
    config: dict[str, dict[str, object]] = {
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(root)}},
        "http": {"addr": f"127.0.0.1:{port}", "secret": "always the same"},
    }
    for name, section in (more or {}).items():
        config[name] = {**config.get(name, {}), **section}
    path = root.with_suffix(".json")  # JSON is YAML
    path.write_bytes(msgspec.json.encode({"version": "0.1", **config}))
    with root.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(path)], stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_for(process, port)
        yield Registry(root, port)
    finally:
        process.terminate()
        process.wait(20)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert process.poll() is None, "docker-registry ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError("docker-registry does not listen")


@dataclass
class Wire:
    """What passes to a registry and back, and what happens to it on the way."""

    upstream: int
    port: int = 0
    seen: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """Method and path of each request."""
    up_bytes: int = 0
    """Of bodies of PATCH, those that were passed on."""
    down_bytes: int = 0
    """Of bodies of blobs, those that were passed on."""
    flip_at: int = -1
    """Of answers to a GET of a blob, at this place one bit is changed."""
    drop_after: list[int] = field(default_factory=list[int])
    """The next answers to a GET of a blob end after so many bytes."""
    before_up: Callable[[], None] = lambda: None
    before_down: Callable[[], None] = lambda: None
    statuses: dict[str, int] = field(default_factory=dict[str, int])
    """Answers to every request whose path ends so."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def requests(self, method: str, part: str) -> list[str]:
        return [path for known, path in self.seen if known == method and part in path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wire: Wire

    def _pass(self) -> None:
        self.wire.seen.append((self.command, self.path))
        for end, status in self.wire.statuses.items():
            if self.path.partition("?")[0].endswith(end):
                return self._status(status)
        connection = http.client.HTTPConnection("127.0.0.1", self.wire.upstream, timeout=60)
        try:
            self._ask(connection)
            self._answer(connection.getresponse())
        except (ConnectionError, BrokenPipeError, TimeoutError):
            self.close_connection = True
        finally:
            connection.close()
        return None

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _pass

    def _status(self, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _ask(self, connection: http.client.HTTPConnection) -> None:
        path = self.path if self.path.startswith("/") else "/" + self.path.split("/", 3)[3]
        connection.putrequest(self.command, path, skip_host=True, skip_accept_encoding=True)
        for name, text in self.headers.items():
            if name.lower() not in ("connection", "proxy-connection"):
                connection.putheader(name, text)
        connection.endheaders()
        left = int(self.headers.get("Content-Length", "0"))
        while left:
            data = self.rfile.read1(min(PIECE_BYTES, left))
            if not data:
                raise ConnectionAbortedError
            self.wire.before_up()
            connection.send(data)
            left -= len(data)
            if self.command == "PATCH":
                with self.wire.lock:
                    self.wire.up_bytes += len(data)

    def _answer(self, response: http.client.HTTPResponse) -> None:
        self.send_response(response.status)
        for name, text in response.getheaders():
            if name.lower() not in ("connection", "date"):
                self.send_header(name, text)
        self.end_headers()
        is_blob = self.command == "GET" and "/blobs/sha256:" in self.path and response.status in (200, 206)
        limit = self.wire.drop_after.pop(0) if is_blob and self.wire.drop_after else 1 << 60
        at = int(response.headers.get("Content-Range", "bytes 0-").removeprefix("bytes ").partition("-")[0])
        while data := response.read1(PIECE_BYTES):
            data = data[:limit]
            limit -= len(data)
            self._send(data, at, is_blob=is_blob)
            at += len(data)
            if limit <= 0:
                raise ConnectionAbortedError

    def _send(self, data: bytes, at: int, *, is_blob: bool) -> None:
        flip = self.wire.flip_at - at
        if is_blob:
            self.wire.before_down()
            if 0 <= flip < len(data):
                data = data[:flip] + bytes([data[flip] ^ 1]) + data[flip + 1 :]
        self.wfile.write(data)
        if is_blob:
            with self.wire.lock:
                self.wire.down_bytes += len(data)

    @override
    def log_message(self, format: str, *args: object) -> None:
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    @override
    def handle_error(self, request: object, client_address: object) -> None:
        return None  # clients that die are what the tests are about


@contextmanager
def wire_to(upstream: int) -> Generator[Wire]:
    """A wire to a port of loopback, on another one, until the block ends."""
    wire = Wire(upstream)
    with _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"wire": wire})) as server:
        wire.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield wire
        finally:
            server.shutdown()
            thread.join()


def asked(method: str, url: str, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """One plain request, for what tests want to know of a registry."""
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=30)
    connection.request(method, f"/{path}", headers=dict(headers or {}))
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, data
