"""Kinds of input, and changes to bytes, JSON and protobuf trees that parsers trip over."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tests.edge.onnx_files import Field, Message, varint

NUMBERS = [
    0, 1, 2, 3, 7, 31, 32, 63, 64, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
    1 << 32, 1 << 48, (1 << 53) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
]  # fmt: skip
"""Borders of signed and unsigned numbers, and of our own bounds."""
TEXTS = [
    "", "\0", "..", "../../outside", "/etc/passwd", "a\\..\\b", "\ud800", "\x1b[2J", "a" * 5000, "\U0001f99c" * 300,
    "sha256:" + "0" * 64, "sha256:../../../outside", "-1", "1e999", "NaN", "application/vnd.oci.image.index.v1+json",
]  # fmt: skip
MAX_CPU_S = 1.0
"""For one input."""
OUTSIDE = 99
"""Exit code of a child that would have written outside the store."""


@dataclass(frozen=True)
class Kind:
    """One kind of input."""

    sound: Sequence[bytes]
    """Inputs that are taken."""
    mutate: Callable[[random.Random], bytes]
    feed: Callable[[bytes, Path], bool]
    """Reads an input, which also lies at the path, and gives whether it was taken. May raise `EdgeError`."""
    forks: bool = False
    """Each input is read in a process of its own."""


def mutate_bytes(rng: random.Random, data: bytes, others: Sequence[bytes], *, within: int = 0) -> bytes:
    """One to four changes, mostly in the first `within` bytes, where there is something to misread."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        end = min(within, len(changed)) if within and rng.random() < 0.9 else len(changed)
        at = rng.randrange(end) if end else 0
        _change(rng, changed, at, others)
    return bytes(changed)


def _change(rng: random.Random, changed: bytearray, at: int, others: Sequence[bytes]) -> None:
    length = min(rng.choice([1, 1, 2, 4, 8, 32, 200]), len(changed) - at)
    match rng.randrange(9):
        case 0:
            changed[at : at + 1] = bytes([(changed[at] if at < len(changed) else 0) ^ (1 << rng.randrange(8))])
        case 1:
            changed[at : at + length] = rng.randbytes(length)
        case 2 | 3:
            packed = struct.pack("<Q", rng.choice(NUMBERS))[: rng.choice([1, 2, 4, 8])]
            changed[at : at + len(packed)] = packed
        case 4:
            del changed[at : at + length]
        case 5:
            changed[at:at] = rng.randbytes(length) if rng.random() < 0.5 else changed[at : at + length] * 3
        case 6:
            del changed[at:]
        case 7:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            changed[at : at + length] = other[start : start + length]
        case _:
            text = rng.choice(TEXTS).encode("utf-8", "replace")[:64]
            changed[at : at + len(text)] = text


def mutate_json(rng: random.Random, document: object) -> object:
    """The same document with one to three nodes changed."""
    changed: object = json.loads(json.dumps(document))
    for _ in range(rng.randint(1, 3)):
        changed = _with_changed_node(rng, changed)
    return changed


def _with_changed_node(rng: random.Random, value: object) -> object:
    if isinstance(value, dict) and value and rng.random() < 0.85:
        return _with_changed_member(rng, cast("dict[str, object]", value))
    if isinstance(value, list) and value and rng.random() < 0.85:
        items = cast("list[object]", value)
        at = rng.randrange(len(items))
        if rng.random() < 0.2 and len(json.dumps(items)) < 10_000:
            return items + [items[at]] * rng.choice([1, 5, 300])
        items[at] = _with_changed_node(rng, items[at])
        return items
    return rng.choice([_nested(rng, cast("object", value)), rng.choice(_PLAIN), rng.choice(NUMBERS), rng.choice(TEXTS)])


_DEEP = "(deep)"
"""Stands for lists in lists until the text is made: Python's own writer cannot make so many."""
_PLAIN: Sequence[object] = [None, True, 0.5, -1, 1e308, [], {}, -(1 << 63), -(1 << 70)]


def _with_changed_member(rng: random.Random, members: dict[str, object]) -> dict[str, object]:
    key = rng.choice([*members])
    match rng.randrange(8):
        case 0:
            del members[key]
        case 1:
            members[rng.choice(TEXTS)] = members.pop(key)
        case _:
            members[key] = _with_changed_node(rng, members[key])
    return members


def _nested(rng: random.Random, value: object) -> object:
    if rng.random() < 0.2:
        return _DEEP
    for _ in range(rng.choice([1, 10, 200])):
        value = [value] if rng.random() < 0.9 else {"digest": value}
    return value


def dumped(rng: random.Random, document: object) -> bytes:
    """JSON, now and then as no writer would have it."""
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5, separators=(",", ":"))
    depth = rng.choice([600, 3000, 100_000])
    data = text.replace(f'"{_DEEP}"', "[" * depth + "]" * depth, 3).encode("utf-8", "surrogatepass")
    return mutate_bytes(rng, data, [data]) if rng.random() < 0.2 else data


def mutate_message(rng: random.Random, message: Message) -> Message:
    """The same protobuf message with a field changed, here or further in."""
    if not message:
        return [(rng.randrange(30), rng.choice(NUMBERS))]
    changed = [*message]
    at = rng.randrange(len(changed))
    number, value = changed[at]
    if isinstance(value, list) and rng.random() < 0.8:
        changed[at] = (number, mutate_message(rng, value))
        return changed
    match rng.randrange(7):
        case 0:
            del changed[at]
        case 1:
            changed[at:at] = [changed[at]] * rng.choice([1, 2, 200])
        case 2:
            changed[at] = (rng.choice([0, 1, 2, 5, 7, 9, 13, 14, 99, (1 << 29) - 1]), value)
        case 3:
            changed[at] = (number, rng.choice(changed)[1])
        case 4:
            changed[at] = (number, _wrapped(rng, changed[at]))
        case 5:
            repeated = varint(rng.choice(NUMBERS)) * rng.choice([1, 9])
            changed[at] = (number, rng.choice([rng.choice(NUMBERS), 0.5, repeated]))
        case _:
            random_bytes = rng.randbytes(rng.choice([0, 4, 32, 33]))
            changed[at] = (number, rng.choice([rng.choice(TEXTS).encode("utf-8", "replace"), random_bytes]))
    return changed


def _wrapped(rng: random.Random, field: Field) -> Message:
    nested: Message = [field]
    for _ in range(rng.choice([1, 3, 40])):
        nested = [(rng.choice([1, 2, 4, 5, 6, 9]), nested)]
    return nested
