"""The health check, against a scripted appliance on a real Unix socket."""

from __future__ import annotations

import http.server
import json
import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typing_extensions import override

from edge.kinds import ModelKind
from images.healthcheck import check, choose_model

Answers = dict[str, tuple[int, object]]


def a_model(ref: str, *, kind: ModelKind = "text") -> dict[str, str]:
    """What the check reads of a model."""
    return {"ref": ref, "kind": kind}


READY: Answers = {
    "/readyz": (200, {"status": "ready"}),
    "/edge/v1/models": (200, {"models": [a_model("other:1"), a_model("smollm2:135m-instruct")]}),
    "/v1/chat/completions": (200, {"usage": {"completion_tokens": 1}}),
}


class Appliance(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Answers each path as told, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self, path: Path, answers: Answers) -> None:
        self.answers = answers
        self.asked: list[object] = []
        super().__init__(str(path), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Appliance  # pyright: ignore[reportIncompatibleVariableOverride]  # the class it is always used with

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if body:
            self.server.asked.append(json.loads(body))
        status, answer = self.server.answers[self.path]
        payload = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    do_GET = do_POST = _answer

    @override
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def appliance(tmp_path: Path) -> Iterator[Appliance]:
    (tmp_path / "run").mkdir()
    with Appliance(tmp_path / "run" / "edge.sock", dict(READY)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def path_of(appliance: Appliance) -> Path:
    return Path(str(appliance.server_address))


def test_a_token_of_the_default_model_is_health(appliance: Appliance) -> None:
    assert check(path_of(appliance), {}) == "smollm2:135m-instruct decoded a token"
    question = appliance.asked[0]
    assert isinstance(question, dict)
    assert question["max_tokens"] == 1


def test_the_model_is_the_default_else_the_first_that_makes_text() -> None:
    listing = {"models": [a_model("0:1", kind="embeddings"), a_model("a:1"), a_model("b:2")]}
    assert choose_model(listing, {"EDGE_DEFAULT_MODEL": "b:2"}) == "b:2"
    assert choose_model(listing, {}) == "a:1"
    assert choose_model(listing, {"EDGE_DEFAULT_MODEL": "0:1"}) == "a:1"
    assert choose_model({"models": listing["models"][:1]}, {}) is None


def test_an_empty_store_is_not_ill(appliance: Appliance) -> None:
    appliance.answers["/edge/v1/models"] = (200, {"models": []})
    assert "no model" in check(path_of(appliance), {})


def test_a_full_queue_is_not_ill(appliance: Appliance) -> None:
    appliance.answers["/v1/chat/completions"] = (429, {"error": {"message": "full"}})
    assert "busy" in check(path_of(appliance), {})


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/readyz", (503, {"status": "starting"})),
        ("/v1/chat/completions", (500, {"error": {"message": "worker died"}})),
        ("/v1/chat/completions", (200, {"usage": {"completion_tokens": 0}})),
    ],
)
def test_what_is_ill(appliance: Appliance, path: str, answer: tuple[int, object]) -> None:
    appliance.answers[path] = answer
    with pytest.raises(RuntimeError):
        check(path_of(appliance), {})


def run_check(home: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "images.healthcheck"]
    environment = {**os.environ, "EDGE_HOME": str(home)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_as_a_command_it_exits_by_health(appliance: Appliance, tmp_path: Path) -> None:
    assert (run_check(tmp_path).returncode, run_check(tmp_path).stdout) == (
        0,
        "smollm2:135m-instruct decoded a token\n",
    )
    appliance.answers["/edge/v1/models"] = (200, {"unexpected": 1})
    assert run_check(tmp_path).returncode == 1


def test_nobody_there_is_ill_and_said_on_one_line(tmp_path: Path) -> None:
    done = run_check(tmp_path)
    assert done.returncode == 1
    assert done.stdout.startswith("unhealthy: FileNotFoundError")
    assert done.stderr == ""
