"""Images on the real library, with a tiny model and projector: against its own way of doing it, and under load."""

from __future__ import annotations

import ctypes
import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.errors import DoesNotFit, InvalidImage, InvalidModelFile, UnsupportedFormat
from edge.native.llama import bindings, vision_bindings
from quantize.checkpoint import open_checkpoint
from quantize.gguf.convert import convert
from runtime.backends.llama_cpp import LlamaBackend, LlamaOptions, load_model
from runtime.engine import Engine
from runtime.image_prompts import ImagePlacer
from runtime.images import Tile
from runtime.request import Request, RequestId, SamplingParams
from tests.quantize.checkpoints import make_smollm
from tests.support import CollectingSink
from tests.vision import EPSILON, LONGEST_EDGE, TILE, TILE_TOKENS, VisionFiles, gap, picture, scores, write_projector

GREEDY = SamplingParams(temperature=0)
PNG, JPEG, TALL = picture(1), picture(2, kind="JPEG", size=(90, 60)), picture(3, size=(20, 200))


def open_backend(files: VisionFiles, *, step: int = 64, cells: int = 1024, **more: Any) -> LlamaBackend:
    options = LlamaOptions(1, 6, step, cells, 4 << 30, projector=files.projector, projector_id="x", **more)
    return LlamaBackend(files.model, options)


@pytest.fixture(scope="module")
def backend(vision_files: VisionFiles) -> Iterator[LlamaBackend]:
    found = open_backend(vision_files)
    yield found
    found.close()


def request(backend: LlamaBackend, number: int, texts: list[str], images: list[bytes], tokens: int = 12) -> Request:
    encode = backend.tokenizer.encode
    parts = [encode(text, add_special=not i, parse_special=False) for i, text in enumerate(texts)]
    prompt, tiles = ImagePlacer(backend.vision, context_tokens=1024, room_bytes=1 << 30).place(images, parts)
    return Request(RequestId(number), tuple(prompt), tokens, GREEDY, tiles=tiles, return_tokens=True, ignore_eos=True)


def reference(files: VisionFiles, text: str, images: list[bytes]) -> NDArray[np.float32]:
    """Scores after a prompt as the library's own helper computes them; `text` has its marker for each image."""
    lib, vision = bindings(), vision_bindings()
    model = load_model(files.model, None)
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = 512
    params.n_threads = params.n_threads_batch = 1
    context = lib.llama_init_from_model(model, params)
    settings = vision.mtmd_context_params_default()
    settings.n_threads = 1
    projector = vision.mtmd_init_from_file(str(files.projector).encode(), model, settings)
    buffers = [(ctypes.c_uint8 * len(data)).from_buffer_copy(data) for data in images]
    bitmaps = [vision.mtmd_helper_bitmap_init_from_buf(projector, b, len(b), False) for b in buffers]
    chunks, past = vision.mtmd_input_chunks_init(), ctypes.c_int32()
    given = vision.mtmd_input_text(text.encode(), len(text.encode()), True, True)
    pointers = (ctypes.c_void_p * len(bitmaps))(*bitmaps)
    assert vision.mtmd_tokenize(projector, chunks, ctypes.byref(given), pointers, len(bitmaps)) == 0
    assert not vision.mtmd_helper_eval_chunks(projector, context, chunks, 0, 0, 512, True, ctypes.byref(past))
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    row = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (size,)).copy()
    for bitmap in bitmaps:
        vision.mtmd_bitmap_free(bitmap)
    vision.mtmd_input_chunks_free(chunks)
    vision.mtmd_free(projector)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return row


@pytest.mark.parametrize("step", [1, 5, 64])
def test_scores_are_those_of_the_librarys_own_helper(
    backend: LlamaBackend, vision_files: VisionFiles, step: int
) -> None:
    marker = vision_bindings().mtmd_default_marker().decode()
    expected = reference(vision_files, f"Look: {marker} and {marker} differ", [PNG, JPEG])
    asked = request(backend, 1, ["Look: ", " and ", " differ"], [PNG, JPEG])
    np.testing.assert_allclose(scores(backend, asked, [], step=step)[0], expected, atol=1e-3)


def test_a_picture_changes_what_comes_after_it(backend: LlamaBackend) -> None:
    rows = [scores(backend, request(backend, 1, ["See ", " so"], [i]), [], step=64)[0] for i in (PNG, JPEG, TALL)]
    assert len({int(row.argmax()) for row in rows}) > 1
    assert all(np.abs(a - b).max() > 0.1 for a, b in ((rows[0], rows[1]), (rows[1], rows[2]), (rows[0], rows[2])))


