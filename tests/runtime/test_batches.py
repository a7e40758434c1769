"""Batches below the API: lines that are no requests, files that arrive, answers that count once, and the door."""

from __future__ import annotations

import asyncio
import io
import stat
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from litestar.types import Receive
from typing_extensions import override

from edge.access.keys import Keys, Limits
from edge.access.state import open_state
from edge.config import Settings
from edge.database import connect, connect_read_only
from edge.errors import (
    BatchNotFound,
    DiskFull,
    EdgeError,
    FileInUse,
    FileTooLarge,
    InvalidRequest,
    KeyNotFound,
    QueueFull,
    RateLimited,
    StorageFull,
    StoredFileNotFound,
)
from edge.store.files import FileOps
from runtime.api.access import LAST, Access, Caller, Meter
from runtime.api.batches import database, ledger
from runtime.api.batches.answers import MAX_TRIES, Answer, answer_of, wait_before_retry_s
from runtime.api.batches.files import plain_name
from runtime.api.batches.forms import Form, read_form
from runtime.api.batches.gate import Gate, has_room, lines_at_once
from runtime.api.batches.inside import Reply
from runtime.api.batches.lines import MAX_ERRORS, MAX_LINES, Line, check_lines, raw_lines, unanswered
from runtime.api.batches.outputs import finish, write_outputs
from runtime.api.batches.schema import Batch
from runtime.api.batches.store import FILES_OF_KEY, BatchStore
from runtime.api.batches.uploads import RESERVE_BYTES, Upload
from runtime.api.threads import Stopped

CHAT = "/v1/chat/completions"
NOW = 1_800_000_000.0


def request(custom_id: str = "a", **more: Any) -> bytes:
    return msgspec.json.encode({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": {"model": "m"}, **more})


def checked(data: bytes, *, max_bytes: int = 1000) -> tuple[int, list[tuple[str, int | None, str | None]]]:
    num, errors = check_lines(raw_lines(io.BytesIO(data), max_bytes=max_bytes), CHAT)
    return num, [(e.code, e.line, e.param) for e in errors]


# ---------------------------------------------------------------- lines


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"[]", "invalid_request", None),
        (b"3", "invalid_request", None),
        (b"\x00", "invalid_json_line", None),
        (b'{"custom_id": "\x00"}', "invalid_json_line", None),
        (b'{"custom_id": "\xff", "method": "POST"}', "invalid_json_line", None),
        (b'{"custom_id": "\\ud800"}', "invalid_json_line", None),
        (b'{"custom_id":"a","method":"POST","url":"x","body":' + b"[" * 900, "invalid_json_line", None),
        (b"x" * 2000, "line_too_long", None),
        (b'{"method":"POST","url":"' + CHAT.encode() + b'","body":{}}', "missing_required_parameter", "custom_id"),
        (request(custom_id=""), "invalid_request", "custom_id"),
        (request(custom_id="x" * 600), "invalid_request", "custom_id"),
        (request(custom_id=7), "invalid_request", "custom_id"),  # pyright: ignore[reportArgumentType]  # that is the test
        (request(method="GET"), "invalid_method", "method"),
        (request(url="/v1/embeddings"), "mismatched_url", "url"),
        (request(url="http://evil.example" + CHAT), "mismatched_url", "url"),
        (request(body=[]), "invalid_body", "body"),
        (request(body="{}"), "invalid_body", "body"),
        (request(body=None), "invalid_body", "body"),
        (request(body={"stream": True}), "invalid_body", "body.stream"),
        (request(colour="red"), "invalid_request", None),
    ],
)
def test_lines_that_are_no_requests_are_told_by_their_numbers(line: bytes, code: str, param: str | None) -> None:
    num, errors = checked(b"\n".join([request("first"), line, request("last")]))
    assert num == 3
    assert [(c, n) for c, n, _ in errors] == [(code, 2)]
    if param is not None:
        assert errors[0][2] == param


def test_blank_lines_and_other_ends_of_lines_are_no_lines() -> None:
    data = b"\r\n".join([request("a"), b"", b"  ", request("b")])
    assert checked(data) == (2, [])
    assert [n for n, _ in raw_lines(io.BytesIO(data), max_bytes=1000)] == [1, 4]


