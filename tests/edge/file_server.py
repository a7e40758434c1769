"""A web server of files on loopback: ranges, validators, redirects, and every way in which servers fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from typing_extensions import override


@dataclass
class ServedFile:
    """One file, and how its server misbehaves."""

    data: bytes = field(repr=False)
    etag: str = '"1"'
    last_modified: str = ""
    has_ranges: bool = True
    has_head: bool = True
    has_length: bool = True
    drop_after: list[int] = field(default_factory=list[int])
    """Ends the connection after so many bytes: the first entry for the first answer, and so on."""
    status: int = 0
    """Answers every request with this, where it is not 0."""
    failures: list[int] = field(default_factory=list[int])
    """Statuses that the next requests get."""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    redirect: str = ""
    lie_about_range: bool = False
    chunk_bytes: int = 1 << 16
    before_chunk: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Asked:
    """One request that came."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class FileServer:
    """What is served, and what was asked of it."""

    files: dict[str, ServedFile]
    asked: list[Asked] = field(default_factory=list[Asked])
    sent_bytes: int = 0
    url: str = ""

    active: int = 0
    idle: threading.Condition = field(default_factory=threading.Condition)

    @contextmanager
    def answering(self) -> Generator[None]:
        with self.idle:
            self.active += 1
        try:
            yield
        finally:
            with self.idle:
                self.active -= 1
                self.idle.notify_all()

    def total_sent(self) -> int:
        """Bytes sent, once nothing is on its way any more."""
        with self.idle:
            assert self.idle.wait_for(lambda: self.active == 0, timeout=30)
            return self.sent_bytes

    def requests(self, method: str) -> list[Asked]:
        return [request for request in self.asked if request.method == method]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: FileServer

    def do_HEAD(self) -> None:
        with self.served.answering():
            self._answer(has_body=False)

    def do_GET(self) -> None:
        with self.served.answering():
            self._answer(has_body=True)

    def _answer(self, *, has_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.served.asked.append(
            Asked(self.command, self.path, {name.title(): text for name, text in self.headers.items()})
        )
        file = self.served.files.get(path)
        if file is None:
            return self._status(404)
        if file.status:
            return self._status(file.status, file.headers)
        if file.failures:
            return self._status(file.failures.pop(0))
        if file.redirect:
            return self._status(302, {"Location": file.redirect, **file.headers})
        if not has_body and not file.has_head:
            return self._status(405)
        if file.etag and self.headers.get("If-None-Match") == file.etag:
            return self._status(304)
        return self._send(file, has_body=has_body)

    def _status(self, code: int, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(code)
        for name, text in {"Content-Length": "0", **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()

    def _send(self, file: ServedFile, *, has_body: bool) -> None:
        start = self._start(file)
        if start >= len(file.data) and start:
            return self._status(416)
        stop = self._stop(file)
        is_part = start > 0 or stop < len(file.data)
        shown = start + 1 if file.lie_about_range and start else start
        self.send_response(206 if is_part else 200)
        if is_part:
            self.send_header("Content-Range", f"bytes {shown}-{stop - 1}/{len(file.data)}")
        if file.has_length:
            self.send_header("Content-Length", str(stop - start))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        named = {"ETag": file.etag, "Last-Modified": file.last_modified, **file.headers}
        for name, text in named.items():
            if text:
                self.send_header(name, text)
        self.end_headers()
        if has_body:
            self._body(file, start, stop)
        return None

    def _start(self, file: ServedFile) -> int:
        asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
        if not asked or not file.has_ranges or (condition and condition not in (file.etag, file.last_modified)):
            return 0
        return int(asked.removeprefix("bytes=").partition("-")[0])

    def _stop(self, file: ServedFile) -> int:
        last = (self.headers.get("Range") or "").rpartition("-")[2] if file.has_ranges else ""
        return min(int(last) + 1, len(file.data)) if last else len(file.data)

    def _body(self, file: ServedFile, start: int, stop: int) -> None:
        limit = file.drop_after.pop(0) if file.drop_after else len(file.data)
        for at in range(start, min(stop, start + limit), file.chunk_bytes):
            file.before_chunk()
            chunk = file.data[at : min(at + file.chunk_bytes, start + limit, stop)]
            try:
                self.wfile.write(chunk)
            except ConnectionError:
                self.close_connection = True
                return
            self.served.sent_bytes += len(chunk)
        if start + limit < stop:
            self.close_connection = True

    @override
    def log_message(self, format: str, *args: object) -> None:
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    @override
    def handle_error(self, request: object, client_address: object) -> None:
        return None  # clients that die are what the tests are about


@contextmanager
def serve(files: Mapping[str, ServedFile] | None = None) -> Generator[FileServer]:
    """Serve on a free port of loopback until the block ends."""
    served = FileServer(dict(files or {}))
    handler = type("Handler", (_Handler,), {"served": served})
    with _Server(("127.0.0.1", 0), handler) as server:
        served.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()
