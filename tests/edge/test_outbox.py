"""The outbox: against a plain model, over restarts and kills, on disks that fail."""

from __future__ import annotations

import json
import resource
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edge.database import CorruptDatabase, NewerFormat, set_aside, version_of
from edge.errors import StoreError
from edge.telemetry.identity import OutboxLock, load_device_id
from edge.telemetry.outbox import (
    LEASE_SHARE,
    MAX_REJECTIONS,
    ROW_OVERHEAD_BYTES,
    SCHEMA_VERSION,
    Gap,
    NewRow,
    Outbox,
    Priority,
    read_rows,
    read_stats,
)

LIMIT = 64 << 10
DEVICE = "d" * 32


def encode_gaps(gaps: Sequence[Gap]) -> bytes:
    """Gaps as JSON, for the tests to read."""
    return json.dumps([[g.priority.name, g.reason, g.batches, g.records] for g in gaps]).encode()


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def open_outbox(
    path: Path, *, clock: Callable[[], float] | None = None, limit_bytes: int = LIMIT, max_age_s: float = 1e9
) -> Outbox:
    """An outbox with the tests' settings."""
    return Outbox(
        path,
        DEVICE,
        limit_bytes=limit_bytes,
        encode_gaps=encode_gaps,
        max_age_s=max_age_s,
        clock=clock or Clock(),
    )


def usage(body: bytes = b"body", *, records: int = 1, priority: Priority = Priority.USAGE) -> NewRow:
    """A row to append."""
    return NewRow(priority, "traces", records, body)


# ---------------------------------------------------------------- against a model


@dataclass
class ModelRow:
    key: str
    priority: Priority
    size: int
    records: int
    is_leased: bool = False
    is_aside: bool = False
    rejections: int = 0
    not_before_s: float = float("-inf")

    @property
    def is_gap(self) -> bool:
        return self.priority is Priority.GAP


