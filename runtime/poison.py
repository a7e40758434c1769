"""Requests that ended their worker twice: refused, and kept on the disk so that somebody can look into them."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from pathlib import Path

import msgspec

from edge.errors import EdgeError, InvalidReference, RequestPoisoned
from runtime import wire

log = logging.getLogger("edge.poison")

MAX_CASES = 32
MAX_CASES_BYTES = 64 << 20
_ID = re.compile(r"[0-9a-f]{16}")
_VERSION = 1


class Case(msgspec.Struct, kw_only=True):
    """One such request. `message` is the wire message, which holds what the user wrote."""

    id: str
    model: str
    digest: str
    """Of the model's manifest."""
    reasons: list[str]
    """How the worker ended, each time."""
    time: float
    """Unix time of the last death."""
    message: bytes
    version: int = _VERSION

    def request(self, request_id: int) -> wire.Ask:
        """The request, under an id.

        Raises:
            EdgeError: It was kept by a version whose messages were different.
        """
        try:
            decoded = wire.to_worker_decoder.decode(self.message)
        except msgspec.DecodeError as e:
            raise EdgeError(
                f"The request {self.id} was kept by another version and cannot be run: {e}.",
                hint=f"Remove it: edge replay {self.id} --remove.",
            ) from e
        if not isinstance(decoded, wire.Ask):
            raise EdgeError(f"The file of {self.id} holds no request.", hint=f"edge replay {self.id} --remove.")
        return msgspec.structs.replace(decoded, id=request_id)


def case_of(who: str, message: wire.Ask, *, model: str, digest: str, reasons: list[str], time: float) -> Case:
    """A request as it is kept."""
    body = msgspec.msgpack.encode(msgspec.structs.replace(message, id=0))
    return Case(id=who, model=model, digest=digest, reasons=reasons, time=time, message=body)


class PoisonCabinet:
    """The cases of one directory; the oldest go when there are too many. Any process may remove one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._kept = {path.stem for path in self._paths()}
        self._unkept: set[str] = set()
        """Refused as well, but the disk did not take them."""

    def check(self, who: str) -> None:
        """Refuse what is kept here.

        Raises:
            RequestPoisoned: It ended the worker twice.
        """
        if who in self._kept and not self._path(who).exists():
            self._kept.discard(who)  # somebody removed it: it may try again
        if who in self._kept or who in self._unkept:
            raise RequestPoisoned(who)

    @property
    def num_refused(self) -> int:
        """Requests that are refused."""
        return len(self._kept) + len(self._unkept)

    def keep(self, case: Case) -> None:
        """Refuse a request from now on, also after a restart. Blocks for the disk."""
        try:
            self._write(case)
            self._kept.add(case.id)
        except OSError as e:
            log.error("a poisoned request could not be kept in %s: %s", self._directory, e)
            self._unkept.add(case.id)

    def cases(self) -> list[Case]:
        """Every case that can be read, the newest first."""
        found: list[Case] = []
        for path in self._paths():
            try:
                found.append(msgspec.msgpack.decode(path.read_bytes(), type=Case))
            except (OSError, msgspec.DecodeError) as e:
                log.warning("%s is passed over: %s", path, e)
        return sorted(found, key=lambda c: c.time, reverse=True)

    def get(self, who: str) -> Case:
        """One case.

        Raises:
            InvalidReference: There is none of that id.
        """
        path = self._path(who)
        try:
            return msgspec.msgpack.decode(path.read_bytes(), type=Case)
        except FileNotFoundError as e:
            raise InvalidReference(f"No request '{who}' is kept.", hint="See them with: edge replay.") from e
        except (OSError, msgspec.DecodeError) as e:
            raise EdgeError(f"{path} cannot be read: {e}.", hint=f"edge replay {who} --remove.") from e

    def remove(self, who: str) -> None:
        """Let a request try again.

        Raises:
            InvalidReference: There is none of that id.
        """
        try:
            self._path(who).unlink()
        except FileNotFoundError as e:
            raise InvalidReference(f"No request '{who}' is kept.", hint="See them with: edge replay.") from e

    def _path(self, who: str) -> Path:
        if not _ID.fullmatch(who):
            raise InvalidReference(f"'{who}' is no id of a kept request.", hint="See them with: edge replay.")
        return self._directory / f"{who}.msgpack"

    def _paths(self) -> list[Path]:
        if not self._directory.is_dir():
            return []
        return [path for path in self._directory.glob("*.msgpack") if _ID.fullmatch(path.stem)]

    def _write(self, case: Case) -> None:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        data = msgspec.msgpack.encode(case)
        temporary = self._directory / f".{case.id}.new"
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self._path(case.id))
        self._make_room()

    def _make_room(self) -> None:
        ages = sorted(((p.stat().st_mtime, p) for p in self._paths()), reverse=True)
        size_bytes = 0
        for number, (_, path) in enumerate(ages):
            size_bytes += path.stat().st_size
            if number >= MAX_CASES or (number and size_bytes > MAX_CASES_BYTES):
                path.unlink(missing_ok=True)
