"""`edge tui` in a real terminal of 80x24, as an operator uses it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import DEFAULT_MODEL, RunningAppliance, edge_env, free_port, running_appliance, wait_until

SLOW_S = 120.0


@dataclass
class Tmux:
    """A terminal of 80x24, its own server behind it."""

    socket: Path

    def run(self, *args: str, check: bool = True) -> str:
        """One tmux command."""
        command = ["tmux", "-S", str(self.socket), "-f", "/dev/null", *args]
        return subprocess.run(command, capture_output=True, text=True, check=check, timeout=20).stdout

    def keys(self, *keys: str) -> None:
        """Press keys, by tmux's names."""
        self.run("send-keys", *keys)

    def write(self, text: str) -> None:
        """Write text as it is."""
        self.run("send-keys", "-l", text)

    def screen(self) -> str:
        """What the terminal shows."""
        return self.run("capture-pane", "-p", check=False)

    def until(self, *texts: str) -> None:
        """Wait until the terminal shows all of these."""
        try:
            wait_until(lambda: all(text in self.screen() for text in texts), what=str(texts), timeout_s=SLOW_S)
        except AssertionError as e:
            raise AssertionError(f"{e}\n{self.screen()}") from e

    def is_open(self) -> bool:
        """Whether the program in it still runs."""
        return "operator" in self.run("list-sessions", check=False)


@pytest.fixture
def tmux() -> Generator[Tmux]:
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    # A Unix socket's path has 107 bytes at most; pytest's own directories can be longer.
    with tempfile.TemporaryDirectory(prefix="edge-") as directory:
        terminal = Tmux(Path(directory) / "s")
        yield terminal
        terminal.run("kill-server", check=False)


@pytest.fixture
def appliance(tmp_path: Path) -> Generator[RunningAppliance]:
    """One whose gateway does not answer, so that the spool holds something."""
    with running_appliance(tmp_path / "home", EDGE_GATEWAY_URL=f"http://127.0.0.1:{free_port()}") as running:
        yield running


def open_terminal(tmux: Tmux, home: Path, *args: str, term: str = "xterm-256color") -> None:
    environment = edge_env(home, TERM=term, LANG="C.UTF-8")
    given = [f"{name}={environment[name]}" for name in ("EDGE_HOME", "TERM", "LANG", "PATH", "HOME")]
    command = ["env", "-i", *given, sys.executable, "-m", "edge.cli", "tui", *args]
    tmux.run("new-session", "-d", "-s", "operator", "-x", "80", "-y", "24", *command)


def test_an_operator_lists_loads_asks_and_unloads(tmux: Tmux, appliance: RunningAppliance) -> None:
    open_terminal(tmux, appliance.home)
    tmux.until("Device · edge", "● live", "○ unloaded", DEFAULT_MODEL)

    tmux.keys("2")
    tmux.until("State", "Selected", "○ unloaded", DEFAULT_MODEL)
    tmux.keys("l")
    tmux.until("● ready")

    tmux.keys("c")
    tmux.until("Ask, then enter")
    tmux.write("Count from one to one hundred.")
    tmux.keys("Enter")
    tmux.until("Count from one to one hundred.", "tokens ·", "first after")
    tmux.keys("Escape")
    wait_until(lambda: " s …" not in tmux.screen(), what="the answer to end", timeout_s=SLOW_S)

    tmux.keys("F1")
    tmux.until("Telemetry spool", " wait", "0 running · 0 waiting", "next try in")

    tmux.keys("2")
    tmux.until("0 running, 0 waiting")
    tmux.keys("u")
    tmux.until("○ unloaded")

    tmux.keys("?")
    tmux.until("Everywhere", "edge unload MODEL")
    # Escape and a key in one breath are alt and that key.
    tmux.keys("Escape")
    wait_until(lambda: "Everywhere" not in tmux.screen(), what="the help to close")
    tmux.keys("q")
    wait_until(lambda: not tmux.is_open(), what="the terminal to close")


def test_16_colours_and_read_only(tmux: Tmux, appliance: RunningAppliance) -> None:
    open_terminal(tmux, appliance.home, "--readonly", term="xterm")
    tmux.until("Device · edge", "● live", "read-only", "○ unloaded")
    coloured = tmux.run("capture-pane", "-p", "-e")
    assert "\x1b[38;" not in coloured
    assert "\x1b[48;" not in coloured
    tmux.keys("2", "l", "d", "p", "3")
    tmux.until("Ask, then enter", "○ unloaded")


def test_nobody_there_is_a_state(tmux: Tmux, tmp_path: Path) -> None:
    open_terminal(tmux, tmp_path, "--url", f"http://127.0.0.1:{free_port()}")
    tmux.until("✖ down", "No appliance answers at http://127.0.0.1:", "Start it with: edge serve")
    tmux.keys("q")
    wait_until(lambda: not tmux.is_open(), what="the terminal to close")
