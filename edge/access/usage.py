"""What each key used: the table that costs are charged by."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Literal

from edge.database import connect_read_only, errors_of

from .state import SCHEMA_VERSION

Dimension = Literal["key", "model", "day"]
DIMENSIONS: tuple[Dimension, ...] = ("key", "model", "day")


@dataclass(frozen=True, slots=True, order=True)
class Account:
    """What is counted together. `day` is UTC's, by the device's clock (``2026-11-20``); `key` is empty for who had
    none, `model` where a request named none that is here."""

    day: str
    key: str
    model: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What was used.

    Attributes:
        requests: All of them, the failures and the cancelled too.
        failures: Requests that ended with an error.
        cancelled: Requests whose client went away before the end.
        input_tokens: Of the prompts of whole answers; what their clients were told.
        output_tokens: Of whole answers; what their clients were told.
        cached_tokens: Those of `input_tokens` that were not computed again.
        undelivered_tokens: Computed, of prompts and answers, for requests that failed or were cancelled.
    """

    requests: int = 0
    failures: int = 0
    cancelled: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    undelivered_tokens: int = 0

    @property
    def tokens(self) -> int:
        """All that was computed or found for it."""
        return self.input_tokens + self.output_tokens + self.undelivered_tokens

    def plus(self, other: Usage) -> Usage:
        """Both together."""
        return Usage(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


COLUMNS = tuple(f.name for f in fields(Usage))


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What was used by what has these dimensions in common; those that are summed over are None."""

    key: str | None
    model: str | None
    day: str | None
    usage: Usage


def add(db: sqlite3.Connection, used: Mapping[Account, Usage]) -> None:
    """Count it, inside the caller's transaction."""
    sums = ", ".join(f"{name} = {name} + excluded.{name}" for name in COLUMNS)
    db.executemany(
        f"INSERT INTO usage (day, key, model, {', '.join(COLUMNS)}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608  # our own names
        f" ON CONFLICT (day, key, model) DO UPDATE SET {sums}",
        [(a.day, a.key, a.model, *astuple(u)) for a, u in used.items()],
    )


def read_usage(
    path: Path, by: Sequence[Dimension], *, since: str = "", until: str = "", key: str | None = None
) -> list[UsageRow]:
    """Sums by these dimensions, in their order; none where there is no file.

    Args:
        since: First day.
        until: Last day; empty for no end.
        key: Of this key's id only.

    Raises:
        StoreError: The file cannot be read.
    """
    if not path.exists():
        return []
    with errors_of(path), closing(connect_read_only(path, version=SCHEMA_VERSION)) as db:
        rows = db.execute(
            f"SELECT key, model, day, {', '.join(COLUMNS)} FROM usage"  # noqa: S608  # our own names
            " WHERE day >= ? AND (? = '' OR day <= ?) AND (? IS NULL OR key = ?)",
            (since, until, until, key, key),
        ).fetchall()
    return _summed(rows, by)


def _summed(rows: Iterable[Sequence[object]], by: Sequence[Dimension]) -> list[UsageRow]:
    sums: dict[tuple[str, ...], Usage] = {}
    for row in rows:
        of: dict[Dimension, str] = dict(zip(DIMENSIONS, map(str, row[:3]), strict=True))
        group = tuple(of[dimension] for dimension in by)
        counts = [n for n in row[3:] if isinstance(n, int)]
        sums[group] = sums.get(group, Usage()).plus(Usage(*counts))
    return [_row_of(dict(zip(by, group, strict=True)), usage) for group, usage in sorted(sums.items())]


def _row_of(of: Mapping[Dimension, str], usage: Usage) -> UsageRow:
    return UsageRow(of.get("key"), of.get("model"), of.get("day"), usage)