def test_a_custom_id_is_used_once() -> None:
    assert checked(request("a") + b"\n" + request("a")) == (2, [("duplicate_custom_id", 2, "custom_id")])


def test_nobody_looks_at_a_million_lines() -> None:
    looked = [0]

    def lines(line: bytes) -> Generator[tuple[int, bytes]]:
        for number in range(1, 1_000_001):
            looked[0] = number
            yield number, line.replace(b"NUMBER", b"%d" % number)

    num, errors = check_lines(lines(request("NUMBER")), CHAT)
    assert num == MAX_LINES + 1 == looked[0]
    assert [e.code for e in errors] == ["too_many_requests"]
    num, errors = check_lines(lines(b"{}"), CHAT)
    assert (num, len(errors), looked[0]) == (MAX_ERRORS + 1, MAX_ERRORS, MAX_ERRORS + 1)


def test_blank_lines_are_counted() -> None:
    file = io.BytesIO(b"\n" * (4 * MAX_LINES) + request())
    num, errors = check_lines(raw_lines(file, max_bytes=1000), CHAT)
    assert (num, [e.code for e in errors]) == (1, ["too_many_requests"])
    assert file.tell() == MAX_LINES + 1


def test_an_empty_file_is_none() -> None:
    assert checked(b"\n\n")[1] == [("empty_file", None, None)]


@given(st.lists(st.binary(max_size=60).filter(lambda b: b"\n" not in b), max_size=20), st.integers(1, 40))
def test_lines_are_read_as_they_stand_or_are_too_long(lines: list[bytes], max_bytes: int) -> None:
    found = dict(raw_lines(io.BytesIO(b"\n".join(lines)), max_bytes=max_bytes))
    for number, line in enumerate(lines, 1):
        if len(line.rstrip(b"\r")) <= max_bytes and len(line) <= max_bytes:
            assert found.get(number, b"") == line.strip()
    assert all(data is None or 0 < len(data) <= max_bytes for data in found.values())


def test_only_lines_without_an_answer_are_read(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"\n".join(request(str(i)) for i in range(1, 6)))
    assert [line.custom_id for line in unanswered(path, CHAT, {2, 3}, max_bytes=1000)] == ["1", "4", "5"]


# ---------------------------------------------------------------- answers


def test_answers_are_as_openai_writes_them() -> None:
    line = Line(3, "näme", b"{}")
    good = answer_of(line, Reply(200, b'{"usage":{"prompt_tokens":5,"completion_tokens":2,"total_tokens":7}}'))
    written = msgspec.json.decode(good.data)
    assert (written["custom_id"], written["error"], written["response"]["status_code"]) == ("näme", None, 200)
    assert written["response"]["body"]["usage"]["total_tokens"] == 7
    assert (good.is_error, good.tokens, good.number) == (False, (5, 0, 2, 0), 3)
    bad = answer_of(line, Reply(422, b'{"error":{"code":"request_poisoned"}}'))
    assert (bad.is_error, bad.tokens) == (True, (0, 0, 0, 0))
    assert b"\n" not in good.data + bad.data


@pytest.mark.parametrize(
    ("reply", "num_tries", "wait_s"),
    [
        (Reply(200, b"{}"), 1, None),
        (Reply(400, b"{}"), 1, None),
        (Reply(422, b'{"error":{"code":"request_poisoned"}}'), 1, None),
        (Reply(500, b"{}"), 1, None),
        (Reply(507, b'{"error":{"code":"does_not_fit"}}'), 1, 5.0),
        (Reply(507, b'{"error":{"code":"does_not_fit"}}'), 2, 10.0),
        (Reply(507, b'{"error":{"code":"does_not_fit"}}'), 10_000, 60.0),
        (Reply(507, b'{"error":{"code":"no_room_to_pin"}}'), 1, None),
        (Reply(429, b"{}", 7.0), 1, 7.0),
        (Reply(429, b"{}", 7.0), 1000, 7.0),
        (Reply(429, b"{}", 80_000.0), 1, 600.0),
        (Reply(503, b'{"error":{"code":"model_loading"}}', 10.0), 1, 10.0),
        (Reply(503, b'{"error":{"code":"model_loading"}}', 10.0), MAX_TRIES, None),
        (Reply(503, b'{"error":{"code":"server_stopping"}}'), 10_000, 5.0),
    ],
)
def test_a_line_waits_for_its_turn_and_not_for_a_miracle(reply: Reply, num_tries: int, wait_s: float | None) -> None:
    assert wait_before_retry_s(reply, num_tries=num_tries) == wait_s


