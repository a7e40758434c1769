"""The image's health check: is the appliance ready, and does it still decode a token?

Run as ``python -Im images.healthcheck``; exits 0 when healthy. It imports next to nothing but the standard library:
a check costs some 50 ms of CPU besides the token.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import override

TIMEOUT_S = 40.0
"""Below the 45 s that the Containerfile allows: the reason is then printed and not cut off."""
MAX_BODY_BYTES = 1 << 20
_BUSY = 429


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, *, timeout_s: float = TIMEOUT_S) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    @override
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def call(path: Path, method: str, target: str, body: object = None) -> tuple[int, Any]:
    """One request: the status, and the parsed body where it is JSON.

    Raises:
        OSError, http.client.HTTPException: Nobody answers, or not in HTTP.
    """
    connection = UnixConnection(path)
    try:
        payload = None if body is None else json.dumps(body)
        connection.request(method, target, payload, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read(MAX_BODY_BYTES)
        return answer.status, json.loads(text) if "json" in answer.headers.get("Content-Type", "") else None
    finally:
        connection.close()


def choose_model(listing: Any, environ: Mapping[str, str]) -> str | None:
    """The model to try: the default one where it is there, else the first that makes text; None where there is none."""
    names = [str(model["ref"]) for model in listing["models"] if model["kind"] == "text"]
    wanted = environ.get("EDGE_DEFAULT_MODEL", "smollm2:135m-instruct")
    return wanted if wanted in names else next(iter(names), None)


def check(path: Path, environ: Mapping[str, str]) -> str:
    """Why the appliance at this socket is healthy, in words.

    Raises:
        RuntimeError: It is not.
    """
    status, _ = call(path, "GET", "/readyz")
    if status != http.client.OK:
        raise RuntimeError(f"/readyz answered {status}")
    _, listing = call(path, "GET", "/edge/v1/models")
    model = choose_model(listing, environ)
    if model is None:
        return "ready; no model that makes text in the store yet: mount a seed, or run `edge pull` in the container"
    question = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0}
    status, answer = call(path, "POST", "/v1/chat/completions", question)
    if status == _BUSY:
        return "busy: the queue is full"
    if status != http.client.OK or not answer["usage"]["completion_tokens"]:
        raise RuntimeError(f"{model} did not decode a token: status {status}, {json.dumps(answer)[:500]}")
    return f"{model} decoded a token"


def main() -> int:
    """Check the appliance of ``EDGE_HOME`` and say so on one line."""
    path = Path(os.environ.get("EDGE_HOME", "/var/lib/slm-edge")) / "run" / "edge.sock"
    try:
        print(check(path, os.environ))  # noqa: T201  # a command: this line is what `podman inspect` shows
    except (OSError, http.client.HTTPException, RuntimeError, LookupError, TypeError, ValueError) as e:
        print(f"unhealthy: {type(e).__name__}: {e}")  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
