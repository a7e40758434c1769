"""Tiny models of random weights, one for each way in which llama.cpp remembers a text; the same bytes every time.

Scores are wide (a deviation of about 8) and attention is sharp, so that nearly every greedy choice is decided and hangs
on tokens far back. The vocabulary is SentencePiece with a token for each byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

EMBD, HEADS, KV_HEADS, FFN, CONTEXT = 64, 4, 2, 96, 2048
WINDOW = 48
"""Of the models with a sliding window."""
WORDS = ("▁", "▁the", "▁and", "▁of", "▁water", "▁pump", "▁boat", "▁sea", "ing", "er", "s")
VOCABULARY = 3 + 256 + len(WORDS)
FIM = (VOCABULARY - 3, VOCABULARY - 2, VOCABULARY - 1)
"""What marks prefix, suffix and middle in the models that fill in: the last three words."""
SHARPNESS = 2.0
"""Of attention: at 1 every token looks at all before it alike, and what a single one says is lost in the mean."""


def _add_vocabulary(writer: Any, *, fills_in: bool) -> None:
    tokens = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % i for i in range(256)), *(w.encode() for w in WORDS)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(WORDS))])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(WORDS)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if fills_in:
        for name, token in zip(("pre", "suf", "mid"), FIM, strict=True):
            writer.add_uint32(f"tokenizer.ggml.fim_{name}_token_id", token)


class Tensors:
    """Random tensors by name. Shapes are given as llama.cpp writes them, what runs fastest first."""

    def __init__(self, writer: Any, seed: int) -> None:
        self._writer = writer
        self._rng = np.random.default_rng(seed)
        self.prefix = ""

    def matrix(self, name: str, *shape: int, gain: float = 1.0) -> None:
        """Weights that keep the size of what goes through them, times `gain`."""
        values = self._rng.standard_normal(shape[::-1]) * gain / shape[0] ** 0.5
        self._writer.add_tensor(self.prefix + name, values.astype(np.float32))

    def ones(self, name: str, size: int, *, times: float = 1.0) -> None:
        self._writer.add_tensor(self.prefix + name, np.full(size, times, np.float32))

    def vector(self, name: str, *shape: int, gain: float = 0.1) -> None:
        self._writer.add_tensor(self.prefix + name, (self._rng.standard_normal(shape[::-1]) * gain).astype(np.float32))

    def decay(self, name: str, *shape: int) -> None:
        """How fast a recurrent state forgets: negative, from slowly to at once."""
        values = -np.exp(self._rng.uniform(-4.0, 0.0, shape[::-1]))
        self._writer.add_tensor(self.prefix + name, values.astype(np.float32))


def attention(t: Tensors, *, head: int = EMBD // HEADS, heads: int = HEADS, kv_heads: int = KV_HEADS) -> None:
    t.matrix("attn_q.weight", EMBD, heads * head, gain=SHARPNESS)
    t.matrix("attn_k.weight", EMBD, kv_heads * head, gain=SHARPNESS)
    t.matrix("attn_v.weight", EMBD, kv_heads * head, gain=2)
    t.matrix("attn_output.weight", heads * head, EMBD, gain=2)


def feed_forward(t: Tensors) -> None:
    t.ones("ffn_norm.weight", EMBD)
    t.matrix("ffn_gate.weight", EMBD, FFN)
    t.matrix("ffn_up.weight", EMBD, FFN)
    t.matrix("ffn_down.weight", FFN, EMBD)


def experts(t: Tensors, number: int = 4) -> None:
    t.ones("ffn_norm.weight", EMBD)
    t.matrix("ffn_gate_inp.weight", EMBD, number)
    t.matrix("ffn_gate_exps.weight", EMBD, FFN, number)
    t.matrix("ffn_up_exps.weight", EMBD, FFN, number)
    t.matrix("ffn_down_exps.weight", FFN, EMBD, number)


def _qwen2(t: Tensors, _layer: int) -> None:
    t.ones("attn_norm.weight", EMBD)
    attention(t)
    for name in ("q", "k", "v"):
        t.vector(f"attn_{name}.bias", EMBD if name == "q" else KV_HEADS * EMBD // HEADS)
    feed_forward(t)


def _qk_norms(t: Tensors, head: int) -> None:
    t.vector("attn_q_norm.weight", head, gain=3)
    t.vector("attn_k_norm.weight", head, gain=3)


def _qwen3moe(t: Tensors, _layer: int) -> None:
    t.ones("attn_norm.weight", EMBD)
    attention(t, head=32)
    _qk_norms(t, 32)
    experts(t)


def _phi3(t: Tensors, _layer: int) -> None:
    t.ones("attn_norm.weight", EMBD)
    t.matrix("attn_qkv.weight", EMBD, (HEADS + 2 * KV_HEADS) * EMBD // HEADS, gain=SHARPNESS)
    t.matrix("attn_output.weight", EMBD, EMBD, gain=2)
    t.ones("ffn_norm.weight", EMBD)
    t.matrix("ffn_up.weight", EMBD, 2 * FFN)
    t.matrix("ffn_down.weight", FFN, EMBD)


def _gemma2(t: Tensors, _layer: int) -> None:
    t.ones("attn_norm.weight", EMBD)
    attention(t, head=32)
    t.ones("post_attention_norm.weight", EMBD, times=2)
    feed_forward(t)
    t.ones("post_ffw_norm.weight", EMBD, times=2)


def _gemma3(t: Tensors, layer: int) -> None:
    _gemma2(t, layer)
    _qk_norms(t, 32)


def _mamba_block(t: Tensors, *, norms: bool) -> None:
    inner, state, rank = 2 * EMBD, 8, 4
    t.ones("attn_norm.weight", EMBD)
    t.matrix("ssm_in.weight", EMBD, 2 * inner)
    t.matrix("ssm_conv1d.weight", 4, inner)
    t.vector("ssm_conv1d.bias", inner)
    t.matrix("ssm_x.weight", inner, rank + 2 * state)
    t.matrix("ssm_dt.weight", rank, inner)
    t.vector("ssm_dt.bias", inner, gain=1)
    t.decay("ssm_a", state, inner)
    t.vector("ssm_d", inner, gain=1)
    t.matrix("ssm_out.weight", inner, EMBD, gain=2)
    for name, size in (("dt", rank), ("b", state), ("c", state)) if norms else ():
        t.ones(f"ssm_{name}_norm.weight", size)


def _mamba(t: Tensors, _layer: int) -> None:
    _mamba_block(t, norms=False)


def _jamba(t: Tensors, layer: int) -> None:
    if layer % 2:
        t.ones("attn_norm.weight", EMBD)
        attention(t)
    else:
        _mamba_block(t, norms=True)
    feed_forward(t)


def _lfm2(t: Tensors, layer: int) -> None:
    t.ones("attn_norm.weight", EMBD)
    if layer % 2:
        attention(t)
        _qk_norms(t, EMBD // HEADS)
    else:
        t.matrix("shortconv.conv.weight", 3, EMBD)
        t.matrix("shortconv.in_proj.weight", EMBD, 3 * EMBD)
        t.matrix("shortconv.out_proj.weight", EMBD, EMBD, gain=2)
    feed_forward(t)


@dataclass(frozen=True)
class Tiny:
    """An architecture: a layer's tensors, and the metadata beside what all have.

    Attributes:
        keys: Without the architecture's name in front.
        output_norm: What the last norm is called.
        scales_embeddings: Whether the library multiplies embeddings by the root of their size.
        is_tied: Whether scores are made by the matrix of the embeddings.
    """

    layer: Callable[[Tensors, int], None]
    keys: Mapping[str, int | float | Sequence[int]] = field(default_factory=dict[str, int | float | Sequence[int]])
    output_norm: str = "output_norm"
    scales_embeddings: bool = False
    is_tied: bool = False


_WIDE_HEADS = {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32}
_SSM = {"ssm.conv_kernel": 4, "ssm.inner_size": 2 * EMBD, "ssm.state_size": 8, "ssm.time_step_rank": 4}
_EVERY_SECOND = {"attention.head_count_kv": [0, KV_HEADS, 0, KV_HEADS]}
_SLIDING = {"attention.sliding_window": WINDOW, "attention.sliding_window_pattern": 2}
TINY: Mapping[str, Tiny] = {
    "qwen2": Tiny(_qwen2),
    "phi3": Tiny(_phi3),
    "qwen3moe": Tiny(
        _qwen3moe, {**_WIDE_HEADS, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": FFN}
    ),
    "gemma2": Tiny(_gemma2, {**_WIDE_HEADS, **_SLIDING}, scales_embeddings=True, is_tied=True),
    "gemma3": Tiny(_gemma3, {**_WIDE_HEADS, **_SLIDING}, scales_embeddings=True),
    "mamba": Tiny(_mamba, _SSM),
    "jamba": Tiny(_jamba, {**_SSM, **_EVERY_SECOND}),
    "lfm2": Tiny(_lfm2, {**_EVERY_SECOND, "shortconv.l_cache": 3}, output_norm="token_embd_norm"),
}


def make_tiny(path: Path, architecture: str, *, fills_in: bool = False, split_tensors: int = 0) -> Path:
    """Write a model of four layers."""
    tiny = TINY[architecture]
    writer: Any = gguf.GGUFWriter(str(path), architecture, split_max_tensors=split_tensors)
    keys: dict[str, int | float | Sequence[int]] = {
        "context_length": CONTEXT, "embedding_length": EMBD, "block_count": 4, "feed_forward_length": FFN,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": EMBD // HEADS, "rope.freq_base": 1e4,
        **tiny.keys,
    }  # fmt: skip
    for name, value in keys.items():
        add = writer.add_array
        if isinstance(value, int | float):
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{architecture}.{name}", value)
    _add_vocabulary(writer, fills_in=fills_in)
    tensors = Tensors(writer, seed=7)
    tensors.vector("token_embd.weight", EMBD, VOCABULARY, gain=EMBD**-0.5 if tiny.scales_embeddings else 1)
    tensors.ones(f"{tiny.output_norm}.weight", EMBD, times=8 if tiny.is_tied else 1)
    if not tiny.is_tied:
        tensors.matrix("output.weight", EMBD, VOCABULARY, gain=8)
    for layer in range(4):
        tensors.prefix = f"blk.{layer}."
        tiny.layer(tensors, layer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
