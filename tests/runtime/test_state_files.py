"""Files of saved states: what is damaged, foreign or cut short is never given to native code."""

from __future__ import annotations

import os
import queue
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.state_files import UNUSED_S, StateFiles, device_key, open_states
from runtime.states import SavedState, Scope, StateId

TOKENS = [5, 6, 70_000, 8]
SCOPE = Scope("a", "sha256:1*0.5")
DATA = bytes(range(200))


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
    for mine, settings in ((files, "s"), (other, "flash attention on")):
        mine.close(timeout_s=5)
        mine = opened(tmp_path, settings=settings)
        assert len(mine.open()) == 1
        mine.close(timeout_s=5)


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


def test_a_link_or_a_pipe_is_not_followed(tmp_path: Path, files: StateFiles) -> None:
    path = files.path(SCOPE, TOKENS)
    path.symlink_to("/etc/passwd")
    assert read(files, a_state()) is None
    os.mkfifo(path)
    assert read(files, a_state()) is None


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


def test_a_second_process_leaves_the_directory_to_the_first(tmp_path: Path, files: StateFiles) -> None:
    second = opened(tmp_path)
    assert second.open() == []
    assert not write(second, a_state())
    second.close(timeout_s=5)
    assert write(files, a_state())


def test_a_state_for_which_memory_lacks_is_computed_instead(files: StateFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    assert write(files, a_state())

    def lack(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr("runtime.state_files.hmac.digest", lack)
    assert read(files, a_state()) is None


def test_the_key_is_made_once(tmp_path: Path) -> None:
    key = device_key(tmp_path / "state.key")
    assert len(key) == 32
    assert device_key(tmp_path / "state.key") == key
    (tmp_path / "state.key").write_bytes(b"short")
    with pytest.raises(OSError, match="32 bytes"):
        device_key(tmp_path / "state.key")
