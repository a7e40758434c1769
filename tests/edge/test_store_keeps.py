"""What keeps bytes from being collected besides a name: leases, slots, and being attached to what is kept."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from edge.errors import InvalidModelFile, StoreError
from edge.store.digest import Digest, digest_bytes
from edge.store.manifest import MANIFEST_TYPE, Descriptor, Index, Referrer, decode
from edge.store.models import ModelStore, PackageFile, StoredModel
from edge.store.slots import Slot
from tests.edge.store_support import add_model, assert_sound, write_gguf

SIGNATURE = "application/vnd.dev.sigstore.bundle.v0.3+json"
SBOM = "application/vnd.cyclonedx+json"


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


def model_of(store: ModelStore, name: str, fill: bytes = b"\x01") -> StoredModel:
    return add_model(store, name, write_gguf(store.root.parent / "files" / f"{fill.hex()}.gguf", fill=fill))


def document(tmp_path: Path, name: str, text: str) -> PackageFile:
    path = tmp_path / name
    path.write_text(text)
    return PackageFile(path, name)


def is_whole(store: ModelStore, model: StoredModel) -> bool:
    return all(store.blobs.has_sound(digest) for digest in (model.digest, *(file.digest for file in model.files)))


def test_a_leased_model_outlives_its_name(store: ModelStore) -> None:
    model = model_of(store, "tiny")
    with store.lease(model.digest):
        store.remove("tiny")
        assert store.collect().num_blobs == 0
        assert store.leased() == {model.digest}
        assert store.get_version(model.digest, model.ref).files == model.files
    assert store.leased() == frozenset()
    assert store.collect().num_blobs == 3
    assert list(store.blobs.digests()) == []
    assert list((store.root / "leases").iterdir()) == []


def test_a_lease_ends_with_the_last_holder(store: ModelStore) -> None:
    model = model_of(store, "tiny")
    store.remove("tiny")
    with store.lease(model.digest):
        with ModelStore(store.root).lease(model.digest, digest_bytes(b"another")):
            assert len(store.leased()) == 2
        store.collect()
    assert is_whole(store, model), "not before the next collection"
    with pytest.raises(ZeroDivisionError), store.lease(model.digest):
        raise ZeroDivisionError
    store.collect()
    assert not is_whole(store, model)


def test_a_killed_process_holds_no_lease(store: ModelStore) -> None:
    model = model_of(store, "tiny")
    code = "import sys; from pathlib import Path; from edge.store.digest import Digest\n"
    code += "from edge.store.models import ModelStore\n"
    code += "with ModelStore(Path(sys.argv[1])).lease(Digest(sys.argv[2])): print(flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, store.root, model.digest], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        store.remove("tiny")
        assert store.collect().num_blobs == 0
        holder.kill()
        holder.wait(30)
        assert store.collect().num_blobs == 3


def test_what_comes_under_a_lease_is_kept_until_it_has_a_name(store: ModelStore, tmp_path: Path) -> None:
    """How a manifest arrives from a registry or a bundle: itself first, then its blobs, then its name."""
    other = ModelStore(tmp_path / "other")
    model = model_of(other, "tiny")
    data = other.blobs.path(model.digest).read_bytes()
    with store.lease(model.digest):
        assert store.keep_manifest(data) == model.digest
        for blob in store.blob_needs(model.manifest):
            store.collect()
            with store.blobs.ingest(blob.digest) as partial:
                store.keep(store.blobs.copy_in(other.blobs.path(blob.digest), partial))
                partial.discard()
        assert store.blob_needs(model.manifest) == []
        store.collect()
        assert store.list() == []
        added = store.add_manifest("mine:1", data)
    store.collect()
    assert assert_sound(store.root) == [added]
    assert store.blobs.path(added.digest).read_bytes() == data
    assert (added.digest, added.files[0].digest) == (model.digest, model.files[0].digest)


def test_a_manifest_keeps_its_bytes(store: ModelStore) -> None:
    model = model_of(store, "tiny")
    other = b" " + msgspec.json.format(store.blobs.path(model.digest).read_bytes(), indent=4)
    added = store.add_manifest("other", other)
    assert added.digest == digest_bytes(other) != model.digest
    assert added.files == model.files


def test_a_manifest_without_its_blobs_gets_no_name(store: ModelStore, tmp_path: Path) -> None:
    model = model_of(ModelStore(tmp_path / "other"), "tiny")
    with pytest.raises(StoreError, match="names 2 blobs that are not in the store"):
        store.add_manifest("tiny", model.manifest.encode())
    assert store.refs() == []
    kept = model_of(store, "kept")
    with pytest.raises(InvalidModelFile):
        store.add_manifest("kept", b"{}")
    wrong = msgspec.structs.replace(kept.manifest, config=kept.manifest.layers[0])
    with pytest.raises(InvalidModelFile, match="The config of wrong"):
        store.add_manifest("wrong", wrong.encode())
    assert store.list() == [kept]


def test_current_and_previous_of_a_slot_are_kept_by_digest(store: ModelStore) -> None:
    old, new = model_of(store, "tiny"), model_of(store, "tiny", b"\x02")
    store.write_slots(lambda _: {"chat": Slot(current=new.digest, previous=old.digest)})
    store.remove("tiny")
    assert store.collect().num_blobs == 0
    assert is_whole(store, old)
    assert is_whole(store, new)
    assert ModelStore(store.root).slots() == {"chat": Slot(current=new.digest, previous=old.digest)}
    store.write_slots(lambda before: {**before, "chat": Slot(current=new.digest)})
    store.collect()
    assert not is_whole(store, old)
    assert is_whole(store, new)
    assert store.get_version(new.digest, new.ref).files == new.files


def test_a_slot_never_refers_to_what_is_not_there(store: ModelStore) -> None:
    model = model_of(store, "tiny")
    with pytest.raises(StoreError):
        store.write_slots(lambda _: {"chat": Slot(current=digest_bytes(b"none"))})
    assert store.slots() == {}
    store.write_slots(lambda _: {"chat": Slot(current=model.digest)})
    store.blobs.remove(model.digest)
    store.write_slots(lambda before: {**before, "embed": Slot()})
    assert set(store.slots()) == {"chat", "embed"}, "what is lost already does not stand in the way"
    assert store.collect().blocked_by == ("tiny:latest", "slot chat")


@pytest.mark.parametrize(
    "text", [b"", b"\0\0\0", b'{"version":2,"slots":{}}', b'{"version":1,"slots":{"a":{"current":"x"}}}']
)
def test_with_a_damaged_list_of_slots_nothing_is_collected(store: ModelStore, text: bytes) -> None:
    model = model_of(store, "tiny")
    store.remove("tiny")
    (store.root / "slots.json").write_bytes(text)
    with pytest.raises(StoreError, match=r"slots\.json is damaged"):
        store.slots()
    assert store.collect().blocked_by == ("slots.json",)
    assert is_whole(store, model)


def test_what_is_attached_is_found_and_read(store: ModelStore, tmp_path: Path) -> None:
    model, other = model_of(store, "tiny"), model_of(store, "other", b"\x02")
    signed = store.attach(model.digest, SIGNATURE, [document(tmp_path, "model.sig", "signed")], {"release": "7"})
    listed = store.attach(model.digest, SBOM, [document(tmp_path, "sbom.json", "{ }")])
    assert store.referrers(model.digest) == [signed, listed]
    assert store.referrers(model.digest, SIGNATURE) == [signed]
    assert store.referrers(other.digest) == store.referrers(listed.digest) == []
    found = store.read_referrer(signed)
    assert (found.subject.digest, found.kind, found.annotations) == (model.digest, SIGNATURE, {"release": "7"})
    assert store.blobs.path(found.layers[0].digest).read_text() == "signed"
    assert (signed.artifact_type, signed.size) == (SIGNATURE, store.blobs.path(signed.digest).stat().st_size)
    assert sorted(map(str, store.refs())) == ["other:latest", "tiny:latest"], "it is no model"


def test_attaching_the_same_again_changes_nothing(store: ModelStore, tmp_path: Path) -> None:
    model = model_of(store, "tiny")
    files = [document(tmp_path, "model.sig", "signed")]
    first = store.attach(model.digest, SIGNATURE, files)
    index = (store.root / "index.json").read_bytes()
    assert store.attach(model.digest, SIGNATURE, files) == first
    assert (store.root / "index.json").read_bytes() == index


def test_a_list_that_could_not_be_read_again_is_not_written(store: ModelStore, tmp_path: Path) -> None:
    model = model_of(store, "tiny")
    index = (store.root / "index.json").read_bytes()
    with pytest.raises(StoreError, match="would be longer than"):
        store.attach(model.digest, "a/" + "b" * (5 << 20), [document(tmp_path, "model.sig", "signed")])
    assert (store.root / "index.json").read_bytes() == index
    assert store.get("tiny").digest == model.digest


@pytest.mark.parametrize("kind", ["a/" + "b" * 300, "no media type", "a/b\n", "/", "a"])
def test_what_is_attached_has_a_media_type_for_its_kind(store: ModelStore, tmp_path: Path, kind: str) -> None:
    model = model_of(store, "tiny")
    listed = store.attach(model.digest, SBOM, [document(tmp_path, "sbom.json", "{ }")])
    other = msgspec.structs.replace(store.read_referrer(listed), artifact_type=kind)
    with pytest.raises(InvalidModelFile, match="is no media type"):
        store.add_referrer(other.encode())
    assert store.referrers(model.digest) == [listed]


def test_what_is_attached_goes_with_its_subject_and_not_before(store: ModelStore, tmp_path: Path) -> None:
    model = model_of(store, "tiny")
    listed = store.attach(model.digest, SBOM, [document(tmp_path, "sbom.json", "{ }")])
    store.attach(listed.digest, SIGNATURE, [document(tmp_path, "sbom.sig", "signed")])
    store.copy("tiny", "second")
    store.remove("tiny")
    assert store.collect().num_blobs == 0
    store.remove("second")
    with store.lease(model.digest):
        assert store.collect().num_blobs == 0
        assert store.referrers(model.digest) == [listed]
    assert store.collect().num_blobs == 8
    assert list(store.blobs.digests()) == []
    assert decode((store.root / "index.json").read_bytes(), Index, what="index").manifests == []


def test_what_came_attached_is_attached_as_it_came(store: ModelStore, tmp_path: Path) -> None:
    source = ModelStore(tmp_path / "source")
    model = model_of(source, "tiny")
    signed = source.attach(model.digest, SIGNATURE, [document(tmp_path, "model.sig", "signed")])
    referrer = source.read_referrer(signed)
    data = msgspec.json.format(referrer.encode(), indent=1)
    with pytest.raises(StoreError):
        store.add_referrer(data)
    assert list(store.blobs.digests()) == []
    model_of(store, "tiny")
    with pytest.raises(StoreError, match="names 2 blobs that are not in the store"):
        store.add_referrer(data)
    for blob in store.blob_needs(referrer):
        with store.blobs.ingest(blob.digest) as partial:
            store.keep(store.blobs.copy_in(source.blobs.path(blob.digest), partial))
            partial.discard()
    added = store.add_referrer(data)
    assert added.digest == digest_bytes(data)
    assert store.referrers(model.digest, SIGNATURE) == [added]


def attached_by_another_tool(store: ModelStore, subject: Descriptor, annotations: Mapping[str, str]) -> Digest:
    """An entry as the oras command writes it into a layout: nothing of ours stands there."""
    config = Descriptor(media_type=SIGNATURE, digest=digest_bytes(b"{}"), size=2)
    notes = {"of": str(len(annotations))}
    data = Referrer(
        schema_version=2, media_type=MANIFEST_TYPE, config=config, layers=[], subject=subject, annotations=notes
    ).encode()
    digest = store.keep_manifest(data)
    path = store.root / "index.json"
    index = decode(path.read_bytes(), Index, what="index")
    entry = Descriptor(media_type=MANIFEST_TYPE, digest=digest, size=len(data), annotations=dict(annotations))
    path.write_bytes(
        msgspec.json.encode(msgspec.structs.replace(index, manifests=[*index.manifests, entry]), enc_hook=str)
    )
    return digest


def test_what_another_tool_attached_counts_too(store: ModelStore) -> None:
    model = model_of(store, "tiny")
    subject = Descriptor(media_type=MANIFEST_TYPE, digest=model.digest, size=model.manifest.config.size)
    digest = attached_by_another_tool(store, subject, {})
    assert [(found.digest, found.artifact_type) for found in store.referrers(model.digest)] == [(digest, SIGNATURE)]
    named = attached_by_another_tool(store, subject, {"org.opencontainers.image.ref.name": "its-own"})
    assert [found.digest for found in store.referrers(model.digest)] == [digest], "it has a name: it stands for itself"
    store.remove("tiny")
    store.collect()
    assert list(store.blobs.digests()) != []
    assert not store.blobs.has(digest)
    assert store.blobs.has(named)


def test_a_damaged_attachment_is_passed_over_and_blocks_collecting(store: ModelStore, tmp_path: Path) -> None:
    model = model_of(store, "tiny")
    signed = store.attach(model.digest, SIGNATURE, [document(tmp_path, "model.sig", "signed")])
    store.blobs.path(signed.digest).write_bytes(b"x" * signed.size)
    assert store.referrers(model.digest) == []
    assert store.collect().blocked_by == (f"what is attached to {model.digest}",)
    store.remove("tiny")
    assert store.collect().blocked_by == (), "without its subject nobody needs it"
    assert list(store.blobs.digests()) == []


def test_the_seed_brings_what_is_attached(store: ModelStore, tmp_path: Path) -> None:
    model = model_of(store, "tiny")
    signed = store.attach(model.digest, SIGNATURE, [document(tmp_path, "model.sig", "signed")])
    filled = ModelStore(tmp_path / "filled", seed=store.root)
    assert filled.referrers(model.digest) == [signed]
    assert filled.read_referrer(signed) == store.read_referrer(signed)
    assert filled.collect().num_blobs == 0


def test_names_inside_what_is_attached_are_checked(store: ModelStore, tmp_path: Path) -> None:
    model = model_of(store, "tiny")
    file = document(tmp_path, "model.sig", "signed")
    for files in ([], [PackageFile(file.path, "../x")], [file, file]):
        with pytest.raises(InvalidModelFile):
            store.attach(model.digest, SIGNATURE, files)
    with pytest.raises(StoreError):
        store.attach(digest_bytes(b"nobody"), SIGNATURE, [file])
    assert store.referrers(model.digest) == []


def test_a_model_with_a_subject_that_is_elsewhere_blocks_nothing(store: ModelStore) -> None:
    model = model_of(store, "tiny")
    elsewhere = Descriptor(media_type=MANIFEST_TYPE, digest=digest_bytes(b"elsewhere"), size=9)
    data = msgspec.structs.replace(model.manifest, subject=elsewhere).encode()
    store.add_manifest("tuned", data)
    store.remove("tiny")
    assert store.collect().blocked_by == ()
    assert [str(found.ref) for found in store.list()] == ["tuned:latest"]