def test_a_picture_is_cut_in_tiles_that_are_counted(backend: LlamaBackend) -> None:
    assert backend.vision is not None
    parts = backend.vision.read(PNG)
    tiles = [p for p in parts if isinstance(p, Tile)]
    assert [len(t.ids) for t in tiles] == [TILE_TOKENS] * ((LONGEST_EDGE // TILE) ** 2 + 1)
    assert {t.source_bytes for t in tiles} == {12 * TILE * TILE}


def alone(backend: LlamaBackend, asked: Request) -> list[int]:
    backend.clear()
    engine = Engine(backend, sink := CollectingSink(), max_queue=1)
    engine.submit(asked)
    while engine.advance():
        pass
    tokens = sink.last[asked.id].tokens
    assert tokens is not None
    return list(tokens[len(asked.prompt) :])


def test_a_busy_engine_with_few_cells_answers_as_each_request_alone(
    backend: LlamaBackend, vision_files: VisionFiles
) -> None:
    def some(on: LlamaBackend, number: int) -> Request:
        rng = random.Random(number)
        chosen = [rng.choice([PNG, JPEG, TALL]) for _ in range(rng.choice([0, 1, 1, 2]))]
        texts = ["Look at this: ", " well", " then"][: len(chosen) + 1]
        return request(on, number, texts, chosen, rng.choice([5, 90]))

    expected = {i: alone(backend, some(backend, i)) for i in range(16)}
    busy = open_backend(vision_files, step=24, cells=256, state_bytes=8 << 20)
    asked = [some(busy, i) for i in range(16)]
    engine = Engine(busy, sink := CollectingSink(), max_queue=100)
    rng = random.Random(5)
    arrivals = {r.id: rng.randint(0, 30) for r in asked}
    for now in range(2000):
        for r in asked:
            if arrivals[r.id] == now:
                engine.submit(r)
        if not engine.advance() and now > 80:
            break
    preemptions = engine.stats().queues.num_preemptions
    busy.close()
    assert preemptions, "there are too few cells for all"
    for r in asked:
        tokens = sink.last[r.id].tokens
        assert tokens is not None
        answer = list(tokens[len(r.prompt) :])
        assert answer == expected[r.id] or gap(backend, r, answer) < EPSILON, "the greedy law"


def test_what_is_let_go_is_freed(backend: LlamaBackend) -> None:
    import weakref

    assert backend.vision is not None
    parts = backend.vision.read(PNG)
    tiles = [p for p in parts if isinstance(p, Tile)]
    chunks = weakref.ref(tiles[0].source.chunks)  # type: ignore[attr-defined]
    for tile in tiles:
        assert chunks() is not None
        backend.vision.encode(tile)
    gc.collect()
    assert chunks() is None


def test_a_file_that_passed_the_look_and_cannot_be_decoded_is_an_error(backend: LlamaBackend) -> None:
    assert backend.vision is not None
    damaged = bytearray(JPEG)
    damaged[damaged.index(b"\xff\xc0") + 11] = 0  # sampled by nothing
    with pytest.raises(InvalidImage, match="damaged"):
        backend.vision.read(bytes(damaged))


def test_a_projector_of_another_model_is_refused(vision_files: VisionFiles, tmp_path: Path) -> None:
    write_projector(tmp_path / "wide.gguf", wide=128)
    with pytest.raises(InvalidModelFile, match="mismatch"):
        open_backend(VisionFiles(vision_files.model, tmp_path / "wide.gguf"))
    convert(open_checkpoint(make_smollm(tmp_path / "plain")), tmp_path / "plain.gguf", use_f16=False)
    with pytest.raises(InvalidModelFile, match="control tokens"):
        open_backend(VisionFiles(tmp_path / "plain.gguf", vision_files.projector))
    write_projector(tmp_path / "huge.gguf", vision__image_size=1 << 20)
    with pytest.raises(InvalidModelFile, match="how large"):
        open_backend(VisionFiles(vision_files.model, tmp_path / "huge.gguf"))


@pytest.mark.parametrize(
    ("name", "reason"), [("mtmd_decode_use_mrope", "M-RoPE"), ("mtmd_decode_use_non_causal", "non-causal")]
)
def test_what_would_be_computed_wrongly_is_refused(
    vision_files: VisionFiles, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    monkeypatch.setattr(vision_bindings(), name, Mock(return_value=True))
    with pytest.raises(UnsupportedFormat, match=reason):
        open_backend(vision_files)


def test_a_projector_counts_as_memory(vision_files: VisionFiles) -> None:
    needed = vision_files.model.stat().st_size
    options = LlamaOptions(1, 1, 64, 256, needed + 1000, projector=vision_files.projector)
    with pytest.raises(DoesNotFit) as caught:
        LlamaBackend(vision_files.model, options)
    assert caught.value.missing_bytes == vision_files.projector.stat().st_size - 1000
