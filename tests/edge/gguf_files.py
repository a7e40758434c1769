"""GGUF files made by hand, whole or broken."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STRING, ARRAY, U32, F32, BOOL, I32 = 8, 9, 4, 6, 7, 5


@dataclass(frozen=True)
class Raw:
    """A metadata value as its type code and bytes, for what no writer would write."""

    code: int
    data: bytes


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def array(code: int, items: Sequence[bytes]) -> Raw:
    return Raw(ARRAY, struct.pack("<IQ", code, len(items)) + b"".join(items))


def strings(items: Sequence[str | bytes]) -> Raw:
    return array(STRING, [string(item) for item in items])


def value(of: object) -> bytes:
    match of:
        case Raw(code, data):
            return struct.pack("<I", code) + data
        case bool():
            return struct.pack("<IB", BOOL, of)
        case int():
            return struct.pack("<II", U32, of)
        case float():
            return struct.pack("<If", F32, of)
        case str():
            return struct.pack("<I", STRING) + string(of)
        case _:
            raise TypeError(of)


@dataclass(frozen=True)
class Tensor:
    """A tensor; `offset` overrides where it says that it lies."""

    name: str
    shape: tuple[int, ...]
    code: int
    size_bytes: int
    offset: int | None = None


METADATA: Mapping[str, object] = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "general.license": "mit",
    "general.file_type": 2,
    "llama.context_length": 512,
    "tokenizer.ggml.tokens": strings(["a", "b", b"\xff"]),
    "tokenizer.ggml.scores": array(F32, [struct.pack("<f", 0.5)] * 3),
    "tokenizer.ggml.token_type": array(I32, [struct.pack("<i", 1)] * 3),
    "tokenizer.ggml.add_bos_token": False,
}
TENSORS = (
    Tensor("token_embd.weight", (64, 3), 2, 3 * 36),
    Tensor("output_norm.weight", (64,), 0, 256),
)


def gguf_bytes(
    metadata: Mapping[str, object] = METADATA,
    tensors: Sequence[Tensor] = TENSORS,
    *,
    version: int = 3,
    alignment: int = 32,
    fill: bytes = b"\x01",
) -> bytes:
    """The bytes of a GGUF file; `fill` makes files of equal shape differ."""
    infos, data = b"", b""
    for tensor in tensors:
        offset = len(data) if tensor.offset is None else tensor.offset
        infos += string(tensor.name) + struct.pack("<I", len(tensor.shape))
        infos += struct.pack(f"<{len(tensor.shape)}QIQ", *tensor.shape, tensor.code, offset)
        data += (fill * tensor.size_bytes)[: tensor.size_bytes]
        data += bytes(-len(data) % alignment)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(string(key) + value(of) for key, of in metadata.items()) + infos
    return head + bytes(-len(head) % alignment if tensors else 0) + data


def sized_gguf(num_rows: int, *, fill: bytes = b"\x01") -> bytes:
    """A sound GGUF of about a quarter KiB a row."""
    tensors = (Tensor("token_embd.weight", (64, num_rows), 0, 256 * num_rows),)
    metadata = {"general.architecture": "llama", "general.file_type": 0, "llama.context_length": 128}
    return gguf_bytes(metadata, tensors, fill=fill)
