"""What the telemetry tests share: records, a gateway as a process, a proxy that breaks the link, a device."""

from __future__ import annotations

import http.client
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
from typing_extensions import override

from edge.telemetry.span import RequestRecord
from tests.support import edge_env, free_port, stop, wait_until

Fault = Literal["pass", "lose_reply", "refuse", "stall"]
REPOSITORY = Path(__file__).parents[2]


def request_record(**changes: Any) -> RequestRecord:
    """A request that ended well, changed as asked."""
    fields: dict[str, Any] = {
        "operation": "chat",
        "request_model": "smollm2",
        "response_model": "smollm2:135m-instruct",
        "known_model": "smollm2:135m-instruct",
        "started_unix_ns": time.time_ns(),
        "duration_s": 2.0,
        "queue_s": 0.25,
        "prefill_s": 0.5,
        "ttft_s": 1.0,
        "input_tokens": 12,
        "output_tokens": 11,
        "cached_tokens": 4,
        "finish_reasons": ("stop",),
        "response_id": "chatcmpl-1",
        "stream": True,
    }
    return RequestRecord(**{**fields, **changes})


@dataclass(slots=True)
class GatewayProcess:
    """`edge gateway` in a process of its own; the same port and database after each start."""

    home: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and return when it answers."""
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / "gateway.out").open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edge.cli", "gateway", "--port", str(self.port)],
                env=edge_env(self.home), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip
        wait_until(self._answers, what="the gateway to answer")

    def kill(self) -> None:
        """End it as a power cut would end the process."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Ask it to end."""
        if self.process is not None:
            stop(self.process)

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        response = httpx.get(f"{self.url}{path}", trust_env=False, timeout=30)
        assert response.status_code == 200, response.text
        return response.json()

    def requests(self, device: str) -> list[dict[str, Any]]:
        """Every request of a device, page by page; none if nothing came from it."""
        found: list[dict[str, Any]] = []
        after: int | None = 0
        while after is not None:
            url = f"{self.url}/fleet/v1/devices/{device}/requests?limit=100&after={after}"
            response = httpx.get(url, trust_env=False, timeout=30)
            if response.status_code == 404:
                return []
            page = response.json()
            found += page["requests"]
            after = page["next"]
        return found

    def response_ids(self, device: str) -> list[str]:
        """The response ids of a device's requests, in the order of their arrival."""
        return [request["response_id"] for request in self.requests(device)]

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.home / "gateway.out").read_text()
        try:
            return httpx.get(f"{self.url}/readyz", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def running_gateway(home: Path) -> Generator[GatewayProcess]:
    """A gateway for the length of a block."""
    gateway = GatewayProcess(home)
    gateway.start()
    try:
        yield gateway
    finally:
        gateway.stop()


@dataclass(slots=True)
class Seen:
    """One request that reached the proxy."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    fault: Fault


class FaultProxy:
    """Stands between a device and an HTTP server, and breaks what `verdict` says.

    `verdict` gets the number of the request, from 0. A lost reply is lost after the server has sent it.
    """

    def __init__(self, upstream: str, verdict: Callable[[int], Fault] = lambda _: "pass") -> None:
        self.seen: list[Seen] = []
        self.verdict = verdict
        self._upstream = urlsplit(upstream)
        self._released = threading.Event()
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                proxy._handle(self)

            @override
            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["content-length"]))
        with self._lock:
            fault = self.verdict(len(self.seen))
            self.seen.append(Seen(handler.path, dict(handler.headers), body, fault))
        handler.close_connection = True
        if fault == "refuse":
            return
        if fault == "stall":
            self._released.wait(30)
            return
        connection = http.client.HTTPConnection(self._upstream.hostname or "", self._upstream.port, timeout=30)
        try:
            connection.request("POST", handler.path, body, dict(handler.headers))
            response = connection.getresponse()
            reply = response.read()
        finally:
            connection.close()
        if fault == "lose_reply":
            return
        handler.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("connection", "date"):
                handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(reply)


class ScriptedServer:
    """Answers each POST with the next of the given replies, and the last one for ever."""

    def __init__(self, *replies: tuple[int, Mapping[str, str], bytes]) -> None:
        self.paths: list[str] = []
        self.keys: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                server.paths.append(self.path)
                server.keys.append(self.headers["idempotency-key"])
                status, headers, body = replies[min(len(server.paths), len(replies)) - 1]
                self.send_response_only(status)  # without a Date of its own
                for name, value in {"content-length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            @override
            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def start_device(home: Path, gateway_url: str, *args: str) -> subprocess.Popen[str]:
    """A process with the real `Telemetry`, as `telemetry_device` does it; it tells its progress on stdout."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests.edge.telemetry_device", *args],
        env=edge_env(home, EDGE_GATEWAY_URL=gateway_url), cwd=REPOSITORY, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
    )  # fmt: skip
