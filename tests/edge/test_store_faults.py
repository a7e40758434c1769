"""The process dies, or the power goes, between any two file operations: nothing half done is visible, and the next run
goes forward. Each planted fault is found, else the harness would prove nothing."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edge.errors import EdgeError
from edge.store.fetch import pull
from edge.store.models import ModelStore
from tests.edge.power_cut import RecordingFileOps, WithoutDirectorySync, WithoutFileSync, cuts, restore
from tests.edge.store_support import Killed, KillingFileOps, NoSync, add_model, assert_sound, write_gguf

Work = Callable[[ModelStore], None]


@pytest.fixture
def ggufs(tmp_path: Path) -> tuple[Path, Path]:
    return write_gguf(tmp_path / "a.gguf"), write_gguf(tmp_path / "b.gguf", fill=b"\x02")


@pytest.fixture
def works(ggufs: tuple[Path, Path]) -> dict[str, Work]:
    first, second = ggufs

    def replace(store: ModelStore) -> None:
        add_model(store, "kept", first)
        pull(store, str(second), name="kept")
        store.collect()

    def remove(store: ModelStore) -> None:
        add_model(store, "kept", first)
        add_model(store, "gone", second)
        store.remove("gone")
        store.collect()

    return {
        "add": lambda store: _note(add_model(store, "kept", first)),
        "pull": lambda store: _note(pull(store, str(first), name="kept")),
        "replace": replace,
        "remove": remove,
    }


def _note(_: object) -> None:
    return None


@pytest.mark.parametrize("name", ["add", "pull", "replace", "remove"])
def test_death_before_any_operation_leaves_a_sound_store(name: str, works: dict[str, Work], tmp_path: Path) -> None:
    work = works[name]
    complete = KillingFileOps()
    work(ModelStore(tmp_path / "complete", files=complete))
    assert len(complete.performed) > 15
    for number in range(len(complete.performed)):
        root = tmp_path / f"store-{number}"
        with pytest.raises(Killed):
            work(ModelStore(root, files=KillingFileOps(number)))
        assert_sound(root)
        work(ModelStore(root, files=NoSync()))
        assert [str(model.ref) for model in assert_sound(root)] == ["kept:latest"]


def test_death_while_seeding_leaves_a_sound_store(ggufs: tuple[Path, Path], tmp_path: Path) -> None:
    seed = ModelStore(tmp_path / "seed")
    for name, path in zip("ab", ggufs, strict=True):
        add_model(seed, name, path)
    complete = KillingFileOps()
    ModelStore(tmp_path / "complete", seed=seed.root, files=complete).list()
    for number in range(len(complete.performed)):
        root = tmp_path / f"store-{number}"
        with pytest.raises(Killed):
            ModelStore(root, seed=seed.root, files=KillingFileOps(number)).list()
        assert len(assert_sound(root)) in (0, 2)
        assert len(ModelStore(root, seed=seed.root, files=NoSync()).list()) == 2
        assert_sound(root)


def survives_cuts(ops: RecordingFileOps, work: Work, tmp_path: Path, *, per_step: int) -> bool:
    """Whether the law holds after every power cut, and the same work then succeeds."""
    work(ModelStore(ops.root, files=ops))
    for files in cuts(ops.changes, random.Random(11), per_step=per_step):
        root = tmp_path / "cut"
        restore(files, old_root=ops.root, new_root=root)
        try:
            assert_sound(root)
        except (AssertionError, EdgeError):
            return False
        work(ModelStore(root, files=NoSync()))
        assert_sound(root)
        shutil.rmtree(root)
    return True


@pytest.mark.parametrize("per_step", [1, pytest.param(20, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", ["add", "pull", "replace", "remove"])
def test_no_power_cut_breaks_the_store(name: str, per_step: int, works: dict[str, Work], tmp_path: Path) -> None:
    assert survives_cuts(RecordingFileOps(tmp_path / "store"), works[name], tmp_path, per_step=per_step)


@pytest.mark.parametrize("fault", [WithoutFileSync, WithoutDirectorySync])
@pytest.mark.parametrize("name", ["pull", "replace"])
def test_the_harness_finds_a_forgotten_sync(
    fault: type[RecordingFileOps], name: str, works: dict[str, Work], tmp_path: Path
) -> None:
    assert not survives_cuts(fault(tmp_path / "store"), works[name], tmp_path, per_step=5)
