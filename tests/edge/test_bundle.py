"""Bundles: what is exported comes in again, by whatever tool; what is damaged or hostile does not."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import override

from edge.errors import (
    DigestMismatch,
    DiskFull,
    EdgeError,
    InvalidModelFile,
    InvalidReference,
    ModelNotFound,
    SourceUnavailable,
    StoreError,
    Untrusted,
)
from edge.store.bundle import MAX_DOCUMENTS_BYTES, Bundle
from edge.store.digest import Digest, digest_bytes
from edge.store.exporting import export, plan_export
from edge.store.importing import Admit, import_models, plan_import
from edge.store.manifest import ModelRef
from edge.store.models import ModelStore
from edge.store.stored import PackageFile, StoredModel
from tests.edge.bundles import Files, layout_of, tar_bytes, with_blob, with_document, write_bundle
from tests.edge.store_support import Killed, KillingFileOps, NoSync, add_model, assert_sound, write_gguf

SIGNATURE = "application/vnd.dev.sigstore.bundle.v0.3+json"


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    """Two models that share no file; something is attached to one, and to that in turn."""
    store = ModelStore(tmp_path / "store", files=NoSync())
    model = add_model(store, "one:f32", write_gguf(tmp_path / "one.gguf", num_rows=3000))
    add_model(store, "two:f32", write_gguf(tmp_path / "two.gguf", fill=b"\x02"))
    parts = _attached(store, model.digest, "application/vnd.cyclonedx+json", b'{"bomFormat": "CycloneDX"}')
    _attached(store, parts, SIGNATURE, b"signed")
    return store


def _attached(store: ModelStore, subject: Digest, kind: str, data: bytes) -> Digest:
    path = store.root.parent / "attached"
    path.write_bytes(data)
    return store.attach(subject, kind, [PackageFile(path, "attached.json", kind)]).digest


def exported(store: ModelStore, *names: str, to: str = "stick.tar") -> Path:
    path = store.root.parent / to
    export(store, plan_export(store, names, path))
    return path


def everybody(store: ModelStore, digest: Digest, ref: ModelRef) -> None:
    return None


def taken(store: ModelStore, path: Path, *names: str, admit: Admit = everybody) -> list[StoredModel]:
    with Bundle(path) as bundle:
        plan = plan_import(store, bundle, names)
        return list(import_models(store, bundle, plan, admit=admit))


def empty(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "device", files=NoSync())


def test_what_is_exported_comes_in_again(store: ModelStore, tmp_path: Path) -> None:
    device = empty(tmp_path)
    taken(device, exported(store, "one", "two"))
    assert [(model.ref, model.digest) for model in assert_sound(device.root)] == [
        (model.ref, model.digest) for model in store.list()
    ]
    assert set(device.blobs.digests()) == set(store.blobs.digests())
    [parts] = device.referrers(store.get("one").digest)
    assert parts.artifact_type == "application/vnd.cyclonedx+json"
    [signature] = device.referrers(parts.digest, SIGNATURE)
    [layer] = device.read_referrer(signature).layers
    assert device.blobs.path(layer.digest).read_bytes() == b"signed"
    device.collect()
    assert set(device.blobs.digests()) == set(store.blobs.digests())


def test_the_same_models_give_the_same_file(store: ModelStore, tmp_path: Path) -> None:
    device = empty(tmp_path)
    first = exported(store, "one")
    taken(device, first)
    assert exported(device, "one", to="again.tar").read_bytes() == first.read_bytes()


def test_what_is_small_stands_in_front(store: ModelStore) -> None:
    with Bundle(exported(store, "one")) as bundle:
        sizes = list(bundle.blob_sizes().values())
    assert sizes == sorted(sizes)


def test_one_of_several_comes_in_under_another_name(store: ModelStore, tmp_path: Path) -> None:
    device, path = empty(tmp_path), exported(store, "one", "two")
    with Bundle(path) as bundle:
        list(import_models(device, bundle, plan_import(device, bundle, ["two:f32"], rename="plant/two")))
        assert [str(model.ref) for model in device.list()] == ["plant/two:latest"]
        with pytest.raises(ModelNotFound, match="one:f32, two:f32"):
            plan_import(device, bundle, ["three"])
        with pytest.raises(InvalidReference, match="2 models"):
            plan_import(device, bundle, rename="x")


def test_the_plan_tells_what_would_be_copied(store: ModelStore, tmp_path: Path) -> None:
    device, path = empty(tmp_path), exported(store, "one", "two")
    add_model(device, "one:f32", tmp_path / "two.gguf")
    before = device.get("one").digest
    taken(device, path, "two:f32")
    with Bundle(path) as bundle:
        one, two = plan_import(device, bundle).models
        assert (one.is_present, one.before) == (False, before)
        assert sum(blob.size for blob in one.missing) > 48_000
        assert (two.is_present, two.missing, two.before) == (True, [], store.get("two").digest)


def test_a_damaged_model_is_mended(store: ModelStore, tmp_path: Path) -> None:
    device, path = empty(tmp_path), exported(store, "one")
    [model] = taken(device, path)
    data = bytearray(model.weights.read_bytes())
    data[-1] ^= 1
    model.weights.write_bytes(data)
    device.quarantine(model.files[0].digest, "a flipped bit")
    assert device.list() == []
    taken(device, path)
    assert len(assert_sound(device.root)) == 1


def test_who_is_not_admitted_is_refused_before_the_files_are_copied(store: ModelStore, tmp_path: Path) -> None:
    device = empty(tmp_path)
    seen: list[tuple[int, bool]] = []

    def refuse(store: ModelStore, digest: Digest, ref: ModelRef) -> None:
        has_files = any(store.blobs.path(d).stat().st_size > 10_000 for d in store.blobs.digests())
        seen.append((len(store.referrers(digest)), has_files))
        raise Untrusted(str(ref), "it is of nobody", hint="Sign it.")

    with pytest.raises(Untrusted):
        taken(device, exported(store, "one"), admit=refuse)
    assert seen == [(1, False)]
    assert device.list() == []
    assert list(device.blobs.digests()) == []


def test_what_is_attached_comes_with_each_name(store: ModelStore, tmp_path: Path) -> None:
    store.copy("one", "another:f32")
    device = empty(tmp_path)
    taken(device, exported(store, "one", "another"), "another:f32")
    assert len(device.referrers(device.get("another").digest)) == 1


def test_what_is_attached_later_stands_behind_what_is_there(store: ModelStore, tmp_path: Path) -> None:
    digest, device = store.get("one").digest, empty(tmp_path)
    taken(device, exported(store, "one"))
    [good] = device.referrers(digest)
    for number in range(3):
        other = ModelStore(tmp_path / f"other-{number}", files=NoSync())
        add_model(other, "one:f32", tmp_path / "one.gguf")
        for more in range(20):
            _attached(other, digest, SIGNATURE, f"{number} {more}".encode())
        taken(other, exported(store, "one"))
        taken(device, exported(other, "one", to="other.tar"))
    found = device.referrers(digest)
    assert (found[0], len(found)) == (good, 61)


def test_what_is_attached_to_one_model_is_bounded(store: ModelStore, tmp_path: Path) -> None:
    for number in range(65):
        _attached(store, store.get("two").digest, SIGNATURE, str(number).encode())
    with pytest.raises(InvalidModelFile, match="more than 64 things"):
        Bundle(write_bundle(tmp_path / "many.tar", layout_of(store)))
    with pytest.raises(StoreError, match="more than 64 things"):
        exported(store, "two")


@dataclass
class CountingFileOps(NoSync):
    """Counts what is written, and changes a byte of what comes after `spoil_at`."""

    written_bytes: int = 0
    spoil_at: int = 1 << 60

    @override
    def write(self, file: FileIO, data: bytes | memoryview) -> None:
        if self.written_bytes <= self.spoil_at < self.written_bytes + len(data):
            data = bytes([data[0] ^ 1]) + bytes(data[1:])
        self.written_bytes += len(data)
        super().write(file, data)


def test_an_interrupted_export_goes_on_where_it_stopped(store: ModelStore, tmp_path: Path) -> None:
    whole = exported(store, "one", "two").read_bytes()
    for kept in (0, 700, 20_000, len(whole) - 1, len(whole)):
        partial = tmp_path / "again.tar.partial"
        partial.write_bytes(whole[:kept])
        counting = ModelStore(store.root, files=CountingFileOps())
        assert exported(counting, "one", "two", to="again.tar").read_bytes() == whole
        ops = counting.blobs.files
        assert isinstance(ops, CountingFileOps)
        assert ops.written_bytes <= len(whole) - kept + 48_000, kept


def test_the_rest_of_another_export_is_overwritten(store: ModelStore, tmp_path: Path) -> None:
    whole = exported(store, "one").read_bytes()
    for other in (b"other" * 100_000, whole[:9000] + b"!" + whole[9001:], whole + b"more"):
        (tmp_path / "again.tar.partial").write_bytes(other)
        assert exported(store, "one", to="again.tar").read_bytes() == whole


def test_a_medium_that_gives_back_other_bytes_is_told(store: ModelStore, tmp_path: Path) -> None:
    for spoil_at in (100, 520, 20_000):
        bad = ModelStore(store.root, files=CountingFileOps(spoil_at=spoil_at))
        with pytest.raises(StoreError, match="does not read back as it was written"):
            exported(bad, "one")
        assert not (tmp_path / "stick.tar").exists()
    exported(store, "one")


def test_a_damaged_blob_is_not_exported(store: ModelStore, tmp_path: Path) -> None:
    weights = store.get("one").weights
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DigestMismatch, match="edge verify"):
        exported(store, "one")
    assert not (tmp_path / "stick.tar").exists()


@dataclass
class SmallDisk(NoSync):
    """A disk with little room."""

    free: int = 10_000

    @override
    def free_bytes(self, path: Path) -> int:
        return self.free


def test_what_does_not_fit_is_refused_beforehand(store: ModelStore, tmp_path: Path) -> None:
    small = ModelStore(store.root, files=SmallDisk())
    with pytest.raises(DiskFull, match="Make room on the medium"):
        exported(small, "one")
    path = exported(store, "one")
    full = ModelStore(tmp_path / "device", files=SmallDisk())
    with pytest.raises(DiskFull, match="edge rm"):
        taken(full, path)
    assert list(full.blobs.digests()) == []
    assert ModelStore(tmp_path / "device").list() == []


def test_an_import_goes_on_where_it_stopped(store: ModelStore, tmp_path: Path) -> None:
    device, path = empty(tmp_path), exported(store, "one")
    weights = store.get("one").files[0]
    data = weights.path.read_bytes()
    for kept, is_copied_anew in ((data[:300_000], False), (b"!" + data[1:300_000], True), (data + b"more", True)):
        with device.blobs.ingest(f"blob {weights.digest}") as partial:
            partial.remember(source="an import before", validator="", total_bytes=len(data))
            partial.write(kept)
        counting = ModelStore(device.root, files=CountingFileOps())
        taken(counting, path)
        ops = counting.blobs.files
        assert isinstance(ops, CountingFileOps)
        assert (ops.written_bytes > len(data)) == is_copied_anew
        assert len(assert_sound(device.root)) == 1
        device.remove("one")
        device.collect()


def test_what_an_import_copied_outlives_its_death(store: ModelStore, tmp_path: Path) -> None:
    path = exported(store, "one")
    complete = KillingFileOps()
    taken(ModelStore(tmp_path / "complete", files=complete), path)
    number = max(n for n, step in enumerate(complete.performed) if step.startswith("sync ") and "partial" in step)
    with pytest.raises(Killed):
        taken(ModelStore(tmp_path / "device", files=KillingFileOps(number)), path)
    counting = CountingFileOps()
    taken(ModelStore(tmp_path / "device", files=counting), path)
    assert counting.written_bytes < store.get("one").size_bytes


def test_death_before_any_operation_leaves_a_sound_store_and_the_next_import_ends_well(
    store: ModelStore, tmp_path: Path
) -> None:
    path = exported(store, "one")
    complete = KillingFileOps()
    taken(ModelStore(tmp_path / "complete", files=complete), path)
    for number in range(0, len(complete.performed), 3):
        root = tmp_path / f"device-{number}"
        with pytest.raises(Killed):
            taken(ModelStore(root, files=KillingFileOps(number)), path)
        assert_sound(root)
        taken(ModelStore(root, files=NoSync()), path)
        assert len(assert_sound(root)) == 1


def test_death_while_exporting_leaves_nothing_under_the_name(store: ModelStore, tmp_path: Path) -> None:
    whole = exported(store, "one").read_bytes()
    complete = KillingFileOps()
    exported(ModelStore(store.root, files=complete), "one", to="complete.tar")
    for number in range(len(complete.performed)):
        target = tmp_path / "killed.tar"
        with pytest.raises(Killed):
            exported(ModelStore(store.root, files=KillingFileOps(number)), "one", to=target.name)
        assert not target.exists() or (target.read_bytes() == whole)
        assert exported(store, "one", to=target.name).read_bytes() == whole
        target.unlink()


def test_a_flipped_bit_anywhere_is_refused_or_harmless(store: ModelStore, tmp_path: Path) -> None:
    whole, draw = exported(store, "one").read_bytes(), random.Random(3)
    for _ in range(60):
        at = draw.randrange(len(whole))
        bad = tmp_path / "bad.tar"
        bad.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        root = tmp_path / "device"
        try:
            taken(ModelStore(root, files=NoSync()), bad)
        except EdgeError:
            assert ModelStore(root).list() == []
        assert_sound(root)
        shutil.rmtree(root, ignore_errors=True)


def document(files: Files, kind: str) -> str:
    """The digest of the manifest or config in a layout of one model."""
    manifest: str = json.loads(files["index.json"])["manifests"][0]["digest"]
    if kind == "manifest":
        return manifest.removeprefix("sha256:")
    members: dict[str, Any] = json.loads(files[f"blobs/sha256/{manifest.removeprefix('sha256:')}"])
    found: dict[str, str] = members["layers"][0] if kind == "layers" else members[kind]
    return found["digest"].removeprefix("sha256:")


def with_index(files: Files, **change: object) -> Files:
    return files | {"index.json": json.dumps(json.loads(files["index.json"]) | change).encode()}


def entry(files: Files, **change: object) -> dict[str, object]:
    return json.loads(files["index.json"])["manifests"][0] | change


def without(files: Files, name: str) -> Files:
    return {known: data for known, data in files.items() if known != name}


def layers(files: Files, **change: object) -> list[dict[str, object]]:
    manifest = json.loads(files[f"blobs/sha256/{document(files, 'manifest')}"])
    return [manifest["layers"][0] | change]


NAME = "org.cncf.model.filepath"
HOSTILE: Mapping[str, tuple[Callable[[Files], Files], str]] = {
    "no layout": (lambda f: without(f, "oci-layout"), "it is no OCI archive"),
    "no index": (lambda f: without(f, "index.json"), "it is no OCI archive"),
    "a newer layout": (lambda f: f | {"oci-layout": b'{"imageLayoutVersion":"2.0.0"}'}, "version '2.0.0'"),
    "no JSON": (lambda f: f | {"index.json": b"{"}, "index.json of bad.tar is refused"),
    "deep JSON": (lambda f: f | {"index.json": b'{"a":' + b"[" * 100_000}, "index.json of bad.tar is refused"),
    "a long index": (lambda f: f | {"index.json": b" " * (5 << 20)}, "8,388,608 in all"),
    "many entries": (lambda f: with_index(f, manifests=[entry(f)] * 1025), "more than 1,024 references"),
    "the same name twice": (lambda f: with_index(f, manifests=[entry(f)] * 2), "have the same name"),
    "an absent manifest": (lambda f: without(f, f"blobs/sha256/{document(f, 'manifest')}"), "it lacks the blob"),
    "an absent config": (lambda f: without(f, f"blobs/sha256/{document(f, 'config')}"), "it lacks the blob"),
    "an absent file": (lambda f: without(f, f"blobs/sha256/{document(f, 'layers')}"), "it lacks the blob"),
    "a size of the index": (lambda f: with_index(f, manifests=[entry(f, size=3)]), "bytes instead of 3"),
    "a size of the manifest": (
        lambda f: with_document(f, document(f, "manifest"), {"layers": layers(f, size=1 << 50)}),
        "bytes instead of 1,125,899,906,842,624",
    ),
    "a digest of another kind": (lambda f: with_index(f, manifests=[entry(f, digest="sha512:00")]), "is refused"),
    "a digest that leads up": (
        lambda f: with_index(f, manifests=[entry(f, digest="sha256:../../../etc/passwd")]),
        "is refused",
    ),
    "other bytes of a manifest": (
        lambda f: f | {(n := f"blobs/sha256/{document(f, 'manifest')}"): f[n].replace(b"llama", b"gemma")},
        "A document of bad.tar",
    ),
    "other bytes of a file": (
        lambda f: f | {(n := f"blobs/sha256/{document(f, 'layers')}"): bytes(len(f[n]))},
        "A blob of",
    ),
    "a path that leads up": (
        lambda f: with_document(f, document(f, "manifest"), {"layers": layers(f, annotations={NAME: "../../x"})}),
        "the path '../../x' is not allowed",
    ),
    "a config of another kind": (lambda f: with_blob(f, document(f, "config"), b"[]"), "The config of one:f32"),
    "nothing in it": (lambda f: with_index(f, manifests=[]), "there is no model in it"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_refused_and_leaves_nothing(name: str, store: ModelStore, tmp_path: Path) -> None:
    change, reason = HOSTILE[name]
    files = layout_of(store)
    files = with_index(files, manifests=[entry(files)])
    bad, device = write_bundle(tmp_path / "bad.tar", change(files)), empty(tmp_path)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(EdgeError) as refused:
        taken(device, bad)
    assert reason in str(refused.value)
    assert device.list() == []
    assert list(device.blobs.digests()) == []
    assert all(path.is_relative_to(device.root) for path in set(tmp_path.rglob("*")) - before)


def test_documents_are_bounded_together(store: ModelStore, tmp_path: Path) -> None:
    files = layout_of(store)
    name, bad = document(files, "manifest"), tmp_path / "bad.tar"
    files = with_blob(files, name, files[f"blobs/sha256/{name}"] + b" " * (3 << 20))
    files = with_index(files, manifests=[entry(files, annotations={}) for _ in range(4)])
    with pytest.raises(InvalidModelFile, match=f"{MAX_DOCUMENTS_BYTES:,} in all"):
        Bundle(write_bundle(bad, files))


@settings(max_examples=200, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 30_000), st.binary(max_size=9)), max_size=5), cut=st.integers(0))
def test_any_bytes_are_a_bundle_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]], cut: int
) -> None:
    directory = tmp_path_factory.getbasetemp() / "any-bundle"
    if not directory.exists():
        add_model(ModelStore(directory / "store", files=NoSync()), "m", write_gguf(directory / "m.gguf"))
    data = bytearray(tar_bytes(layout_of(ModelStore(directory / "store"))))
    for at, new in changes:
        data[at % len(data) : at % len(data) + len(new)] = new
    (directory / "any.tar").write_bytes(data[: cut or None])
    try:
        with Bundle(directory / "any.tar") as bundle:
            plan_import(ModelStore(directory / "device"), bundle)
    except EdgeError:
        pass
    assert not (directory / "device").exists()


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "none", "does not exist"), (tmp_path, "not a file"), (tmp_path / "pipe", "a file")):
        with pytest.raises(SourceUnavailable, match=words):
            Bundle(path)


def test_a_range_of_a_blob_is_read(store: ModelStore) -> None:
    model = store.get("one")
    data = model.weights.read_bytes()
    with Bundle(exported(store, "one")) as bundle:
        for start, stop in ((0, None), (5, 10), (len(data) - 1, None), (10, 10), (0, 1 << 40)):
            found = b"".join(bundle.open_blob_range(model.files[0].digest, start, stop))
            assert found == data[start:stop]
        with pytest.raises(InvalidModelFile, match="lacks the blob"):
            next(bundle.open_blob_range(digest_bytes(b"none")))


def test_a_container_image_travels_and_is_not_imported(store: ModelStore, tmp_path: Path) -> None:
    config, layer = b'{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}', b"layer" * 999
    kinds = ("application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.layer.v1.tar")
    described = [
        {"mediaType": kind, "digest": digest_bytes(data), "size": len(data)}
        for kind, data in zip(kinds, (config, layer), strict=True)
    ]
    kind = "application/vnd.oci.image.manifest.v1+json"
    manifest = json.dumps({"schemaVersion": 2, "mediaType": kind, "config": described[0], "layers": described[1:]})
    blobs = {f"blobs/sha256/{digest_bytes(data).hex}": data for data in (manifest.encode(), config, layer)}
    notes = {"org.opencontainers.image.ref.name": "localhost/slm-edge:1"}
    named = {"mediaType": kind, "digest": digest_bytes(manifest.encode()), "size": len(manifest), "annotations": notes}
    index = json.dumps({"schemaVersion": 2, "manifests": [named]}).encode()
    layout = b'{"imageLayoutVersion": "1.0.0"}'
    image = write_bundle(tmp_path / "image.tar", {**blobs, "index.json": index, "oci-layout": layout})
    path, device = tmp_path / "stick.tar", empty(tmp_path)
    with Bundle(image) as bundled:
        plan = plan_export(store, ["one"], path, image=bundled)
        assert plan.images == ["localhost/slm-edge:1"]
        export(store, plan)
    with Bundle(path) as bundle:
        assert [(i.name, i.size_bytes) for i in bundle.images] == [("localhost/slm-edge:1", len(config) + len(layer))]
    found = json.loads(skopeo("inspect", f"oci-archive:{path}:localhost/slm-edge:1"))
    assert (found["Architecture"], len(found["Layers"])) == ("amd64", 1)
    taken(device, path)
    assert digest_bytes(layer) not in set(device.blobs.digests())


def skopeo(*args: str | Path) -> str:
    if not (found := shutil.which("skopeo")):
        pytest.skip("needs skopeo")
    done = subprocess.run([found, *args], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_skopeo_reads_what_we_write(store: ModelStore, tmp_path: Path) -> None:
    path = exported(store, "one", "two")
    raw = skopeo("inspect", "--raw", f"oci-archive:{path}:one:f32")
    assert digest_bytes(raw.encode()) == store.get("one").digest
    skopeo("copy", f"oci-archive:{path}:two:f32", f"oci:{tmp_path / 'copied'}:two:f32")
    copied = tmp_path / "copied" / "blobs" / "sha256" / store.get("two").files[0].digest.hex
    assert copied.read_bytes() == store.get("two").weights.read_bytes()


def test_we_read_what_skopeo_writes(store: ModelStore, tmp_path: Path) -> None:
    skopeo("copy", f"oci:{store.root}:one:f32", f"oci-archive:{tmp_path / 'named.tar'}:one:f32")
    skopeo("copy", f"oci:{store.root}:one:f32", f"oci-archive:{tmp_path / 'bare.tar'}")
    device = empty(tmp_path)
    [model] = taken(device, tmp_path / "named.tar")
    assert (str(model.ref), model.digest) == ("one:f32", store.get("one").digest)
    with pytest.raises(InvalidReference, match="--name NAME"):
        taken(device, tmp_path / "bare.tar")
    with Bundle(tmp_path / "bare.tar") as bundle:
        [model] = import_models(device, bundle, plan_import(device, bundle, rename="mine"))
    assert (str(model.ref), model.digest) == ("mine:latest", store.get("one").digest)
