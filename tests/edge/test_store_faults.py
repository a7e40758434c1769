"""The process dies, or the power goes, between any two steps: nothing half done is visible, nothing that was to be kept
is lost, and the next run goes forward. Each planted fault is found, else the harness would prove nothing."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
from collections.abc import Callable, Generator, Sequence
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
    kept_in,
    make_inputs,
    prepare,
    store_at,
)
from tests.edge.fault_plants import STORES, Unlocked
from tests.edge.fault_process import Victims
from tests.edge.power_cut import Disk, RecordingFileOps, WithoutDirectorySync, WithoutFileSync, cuts, restore
from tests.edge.registries import docker_registry
from tests.edge.store_support import Killed, KillingFileOps, NoSync, add_model, assert_sound, write_gguf

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
    registry: str = ""

    def home(self, name: str) -> Path:
        """A fresh home in the state that the operation begins in."""
        home, prepared = self.directory / name, self.directory / "prepared"
        if not prepared.exists():
            make_inputs(self.directory, self.registry)
            prepare(self.operation, prepared)
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(prepared, home)
        (home / "token").write_text(secrets.token_hex(8))
        return home


def every_death(stage: Stage, victims: Victims, *, plant: str = "", most: int = 1 << 30) -> int:
    """Kill before each step (or `most` of them), look at what is left, and go on; gives how often.

    Raises:
        AssertionError, EdgeError: The law was broken.
    """
    name = stage.operation.name
    whole = stage.home("whole")
    kept = kept_in(whole, stage.operation)
    steps = victims.run(name, whole, plant=plant).steps
    stage.operation.done(store_at(whole))
    chosen = _spread(len(steps), most)
    for number in chosen:
        home = stage.home("killed")
        assert victims.run(name, home, die_before=number, plant=plant).killed
        assert_law(home, kept)
        assert_forward(stage.operation, home, kept)
    return len(chosen)


def _spread(num_steps: int, most: int) -> Sequence[int]:
    """The last steps first: what a fault planted early leads to shows late."""
    return range(num_steps - 1, -1, -max(1, num_steps // most))


def deaths_in_a_row(stage: Stage, victims: Victims, rng: random.Random) -> int:
    """Kill at random, and each next run again, until one gets through; gives how often.

    Raises:
        AssertionError, EdgeError: The law was broken.
    """
    name, home = stage.operation.name, stage.home("row")
    kept, num_deaths = kept_in(home, stage.operation), 0
    num_steps = len(victims.run(name, stage.home("whole")).steps)
    while num_deaths < 8 and victims.run(name, home, die_before=rng.randrange(num_steps)).killed:
        num_deaths += 1
        assert_law(home, kept)
    assert_forward(stage.operation, home, kept)
    return num_deaths


def every_cut(
    stage: Stage, ops: type[RecordingFileOps], *, per_step: int = 1, plant: str = "", most: int = 1 << 30
) -> int:
    """Cut the power behind each step (or `most` of them), look at what is left, and go on; gives how often.

    Raises:
        AssertionError, EdgeError: The law was broken.
    """
    home = stage.home("recorded")
    kept, disk = kept_in(home, stage.operation), Disk.holding(home)
    files = ops(home)
    stage.operation.run(store_at(home, files, STORES[plant]))
    states = list(cuts(disk, files.changes, random.Random(11), per_step=per_step))
    chosen = _spread(len(states), most)
    for number in chosen:
        cut = stage.directory / "cut"
        shutil.rmtree(cut, ignore_errors=True)
        restore(states[number], old_root=home, new_root=cut)
        assert_law(cut, kept)
        assert_forward(stage.operation, cut, kept)
    return len(chosen)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    with docker_registry(tmp_path_factory.mktemp("registry") / "data") as found:
        yield found.host


@pytest.fixture(params=OPERATIONS)
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Stage:
    """Each operation."""
    operation = OPERATIONS[request.param]
    return Stage(tmp_path, operation, request.getfixturevalue("registry") if operation.needs_registry else "")


def test_death_before_any_step(stage: Stage, victims: Victims) -> None:
    assert every_death(stage, victims, most=6) >= 6


def test_no_power_cut_breaks_the_store(stage: Stage) -> None:
    assert every_cut(stage, RecordingFileOps, most=6) >= 6


PUBLISHING = [
    pytest.param(name, marks=() if name == "pull" else pytest.mark.soak)
    for name in ("pull", "add", "replace", "import")
]
"""What writes references to new blobs: all of them in the long run, one in every run."""


@pytest.mark.parametrize("name", PUBLISHING)
def test_a_reference_before_its_blob_is_found(name: str, victims: Victims, tmp_path: Path) -> None:
    with pytest.raises(Broken):
        every_death(Stage(tmp_path, OPERATIONS[name]), victims, plant="reference first")
    with pytest.raises(Broken):
        every_cut(Stage(tmp_path, OPERATIONS[name]), RecordingFileOps, per_step=5, plant="reference first")


@pytest.mark.parametrize("fault", [WithoutFileSync, WithoutDirectorySync])
@pytest.mark.parametrize("name", PUBLISHING)
def test_a_forgotten_sync_is_found(name: str, fault: type[RecordingFileOps], tmp_path: Path) -> None:
    with pytest.raises(Broken):
        every_cut(Stage(tmp_path, OPERATIONS[name]), fault, per_step=5)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_step_of_every_operation(victims: Victims, registry: str, tmp_path: Path) -> None:
    """The long run; `EDGE_FAULTS_OUT` names a file for its counts."""
    rng, counts = random.Random(7), dict[str, dict[str, int]]()
    for name, operation in OPERATIONS.items():
        stage = Stage(tmp_path / name, operation, registry)
        counts[name] = {
            "deaths": every_death(stage, victims),
            "deaths in a row": sum(deaths_in_a_row(stage, victims, rng) for _ in range(10)),
            "cuts": every_cut(stage, RecordingFileOps, per_step=3),
        }
        shutil.rmtree(tmp_path / name)
    if out := os.environ.get("EDGE_FAULTS_OUT"):
        Path(out).write_text(json.dumps(counts, indent=2))
    assert sum(sum(of.values()) for of in counts.values()) >= 500


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
    directory: Path,
    other: Callable[[ModelStore], object],
    names: set[str],
    kind: type[ModelStore] = ModelStore,
    most: int = 1 << 30,
) -> int:
    """Two writers: before each step of one that adds a model, the other does all of its work, or is told that it must
    wait, and does it afterwards. In the end there are the models of both; gives how often they met.

    Raises:
        AssertionError, EdgeError: The law was broken.
    """
    stage = Stage(directory, OPERATIONS["add"])
    complete = KillingFileOps()
    _add("a")(store_at(stage.home("whole"), complete, kind))
    chosen = _spread(len(complete.performed), most)
    for number in chosen:
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
        assert_law(home, kept_in(home, stage.operation))
        assert {model.ref.name for model in store_at(home).list()} == names
    return len(chosen)


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
    assert every_meeting(tmp_path / "locked", other, names, most=12) >= 12
    with pytest.raises(Broken):
        every_meeting(tmp_path / "unlocked", other, names, Unlocked)
