"""Deltas: what is rebuilt has the digest that the manifest names, or nothing is."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import Cancelled, DigestMismatch, InvalidModelFile, UnsupportedFormat
from edge.store.blobs import BlobStore
from edge.store.delta import (
    DELTA_BASE,
    DELTA_BYTES,
    DELTA_TARGET,
    DELTA_TYPE,
    attach_delta,
    delta_for,
    read_header,
    rebuilt,
    write_delta,
)
from edge.store.digest import Digest, digest_bytes
from edge.store.manifest import WEIGHT_TYPE, Descriptor
from edge.store.models import ModelStore
from edge.store.stored import StoredFile, StoredModel
from edge.store.transfer import Control
from tests.edge.edge_command import edge_at
from tests.edge.gguf_files import METADATA, Tensor, gguf_bytes, strings
from tests.edge.store_support import NoSync, add_model

FREE = Control(lambda _: None, lambda: False)
LAYERS = tuple(Tensor(f"blk.{number}.weight", (64, 40), 2, 40 * 36) for number in range(6))


def perturbed(data: bytes, *, start: int, seed: int = 1) -> bytes:
    """The same file with one byte of fifty changed from `start` on."""
    rng, changed = random.Random(seed), bytearray(data)
    for _ in range((len(data) - start) // 50):
        changed[rng.randrange(start, len(data))] ^= rng.randrange(1, 16)
    return bytes(changed)


class Bench:
    """A store with blobs, and deltas between them."""

    def __init__(self, root: Path) -> None:
        self.blobs = BlobStore(root, files=NoSync())
        self.blobs.create()
        self.root = root

    def file(self, data: bytes, name: str = "m.gguf") -> StoredFile:
        digest = self.blobs.put(data)
        return StoredFile(name, self.blobs.path(digest), digest, len(data), WEIGHT_TYPE)

    def delta(self, base: StoredFile, new: StoredFile) -> bytes:
        with self.blobs.ingest("delta") as partial:
            data = write_delta(base, new, partial, FREE).path.read_bytes()
            partial.discard()
        return data

    def rebuild(self, delta: bytes, layer: Descriptor) -> bytes:
        """What comes out; the new file's blob is taken away before."""
        path = self.root / "received.delta"
        path.write_bytes(delta)
        self.blobs.remove(layer.digest)
        with rebuilt(path, self.blobs, layer, FREE) as staged:
            assert staged.digest == layer.digest
            return staged.path.read_bytes()

    def leftovers(self) -> Sequence[Path]:
        return list(self.blobs.ingest_dir.iterdir())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "store")


def layer_of(file: StoredFile) -> Descriptor:
    return Descriptor(media_type=WEIGHT_TYPE, digest=file.digest, size=file.size_bytes)


def test_a_changed_model_is_rebuilt_from_a_small_delta(bench: Bench) -> None:
    old = gguf_bytes(tensors=[Tensor(f"blk.{n}.weight", (64, 400), 2, 400 * 36) for n in range(20)])
    base, new = bench.file(old), bench.file(data := perturbed(old, start=4096))
    delta = bench.delta(base, new)
    assert len(delta) < len(data) / 8
    assert bench.rebuild(delta, layer_of(new)) == data
    assert bench.leftovers() == []


def test_tensors_are_matched_by_name_where_the_header_has_grown(bench: Bench) -> None:
    rng = random.Random(2)
    merges = strings([rng.randbytes(6).hex() for _ in range(4000)])
    metadata = {**METADATA, "tokenizer.ggml.merges": merges}
    old = gguf_bytes(metadata, LAYERS)
    head = len(old) - sum(tensor.size_bytes for tensor in LAYERS)
    weights = rng.randbytes(len(old) - head)
    base = bench.file(old[:head] + weights)
    longer = gguf_bytes({"general.description": "x" * 999, **metadata, "general.version": "2"}, LAYERS)
    new = bench.file(data := longer[: len(longer) - len(weights)] + weights)
    delta = bench.delta(base, new)
    assert len(delta) < 1500
    assert bench.rebuild(delta, layer_of(new)) == data


_tensors = st.lists(
    st.tuples(st.sampled_from("abcde"), st.integers(1, 3), st.sampled_from([(0, 256), (2, 36), (8, 68)])),
    unique_by=lambda tensor: tensor[0],
    max_size=5,
)