class OutboxMachine(RuleBasedStateMachine):
    """Appends, leases, losses and restarts, in any order; the model is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="outbox-"))
        self.clock = Clock()
        self.rows: list[ModelRow] = []
        self.acknowledged: set[str] = set()
        self.pending: dict[tuple[Priority, str], int] = {}
        self.num_appended = self.num_delivered = self.num_lost = 0
        self.seq = 0
        self.ids: dict[str, int] = {}

    @initialize()
    def open(self) -> None:
        self.outbox = open_outbox(self.directory / "telemetry.db", clock=self.clock)
        self.seq = 0

    @rule(
        sizes=st.lists(
            st.tuples(st.sampled_from(sorted(Priority)[1:]), st.sampled_from([1, 900, 9000, 30_000])), max_size=4
        )
    )
    def append(self, sizes: list[tuple[Priority, int]]) -> None:
        self.outbox.append([usage(b"x" * size, records=size % 7, priority=priority) for priority, size in sizes])
        for priority, size in sizes:
            self._add(priority, size, records=size % 7)
        self.num_appended += len(sizes)
        self._shrink()

    def _add(self, priority: Priority, size: int, *, records: int) -> None:
        self.seq += 1
        key = f"{DEVICE}/{self.outbox.boot}/{self.seq}"
        self.rows.append(ModelRow(key, priority, size + ROW_OVERHEAD_BYTES, records))

    def _shrink(self) -> None:
        while sum(row.size for row in self.rows) > LIMIT:
            spared = [row for row in self.rows if not row.is_leased and (row.is_aside or not row.is_gap)]
            if not spared:
                return
            victim = max(spared, key=lambda row: (row.is_aside, row.priority, -self.rows.index(row)))
            self.rows.remove(victim)
            if not victim.is_aside:
                self._lose(victim, "size_limit")

    def _lose(self, row: ModelRow, reason: str) -> None:
        self.pending[row.priority, reason] = self.pending.get((row.priority, reason), 0) + 1
        self.num_lost += 1

    @rule(most=st.integers(1, 4))
    def lease(self, most: int) -> None:
        if self.pending and not any(row.is_gap and not row.is_aside for row in self.rows):
            gaps = sorted(self.pending.items())
            body = encode_gaps(self.outbox.pending_gaps())
            assert [(Priority[g[0]], g[1]) for g in json.loads(body)] == [key for key, _ in gaps]
            assert [g[2] for g in json.loads(body)] == [batches for _, batches in gaps]
            self._add(Priority.GAP, len(body), records=len(gaps))
            self.pending = {}
        leased = self.outbox.lease(most)
        self.ids.update((row.key, row.id) for row in leased)
        due = [r for r in self.rows if not r.is_leased and not r.is_aside and r.not_before_s <= self.clock.now_s]
        due.sort(key=lambda row: row.priority)
        expected: list[ModelRow] = []
        for row in due[:most]:
            if expected and sum(r.size for r in [*expected, row]) > LIMIT // LEASE_SHARE:
                break
            expected.append(row)
        assert [row.key for row in leased] == [row.key for row in expected]
        assert not self.acknowledged & {row.key for row in leased}, "what was acknowledged is not sent again"
        for row in expected:
            row.is_leased = True

    def _some_leased(self, which: int) -> list[ModelRow]:
        return [row for i, row in enumerate(r for r in self.rows if r.is_leased) if which >> i & 1]

    @precondition(lambda self: any(row.is_leased for row in self.rows))
    @rule(which=st.integers(1, 15))
    def acknowledge(self, which: int) -> None:
        done = self._some_leased(which)
        self.outbox.acknowledge([self.ids[row.key] for row in done])
        for row in done:
            self.rows.remove(row)
            self.acknowledged.add(row.key)
            self.num_delivered += not row.is_gap

    @precondition(lambda self: any(row.is_leased for row in self.rows))
    @rule(which=st.integers(1, 15))
    def release(self, which: int) -> None:
        back = self._some_leased(which)
        self.outbox.release([self.ids[row.key] for row in back])
        for row in back:
            row.is_leased = False

    @precondition(lambda self: any(row.is_leased for row in self.rows))
    @rule(which=st.integers(1, 15))
    def reject(self, which: int) -> None:
        for row in self._some_leased(which)[:1]:
            self.outbox.reject(self.ids[row.key], retry_after_s=10)
            row.is_leased = False
            row.rejections += 1
            row.not_before_s = self.clock.now_s + 10
            if row.rejections == MAX_REJECTIONS:
                row.is_aside = True
                self._lose(row, "rejected")
                self.num_lost -= row.is_gap

    @rule(seconds=st.sampled_from([1, 30]))
    def pass_time(self, seconds: int) -> None:
        self.clock.now_s += seconds

    @rule()
    def restart(self) -> None:
        before = self.outbox.clock_s()
        self.outbox.close()
        self.clock.now_s -= 500  # a monotonic clock begins anew with each boot
        self.open()
        assert self.outbox.clock_s() <= before
        for row in self.rows:
            row.is_leased, row.not_before_s = False, float("-inf")

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "outbox"):
            return
        stats = self.outbox.stats()
        waiting = [row for row in self.rows if not row.is_aside]
        assert stats.rows == len(waiting)
        assert stats.quarantined_rows == len(self.rows) - len(waiting)
        assert stats.size_bytes == sum(row.size for row in self.rows)
        gap_bytes = sum(row.size for row in self.rows if row.is_gap)
        assert stats.size_bytes - gap_bytes <= LIMIT
        assert {(g.priority, g.reason): g.batches for g in self.outbox.pending_gaps()} == self.pending
        kept = sum(not row.is_gap for row in waiting)
        assert self.num_appended == self.num_delivered + kept + self.num_lost, "none is lost uncounted"

    def teardown(self) -> None:
        self.outbox.close()
        shutil.rmtree(self.directory)


OutboxMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestOutboxAgainstAModel = OutboxMachine.TestCase


# ---------------------------------------------------------------- what the model cannot know


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where an outbox may be."""
    return tmp_path / "telemetry.db"


def test_each_commit_is_synced_and_the_file_is_private(path: Path) -> None:
    with closing(open_outbox(path)) as outbox:
        outbox.append([usage()])
        connection: sqlite3.Connection = outbox._db  # pyright: ignore[reportPrivateUsage]  # its settings are per connection
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,), "2 is FULL"
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        for file in path.parent.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_keys_name_device_start_and_number_and_survive_a_restart(path: Path) -> None:
    with closing(open_outbox(path)) as first:
        first.append([usage(b"a"), usage(b"b")])
        boot = first.boot
    with closing(open_outbox(path)) as second:
        second.append([usage(b"c")])
        assert second.boot != boot
        assert [(row.key, row.body) for row in second.lease(10)] == [
            (f"{DEVICE}/{boot}/1", b"a"),
            (f"{DEVICE}/{boot}/2", b"b"),
            (f"{DEVICE}/{second.boot}/1", b"c"),
        ]


def test_age_is_the_time_the_outbox_was_open_whatever_the_clock_says(path: Path) -> None:
    clock = Clock()
    with closing(open_outbox(path, clock=clock, max_age_s=100)) as outbox:
        outbox.append([usage(b"old")])
        clock.now_s += 60
        outbox.append([usage(b"young")])
    clock.now_s = 5.0  # the board starts anew: its monotonic clock does too
    with closing(open_outbox(path, clock=clock, max_age_s=100)) as outbox:
        assert [round(row.age_s) for row in read_rows(path)] == [60, 0]
        clock.now_s += 50
        outbox.append([usage(b"new")])
        assert [row.body for row in outbox.lease(10) if row.signal == "traces"] == [b"young", b"new"]
        assert outbox.stats().dropped_rows == 1


