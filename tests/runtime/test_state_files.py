"""Files of saved states: what is damaged, foreign or cut short is never given to native code."""

from __future__ import annotations

import errno
import os
import queue
import random
import resource
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.state_files import UNUSED_S, StateFiles, device_key, open_states
from runtime.states import SavedState, Scope, StateId

TOKENS = [5, 6, 70_000, 8]
SCOPE = Scope("a", "sha256:1*0.5")
DATA = bytes(range(200))
START, MAC = 12, 32
"""Bytes before the header, and of the code that vouches for it."""


def a_state(tokens: list[int] = TOKENS, scope: Scope = SCOPE) -> SavedState:
    return SavedState(StateId(1), tokens, scope, len(DATA), uses=3, pin="name")


def opened(home: Path, *, build: str = "b", settings: str = "s", weights: str = "w" * 64) -> StateFiles:
    return open_states(home / "states", home / "state.key", weights_digest=weights, build=build, settings=settings)


def write(files: StateFiles, state: SavedState) -> bool:
    done: queue.SimpleQueue[bool] = queue.SimpleQueue()
    files.write(state, memoryview(DATA), done.put)
    return done.get(timeout=20)


def read(files: StateFiles, state: SavedState) -> bytes | None:
    done: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
    files.read(state, done.put)
    data = done.get(timeout=20)
    return None if data is None else bytes(data)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[StateFiles]:
    files = opened(tmp_path)
    assert files.open() == []
    yield files
    files.close(timeout_s=5)


def test_what_was_written_is_found_and_read_by_the_next_process(tmp_path: Path, files: StateFiles) -> None:
    assert write(files, a_state())
    assert read(files, a_state()) == DATA
    files.close(timeout_s=5)
    again = opened(tmp_path)
    (found,) = again.open()
    assert (found.tokens, found.scope, found.uses, found.pin) == (TOKENS, SCOPE, 3, "name")
    assert read(again, a_state()) == DATA
    again.close(timeout_s=5)


def test_only_the_owner_may_read(tmp_path: Path, files: StateFiles) -> None:
    write(files, a_state())
    made = [tmp_path / "state.key", *tmp_path.glob("states/*/*")]
    assert len(made) == 3
    assert {p.stat().st_mode & 0o777 for p in made} == {0o600}


def test_every_flipped_byte_and_every_length_is_noticed(tmp_path: Path, files: StateFiles) -> None:
    write(files, a_state())
    path = files.path(SCOPE, TOKENS)
    whole = path.read_bytes()
    damaged = [whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :] for i in range(len(whole))]
    damaged += [whole[:n] for n in range(len(whole))] + [whole + b"x", whole * 2]
    for data in damaged:
        path.write_bytes(data)
        assert read(files, a_state()) is None
        assert not path.exists(), "it is removed"
    path.write_bytes(whole)
    assert read(files, a_state()) == DATA


def test_noise_is_noticed_at_the_start(tmp_path: Path, files: StateFiles) -> None:
    write(files, a_state())
    path = files.path(SCOPE, TOKENS)
    whole = path.read_bytes()
    files.close(timeout_s=5)
    rng = random.Random(7)
    for _ in range(50):
        path.write_bytes(whole[: rng.randrange(20)] + rng.randbytes(rng.randrange(400)))
        again = opened(tmp_path)
        assert again.open() == []
        again.close(timeout_s=5)


def test_a_state_of_another_device_build_model_or_tenant_is_not_believed(tmp_path: Path, files: StateFiles) -> None:
    write(files, a_state())
    whole = files.path(SCOPE, TOKENS).read_bytes()
    files.close(timeout_s=5)
    strangers = opened(tmp_path, settings="t"), opened(tmp_path, build="c"), opened(tmp_path, weights="v" * 64)
    for other in (opened(tmp_path / "other"), *strangers):
        assert other.open() == []
        other.path(SCOPE, TOKENS).write_bytes(whole)
        assert read(other, a_state()) is None
        other.close(timeout_s=5)
    again = opened(tmp_path, build="c")
    again.open()
    again.path(Scope("b"), TOKENS).write_bytes(whole)
    assert read(again, a_state(scope=Scope("b"))) is None
    again.close(timeout_s=5)


def test_another_build_clears_what_is_of_no_use(tmp_path: Path, files: StateFiles) -> None:
    write(files, a_state())
    files.close(timeout_s=5)
    opened(tmp_path, build="next").close(timeout_s=1)
    assert not list(tmp_path.glob("states/*/*.state"))


def test_settings_have_states_of_their_own_and_leave_each_other_alone(tmp_path: Path, files: StateFiles) -> None:
    write(files, a_state())
    other = opened(tmp_path, settings="flash attention on")
    assert other.open() == []
    write(other, a_state([1, 2]))
    files.close(timeout_s=5)
    other.close(timeout_s=5)
    for name in ("s", "flash attention on"):
        again = opened(tmp_path, settings=name)
        assert len(again.open()) == 1
        again.close(timeout_s=5)