def _gguf(tensors: Sequence[tuple[str, int, tuple[int, int]]], name: str, seed: int) -> bytes:
    layout = [Tensor(key, (64, rows), code, rows * row_bytes) for key, rows, (code, row_bytes) in tensors]
    empty = gguf_bytes({**METADATA, "general.name": name}, layout, fill=b"\x00")
    size = len(empty) - len(gguf_bytes({**METADATA, "general.name": name}, layout)) or sum(t.size_bytes for t in layout)
    return empty[: len(empty) - size] + random.Random(seed).randbytes(size)


@given(old=_tensors, new=_tensors, name=st.text(max_size=40), is_same=st.booleans())
def test_whatever_two_files_have_in_common_the_new_one_comes_out(
    tmp_path_factory: pytest.TempPathFactory,
    old: Sequence[tuple[str, int, tuple[int, int]]],
    new: Sequence[tuple[str, int, tuple[int, int]]],
    name: str,
    is_same: bool,
) -> None:
    bench = Bench(tmp_path_factory.mktemp("store"))
    base, target = bench.file(_gguf(old, "Tiny", 1)), bench.file(data := _gguf(new, name, 1 if is_same else 2))
    delta = bench.delta(base, target)
    if base.digest != target.digest:
        assert bench.rebuild(delta, layer_of(target)) == data


def test_no_damage_makes_other_bytes(bench: Bench) -> None:
    old = gguf_bytes(tensors=LAYERS)
    base, new = bench.file(old), bench.file(data := perturbed(old, start=1024))
    delta, rng, refused = bench.delta(base, new), random.Random(5), 0
    for _ in range(200):
        broken = bytearray(delta)
        for _ in range(rng.choice([1, 1, 3])):
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        cut = broken[: rng.randrange(len(broken))] if rng.random() < 0.2 else broken
        try:
            assert bench.rebuild(bytes(cut), layer_of(new)) == data
        except (InvalidModelFile, DigestMismatch):
            refused += 1
        assert bench.leftovers() == []
    assert refused > 150


def test_a_damaged_base_is_no_base(bench: Bench) -> None:
    old = gguf_bytes(tensors=LAYERS)
    base, new = bench.file(old), bench.file(perturbed(old, start=1024))
    delta = bench.delta(base, new)
    base.path.write_bytes(old[:-1] + b"\x7f")
    with pytest.raises(DigestMismatch, match="makes other bytes"):
        bench.rebuild(delta, layer_of(new))
    base.path.write_bytes(old[:-1])
    with pytest.raises(InvalidModelFile, match="starts from"):
        bench.rebuild(delta, layer_of(new))


def test_a_delta_for_another_file_is_refused(bench: Bench) -> None:
    old = gguf_bytes(tensors=LAYERS)
    base, new, other = (bench.file(data) for data in (old, perturbed(old, start=999), perturbed(old, start=888)))
    with pytest.raises(InvalidModelFile, match="makes another file"):
        bench.rebuild(bench.delta(base, new), layer_of(other))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (b'"targetBytes":', "not as long"),
        (b'"baseBytes":', "past the end"),
        (b'"version":', "Invalid"),
    ],
)
def test_a_header_that_lies_is_refused(change: bytes, reason: str, bench: Bench) -> None:
    old = gguf_bytes(tensors=LAYERS)
    base, new = bench.file(old), bench.file(perturbed(old, start=1024))
    delta = bench.delta(base, new)
    at = delta.index(change) + len(change)
    with pytest.raises(InvalidModelFile, match=reason):
        read_header(BytesIO(delta[:at] + b"2" + delta[at + 1 :]), what="delta")


def test_a_file_without_known_tensors_is_shipped_whole(bench: Bench) -> None:
    with pytest.raises(UnsupportedFormat, match="neither GGUF nor safetensors"):
        bench.delta(bench.file(b"a" * 99, "m.onnx"), bench.file(b"b" * 99, "m.onnx"))


def test_a_cancelled_rebuild_leaves_nothing(bench: Bench) -> None:
    old = gguf_bytes(tensors=LAYERS)
    base, new = bench.file(old), bench.file(perturbed(old, start=1024))
    (bench.root / "x.delta").write_bytes(bench.delta(base, new))
    cancelled = Control(lambda _: None, lambda: True)
    with pytest.raises(Cancelled), rebuilt(bench.root / "x.delta", bench.blobs, layer_of(new), cancelled):
        pass
    assert bench.leftovers() == []


