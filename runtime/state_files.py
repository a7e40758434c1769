"""Saved states as files: what a restarted worker goes on from.

A state is what users wrote, and native code parses it. So a file is readable by its owner alone, authenticated with a
key of the device, and believed only when every byte was checked: one that is damaged, cut short, or of another device,
model or build is ignored and removed. Nothing fails for want of the disk: the tier then switches itself off.

Format, version 3: magic, header length (four bytes, little-endian), header (msgpack), HMAC-SHA256 of all that; then the
state, whose HMAC stands in the header. Header, state and name have keys of their own, made from the device's. So the
start reads headers only, and the state when a prompt wants it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import logging
import os
import secrets
import shutil
import stat
import struct
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, TypeVar

import msgspec
import numpy as np

from runtime.request import TokenId
from runtime.state_dirs import directories_of
from runtime.states import SavedState, Scope

log = logging.getLogger("edge.states")

T = TypeVar("T")

KEY_BYTES = 32
MAX_HEADER_BYTES = 8 << 20
MAX_FILES = 10_000
UNUSED_S = 30 * 86400.0
"""States of settings that a model was tuned away from are kept for so long."""
_MAC_BYTES = 32
_START = struct.Struct("<8sI")
_MAGIC = b"EDGEKV\x00\x03"
_SUFFIX = ".state"


_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Header(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    identity: str
    tenant: str | None
    adapters: str
    pin: str
    uses: _Count
    tokens: Annotated[bytes, msgspec.Meta(min_length=8)]
    """Little-endian int64: placeholders of images are of 62 bits."""
    state_bytes: _Count
    state_mac: bytes


@dataclass(frozen=True, slots=True)
class Found:
    """A file of an earlier run, as its header has it."""

    tokens: list[TokenId]
    scope: Scope
    uses: int
    pin: str


class _BadFile(Exception):
    """Why a file is not believed."""


def device_key(path: Path) -> bytes:
    """The device's key for what only it may write, made on first use; several processes may ask at once. One that is
    damaged, or that other users may read, is replaced: what it vouched for is of no use then.

    Raises:
        OSError: It can neither be read nor made, or is no plain file of this user.
    """
    for _ in range(3):  # another process may replace it meanwhile
        if (key := _read_key(path)) is not None:
            return key
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        try:
            _write_new(temporary, secrets.token_bytes(KEY_BYTES))
            os.link(temporary, path)
        except FileExistsError:
            pass  # another worker was first
        finally:
            temporary.unlink(missing_ok=True)
        _sync_dir(path.parent)
    raise OSError(f"{path} does not last")


def _read_key(path: Path) -> bytes | None:
    try:
        file = _open(path)
    except FileNotFoundError:
        return None
    except _BadFile as e:
        raise OSError(f"{path} cannot be the key: {e}") from e
    with file:
        key = file.read(KEY_BYTES + 1)
        if len(key) == KEY_BYTES and not os.fstat(file.fileno()).st_mode & 0o007:
            return key
    log.warning("%s is damaged or other users may read it; it is made anew, and saved states go", path)
    path.unlink(missing_ok=True)
    return None


def open_states(root: Path, key_file: Path, *, weights_digest: str, build: str, settings: str) -> StateFiles:
    """The states of one model on this device, not yet opened. Those of the same weights that are of no use any more are
    removed: of another build, or with settings that nothing was loaded with for `UNUSED_S`. Never those of a process
    that lives.

    Args:
        root: Where the states of all models lie.
        weights_digest: Hex digits.
        build: What reads and writes the bytes of states; only an upgrade changes it.
        settings: What else decides what they mean. Models of the same weights may be loaded with different ones.

    Raises:
        OSError: The device's key cannot be had.
    """
    of_build = f"{weights_digest[:16]}-{_short_hash(build)}"
    directory = root / f"{of_build}-{_short_hash(settings)}"
    for other in directories_of(root, weights_digest):
        if other != directory and (not other.name.startswith(f"{of_build}-") or _is_unused(other)):
            _remove_directory(other)
    return StateFiles(directory, key=device_key(key_file), identity=f"{weights_digest} {build} {settings}")


def _short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _is_unused(directory: Path) -> bool:
    try:
        return time.time() - directory.stat().st_mtime > UNUSED_S
    except OSError:
        return False


def _remove_directory(directory: Path) -> None:
    try:
        lock = _lock(directory)
    except OSError:
        return  # a process that lives holds it
    try:
        shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(lock)


def _lock(directory: Path) -> int:
    """The lock of a directory, until its descriptor is closed. What others might do in it, they may not any more.

    Raises:
        OSError: Another process has it, it cannot be made, or the directory is no plain one of this user.
    """
    facts = directory.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
        raise OSError(f"{directory} is no directory of this user")
    directory.chmod(0o700)
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _write_new(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file of the owner's alone and return when it is on the disk."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            for part in parts:
                view = memoryview(part)
                while view:
                    view = view[file.write(view) :]
            os.fsync(file.fileno())
    except OSError:
        path.unlink()  # a full disk shall not be full of halves
        raise


def _sync_dir(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StateFiles:
    """The states of one model on the disk.

    One thread calls it, `open` first. The results of `write` and `read` come on threads of its own, so that no step
    waits for the disk.

    Args:
        directory: Its own, made where it is absent.
        key: Of the device, `KEY_BYTES`.
        identity: Model, build and layout: a state is of use to no other.
    """

    def __init__(self, directory: Path, *, key: bytes, identity: str) -> None:
        self._directory = directory
        self._header_key, self._state_key, self._name_key = (
            hmac.digest(key, purpose, "sha256") for purpose in (b"header", b"state", b"name")
        )
        self._identity = identity
        self._lock: int | None = None
        self._is_off = False
        self._writer = ThreadPoolExecutor(1, "states-write")
        self._reader = ThreadPoolExecutor(1, "states-read")
        self._writes: dict[Path, Future[None]] = {}

    def open(self) -> list[Found]:
        """Take the directory, and the headers of what lies in it, the longest unused first. Nothing where it cannot be
        taken: the tier is off then."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = _lock(self._directory)
            os.utime(self._directory)
            return self._scan()
        except OSError as e:
            self._switch_off(e)
            return []

    def _scan(self) -> list[Found]:
        with os.scandir(self._directory) as entries:
            files = sorted((e.stat(follow_symlinks=False).st_mtime, Path(e.path)) for e in entries if e.name != "lock")
        for _, path in files[:-MAX_FILES]:
            self._remove(path)
        headers = [self._believed(path, self._header_of) for _, path in files[-MAX_FILES:]]
        return [_found(header) for header in headers if header is not None]

    def write(self, state: SavedState, data: memoryview, done: Callable[[bool], None]) -> None:
        """Write a state's bytes; `done` hears whether they are on the disk."""
        path = self.path(state.scope, state.tokens)
        self._writes = {p: f for p, f in self._writes.items() if not f.done()}
        self._writes[path] = self._writer.submit(self._write, path, state, data, done)

    def read(self, state: SavedState, done: Callable[[memoryview | None], None]) -> None:
        """Read a state's bytes; `done` gets them, checked, or None."""
        path = self.path(state.scope, state.tokens)
        before = self._writes.get(path)
        self._reader.submit(self._read, path, state, before, done)

    def remove(self, scope: Scope, tokens: list[TokenId]) -> None:
        """Remove a state's file; an absent one is fine."""
        self._writer.submit(self._remove, self.path(scope, tokens))

    def close(self, *, timeout_s: float) -> None:
        """Finish what is to be written, at most for so long, and let the directory go."""
        pending = list(self._writes.values())
        deadline = time.monotonic() + timeout_s
        wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        self._is_off = True  # what still is to be written gives up at once; what is to be removed goes
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._writer.shutdown(wait=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def path(self, scope: Scope, tokens: list[TokenId]) -> Path:
        """Where the state of these tokens lies; the name tells nothing about them."""
        text = msgspec.msgpack.encode([scope.tenant, scope.adapters, _packed(tokens)])
        return self._directory / (hashlib.blake2b(text, key=self._name_key, digest_size=16).hexdigest() + _SUFFIX)

    # ------------------------------------------------------------------ on the threads

    def _write(self, path: Path, state: SavedState, data: memoryview, done: Callable[[bool], None]) -> None:
        is_written = False
        try:
            if not self._is_off:
                self._write_file(path, state, data)
                is_written = True
        except OSError as e:
            self._switch_off(e)
        finally:  # whoever waits for it hears in any case
            done(is_written)

    def _write_file(self, path: Path, state: SavedState, data: memoryview) -> None:
        mac = hmac.digest(self._state_key, data, "sha256")
        scope = state.scope
        header = _Header(
            self._identity, scope.tenant, scope.adapters, state.pin, state.uses, _packed(state.tokens), len(data), mac
        )
        temporary = path.with_suffix(".new")
        _write_new(temporary, self.sealed(msgspec.msgpack.encode(header)), data)
        try:
            temporary.replace(path)
        except OSError:
            temporary.unlink()
            raise
        _sync_dir(self._directory)

    def sealed(self, header: bytes) -> bytes:
        """The beginning of a file with this header, up to its state."""
        start = _START.pack(_MAGIC, len(header)) + header
        return start + hmac.digest(self._header_key, start, "sha256")

    def _read(
        self, path: Path, state: SavedState, before: Future[None] | None, done: Callable[[memoryview | None], None]
    ) -> None:
        data = None
        try:
            if before is not None:
                wait([before])
            data = self._believed(path, lambda p: self._state_of(p, state))
        finally:
            done(data)

    def _remove(self, path: Path) -> None:
        if self._lock is None:
            return  # they are another process's
        try:
            path.unlink(missing_ok=True)
        except IsADirectoryError as e:
            log.warning("a directory is in the way: %s", e)
        except OSError as e:
            self._switch_off(e)

    # ------------------------------------------------------------------ believing

    def _believed(self, path: Path, read: Callable[[Path], T]) -> T | None:
        try:
            return read(path)
        except FileNotFoundError:
            return None
        except (OSError, MemoryError, _BadFile) as e:  # whoever waits for it is computed instead
            log.warning("%s is ignored and removed: %s", path.name, e or type(e).__name__)
            self._remove(path)
            return None

    def _header_of(self, path: Path) -> _Header:
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(_START.size)
            _, length = _START.unpack(data) if len(data) == _START.size else (b"", 0)
            data += file.read(min(length, MAX_HEADER_BYTES) + _MAC_BYTES)
        return self._check_header(path, data, size)

    def _check_header(self, path: Path, data: bytes, size: int) -> _Header:
        """The header at the beginning of a file of so many bytes, every byte of it checked."""
        if len(data) < _START.size:
            raise _BadFile("it is cut short")
        magic, length = _START.unpack_from(data)
        end = _START.size + length
        if magic != _MAGIC or len(data) < end + _MAC_BYTES:
            raise _BadFile("it is no state of this version")
        if not hmac.compare_digest(self.sealed(data[_START.size : end]), data[: end + _MAC_BYTES]):
            raise _BadFile("its header was changed, or is of another device")
        try:
            header = msgspec.msgpack.decode(data[_START.size : end], type=_Header)
        except msgspec.MsgspecError as e:
            raise _BadFile(f"its header is of another version: {e}") from e
        if len(header.tokens) % 4:
            raise _BadFile("its tokens are cut short")
        if header.identity != self._identity or size != end + _MAC_BYTES + header.state_bytes:
            raise _BadFile("it is of another model or build, or of another length")
        found = _found(header)
        if path != self.path(found.scope, found.tokens):
            raise _BadFile("it has another state's name")
        return header

    def _state_of(self, path: Path, state: SavedState) -> memoryview:
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > 2 * state.size_bytes + MAX_HEADER_BYTES:
                raise _BadFile("it is longer than any state of so many tokens")
            data = file.read(size)
            with contextlib.suppress(OSError):  # a disk that takes no writes can be read all the same
                os.utime(file.fileno())
        header = self._check_header(path, data, size)
        body = memoryview(data)[size - header.state_bytes :]
        if not hmac.compare_digest(hmac.digest(self._state_key, body, "sha256"), header.state_mac):
            raise _BadFile("its bytes were changed")
        return body

    def _switch_off(self, error: OSError) -> None:
        if not self._is_off:
            log.warning("states are not kept on the disk from now on: %s", error)
        self._is_off = True


def _open(path: Path) -> BinaryIO:
    """A plain file of this user that has one name. What lies there instead is not waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_nlink != 1:
        os.close(descriptor)
        raise _BadFile("it is no file of this user, or has a second name")
    return os.fdopen(descriptor, "rb")


def _packed(tokens: list[TokenId]) -> bytes:
    return np.array(tokens, "<i8").tobytes()


def _found(header: _Header) -> Found:
    tokens: list[TokenId] = np.frombuffer(header.tokens, "<i8").tolist()
    return Found(tokens, Scope(header.tenant, header.adapters), header.uses, header.pin)
