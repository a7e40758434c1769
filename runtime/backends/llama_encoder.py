"""The embedding engine's seam over llama.cpp's C API: one model, one context, nothing kept between steps."""

from __future__ import annotations

import ctypes
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from edge.errors import BackendError, DoesNotFit, UnsupportedFormat
from edge.formats.gguf import GgufFile, read_gguf
from edge.native.llama import bindings, last_error
from runtime.backends.base import ModelFacts
from runtime.backends.encoder import EncoderCapabilities, EncoderText, Frame
from runtime.backends.llama_cpp import PROCESS_BYTES, LlamaOptions, LlamaTokenizer, load_model, pointer_to
from runtime.request import TokenId

STEP_TOKENS = 256
"""Of short texts together. With flash attention, which passes over what other texts' tokens hold, a step of all-MiniLM
gains nothing beyond (10,200 tokens/s at 128, 10,400 at 256, 10,200 at 512), and each waits for the whole step."""
STEP_TEXTS = 64
MAX_WINDOW = 8192
"""Longest text taken without being asked for: the memory for attention grows with its square."""
_FLOAT_TYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}


def choose_window(*, asked: int, trained: int, bytes_for: Callable[[int], int], room_bytes: int) -> int:
    """Longest text to make room for: what was asked for, else what the model was trained for or half of that, and half
    again, until it fits.

    Raises:
        DoesNotFit: What was asked for does not fit, or not even 128 tokens.
    """
    window = min(asked or MAX_WINDOW, trained)
    while bytes_for(window) > room_bytes:
        if asked or window <= 128:
            raise DoesNotFit(f"Texts of {window} tokens", required_bytes=bytes_for(window), available_bytes=room_bytes)
        window //= 2
    return window


class _TypedEmbeddings:
    """The vectors that a BERT starts from, where tokens of a second text have another type than those of the first.

    llama.cpp gives every token the first type. So pairs of texts go in as vectors: of the token, and on top of it by
    how much the second type differs from the first, which the library will add.
    """

    def __init__(self, file: GgufFile) -> None:
        self._tokens = self._matrix(file, "token_embd.weight")
        types = self._matrix(file, "token_types.weight").astype(np.float32)
        self._difference = types[1] - types[0]

    @staticmethod
    def _matrix(file: GgufFile, name: str) -> NDArray[Any]:
        tensor = next(t for t in file.tensors if t.name == name)
        if tensor.type not in _FLOAT_TYPES:
            raise UnsupportedFormat(
                f"A reranker whose {name} is stored as {tensor.type} would be given wrong types of tokens.",
                hint="Take one in F16 or F32.",
            )
        shape = tuple(reversed(tensor.shape))
        return np.memmap(file.path, _FLOAT_TYPES[tensor.type], "r", offset=tensor.offset, shape=shape)

    def of(self, text: EncoderText) -> NDArray[np.float32]:
        """Shape ``(length, width)``."""
        vectors = self._tokens[text.tokens].astype(np.float32)
        vectors[text.second_at :] += self._difference
        return vectors


class _DecomposingTokenizer(LlamaTokenizer):
    """WordPiece of texts without accents. llama.cpp takes characters apart by a table that has no Hangul, so Korean
    would be read as other tokens than the model learned; Python's has it."""

    @override
    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[TokenId]:
        text = unicodedata.normalize("NFD", text)
        return super().encode(text, add_special=add_special, parse_special=parse_special)


def _strips_accents(file: GgufFile) -> bool:
    """Whether the vocabulary is WordPiece of texts without accents, as llama.cpp decides it (llama-vocab.cpp)."""
    key = "tokenizer.ggml.normalizer"
    lowercase = file.metadata.get(f"{key}.lowercase", True)
    is_wordpiece = file.text("tokenizer.ggml.model") == "bert"
    return is_wordpiece and bool(file.metadata.get(f"{key}.strip_accents", lowercase))


def _has_types(file: GgufFile) -> bool:
    """Whether tokens of the second of two texts have a type of their own."""
    shapes = {tensor.name: tensor.shape for tensor in file.tensors}
    return shapes.get("token_types.weight", (0, 1))[1] > 1


