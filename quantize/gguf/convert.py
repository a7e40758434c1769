"""A checkpoint into one GGUF, tensor by tensor; nothing is held but the tensor being written.

Source: `conversion/llama.py`, `conversion/bert.py` and `conversion/base.py` of llama.cpp at the revision inside
llama-cpp-python 0.3.36. Names, order, types and metadata are the same, so that the tests can compare whole files.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import InvalidModelFile, MissingExtra, RecipeError
from quantize.checkpoint import BertSettings, Checkpoint, CheckpointTensor, ModelSettings, load_values

from . import bert
from .vocabulary import Vocabulary, read_vocabulary

VERSION = 2
"""Of what this module writes; part of the key under which a result is cached."""

_F16_MAX = 65504.0
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INNER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_IGNORED = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")


def _inner_shapes(settings: ModelSettings) -> dict[str, tuple[int, ...]]:
    wide, hidden = settings.hidden_size, settings.intermediate_size
    query = settings.num_attention_heads * settings.head_size
    key = settings.num_kv_heads * settings.head_size
    return {
        "input_layernorm": (wide,),
        "post_attention_layernorm": (wide,),
        "self_attn.q_proj": (query, wide),
        "self_attn.k_proj": (key, wide),
        "self_attn.v_proj": (key, wide),
        "self_attn.o_proj": (wide, query),
        "mlp.gate_proj": (hidden, wide),
        "mlp.up_proj": (hidden, wide),
        "mlp.down_proj": (wide, hidden),
    }


def _llama_tensors(settings: ModelSettings) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in the checkpoint -> name in the GGUF and shape, for every tensor the family has."""
    vocab = (settings.vocab_size, settings.hidden_size)
    shapes = {"model.embed_tokens.weight": vocab, "model.norm.weight": (settings.hidden_size,), "lm_head.weight": vocab}
    table: dict[str, tuple[str, tuple[int, ...]]] = {name: (_OUTER[name], shape) for name, shape in shapes.items()}
    for layer in range(settings.num_hidden_layers):
        for module, shape in _inner_shapes(settings).items():
            there, here = f"model.layers.{layer}.{module}", f"blk.{layer}.{INNER_NAMES[module]}"
            table[f"{there}.weight"] = (f"{here}.weight", shape)
            biased = settings.attention_bias if "self_attn" in module else settings.mlp_bias and "mlp" in module
            if biased:
                table[f"{there}.bias"] = (f"{here}.bias", shape[:1])
    if settings.tie_word_embeddings:
        del table["lm_head.weight"]
    return table


