"""The engine's seam over llama.cpp's C API: one model, one context, one unified KV cache."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import BackendError, DoesNotFit, InvalidModelFile, UnsupportedFormat
from edge.hardware.memory import available_bytes, data_bytes, takeable_bytes
from edge.native import huge_pages
from edge.native.cleared import Cleared, give_back, own_mappings
from edge.native.llama import bindings, last_error
from runtime.backends.base import Capabilities, ModelFacts, StateRefused, Vision
from runtime.batch import TILE_TOKENS, Batch, CacheOp, Chunk, CopyPrefix, DropState, RestoreState, SaveState, Truncate
from runtime.images import passes, rows_of
from runtime.request import Adapter, AdapterSet, TokenId
from runtime.states import StateId, StateLimits

if TYPE_CHECKING:
    from runtime.backends.llama_vision import LlamaVision

UBATCH_TOKENS = 512
DEFAULT_CELLS = 32768
"""Most cells taken without being asked for; a request may use all of them."""
STATE_LAYOUT = "f16 keys and values, unified"
"""Beside model and build, what decides the bytes of a saved state."""
MIN_CELLS = 4096
"""Cells for many short sequences beside each other, where the model's own context is shorter."""
PROCESS_BYTES = 96 << 20
"""Room for the interpreter, the library and its activations."""
MIN_FREE_BYTES = 32 << 20
"""What a saved state leaves of the memory: steps need some too, and who finds none is ended."""
STATES_SLACK = 17 / 16
"""How far states may exceed what was counted for their tokens: each names its cells and layers too."""
NARROW_TOKENS = 16
"""A chunk of so many tokens or fewer is cheaper row by row than as a tile."""
KV_SHARE = 0.5
"""Share of the memory left after the weights that the cells may take."""

MAX_VOCAB_DIFFERENCE, FIRST_TEXT_TOKEN = 128, 5
"""Tokens that one of two vocabularies may have more, as padding does; and those at the beginning whose names may
differ (llama.cpp, common/speculative.cpp)."""


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """How to open a model.

    Attributes:
        context_tokens: KV cells; 0 chooses from the model's training and the memory there is.
        available_bytes: Memory the model may take.
        state_bytes: Memory for states of sequences that left the cache, taken as they are saved.
        adapter_bytes: Memory for adapters, taken as they are loaded.
        state_disk_bytes: Most of them on the disk.
        decode_threads: Most threads of a step of one token; 0 means as many as others have.
        ubatch_tokens: Tokens that the library computes at once.
        flash_attention: On or off; None lets the library choose.
        kv_q8: Whether cells are kept in eight bits (Q8_0): half the memory, other answers.
        projector: What encodes images for the model; None for text alone.
        projector_id: Of its bytes; part of what images are known by.
    """

    threads: int
    num_slots: int
    step_tokens: int
    context_tokens: int
    available_bytes: int
    state_bytes: int = 0
    adapter_bytes: int = 0
    state_disk_bytes: int = 0
    decode_threads: int = 0
    ubatch_tokens: int = UBATCH_TOKENS
    flash_attention: bool | None = None
    kv_q8: bool = False
    projector: Path | None = None
    projector_id: str = ""


