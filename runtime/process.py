"""The process of a worker, as the front sees it. May be started before anything else, also before there is a loop."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

from edge.config import Settings
from runtime.blackbox import BlackBox

MAX_LOG_BYTES = 4 << 20
_HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Large allocations, which are the cells, on huge pages: zeroing 188 MB of them takes 20 ms instead of 80."""


class WorkerProcess:
    """A worker that waits to be told what to load, and what the front shares with it. Gone when the front is.

    Attributes:
        sock: The front's end of the connection, for who takes the process to close.
        box: The page that says what the worker is doing, likewise.

    Raises:
        OSError: It cannot be started.
    """

    def __init__(self, log_file: BinaryIO) -> None:
        self.box = BlackBox.create()
        self.sock, theirs = socket.socketpair()
        self.sock.setblocking(False)
        tunables = [t for t in (os.environ.get("GLIBC_TUNABLES"), _HUGE_PAGES) if t]
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-m", "runtime.start", str(theirs.fileno()), str(self.box.fd), str(os.getpid())],
                pass_fds=[theirs.fileno(), self.box.fd], stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file,
                env={**os.environ, "GLIBC_TUNABLES": ":".join(tunables)},
            )  # fmt: skip
        except OSError:
            self._release()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """How it ended, signals negative; None while it runs."""
        return self._popen.poll()

    def kill(self) -> None:
        """End it, if it runs."""
        self._popen.kill()

    async def wait(self) -> int:
        """How it ended, as soon as it has."""
        import asyncio  # 15 ms that the first worker need not wait for

        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        pidfd = os.pidfd_open(self.pid)
        loop.add_reader(pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        return self._popen.wait()

    def discard(self) -> None:
        """End one that nobody took."""
        self.kill()
        self._popen.wait()
        self._release()

    def _release(self) -> None:
        self.sock.close()
        self.box.close()


def start_first(settings: Settings) -> WorkerProcess | None:
    """Start the worker of the default model, if one is wanted, before all that it need not wait for."""
    if settings.preload != "auto":
        return None
    with open_log(log_path(settings.logs_dir, settings.default_model)) as log_file:
        return WorkerProcess(log_file)


def log_path(logs_dir: Path, ref: str) -> Path:
    """Where the worker of a model logs to."""
    return logs_dir / f"worker-{ref.replace(':', '-').replace('/', '-')}.log"


def open_log(path: Path) -> BinaryIO:
    """The worker's log; where the disk takes none, its words are lost rather than its work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        return path.open("ab")
    except OSError:
        return Path(os.devnull).open("ab")
