"""Processes that die by SIGKILL before a step of the given number.

One process has everything imported and forks a victim for each order that it reads, so that a death costs milliseconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import httpx
import msgspec
from typing_extensions import override

from tests.edge.fault_operations import OPERATIONS, store_at
from tests.edge.fault_plants import STORES
from tests.edge.store_support import KillingFileOps

NEVER = 1 << 30


class Order(msgspec.Struct):
    """What a victim does, and before which step it dies."""

    operation: str
    home: str
    die_before: int
    plant: str


class Outcome(msgspec.Struct):
    """How a victim ended."""

    killed: bool
    steps: list[str] = []
    """What it did, where it got to its end."""
    error: str = ""


class SigkillFileOps(KillingFileOps):
    """Dies for real."""

    @override
    def die(self) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class Victims:
    """The process that forks victims; ended with the block."""

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.edge.fault_process"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=60)

    def run(self, operation: str, home: Path, *, die_before: int = NEVER, plant: str = "") -> Outcome:
        """Have a victim do an operation.

        Raises:
            AssertionError: It failed instead of dying or ending.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(Order(operation, str(home), die_before, plant)) + b"\n")
        self._process.stdin.flush()
        outcome = msgspec.json.decode(self._process.stdout.readline(), type=Outcome)
        assert not outcome.error, outcome.error
        return outcome


def _count_requests(files: KillingFileOps) -> None:
    """What a registry is asked is a step, and another one is that it has answered."""
    ask = httpx.HTTPTransport.handle_request

    def handle_request(self: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        files.step(request.method, Path(request.url.path))
        response = ask(self, request)
        files.step(str(response.status_code), Path(request.url.path))
        return response

    httpx.HTTPTransport.handle_request = handle_request


def _do(order: Order) -> Sequence[str]:
    files = SigkillFileOps(order.die_before)
    _count_requests(files)
    OPERATIONS[order.operation].run(store_at(Path(order.home), files, STORES[order.plant]))
    return files.performed


def _be_victim(order: Order, pipe: int) -> NoReturn:
    try:
        outcome = Outcome(killed=False, steps=[*_do(order)])
    except BaseException:
        outcome = Outcome(killed=False, error=traceback.format_exc())
    os.write(pipe, msgspec.json.encode(outcome))
    os._exit(0)


def _fork(order: Order) -> bytes:
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(reading)
        _be_victim(order, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    was_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return msgspec.json.encode(Outcome(killed=True)) if was_killed else said


if __name__ == "__main__":
    for line in sys.stdin:
        sys.stdout.buffer.write(_fork(msgspec.json.decode(line, type=Order)) + b"\n")
        sys.stdout.buffer.flush()