def choose_cells(*, asked: int, trained: int, bytes_per_cell: int, room_bytes: int) -> int:
    """KV cells to allocate: what was asked for, else the trained context, which any request may then use whole, at
    most `DEFAULT_CELLS` and what fits; a multiple of 256.

    Raises:
        DoesNotFit: Not even the cells asked for, or 1,024, fit.
    """
    fitting = max(0, room_bytes) // max(1, bytes_per_cell)
    wanted = asked or min(max(trained, MIN_CELLS), DEFAULT_CELLS)
    least = asked or min(1024, trained)
    if fitting < least:
        fits = [f"context_tokens = {fitting // 256 * 256}"] if fitting >= 512 else []
        raise DoesNotFit(
            f"A KV cache of {least} cells",
            required_bytes=least * bytes_per_cell,
            available_bytes=room_bytes,
            fits=fits,
        )
    cells = wanted if asked else min(wanted, int(fitting * KV_SHARE) or fitting)
    return max(256, cells // 256 * 256)


def reason_for_cells(cells: int, *, asked: int, trained: int) -> str:
    """Why `choose_cells` chose that many."""
    if asked:
        return "context_tokens asks for them"
    if cells < min(max(trained, MIN_CELLS), DEFAULT_CELLS) // 256 * 256:
        return "as many as fit half of the memory that was free beside the weights"
    if cells < trained:
        return f"the most that is taken unasked; it was trained for {trained:,} tokens (context_tokens asks for more)"
    return f"it was trained for {trained:,} tokens, and short sequences beside each other want {MIN_CELLS:,} at least"


def by_shape(chunks: tuple[Chunk, ...]) -> list[tuple[Chunk, ...]]:
    """What is computed in one call: answers apart from prompts, where beside them they would be computed as tiles.

    An answer's one row makes its whole tile look at all that the answer's sequence holds, which costs more than reading
    the weights once more (docs/performance.md has the figures).
    """
    if sum(len(c.tokens) for c in chunks) < TILE_TOKENS:
        return [chunks]
    narrow = tuple(c for c in chunks if len(c.tokens) <= NARROW_TOKENS)
    wide = tuple(c for c in chunks if len(c.tokens) > NARROW_TOKENS)
    return [c for c in (wide, narrow) if c]


class LlamaTokenizer:
    """The vocabulary of a loaded model. Safe from any thread: the library's vocabulary is constant."""

    def __init__(self, vocab: Any) -> None:
        self._lib = bindings()
        self._vocab = vocab
        self._pieces: dict[TokenId, bytes] = {}
        self.vocab_size: int = self._lib.llama_vocab_n_tokens(vocab)
        self._eog_tokens = frozenset(t for t in range(self.vocab_size) if self._lib.llama_vocab_is_eog(vocab, t))
        self._is_sentencepiece = self._lib.llama_vocab_type(vocab) == self._lib.LLAMA_VOCAB_TYPE_SPM

    @property
    def eog_tokens(self) -> frozenset[TokenId]:
        """Tokens with which the model ends an answer."""
        return self._eog_tokens

    def difference(self, other: LlamaTokenizer) -> str | None:
        """Why tokens of the one mean something else to the other, if they do.

        Source: llama.cpp, `common_speculative_are_compatible` (common/speculative.cpp).
        """
        lib, one, two = self._lib, self._vocab, other._vocab
        for what in ("type", "get_add_bos", "get_add_eos"):
            read = getattr(lib, f"llama_vocab_{what}")
            if read(one) != read(two):
                return f"they differ in {what.removeprefix('get_')}"
        for name in ("bos", "eos"):
            adds, read = getattr(lib, f"llama_vocab_get_add_{name}"), getattr(lib, f"llama_vocab_{name}")
            if adds(one) and read(one) != read(two):
                return f"they differ in {name}"
        shared = min(self.vocab_size, other.vocab_size)
        if abs(self.vocab_size - other.vocab_size) > MAX_VOCAB_DIFFERENCE:
            return f"one has {self.vocab_size:,} tokens, the other {other.vocab_size:,}"
        text = lib.llama_vocab_get_text
        differing = (t for t in range(FIRST_TEXT_TOKEN, shared) if text(one, t) != text(two, t))
        return None if (found := next(differing, None)) is None else f"token {found} is another one"

    @cached_property
    def control_texts(self) -> tuple[str, ...]:
        """Texts that spell a control token."""
        lib = self._lib
        found = [t for t in range(self.vocab_size) if lib.llama_vocab_is_control(self._vocab, t)]
        return tuple(text for t in found if (text := self.text(t)))

    def text(self, token: TokenId) -> str:
        """What spells a token in a prompt, control tokens too."""
        return self._piece(token, special=True).decode("utf-8", "replace")

    @property
    def fim_tokens(self) -> tuple[TokenId, TokenId, TokenId] | None:
        """See :class:`runtime.tokenizer.Tokenizer`."""
        lib, vocab = self._lib, self._vocab
        before: int = lib.llama_vocab_fim_pre(vocab)
        behind: int = lib.llama_vocab_fim_suf(vocab)
        middle: int = lib.llama_vocab_fim_mid(vocab)
        return None if min(before, behind, middle) < 0 else (before, behind, middle)

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[TokenId]:
        """Tokens of a text; see :class:`runtime.tokenizer.Tokenizer`."""
        if not add_special and self._is_sentencepiece:
            return self._encode_without_prefix(text, parse_special=parse_special)
        return self._encode(text.encode(), add_special=add_special, parse_special=parse_special)

    def _encode_without_prefix(self, text: str, *, parse_special: bool) -> list[TokenId]:
        """SentencePiece puts a space before every text; a sentinel in front takes it, and its tokens are cut off."""
        sentinel = self._encode(b"\x02", add_special=False, parse_special=False)
        tokens = self._encode(b"\x02" + text.encode(), add_special=False, parse_special=parse_special)
        if tokens[: len(sentinel)] == sentinel:
            return tokens[len(sentinel) :]
        return self._encode(text.encode(), add_special=False, parse_special=parse_special)

    def _encode(self, data: bytes, *, add_special: bool, parse_special: bool) -> list[TokenId]:
        size = len(data) + 16
        buffer = (ctypes.c_int32 * size)()
        count: int = self._lib.llama_tokenize(self._vocab, data, len(data), buffer, size, add_special, parse_special)
        if count < 0:
            raise BackendError(f"The tokenizer needs {-count} tokens for {len(data)} bytes.")
        return buffer[:count]

    def piece(self, token: TokenId) -> bytes:
        """Bytes of a token in an answer; empty for control tokens."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._piece(token, special=False)
        return found

    def _piece(self, token: TokenId, *, special: bool) -> bytes:
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            count: int = self._lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count


_INT32 = ctypes.POINTER(ctypes.c_int32)
_UINT8 = ctypes.POINTER(ctypes.c_uint8)


class _NativeBatch:
    """The arrays behind one reusable `llama_batch`; numpy owns the memory.

    Args:
        shadow: How far the second sequence of each token lies behind its slot; 0 for none.
        width: Of the rows that it holds in place of tokens; 0 where it holds tokens.
    """

    def __init__(self, lib: Any, size: int, *, shadow: int, width: int = 0) -> None:
        self.tokens = np.zeros(size, np.int32)
        self.rows = np.zeros((size, width), np.float32) if width else None
        self.positions = np.zeros(size, np.int32)
        num_sequences = 2 if shadow else 1
        self._sequences = np.zeros((size, num_sequences), np.int32)
        self._shadow = np.array([0, shadow][:num_sequences], np.int32)
        self.logits = np.zeros(size, np.int8)
        self._num_sequences = np.full(size, num_sequences, np.int32)
        stride = self._sequences.strides[0]
        pointers = np.arange(size, dtype=np.uint64) * stride + self._sequences.ctypes.data
        self._sequence_pointers = pointers.astype(np.uint64)
        b = self.native = lib.llama_batch()
        if self.rows is None:
            b.token = pointer_to(self.tokens, _INT32)
        else:
            b.embd = pointer_to(self.rows, ctypes.POINTER(ctypes.c_float))
        b.pos = pointer_to(self.positions, _INT32)
        b.n_seq_id = pointer_to(self._num_sequences, _INT32)
        b.seq_id = pointer_to(self._sequence_pointers, ctypes.POINTER(_INT32))
        b.logits = pointer_to(self.logits, ctypes.POINTER(ctypes.c_int8))

    def fill(self, chunks: Iterable[Chunk]) -> None:
        at = 0
        for chunk in chunks:
            end = at + len(chunk.tokens)
            if self.rows is None:
                self.tokens[at:end] = chunk.tokens
            else:
                self.rows[at:end] = rows_of(chunk)
            self.positions[at:end] = range(chunk.start, chunk.start + len(chunk.tokens))
            self._sequences[at:end] = chunk.slot + self._shadow
            self.logits[at:end] = 0
            self.logits[end - chunk.num_logits : end] = 1
            at = end
        self.native.n_tokens = at


def _is_image(chunks: tuple[Chunk, ...]) -> bool:
    """Whether these parts of chunks are rows of tiles; else they are tokens."""
    return chunks[0].tokens[0] < 0


def pointer_to(array: NDArray[Any], pointer_type: Any) -> Any:
    """What C takes for an array, which has to outlive its use."""
    return ctypes.cast(ctypes.c_void_p(array.ctypes.data), pointer_type)


def load_model(path: Path, on_progress: Callable[[float], None] | None) -> Any:
    """The library's model of a GGUF file; who asks for it frees it.

    Raises:
        InvalidModelFile: The library refuses the file.
    """
    lib = bindings()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = -1
    if on_progress is not None:

        def report(fraction: float, _user: object) -> bool:
            on_progress(fraction)
            return True

        callback = lib.llama_progress_callback(report)  # alive until this returns
        params.progress_callback = callback
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise InvalidModelFile(path.name, last_error() or "llama.cpp cannot load it")
    return model


class LlamaBackend:
    """A GGUF model through llama.cpp. One thread owns it; `tokenizer` may be used from any.

    Raises:
        InvalidModelFile: The library refuses the file.
        DoesNotFit: The weights or the KV cache need more memory than `options` allows.
        BackendError: The context cannot be made.
    """

    def __init__(
        self, path: Path, options: LlamaOptions, *, on_progress: Callable[[float], None] | None = None
    ) -> None:
        self._lib = bindings()
        self._context: Any = None
        self._model: Any = None
        self._vision: LlamaVision | None = None
        self._beside: LlamaBackend | None = None
        self._cleared: Cleared | None = None
        self._decode_threads = options.decode_threads
        size = path.stat().st_size + (options.projector.stat().st_size if options.projector else 0)
        if size > options.available_bytes:
            raise DoesNotFit("The model", required_bytes=size, available_bytes=options.available_bytes)
        self._path = path
        self._may_settle = size * 2 <= options.available_bytes  # else they stay the kernel's to give back
        self._kept_free_bytes = options.state_bytes + options.adapter_bytes + PROCESS_BYTES
        self._model = load_model(path, on_progress)
        try:
            self._set_up(options, size)
        except BaseException:
            self.close()
            raise

    def _set_up(self, options: LlamaOptions, size: int) -> None:
        """Make what the model is computed with; `size` is the bytes of its files."""
        lib = self._lib
        self.tokenizer = LlamaTokenizer(lib.llama_model_get_vocab(self._model))
        self._vocab_size = self.tokenizer.vocab_size
        size += self._open_projector(options)
        carries_state = lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model)
        self._window: int = 0 if carries_state else lib.llama_model_n_swa(self._model)
        self._shadow = options.num_slots if self._window else 0
        cell_bytes, carried_bytes = self._bytes_per_cell(), 0
        if carries_state or not cell_bytes:
            cell_bytes, carried_bytes = self._measure_memory(options)
        taken = size + self._compute_bytes(options) + options.num_slots * carried_bytes
        cells = choose_cells(
            asked=options.context_tokens,
            trained=lib.llama_model_n_ctx_train(self._model),
            bytes_per_cell=cell_bytes,
            room_bytes=options.available_bytes - taken,
        )
        before = own_mappings()
        self._context = self._open_context(options, cells)
        self._memory = lib.llama_get_memory(self._context)
        if not self._memory:
            raise UnsupportedFormat(
                f"{self._path.name} is an encoder, and its package does not say so.",
                hint="Pull it again with this version.",
            )
        self._batch = _NativeBatch(lib, options.step_tokens, shadow=self._shadow)
        self._on_gpu: bool = lib.llama_supports_gpu_offload()
        self._image_batch = (
            _NativeBatch(lib, options.step_tokens, shadow=self._shadow, width=self._vision.width)
            if self._vision is not None
            else None
        )
        self._states: dict[int, NDArray[np.uint8]] = {}
        self._unsaved: list[StateId] = []
        self._loaded_adapters: dict[str, Any] = {}
        self._adapters: AdapterSet = ()
        trained: int = lib.llama_model_n_ctx_train(self._model)
        self._capabilities = Capabilities(
            options.num_slots, cells, min(trained, cells), options.step_tokens,
            StateLimits(
                options.state_bytes, options.state_disk_bytes, cell_bytes, carried_bytes,
                partial_reuse=not carries_state, window_tokens=self._window,
            ),
            options.adapter_bytes,
        )  # fmt: skip
        self._cleared = give_back(cells * cell_bytes, before)

    def _open_projector(self, options: LlamaOptions) -> int:
        """Load the projector, where there is one; what it takes beyond the bytes of its file."""
        if options.projector is None:
            return 0
        from runtime.backends.llama_vision import LlamaVision

        before = data_bytes()
        self._vision = LlamaVision(
            options.projector, identity=options.projector_id, model=self._model, threads=options.threads
        )
        return max(0, data_bytes() - before - options.projector.stat().st_size)

    def _compute_bytes(self, options: LlamaOptions) -> int:
        """Memory beside weights and cells. The largest compute buffer holds one row of scores for each token of a
        micro-batch, and the output buffer one for each token of a step that wants them."""
        return PROCESS_BYTES + 2 * min(options.ubatch_tokens, options.step_tokens) * self._vocab_size * 4

    def _bytes_per_cell(self) -> int:
        """Key and value of one token in every layer, two bytes a number; 0 where the metadata do not tell, such as
        of layers with unlike heads."""
        lib, model = self._lib, self._model
        if not (heads := self._number("attention.head_count")) or not (kv := self._number("attention.head_count_kv")):
            return 0
        width: int = lib.llama_model_n_embd(model) // heads
        key, value = (self._number(f"attention.{side}_length") or width for side in ("key", "value"))
        return 2 * (key + value) * kv * lib.llama_model_n_layer(model)

    def _number(self, key: str) -> int:
        """A number of the model's metadata; 0 where there is none, or one for each layer."""
        text = self._meta(f"{self._meta('general.architecture')}.{key}")
        return int(text) if text.isdecimal() else 0

    def _measure_memory(self, options: LlamaOptions) -> tuple[int, int]:
        """Bytes of one token in a sequence's state, and of what a recurrent model remembers of a text however long:
        from the states of one token and of two, in a context of their own."""
        lib = self._lib
        context = self._open_context(replace(options, num_slots=1, step_tokens=2), 256)
        try:
            one, two = self._state_size_after_token(context), self._state_size_after_token(context)
        finally:
            lib.llama_free(context)
        return max(1, two - one), one - (two - one)

    def _state_size_after_token(self, context: Any) -> int:
        if self._lib.llama_decode(context, self._lib.llama_batch_get_one((ctypes.c_int32 * 1)(), 1)):
            raise BackendError(f"The model cannot compute one token: {last_error() or 'no reason given'}.")
        size: int = self._lib.llama_state_seq_get_size(context, 0)
        return size

    def _open_context(self, options: LlamaOptions, cells: int) -> Any:
        lib = self._lib
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch = cells, options.step_tokens
        params.n_ubatch = min(options.ubatch_tokens, options.step_tokens)
        params.n_seq_max = options.num_slots + self._shadow
        params.n_threads = min(options.threads, options.decode_threads or options.threads)
        params.n_threads_batch = options.threads
        if options.flash_attention is not None:
            params.flash_attn_type = (
                lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if options.flash_attention else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
            )
        if options.kv_q8:
            params.type_k = params.type_v = lib.GGML_TYPE_Q8_0
        params.kv_unified, params.no_perf = True, True
        params.swa_full = True  # else what slots keep for reuse is forgotten but for a window
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            raise BackendError(
                f"llama.cpp cannot make a context of {cells} cells: {last_error() or 'no reason given'}."
            )
        return context

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def vision(self) -> Vision | None:
        return self._vision

    @property
    def facts(self) -> ModelFacts:
        lib, model = self._lib, self._model
        vocab = lib.llama_model_get_vocab(model)
        template: bytes | None = lib.llama_model_chat_template(model, None)
        bos, eos = (
            self.tokenizer.text(t) if t >= 0 else "" for t in (lib.llama_vocab_bos(vocab), lib.llama_vocab_eos(vocab))
        )
        return ModelFacts(
            description=self._text(lib.llama_model_desc),
            architecture=self._meta("general.architecture"),
            num_parameters=lib.llama_model_n_params(model),
            size_bytes=lib.llama_model_size(model),
            vocab_size=self._vocab_size,
            trained_context_tokens=lib.llama_model_n_ctx_train(model),
            chat_template=template.decode("utf-8", "replace") if template else None,
            bos=bos,
            eos=eos,
            control_texts=self.tokenizer.control_texts,
        )

    def _text(self, read: Callable[[Any, Any, int], int]) -> str:
        buffer = ctypes.create_string_buffer(256)
        read(self._model, buffer, 256)
        return buffer.value.decode("utf-8", "replace")

    def _meta(self, key: str) -> str:
        return self._text(lambda m, b, n: self._lib.llama_model_meta_val_str(m, key.encode(), b, n))

    def load_adapter(self, adapter: Adapter) -> None:
        """Load an adapter; see :class:`runtime.backends.base.Backend`."""
        loaded = self._lib.llama_adapter_lora_init(self._model, adapter.path.encode())
        if not loaded:
            raise InvalidModelFile("The adapter", last_error() or "llama.cpp cannot load it")
        self._loaded_adapters[adapter.digest] = loaded

    def free_adapter(self, digest: str) -> None:
        """Free an adapter; the context must not hold it while it goes."""
        if any(a.digest == digest for a in self._adapters):
            self._set_adapters(())
        self._lib.llama_adapter_lora_free(self._loaded_adapters.pop(digest))

    def _set_adapters(self, adapters: AdapterSet) -> None:
        """Compute with these from now on. The context plans its graphs anew with the next decode."""
        size = len(adapters)
        pointers = (self._lib.llama_adapter_lora_p_ctypes * size)(*(self._loaded_adapters[a.digest] for a in adapters))
        scales = (ctypes.c_float * size)(*(a.scale for a in adapters))
        if self._lib.llama_set_adapters_lora(self._context, pointers, size, scales):
            raise BackendError("llama.cpp cannot set the adapters.")
        self._adapters = adapters

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        """Run one step; see :class:`runtime.backends.base.Backend`."""
        for op in batch.cache_ops:
            self._apply(op)
        if not batch.chunks:
            return np.empty((0, self._vocab_size), np.float32)
        if batch.adapters != self._adapters:
            self._set_adapters(batch.adapters)
        calls = self._calls(batch.chunks)
        if len(calls) == 1:
            return self._decode(batch.chunks)
        scores = {c.slot: rows.copy() for chunks in calls for c, rows in self._decode_each(chunks)}
        return np.concatenate([scores[c.slot] for c in batch.chunks])

    def _calls(self, chunks: tuple[Chunk, ...]) -> list[tuple[Chunk, ...]]:
        """What the library shall compute together; the last part of each chunk is the one with scores."""
        layers = passes(chunks) if any(c.sequence.request.tiles for c in chunks) else [chunks]
        if self._on_gpu:
            return layers
        return [call for layer in layers for call in ([layer] if _is_image(layer) else by_shape(layer))]

    def _decode_each(self, chunks: tuple[Chunk, ...]) -> Iterator[tuple[Chunk, NDArray[np.float32]]]:
        """Each chunk with its scores, which the next call overwrites."""
        logits = self._decode(chunks)
        ends = list(accumulate(c.num_logits for c in chunks))
        return ((c, logits[end - c.num_logits : end]) for c, end in zip(chunks, ends, strict=True))

    def _decode(self, chunks: tuple[Chunk, ...]) -> NDArray[np.float32]:
        """Scores of these chunks, as the library computes them in one call."""
        lib = self._lib
        native = self._image_batch if _is_image(chunks) else self._batch
        assert native is not None, "without a projector there are no tiles"
        native.fill(chunks)
        status: int = lib.llama_decode(self._context, native.native)
        if status:
            raise BackendError(f"llama_decode failed with status {status}: {last_error() or 'no reason given'}.")
        rows = sum(c.num_logits for c in chunks)
        if not rows:
            lib.llama_synchronize(self._context)
            return np.empty((0, self._vocab_size), np.float32)
        return np.ctypeslib.as_array(lib.llama_get_logits(self._context), (rows, self._vocab_size))

    def _apply(self, op: CacheOp) -> None:
        match op:
            case CopyPrefix():
                for target in self._sequences(op.target):
                    self._lib.llama_memory_seq_cp(self._memory, op.source, target, 0, op.length)
            case Truncate():
                self._truncate(op.slot, op.length)
            case SaveState():
                self._save(op)
            case RestoreState():
                state = self._states.get(op.state)
                if state is None or not self._write_state(op.slot, state, length=op.length):
                    raise StateRefused(op.state)
            case DropState():
                self._states.pop(op.state, None)

    def _sequences(self, slot: int) -> tuple[int, ...]:
        """The library's sequences that hold a slot's cells: where there is a sliding window, two. The library gives
        away cells that lie before the window of the only sequence that holds them, also while others are free; the
        slot would go on to answer, and wrongly, once it is cut or shared (`llama_kv_cache::find_slot`)."""
        return (slot, slot + self._shadow) if self._shadow else (slot,)

    def _truncate(self, slot: int, length: int) -> None:
        for sequence in self._sequences(slot):
            if not self._lib.llama_memory_seq_rm(self._memory, sequence, length, -1):
                raise BackendError(f"The cache of slot {slot} cannot be cut at {length}.")

    def _save(self, op: SaveState) -> None:
        size: int = self._lib.llama_state_seq_get_size(self._context, op.slot)
        held = sum(state.nbytes for state in self._states.values())
        if held + size > self._capabilities.states.memory_bytes * STATES_SLACK or not self.has_room(size):
            self._unsaved.append(op.state)
            return
        try:
            self._states[op.state] = self._read_state(op.slot, size)
        except MemoryError:  # another thread was faster
            self._unsaved.append(op.state)

    def has_room(self, size_bytes: int) -> bool:
        """Whether memory suffices for a state; see :class:`runtime.backends.base.Backend`."""
        return takeable_bytes(promised_bytes=self.promised_bytes()) >= size_bytes + MIN_FREE_BYTES

    def promised_bytes(self) -> int:
        """Memory of cells that nobody used yet, also of the backend beside it: it looks free, and is not. For any
        thread."""
        cleared = self._cleared  # who closes it may be another thread
        own = cleared.unused_bytes() if cleared is not None else 0
        return own + (self._beside.promised_bytes() if self._beside is not None else 0)

    def share_memory_with(self, other: LlamaBackend) -> None:
        """Leave another backend of this process what its cells will take."""
        self._beside = other

    def take_unsaved(self) -> list[StateId]:
        """States that were not saved; see :class:`runtime.backends.base.Backend`."""
        unsaved, self._unsaved = self._unsaved, []
        return unsaved

    def _read_state(self, slot: int, size: int) -> NDArray[np.uint8]:
        state = np.empty(size, np.uint8)
        if self._lib.llama_state_seq_get_data(self._context, pointer_to(state, _UINT8), size, slot) != size:
            raise BackendError(f"The state of slot {slot} cannot be read.")
        return state

    def _write_state(self, slot: int, state: NDArray[np.uint8], *, length: int) -> bool:
        """Whether the slot now holds the first `length` tokens of a saved state."""
        lib, memory = self._lib, self._memory
        if not lib.llama_state_seq_set_data(self._context, pointer_to(state, _UINT8), state.size, slot):
            return False
        for sequence in self._sequences(slot)[1:]:
            lib.llama_memory_seq_cp(memory, slot, sequence, 0, -1)
        whole: int = lib.llama_memory_seq_pos_max(memory, slot) + 1
        self._truncate(slot, length)
        first, last = lib.llama_memory_seq_pos_min(memory, slot), lib.llama_memory_seq_pos_max(memory, slot)
        # What forgot tokens, in a recurrent state or before a sliding window, would answer after a cut, and wrongly.
        return last == length - 1 and (first == 0 or whole == length)

    def state(self, state: StateId) -> memoryview:
        """The bytes of a saved state."""
        return self._states[state].data

    def put_state(self, state: StateId, data: memoryview) -> None:
        """Take back the bytes of a saved state."""
        self._states[state] = np.frombuffer(data, np.uint8)

    def settle(self) -> Iterator[object]:
        """Put the weights on huge pages, where memory allows. There the kernel cannot give them back, as it can pages
        of a file: so it ends where other models have meanwhile taken what is promised to this one's states."""
        if not self._may_settle:
            return
        for done in huge_pages.replace(self._path):
            yield done
            if available_bytes() < self._kept_free_bytes + self.promised_bytes():
                return

    def set_threads(self, threads: int) -> None:
        """Use this many threads from the next step on."""
        self._lib.llama_set_n_threads(self._context, min(threads, self._decode_threads or threads), threads)

    def clear(self) -> None:
        """Empty the cache, and forget the saved states. What writing zeros would take is given back instead, but where
        more than cells is kept."""
        is_plain = self._capabilities.states.partial_reuse
        are_zeros = is_plain and self._cleared is not None and self._cleared.give_back()
        self._lib.llama_memory_clear(self._memory, not are_zeros)
        self._states.clear()
        self._unsaved.clear()

    def close(self) -> None:
        """Free the context, the projector and the model."""
        if self._vision is not None:
            self._vision.close()
        if self._context:
            self._lib.llama_free(self._context)
            self._context = self._cleared = None
        if self._model:
            self._lib.llama_model_free(self._model)
            self._model = None
