"""Documents of a store and bundles that are mutated, in stores that have other models."""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge.errors import EdgeError
from edge.store.bundle import Bundle
from edge.store.digest import digest_bytes
from edge.store.exporting import export, plan_export
from edge.store.importing import import_models, plan_import
from edge.store.manifest import REF_NAME
from edge.store.models import ModelStore
from tests.edge.gguf_files import gguf_bytes
from tests.edge.mutators import NUMBERS, Kind, dumped, mutate_bytes, mutate_json
from tests.edge.store_support import NoSync, add_model


def _store_of(root: Path, names: Mapping[str, bytes]) -> ModelStore:
    """A store with a model of each name, whose weights are made of its byte."""
    store = ModelStore(root, files=NoSync())
    weights = root.with_suffix(".gguf")
    for name, fill in names.items():
        weights.write_bytes(gguf_bytes(fill=fill))
        add_model(store, name, weights)
    return store


def _copied(root: Path) -> ModelStore:
    tried = root.with_name("tried")
    shutil.rmtree(tried, ignore_errors=True)
    shutil.copytree(root, tried)
    return ModelStore(tried, files=NoSync())


def _is_refused(step: Callable[[], object]) -> bool:
    try:
        step()
    except EdgeError:
        return True
    return False


def _check_unharmed(store: ModelStore, sound: ModelStore) -> None:
    """The model `other` is what it was."""
    assert store.get("other").digest == sound.get("other").digest, "another model was changed"
    assert all(check.is_good for check in store.verify("other")), "another model was damaged"


def manifest(folder: Path) -> Kind:
    """Documents of a store: the name of one, the end of a line, and its bytes."""
    base = _store_of(folder / "sound", {"sound": b"\1", "other": b"\2"})
    found = base.get("sound")
    documents: Mapping[str, object] = {
        "index.json": json.loads((base.root / "index.json").read_bytes()),
        "manifest": json.loads(found.manifest.encode()),
        "config": json.loads(found.config.encode()),
        "pins.json": ["sound:latest"],
        "drafts.json": {"sound:latest": "sound:latest"},
    }
    names = ["manifest", "manifest", "manifest", *documents]

    def mutate(rng: random.Random) -> bytes:
        name = rng.choice(names)
        return name.encode() + b"\n" + dumped(rng, mutate_json(rng, documents[name]))

    def feed(data: bytes, path: Path) -> bool:
        store = _copied(base.root)
        name, _, document = data.partition(b"\n")
        is_named = not _is_refused(lambda: _put_in(store, name.decode(), document))
        refused = [_is_refused(step) for step in _uses(store)]
        if name != b"index.json":
            _check_unharmed(store, base)
        return is_named and not any(refused)

    sound = [name.encode() + b"\n" + json.dumps(document).encode() for name, document in documents.items()]
    return Kind(sound, mutate, feed)


def _put_in(store: ModelStore, name: str, document: bytes) -> None:
    """Make a document the store's own, as if its digest had been right."""
    if name.endswith(".json"):
        (store.root / name).write_bytes(document)
        return
    manifest = store.get("sound").manifest
    if name == "config":
        descriptor = msgspec.structs.replace(manifest.config, digest=store.blobs.put(document), size=len(document))
        document = msgspec.structs.replace(manifest, config=descriptor).encode()
    store.add_manifest("came", document)
    _point(store, document)


def _point(store: ModelStore, manifest: bytes) -> None:
    index = store.root / "index.json"
    listed: dict[str, Any] = json.loads(index.read_bytes())
    digest = str(store.blobs.put(manifest))
    for entry in listed["manifests"]:
        if entry["annotations"].get(REF_NAME) == "sound:latest":
            entry |= {"digest": digest, "size": len(manifest)}
    index.write_text(json.dumps(listed))


def _uses(store: ModelStore) -> Sequence[Callable[[], object]]:
    """What an appliance does with its models."""

    def look() -> None:
        for found in store.list():
            _ = (found.details, found.kind, found.capabilities, found.size_bytes, found.projector, found.report)
            _ = found.weights

    return [
        look, store.damaged, store.pins, store.drafts, store.slots, lambda: store.get("sound"),
        lambda: store.verify("sound"), lambda: store.copy("sound", "copy"), store.collect,
        lambda: store.remove("sound"), store.collect,
    ]  # fmt: skip


_TYPES = [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, b"S"]
_PATHS = ["../outside", "/outside", "blobs/../../outside", "./index.json", "oci-layout/", "a" * 300, "\x1b[2J", "."]
_BLOCK = tarfile.BLOCKSIZE


