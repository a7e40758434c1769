"""What a BERT checkpoint holds, and what its GGUF says: encoders for embeddings, cross-encoders for reranking.

Source: `conversion/bert.py` of llama.cpp at the revision inside llama-cpp-python 0.3.36. Embedding models come out the
same, byte for byte. For cross-encoders two things differ on purpose. The converter drops the pooler, though
transformers' `BertForSequenceClassification` applies it before the classifier: here it becomes the classifier's first
layer, which llama.cpp computes as tanh(Wx + b), as the pooler is. And it does not say that the model is a reranker.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from edge.errors import InvalidModelFile, UnsupportedFormat
from quantize.checkpoint import BertSettings, Checkpoint

MEAN, CLS, LAST, RANK = 1, 2, 3, 4
"""`enum llama_pooling_type` of llama.h."""

KEPT_F32 = frozenset({"position_embd.weight", "token_types.weight"})
"""Matrices that stay float32: they are added, not multiplied with."""

_OUTER = {
    "embeddings.word_embeddings.weight": "token_embd.weight",
    "embeddings.position_embeddings.weight": "position_embd.weight",
    "embeddings.token_type_embeddings.weight": "token_types.weight",
    "embeddings.LayerNorm.weight": "token_embd_norm.weight",
    "embeddings.LayerNorm.bias": "token_embd_norm.bias",
}
_INNER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_HEAD = {"pooler.dense": "cls", "classifier": "cls.output"}
_POOLING_DIRECTORY = re.compile(r"[\w-]{1,64}")


def known_as(name: str, settings: BertSettings) -> str | None:
    """The tensor's name in today's transformers; None for one that neither embedding nor reranking needs."""
    name = name.removeprefix("bert.")
    name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
    is_head = name.startswith("cls.") or (name.startswith("pooler.") and not settings.is_reranker)
    return None if is_head else name


def expected_tensors(settings: BertSettings) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in the checkpoint -> name in the GGUF and shape."""
    wide = settings.hidden_size
    rows = (settings.vocab_size, settings.max_position_embeddings, settings.type_vocab_size)
    shapes = [*((n, wide) for n in rows), (wide,), (wide,)]
    table: dict[str, tuple[str, tuple[int, ...]]] = {
        name: (target, shape) for (name, target), shape in zip(_OUTER.items(), shapes, strict=True)
    }
    for layer in range(settings.num_hidden_layers):
        for module, target in _INNER.items():
            there, here = f"encoder.layer.{layer}.{module}", f"blk.{layer}.{target}"
            table |= _linear(there, here, _inner_shape(module, settings))
    if settings.is_reranker:
        for module, target in _HEAD.items():
            table |= _linear(module, target, (wide if module == "pooler.dense" else 1, wide))
    return table


def _inner_shape(module: str, settings: BertSettings) -> tuple[int, ...]:
    wide, hidden = settings.hidden_size, settings.intermediate_size
    if module.endswith("LayerNorm"):
        return (wide,)
    return {"intermediate.dense": (hidden, wide), "output.dense": (wide, hidden)}.get(module, (wide, wide))


def _linear(there: str, here: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {f"{there}.weight": (f"{here}.weight", shape), f"{there}.bias": (f"{here}.bias", shape[:1])}


class _Module(msgspec.Struct, frozen=True):
    """An entry of `modules.json` of sentence-transformers."""

    type: str
    path: str


class _PoolingConfig(msgspec.Struct, frozen=True):
    """`config.json` of its pooling module."""

    pooling_mode_mean_tokens: bool = False
    pooling_mode_cls_token: bool = False
    pooling_mode_lasttoken: bool = False
    pooling_mode: str | None = None

    @property
    def type(self) -> int | None:
        """The first that is on, in the converter's order."""
        if self.pooling_mode_mean_tokens or self.pooling_mode == "mean":
            return MEAN
        if self.pooling_mode_cls_token or self.pooling_mode == "cls":
            return CLS
        return LAST if self.pooling_mode_lasttoken or self.pooling_mode == "lasttoken" else None


def pooling_type(checkpoint: Checkpoint, settings: BertSettings) -> int | None:
    """How token vectors become one; None where the checkpoint does not say.

    Raises:
        UnsupportedFormat: Another way of pooling, or layers after it.
        InvalidModelFile: A file of it breaks its format.
    """
    if settings.is_reranker:
        return RANK
    if (text := checkpoint.read_text("modules.json")) is None:
        return None
    try:
        modules = msgspec.json.decode(text, type=list[_Module])
    except msgspec.MsgspecError as e:
        raise InvalidModelFile("modules.json", str(e)) from e
    kinds = [module.type.rpartition(".")[2] for module in modules]
    if unknown := set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise UnsupportedFormat(f"A module of type '{unknown.pop()}' after the encoder cannot be converted.")
    directories = [module.path for module, kind in zip(modules, kinds, strict=True) if kind == "Pooling"]
    return _read_pooling(checkpoint, directories[0]) if directories else None


def _read_pooling(checkpoint: Checkpoint, directory: str) -> int:
    if not _POOLING_DIRECTORY.fullmatch(directory):
        raise InvalidModelFile("modules.json", f"the path {directory!r} is not a directory beside it")
    name = f"{directory}/config.json"
    try:
        config = msgspec.convert(checkpoint.read_table(name), _PoolingConfig)
    except msgspec.ValidationError as e:
        raise InvalidModelFile(name, str(e)) from e
    if config.type is None:
        raise UnsupportedFormat(f"The pooling of {name} cannot be converted.", hint="Supported: mean, cls, lasttoken.")
    return config.type


def parametrize(
    writer: Any, checkpoint: Checkpoint, settings: BertSettings, *, file_type: Any, quantization_version: int
) -> None:
    """Write the keys of the architecture, in the converter's order."""
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_layer_norm_eps(settings.layer_norm_eps)
    writer.add_file_type(file_type)
    writer.add_causal_attention(False)
    if (pooling := pooling_type(checkpoint, settings)) is not None:
        writer.add_uint32("bert.pooling_type", pooling)
    if settings.is_reranker:
        writer.add_classifier_output_labels(list((settings.id2label or {}).values()))
    writer.add_quantization_version(quantization_version)
    writer.add_token_type_count(settings.type_vocab_size)