@dataclass(frozen=True, slots=True)
class _Planned:
    """One tensor of the output."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.float16 | np.float32]
    source: CheckpointTensor | None
    heads: int = 0
    """Heads whose rows are reordered; 0 for none."""


def permute_heads(values: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Rows of a Q or K projection from Hugging Face's RoPE layout (two halves) to llama.cpp's (pairs side by side).

    Args:
        values: Shape ``(heads * head_size, …)``.
    """
    rows = values.shape[0]
    return values.reshape(num_heads, 2, rows // num_heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _heads_of(name: str, settings: ModelSettings | BertSettings) -> int:
    if isinstance(settings, BertSettings):
        return 0
    if ".q_proj." in name:
        return settings.num_attention_heads
    return settings.num_kv_heads if ".k_proj." in name else 0


def _known_as(name: str, settings: ModelSettings | BertSettings) -> str | None:
    """The name by which a tensor is looked up; None for one that a model does without."""
    if isinstance(settings, BertSettings):
        return bert.known_as(name, settings)
    is_needless = name.endswith(_IGNORED) or (name == "lm_head.weight" and settings.tie_word_embeddings)
    return None if is_needless else name


def expected_tensors(settings: ModelSettings | BertSettings) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in the checkpoint -> name in the GGUF and shape, for every tensor the family has."""
    return bert.expected_tensors(settings) if isinstance(settings, BertSettings) else _llama_tensors(settings)


def _planned(checkpoint: Checkpoint, *, use_f16: bool) -> list[_Planned]:
    """The output's tensors in the checkpoint's order.

    Raises:
        InvalidModelFile: A tensor is missing, unknown, or not of the shape that the configuration gives it.
    """
    settings, plan = checkpoint.settings, list[_Planned]()
    expected = expected_tensors(settings)
    for name, tensor in checkpoint.tensors.items():
        known = _known_as(name, settings)
        if known is None:
            continue
        if known not in expected:
            kind = settings.model_type.capitalize()
            raise InvalidModelFile(tensor.path.name, f"it has the tensor '{name}', which a {kind} model does not")
        target, shape = expected.pop(known)
        if tensor.stored.shape != shape:
            raise InvalidModelFile(
                tensor.path.name,
                f"tensor '{name}' has the shape {tensor.stored.shape}, and config.json makes it {shape}",
            )
        is_f16 = use_f16 and len(shape) > 1 and target not in bert.KEPT_F32
        dtype = np.dtype(np.float16 if is_f16 else np.float32)
        plan.append(_Planned(target, shape, dtype, tensor, _heads_of(name, settings)))
    if expected:
        raise InvalidModelFile(
            "the checkpoint", f"{len(expected)} tensors are missing, '{next(iter(expected))}' is the first"
        )
    return plan


def rope_factors(settings: ModelSettings) -> NDArray[np.float32] | None:
    """By what Llama 3.1 divides each rotary frequency, shape ``(head_size / 2,)``; None where nothing is scaled so.

    Source: `_compute_llama3_parameters` of transformers; `generate_extra_tensors` of the converter.
    """
    rope = settings.rope
    if rope.kind != "llama3":
        return None
    exponents = np.arange(0, settings.head_size, 2, dtype=np.float32) / np.float32(settings.head_size)
    frequencies = np.float32(1) / np.power(np.float32(settings.rope_base), exponents)
    wavelengths = np.float32(2 * math.pi) / frequencies
    factor, context = rope.factor or 8.0, rope.original_max_position_embeddings or 8192
    factors: list[float] = []
    for wavelength in wavelengths:  # Each a float32, as the converter has it; float64 would differ in the last digit.
        if wavelength < context / rope.high_freq_factor:
            factors.append(1.0)
        elif wavelength > context / rope.low_freq_factor:
            factors.append(factor)
        else:
            smooth = (context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def _values_of(planned: _Planned) -> NDArray[Any]:
    """A tensor's values as they are written.

    Raises:
        InvalidModelFile: NaN or infinite values.
        RecipeError: Values beyond float16.
    """
    assert planned.source is not None
    values = load_values(planned.source)
    if planned.heads:
        values = permute_heads(values, planned.heads)
    if planned.dtype == np.float16 and values.dtype != np.float16 and np.abs(values).max(initial=0) > _F16_MAX:
        raise RecipeError(f"Tensor '{planned.name}' has values beyond float16's range.", hint="Use --precision f32.")
    return np.ascontiguousarray(values, dtype=planned.dtype)


def gguf_library() -> Any:
    """The `gguf` package, untyped from here on.

    Raises:
        MissingExtra: It is not installed.
    """
    try:
        import gguf
    except ImportError as e:
        raise MissingExtra("quantize", needed_for="Converting a checkpoint") from e
    logging.getLogger("gguf").setLevel(logging.WARNING)  # It tells every key and tensor on INFO.
    return gguf


def _describe(writer: Any, checkpoint: Checkpoint, *, name: str | None, num_parameters: int) -> None:
    """Title, authors, licence: from the model card's front matter, generation_config.json and the directory's name."""
    gguf = gguf_library()
    checkpoint.read_text("README.md")  # Bounds it: the next call reads it whole.
    try:
        metadata = gguf.Metadata.load(None, checkpoint.directory, name, num_parameters)
    except Exception as e:  # YAML of the model card raises its own kinds; each means the same here
        raise InvalidModelFile("README.md", f"its front matter cannot be read ({e})") from e
    penalty = checkpoint.read_table("generation_config.json").get("repetition_penalty")
    if metadata.sampling_penalty_repeat is None:
        metadata.sampling_penalty_repeat = penalty
    metadata.name = metadata.name or checkpoint.directory.name
    metadata.size_label = metadata.size_label or gguf.size_label(num_parameters, num_parameters, 0, 0)
    metadata.set_gguf_meta_model(writer)


def _parametrize(writer: Any, checkpoint: Checkpoint, *, use_f16: bool) -> None:
    gguf, settings = gguf_library(), checkpoint.settings
    file_type = gguf.LlamaFileType.MOSTLY_F16 if use_f16 else gguf.LlamaFileType.ALL_F32
    if isinstance(settings, BertSettings):
        version = gguf.GGML_QUANT_VERSION
        bert.parametrize(writer, checkpoint, settings, file_type=file_type, quantization_version=version)
    else:
        _parametrize_llama(writer, settings, file_type=file_type)


def _parametrize_llama(writer: Any, settings: ModelSettings, *, file_type: Any) -> None:
    gguf, rope = gguf_library(), settings.rope
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_head_count_kv(settings.num_kv_heads)
    if rope.kind == "linear" and rope.factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    writer.add_rope_freq_base(settings.rope_base)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_key_length(settings.head_size)
    writer.add_value_length(settings.head_size)
    writer.add_file_type(file_type)
    writer.add_vocab_size(settings.vocab_size)
    writer.add_rope_dimension_count(settings.head_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    for kind, token_id in vocabulary.specials.items():
        if kind != "cls":  # it is written as bos, and has no key of its own
            getattr(writer, f"add_{kind}_token_id")(token_id)
    for kind, value in vocabulary.adds.items():
        if hasattr(writer, f"add_add_{kind}_token"):
            getattr(writer, f"add_add_{kind}_token")(value)
    for flag, value in vocabulary.normalizer.items():
        writer.add_bool(f"tokenizer.ggml.normalizer.{flag}", value)  # gguf 0.19.0 has no method for these yet
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
    if len(vocabulary.tokens) == 49152:
        # The converter's rule for Granite, whose vocabulary has SmolLM's size: neither begins a text with a token.
        writer.add_add_bos_token(False)


def _all_planned(checkpoint: Checkpoint, *, use_f16: bool) -> list[tuple[_Planned, NDArray[np.float32] | None]]:
    settings = checkpoint.settings
    factors = None if isinstance(settings, BertSettings) else rope_factors(settings)
    extra = [] if factors is None else [(_Planned("rope_freqs.weight", factors.shape, factors.dtype, None), factors)]
    return [*extra, *((planned, None) for planned in _planned(checkpoint, use_f16=use_f16))]


def _write_tensors(writer: Any, plan: list[tuple[_Planned, NDArray[np.float32] | None]]) -> Iterator[float]:
    # Not by `write_tensor_data`: it goes through ndarray.tofile, whose error on a full disk has no errno.
    total, done, file = sum(math.prod(p.shape) for p, _ in plan), 0, writer.fout[0]
    writer.write_padding(file, file.tell())
    for planned, given in plan:
        values = _values_of(planned) if given is None else given
        file.write(values.data.cast("B"))
        writer.write_padding(file, values.nbytes)
        done += math.prod(planned.shape)
        yield done / total


def convert(
    checkpoint: Checkpoint,
    target: Path,
    *,
    use_f16: bool,
    name: str | None = None,
    on_progress: Callable[[float], None] = lambda _: None,
) -> None:
    """Write a checkpoint as a GGUF and flush it to the disk. A half-written file is left for the caller to remove.

    Args:
        use_f16: Matrices as float16, else everything as float32.
        name: The model's title, where the directory's name does not serve.
        on_progress: Called with the share done, 0 to 1.

    Raises:
        InvalidModelFile: A tensor is missing, misshapen, NaN or infinite; a tokenizer file breaks its format.
        UnsupportedFormat: A tokenizer of another kind.
        RecipeError: Values beyond float16.
        MissingExtra: The `gguf` package is not installed.
        OSError: The disk.
    """
    vocabulary = read_vocabulary(checkpoint)
    plan = _all_planned(checkpoint, use_f16=use_f16)
    gguf = gguf_library()
    writer: Any = gguf.GGUFWriter(None, "bert" if isinstance(checkpoint.settings, BertSettings) else "llama")
    try:
        for planned, _ in plan:
            size = math.prod(planned.shape) * planned.dtype.itemsize
            writer.add_tensor_info(planned.name, planned.shape, planned.dtype, size)
        writer.add_type(gguf.GGUFType.MODEL)
        _describe(writer, checkpoint, name=name, num_parameters=sum(math.prod(p.shape) for p, _ in plan))
        _parametrize(writer, checkpoint, use_f16=use_f16)
        _add_vocabulary(writer, vocabulary)
        writer.write_header_to_file(target)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for share in _write_tensors(writer, plan):
            on_progress(share)
        writer.flush()
        os.fsync(writer.fout[0].fileno())
    finally:
        writer.close()
