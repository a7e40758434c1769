"""ONNX files made by hand, whole or broken: trees of protobuf fields, and their bytes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

Field = tuple[int, "int | float | str | bytes | Raw | list[Field]"]
Message = list[Field]

FLOAT, INT8, INT32, INT64, TEXT, BOOL, FLOAT16, UINT4 = 1, 3, 6, 7, 8, 9, 10, 21
OPSETS = (("", 18), ("com.microsoft", 1))


@dataclass(frozen=True)
class Raw:
    """Bytes as they are, with this tag in front of them."""

    tag: bytes
    data: bytes


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    data = bytearray()
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*data, number])


def encode(message: Message) -> bytes:
    """The bytes of a message; ints are varints, floats 32 bits, all else has its length in front."""
    parts: list[bytes] = []
    for number, value in message:
        match value:
            case Raw(tag, data):
                parts.append(tag + data)
            case int():
                parts.append(varint(number << 3) + varint(value))
            case float():
                parts.append(varint(number << 3 | 5) + struct.pack("<f", value))
            case _:
                data = encode(value) if isinstance(value, list) else value.encode() if isinstance(value, str) else value
                parts.append(varint(number << 3 | 2) + varint(len(data)) + data)
    return b"".join(parts)


def tensor(name: str, shape: Sequence[int], code: int = FLOAT, *values: Field) -> Message:
    """A tensor; without `values` it has zeros as raw data, of the right size for 32 bits."""
    size = 4
    for length in shape:
        size *= length
    return [*((1, length) for length in shape), (2, code), (8, name), *(values or ((9, bytes(size)),))]


def external(location: str, *, offset: str | None = None, length: str | None = None) -> tuple[Field, ...]:
    """The fields of a tensor whose values lie in another file."""
    pairs = {"location": location, "offset": offset, "length": length}
    return ((14, 1), *((13, [(1, key), (2, text)]) for key, text in pairs.items() if text is not None))


def value(name: str, shape: Sequence[int | str], code: int = FLOAT) -> Message:
    """An input or output."""
    dimensions: Message = [(1, [(1, length) if isinstance(length, int) else (2, length)]) for length in shape]
    return [(1, name), (2, [(1, [(1, code), (2, dimensions)])])]


def node(operator: str, inputs: Sequence[str], outputs: Sequence[str], *more: Field) -> Message:
    return [*((1, name) for name in inputs), *((2, name) for name in outputs), (4, operator), *more]


def graph(
    nodes: Sequence[Message], tensors: Sequence[Message], *more: Field, inputs: Sequence[Message] = (),
    outputs: Sequence[Message] = (),
) -> Message:  # fmt: skip
    return [
        *((1, one) for one in nodes), (2, "main"), *((5, one) for one in tensors), *((11, one) for one in inputs),
        *((12, one) for one in outputs), *more,
    ]  # fmt: skip


def model(
    graph: Message, *more: Field, opsets: Sequence[tuple[str, int]] = (("", 18), ("com.microsoft", 1))
) -> Message:
    imports: Message = [(8, [(1, domain), (2, version)]) for domain, version in opsets]
    return [(1, 9), (2, "by hand"), *imports, (7, graph), *more]


def small_graph(*tensors: Message) -> Message:
    """A matrix multiplied, a branch with a constant, and an operator of onnxruntime's own."""
    branch = graph([node("Constant", [], ["c"], (5, [(1, "value"), (5, tensor("", [2])), (20, 4)]))], [],
                   outputs=[value("c", [2])])  # fmt: skip
    nodes = [
        node("MatMul", ["x", "w"], ["y"], (3, "multiply")),
        node("If", ["flag"], ["z"], (5, [(1, "then_branch"), (6, branch), (20, 5)]),
             (5, [(1, "else_branch"), (6, branch), (20, 5)])),
        node("MatMulNBits", ["y", "q"], ["out"], (7, "com.microsoft"), (5, [(1, "K"), (3, 64), (20, 2)]),
             (5, [(1, "alpha"), (2, 0.5), (20, 1)]), (5, [(1, "pads"), (8, varint(1) + varint(2)), (20, 7)])),
    ]  # fmt: skip
    given = tensors or (tensor("w", [4, 2]), tensor("q", [3], INT64, (7, varint(1) + varint(-1) + varint(1 << 40))))
    return graph(
        nodes, given, inputs=[value("x", ["batch", 4]), value("flag", [], BOOL)], outputs=[value("out", ["batch", 2])]
    )


def onnx_bytes(*tensors: Message) -> bytes:
    """A sound model; `tensors` take the place of its weights."""
    return encode(model(small_graph(*tensors), (14, [(1, "made"), (2, "by hand")])))
