"""The servers side by side: ours, and llama.cpp's own from the same source."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

HOST = "127.0.0.1"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 40.0
MAX_SLOTS = 16
OUR_NAME = "slm-edge"
PEER_NAME = "llama-server"


class BenchError(Exception):
    """The benchmark cannot go on; the message says what to do."""


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as s:
        s.bind((HOST, 0))
        port: int = s.getsockname()[1]
        return port


@dataclass(slots=True)
class Server:
    """A server process; whoever launched it stops it."""

    name: str
    model: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    load: Callable[[int], None]
    """Has the model loaded, given the port; returns once it is."""
    exec_at: float

    def wait_listening(self) -> None:
        """Return once the port takes connections.

        Raises:
            BenchError: The process ended, or did not listen in time.
        """
        while True:
            try:
                socket.create_connection((HOST, self.port), timeout=1).close()
            except OSError:
                self.check_alive()
                time.sleep(0.002)
            else:
                return

    def wait_ready(self) -> None:
        """Return once the model is loaded.

        Raises:
            BenchError: The process ended, or was not ready in time.
        """
        self.wait_listening()
        self.load(self.port)

    def check_alive(self) -> None:
        """Raise BenchError where the server ended or takes too long to start."""
        if self.process.poll() is not None or time.perf_counter() - self.exec_at > START_TIMEOUT_S:
            last = self.log.read_text("utf-8", "replace")[-2000:]
            raise BenchError(f"{self.name} did not start; its log {self.log} ends with:\n{last}")

    def stop(self) -> None:
        """End the process, politely first."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


class Contender(Protocol):
    """A server that can be started."""

    @property
    def name(self) -> str: ...

    def command(self, port: int, *, context_tokens: int, threads: int) -> list[str]:
        """The command line of a server."""
        ...

    def launch(self, *, context_tokens: int, threads: int) -> Server:
        """Start a server; it may not listen yet."""
        ...


def _spawn(command: list[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        out.write(f"$ {shlex.join(command)}\n".encode())
        out.flush()
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=dict(env))


@dataclass(frozen=True, slots=True)
class Ours:
    """The appliance, with an EDGE_HOME of its own."""

    home: Path
    model: str
    log: Path
    flags: tuple[str, ...] = ()
    name: str = OUR_NAME

    def environment(self) -> dict[str, str]:
        """Its environment: nothing of the caller's settings, and models that stay loaded."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("EDGE_")}
        return {**kept, "EDGE_HOME": str(self.home), "EDGE_DEFAULT_MODEL": self.model, "EDGE_KEEP_ALIVE_S": "-1"}

    def command(self, port: int, *, context_tokens: int, threads: int) -> list[str]:
        """The command line of a server."""
        return [
            str(Path(sys.executable).with_name("edge")), "serve", "--port", str(port), "--threads", str(threads),
            "--context-tokens", str(context_tokens), "--max-sequences", str(MAX_SLOTS), *self.flags,
        ]  # fmt: skip

    def launch(self, *, context_tokens: int, threads: int) -> Server:
        """Start a server; it may not listen yet."""
        port = free_port()
        command = self.command(port, context_tokens=context_tokens, threads=threads)
        exec_at = time.perf_counter()
        process = _spawn(command, self.log, self.environment())
        return Server(self.name, self.model, port, process, self.log, self._load, exec_at)

    def _load(self, port: int) -> None:
        body = {"model": self.model}
        answer = httpx.post(f"http://{HOST}:{port}/edge/v1/models/load", json=body, timeout=120, trust_env=False)
        answer.raise_for_status()

    def run(self, *args: str) -> str:
        """What an `edge` command prints.

        Raises:
            BenchError: It failed.
        """
        command = [str(Path(sys.executable).with_name("edge")), *args]
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise BenchError(f"{shlex.join(command)} failed: {done.stderr.strip()}")
        return done.stdout

    def weights(self) -> Path:
        """The GGUF that it serves."""
        files: list[dict[str, str]] = json.loads(self.run("show", self.model, "--json"))["files"]
        found = [f["path"] for f in files if f["name"].endswith(".gguf")]
        if len(found) != 1:
            raise BenchError(f"{self.model} has {len(found)} GGUF files; name one with --gguf.")
        return Path(found[0])


@dataclass(frozen=True, slots=True)
class LlamaServer:
    """llama-server of the same llama.cpp, with its own caches on, which is its default."""

    binary: Path
    weights: Path
    log: Path
    flags: tuple[str, ...] = ()
    name: str = PEER_NAME

    def command(self, port: int, *, context_tokens: int, threads: int) -> list[str]:
        """The command line of a server."""
        return [
            str(self.binary), "-m", str(self.weights), "--host", HOST, "--port", str(port), "-t", str(threads),
            "-np", str(MAX_SLOTS), "-c", str(context_tokens), "-fa", "on", *self.flags,
        ]  # fmt: skip

    def launch(self, *, context_tokens: int, threads: int) -> Server:
        """Start a server; it may not listen yet."""
        port = free_port()
        command = self.command(port, context_tokens=context_tokens, threads=threads)
        exec_at = time.perf_counter()
        process = _spawn(command, self.log, os.environ)
        return Server(self.name, "model", port, process, self.log, self._load, exec_at)

    def _load(self, port: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"http://{HOST}:{port}/health", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # it restarts its listener once while it starts
            time.sleep(0.005)
        raise BenchError(f"llama-server was not ready after {START_TIMEOUT_S:g} s; see {self.log}")

    def version(self) -> str:
        """What it says of its build."""
        done = subprocess.run([str(self.binary), "--version"], capture_output=True, text=True, timeout=20)
        return " ".join((done.stderr + done.stdout).split())


def find_peer(path: Path | None) -> Path:
    """The llama-server to compare with: the one named, else the one that `build_peer.sh` makes once.

    Raises:
        BenchError: It cannot be built.
    """
    if path is not None:
        return path
    script = Path(__file__).with_name("build_peer.sh")
    done = subprocess.run([str(script)], stdout=subprocess.PIPE, text=True, timeout=3600)
    if done.returncode:
        raise BenchError("llama-server could not be built; name one with --peer.")
    return Path(done.stdout.strip()) / "llama-server"


@contextmanager
def running(contender: Contender, *, context_tokens: int, threads: int) -> Generator[Server]:
    """A loaded server for the length of a block."""
    server = contender.launch(context_tokens=context_tokens, threads=threads)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@contextmanager
def spinning(num_cores: int) -> Generator[None]:
    """Processes that take so many cores, for the length of a block."""
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_cores)]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