# ---------------------------------------------------------------- the door


@given(st.integers(1, 64), st.integers(0, 8), st.integers(0, 80), st.integers(0, 3))
def test_lines_leave_a_slot_to_others(slots: int, own: int, active: int, waiting: int) -> None:
    if has_room(own=own, active=active, waiting=waiting, slots=slots):
        assert not waiting
        assert own < lines_at_once(slots) <= max(1, slots // 4)
        assert max(own, active) < slots - 1 or slots == 1 or own == active == 0


async def test_who_comes_first_enters_first_and_as_many_as_there_is_room() -> None:
    room, entered = [2], list[int]()
    gate, leave = Gate(lambda own: own < room[0]), asyncio.Event()

    async def visit(number: int) -> None:
        async with gate.passed():
            entered.append(number)
            await leave.wait()

    visits = [asyncio.create_task(visit(i)) for i in range(5)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (entered, gate.num_inside) == ([0, 1], 2)
    leave.set()
    async with asyncio.timeout(10):
        await asyncio.gather(*visits)
    assert (entered, gate.num_inside) == ([0, 1, 2, 3, 4], 0)


# ---------------------------------------------------------------- files


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, max_file_bytes=4096)


@pytest.fixture
def clock() -> list[float]:
    """What the store's clock shows."""
    return [0.0]


@pytest.fixture
def store(settings: Settings, clock: list[float]) -> Generator[BatchStore]:
    opened = BatchStore(settings, monotonic=lambda: clock[0])
    yield opened
    opened.close()


def sent(store: BatchStore, data: bytes, *, key: str = "k", now_s: float = NOW, expires_s: float | None = None) -> str:
    upload = Upload(store.files.directory, limit_bytes=4096)
    upload.write(data)
    upload.keep()
    return store.files.add(key, upload, name="f.jsonl", now_s=now_s, expires_s=expires_s).id


def test_a_file_is_its_keys_alone(store: BatchStore) -> None:
    file_id = sent(store, b"hello")
    assert store.files.get("k", file_id).bytes == 5
    mode = store.files.path(file_id).stat().st_mode
    assert stat.S_IMODE(mode) == 0o600
    for key, name in (("other", file_id), ("", file_id), ("k", "../batches.db"), ("k", "file-x")):
        with pytest.raises(StoredFileNotFound):
            store.files.get(key, name)
        with pytest.raises(StoredFileNotFound):
            store.files.remove(key, name)
    store.files.remove("k", file_id)
    assert not store.files.path(file_id).exists()


def test_lists_go_on_after_one_of_them(store: BatchStore) -> None:
    ids = [sent(store, b"%d" % i) for i in range(5)]

    def listed(**more: Any) -> tuple[list[str], bool]:
        asked: dict[str, Any] = {"after": None, "limit": 2, "newest_first": True, "purpose": None, **more}
        found = store.files.list("k", **asked)
        return [f.id for f in found.data], found.has_more

    assert listed() == ([ids[4], ids[3]], True)
    assert listed(after=ids[3], limit=9) == ([ids[2], ids[1], ids[0]], False)
    assert listed(newest_first=False, after=ids[3]) == ([ids[4]], False)
    assert listed(purpose="batch_output") == ([], False)
    with pytest.raises(InvalidRequest):
        listed(after="file-nothing")


def test_a_key_has_room_for_so_much(store: BatchStore) -> None:
    file_ids = [sent(store, b"x" * 4096) for _ in range(FILES_OF_KEY)]
    with pytest.raises(StorageFull):
        sent(store, b"x")
    with pytest.raises(StorageFull):  # what comes of a batch needs room too
        store.create_batch("k", a_batch(file_ids[0]))
    sent(store, b"x", key="other")


def test_expired_files_go_unless_a_batch_reads_them(store: BatchStore, clock: list[float]) -> None:
    old, read = sent(store, b"1", expires_s=3600), sent(store, b"2", expires_s=3600)
    store.create_batch("k", a_batch(read))
    clock[0] = 4000.0
    store.tidy()
    assert not store.files.path(old).exists()
    assert store.files.path(read).exists()
    with pytest.raises(StoredFileNotFound):
        store.files.get("k", read)


def test_what_was_cut_off_is_swept_at_the_start(settings: Settings, store: BatchStore) -> None:
    kept = sent(store, b"kept")
    (settings.files_dir / "file-half.part").write_bytes(b"half")
    nameless = Upload(settings.files_dir, limit_bytes=4096)
    nameless.write(b"whole, and its row never came")
    nameless.keep()
    store.close()
    again = BatchStore(settings)
    assert [path.name for path in settings.files_dir.iterdir()] == [kept]
    assert again.files.get("k", kept).bytes == 4
    again.close()


class NearlyFull(FileOps):
    @override
    def free_bytes(self, path: Path) -> int:
        return RESERVE_BYTES + 10


def test_the_disk_keeps_its_reserve(tmp_path: Path) -> None:
    upload = Upload(tmp_path / "files", limit_bytes=4096, ops=NearlyFull())
    upload.write(b"x" * 10)
    with pytest.raises(DiskFull):
        upload.write(b"x" * 11)
    upload.discard()
    assert list((tmp_path / "files").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "passwd"), ("C:\\evil\\a.jsonl", "a.jsonl"), ("a\x00\nb\x1b[31m", "ab[31m"), ("", "file"),
        ("/", "file"), ("..", ".."), ("x" * 999, "x" * 255), ("größe.jsonl", "größe.jsonl"),
    ],
)  # fmt: skip
def test_names_are_shown_and_never_opened(name: str, shown: str) -> None:
    assert plain_name(name) == shown


