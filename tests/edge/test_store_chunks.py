"""Digests of a blob's pieces: made while the whole is hashed, believed only when sealed."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import DigestMismatch, StoreError
from edge.store.blobs import BlobStore
from edge.store.chunks import CHUNK_BYTES, ChunkedHash, ChunkList
from edge.store.digest import Digest, digest_bytes
from edge.store.models import ModelStore
from tests.edge.store_support import NoLinks, add_model, write_gguf

DATA = os.urandom(1 << 16) * (2 * CHUNK_BYTES >> 16) + b"the last piece is short"
PIECES = [DATA[start : start + CHUNK_BYTES] for start in range(0, len(DATA), CHUNK_BYTES)]


def expected(data: bytes) -> ChunkList:
    """The definition, written plainly."""
    pieces = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
    return ChunkList(len(data), tuple(map(digest_bytes, pieces)))


@settings(max_examples=20)
@given(st.lists(st.integers(0, 2 * CHUNK_BYTES), max_size=5))
def test_it_does_not_matter_how_the_bytes_arrive(cuts: list[int]) -> None:
    hashed = ChunkedHash()
    bounds = [0, *sorted(cuts), len(DATA)]
    for start, stop in pairwise(bounds):
        hashed.update(memoryview(DATA)[start:stop])
    assert (hashed.digest(), hashed.chunks()) == (digest_bytes(DATA), expected(DATA))


@pytest.mark.parametrize("size_bytes", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES])
def test_pieces_cover_the_blob_without_gaps(size_bytes: int) -> None:
    hashed = ChunkedHash()
    hashed.update(DATA[:size_bytes])
    chunks = hashed.chunks()
    assert chunks == expected(DATA[:size_bytes])
    spans = [chunks.span(number) for number in range(len(chunks.digests))]
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans)][: len(spans)]
    assert not spans or spans[-1][1] == size_bytes


def stored(blobs: BlobStore, data: bytes = DATA) -> Digest:
    blobs.create()
    with blobs.ingest("x") as partial:
        partial.write(data)
        staged = partial.complete()
        blobs.publish([staged])
        partial.discard()
    return staged.digest


def test_fetched_bytes_bring_their_pieces(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    assert blobs.chunks(stored(blobs)) == expected(DATA)


def test_a_resumed_fetch_knows_the_pieces_of_all_bytes(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    with blobs.ingest("x") as partial:
        partial.remember(source="s", validator="v", total_bytes=len(DATA))
        partial.write(DATA[:12_345])
    with blobs.ingest("x") as partial:
        partial.write(DATA[partial.size_bytes :])
        assert blobs.chunks(partial.complete().digest) == expected(DATA)


def test_one_piece_needs_no_list(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    assert blobs.chunks(stored(blobs, b"small")) is None
    assert not (tmp_path / "chunks").exists()


@pytest.mark.parametrize("links", [True, False])
def test_models_of_every_origin_bring_their_pieces(tmp_path: Path, links: bool) -> None:
    path = write_gguf(tmp_path / "large.gguf", num_rows=20_000)
    seed = ModelStore(tmp_path / "seed")
    digest = add_model(seed, "tiny", path).files[0].digest
    pieces = expected(path.read_bytes())
    assert len(pieces.digests) == 2
    assert seed.blobs.chunks(digest) == pieces, "copied"
    moved = ModelStore(tmp_path / "moved")
    moved.collect()
    add_model(moved, "tiny", path.rename(moved.root / "large.gguf"), move=True)
    assert moved.blobs.chunks(digest) == pieces, "moved"
    seeded = ModelStore(tmp_path / "seeded", seed=seed.root, files=None if links else NoLinks())
    assert [str(model.ref) for model in seeded.list()] == ["tiny:latest"]
    assert seeded.blobs.chunks(digest) == pieces, "seeded"


def damaged(text: bytes) -> list[bytes]:
    """The list as a power cut may leave it, of another blob, with another seal, of a version to come."""
    fields = msgspec.json.decode(text, type=dict[str, object])
    other = str(digest_bytes(b"other"))
    changes: dict[str, object] = {"digests": [other] * 3, "seal": other, "blob": other, "version": 2, "chunk_bytes": 1}
    changed = [msgspec.json.encode({**fields, name: value}) for name, value in changes.items()]
    return [b"", text[:-20], bytes(len(text)), b"[]", *changed]


def test_a_damaged_list_is_none_and_is_made_again(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    digest = stored(blobs)
    path = tmp_path / "chunks" / digest.hex
    for text in damaged(path.read_bytes()):
        path.write_bytes(text)
        assert blobs.chunks(digest) is None
        assert blobs.make_chunks(digest) == expected(DATA)
        assert blobs.chunks(digest) == expected(DATA)


def test_of_damaged_bytes_no_list_is_made(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    digest = stored(blobs)
    (tmp_path / "chunks" / digest.hex).unlink()
    with blobs.path(digest).open("r+b") as file:
        file.seek(CHUNK_BYTES)
        file.write(b"\0\0\0\0")
    with pytest.raises(DigestMismatch, match="The blob"):
        blobs.make_chunks(digest)
    assert blobs.chunks(digest) is None
    with pytest.raises(StoreError, match="No such file"):
        blobs.make_chunks(digest_bytes(b"not there"))


def test_lists_go_with_their_blobs(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    digest = add_model(store, "tiny", write_gguf(tmp_path / "large.gguf", num_rows=20_000)).files[0].digest
    store.collect()
    assert store.blobs.chunks(digest) is not None
    store.remove("tiny")
    store.collect()
    assert list((store.root / "chunks").iterdir()) == []
