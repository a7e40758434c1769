"""Small LoRA adapters of random weights, large enough in effect to change greedy answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from edge.formats.gguf import GgufFile

Change = Callable[[str, NDArray[np.float32]], NDArray[Any]]


def make_lora(
    path: Path,
    base: GgufFile,
    *,
    seed: int,
    rank: int = 4,
    strength: float = 0.5,
    targets: tuple[str, ...] = ("attn_q", "attn_v", "ffn_down"),
    architecture: str | None = None,
    change: Change | None = None,
    keys: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write an adapter for these weights of every block of `base`.

    Args:
        change: What becomes of a tensor before it is written; for adapters that are to be refused.
        keys: More metadata, or other.
    """
    rng = np.random.default_rng(seed)
    writer: Any = gguf.GGUFWriter(str(path), architecture or base.architecture)
    for key, value in {"general.type": "adapter", "adapter.type": "lora", **keys}.items():
        writer.add_string(key, value)
    writer.add_float32("adapter.lora.alpha", float(rank))
    for tensor in base.tensors:
        if tensor.name.startswith("blk.") and tensor.name.split(".")[2] in targets:
            columns, rows = tensor.shape
            pair = {"lora_a": rng.standard_normal((rank, columns)) / columns**0.5}
            pair["lora_b"] = rng.standard_normal((rows, rank)) * strength
            for side, values in pair.items():
                name = f"{tensor.name}.{side}"
                narrow = values.astype(np.float32)
                writer.add_tensor(name, np.ascontiguousarray(change(name, narrow) if change else narrow))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