def test_states_of_settings_that_nobody_uses_go_in_the_end(tmp_path: Path, files: StateFiles) -> None:
    write(files, a_state())
    files.close(timeout_s=5)
    directory = files.path(SCOPE, TOKENS).parent
    almost, past = time.time() - UNUSED_S + 60, time.time() - UNUSED_S - 60
    os.utime(directory, (almost, almost))
    opened(tmp_path, settings="t").close(timeout_s=1)
    assert directory.exists()
    os.utime(directory, (past, past))
    opened(tmp_path, settings="t").close(timeout_s=1)
    assert not directory.exists()


def test_what_a_process_that_lives_uses_is_never_removed(tmp_path: Path, files: StateFiles) -> None:
    write(files, a_state())
    os.utime(files.path(SCOPE, TOKENS).parent, (0, 0))
    opened(tmp_path, build="next").close(timeout_s=1)
    opened(tmp_path, settings="t").close(timeout_s=1)
    assert read(files, a_state()) == DATA
    assert write(files, a_state([1, 2]))


def put_symlink(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def put_hard_link(path: Path) -> None:
    good = path.read_bytes()
    path.unlink()
    other = path.with_name("elsewhere")
    other.write_bytes(good)
    os.link(other, path)


def put_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def put_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("put", [put_symlink, put_hard_link, put_pipe, put_directory])
def test_what_is_no_plain_file_of_ours_is_not_read(
    tmp_path: Path, files: StateFiles, put: Callable[[Path], object]
) -> None:
    write(files, a_state())
    path = files.path(SCOPE, TOKENS)
    put(path)
    assert read(files, a_state()) is None
    assert write(files, a_state([1, 2])), "the others are none the worse for it"
    assert Path("/etc/passwd").exists()
    files.close(timeout_s=5)
    put_again = opened(tmp_path)
    assert [f.tokens for f in put_again.open()] == [[1, 2]]
    assert write(put_again, a_state([3, 4]))
    put_again.close(timeout_s=5)


def test_a_directory_that_is_a_link_or_anothers_is_not_taken(tmp_path: Path, files: StateFiles) -> None:
    directory = files.path(SCOPE, TOKENS).parent
    files.close(timeout_s=5)
    victim = tmp_path / "victim"
    directory.rename(victim)
    directory.symlink_to(victim)
    before = sorted(victim.iterdir())
    linked = opened(tmp_path)
    assert linked.open() == []
    assert not write(linked, a_state())
    linked.close(timeout_s=5)
    opened(tmp_path, build="next").close(timeout_s=1)
    assert sorted(victim.iterdir()) == before
    directory.unlink()
    victim.rename(directory)
    again = opened(tmp_path)
    again.open()
    assert write(again, a_state())
    again.close(timeout_s=5)


def test_what_belongs_to_another_user_is_not_taken(
    tmp_path: Path, files: StateFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(files, a_state())
    monkeypatch.setattr(os, "geteuid", lambda: 12_345)
    assert read(files, a_state()) is None
    files.close(timeout_s=5)
    with pytest.raises(OSError, match="user"):
        opened(tmp_path)
    directory = files.path(SCOPE, TOKENS).parent
    foreign = StateFiles(directory, key=bytes(32), identity="")
    assert foreign.open() == []
    assert not write(foreign, a_state())
    foreign.close(timeout_s=5)


def test_a_directory_that_was_opened_to_others_is_closed_again(tmp_path: Path, files: StateFiles) -> None:
    directory = files.path(SCOPE, TOKENS).parent
    files.close(timeout_s=5)
    directory.chmod(0o775)
    again = opened(tmp_path)
    again.open()
    assert directory.stat().st_mode & 0o777 == 0o700
    again.close(timeout_s=5)


def test_a_second_process_harms_nothing_of_the_first(tmp_path: Path, files: StateFiles) -> None:
    assert write(files, a_state())
    second = opened(tmp_path)
    assert second.open() == []
    assert not write(second, a_state())
    second.remove(SCOPE, TOKENS)
    second.close(timeout_s=5)
    assert read(files, a_state()) == DATA


def test_what_a_power_cut_left_half_written_goes_and_the_version_before_stays(
    tmp_path: Path, files: StateFiles
) -> None:
    write(files, a_state())
    path = files.path(SCOPE, TOKENS)
    whole = path.read_bytes()
    files.close(timeout_s=5)
    for left in (b"", whole[:50], bytes(len(whole)), whole):
        path.with_suffix(".new").write_bytes(left)
        again = opened(tmp_path)
        assert len(again.open()) == 1
        assert read(again, a_state()) == DATA
        again.close(timeout_s=5)
        assert sorted(p.name for p in path.parent.iterdir()) == sorted(["lock", path.name])


def test_a_file_has_its_name_only_when_its_bytes_are_on_the_disk(
    files: StateFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        events.append("sync " + ("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"))
        sync(descriptor)

    def note_replace(path: Path, target: Path) -> Path:
        events.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    assert write(files, a_state())
    assert events == ["sync file", "rename", "sync directory"]


@pytest.mark.parametrize("fails", ["write", "fsync", "replace", "sync_dir"])
def test_a_full_disk_leaves_nothing_half_and_what_was_there(
    tmp_path: Path, files: StateFiles, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    write(files, a_state())
    with monkeypatch.context() as patch:
        if fails == "write":  # the kernel takes a part, and then no more; Python ignores its signal
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        elif fails == "sync_dir":
            patch.setattr("runtime.state_files._sync_dir", no_space)
        else:
            patch.setattr(*((os, "fsync") if fails == "fsync" else (Path, "replace")), no_space)
        try:
            assert not write(files, a_state([1, 2]))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert not list(tmp_path.glob("states/*/*.new"))
    assert read(files, a_state()) == DATA
    files.remove(SCOPE, TOKENS)
    files.close(timeout_s=5)
    assert not files.path(SCOPE, TOKENS).exists(), "what is removed goes also then"


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_files_on_a_disk_that_takes_no_writes_are_read(files: StateFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    write(files, a_state())

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", read_only)
    assert read(files, a_state()) == DATA


def test_times_of_the_future_and_the_past_do_no_harm(tmp_path: Path, files: StateFiles) -> None:
    for i, at in enumerate((-1e9, 0.0, 2e10)):
        write(files, a_state([i, i]))
        os.utime(files.path(SCOPE, [i, i]), (at, at))
    files.close(timeout_s=5)
    again = opened(tmp_path)
    assert [f.tokens[0] for f in again.open()] == [0, 1, 2]
    again.close(timeout_s=5)


def test_files_beyond_the_most_are_removed(tmp_path: Path, files: StateFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(5):
        write(files, a_state([i, i]))
        os.utime(files.path(SCOPE, [i, i]), (i, i))
    files.close(timeout_s=5)
    monkeypatch.setattr("runtime.state_files.MAX_FILES", 2)
    again = opened(tmp_path)
    assert [f.tokens[0] for f in again.open()] == [3, 4]
    again.close(timeout_s=5)
    assert len(list(tmp_path.glob("states/*/*.state"))) == 2


FIELD = st.one_of(st.none(), st.integers(-(2**63), 2**64 - 1), st.text(max_size=9), st.binary(max_size=9), st.floats())


@given(changed=st.dictionaries(st.integers(0, 8), FIELD, max_size=3), length=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_no_header_of_another_version_harms(changed: dict[int, object], length: int) -> None:
    """Also one that our own key vouches for: a version that was not careful may have written it."""
    with tempfile.TemporaryDirectory() as home:
        files = opened(Path(home))
        files.open()
        write(files, a_state())
        path = files.path(SCOPE, TOKENS)
        header = msgspec.msgpack.decode(path.read_bytes()[START : -len(DATA) - MAC])
        fields = [changed.get(i, header[i] if i < len(header) else None) for i in range(max(length, len(header) - 1))]
        path.write_bytes(files.sealed(msgspec.msgpack.encode(fields)) + DATA)
        data = read(files, a_state())
        assert data in (None, DATA)
        path.write_bytes(files.sealed(msgspec.msgpack.encode(fields)) + DATA)
        files.close(timeout_s=5)
        again = opened(Path(home))
        assert all(f.tokens == TOKENS and f.uses >= 0 for f in again.open())
        again.close(timeout_s=5)


def test_a_disk_that_takes_nothing_switches_the_tier_off(tmp_path: Path, files: StateFiles) -> None:
    directory = files.path(SCOPE, TOKENS).parent
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    assert not write(files, a_state())
    assert not write(files, a_state([1, 2]))


def test_a_directory_that_cannot_be_made_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "states").write_text("in the way")
    files = opened(tmp_path)
    assert files.open() == []
    assert not write(files, a_state())
    files.close(timeout_s=5)


def test_a_state_for_which_memory_lacks_is_computed_instead(files: StateFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    assert write(files, a_state())

    def lack(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr("runtime.state_files.hmac.digest", lack)
    assert read(files, a_state()) is None


def test_the_key_is_made_once_and_anew_where_it_is_damaged_or_known_to_others(tmp_path: Path) -> None:
    path = tmp_path / "state.key"
    key = device_key(path)
    assert len(key) == 32
    assert device_key(path) == key
    path.write_bytes(b"short")
    second = device_key(path)
    assert len(second) == 32
    assert second != key
    path.chmod(0o644)
    third = device_key(path)
    assert third != second
    assert device_key(path) == third
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["state.key"]


def test_a_key_that_is_no_file_of_ours_is_not_used(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_bytes(bytes(32))
    real.chmod(0o600)
    path = tmp_path / "state.key"
    path.symlink_to(real)
    with pytest.raises(OSError, match="links"):
        device_key(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="no file of this user"):
        device_key(path)
    assert real.read_bytes() == bytes(32)


def test_states_of_another_key_go(tmp_path: Path, files: StateFiles) -> None:
    write(files, a_state())
    files.close(timeout_s=5)
    (tmp_path / "state.key").unlink()
    again = opened(tmp_path)
    assert again.open() == []
    assert not list(tmp_path.glob("states/*/*.state"))
    assert write(again, a_state())
    again.close(timeout_s=5)
