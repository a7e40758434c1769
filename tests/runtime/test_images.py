"""Laws of images in sequences on a scripted backend: answers are those of requests alone; a step waits for one tile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import override

from edge.errors import BackendError, ContextOverflow, InvalidImage, InvalidRequest, QueueFull
from runtime.backends.base import Capabilities, Vision
from runtime.batch import Batch, Chunk
from runtime.engine import Engine
from runtime.image_prompts import ImagePlacer
from runtime.images import PlacedTile, Tile, cut, next_unencoded, passes, rows_of, shown_ids, tile_ids
from runtime.ngram import Lookup
from runtime.penalties import Penalties
from runtime.request import Request, RequestId, SamplingParams, TokenId
from runtime.sequence import Sequence
from runtime.states import StateLimits
from tests.support import CollectingSink, ScriptedBackend
from tests.vision import picture

GREEDY = SamplingParams(temperature=0)


class ScriptedVision(Vision):
    """An image is as many tiles as its first byte says, of as many tokens as its second."""

    def __init__(self) -> None:
        self.encoded: list[Tile] = []
        self.fails = False

    @override
    def read(self, data: bytes) -> list[list[TokenId] | Tile]:
        tiles: list[list[TokenId] | Tile] = []
        for i in range(data[0]):
            tiles += [[1, 2], Tile(tile_ids(data, i, data[1]), data, 100)]
        return [*tiles, [3]]

    @override
    def encode(self, tile: Tile) -> None:
        assert tile.rows is None, "a tile is encoded once"
        if self.fails:
            raise BackendError("The image could not be encoded: it was told to.")
        tile.rows = np.arange(len(tile.ids), dtype=np.float32)[:, None]
        tile.source = None
        self.encoded.append(tile)


class SeeingBackend(ScriptedBackend):
    """Notes how many tiles were encoded before each step."""

    def __init__(self, capabilities: Capabilities) -> None:
        super().__init__(capabilities)
        self.seeing = ScriptedVision()
        self.encoded_before: list[int] = []

    @property
    @override
    def vision(self) -> Vision:
        return self.seeing

    @override
    def decode(self, batch: Batch) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        self.encoded_before.append(len(self.seeing.encoded))
        return super().decode(batch)


def place(
    vision: Vision, texts: list[list[TokenId]], images: list[bytes]
) -> tuple[list[TokenId], tuple[PlacedTile, ...]]:
    """A prompt of texts with images between, as a request has it."""
    tokens, tiles = list(texts[0]), list[PlacedTile]()
    for data, text in zip(images, texts[1:], strict=True):
        for part in vision.read(data):
            if isinstance(part, Tile):
                tiles.append(PlacedTile(len(tokens), part))
                tokens += part.ids
            else:
                tokens += part
        tokens += text
    return tokens, tuple(tiles)


@dataclass(frozen=True)
class Arrival:
    """A request, the step before which it comes, and that before which its client leaves, if it does."""

    at: int
    texts: list[list[TokenId]]
    images: list[bytes]
    max_tokens: int
    leaves_at: int | None


@st.composite
def arrivals(draw: st.DrawFn) -> Arrival:
    at, num_images = draw(st.integers(0, 30)), draw(st.integers(0, 2))
    images = [
        bytes([draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(0, 2))]) for _ in range(num_images)
    ]
    beginning = list(range(1, 1 + draw(st.integers(1, 40))))
    rest = [draw(st.lists(st.integers(1, 96), max_size=6)) for _ in images]
    leaves = draw(st.one_of(st.none(), st.integers(at, at + 30)))
    return Arrival(at, [beginning, *rest], images, draw(st.integers(1, 20)), leaves)


@given(
    plan=st.lists(arrivals(), min_size=1, max_size=12),
    slots=st.integers(1, 4),
    cells=st.sampled_from([160, 400, 2000]),
    step=st.sampled_from([8, 64]),
    states=st.sampled_from([0, 300, 5000]),
    whole=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_any_schedule_with_images_gives_the_answers_of_requests_alone(
    plan: list[Arrival], slots: int, cells: int, step: int, states: int, *, whole: bool
) -> None:
    limits = StateLimits(states, partial_reuse=not whole)
    backend, sink = SeeingBackend(Capabilities(slots, cells, cells, max(step, slots), limits)), CollectingSink()
    engine = Engine(backend, sink, max_queue=100)
    prompts = [place(backend.seeing, a.texts, a.images) for a in plan]
    for now in range(4000):
        for i, a in enumerate(plan):
            tokens, tiles = prompts[i]
            if a.at == now:
                engine.submit(Request(RequestId(i), tuple(tokens), a.max_tokens, GREEDY, tiles=tiles))
            if a.leaves_at == now:
                engine.cancel(RequestId(i))
        if not engine.advance() and now > 80:
            break
    else:
        raise AssertionError("a request starved")
    assert all(b - a <= 1 for a, b in zip([0, *backend.encoded_before], backend.encoded_before, strict=False))
    for i, a in enumerate(plan):
        expected = backend.expected(prompts[i][0], max_tokens=a.max_tokens)
        full = b"".join(backend.tokenizer.piece(t) for t in expected).decode()
        if a.leaves_at is None:
            assert sink.texts[RequestId(i)] == full
        assert full.startswith(sink.texts.get(RequestId(i), ""))


def make_engine() -> tuple[Engine, SeeingBackend, CollectingSink]:
    backend, sink = SeeingBackend(Capabilities(4, 2000, 2000, 64, StateLimits(0))), CollectingSink()
    return Engine(backend, sink, max_queue=10), backend, sink


def submit(engine: Engine, backend: SeeingBackend, number: int, image: bytes) -> None:
    tokens, tiles = place(backend.seeing, [[5, 6, 7, 8, 9], [4]], [image])
    engine.submit(Request(RequestId(number), tuple(tokens), 3, GREEDY, tiles=tiles, return_tokens=True))


def finish(engine: Engine) -> None:
    while engine.advance():
        pass


def test_the_same_image_is_encoded_once_and_another_is_not_mistaken_for_it() -> None:
    engine, backend, sink = make_engine()
    for number, image in enumerate([b"\x02\x04a", b"\x02\x04a", b"\x02\x04b"]):
        submit(engine, backend, number, image)
        finish(engine)
    assert len(backend.seeing.encoded) == 4, "the second request found the first one's cells"
    assert [sink.last[RequestId(i)].num_cached for i in range(3)] == [0, 18, 7]
    assert sink.texts[RequestId(0)] == sink.texts[RequestId(1)] != sink.texts[RequestId(2)]
    tokens = sink.last[RequestId(0)].tokens
    assert tokens is not None
    assert list(tokens[:13]) == [5, 6, 7, 8, 9, 1, 2, -1, -1, -1, -1, 1, 2]


def test_an_encoder_that_fails_fails_its_request_alone() -> None:
    engine, backend, sink = make_engine()
    engine.submit(Request(RequestId(0), (1, 2, 3), 8, GREEDY, ignore_eos=True))
    engine.advance()
    backend.seeing.fails = True
    submit(engine, backend, 1, b"\x01\x04a")
    finish(engine)
    assert isinstance(sink.failures[RequestId(1)].error, BackendError)
    assert sink.last[RequestId(0)].num_output == 8
    backend.seeing.fails = False
    submit(engine, backend, 2, b"\x01\x04a")
    finish(engine)
    assert sink.last[RequestId(2)].finish_reason is not None


def chunk_of(tiles: list[tuple[int, int]], size: int, *, start: int, length: int, num_logits: int = 0) -> Chunk:
    """A chunk of a sequence whose encoded tiles lie there."""
    tokens = list(range(size))
    placed: list[PlacedTile] = []
    for at, count in tiles:
        tile = Tile(tile_ids(b"x", at, count), None, 0, np.arange(at, at + count, dtype=np.float32)[:, None])
        tokens[at : at + count] = tile.ids
        placed.append(PlacedTile(at, tile))
    sequence = Sequence(Request(RequestId(1), tuple(tokens), 1, tiles=tuple(placed)), 1)
    return Chunk(sequence, 3, start, tokens[start : start + length], num_logits=num_logits)


@pytest.mark.parametrize(("start", "length"), [(0, 20), (3, 9), (5, 2), (2, 3), (11, 9), (19, 1)])
def test_a_step_is_parted_in_order_and_whole(start: int, length: int) -> None:
    chunk = chunk_of([(4, 4), (8, 3), (15, 2)], 20, start=start, length=length, num_logits=1)
    parts = [c for layer in passes((chunk,)) for c in layer]
    assert [t for c in parts for t in c.tokens] == chunk.tokens
    assert [c.start for c in parts] == [start + sum(len(p.tokens) for p in parts[:i]) for i in range(len(parts))]
    assert [c.num_logits for c in parts] == [0] * (len(parts) - 1) + [1]
    for c in parts:
        assert len({t < 0 for t in c.tokens}) == 1
        if c.tokens[0] < 0:
            assert rows_of(c)[:, 0].tolist() == list(range(c.start, c.start + len(c.tokens)))


def test_what_waits_for_the_encoder_is_cut_off() -> None:
    chunk = chunk_of([(4, 4), (10, 3)], 20, start=0, length=20, num_logits=1)
    chunk.sequence.request.tiles[1].tile.rows = None
    found = next_unencoded(Batch((), (chunk,)))
    assert found is not None
    assert found[1] is chunk.sequence.request.tiles[1].tile
    (rest,) = cut(Batch((), (chunk,))).chunks
    assert (rest.tokens, rest.num_logits) == (chunk.tokens[:10], 0)
    chunk.sequence.request.tiles[0].tile.rows = None
    assert cut(Batch((), (chunk_of([(4, 4)], 6, start=0, length=4), chunk))).chunks[1].tokens == chunk.tokens[:4]


def test_ids_are_of_the_content_and_never_tokens() -> None:
    ids = [tile_ids(content, index, 50) for content in (b"a", b"b") for index in (0, 1)]
    assert len({i for tile in ids for i in tile}) == 200
    assert all(-(1 << 62) - 2 <= i < -1 for tile in ids for i in tile)
    assert tile_ids(b"a", 0, 50) == ids[0]
    assert shown_ids([7, *ids[0][:2], 8]) == (7, -1, -1, 8)


def test_images_are_neither_guessed_nor_penalized() -> None:
    image = tile_ids(b"a", 0, 3)
    text = [5, 6, 7, 8]
    lookup = Lookup()
    tokens = [*text, *image, 9, *text]
    lookup.follow(tokens[:-1])
    lookup.follow(tokens)
    assert lookup.guess(tokens, 8) == []
    logits = np.ones(16, np.float32)
    params = SamplingParams(repeat_penalty=2.0, frequency_penalty=1.0, dry_multiplier=1.0)
    Penalties(params, num_prompt=len(tokens)).apply(logits, [*tokens, 3])
    assert logits[3] < 1
    assert logits[[0, 1, 2, 10, 11, 12, 13, 14, 15]].tolist() == [1] * 9


def test_images_have_bounds() -> None:
    def placer(*, context: int = 1000, room: int = 1000) -> ImagePlacer:
        class Six(ScriptedVision):
            @override
            def read(self, data: bytes) -> list[list[TokenId] | Tile]:
                return super().read(b"\x06\x0a")

        return ImagePlacer(Six(), context_tokens=context, room_bytes=room)

    one = picture(1)
    tokens, tiles = placer().place([one], [[7], [8]])
    assert (tokens[0], tokens[-1], len(tiles), len(tokens)) == (7, 8, 6, 2 + 6 * 12 + 1)
    with pytest.raises(ContextOverflow):
        placer(context=40).place([one], [[7], [8]])
    with pytest.raises(InvalidRequest, match="take"):
        placer(room=500).place([one], [[7], [8]])
    with pytest.raises(InvalidImage, match="Image 2 cannot be read: it is neither") as caught:
        placer().place([one, b"text"], [[7], [8], [9]])
    assert caught.value.field == "messages"
    busy = placer(room=1000)
    held = busy.place([one], [[7], [8]])
    with pytest.raises(QueueFull):
        busy.place([one], [[7], [8]])
    for placed in held[1]:
        placed.tile.source = None
    busy.place([one], [[7], [8]])
    with pytest.raises(BackendError, match="projector"):
        ImagePlacer(None, context_tokens=10, room_bytes=10).place([one], [[7], [8]])
