"""The model store on a real disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from typing_extensions import override

from edge.errors import (
    DiskFull,
    InvalidModelFile,
    InvalidReference,
    ModelNotFound,
    StoreError,
    UnsupportedFormat,
)
from edge.store.blobs import BlobStore, boot_id
from edge.store.details import ModelDetails
from edge.store.digest import digest_bytes, digest_file
from edge.store.files import FileOps
from edge.store.manifest import DOC_TYPE, WEIGHT_TYPE, ModelRef
from edge.store.models import ModelStore, PackageFile
from tests.edge.store_support import NoLinks, add_model, assert_sound, write_gguf


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store", clock=lambda: 1_700_000_000.25)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


def test_a_model_comes_back_as_it_was_added(store: ModelStore, gguf: Path) -> None:
    report = gguf.with_name("report.json")
    report.write_text('{"perplexity": 23.5}')
    details = ModelDetails(
        architecture="llama",
        quantization="F32",
        num_parameters=256,
        context_tokens=128,
        license="MIT",
        source="/somewhere",
    )
    added = store.add("tiny:f32", [PackageFile(gguf, "tiny.gguf"), PackageFile(report, "report.json")], details)
    found = ModelStore(store.root).get("tiny:f32")
    assert found == added
    assert store.list() == [added]
    assert str(found.ref) == "tiny:f32"
    assert (found.architecture, found.quantization, found.num_parameters) == ("llama", "F32", 256)
    assert (found.context_tokens, found.license, found.source) == (128, "MIT", "/somewhere")
    assert found.created == 1_700_000_000.25
    assert found.report == {"perplexity": 23.5}
    assert [(file.name, file.media_type) for file in found.files] == [
        ("tiny.gguf", WEIGHT_TYPE),
        ("report.json", DOC_TYPE),
    ]
    assert found.weights.read_bytes() == gguf.read_bytes()
    assert found.weights.parent == store.root / "blobs" / "sha256"
    assert found.size_bytes == gguf.stat().st_size + 20


def test_the_directory_is_an_oci_layout(store: ModelStore, gguf: Path) -> None:
    add_model(store, "tiny", gguf)
    assert json.loads((store.root / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((store.root / "index.json").read_text())
    [entry] = index["manifests"]
    assert entry["annotations"]["org.opencontainers.image.ref.name"] == "tiny:latest"
    assert entry["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    manifest = json.loads((store.root / "blobs/sha256" / entry["digest"][7:]).read_text())
    [layer] = manifest["layers"]
    assert layer["annotations"] == {
        "org.cncf.model.filepath": "model.gguf",
        "org.opencontainers.image.title": "model.gguf",
    }
    for path in (store.root / "blobs/sha256").iterdir():
        assert digest_file(path).hex == path.name


def test_skopeo_reads_and_copies_the_store(store: ModelStore, gguf: Path, tmp_path: Path) -> None:
    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is not installed")
    model = add_model(store, "tiny:q8", gguf)
    command = ["skopeo", "copy", "--quiet", f"oci:{store.root}:tiny:q8", f"oci:{tmp_path / 'copy'}:tiny:q8"]
    subprocess.run(command, check=True, timeout=60)
    copied = (tmp_path / "copy" / "blobs" / "sha256" / model.digest.hex).read_bytes()
    assert digest_bytes(copied) == model.digest
    assert (tmp_path / "copy" / "blobs" / "sha256" / model.weights.name).read_bytes() == gguf.read_bytes()


def test_equal_models_have_equal_digests(store: ModelStore, gguf: Path, tmp_path: Path) -> None:
    other = ModelStore(tmp_path / "other")
    assert add_model(store, "tiny", gguf).digest == add_model(other, "tiny", gguf).digest


def test_a_moved_file_is_gone_and_a_copied_one_stays(store: ModelStore, gguf: Path) -> None:
    add_model(store, "a", gguf)
    assert gguf.exists()
    inode = gguf.stat().st_ino
    model = add_model(store, "a", gguf, move=True)
    assert not gguf.exists()
    assert model.weights.stat().st_ino == inode
    assert list((store.root / "ingest").iterdir()) == []


def test_a_file_of_another_disk_is_moved_only_when_it_is_stored(store: ModelStore) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == store.root.parent.stat().st_dev:
        pytest.skip("there is no second file system")
    with TemporaryDirectory(dir=shared) as folder:
        path = write_gguf(Path(folder) / "a.gguf")
        moved = PackageFile(path, "a.gguf", move=True)
        with pytest.raises(StoreError):
            store.add("a", [moved, PackageFile(path.with_name("missing"), "b.gguf")], ModelDetails())
        assert path.exists()
        store.add("a", [moved], ModelDetails())
        assert not path.exists()
    assert_sound(store.root)


def test_a_name_is_given_anew(store: ModelStore, gguf: Path, tmp_path: Path) -> None:
    first = add_model(store, "tiny", gguf)
    second = add_model(store, "tiny", write_gguf(tmp_path / "b.gguf", fill=b"\x02"))
    assert [model.digest for model in store.list()] == [second.digest]
    assert first.weights.exists(), "removed only by collect"
    assert store.collect().num_blobs == 3
    assert not first.weights.exists()
    assert_sound(store.root)


def test_shared_files_stay_until_the_last_model_goes(store: ModelStore, gguf: Path) -> None:
    model = add_model(store, "a", gguf)
    add_model(store, "b", gguf)
    assert store.remove("a") == ModelRef("a")
    store.collect()
    assert [str(found.ref) for found in assert_sound(store.root)] == ["b:latest"]
    store.remove("b")
    assert store.collect().freed_bytes > model.size_bytes
    assert list(store.blobs.digests()) == []


def test_a_name_without_a_tag_finds_the_only_one(store: ModelStore, gguf: Path) -> None:
    add_model(store, "tiny:q4", gguf)
    assert str(store.get("tiny").ref) == "tiny:q4"
    add_model(store, "tiny:q8", gguf)
    with pytest.raises(ModelNotFound) as caught:
        store.get("tiny")
    assert caught.value.known == ("tiny:q4", "tiny:q8")
    assert str(caught.value) == "The name 'tiny' is not enough; its tags there: q4, q8. Name one, as tiny:q4."
    with pytest.raises(ModelNotFound, match="'tiny:q5' is not in the store; its tags there: q4, q8"):
        store.get("tiny:q5")
    with pytest.raises(ModelNotFound):
        store.remove("other")
    with pytest.raises(InvalidReference):
        store.get("Tiny!")


def test_an_absent_store_is_empty_and_stays_absent(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "absent", seed=tmp_path / "no-seed")
    assert store.list() == []
    assert not store.root.exists()


def test_names_of_files_are_checked(store: ModelStore, gguf: Path) -> None:
    for names in (["../a"], ["a", "a"], []):
        with pytest.raises(InvalidModelFile):
            store.add("a", [PackageFile(gguf, name) for name in names], ModelDetails())
    with pytest.raises(StoreError, match=r"absent\.gguf"):
        store.add("a", [PackageFile(gguf.with_name("absent.gguf"), "a.gguf")], ModelDetails())
    assert store.list() == []


def test_a_model_with_two_weight_files_is_not_opened(store: ModelStore, gguf: Path) -> None:
    model = store.add("a", [PackageFile(gguf, "a.gguf"), PackageFile(gguf, "b.gguf")], ModelDetails())
    with pytest.raises(UnsupportedFormat):
        _ = model.weights


def test_damage_is_found_and_named(store: ModelStore, gguf: Path) -> None:
    model = add_model(store, "tiny", gguf)
    data = bytearray(model.weights.read_bytes())
    data[-1] ^= 1
    model.weights.write_bytes(data)
    bad = [check for check in store.verify("tiny") if not check.is_good]
    assert [(check.name, check.path, check.expected) for check in bad] == [
        ("model.gguf", model.weights, model.files[0].digest)
    ]
    assert bad[0].actual == digest_bytes(bytes(data))
    model.weights.unlink()
    assert [check.actual for check in store.verify("tiny") if not check.is_good] == [None]
    assert store.list() == []
    assert [str(found.ref) for found in store.damaged()] == ["tiny:latest"]
    with pytest.raises(StoreError):
        store.get("tiny")
    assert add_model(store, "tiny", gguf).digest == model.digest, "adding it again mends it"
    assert_sound(store.root)


def test_a_damaged_manifest_blocks_collecting_and_can_be_removed(store: ModelStore, gguf: Path) -> None:
    add_model(store, "good", gguf)
    model = add_model(store, "bad", gguf)
    store.blobs.path(model.digest).write_bytes(b"{}")
    assert [str(found.ref) for found in store.damaged()] == ["bad:latest"]
    assert not store.verify("bad")[0].is_good
    assert store.collect().blocked_by == ("bad:latest",)
    store.remove("bad")
    assert store.collect().blocked_by == ()
    assert [str(found.ref) for found in assert_sound(store.root)] == ["good:latest"]


def test_entries_of_other_tools_are_left_alone(store: ModelStore, gguf: Path) -> None:
    add_model(store, "tiny", gguf)
    index = json.loads((store.root / "index.json").read_text())
    layer = store.blobs.put(b"an image's layer")
    image = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "x", "digest": layer, "size": 16},
            "layers": [],
        }
    ).encode()
    foreign = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": store.blobs.put(image),
        "size": len(image),
        "platform": {"architecture": "amd64", "os": "linux"},
    }
    index["manifests"].append(foreign)
    (store.root / "index.json").write_text(json.dumps(index))
    store.remove("tiny")
    store.collect()
    assert json.loads((store.root / "index.json").read_text())["manifests"] == [foreign]
    assert store.blobs.has(layer)


@pytest.mark.parametrize("text", ["", "{", '{"schemaVersion":3,"manifests":[]}', '{"schemaVersion":2}'])
def test_a_broken_index_is_an_error_not_an_empty_store(store: ModelStore, gguf: Path, text: str) -> None:
    add_model(store, "tiny", gguf)
    (store.root / "index.json").write_text(text)
    with pytest.raises(StoreError, match=r"index\.json is damaged") as caught:
        store.list()
    assert f"mv {store.root}/index.json" in str(caught.value.hint)
    with pytest.raises(StoreError):
        store.collect()
    assert len(list(store.blobs.digests())) == 3


class FullDisk(FileOps):
    """A disk that takes no more."""

    @override
    def write(self, file: object, data: bytes | memoryview) -> None:
        raise DiskFull(required_bytes=len(data), available_bytes=0)


def test_a_full_disk_is_a_clear_error(tmp_path: Path, gguf: Path) -> None:
    store = ModelStore(tmp_path / "store", files=FullDisk())
    with pytest.raises(DiskFull):
        add_model(store, "tiny", gguf)
    assert_sound(store.root)


def test_a_store_that_cannot_be_made_is_a_clear_error(tmp_path: Path, gguf: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Creating"):
        add_model(ModelStore(tmp_path / "file" / "store"), "tiny", gguf)


def test_an_empty_store_is_filled_from_the_seed_by_links(tmp_path: Path, gguf: Path) -> None:
    seed = ModelStore(tmp_path / "seed")
    model = add_model(seed, "tiny", gguf)
    store = ModelStore(tmp_path / "home" / "store", seed=seed.root)
    found = store.get("tiny")
    assert found.digest == model.digest
    assert found.weights.samefile(model.weights)
    store.remove("tiny")
    store.collect()
    assert model.weights.exists()
    assert ModelStore(store.root, seed=seed.root).list() == [], "what was removed does not come back"


def test_where_links_are_not_possible_the_seed_is_copied(tmp_path: Path, gguf: Path) -> None:
    seed = ModelStore(tmp_path / "seed")
    model = add_model(seed, "tiny", gguf)
    store = ModelStore(tmp_path / "store", seed=seed.root, files=NoLinks())
    assert not store.get("tiny").weights.samefile(model.weights)
    assert list(store.blobs.ingest_dir.iterdir()) == []
    assert_sound(store.root)


def test_a_damaged_seed_is_not_taken(tmp_path: Path, gguf: Path, caplog: pytest.LogCaptureFixture) -> None:
    seed = ModelStore(tmp_path / "seed")
    add_model(seed, "good", write_gguf(tmp_path / "good.gguf", fill=b"\x07"))
    model = add_model(seed, "bad", gguf)
    model.weights.write_bytes(b"\0" * model.weights.stat().st_size)
    store = ModelStore(tmp_path / "store", seed=seed.root)
    assert [str(found.ref) for found in store.list()] == ["good:latest"]
    assert "bad:latest is not taken from the seed" in caplog.text
    store.collect()
    assert_sound(store.root)


_READ_ONLY = """
mount --make-rprivate /; mount --bind "$EDGE_HOME" "$EDGE_HOME"; mount -o remount,bind,ro /
if touch "$EDGE_HOME/../elsewhere" 2>/dev/null; then exit 9; fi
edge() { "$PYTHON" -m edge.cli "$@"; }
edge pull "$GGUF" --name tiny; edge pin tiny; edge verify tiny; edge rm tiny --yes; edge list --json
"""


def test_a_read_only_root_with_one_writable_directory_is_enough(tmp_path: Path, gguf: Path) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a mount namespace")
    (home := tmp_path / "home").mkdir()
    environ = {**os.environ, "EDGE_HOME": str(home), "PYTHON": sys.executable, "GGUF": str(gguf), "EDGE_SEED": "/none"}
    done = subprocess.run(["unshare", "-m", "sh", "-ec", _READ_ONLY], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "good  tiny:latest" in done.stdout
    assert json.loads(done.stdout[done.stdout.index("{") :])["models"] == []
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["home"]


def test_a_partial_goes_on_where_it_stopped(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    blobs.create()
    with blobs.ingest("x") as partial:
        partial.remember(source="s", validator='"v"', total_bytes=6)
        partial.write(b"abc")
    with blobs.ingest("x") as partial:
        assert (partial.size_bytes, partial.note.validator, partial.note.total_bytes) == (3, '"v"', 6)
        partial.write(b"def")
        staged = partial.complete()
        assert staged.digest == digest_bytes(b"abcdef")
        blobs.publish([staged])
    assert blobs.path(staged.digest).read_bytes() == b"abcdef"
    with blobs.ingest("x") as partial:
        assert partial.published == staged.digest
        partial.discard()
    assert list(blobs.ingest_dir.iterdir()) == []


def test_after_a_reboot_only_synced_bytes_are_believed(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    with blobs.ingest("x") as partial:
        partial.remember(source="s", validator='"v"', total_bytes=6)
        partial.write(b"abc")
    note = next(tmp_path.glob("ingest/*.json"))
    note.write_text(note.read_text().replace(boot_id(), "another boot"))
    with blobs.ingest("x") as partial:
        assert partial.size_bytes == 0


def test_a_partial_has_one_holder(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)

    polls = iter([False, False, True])

    def give_up() -> None:
        if next(polls):
            raise InterruptedError

    with blobs.ingest("x"), pytest.raises(InterruptedError):
        blobs.ingest("x", before_poll=give_up)


def test_two_that_pull_the_same_file_do_not_take_it_from_each_other(tmp_path: Path, gguf: Path) -> None:
    """The second begins its partial when the first has published its own, and is not done with what lies beside it."""
    store = ModelStore(tmp_path / "store")
    store.collect()
    with store.blobs.ingest("same") as first:
        staged = store.blobs.copy_in(gguf, first)
        store.keep(staged)
        with pytest.raises(InterruptedError), store.blobs.ingest("same", before_poll=_give_up):
            pass
        first.discard()
    with store.blobs.ingest("same") as second:
        assert second.size_bytes == 0


def _give_up() -> None:
    raise InterruptedError


def test_collect_removes_what_nobody_fetches(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    store.collect()
    with store.blobs.ingest("held") as held, store.blobs.ingest("left") as left:
        held.write(b"abc")
        left.write(b"abcdef")
        left.folder.mkdir()
        (left.folder / "x.whl").write_bytes(b"1234")
        left.close()
        assert store.collect().freed_bytes == 0, "it can still be resumed"
        assert store.collect(partial_age_s=0).freed_bytes == 10
        assert {path.stem for path in store.blobs.ingest_dir.iterdir()} == {held.path.stem}
