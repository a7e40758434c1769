"""The encoder of images over llama.cpp's libmtmd: a projector beside a model of text."""

from __future__ import annotations

import ctypes
import hashlib
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import BackendError, InvalidImage, InvalidModelFile, UnsupportedFormat
from edge.formats.gguf import read_gguf
from edge.native.llama import bindings, last_error, vision_bindings
from runtime.images import Tile, tile_ids
from runtime.request import TokenId

MAX_TILE_SIDE = 4096
_NO_PROGRAMS = b"/dev/null"
"""Where the library shall look for ffmpeg, to which it would hand what it cannot decode itself."""


class _Chunks:
    """What the library made of one image; freed when the last tile let it go."""

    def __init__(self, lib: Any) -> None:
        self._lib = lib
        self.native = lib.mtmd_input_chunks_init()
        weakref.finalize(self, lib.mtmd_input_chunks_free, self.native)

    def __len__(self) -> int:
        size: int = self._lib.mtmd_input_chunks_size(self.native)
        return size

    def __getitem__(self, index: int) -> Any:
        return self._lib.mtmd_input_chunks_get(self.native, index)


@dataclass(frozen=True, slots=True)
class _Source:
    chunks: _Chunks
    index: int


class LlamaVision:
    """The projector of a loaded model.

    Args:
        path: Its GGUF.
        identity: Of its bytes; part of what images are known by.
        model: The library's model, which outlives this.

    Raises:
        InvalidModelFile: The library refuses the file, or it is of another model.
        UnsupportedFormat: Its images would need what this engine does not do.
    """

    def __init__(self, path: Path, *, identity: str, model: Any, threads: int) -> None:
        self._lib = lib = vision_bindings()
        self._identity = identity.encode()
        self._tile_bytes = 12 * _tile_side(path) ** 2  # three channels of float32
        self._width: int = bindings().llama_model_n_embd_inp(model)
        params = lib.mtmd_context_params_default()
        params.n_threads, params.print_timings = threads, False
        self._context: Any = lib.mtmd_init_from_file(str(path).encode(), model, params)
        if not self._context:
            raise InvalidModelFile("The projector", last_error() or "llama.cpp cannot load it")
        self._options = lib.mtmd_helper_init_opt_default()
        self._options.video_params.ffmpeg_bin_dir = _NO_PROGRAMS
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self._width

    def _check(self) -> None:
        """Refuse what would be computed wrongly, before anybody asks for it."""
        lib, context = self._lib, self._context
        if not lib.mtmd_support_vision(context):
            raise UnsupportedFormat("The projector is for sound; only images are read.")
        if lib.mtmd_decode_use_mrope(context):
            raise UnsupportedFormat(
                "The model places images in two dimensions (M-RoPE), which this version does not do.",
                hint="Pull it without its projector, for text alone.",
            )
        if lib.mtmd_decode_use_non_causal(context, None):
            raise UnsupportedFormat(
                "The model lets the parts of an image see each other (non-causal attention), which this version does "
                "not do.",
                hint="Pull it without its projector, for text alone.",
            )
        blank = np.zeros((64, 64, 3), np.uint8)
        try:
            chunks = self._split(lib.mtmd_bitmap_init(64, 64, blank.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))))
        except InvalidImage as e:
            raise InvalidModelFile("The projector", f"it takes no image: {e.reason}") from e
        for i, part in enumerate(self._parts(chunks, b"")):
            if isinstance(part, list) and min(part) < 0:
                raise InvalidModelFile("The projector", "it needs control tokens that the model does not have")
            if lib.mtmd_input_chunk_get_n_pos(chunks[i]) != lib.mtmd_input_chunk_get_n_tokens(chunks[i]):
                raise UnsupportedFormat("The model gives images other positions than tokens; this version does not.")

    def read(self, data: bytes) -> list[list[TokenId] | Tile]:
        """What stands for an image in a prompt; see :class:`runtime.backends.base.Vision`."""
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        found = self._lib.mtmd_helper_bitmap_init_from_buf(self._context, buffer, len(data), False, self._options)
        if not found:
            raise InvalidImage("its data is damaged")
        return self._parts(self._split(found), hashlib.sha256(data).digest())

    def _split(self, bitmap: Any) -> _Chunks:
        """The image as the model wants it: resized, cut, and between its own tokens."""
        lib, chunks = self._lib, _Chunks(self._lib)
        marker = lib.mtmd_default_marker()
        text = lib.mtmd_input_text(marker, len(marker), False, True)
        try:
            bitmaps = (ctypes.c_void_p * 1)(bitmap)
            status: int = lib.mtmd_tokenize(self._context, chunks.native, ctypes.byref(text), bitmaps, 1)
        finally:
            lib.mtmd_bitmap_free(bitmap)
        if status:
            raise InvalidImage(f"the model cannot take it ({last_error() or 'no reason given'})")
        return chunks

    def _parts(self, chunks: _Chunks, digest: bytes) -> list[list[TokenId] | Tile]:
        content = hashlib.sha256(self._identity + digest).digest()
        return [self._part(chunks, i, content) for i in range(len(chunks))]

    def _part(self, chunks: _Chunks, index: int, content: bytes) -> list[TokenId] | Tile:
        lib, chunk = self._lib, chunks[index]
        size: int = lib.mtmd_input_chunk_get_n_tokens(chunk)
        if lib.mtmd_input_chunk_get_type(chunk) == lib.MTMD_INPUT_CHUNK_TYPE_TEXT:
            count = ctypes.c_size_t()
            return lib.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))[:size]
        return Tile(tile_ids(content, index, size), _Source(chunks, index), self._tile_bytes)

    def encode(self, tile: Tile) -> None:
        """Set a tile's rows; see :class:`runtime.backends.base.Vision`."""
        source = tile.source
        assert isinstance(source, _Source), "it was made here, and is encoded once"
        if self._lib.mtmd_encode_chunk(self._context, source.chunks[source.index]):
            raise BackendError(f"The image could not be encoded: {last_error() or 'no reason given'}.")
        found = ctypes.cast(self._lib.mtmd_get_output_embd(self._context), ctypes.POINTER(ctypes.c_float))
        rows: NDArray[np.float32] = np.ctypeslib.as_array(found, (len(tile.ids), self._width)).copy()
        tile.rows, tile.source = rows, None

    def close(self) -> None:
        """Free the projector. Further calls do nothing."""
        if self._context:
            self._lib.mtmd_free(self._context)
            self._context = None


def _tile_side(path: Path) -> int:
    """Pixels of the side of what the encoder sees at once; the file is looked at before native code reads it."""
    found = read_gguf(path, what="The projector").metadata.get("clip.vision.image_size")
    if not isinstance(found, int) or not 0 < found <= MAX_TILE_SIDE:
        raise InvalidModelFile("The projector", "it does not say how large an image it sees")
    return found
