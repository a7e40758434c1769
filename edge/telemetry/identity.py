"""Who this device is, and that nobody else works on its outbox."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from pathlib import Path
from types import TracebackType
from typing import Self

from edge.errors import StoreError

_DEVICE_ID = re.compile(r"[0-9a-f]{32}")


def load_device_id(home: Path) -> str:
    """The device's id, 32 hexadecimal digits, kept in ``device-id`` under `home` and made up at the first call.

    Raises:
        StoreError: The file cannot be read or written, or holds something else.
    """
    path = home / "device-id"
    try:
        home.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _publish(path, secrets.token_hex(16))
        text = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise StoreError(f"{path} cannot be used: {e}.", hint="Check that EDGE_HOME is writable.") from e
    if not _DEVICE_ID.fullmatch(text):
        raise StoreError(f"{path} holds no device id.", hint="Restore it from a backup, or delete it for a new id.")
    return text


def _publish(path: Path, text: str) -> None:
    """Write the file whole and durably, unless another process was faster: then its id stands."""
    temporary = path.with_name(f".device-id.{secrets.token_hex(8)}")
    try:
        with temporary.open("x", encoding="ascii") as file:
            file.write(f"{text}\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class OutboxLock:
    """Held by the one process that writes and forwards an outbox; ends with that process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            StoreError: Another process holds it, or the file cannot be made.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise StoreError(f"{self._path} cannot be made: {e}.", hint="Check that EDGE_HOME is writable.") from e
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(fd)
            raise StoreError(
                f"Another process works on the outbox of {self._path.parent}.",
                hint="Two appliances cannot share an EDGE_HOME: stop the other, or give this one its own.",
            ) from e
        self._fd = fd

    def release(self) -> None:
        """Give it back; a second call does nothing."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()
