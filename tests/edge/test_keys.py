"""Keys: what is kept of them, who is let in, and what their use adds up to."""

from __future__ import annotations

import copy
import csv
import io
import json
import sqlite3
import stat
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.access import audit
from edge.access.audit import Act, Head, parse_head
from edge.access.keys import (
    KEY_LENGTH,
    ROLES,
    Key,
    KeyReader,
    Keys,
    Limits,
    key_id_of,
    parse_scopes,
    read_key,
    read_keys,
)
from edge.access.quota import DAY_S, WINDOW_S, RequestWindow, TokenDay
from edge.access.state import open_state
from edge.access.usage import Account, Usage, read_usage
from edge.access.writer import SavedDay, StateWriter, load_day
from edge.database import NewerFormat, transaction
from edge.errors import AuditBroken, InvalidRequest, KeyNotFound, StoreError
from tests.support import run_edge


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


def make(path: Path, name: str = "", **limits: object) -> tuple[Key, str]:
    return Keys(path, actor="test").create(Limits(**limits), name=name)  # pyright: ignore[reportArgumentType]  # the tests' own


def find(path: Path, presented: str) -> Key | None:
    with closing(KeyReader(path)) as reader:
        return reader.find(presented)


# ---------------------------------------------------------------- keys


def test_a_key_is_found_by_itself_only_and_kept_as_a_hash(path: Path) -> None:
    made, key = make(path, "tablet", rpm=5, models=("smollm2:*",))
    assert find(path, key) == made == read_key(path, "tablet") == read_key(path, made.id)
    secret = key.rpartition("_")[2]
    for file in path.parent.iterdir():
        assert secret.encode() not in file.read_bytes()
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0
    assert secret not in repr(made)
    assert made.digest.hex() not in repr(made)


HOSTILE: list[Callable[[str], str]] = [
    lambda k: "",
    lambda k: k[:-1],
    lambda k: k + "x",
    lambda k: k + "\0",
    lambda k: "\0" + k[1:],
    lambda k: k + "\n",
    lambda k: k.upper(),
    lambda k: k.swapcase(),
    lambda k: k.replace("edge", "ed" + chr(0x501) + "e"),
    lambda k: k[:-1] + chr(0xFF10),  # a digit, in Unicode's view
    lambda k: k * 100_000,
    lambda k: k[:5] + "%" + k[6:],  # a pattern of SQL's LIKE
    lambda k: k[:16] + "_" + "' OR '1'='1".ljust(40, "x"),
    lambda k: k[:17] + ("a" if k[17] != "a" else "b") + k[18:],
    lambda k: k[:16] + "_" + "A" * 40,
    lambda k: "edge_" + "a" * 10 + "_" + "A" * 40,
]


@pytest.mark.parametrize("change", HOSTILE)
def test_what_is_not_the_key_is_nobody(path: Path, change: Callable[[str], str]) -> None:
    _, key = make(path)
    assert len(key) == KEY_LENGTH
    assert find(path, change(key)) is None


@given(st.text(max_size=80))
def test_any_text_is_a_key_or_none(text: str) -> None:
    assert key_id_of(text) is None or len(text) == KEY_LENGTH


def test_a_revoked_or_rotated_key_is_nobody_at_once_also_for_who_looked_before(path: Path) -> None:
    made, key = make(path, "tablet")
    keys = Keys(path, actor="test")
    with closing(KeyReader(path)) as reader:
        found = reader.find(key)
        assert found is not None
        assert reader.is_valid(found)
        _, second = keys.rotate("tablet")
        assert reader.find(key) is None
        assert not reader.is_valid(found)
        assert reader.find(second) is not None
        assert keys.revoke(made.id).revoked_s is not None
        assert keys.revoke("tablet").revoked_s is not None, "twice is as good as once"
        assert reader.find(second) is None
    with pytest.raises(KeyNotFound):
        keys.rotate("tablet")
    again, _ = make(path, "tablet")
    assert read_key(path, "tablet").id == again.id, "the name goes to the key that holds"


