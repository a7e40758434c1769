"""What the fault harness does to a store: each operation with the state that it begins in and the one it ends in.

A home is a directory with a store in it; beside the homes lies `inputs`, which no operation changes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edge.store.activation import begun, confirmed, recovered
from edge.store.bundle import Bundle
from edge.store.delta import attach_delta
from edge.store.digest import Digest
from edge.store.exporting import export, plan_export
from edge.store.fetch import pull
from edge.store.files import FileOps
from edge.store.importing import import_models, plan_import
from edge.store.models import ModelStore, PackageFile
from edge.store.network import Network
from edge.store.registry.push import push
from edge.store.repair import LayoutSource, repair
from edge.store.scrub import Scrubber, part_with
from edge.store.slots import Slot
from edge.store.sources import RegistrySource
from edge.store.transfer import Control
from tests.edge.store_support import NoSync, add_model, assert_sound, write_gguf

IDLE = Control(lambda _: None, lambda: False)


@dataclass(frozen=True)
class Operation:
    """Something that changes a store, may die at any step, and is then run again."""

    name: str
    prepare: Callable[[ModelStore], object]
    """Makes the state that it begins in, beside a pinned model."""
    run: Callable[[ModelStore], object]
    done: Callable[[ModelStore], object]
    """Asserts what must be there once it ran to its end."""
    needs_registry: bool = False
    sick: str = ""
    """The model that is damaged when it begins, and may be until it ends."""


def store_at(home: Path, files: FileOps | None = None, kind: type[ModelStore] = ModelStore) -> ModelStore:
    """The store of a home."""
    return kind(home / "store", seed=home.parent / "inputs" / "seed", files=files or NoSync())


def make_inputs(directory: Path, registry: str) -> None:
    """What operations take models from.

    Args:
        registry: Host and port of one, or nothing; it gets both versions of a model, and the delta between them.
    """
    inputs = directory / "inputs"
    for number, name in enumerate("abcd"):
        write_gguf(inputs / f"{name}.gguf", fill=bytes([number + 1]))
    add_model(ModelStore(inputs / "seed", files=NoSync()), "pinned", inputs / "c.gguf")
    other = ModelStore(inputs / "other", files=NoSync())
    model = add_model(other, "new", inputs / "a.gguf")
    other.attach(model.digest, "application/x-note", [PackageFile(inputs / "d.gguf", "note")])
    add_model(other, "sick", write_gguf(inputs / "large.gguf", num_rows=20_000))
    export(other, plan_export(other, ["new"], inputs / "stick.tar"))
    (inputs / "registry").write_text(registry)
    first, second = write_gguf(inputs / "v1.gguf", num_rows=99), inputs / "v2.gguf"
    second.write_bytes(first.read_bytes()[:-64] + b"\x07" * 64)
    if registry:
        versions = [add_model(other, f"new:{path.stem}", path) for path in (first, second)]
        attach_delta(other, versions[0], versions[1], IDLE)
        for version in versions:
            push(other, str(version.ref), RegistrySource(registry, "models/source"), network=Network(), control=IDLE)


def input_of(store: ModelStore, name: str) -> Path:
    return store.root.parent.parent / "inputs" / name


def prepare(operation: Operation, home: Path) -> None:
    """A home in which the operation may begin."""
    store = store_at(home)
    store.pin("pinned")
    pinned, previous = store.get("pinned").digest, add_model(store, "old", input_of(store, "d.gguf")).digest
    store.write_slots(lambda _: {"embed": Slot(current=pinned, previous=previous)})
    store.remove("old")
    operation.prepare(store)


@dataclass(frozen=True)
class Kept:
    """What must outlive everything: pinned models by their names, and both versions of a slot that nobody changes."""

    pinned: Mapping[str, Digest]
    slot: Slot
    sick: str = ""


def kept_in(home: Path, operation: Operation) -> Kept:
    store = store_at(home)
    return Kept({name: store.get(name).digest for name in store.pins()}, store.slots()["embed"], operation.sick)


def assert_law(home: Path, kept: Kept) -> None:
    """What holds at every moment: what is visible verifies, references lead somewhere, what is kept is there."""
    store = store_at(home)
    if kept.sick:
        _assert_sound_but(store, kept.sick)
    else:
        assert_sound(home / "store")
    models = {str(model.ref): model.digest for model in store.list()}
    assert {name: models.get(name) for name in store.pins()} == kept.pinned
    assert store.slots()["embed"] == kept.slot
    if not kept.sick:
        _assert_references(store)
    for slot in store.slots().values():
        for digest in slot.digests():
            _assert_manifest(store, digest)


def _assert_sound_but(store: ModelStore, sick: str) -> None:
    assert {str(found.ref) for found in store.damaged()} <= {sick}
    for model in store.list():
        assert str(model.ref) == sick or all(check.is_good for check in store.verify(model.ref))


def _assert_references(store: ModelStore) -> None:
    """Every entry of the list leads to a document, and that to blobs of the sizes that it names."""
    for entry in json.loads((store.root / "index.json").read_bytes())["manifests"]:
        _assert_manifest(store, Digest(entry["digest"]))


def _assert_manifest(store: ModelStore, digest: Digest) -> None:
    assert store.blobs.has_sound(digest)
    document = json.loads(store.blobs.path(digest).read_bytes())
    for blob in (document["config"], *document["layers"]):
        assert store.blobs.has_sound(Digest(blob["digest"]))


def assert_forward(operation: Operation, home: Path, kept: Kept) -> None:
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


def _start_slot(store: ModelStore) -> None:
    """A slot with one version, and the next one in the store."""
    first = add_model(store, "v1", input_of(store, "v1.gguf"))
    add_model(store, "v2", input_of(store, "v2.gguf"))
    store.write_slots(lambda slots: {**slots, "chat": Slot(current=first.digest)})


def _activate(store: ModelStore) -> None:
    """What an appliance writes when it starts and when it activates a version; what it loads is not looked at here."""
    candidate = store.get("v2").digest

    def change(to: Callable[[Slot], Slot]) -> Slot:
        return store.write_slots(lambda slots: {**slots, "chat": to(slots["chat"])})["chat"]

    if change(lambda slot: recovered(slot, now_s=1.0)).current != candidate:
        change(lambda slot: begun(slot, candidate, "v2:latest", trial_s=1.0))
        store.collect()
        change(lambda slot: confirmed(slot, now_s=2.0))
    store.collect()


def _is_activated(store: ModelStore) -> None:
    slot = store.slots()["chat"]
    assert (slot.current, slot.previous, slot.trial) == (store.get("v2").digest, store.get("v1").digest, None)


def _damage(store: ModelStore) -> None:
    """A model of several pieces, one of which has a flipped bit."""
    weights = add_model(store, "sick", input_of(store, "large.gguf")).weights
    with weights.open("r+b") as file:
        file.seek(3 << 20)
        file.write(b"\x7f")


def _scrub(store: ModelStore) -> None:
    """A whole round, then what is quarantined is mended."""
    scrubber = Scrubber(store, rng=random.Random(1))
    scrubber.step()
    for _ in range(scrubber.num_pieces - 1):
        scrubber.step()
    source = LayoutSource(input_of(store, "other"))
    for digest in store.quarantined():
        blob = part_with(store, digest)
        assert blob is not None
        repair(store, blob, [source], IDLE)


def _is_mended(store: ModelStore) -> None:
    assert not store.quarantined()
    assert_sound(store.root)


def _registry_of(store: ModelStore, repository: str) -> RegistrySource:
    return RegistrySource((store.root.parent.parent / "inputs" / "registry").read_text(), repository)


def _push(store: ModelStore) -> None:
    token = (store.root.parent / "token").read_text()
    push(store, "new", _registry_of(store, f"models/{token}"), network=Network(), control=IDLE)


def _is_pushed(store: ModelStore) -> None:
    """Another device gets it whole."""
    token = (store.root.parent / "token").read_text()
    device = ModelStore(store.root.parent / "device", files=NoSync())
    assert pull(device, str(_registry_of(store, f"models/{token}")), name="new").digest == store.get("new").digest
    assert len(device.referrers(store.get("new").digest)) == 1
    assert_sound(device.root)


def _add_new_with_note(store: ModelStore) -> None:
    model = add_model(store, "new", input_of(store, "a.gguf"))
    store.attach(model.digest, "application/x-note", [PackageFile(input_of(store, "d.gguf"), "note")])


def _update(store: ModelStore) -> None:
    pull(store, f"{_registry_of(store, 'models/source')}:v2", name="new")
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
    """Manifest, config and weights of the pinned model and of the slot's other version are all there is."""
    assert len(list(store.blobs.digests())) == 6


def _import(store: ModelStore) -> None:
    with Bundle(input_of(store, "stick.tar")) as bundle:
        for model in import_models(store, bundle, plan_import(store, bundle)):
            assert len(store.referrers(model.digest)) == 1


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
        Operation("import", _nothing, _import, _assert_models("new", "pinned")),
        Operation("activate", _start_slot, _activate, _is_activated),
        Operation("push", _add_new_with_note, _push, _is_pushed, needs_registry=True),
        Operation(
            "pull by delta",
            lambda store: add_model(store, "base", input_of(store, "v1.gguf")),
            _update,
            _assert_models("base", "new", "pinned"),
            needs_registry=True,
        ),
        Operation("scrub, repair", _damage, _scrub, _is_mended, sick="sick:latest"),
        Operation("collect", _litter, lambda store: store.collect(partial_age_s=-1e9), _assert_clean),
    )
}