# ---------------------------------------------------------------- forms


def receiving(chunks: Iterable[bytes], *, cut_off: bool = False) -> Receive:
    left = list(chunks)

    async def receive() -> Any:
        if not left and cut_off:
            return {"type": "http.disconnect"}
        body = left.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(left) or cut_off}

    return receive


def form_of(*parts: tuple[str, bytes]) -> bytes:
    made = b"".join(
        b"--XX\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + data + b"\r\n"
        for head, data in parts
    )
    return made + b"--XX--\r\n"


FILE, PURPOSE = 'name="file"; filename="f.jsonl"', 'name="purpose"'


def nothing(name: str, value: str) -> None:
    """Let every field pass."""


async def read(
    directory: Path, chunks: Iterable[bytes], *, check: Callable[[str, str], None] = nothing, cut_off: bool = False
) -> tuple[Form, bytes]:
    upload = Upload(directory, limit_bytes=4096)
    try:
        receive = receiving(chunks, cut_off=cut_off)
        form = await read_form(receive, "XX", upload, limit_bytes=4096, check=check)
        upload.keep()
        return form, (directory / upload.id).read_bytes()
    finally:
        upload.discard()


@pytest.mark.parametrize("size", [1, 7, 4096])
async def test_a_form_is_read_however_it_is_cut(tmp_path: Path, size: int) -> None:
    content = b"line\r\n--XY\r\n\x00\xff" * 50
    data = form_of((FILE, content), (PURPOSE, b"batch"))
    form, stored = await read(tmp_path, [data[i : i + size] for i in range(0, len(data), size)])
    assert (form.fields, form.filename, stored) == ({"purpose": "batch"}, "f.jsonl", content)


