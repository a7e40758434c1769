"""What the fault harness does to a store: each operation with the state that it begins in and the one it ends in.

A home is a directory with a store in it; beside the homes lies `inputs`, which no operation changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edge.store.digest import Digest
from edge.store.fetch import pull
from edge.store.files import FileOps
from edge.store.models import ModelStore
from tests.edge.store_support import NoSync, add_model, assert_sound, write_gguf


@dataclass(frozen=True)
class Operation:
    """Something that changes a store, may die at any step, and is then run again."""

    name: str
    prepare: Callable[[ModelStore], object]
    """Makes the state that it begins in, beside a pinned model."""
    run: Callable[[ModelStore], object]
    done: Callable[[ModelStore], object]
    """Asserts what must be there once it ran to its end."""


def store_at(home: Path, files: FileOps | None = None, kind: type[ModelStore] = ModelStore) -> ModelStore:
    """The store of a home."""
    return kind(home / "store", seed=home.parent / "inputs" / "seed", files=files or NoSync())


def make_inputs(directory: Path) -> None:
    """What operations take models from."""
    inputs = directory / "inputs"
    for number, name in enumerate("abc"):
        write_gguf(inputs / f"{name}.gguf", fill=bytes([number + 1]))
    add_model(ModelStore(inputs / "seed", files=NoSync()), "pinned", inputs / "c.gguf")


def input_of(store: ModelStore, name: str) -> Path:
    return store.root.parent.parent / "inputs" / name


def prepare(operation: Operation, home: Path) -> None:
    """A home in which the operation may begin."""
    store = store_at(home)
    store.pin("pinned")
    operation.prepare(store)


def kept_models(home: Path) -> Mapping[str, Digest]:
    """What must outlive everything: pinned models, and what they are."""
    store = store_at(home)
    return {name: store.get(name).digest for name in store.pins()}


def assert_law(home: Path, kept: Mapping[str, Digest]) -> None:
    """What holds at every moment: what is visible verifies, references lead somewhere, what is kept is there."""
    models = {str(model.ref): model.digest for model in assert_sound(home / "store")}
    assert {name: models.get(name) for name in kept} == kept
    assert store_at(home).pins() == set(kept)


def assert_forward(operation: Operation, home: Path, kept: Mapping[str, Digest]) -> None:
    """The next run gets to the end, and leaves nothing behind."""
    operation.run(store_at(home))
    operation.done(store_at(home))
    assert_law(home, kept)
    store = store_at(home)
    store.collect(partial_age_s=-1e9)
    assert list((home / "store" / "ingest").iterdir()) == []
    assert_law(home, kept)


def _nothing(_: ModelStore) -> None:
    return None


def _remove_gone(store: ModelStore) -> None:
    if "gone:latest" in map(str, store.refs()):
        store.remove("gone")
    store.collect()


def _replace(store: ModelStore) -> None:
    pull(store, str(input_of(store, "b.gguf")), name="new")
    store.collect()


def _litter(store: ModelStore) -> None:
    """Blobs that nothing refers to, and fetches that nobody takes up."""
    for name in ("a", "b"):
        add_model(store, f"gone:{name}", input_of(store, f"{name}.gguf"))
        store.remove(f"gone:{name}")
        with store.blobs.ingest(f"fetch {name}") as partial:
            partial.write(b"half of it")
            partial.remember(source=name, validator='"1"', total_bytes=99)


def _assert_models(*names: str) -> Callable[[ModelStore], None]:
    def check(store: ModelStore) -> None:
        assert [str(model.ref) for model in store.list()] == [f"{name}:latest" for name in sorted(names)]

    return check


def _assert_clean(store: ModelStore) -> None:
    """The pinned model's manifest, config and weights are all there is."""
    assert len(list(store.blobs.digests())) == 3


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            "add",
            _nothing,
            lambda store: add_model(store, "new", input_of(store, "a.gguf")),
            _assert_models("new", "pinned"),
        ),
        Operation(
            "pull",
            _nothing,
            lambda store: pull(store, str(input_of(store, "a.gguf")), name="new"),
            _assert_models("new", "pinned"),
        ),
        Operation(
            "replace",
            lambda store: add_model(store, "new", input_of(store, "a.gguf")),
            _replace,
            _assert_models("new", "pinned"),
        ),
        Operation(
            "remove",
            lambda store: add_model(store, "gone", input_of(store, "a.gguf")),
            _remove_gone,
            _assert_models("pinned"),
        ),
        Operation("collect", _litter, lambda store: store.collect(partial_age_s=-1e9), _assert_clean),
    )
}