def referrer(base: str, target: str, size: str = "5", kind: str = DELTA_TYPE) -> Descriptor:
    notes = {DELTA_BASE: base, DELTA_TARGET: target, DELTA_BYTES: size}
    digest = digest_bytes(f"{base}{target}{size}{kind}".encode())
    return Descriptor(media_type="m", digest=digest, size=1, artifact_type=kind, annotations=notes)


def test_the_smallest_delta_whose_base_is_there_is_taken(bench: Bench) -> None:
    base, new = bench.file(gguf_bytes(tensors=LAYERS)), bench.file(gguf_bytes(tensors=LAYERS, fill=b"\x02"))
    layer, absent = layer_of(new), Digest(f"sha256:{'0' * 64}")
    good = referrer(base.digest, layer.digest, "50")
    others = [
        referrer(base.digest, layer.digest, "60"),
        referrer(absent, layer.digest),
        referrer(base.digest, absent),
        referrer("nonsense", layer.digest),
        referrer(base.digest, layer.digest, "-1"),
        referrer(base.digest, layer.digest, "3", kind="application/x"),
        Descriptor(media_type="m", digest=absent, size=1, artifact_type=DELTA_TYPE),
    ]
    assert delta_for(layer, [*others, good], bench.blobs) == good
    assert delta_for(layer, others[1:], bench.blobs) is None
    assert delta_for(layer, [referrer(base.digest, layer.digest, str(layer.size))], bench.blobs) is None


def stored(store: ModelStore, name: str, data: bytes) -> StoredModel:
    path = store.root.parent / f"{name}.gguf"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return add_model(store, name, path)


def test_a_delta_is_attached_to_the_new_model_and_goes_with_it(tmp_path: Path) -> None:
    store, old = ModelStore(tmp_path / "store", files=NoSync()), gguf_bytes(tensors=LAYERS)
    base, new = stored(store, "v1", old), stored(store, "v2", perturbed(old, start=1024))
    made = attach_delta(store, base, new, FREE)
    (attached,) = store.referrers(new.digest, DELTA_TYPE)
    referrer = store.read_referrer(attached)
    assert (referrer.layers[0].media_type, referrer.layers[0].size) == (DELTA_TYPE, made.size_bytes)
    notes = {DELTA_BASE: base.files[0].digest, DELTA_TARGET: new.files[0].digest, DELTA_BYTES: str(made.size_bytes)}
    assert referrer.annotations == notes
    assert store.get("v2").digest == new.digest
    delta = store.blobs.path(referrer.layers[0].digest)
    with rebuilt(delta, store.blobs, new.manifest.layers[0], FREE) as staged:
        assert staged.path.read_bytes() == new.weights.read_bytes()
    assert list(store.blobs.ingest_dir.iterdir()) == []
    store.remove("v2")
    store.collect()
    assert not delta.exists()


def test_models_with_little_in_common_get_no_delta(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store", files=NoSync())
    base, other = (stored(store, f"v{n}", _gguf([("a", 3, (0, 256))], "Tiny", n)) for n in (1, 2))
    with pytest.raises(UnsupportedFormat, match="% of the whole"):
        attach_delta(store, base, other, FREE)
    with pytest.raises(UnsupportedFormat, match="the same weights"):
        attach_delta(store, base, base, FREE)
    assert store.referrers(other.digest) == []
    assert list(store.blobs.ingest_dir.iterdir()) == []


def test_the_command_says_how_much_is_left_to_fetch(tmp_path: Path) -> None:
    edge = edge_at(tmp_path / "home")
    store, old = ModelStore(edge.store), gguf_bytes(tensors=LAYERS)
    stored(store, "v1", old)
    stored(store, "v2", perturbed(old, start=1024))
    done = edge.run("delta", "v1", "v2", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["target"] == store.get("v2").files[0].digest
    assert 0 < said["bytes"] < said["whole"] == len(old)
    assert "v1:latest -> v2:latest" in edge.run("delta", "v1", "v2").stdout
    assert len(store.referrers(store.get("v2").digest)) == 1
    assert "same weights" in edge.run("delta", "v1", "v1").stderr