def test_what_is_under_way_is_never_dropped(path: Path) -> None:
    with closing(open_outbox(path)) as outbox:
        outbox.append([usage(b"t" * 10_000, priority=Priority.TRACE)])
        (leased,) = outbox.lease(1)
        outbox.append([usage(b"u" * 10_000) for _ in range(10)])
        outbox.acknowledge([leased.id])
        assert outbox.stats().sent_rows == 1
        assert {gap.priority for gap in outbox.pending_gaps()} == {Priority.USAGE}


def test_faults_outlive_traces(path: Path) -> None:
    with closing(open_outbox(path)) as outbox:
        for priority in (Priority.FAULT, Priority.USAGE, Priority.METRIC, Priority.TRACE) * 4:
            outbox.append([usage(b"x" * 7000, priority=priority)])
        kept = [row.priority for row in read_rows(path)]
        assert kept.count(Priority.FAULT) == kept.count(Priority.USAGE) == 4
        assert kept.count(Priority.TRACE) == 0
        first, *_ = outbox.lease(1)
        assert first.signal == "logs", "the report of what was dropped goes first"


def test_a_newer_file_is_refused_and_an_empty_one_is_made(path: Path) -> None:
    path.touch()
    open_outbox(path).close()
    with closing(sqlite3.connect(path)) as db:
        assert version_of(db) == SCHEMA_VERSION
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    with pytest.raises(NewerFormat, match="newer slm-edge"):
        open_outbox(path)
    with pytest.raises(StoreError, match="Update"):
        read_stats(path, limit_bytes=LIMIT)


def test_a_damaged_file_is_told_apart_and_set_aside(path: Path) -> None:
    path.write_bytes(b"not a database at all" * 1000)
    with pytest.raises(CorruptDatabase) as caught:
        open_outbox(path)
    set_aside(caught.value.path)
    open_outbox(path).close()
    assert path.with_name("telemetry.db.damaged").read_bytes().startswith(b"not a database")


@contextmanager
def no_file_larger_than(size_bytes: int) -> Generator[None]:
    """The disk takes no more: every write past that size fails, as on a full one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_nothing_loses_nothing_that_was_there(path: Path) -> None:
    with closing(open_outbox(path, limit_bytes=1 << 20)) as outbox:
        outbox.append([usage(b"before")])
        (leased,) = outbox.lease(1)
        with no_file_larger_than(max(f.stat().st_size for f in path.parent.iterdir())):
            with pytest.raises(StoreError):
                outbox.append([usage(b"x" * 200_000)])
            with pytest.raises(StoreError):
                outbox.acknowledge([leased.id])
            assert outbox.lease(5) == [], "what was sent stays leased, so that it is not sent again"
        outbox.append([usage(b"after")])
        outbox.acknowledge([leased.id])
        assert [row.body for row in outbox.lease(5)] == [b"after"]
        assert outbox.stats().rows == 1


def test_a_full_database_is_an_error_like_any_other(path: Path) -> None:
    with closing(open_outbox(path)) as outbox:
        connection: sqlite3.Connection = outbox._db  # pyright: ignore[reportPrivateUsage]  # the one way to a real SQLITE_FULL
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(StoreError, match="disk space"):
            outbox.append([usage(b"x" * 30_000)])
        connection.execute("PRAGMA max_page_count=100000")
        outbox.append([usage(b"x" * 30_000)])
        assert outbox.stats().rows == 1


def test_looking_changes_nothing(path: Path) -> None:
    with closing(open_outbox(path)) as outbox:
        outbox.append([usage(str(number).encode()) for number in range(5)])
        assert [row.body for row in read_rows(path, max_rows=2)] == [b"3", b"4"]
        assert [row.body for row in read_rows(path, after_id=4)] == [b"4"]
        assert read_stats(path, limit_bytes=LIMIT).rows == 5
        assert len(outbox.lease(10)) == 5
    with pytest.raises(StoreError):
        read_rows(path.with_name("absent.db"))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    lock = OutboxLock(tmp_path / "telemetry.lock")
    with lock, pytest.raises(StoreError, match="Another process"):
        OutboxLock(tmp_path / "telemetry.lock").acquire()
    with OutboxLock(tmp_path / "telemetry.lock"):
        lock.release()


def test_the_device_keeps_its_id(tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    first = load_device_id(home)
    assert load_device_id(home) == first
    assert [file.name for file in home.iterdir()] == ["device-id"]
    (home / "device-id").write_text("me")
    with pytest.raises(StoreError, match="no device id"):
        load_device_id(home)