@pytest.mark.parametrize(
    ("data", "error", "part"),
    [
        (b"", InvalidRequest, "form"),
        (b"nothing of a form", InvalidRequest, "form"),
        (form_of((FILE, b"x"))[:-8], InvalidRequest, "form"),
        (form_of((FILE, b"x"), (FILE, b"y")), InvalidRequest, "two files"),
        (form_of((PURPOSE, b"x" * 2000)), InvalidRequest, "too long"),
        (form_of(*[(PURPOSE, b"batch")] * 20), InvalidRequest, "segment count"),
        (form_of(("x" * 5000, b"")), InvalidRequest, "header"),
        (form_of(('name="file"; filename="BAD"', b"x")).replace(b"BAD", b"\xff"), InvalidRequest, "decode"),
        (form_of((FILE, b"x" * 5000)), FileTooLarge, "larger"),
        (form_of((FILE, b"x" * 200_000)), FileTooLarge, "larger"),
        (form_of((FILE, b"x")) + b"y" * 200_000, FileTooLarge, "larger"),
    ],
)  # fmt: skip
async def test_malformed_forms_leave_nothing_behind(
    tmp_path: Path, data: bytes, error: type[EdgeError], part: str
) -> None:
    with pytest.raises(error, match=part):
        await read(tmp_path, [data])
    assert list(tmp_path.iterdir()) == []


async def test_who_goes_away_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="went away"):
        await read(tmp_path, [form_of((FILE, b"x" * 100))[:-20]], cut_off=True)
    assert list(tmp_path.iterdir()) == []


async def test_what_will_be_refused_is_not_read_to_its_end(tmp_path: Path) -> None:
    def refuse(name: str, value: str) -> None:
        raise InvalidRequest("No.", field=name)

    data = form_of((PURPOSE, b"vision"), (FILE, b"x"))
    with pytest.raises(InvalidRequest, match="No"):
        await read(tmp_path, [data[:100], b"never read"], check=refuse)


# ---------------------------------------------------------------- batches


def a_batch(file_id: str, batch_id: str = "batch_1") -> Batch:
    return Batch(id=batch_id, endpoint=CHAT, input_file_id=file_id, created_at=int(NOW), expires_at=int(NOW) + 86_400)


def test_an_answer_counts_once(store: BatchStore) -> None:
    store.create_batch("k", a_batch(sent(store, request())))
    store.batches.move("batch_1", "in_progress", since=("validating",), now_s=NOW, total=2)
    for data in (b"first", b"second"):
        store.batches.record("batch_1", Answer(1, data, is_error=False, tokens=(5, 1, 2, 0)))
    store.batches.record("batch_1", Answer(2, b"bad", is_error=True))
    batch = store.batches.get("k", "batch_1")
    counts, usage = batch.request_counts, batch.usage
    assert (counts.total, counts.completed, counts.failed) == (2, 1, 1)
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (5, 2, 7)
    assert usage.input_tokens_details.cached_tokens == 1
    assert [*ledger.read_answers(store.path, "batch_1", is_error=False)] == [b"first"]
    assert store.batches.answered("batch_1") == {1, 2}


def test_a_batch_that_is_over_takes_no_answers(store: BatchStore, settings: Settings) -> None:
    file_id = sent(store, b"\n".join(request(str(i)) for i in range(1, 4)))
    store.create_batch("k", a_batch(file_id))
    store.batches.move("batch_1", "in_progress", since=("validating",), now_s=NOW, total=3)
    store.batches.record("batch_1", Answer(2, b"good", is_error=False))
    assert store.batches.cancel("k", "batch_1", now_s=NOW).status == "cancelling"
    outputs = write_outputs(
        settings, store.batches.find("batch_1"), "cancelled", {2}, max_line_bytes=1000, stop=threading.Event()
    )
    finish(store, store.batches.find("batch_1"), "k", outputs, "cancelled", now_s=NOW)
    store.batches.record("batch_1", Answer(1, b"late", is_error=False))

    batch = store.batches.get("k", "batch_1")
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("cancelled", 1, 2)
    assert batch.output_file_id is not None
    assert batch.error_file_id is not None
    assert store.files.path(batch.output_file_id).read_bytes() == b"good\n"
    errors = [msgspec.json.decode(x) for x in store.files.path(batch.error_file_id).read_bytes().splitlines()]
    assert [(e["custom_id"], e["response"], e["error"]["code"]) for e in errors] == [
        ("1", None, "batch_cancelled"), ("3", None, "batch_cancelled"),
    ]  # fmt: skip
    with pytest.raises(InvalidRequest, match="cancelled"):
        store.batches.cancel("k", "batch_1", now_s=NOW)
    assert store.batches.unfinished() == []


