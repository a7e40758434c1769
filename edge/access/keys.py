"""API keys: who may ask for what, how much, and how soon it is served. A key is shown once; what is kept is its hash.

A key is ``edge_`` + id + ``_`` + secret: the id finds the row, the secret is 40 characters of 62, so about 238 random
bits. Nobody guesses those, and so a plain SHA-256 keeps them: what slow hashes are for, words that people chose, is not
here, and each request would pay for it.
"""

from __future__ import annotations

import getpass
import hashlib
import hmac
import json
import re
import secrets
import sqlite3
import string
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import get_args

from edge.database import connect_read_only, errors_of, file_of, transaction
from edge.errors import InvalidRequest, KeyNotFound
from edge.kinds import Role, Scope

from . import audit
from .state import SCHEMA_VERSION, open_state

SCOPES: tuple[Scope, ...] = get_args(Scope)
ROLES: dict[Role, frozenset[Scope]] = {
    "user": frozenset({"chat", "embed"}),
    "viewer": frozenset({"view"}),
    "operator": frozenset({"chat", "embed", "view", "operate"}),
    "admin": frozenset(SCOPES),
}
_IMPLIED: dict[Scope, frozenset[Scope]] = {
    "chat": frozenset(), "embed": frozenset(), "view": frozenset(), "operate": frozenset({"view"}),
    "fetch": frozenset(), "admin": frozenset({"operate", "view"}),
}  # fmt: skip

MAX_NAME_CHARS = 64
MAX_MODELS = 64
MAX_RPM = 100_000
MAX_KEYS = 10_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]*", re.ASCII)
_MODEL = re.compile(r"[!-~]{1,200}", re.ASCII)
_ID_CHARS, _SECRET_CHARS = string.ascii_lowercase + string.digits, string.ascii_letters + string.digits
_ID_LENGTH, _SECRET_LENGTH = 10, 40
_KEY = re.compile(rf"edge_([a-z0-9]{{{_ID_LENGTH}}})_[A-Za-z0-9]{{{_SECRET_LENGTH}}}", re.ASCII)
KEY_LENGTH = len("edge_") + _ID_LENGTH + 1 + _SECRET_LENGTH
_NOBODY = hashlib.sha256(b"nobody's key").digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a key may do.

    Attributes:
        models: Patterns of the names of models (``smollm2:*``); empty is every model.
        rpm: Most requests in any minute; None is as many as it likes.
        tokens_per_day: Most tokens in 24 hours, of prompts and answers together; None is no limit.
        priority: 0 is served first, 3 last.
    """

    scopes: frozenset[Scope] = ROLES["user"]
    models: tuple[str, ...] = ()
    rpm: int | None = None
    tokens_per_day: int | None = None
    priority: int = 0

    def may(self, scope: Scope) -> bool:
        """Whether it reaches so far."""
        return scope in self.scopes

    def may_use(self, model: str) -> bool:
        """Whether it may ask a model, by the model's whole name."""
        return not self.models or any(fnmatchcase(model, pattern) for pattern in self.models)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A key as it is kept.

    Attributes:
        digest: SHA-256 of the whole key.
        revoked_s: Unix time at which it ended; None while it holds.
    """

    id: str
    name: str
    limits: Limits
    created_s: float
    revoked_s: float | None = None
    digest: bytes = field(repr=False)


def parse_scopes(text: str) -> frozenset[Scope]:
    """``chat,embed`` as scopes, with what they imply: who may change things may look at them.

    Raises:
        InvalidRequest: One is unknown, or there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    scopes: list[Scope] = [scope for scope in SCOPES if names.count(scope)]
    if not names or len(scopes) != len(set(names)):
        raise InvalidRequest(f"{text[:100]!r} is no list of scopes.", hint=f"Scopes: {', '.join(SCOPES)}.")
    return frozenset(scopes).union(*(_IMPLIED[scope] for scope in scopes))


def key_id_of(presented: str) -> str | None:
    """The id of what has the form of a key; None for any other text."""
    found = _KEY.fullmatch(presented) if len(presented) == KEY_LENGTH else None
    return found[1] if found else None


def digest_of(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("ascii")).digest()


def make_key(key_id: str) -> str:
    """A new key."""
    return f"edge_{key_id}_{''.join(secrets.choice(_SECRET_CHARS) for _ in range(_SECRET_LENGTH))}"


