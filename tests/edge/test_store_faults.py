"""The process dies, or the power goes, between any two steps: nothing half done is visible, nothing that was to be kept
is lost, and the next run goes forward. Each planted fault is found, else the harness would prove nothing."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typing_extensions import override

from edge.errors import EdgeError, StoreError
from edge.store.models import ModelStore
from tests.edge.fault_operations import (
    OPERATIONS,
    Operation,
    assert_forward,
    assert_law,
    input_of,
    kept_models,
    make_inputs,
    prepare,
    store_at,
)
from tests.edge.fault_plants import STORES, Unlocked
from tests.edge.fault_process import Victims
from tests.edge.power_cut import Disk, RecordingFileOps, WithoutDirectorySync, WithoutFileSync, cuts, restore
from tests.edge.store_support import Killed, KillingFileOps, NoSync, add_model, assert_sound, write_gguf

SHORT_AND_LONG = [name if name == "pull" else pytest.param(name, marks=pytest.mark.soak) for name in OPERATIONS]
"""Each operation: in the long run all, in every run the one that has most kinds of steps."""
Broken = (AssertionError, EdgeError)
"""What a broken law shows itself as."""


@pytest.fixture(scope="module")
def victims() -> Generator[Victims]:
    with Victims() as started:
        yield started


@dataclass(frozen=True)
class Stage:
    """Homes in which an operation begins, and what each of them keeps."""

    directory: Path
    operation: Operation

    def home(self, name: str) -> Path:
        """A fresh home in the state that the operation begins in."""
        home, prepared = self.directory / name, self.directory / "prepared"
        if not prepared.exists():
            make_inputs(self.directory)
            prepare(self.operation, prepared)
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(prepared, home)
        return home


def every_death(stage: Stage, victims: Victims, *, plant: str = "") -> int:
    """Kill before each step, look at what is left, and go on; gives how often.

    Raises:
        AssertionError, EdgeError: The law was broken.
    """
    name = stage.operation.name
    whole = stage.home("whole")
    kept = kept_models(whole)
    steps = victims.run(name, whole, plant=plant).steps
    stage.operation.done(store_at(whole))
    for number in reversed(range(len(steps))):
        home = stage.home("killed")
        assert victims.run(name, home, die_before=number, plant=plant).killed
        assert_law(home, kept)
        assert_forward(stage.operation, home, kept)
    return len(steps)


def every_cut(stage: Stage, ops: type[RecordingFileOps], *, per_step: int, plant: str = "") -> int:
    """Cut the power behind each step, look at what is left, and go on; gives how often.

    Raises:
        AssertionError, EdgeError: The law was broken.
    """
    home = stage.home("recorded")
    kept, disk = kept_models(home), Disk.holding(home)
    files = ops(home)
    stage.operation.run(store_at(home, files, STORES[plant]))
    states = list(cuts(disk, files.changes, random.Random(11), per_step=per_step))
    for left in reversed(states):
        cut = stage.directory / "cut"
        shutil.rmtree(cut, ignore_errors=True)
        restore(left, old_root=home, new_root=cut)
        assert_law(cut, kept)
        assert_forward(stage.operation, cut, kept)
    return len(states)


@pytest.mark.parametrize("name", OPERATIONS)
def test_death_before_any_step(name: str, victims: Victims, tmp_path: Path) -> None:
    assert every_death(Stage(tmp_path, OPERATIONS[name]), victims) > 5


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_power_cut_breaks_the_store(name: str, tmp_path: Path) -> None:
    assert every_cut(Stage(tmp_path, OPERATIONS[name]), RecordingFileOps, per_step=1) > 5


@pytest.mark.parametrize("name", SHORT_AND_LONG)
def test_a_reference_before_its_blob_is_found(name: str, victims: Victims, tmp_path: Path) -> None:
    with pytest.raises(Broken):
        every_death(Stage(tmp_path, OPERATIONS[name]), victims, plant="reference first")
    with pytest.raises(Broken):
        every_cut(Stage(tmp_path, OPERATIONS[name]), RecordingFileOps, per_step=5, plant="reference first")


@pytest.mark.parametrize("fault", [WithoutFileSync, WithoutDirectorySync])
@pytest.mark.parametrize("name", SHORT_AND_LONG)
def test_a_forgotten_sync_is_found(name: str, fault: type[RecordingFileOps], tmp_path: Path) -> None:
    with pytest.raises(Broken):
        every_cut(Stage(tmp_path, OPERATIONS[name]), fault, per_step=5)


def test_death_while_seeding_leaves_a_sound_store(tmp_path: Path) -> None:
    seed = ModelStore(tmp_path / "seed", files=NoSync())
    for name, fill in (("a", b"\x01"), ("b", b"\x02")):
        add_model(seed, name, write_gguf(tmp_path / f"{name}.gguf", fill=fill))
    complete = KillingFileOps()
    ModelStore(tmp_path / "complete", seed=seed.root, files=complete).list()
    for number in range(len(complete.performed)):
        root = tmp_path / f"store-{number}"
        with pytest.raises(Killed):
            ModelStore(root, seed=seed.root, files=KillingFileOps(number)).list()
        assert len(assert_sound(root)) in (0, 2)
        assert len(ModelStore(root, seed=seed.root, files=NoSync()).list()) == 2
        assert_sound(root)


@dataclass
class MeanwhileFileOps(KillingFileOps):
    """Has somebody else do something before the operation of the given number."""

    meanwhile: Callable[[], None] = lambda: None

    @override
    def die(self) -> None:
        act, self.meanwhile = self.meanwhile, lambda: None
        act()


def _add(name: str) -> Callable[[ModelStore], object]:
    return lambda store: add_model(store, name, input_of(store, f"{name}.gguf"))


def every_meeting(
    directory: Path, other: Callable[[ModelStore], object], names: set[str], kind: type[ModelStore] = ModelStore
) -> int:
    """Two writers: before each step of one that adds a model, the other does all of its work, or is told that it must
    wait, and does it afterwards. In the end there are the models of both; gives how often they met.

    Raises:
        AssertionError, EdgeError: The law was broken.
    """
    stage = Stage(directory, OPERATIONS["add"])
    complete = KillingFileOps()
    _add("a")(store_at(stage.home("whole"), complete, kind))
    for number in range(len(complete.performed)):
        home = stage.home("shared")
        busy: list[StoreError] = []

        def meanwhile(home: Path = home, busy: list[StoreError] = busy) -> None:
            try:
                other(store_at(home, NoSync(), kind))
            except StoreError as e:
                busy.append(e)

        _add("a")(store_at(home, MeanwhileFileOps(number, meanwhile=meanwhile), kind))
        if busy:
            other(store_at(home))
        assert_law(home, kept_models(home))
        assert {model.ref.name for model in store_at(home).list()} == names
    return len(complete.performed)


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.store.models._LOCK_TIMEOUT_S", 0.0)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(
    ("other", "names"),
    [(_add("b"), {"a", "b", "pinned"}), (ModelStore.collect, {"a", "pinned"})],
    ids=["add", "collect"],
)
def test_two_writers_never_undo_each_other(
    other: Callable[[ModelStore], object], names: set[str], tmp_path: Path
) -> None:
    assert every_meeting(tmp_path / "locked", other, names) > 5
    with pytest.raises(Broken):
        every_meeting(tmp_path / "unlocked", other, names, Unlocked)
