"""What a GGUF holds, in a form that can stand in a JSON file and be compared entry by entry."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from edge.formats.gguf import read_gguf
from quantize.checkpoint import open_checkpoint
from quantize.gguf.convert import convert

GOLDENS = Path(__file__).parents[1] / "goldens"
LONGEST_ARRAY = 16


def _value(value: object) -> object:
    if isinstance(value, list) and len(value) > LONGEST_ARRAY:  # pyright: ignore[reportUnknownArgumentType]  # only counted
        text = json.dumps(value, ensure_ascii=True)
        return {"items": len(value), "sha256": hashlib.sha256(text.encode()).hexdigest()}  # pyright: ignore[reportUnknownArgumentType]  # only counted
    return value  # pyright: ignore[reportUnknownVariableType]  # goes into JSON as it is


def describe_gguf(path: Path) -> dict[str, Any]:
    """Digest of the file; each tensor's shape, type and digest; the metadata, long arrays as their digest."""
    header, data = read_gguf(path), path.read_bytes()
    return {
        "sha256": hashlib.sha256(data).hexdigest(),
        "tensors": {
            t.name: {
                "shape": list(t.shape),
                "type": t.type,
                "sha256": hashlib.sha256(data[t.offset : t.offset + t.size_bytes]).hexdigest(),
            }
            for t in header.tensors
        },
        "metadata": {key: _value(value) for key, value in header.metadata.items()},
    }


def golden(name: str, precision: str) -> dict[str, Any]:
    """What the library's own converter made of a checkpoint."""
    table: dict[str, Any] = json.loads((GOLDENS / f"convert-{name}.json").read_text())
    return table[precision]


def converted(source: Path, target: Path, precision: str = "f16") -> dict[str, Any]:
    """What ours makes of it."""
    convert(open_checkpoint(source), target, use_f16=precision == "f16")
    return json.loads(json.dumps(describe_gguf(target)))