def test_files_that_are_being_written_can_be_stopped(store: BatchStore, settings: Settings) -> None:
    running(store, request(), total=9)
    store.batches.record("batch_1", Answer(1, b"good", is_error=False))
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        write_outputs(settings, store.batches.find("batch_1"), "completed", {1}, max_line_bytes=1000, stop=stop)
    assert len([*settings.files_dir.iterdir()]) == 1, "what was sent"


def test_statuses_do_not_go_back(store: BatchStore) -> None:
    store.create_batch("k", a_batch(sent(store, request())))
    store.batches.cancel("k", "batch_1", now_s=NOW)
    assert store.batches.move("batch_1", "in_progress", since=("validating",), now_s=NOW).status == "cancelling"
    store.batches.fail("batch_1", [], now_s=NOW)
    store.batches.fail("batch_1", [], now_s=NOW + 5)
    batch = store.batches.find("batch_1")
    assert (batch.status, batch.failed_at, batch.is_over) == ("failed", int(NOW), True)


def test_a_batch_is_its_keys_alone_and_holds_its_file(store: BatchStore) -> None:
    file_id = sent(store, request())
    with pytest.raises(StoredFileNotFound):
        store.create_batch("other", a_batch(file_id))
    store.create_batch("k", a_batch(file_id))
    with pytest.raises(BatchNotFound):
        store.batches.get("other", "batch_1")
    with pytest.raises(BatchNotFound):
        store.batches.cancel("other", "batch_1", now_s=NOW)
    assert store.batches.list("other", after=None, limit=10).data == []
    with pytest.raises(FileInUse):
        store.files.remove("k", file_id)