class KeyReader:
    """Looks keys up, each time anew in the file: one that another process revoked a moment ago is refused.

    A look takes some 20 µs and waits for no writer, so it belongs on an event loop. One thread uses it, and closes it.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, which must be there.

        Raises:
            StoreError: It cannot be read.
        """
        self._path = path
        self._file = file_of(path)
        self._db = connect_read_only(path, version=SCHEMA_VERSION)

    @property
    def is_current(self) -> bool:
        """Whether the file is still the one of that name: somebody may have removed it, or put back an older one."""
        return self._file == file_of(self._path)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def find(self, presented: str) -> Key | None:
        """The key that was presented; None if it is none, or was revoked.

        Raises:
            StoreError: The file cannot be read; then nobody is known.
        """
        key_id = key_id_of(presented)
        if key_id is None:
            return None
        with errors_of(self._path):
            row = self._db.execute(f"{_SELECT} WHERE id = ?", (key_id,)).fetchone()
        # Two microseconds may tell that there is a key of this id, which is no secret; nothing tells how near the
        # rest is to it.
        is_right = hmac.compare_digest(digest_of(presented), row[_DIGEST] if row else _NOBODY)
        found = _key(row) if row and is_right else None
        return found if found is not None and found.revoked_s is None else None

    def get(self, key_id: str) -> Key | None:
        """The key of an id, for what somebody left to be done in its name; None if there is none, or it was revoked.

        Raises:
            StoreError: The file cannot be read.
        """
        with errors_of(self._path):
            row = self._db.execute(f"{_SELECT} WHERE id = ? AND revoked_s IS NULL", (key_id,)).fetchone()
        return _key(row) if row else None

    def is_valid(self, key: Key) -> bool:
        """Whether it still holds, and has not been changed for another.

        Raises:
            StoreError: The file cannot be read.
        """
        with errors_of(self._path):
            row = self._db.execute(
                "SELECT 1 FROM keys WHERE id = ? AND digest = ? AND revoked_s IS NULL", (key.id, key.digest)
            ).fetchone()
        return row is not None


class Keys:
    """Makes and ends keys. Every change and its line in the audit log are one commit. One thread uses it.

    Args:
        actor: Who does so, for that log.
    """

    def __init__(self, path: Path, *, actor: str) -> None:
        self._path = path
        self._actor = actor

    def create(self, limits: Limits, *, name: str = "") -> tuple[Key, str]:
        """A new key, and what to present: this is the only time that anybody sees it.

        Raises:
            InvalidRequest: A limit or the name is out of range, or a key of that name holds.
            StoreError: The file cannot be written.
        """
        _check(limits, name)
        key_id = "".join(secrets.choice(_ID_CHARS) for _ in range(_ID_LENGTH))
        key = make_key(key_id)
        made = Key(id=key_id, name=name or key_id, limits=limits, created_s=time.time(), digest=digest_of(key))
        with errors_of(self._path), closing(open_state(self._path)) as db, transaction(db):
            if _select(db, "WHERE name = ? AND revoked_s IS NULL", made.name):
                raise InvalidRequest(
                    f"There is a key named {name!r}.", hint="Choose another name, or revoke that one first."
                )
            if int(db.execute("SELECT count(*) FROM keys").fetchone()[0]) >= MAX_KEYS:
                raise InvalidRequest(f"There are {MAX_KEYS:,} keys, which is as many as there may be.")
            db.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", _row(made))
            self._note(db, "key.create", made)
        return made, key

    def rotate(self, name: str) -> tuple[Key, str]:
        """Another secret for a key, shown once; the one before ends at once. Limits and usage stay.

        Raises:
            KeyNotFound: There is none of that name or id, or it was revoked.
        """
        with errors_of(self._path), closing(open_state(self._path)) as db, transaction(db):
            found = _find(db, name)
            if found.revoked_s is not None:
                raise KeyNotFound(name, hint="It was revoked; make another: edge key create.")
            key = make_key(found.id)
            db.execute("UPDATE keys SET digest = ? WHERE id = ?", (digest_of(key), found.id))
            self._note(db, "key.rotate", found)
        return found, key

    def revoke(self, name: str) -> Key:
        """End a key: its next request is refused. Ending one twice is as good as once.

        Raises:
            KeyNotFound: There is none of that name or id.
        """
        with errors_of(self._path), closing(open_state(self._path)) as db, transaction(db):
            found = _find(db, name)
            if found.revoked_s is None:
                db.execute("UPDATE keys SET revoked_s = ? WHERE id = ?", (time.time(), found.id))
                self._note(db, "key.revoke", found)
            return _find(db, found.id)

    def _note(self, db: sqlite3.Connection, act: str, key: Key) -> None:
        audit.append(db, audit.Act(self._actor, act, f"{key.id} ({key.name})"), now_s=time.time())


