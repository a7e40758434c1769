"""The kept responses: whose they are, what goes when room runs out, and what a damaged or full disk costs."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Generator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import StoreError
from edge.responses import MAX_AGE_S, TIDY_S, KeptResponse, ResponseStore

T = TypeVar("T")
BODY = b"x" * 1000
SIZE = KeptResponse("", "", None, b"", BODY).size_bytes


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def row(name: str, *, key: str = "", previous: str | None = None, body: bytes = BODY) -> KeptResponse:
    return KeptResponse(name, key, previous, b"", body)


@contextmanager
def opened(
    path: Path, *, room: int = 1000, max_responses: int = 100, clock: Clock | None = None
) -> Generator[ResponseStore]:
    """A store with room for so many rows."""
    store = ResponseStore(path, limit_bytes=room * SIZE, max_responses=max_responses, clock=clock or Clock())
    with closing(store):
        yield store


def done(future: Future[T]) -> T:
    return future.result(20)


def chain(store: ResponseStore, name: str, *, key: str = "", max_responses: int = 100) -> list[str]:
    return [r.id for r in done(store.chain(key, name, max_responses=max_responses, max_bytes=1 << 20))]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "responses.db"


def test_a_conversation_is_a_chain(path: Path) -> None:
    with opened(path) as store:
        for name, previous in (("a", None), ("b", "a"), ("c", "b"), ("other", "a")):
            done(store.keep(row(name, previous=previous)))
        assert chain(store, "c") == ["a", "b", "c"]
        assert chain(store, "c", max_responses=2) == ["b", "c"]
    with opened(path) as store:
        assert chain(store, "other") == ["a", "other"], "it outlives the process"
        assert done(store.delete("", "a"))
        assert not done(store.delete("", "a"))
        assert chain(store, "c") == ["b", "c"]


def test_another_keys_response_is_not_there(path: Path) -> None:
    with opened(path) as store:
        done(store.keep(row("a", key="one")))
        done(store.keep(row("b", key="two", previous="a")))
        assert chain(store, "a", key="two") == []
        assert chain(store, "a") == []
        assert chain(store, "b", key="two") == ["b"]
        assert not done(store.delete("two", "a"))
        assert chain(store, "a", key="one") == ["a"]


def test_only_its_owner_reads_the_file(path: Path) -> None:
    with opened(path) as store:
        done(store.keep(row("a")))
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()}
    assert set(modes.values()) == {0o600}, modes


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_what_was_deleted_is_overwritten_before_it_is_told(path: Path, is_checkpointed: bool) -> None:
    for size in (100, 10_000):
        with opened(path) as store:
            done(store.keep(row("a", body=b"SECRET" * size)))
            assert b"SECRET" in on_the_disk(path)
            if is_checkpointed:
                with closing(sqlite3.connect(path)) as db:
                    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            assert done(store.delete("", "a"))
            assert b"SECRET" not in on_the_disk(path)


def test_what_gave_up_its_room_is_overwritten_when_it_is_tidied(path: Path) -> None:
    clock = Clock()
    with opened(path, max_responses=1, clock=clock) as store:
        done(store.keep(row("a", body=b"SECRET" * 100)))
        done(store.keep(row("b")))
        clock.now_s += TIDY_S
        store.tidy()
        assert chain(store, "b") == ["b"]
        assert b"SECRET" not in on_the_disk(path)


def on_the_disk(path: Path) -> bytes:
    return b"".join(p.read_bytes() for p in path.parent.iterdir())


@pytest.mark.parametrize("max_responses", [8, 100])
def test_the_oldest_goes_first(path: Path, max_responses: int) -> None:
    with opened(path, room=8, max_responses=max_responses) as store:
        for i in range(12):
            done(store.keep(row(f"r{i}")))
        assert [i for i in range(12) if chain(store, f"r{i}")] == list(range(4, 12))


def test_what_is_gone_on_from_is_in_use(path: Path) -> None:
    clock = Clock()
    with opened(path, room=8, clock=clock) as store:
        for i in range(8):
            clock.now_s += 1
            done(store.keep(row(f"r{i}")))
        clock.now_s += 1
        done(store.keep(row("next", previous="r0")))
        assert chain(store, "next") == ["r0", "next"]
        assert chain(store, "r1") == []


def test_a_key_that_keeps_much_pushes_nobody_out(path: Path) -> None:
    with opened(path, room=10) as store:
        done(store.keep(row("mine", key="small")))
        for i in range(30):
            done(store.keep(row(f"r{i}", key="large")))
        assert chain(store, "mine", key="small") == ["mine"]


def test_old_ones_go_though_nothing_comes(path: Path) -> None:
    clock = Clock()
    with opened(path, clock=clock) as store:
        done(store.keep(row("old")))
        clock.now_s += MAX_AGE_S - TIDY_S
        done(store.keep(row("young")))
    clock.now_s = 0.0  # a board that boots anew
    with opened(path, clock=clock) as store:
        store.tidy()
        assert chain(store, "old") == ["old"]
        clock.now_s += TIDY_S + 1
        store.tidy()
        assert chain(store, "old") == []
        assert chain(store, "young") == ["young"]


def test_tidying_makes_no_file(path: Path) -> None:
    with opened(path) as store:
        store.tidy()
    assert not path.exists()


def test_a_large_one_is_refused_and_nothing_goes_for_it(path: Path) -> None:
    with opened(path, room=8) as store:
        done(store.keep(row("a")))
        with pytest.raises(StoreError, match="larger than"):
            done(store.keep(row("b", body=b"x" * 3 * SIZE)))
        assert chain(store, "a") == ["a"]


def test_no_room_means_none_is_kept(path: Path) -> None:
    with opened(path, room=0) as store, pytest.raises(StoreError, match="keeps no responses"):
        done(store.keep(row("a")))


def test_a_damaged_file_is_set_aside(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.write_bytes(b"this is no database" * 1000)
    with opened(path) as store:
        done(store.keep(row("a")))
        assert chain(store, "a") == ["a"]
        assert store.error is None
    assert path.with_name("responses.db.damaged").read_bytes().startswith(b"this is no database")
    assert "set aside" in caplog.text


def test_so_is_one_that_is_damaged_while_it_is_used(path: Path) -> None:
    with opened(path) as store:
        for i in range(50):
            done(store.keep(row(f"r{i}")))
    pages = path.read_bytes()
    path.write_bytes(pages[:4096] + b"\xff" * (len(pages) - 4096))
    with opened(path) as store:
        assert chain(store, "r0") == []
        done(store.keep(row("a")))
        assert chain(store, "a") == ["a"]


def test_a_newer_format_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version=99")
    with opened(path) as store:
        with pytest.raises(StoreError, match="format 99"):
            done(store.keep(row("a")))
        assert store.error is not None
    assert not path.with_name("responses.db.damaged").exists()


def test_a_removed_file_is_made_again(path: Path) -> None:
    with opened(path) as store:
        done(store.keep(row("a")))
        path.unlink()
        done(store.keep(row("b")))
        assert chain(store, "a") == []
        assert chain(store, "b") == ["b"]


def test_a_full_disk_is_an_error_and_passes(path: Path) -> None:
    with opened(path) as store:
        done(store.keep(row("a")))
        with _full_disk(), pytest.raises(StoreError):
            done(store.keep(row("b", body=b"x" * 200_000)))
        assert store.error is not None
        done(store.keep(row("c")))
        assert store.error is None
        assert [chain(store, name) for name in "abc"] == [["a"], [], ["c"]]


@contextmanager
def _full_disk() -> Generator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_who_stopped_waiting_costs_the_others_nothing(path: Path) -> None:
    with opened(path) as store:
        done(store.keep(row("first")))
        futures = [store.keep(row(f"r{i}")) for i in range(20)]
        for future in futures[::2]:
            future.cancel()
        for future in futures[1::2]:
            done(future)
        assert chain(store, "r19") == ["r19"]


_WRITER = """
import sys
from pathlib import Path
from edge.responses import KeptResponse, ResponseStore
store = ResponseStore(Path(sys.argv[1]), limit_bytes=64 << 20)
for i in range(1000):
    store.keep(KeptResponse(f"r{i}", "", None, b"", b"x" * 3000)).result()
    print(i, flush=True)
"""


def test_what_was_told_survives_a_kill(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(30)]
        os.kill(process.pid, signal.SIGKILL)
        told += [int(line) for line in process.stdout]
    with opened(path) as store:
        assert [i for i in told if not chain(store, f"r{i}")] == []


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3000)), max_size=30))
@settings(max_examples=25, deadline=None)
def test_it_never_holds_more_than_it_may(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]]) -> None:
    path = tmp_path_factory.mktemp("responses") / "responses.db"
    with opened(path, room=10, max_responses=6) as store:
        for i, (key, size) in enumerate(rows):
            kept = row(f"r{i}", key=key, body=b"x" * size)
            if kept.size_bytes > 10 * SIZE // 4:
                continue
            done(store.keep(kept))
            assert chain(store, f"r{i}", key=key) == [f"r{i}"]
            found = [r for j, (k, _) in enumerate(rows) for r in done(_all(store, k, f"r{j}"))]
            assert len(found) <= 6
            assert sum(r.size_bytes for r in found) <= 10 * SIZE


def _all(store: ResponseStore, key: str, name: str) -> Future[list[KeptResponse]]:
    return store.chain(key, name, max_responses=1, max_bytes=1 << 20)