def test_readers_never_see_a_revoked_key_while_others_write(path: Path) -> None:
    """Revoking races with looking: after `revoke` returned, no look finds the key."""
    for _ in range(20):
        made, key = make(path)
        revoked, wrong = threading.Event(), list[bool]()

        def look(key: str = key, revoked: threading.Event = revoked, wrong: list[bool] = wrong) -> None:
            with closing(KeyReader(path)) as reader:
                while True:
                    was_revoked = revoked.is_set()
                    wrong.append(reader.find(key) is not None and was_revoked)
                    if was_revoked:
                        return

        thread = threading.Thread(target=look)
        thread.start()
        Keys(path, actor="test").revoke(made.id)
        revoked.set()
        thread.join()
        assert not any(wrong)


WRONG: list[dict[str, object]] = [
    {"scopes": frozenset()},
    {"rpm": 0},
    {"rpm": 1 << 40},
    {"tokens_per_day": -1},
    {"priority": 4},
    {"models": ("a b",)},
    {"models": ("a\0",)},
    {"models": ("a",) * 1000},
]


@pytest.mark.parametrize("limits", WRONG)
def test_limits_out_of_range_are_refused(path: Path, limits: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        make(path, "", **limits)
    assert read_keys(path) == []


@pytest.mark.parametrize("name", ["-x", "a b", "x" * 65, "a\n", "ü", "../x"])
def test_names_are_plain_and_one_key_has_each(path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest):
        make(path, name)
    make(path, "tablet")
    with pytest.raises(InvalidRequest):
        make(path, "tablet")


def test_scopes_imply_what_they_need() -> None:
    assert parse_scopes(" chat, embed") == ROLES["user"]
    assert parse_scopes("admin") == {"admin", "operate", "view"}
    for text in ("", "chat,root", "Chat", "*"):
        with pytest.raises(InvalidRequest):
            parse_scopes(text)


def test_patterns_of_models_match_whole_names() -> None:
    limits = Limits(models=("smollm2:*", "minilm:l6-v2"))
    allowed = ["smollm2:135m-instruct", "smollm2:", "minilm:l6-v2", "minilm:l6-v2-x", "x/smollm2:135m", "SMOLLM2:x"]
    assert [m for m in allowed if limits.may_use(m)] == ["smollm2:135m-instruct", "smollm2:", "minilm:l6-v2"]
    assert Limits().may_use("anything")


def test_a_newer_database_is_refused(path: Path) -> None:
    make(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(NewerFormat):
        make(path)
    with pytest.raises(StoreError):
        KeyReader(path)


def test_a_reader_knows_when_its_file_is_no_longer_the_one(path: Path) -> None:
    _, key = make(path)
    with closing(KeyReader(path)) as reader:
        assert reader.is_current
        path.unlink()
        assert not reader.is_current
        make(path)
        assert not reader.is_current
    assert find(path, key) is None


# ---------------------------------------------------------------- quotas


@given(st.integers(1, 5), st.lists(st.floats(0, 40), max_size=60))
def test_no_minute_has_more_requests_than_the_limit(limit: int, waits: list[float]) -> None:
    window, now_s, taken = RequestWindow(limit), 0.0, list[float]()
    for wait_s in waits:
        now_s += wait_s
        left = window.left(now_s)
        refused = window.take(now_s)
        assert (refused is None) == (left > 0)
        if refused is None:
            taken.append(now_s)
        else:
            assert 0 <= refused <= WINDOW_S
            assert copy.deepcopy(window).left(now_s + refused + 1e-6) > 0
    for start in taken:
        assert sum(start <= t < start + WINDOW_S for t in taken) <= limit


@given(st.integers(1, 8), st.integers(0, 9), st.lists(st.tuples(st.floats(0, 20), st.booleans()), max_size=60))
def test_who_is_not_waited_for_leaves_room_to_others(limit: int, spared: int, steps: list[tuple[float, bool]]) -> None:
    window, now_s = RequestWindow(limit), 0.0
    for wait_s, is_waited_for in steps:
        now_s += wait_s
        left = window.left(now_s)
        refused = window.take(now_s, spared=0 if is_waited_for else spared)
        needed = 0 if is_waited_for else min(spared, limit - 1)
        assert (refused is None) == (left > needed)
        if refused is not None:
            assert copy.deepcopy(window).take(now_s + refused + 1e-6, spared=needed) is None


@given(st.integers(1, 100), st.lists(st.tuples(st.floats(0, DAY_S), st.integers(0, 60)), max_size=30))
def test_a_day_takes_its_tokens_and_no_request_more(limit: int, steps: list[tuple[float, int]]) -> None:
    """Who is let in only while tokens are left takes at most the limit and one request more, in each day."""
    day, now_s, took, began_s = TokenDay(limit, now_s=0.0), 0.0, 0, 0.0
    for wait_s, tokens in steps:
        now_s += wait_s
        if not took or now_s - began_s >= DAY_S:
            took, began_s = 0, now_s
        assert day.left(now_s) == max(0, limit - took)
        if day.left(now_s):
            day.take(tokens, now_s)
            took += tokens
        assert took < limit + 60
        used, elapsed_s = day.state(now_s)
        again = TokenDay(limit, now_s=500.0, used_tokens=used, elapsed_s=elapsed_s)
        assert again.left(500.0) == day.left(now_s), "a restart forgets nothing"


def test_a_day_goes_on_by_the_clock_or_by_what_the_device_ran(path: Path) -> None:
    with closing(open_state(path)) as db:
        with transaction(db):
            db.execute("INSERT INTO quotas VALUES ('k', 90, 1000.0, 1e9)")
        assert load_day(db, "k", now_s=1e9 + 50) == SavedDay(90, 1050.0)
        assert load_day(db, "k", now_s=10.0) == SavedDay(90, 1000.0), "a board that boots in 1970"
        assert load_day(db, "k", now_s=2e9) == SavedDay(90, 1000.0 + DAY_S)
        assert load_day(db, "other", now_s=2e9) == SavedDay(0, 0.0)


# ---------------------------------------------------------------- usage


counts = st.builds(Usage, *[st.integers(0, 9)] * 7)
accounts = st.builds(Account, st.sampled_from(["2026-01-01", "2026-01-02"]), st.sampled_from(["", "k"]), st.just("m"))


@settings(max_examples=20)
@given(st.lists(st.tuples(accounts, counts), max_size=20), st.sampled_from([("key",), ("day", "model"), ()]))
def test_every_table_adds_up_to_what_was_counted(
    tmp_path_factory: pytest.TempPathFactory,
    used: list[tuple[Account, Usage]],
    by: tuple[str, ...],
) -> None:
    path = tmp_path_factory.mktemp("usage") / "state.db"
    writer = StateWriter(path)
    writer.start()
    for account, what in used:
        writer.meter(account, what)
    writer.close()
    rows = read_usage(path, by)  # pyright: ignore[reportArgumentType]  # of the literal's values
    total = Usage()
    for row in rows:
        total = total.plus(row.usage)
    expected = Usage()
    for _, what in used:
        expected = expected.plus(what)
    assert total == expected


def test_what_the_disk_refuses_waits_and_is_counted_once(path: Path) -> None:
    writer = StateWriter(path)
    writer.start()
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("ALTER TABLE usage RENAME TO elsewhere")
        writer.meter(Account("2026-01-01", "k", "m"), Usage(requests=1))
        with pytest.raises(StoreError):
            writer.note(Act("me", "x")).result(10)
        assert writer.error is not None
        db.execute("ALTER TABLE elsewhere RENAME TO usage")
    writer.meter(Account("2026-01-01", "k", "m"), Usage(requests=2))
    assert writer.note(Act("me", "x")).result(10).seq == 1
    writer.close()
    assert writer.error is None
    (row,) = read_usage(path, ("key",))
    assert row.usage.requests == 3


def test_what_nobody_waits_for_any_more_is_noted_and_counted_once(path: Path) -> None:
    writer = StateWriter(path)
    writer.start()
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        first = writer.note(Act("me", "a"))
        while not first.running():
            time.sleep(0.001)
        given_up = writer.note(Act("me", "b"))
        writer.meter(Account("2026-01-01", "k", "m"), Usage(requests=1))
        assert given_up.cancel()
        db.execute("ROLLBACK")
    assert writer.note(Act("me", "c")).result(10).seq == 3
    writer.close()
    assert [line.act.act for line in audit.read_lines(path)] == ["a", "b", "c"]
    (row,) = read_usage(path, ("key",))
    assert row.usage.requests == 1


def test_a_file_that_is_removed_is_made_anew(path: Path) -> None:
    writer = StateWriter(path)
    writer.start()
    writer.note(Act("me", "x")).result(10)
    for file in path.parent.iterdir():
        file.unlink()
    assert writer.note(Act("me", "y")).result(10).seq == 1
    writer.close()
    assert [line.act.act for line in audit.read_lines(path)] == ["y"]


def test_a_closed_writer_takes_no_lines(path: Path) -> None:
    writer = StateWriter(path)
    writer.start()
    writer.close()
    writer.close()
    with pytest.raises(StoreError):
        writer.note(Act("me", "x")).result(1)


# ---------------------------------------------------------------- the audit log


def log_of(path: Path, count: int) -> list[Head]:
    with closing(open_state(path)) as db:
        heads: list[Head] = []
        for i in range(count):
            with transaction(db):
                heads.append(audit.append(db, Act("me", "model.load", f"m{i}"), now_s=float(i)))
    return heads


TAMPERINGS = [
    "UPDATE audit SET target = 'other' WHERE seq = 3",
    "UPDATE audit SET time_s = 0 WHERE seq = 3",
    "UPDATE audit SET outcome = 'failed' WHERE seq = 5",
    "UPDATE audit SET digest = zeroblob(32) WHERE seq = 3",
    "UPDATE audit SET actor = x'00ff' WHERE seq = 3",
    "DELETE FROM audit WHERE seq = 1",
    "DELETE FROM audit WHERE seq = 3",
    "DELETE FROM audit WHERE seq = 5",
    "DELETE FROM audit WHERE seq > 2",
    "DELETE FROM audit",
    "INSERT INTO audit SELECT 6, time_s, actor, act, target, outcome, digest FROM audit WHERE seq = 5",
    "INSERT INTO audit SELECT 0, time_s, actor, act, target, outcome, digest FROM audit WHERE seq = 5",
    "UPDATE audit_ends SET seq = 3, digest = (SELECT digest FROM audit WHERE seq = 3) WHERE name = 'head'",
    "UPDATE audit_ends SET seq = 2, digest = (SELECT digest FROM audit WHERE seq = 2) WHERE name = 'start'",
    "DELETE FROM audit_ends",
]


@pytest.mark.parametrize("statement", TAMPERINGS)
def test_a_log_that_somebody_changed_is_told_from_one_that_nobody_did(path: Path, statement: str) -> None:
    heads = log_of(path, 5)
    assert audit.verify(path) == heads[-1]
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(statement)
    with pytest.raises(AuditBroken):
        audit.verify(path)


def test_a_log_that_was_written_anew_does_not_lead_through_a_head_that_was_seen(path: Path) -> None:
    heads = log_of(path, 5)
    for head in heads:
        assert audit.verify(path, seen=head) == heads[-1]
        assert parse_head(str(head)) == head
    path.unlink()
    with closing(open_state(path)) as db, transaction(db):
        audit.append(db, Act("me", "nothing"), now_s=0.0)
    audit.verify(path)
    for head in heads:
        with pytest.raises(AuditBroken):
            audit.verify(path, seen=head)


def test_the_oldest_lines_go_and_the_rest_still_verifies(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "MAX_LINES", 20)
    heads = log_of(path, 70)
    lines = audit.read_lines(path)
    assert len(lines) <= 20
    assert lines[-1].seq == 70
    assert audit.verify(path) == heads[-1]
    assert audit.verify(path, seen=heads[0]) == heads[-1], "what is forgotten cannot be held against anything"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("DELETE FROM audit WHERE seq = (SELECT min(seq) FROM audit)")
    with pytest.raises(AuditBroken):
        audit.verify(path)


# ---------------------------------------------------------------- the commands


def test_the_commands_make_show_and_end_keys(tmp_path: Path) -> None:
    def edge(*args: str, code: int = 0) -> str:
        done = run_edge(*args, home=tmp_path)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    made = json.loads(edge(
        "key", "create", "tablet", "--scope", "chat,embed,admin", "--models", "smollm2:*,minilm:l6-v2", "--rpm", "60",
        "--tokens-per-day", "1000", "--priority", "2", "--json",
    ))  # fmt: skip
    key = made.pop("key")
    assert json.loads(edge("key", "show", "tablet", "--json")) == made
    assert made["scopes"] == ["chat", "embed", "view", "operate", "admin"]
    assert (made["models"], made["rpm"], made["priority"]) == (["smollm2:*", "minilm:l6-v2"], 60, 2)
    plain = edge("key", "create")
    assert plain.startswith("edge_")
    assert len(plain.strip()) == KEY_LENGTH
    listed = edge("key", "list")
    assert "tablet" in listed
    assert key not in listed
    assert "is revoked" in edge("key", "revoke", made["id"])
    assert "tablet" not in edge("key", "list")
    assert "tablet" in edge("key", "list", "--all")
    assert "There is no key 'nobody'" in edge("key", "revoke", "nobody", code=3)
    for args in (
        ("--role", "root"),
        ("--scope", "chat", "--role", "user"),
        ("--scope", "everything"),
        ("--rpm", "0"),
        ("--priority", "9"),
        ("--models", ","),
        ("-x",),
    ):
        edge("key", "create", *args, code=2)
    acts = json.loads(edge("audit", "show", "--json"))["lines"]
    assert [line["act"] for line in acts] == ["key.create", "key.create", "key.revoke"]
    head = edge("audit", "verify").strip()
    edge("audit", "verify", "--head", head)
    edge("audit", "verify", "--head", "nonsense", code=2)
    with closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as db:
        db.execute("DELETE FROM audit WHERE seq = 3")
    assert "line 3 is cut off" in edge("audit", "verify", code=1)


def test_usage_is_printed_in_three_ways(tmp_path: Path) -> None:
    assert "nothing was used" in run_edge("usage", home=tmp_path).stderr
    made, _ = make(tmp_path / "state.db", "tablet")
    writer = StateWriter(tmp_path / "state.db")
    writer.start()
    for day, model in (("2026-01-01", "m"), ("2026-01-02", "m"), ("2026-01-02", "")):
        writer.meter(Account(day, made.id, model), Usage(1, 0, 0, 10, 5, 2, 0))
    writer.close()
    as_json = json.loads(run_edge("usage", "--by", "day,model", "--json", home=tmp_path).stdout)["usage"]
    assert [(row["day"], row["model"], row["input_tokens"]) for row in as_json] == [
        ("2026-01-01", "m", 10), ("2026-01-02", "", 10), ("2026-01-02", "m", 10),
    ]  # fmt: skip
    text = run_edge("usage", "--by", "key", "--since", "2026-01-02", "--csv", home=tmp_path).stdout
    (row,) = csv.DictReader(io.StringIO(text))
    assert (row["key"], row["name"], row["requests"], row["output_tokens"]) == (made.id, "tablet", "2", "10")
    assert "tablet" in run_edge("usage", home=tmp_path).stdout
    assert run_edge("usage", "--by", "key,planet", home=tmp_path).returncode == 2
