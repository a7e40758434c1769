"""What the toolchain asks of llama.cpp: quantize a file, score a text, time a model. Runs in a child process only."""

from __future__ import annotations

import ctypes
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from edge.errors import BackendError, RecipeError
from edge.native import llama

_TENSOR_LINE = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")


class _TensorCounter(logging.Handler):
    """Reads the library's progress out of its log: a line `[  12/ 272] name …` for each tensor."""

    def __init__(self, on_progress: Callable[[float], None]) -> None:
        super().__init__()
        self._on_progress = on_progress

    @override
    def emit(self, record: logging.LogRecord) -> None:
        if found := _TENSOR_LINE.match(record.getMessage()):
            self._on_progress(int(found[1]) / max(int(found[2]), 1))


def quantize_file(
    source: Path, target: Path, *, ftype: int, num_threads: int, on_progress: Callable[[float], None]
) -> None:
    """Quantize a GGUF with `llama_model_quantize`. A half-written target is left for the caller to remove.

    Raises:
        RecipeError: The library refused, with its own words.
    """
    lib = llama.bindings()
    log, counter = logging.getLogger("edge.llama"), _TensorCounter(on_progress)
    log.addHandler(counter)
    log.setLevel(logging.INFO)
    params = lib.llama_model_quantize_default_params()
    params.nthread, params.ftype = num_threads, ftype
    params.allow_requantize = True  # The report says that the source was quantized already.
    try:
        failed = lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    finally:
        log.removeHandler(counter)
    if failed:
        raise RecipeError(f"llama.cpp could not quantize {source.name}: {llama.last_error() or 'no reason given'}.")


class ScoringModel:
    """A model that reads windows of tokens. Used by one thread; close it, or use it as a context manager.

    Raises:
        BackendError: The library cannot load the file, or has no memory for the context.
    """

    def __init__(self, path: Path, *, window_tokens: int, num_threads: int) -> None:
        self._lib = llama.bindings()
        self._context: Any = None
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0  # Quality is judged on one backend, so that reports of two machines compare.
        self._model: Any = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise BackendError(f"llama.cpp cannot load {path.name}: {llama.last_error() or 'no reason given'}.")
        self._vocab: Any = self._lib.llama_model_get_vocab(self._model)
        self.num_vocab = int(self._lib.llama_vocab_n_tokens(self._vocab))
        trained = int(self._lib.llama_model_n_ctx_train(self._model))
        self.window_tokens = min(window_tokens, trained) if trained > 0 else window_tokens
        self._open_context(num_threads)

    def _open_context(self, num_threads: int) -> None:
        params = self._lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self.window_tokens
        params.n_threads = params.n_threads_batch = num_threads
        params.no_perf = True
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            self.close()
            raise BackendError(f"llama.cpp cannot open a context: {llama.last_error() or 'no reason given'}.")
        self._memory: Any = self._lib.llama_get_memory(self._context)
        self._batch: Any = self._lib.llama_batch_init(self.window_tokens, 0, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back; a second call does nothing."""
        if self._context:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self._context)
            self._context = None
        if self._model:
            self._lib.llama_model_free(self._model)
            self._model = None

    def use_threads(self, count: int) -> None:
        """Compute with so many threads from now on."""
        self._lib.llama_set_n_threads(self._context, count, count)

    @property
    def first_token(self) -> int | None:
        """What the tokenizer puts before a text, if it puts anything."""
        adds = self._lib.llama_vocab_get_add_bos(self._vocab)
        return int(self._lib.llama_vocab_bos(self._vocab)) if adds else None

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with the first token where the tokenizer adds one; no text becomes a control token."""
        data = text.encode()
        buffer = (ctypes.c_int32 * (len(data) + 8))()
        count = int(self._lib.llama_tokenize(self._vocab, data, len(data), buffer, len(buffer), True, False))
        if count < 0:
            raise BackendError("llama.cpp could not tokenize the text.")
        return list(buffer[:count])

    def _decode(self, tokens: Sequence[int], *, at: int, scored_from: int) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, at + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i >= scored_from
        code = int(self._lib.llama_decode(self._context, batch))
        if code != 0:
            raise BackendError(f"llama_decode gave {code}: {llama.last_error() or 'no reason given'}.")
        self._lib.llama_synchronize(self._context)

    def logits(self, tokens: Sequence[int], *, scored_from: int) -> NDArray[np.float32]:
        """Scores after each token from `scored_from` on, read from an empty context, shape ``(tokens, vocab)``.

        The array is the library's own memory and holds until the next call.
        """
        self._lib.llama_memory_clear(self._memory, True)
        self._decode(tokens, at=0, scored_from=scored_from)
        rows = len(tokens) - scored_from
        pointer: Any = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(rows, self.num_vocab))

    def prefill_rate(self, tokens: Sequence[int], *, repeats: int) -> Iterator[float]:
        """Tokens per second of reading, once for each repeat."""
        for _ in range(repeats):
            self._lib.llama_memory_clear(self._memory, True)
            began = time.perf_counter()
            self._decode(tokens, at=0, scored_from=len(tokens) - 1)
            yield len(tokens) / (time.perf_counter() - began)

    def decode_seconds(self, tokens: Sequence[int], *, at: int) -> Iterator[float]:
        """Time of each step that reads one token after `at` others, as in answering."""
        for i, token in enumerate(tokens):
            began = time.perf_counter()
            self._decode([token], at=at + i, scored_from=0)
            yield time.perf_counter() - began