def tar(folder: Path) -> Kind:
    """Bundles, each imported into a store that has a model of another name."""
    base = _store_of(folder / "sound", {"other": b"\2"})
    source = _store_of(folder / "source", {"one": b"\1", "two": b"\3"})
    export(source, plan_export(source, ["one", "two"], folder / "whole.tar"), check=False)
    whole = (folder / "whole.tar").read_bytes()
    members = dict(_members(whole))

    def mutate(rng: random.Random) -> bytes:
        match rng.randrange(5):
            case 0:
                return mutate_bytes(rng, whole, [whole])
            case 1 | 2:
                return _with_changed_headers(rng, whole)
            case 3:
                return _with_changed_documents(rng, members)
            case _:
                return _with_changed_members(rng, members)

    def feed(data: bytes, path: Path) -> bool:
        store = _copied(base.root)
        try:
            with Bundle(path) as bundle:
                taken = [*import_models(store, bundle, plan_import(store, bundle))]
        finally:
            assert not store.damaged(), "a model came in that is not whole"
            assert all(check.is_good for found in store.list() for check in store.verify(found.ref)), "or is damaged"
            if "other:latest" in map(str, store.refs()):
                _check_unharmed(store, base)
        return bool(taken)

    return Kind([whole], mutate, feed)


def _members(whole: bytes) -> Sequence[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        opened = [(member.name, archive.extractfile(member)) for member in archive]
        return [(name, file.read()) for name, file in opened if file]


def _archive(members: Sequence[tuple[tarfile.TarInfo, bytes]], *, format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _with_changed_headers(rng: random.Random, whole: bytes) -> bytes:
    """Headers with changed fields, and the sum that tells them right again."""
    changed = bytearray(whole)
    headers = [at for at in range(0, len(whole), _BLOCK) if whole[at + 257 : at + 262] == b"ustar"]
    for at in rng.choices(headers, k=rng.randint(1, 2)):
        block = bytearray(mutate_bytes(rng, whole[at : at + _BLOCK], [whole])[:_BLOCK].ljust(_BLOCK, b"\0"))
        if rng.random() < 0.5:
            number = rng.choice(NUMBERS)
            sizes = [b"%011o\0" % (number & (1 << 33) - 1), b"\x80" + number.to_bytes(11, "big"), b"-0000000001\0"]
            block[124:136] = rng.choice(sizes)
        if rng.random() < 0.9:
            block[257:265] = rng.choice([b"ustar\x0000", b"ustar  \0"])
            block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 8 * ord(" "))
        changed[at : at + _BLOCK] = block
    return bytes(changed)


def _with_changed_members(rng: random.Random, members: Mapping[str, bytes]) -> bytes:
    """Members of other names, types and orders, more than once, or not at all."""
    listed = [(tarfile.TarInfo(name), data) for name, data in members.items()]
    for _ in range(rng.randint(1, 3)):
        info, data = rng.choice(listed)
        match rng.randrange(6):
            case 0:
                listed.remove((info, data))
            case 1:
                listed.insert(rng.randrange(len(listed)), (tarfile.TarInfo(info.name), rng.choice([data, b"", b"x"])))
            case 2:
                rng.shuffle(listed)
            case 3:
                info.name = rng.choice(_PATHS)
            case 4:
                info.type, info.linkname = rng.choice(_TYPES), rng.choice(_PATHS)
            case _:
                info.pax_headers = {rng.choice(["path", "size", "linkpath", "GNU.sparse.map"]): rng.choice(_PATHS)}
        if not listed:
            return b""
    return _archive(listed, format=rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))


def _with_changed_documents(rng: random.Random, members: Mapping[str, bytes]) -> bytes:
    """An index, a manifest or a config with changes, under its right digest as far as that leads."""
    changed = dict(members)
    documents = [name for name, data in members.items() if data.startswith(b"{")]
    name = rng.choice(documents)
    data = dumped(rng, mutate_json(rng, json.loads(changed.pop(name))))
    if name.startswith("blobs/"):
        old, new = name.rpartition("/")[2], digest_bytes(data).hex
        name = f"blobs/sha256/{new}"
        size = len(members[f"blobs/sha256/{old}"])
        for other in documents:
            if other in changed:
                changed[other] = changed[other].replace(old.encode(), new.encode())
                changed[other] = changed[other].replace(b'"size":%d' % size, b'"size":%d' % len(data))
    changed[name] = data
    return _archive([(tarfile.TarInfo(member), of) for member, of in changed.items()])
