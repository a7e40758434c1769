"""A PEFT LoRA directory into an adapter GGUF, for a Llama-family base.

Source: `convert_lora_to_gguf.py` of llama.cpp at the revision inside llama-cpp-python 0.3.36; names, shapes and values
are the same. Where that reads the base's Hugging Face configuration, this reads its GGUF. Rank-stabilised scaling,
which it passes over, goes into alpha.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.errors import AdapterMismatch, InvalidModelFile, UnsupportedFormat
from edge.formats.gguf import GgufFile
from edge.formats.lora import MAX_RANK
from edge.formats.safetensors import read_safetensors
from quantize.checkpoint import DTYPES, CheckpointTensor, load_values, read_json

from .convert import INNER_NAMES, gguf_library, permute_heads

CONFIG_NAME = "adapter_config.json"
_WEIGHTS_NAME = "adapter_model.safetensors"
_TENSOR = re.compile(r"base_model\.model\.(?:model\.layers\.(\d{1,4})\.([a-z_.]+)|(lm_head))\.lora_([AB])\.weight")
Factor = NDArray[np.float32]


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What `adapter_config.json` says that changes the numbers."""

    peft_type: str
    r: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANK)]
    lora_alpha: Annotated[float, msgspec.Meta(ge=0, le=1e6)]
    bias: str | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    lora_bias: bool | None = None
    fan_in_fan_out: bool | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    alora_invocation_tokens: list[int] | None = None

    @property
    def alpha(self) -> float:
        """What llama.cpp is to divide by the rank: with rank-stabilised scaling the divisor is its root."""
        return self.lora_alpha * math.sqrt(self.r) if self.use_rslora else self.lora_alpha

    def unsupported(self) -> str | None:
        """What of it a GGUF adapter cannot say, if anything."""
        found = {
            f"the type {self.peft_type[:40]!r}": self.peft_type.upper() != "LORA",
            "DoRA (use_dora)": self.use_dora,
            f"trained biases (bias: {self.bias})": self.lora_bias or self.bias not in (None, "none"),
            "transposed weights (fan_in_fan_out)": self.fan_in_fan_out,
            "whole modules (modules_to_save)": self.modules_to_save,
            "a scale for each module (alpha_pattern)": self.alpha_pattern,
            "rank_pattern with use_rslora": self.rank_pattern and self.use_rslora,
            "activation by tokens (alora_invocation_tokens)": self.alora_invocation_tokens,
        }
        return next((what for what, asked in found.items() if asked), None)


def is_peft_directory(path: Path) -> bool:
    """Whether a directory holds an adapter as PEFT saves it."""
    return (path / CONFIG_NAME).is_file()


def _read_config(directory: Path) -> LoraConfig:
    try:
        config = msgspec.convert(read_json(directory / CONFIG_NAME), LoraConfig)
    except msgspec.ValidationError as e:
        raise InvalidModelFile(CONFIG_NAME, str(e)) from e
    if what := config.unsupported():
        raise UnsupportedFormat(
            f"{directory.name} uses {what}, which no GGUF adapter has.",
            hint="Merge the adapter into its model with PEFT and quantize that.",
        )
    return config


def _target(name: str) -> tuple[str, str]:
    """The GGUF weight and the side that a tensor of PEFT belongs to.

    Raises:
        UnsupportedFormat: It is no part of a LoRA of this family.
    """
    if found := _TENSOR.fullmatch(name):
        layer, module, outer, side = found.groups()
        if outer:
            return "output.weight", side
        if module.endswith("_proj") and module in INNER_NAMES:
            return f"blk.{layer}.{INNER_NAMES[module]}.weight", side
    raise UnsupportedFormat(
        f"{_WEIGHTS_NAME} holds '{name[:120]}', which is no part of a LoRA of a Llama model.",
        hint="Merge the adapter into its model with PEFT and quantize that.",
    )


def _read_factors(directory: Path) -> dict[str, dict[str, Factor]]:
    """The factors A and B by the weight they change, in the file's order."""
    path = directory / _WEIGHTS_NAME
    if not path.is_file():
        raise UnsupportedFormat(
            f"{directory.name} has no {_WEIGHTS_NAME}.",
            hint="A pickle (adapter_model.bin) is not read: it can run code.",
        )
    factors: dict[str, dict[str, Factor]] = {}
    for stored in sorted(read_safetensors(path).tensors, key=lambda t: t.name):
        target, side = _target(stored.name)
        if stored.dtype not in DTYPES or len(stored.shape) != 2:
            raise UnsupportedFormat(f"'{stored.name}' is of type {stored.dtype} and shape {stored.shape}.")
        factors.setdefault(target, {})[side] = load_values(CheckpointTensor(path, stored)).astype(np.float32)
    if not factors:
        raise InvalidModelFile(_WEIGHTS_NAME, "it changes no weight")
    return factors


def _head_counts(base: GgufFile) -> dict[str, int]:
    """Heads whose rows are reordered, by the weight's name in a block."""
    heads = base.metadata.get("llama.attention.head_count")
    kv_heads = base.metadata.get("llama.attention.head_count_kv", heads)
    if (
        base.architecture != "llama"
        or not isinstance(heads, int)
        or not isinstance(kv_heads, int)
        or not heads * kv_heads
    ):
        raise UnsupportedFormat(
            f"Adapters for '{base.architecture}' models are not converted; for Llama models they are.",
            hint="Convert it with llama.cpp's convert_lora_to_gguf.py and pull the GGUF.",
        )
    return {"attn_q": heads, "attn_k": kv_heads}


def _fitted(name: str, pair: dict[str, Factor], base: GgufFile, *, what: str, base_name: str) -> tuple[Factor, Factor]:
    """Both factors as they are written.

    Raises:
        InvalidModelFile: One is missing.
        AdapterMismatch: The base has no such weight, or of another shape.
    """
    if pair.keys() != {"A", "B"}:
        raise InvalidModelFile(_WEIGHTS_NAME, f"the change of '{name}' lacks a factor")
    a, b = pair["A"], pair["B"]
    shape = next((t.shape for t in base.tensors if t.name == name), None)
    if shape != (a.shape[1], b.shape[0]) or a.shape[0] != b.shape[1]:
        raise AdapterMismatch(what, base_name, f"'{name}' is {shape} there, {a.shape} and {b.shape} here")
    heads = _head_counts(base).get(name.split(".")[2] if name.startswith("blk.") else "")
    return a, permute_heads(b, heads) if heads and b.shape[0] % (2 * heads) == 0 else b


def convert_lora(directory: Path, base: GgufFile, target: Path, *, base_name: str) -> None:
    """Write a PEFT directory as an adapter GGUF for `base`. A half-written file is left for the caller to remove.

    Args:
        base_name: What the file says that it was made for.

    Raises:
        InvalidModelFile: A file breaks its format, or a value is NaN or infinite.
        UnsupportedFormat: It is more than a LoRA, or the base no Llama model.
        AdapterMismatch: It is for another model.
        MissingExtra: The `gguf` package is not installed.
    """
    _head_counts(base)
    config, what = _read_config(directory), directory.absolute().name
    factors = {
        n: _fitted(n, pair, base, what=what, base_name=base_name) for n, pair in _read_factors(directory).items()
    }
    gguf = gguf_library()
    writer: Any = gguf.GGUFWriter(str(target), base.architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, config.alpha)
        writer.add_name(what)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base_name)
        for name, (a, b) in factors.items():
            writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a))
            writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