def test_a_key_has_so_many_batches(store: BatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MAX_KEPT", 3)
    file_id = sent(store, request())
    for i in range(ledger.MAX_UNFINISHED):
        store.create_batch("k", a_batch(file_id, f"b{i}"))
    with pytest.raises(QueueFull):
        store.create_batch("k", a_batch(file_id, "too-many"))
    for i in range(ledger.MAX_UNFINISHED):
        store.batches.fail(f"b{i}", [], now_s=NOW)
    store.create_batch("k", a_batch(file_id, "last"))
    assert [b.id for b in store.batches.list("k", after=None, limit=100).data] == ["last", "b19", "b18"]


def running(store: BatchStore, data: bytes, *, total: int, key: str = "k") -> None:
    store.create_batch(key, a_batch(sent(store, data, key=key)))
    store.batches.move("batch_1", "in_progress", since=("validating",), now_s=NOW, total=total)


def test_answers_count_towards_the_room_of_their_key(store: BatchStore) -> None:
    running(store, request(), total=9)
    store.batches.record("batch_1", Answer(1, b"x" * (FILES_OF_KEY * 4096 - 200), is_error=False))
    with pytest.raises(StorageFull):
        store.batches.record("batch_1", Answer(2, b"x" * 200, is_error=False))
    with pytest.raises(StorageFull):
        store.files.check_room("k", 200)
    store.files.check_room("other", 200)
    assert store.batches.answered("batch_1") == {1}
    store.batches.fail("batch_1", [], now_s=NOW)
    store.files.check_room("k", 200)


def test_what_is_dropped_is_given_back_to_the_disk(store: BatchStore) -> None:
    running(store, request(), total=9)
    for number in range(1, 9):
        store.batches.record("batch_1", Answer(number, b"x" * 4000, is_error=False))
    store.batches.fail("batch_1", [], now_s=NOW)
    while store.tidy():
        pass
    with closing(connect_read_only(store.path, version=database.SCHEMA_VERSION)) as db:
        assert db.execute("PRAGMA freelist_count").fetchone() == (0,)
        assert db.execute("PRAGMA auto_vacuum").fetchone() == (2,)


def test_the_wall_clock_ends_nothing(store: BatchStore, clock: list[float]) -> None:
    """A board boots in 1970, and is told the time later."""
    file_id = sent(store, request(), now_s=0.0, expires_s=3600)
    store.create_batch("k", msgspec.structs.replace(a_batch(file_id), created_at=0, expires_at=86_400))
    assert store.batches.left_s("batch_1") == 86_400
    assert store.files.get("k", file_id).expires_at == 3600
    clock[0] = 3500.0
    store.tidy()
    assert [f.id for f in store.files.list("k", after=None, limit=9, newest_first=True, purpose=None).data] == [file_id]
    assert store.batches.left_s("batch_1") == 86_400 - 3500


def test_time_goes_on_after_a_restart(settings: Settings, store: BatchStore, clock: list[float]) -> None:
    file_id = sent(store, b"x", expires_s=10_000)
    clock[0] = 6000.0
    store.close()
    clock[0] = 17.0  # since this boot
    again = BatchStore(settings, monotonic=lambda: clock[0])
    again.files.get("k", file_id)
    clock[0] += 4000
    with pytest.raises(StoredFileNotFound):
        again.files.get("k", file_id)
    again.close()


def test_a_database_of_the_first_version_is_taken_over(settings: Settings) -> None:
    with closing(connect(settings.batches_db, database.MIGRATIONS[:1])) as db:
        db.execute("INSERT INTO files VALUES (1, 'file-1', 'k', 'batch', 'f', 5, '', 100, 3700)")
        record = msgspec.json.encode(a_batch("file-1", "b"))
        db.execute("INSERT INTO batches (id, key, input_file, is_over, record) VALUES ('b', 'k', '', 0, ?)", (record,))
        db.execute("INSERT INTO results VALUES ('b', 1, 0, ?)", (b"x" * 20_000,))
    store = BatchStore(settings, monotonic=lambda: 0.0)
    assert store.files.get("k", "file-1").expires_at == 3700
    assert store.batches.left_s("b") == 86_400
    with pytest.raises(StorageFull, match="20,005 bytes"):
        store.files.check_room("k", FILES_OF_KEY * 4096)
    store.batches.fail("b", [], now_s=NOW)
    assert not store.tidy(), "its free pages stay, for now"
    store.close()
    store = BatchStore(settings)
    assert not store.tidy()
    with closing(connect_read_only(store.path, version=database.SCHEMA_VERSION)) as db:
        assert db.execute("PRAGMA freelist_count").fetchone() == (0,)
    store.close()


def test_a_quarter_of_a_keys_minute_is_not_for_its_batches(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    open_state(settings.state_db).close()
    made, _ = Keys(settings.state_db, actor="test").create(Limits(rpm=8))
    access = Access(settings)
    caller = access.background_caller(made.id)
    for _ in range(6):
        access.admit(Meter(caller), num_bytes=1)
    with pytest.raises(RateLimited):
        access.admit(Meter(caller), num_bytes=1)
    waited_for = Caller(made, "127.0.0.1")
    access.admit(Meter(waited_for), num_bytes=1)
    access.admit(Meter(waited_for), num_bytes=1)
    asyncio.run(access.close())


def test_what_is_left_to_be_done_is_done_as_the_key_that_left_it(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    open_state(settings.state_db).close()
    keys = Keys(settings.state_db, actor="test")
    made, _ = keys.create(Limits(models=("a*",), priority=1))
    access = Access(settings)
    caller = access.background_caller(made.id)
    assert (caller.id, caller.limits.models, caller.limits.priority) == (made.id, ("a*",), LAST)
    assert not access.background_caller("").limits.models
    keys.rotate(made.id)
    assert access.background_caller(made.id).id == made.id
    keys.revoke(made.id)
    with pytest.raises(KeyNotFound):
        access.background_caller(made.id)
    asyncio.run(access.close())