class LlamaEncoder:
    """A GGUF model that makes vectors or scores, by llama.cpp. One thread owns it; `tokenizer` may be used from any.

    Raises:
        InvalidModelFile: The library refuses the file.
        UnsupportedFormat: The model answers in a way that is not served.
        DoesNotFit: The weights or a step need more memory than `options` allows.
        BackendError: The context cannot be made.
    """

    def __init__(
        self, path: Path, options: LlamaOptions, *, on_progress: Callable[[float], None] | None = None
    ) -> None:
        self._lib = lib = bindings()
        self._context: Any = None
        self._model: Any = None
        file = read_gguf(path)
        if file.size > options.available_bytes:
            raise DoesNotFit("The model", required_bytes=file.size, available_bytes=options.available_bytes)
        self._pooling = file.pooling or "mean"
        self._model = load_model(path, on_progress)
        vocab = lib.llama_model_get_vocab(self._model)
        self.tokenizer = _DecomposingTokenizer(vocab) if _strips_accents(file) else LlamaTokenizer(vocab)
        self._embd_width: int = lib.llama_model_n_embd(self._model)
        window = choose_window(
            asked=options.context_tokens,
            trained=lib.llama_model_n_ctx_train(self._model),
            bytes_for=self._bytes_for,
            room_bytes=options.available_bytes - file.size - PROCESS_BYTES,
        )
        self._context = self._open_context(options, max(window, STEP_TOKENS))
        is_ranker = self._pooling == "rank"
        width = lib.llama_model_n_cls_out(self._model) if is_ranker else self._embd_width
        self._capabilities = EncoderCapabilities(window, STEP_TOKENS, STEP_TEXTS, width, is_ranker)
        self._typed = _TypedEmbeddings(file) if is_ranker and _has_types(file) else None
        self._facts = ModelFacts(
            description=file.text("general.name") or file.architecture,
            architecture=file.architecture,
            num_parameters=file.num_parameters,
            size_bytes=lib.llama_model_size(self._model),
            vocab_size=self.tokenizer.vocab_size,
            trained_context_tokens=lib.llama_model_n_ctx_train(self._model),
            chat_template=None,
            bos="",
            eos="",
            control_texts=(),
        )

    def _bytes_for(self, window: int) -> int:
        """Memory of a step: masks of its tokens against each other, and a layer's activations, four times as wide."""
        tokens = max(window, STEP_TOKENS)
        return 6 * tokens * tokens + 4 * 12 * self._embd_width * tokens

    def _open_context(self, options: LlamaOptions, tokens: int) -> Any:
        lib = self._lib
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = tokens  # a text is read whole, in one micro-batch
        params.n_seq_max = STEP_TEXTS
        params.n_threads = params.n_threads_batch = options.threads
        params.embeddings, params.kv_unified, params.no_perf = True, True, True
        params.pooling_type = {"mean": 1, "cls": 2, "last": 3, "rank": 4}[self._pooling]
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            raise BackendError(f"llama.cpp cannot make a context of {tokens} tokens: {last_error() or 'no reason'}.")
        return context

    @property
    def capabilities(self) -> EncoderCapabilities:
        return self._capabilities

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    @property
    def frame(self) -> Frame:
        """As the vocabulary says; between a pair as llama-server has it: the end of the first, and a separator where
        the model wants one."""
        lib, vocab = self._lib, self._lib.llama_model_get_vocab(self._model)
        begin, end, sep = (getattr(lib, f"llama_vocab_{name}")(vocab) for name in ("bos", "eos", "sep"))
        first = [begin] if lib.llama_vocab_get_add_bos(vocab) else []
        last = [end if end >= 0 else sep] if lib.llama_vocab_get_add_eos(vocab) else []
        return Frame(first, [*last, *([sep] if lib.llama_vocab_get_add_sep(vocab) else [])], last)

    def encode(self, texts: Sequence[EncoderText]) -> NDArray[np.float32]:
        """Read texts; see :class:`runtime.backends.encoder.Encoder`."""
        lib = self._lib
        if memory := lib.llama_get_memory(self._context):
            lib.llama_memory_clear(memory, False)
        batch = _NativeBatch(lib, texts, self._typed)
        status: int = lib.llama_decode(self._context, batch.native)
        if status:
            raise BackendError(f"llama_decode failed with status {status}: {last_error() or 'no reason given'}.")
        width = self._capabilities.width
        values = np.empty((len(texts), width), np.float32)
        for i in range(len(texts)):
            row = lib.llama_get_embeddings_seq(self._context, i)
            if not row:
                raise BackendError("llama.cpp gave no vector for a text.")
            values[i] = np.ctypeslib.as_array(row, (width,))
        return values

    def set_threads(self, threads: int) -> None:
        """Use this many threads from the next step on."""
        self._lib.llama_set_n_threads(self._context, threads, threads)

    def close(self) -> None:
        """Free the context and the model."""
        if self._context:
            self._lib.llama_free(self._context)
            self._context = None
        if self._model:
            self._lib.llama_model_free(self._model)
            self._model = None


_INT32 = ctypes.POINTER(ctypes.c_int32)


class _NativeBatch:
    """A `llama_batch` of whole texts, each a sequence of its own; numpy owns the memory for as long as this lives."""

    def __init__(self, lib: Any, texts: Sequence[EncoderText], typed: _TypedEmbeddings | None) -> None:
        lengths = [len(text.tokens) for text in texts]
        size = sum(lengths)
        self._tokens = np.concatenate([text.tokens for text in texts])
        self._positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
        self._sequences = np.repeat(np.arange(len(texts), dtype=np.int32), lengths)
        self._ones = np.ones(size, np.int32)
        self._pointers = np.arange(size, dtype=np.uint64) * 4 + np.uint64(self._sequences.ctypes.data)
        self._outputs = np.ones(size, np.int8)
        self._vectors = None if typed is None else np.concatenate([typed.of(text) for text in texts])
        b = self.native = lib.llama_batch()
        b.n_tokens = size
        if self._vectors is None:
            b.token = pointer_to(self._tokens, _INT32)
        else:
            b.embd = pointer_to(self._vectors, ctypes.POINTER(ctypes.c_float))
        b.pos, b.n_seq_id = pointer_to(self._positions, _INT32), pointer_to(self._ones, _INT32)
        b.seq_id = pointer_to(self._pointers, ctypes.POINTER(_INT32))
        b.logits = pointer_to(self._outputs, ctypes.POINTER(ctypes.c_int8))