def read_keys(path: Path) -> list[Key]:
    """Every key, the revoked ones too, in the order in which they were made; none where there is no file.

    Raises:
        StoreError: The file cannot be read.
    """
    if not path.exists():
        return []
    with errors_of(path), closing(connect_read_only(path, version=SCHEMA_VERSION)) as db:
        return _select(db, "ORDER BY created_s, id")


def read_key(path: Path, name: str) -> Key:
    """One of them, by its id or its name.

    Raises:
        KeyNotFound: There is none.
    """
    return _choose(read_keys(path), name)


def local_actor() -> str:
    """Who runs this command, for the audit log."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # a user id without a name, as in containers
        return "cli"


_SELECT = "SELECT id, name, digest, scopes, models, rpm, tokens_per_day, priority, created_s, revoked_s FROM keys"
_DIGEST = 2


def _select(db: sqlite3.Connection, rest: str, *values: str) -> list[Key]:
    return [_key(row) for row in db.execute(f"{_SELECT} {rest}", values)]


def _find(db: sqlite3.Connection, name: str) -> Key:
    return _choose(_select(db, "ORDER BY created_s, id"), name)


def _choose(keys: Sequence[Key], name: str) -> Key:
    """The key of that id, else the valid one of that name, else the last that had it."""
    named = [k for k in keys if k.name == name]
    found = [k for k in keys if k.id == name] or [k for k in named if k.revoked_s is None] or named[-1:]
    if not found:
        raise KeyNotFound(name)
    return found[0]


def _key(row: Sequence[object]) -> Key:
    key_id, name, digest, scopes, models, rpm, tokens_per_day, priority, created_s, revoked_s = row
    return Key(
        id=str(key_id), name=str(name), digest=digest, created_s=created_s, revoked_s=revoked_s,  # pyright: ignore[reportArgumentType]  # the columns' types
        limits=Limits(
            scopes=frozenset(json.loads(str(scopes))), models=tuple(json.loads(str(models))), rpm=rpm,  # pyright: ignore[reportArgumentType]
            tokens_per_day=tokens_per_day, priority=priority,  # pyright: ignore[reportArgumentType]
        ),
    )  # fmt: skip


def _row(key: Key) -> tuple[object, ...]:
    limits = key.limits
    return (
        key.id, key.name, key.digest, json.dumps(sorted(limits.scopes)), json.dumps(limits.models), limits.rpm,
        limits.tokens_per_day, limits.priority, key.created_s, key.revoked_s,
    )  # fmt: skip


def _check(limits: Limits, name: str) -> None:
    if name and (len(name) > MAX_NAME_CHARS or not _NAME.fullmatch(name)):
        raise InvalidRequest(
            f"{name[:80]!r} cannot name a key.", hint=f"Use up to {MAX_NAME_CHARS} letters, digits and ._@-."
        )
    if not limits.scopes:
        raise InvalidRequest("A key without a scope can do nothing.", hint=f"Scopes: {', '.join(SCOPES)}.")
    if len(limits.models) > MAX_MODELS or not all(_MODEL.fullmatch(m) for m in limits.models):
        raise InvalidRequest(f"The models are up to {MAX_MODELS} names or patterns, such as smollm2:*.")
    for what, value, most in (
        ("rpm", limits.rpm, MAX_RPM), ("tokens-per-day", limits.tokens_per_day, 1 << 50),
    ):  # fmt: skip
        if value is not None and not 1 <= value <= most:
            raise InvalidRequest(f"{what} must lie between 1 and {most:,}, got {value}.")
    if not 0 <= limits.priority <= 3:
        raise InvalidRequest(f"The priority lies between 0 (served first) and 3, got {limits.priority}.")
