"""Images as tokens of a prompt. Pure: ids and numbers.

An image is one or more tiles, each of which an encoder turns into rows, one for each of its tokens. In a sequence stand
placeholders: negative ids made from the image's content. So scheduler and prefix cache need not know of images: equal
images are equal tokens, different ones are not, and a saved state says what it was computed from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from runtime.batch import Batch, Chunk

if TYPE_CHECKING:
    from runtime.request import TokenId


@dataclass(slots=True, eq=False, weakref_slot=True)
class Tile:
    """A part of an image that is encoded at once.

    Attributes:
        ids: Its placeholders.
        source: What the backend encodes it from; let go with the encoding.
        source_bytes: What that takes in memory, about.
        rows: What the encoder made of it, shape ``(len(ids), width)``; None until then. Kept as long as the request:
            its sequence may have to be computed again.
    """

    ids: list[TokenId]
    source: object
    source_bytes: int = 0
    rows: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class PlacedTile:
    """A tile and the position of its first token in a prompt."""

    start: int
    tile: Tile

    @property
    def end(self) -> int:
        return self.start + len(self.tile.ids)


def tile_ids(content: bytes, index: int, count: int) -> list[TokenId]:
    """Placeholders of one tile.

    Args:
        content: Digest of all that decides what is encoded: the image, and what encodes it.
        index: Which of the image's tiles.

    Of 62 bits each, below -1: a prefix is shared by the ids alone, so no two may be equal by chance.
    """
    stream = hashlib.shake_256(content + index.to_bytes(4, "little")).digest(8 * count)
    return (-2 - (np.frombuffer(stream, "<u8") >> np.uint64(2)).astype(np.int64)).tolist()


def shown_ids(tokens: list[TokenId]) -> tuple[TokenId, ...]:
    """Token ids for people: -1 for each token of an image."""
    return tuple(max(t, -1) for t in tokens)


def next_unencoded(batch: Batch) -> tuple[Chunk, Tile] | None:
    """Of the chunks that need a tile which is not encoded yet, that of the sequence which came first, and the tile."""
    found = ((chunk, tile) for chunk in batch.chunks if (tile := _first_unencoded(chunk)) is not None)
    return min(found, key=lambda f: f[0].sequence.arrival, default=None)


def _tiles(chunk: Chunk) -> Iterator[PlacedTile]:
    end = chunk.start + len(chunk.tokens)
    return (t for t in chunk.sequence.request.tiles if t.start < end and t.end > chunk.start)


def _first_unencoded(chunk: Chunk) -> Tile | None:
    return next((t.tile for t in _tiles(chunk) if t.tile.rows is None), None)


def cut(batch: Batch) -> Batch:
    """The batch without what has to wait for an encoder: its chunks end before the first tile that is not encoded."""
    chunks = [_cut_chunk(c) if c.sequence.request.tiles else c for c in batch.chunks]
    return replace(batch, chunks=tuple(c for c in chunks if c.tokens))


def _cut_chunk(chunk: Chunk) -> Chunk:
    start = next((t.start for t in _tiles(chunk) if t.tile.rows is None), None)
    if start is None:
        return chunk
    return replace(chunk, tokens=chunk.tokens[: max(0, start - chunk.start)], num_logits=0)


def passes(chunks: tuple[Chunk, ...]) -> list[tuple[Chunk, ...]]:
    """The chunks as decodes that hold tokens or rows of tiles, and never both, in an order in which each sequence's
    parts follow each other. What ends the chunks comes together, last."""
    runs = [_runs(c) for c in chunks]
    layers: list[tuple[Chunk, ...]] = []
    for depth in range(max(map(len, runs), default=0), 0, -1):
        layer = [r[-depth] for r in runs if len(r) >= depth]
        for is_image in (True, False):
            part = tuple(c for c in layer if (c.tokens[0] < 0) == is_image)
            if part:
                layers.append(part)
    return layers


def _runs(chunk: Chunk) -> list[Chunk]:
    """The parts of a chunk that are all text or all image."""
    end = chunk.start + len(chunk.tokens)
    borders = {p for t in _tiles(chunk) for p in (t.start, t.end) if chunk.start < p < end}
    marks = [chunk.start, *sorted(borders), end]
    parts = [
        replace(chunk, start=a, tokens=chunk.tokens[a - chunk.start : b - chunk.start], num_logits=0)
        for a, b in pairwise(marks)
    ]
    parts[-1] = replace(parts[-1], num_logits=chunk.num_logits)
    return parts


def rows_of(chunk: Chunk) -> NDArray[np.float32]:
    """The rows of a part that is all image; its tiles are encoded."""
    parts: list[NDArray[np.float32]] = []
    end = chunk.start + len(chunk.tokens)
    for placed in _tiles(chunk):
        assert placed.tile.rows is not None, "a step holds what is encoded"
        parts.append(placed.tile.rows[max(0, chunk.start - placed.start) : end - placed.start])
    return np.concatenate(parts)
