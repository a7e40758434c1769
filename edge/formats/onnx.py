"""A strict, bounded reader of ONNX: what a loader believes is checked, and no weight is read.

Format: onnx/onnx.proto of ONNX 1.23 (IR version 13). Where protobuf would merge two fields, or let the last of them
win, the file is refused, so that onnxruntime sees the model that was checked. Operators that bring code of their own
are refused, and paths of weights that lead out of the model's directory.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from edge.errors import InvalidModelFile

from .protobuf import BYTES, I32, I64, VARINT, Field, MessageReader, Span

MAX_FILE_BYTES = (1 << 31) - 1
"""Protobuf's own bound for a message; what is larger keeps its weights in files beside."""
MAX_FIELDS = 1 << 19
"""Of the whole file. A decoder of 30 layers as optimum exports it has about 60,000."""
MAX_DEPTH = 16
"""Of graphs in nodes of graphs, and of types in types."""
MAX_DIMENSIONS = 64
MAX_ELEMENTS = 1 << 48
MAX_VERSION = 1000
"""Of the IR and of operator sets; onnxruntime says itself which it knows."""


class DataType(NamedTuple):
    """A type of tensors: its name, the bits of an element, and the field that may hold values instead of raw data."""

    name: str
    bits: int
    field: int


_RAW, _FLOATS, _INT32S, _STRINGS, _INT64S, _DOUBLES, _UINT64S = 9, 4, 5, 6, 7, 10, 11
_VALUES = (_RAW, _FLOATS, _INT32S, _STRINGS, _INT64S, _DOUBLES, _UINT64S)
# TensorProto.DataType, and which field holds which type, as the comments of onnx.proto say.
DATA_TYPES: Mapping[int, DataType] = {
    1: DataType("FLOAT", 32, _FLOATS), 2: DataType("UINT8", 8, _INT32S), 3: DataType("INT8", 8, _INT32S),
    4: DataType("UINT16", 16, _INT32S), 5: DataType("INT16", 16, _INT32S), 6: DataType("INT32", 32, _INT32S),
    7: DataType("INT64", 64, _INT64S), 8: DataType("STRING", 0, _STRINGS), 9: DataType("BOOL", 8, _INT32S),
    10: DataType("FLOAT16", 16, _INT32S), 11: DataType("DOUBLE", 64, _DOUBLES), 12: DataType("UINT32", 32, _UINT64S),
    13: DataType("UINT64", 64, _UINT64S), 14: DataType("COMPLEX64", 64, _FLOATS),
    15: DataType("COMPLEX128", 128, _DOUBLES), 16: DataType("BFLOAT16", 16, _INT32S),
    17: DataType("FLOAT8E4M3FN", 8, _INT32S), 18: DataType("FLOAT8E4M3FNUZ", 8, _INT32S),
    19: DataType("FLOAT8E5M2", 8, _INT32S), 20: DataType("FLOAT8E5M2FNUZ", 8, _INT32S),
    21: DataType("UINT4", 4, _INT32S), 22: DataType("INT4", 4, _INT32S), 23: DataType("FLOAT4E2M1", 4, _INT32S),
    24: DataType("FLOAT8E8M0", 8, _INT32S), 25: DataType("UINT2", 2, _INT32S), 26: DataType("INT2", 2, _INT32S),
}  # fmt: skip

DOMAINS = frozenset({"", "ai.onnx.ml", "com.microsoft"})
"""Operators that onnxruntime brings. Others would need a library of the model's makers."""
_REFUSED_OPERATORS = frozenset({"EPContext", "PythonOp", "PythonOpGrad", "ATen"})
"""Of com.microsoft: they load compiled code from a path, or call Python."""
_MEMORY_ADDRESS = "_ORT_MEM_ADDR_"
"""Part of the location for which onnxruntime takes a tensor's offset as an address in memory (tensorprotoutils.h)."""


@dataclass(frozen=True, slots=True)
class OnnxData:
    """Where the bytes of a tensor lie that are in another file."""

    location: str
    """The file's path from the model's directory; it does not lead out of that."""
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class OnnxTensor:
    """A tensor with values."""

    name: str
    type: str
    """As ``FLOAT16``."""
    shape: tuple[int, ...]
    size_bytes: int
    """Zero for texts, whose size does not follow from the shape."""
    external: OnnxData | None


@dataclass(frozen=True, slots=True)
class OnnxValue:
    """An input or output of the model."""

    name: str
    type: str
    """As ``INT64``; empty for what is no tensor."""
    shape: tuple[int | str, ...]
    """A text is a dimension that each run decides: its name, or empty."""


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """What an ONNX file says of its model, checked."""

    path: Path
    ir_version: int
    opsets: Mapping[str, int]
    """Version by domain; the empty domain is ONNX's own."""
    inputs: tuple[OnnxValue, ...]
    outputs: tuple[OnnxValue, ...]
    initializers: tuple[OnnxTensor, ...]
    """Of the main graph."""
    num_nodes: int
    """In all graphs and functions."""
    external: tuple[OnnxData, ...]
    """Of all tensors, wherever in the model."""
    size: int
    """Of the file, in bytes."""


class _Kind(NamedTuple):
    wires: tuple[int, ...]
    is_repeated: bool


_ONE, _SOME = _Kind((BYTES,), False), _Kind((BYTES,), True)  # texts, bytes and messages
_NUMBER, _NUMBERS, _REAL = _Kind((VARINT,), False), _Kind((VARINT, BYTES), True), _Kind((I32,), False)
_FIELDS: Mapping[str, Mapping[int, _Kind]] = {
    "model": {1: _NUMBER, 2: _ONE, 3: _ONE, 4: _ONE, 5: _NUMBER, 6: _ONE, 7: _ONE, 8: _SOME, 14: _SOME, 20: _SOME,
              25: _SOME, 26: _SOME},
    "opset": {1: _ONE, 2: _NUMBER},
    "pair": {1: _ONE, 2: _ONE},
    "graph": {1: _SOME, 2: _ONE, 5: _SOME, 10: _ONE, 11: _SOME, 12: _SOME, 13: _SOME, 14: _SOME, 15: _SOME, 16: _SOME},
    "function": {1: _ONE, 4: _SOME, 5: _SOME, 6: _SOME, 7: _SOME, 8: _ONE, 9: _SOME, 10: _ONE, 11: _SOME, 12: _SOME,
                 13: _ONE, 14: _SOME},
    "node": {1: _SOME, 2: _SOME, 3: _ONE, 4: _ONE, 5: _SOME, 6: _ONE, 7: _ONE, 8: _ONE, 9: _SOME, 10: _SOME},
    "attribute": {1: _ONE, 2: _REAL, 3: _NUMBER, 4: _ONE, 5: _ONE, 6: _ONE, 7: _Kind((I32, BYTES), True), 8: _NUMBERS,
                  9: _SOME, 10: _SOME, 11: _SOME, 13: _ONE, 14: _ONE, 15: _SOME, 20: _NUMBER, 21: _ONE, 22: _ONE,
                  23: _SOME},
    "tensor": {1: _NUMBERS, 2: _NUMBER, 3: _ONE, _FLOATS: _Kind((I32, BYTES), True), _INT32S: _NUMBERS,
               _STRINGS: _SOME, _INT64S: _NUMBERS, 8: _ONE, _RAW: _ONE, _DOUBLES: _Kind((I64, BYTES), True),
               _UINT64S: _NUMBERS, 12: _ONE, 13: _SOME, 14: _NUMBER, 16: _SOME},
    "sparse tensor": {1: _ONE, 2: _ONE, 3: _NUMBERS},
    "value": {1: _ONE, 2: _ONE, 3: _ONE, 4: _SOME},
    "type": {1: _ONE, 4: _ONE, 5: _ONE, 6: _ONE, 7: _ONE, 8: _ONE, 9: _ONE},
    "tensor type": {1: _NUMBER, 2: _ONE},
    "element type": {1: _ONE},
    "map type": {1: _NUMBER, 2: _ONE},
    "shape": {1: _SOME},
    "dimension": {1: _NUMBER, 2: _ONE, 3: _ONE},
}  # fmt: skip
"""The messages of onnx.proto, by the numbers of their fields. Fields of later versions are passed over, as protobuf
does."""
_Members = dict[int, list[Field]]


def read_onnx(path: Path, *, what: str | None = None) -> OnnxFile:
    """Read and check a model: its opsets, operators and types, and that each tensor has the bytes of its shape.

    Args:
        what: What to call the file in an error; its name by default.

    Raises:
        InvalidModelFile: The file is missing, cut short, damaged, or no ONNX; the error has the reason.
    """
    what = what or path.name
    try:
        with path.open("rb") as file:
            model = _Model(MessageReader(file, what, max_fields=MAX_FIELDS))
            return model.read(path)
    except OSError as e:
        raise InvalidModelFile(what, f"it cannot be read ({e.strerror or e})") from e


class _Model:
    """A model on its way through the reader, and what was seen of it so far."""

    def __init__(self, reader: MessageReader) -> None:
        self._reader = reader
        self._fail = reader.fail
        self._num_nodes = 0
        self._domains: set[str] = set()
        self._external: list[OnnxData] = []

    def read(self, path: Path) -> OnnxFile:
        size = self._reader.size
        if not 0 < size <= MAX_FILE_BYTES:
            raise self._fail(f"it has {size:,} bytes; a file in protobuf has {MAX_FILE_BYTES:,} at most")
        members = self._members("model", Span(0, size))
        ir_version = self._number(members, 1)
        if not 1 <= ir_version <= MAX_VERSION or 7 not in members:
            raise self._fail("it is no ONNX model: the version of its format, or its graph, is missing")
        if 20 in members:
            raise self._fail("it says how it is to be trained")
        opsets = self._opsets(members.get(8, []))
        own = {self._function(field.span) for field in members.get(25, [])}
        self._pairs(members.get(14, []))
        graph = self._members("graph", members[7][0].span)
        initializers = self._graph(graph, depth=0)
        self._check_domains(opsets, own)
        inputs, outputs = ([self._value(field.span) for field in graph.get(number, [])] for number in (11, 12))
        if not outputs:
            raise self._fail("its graph has no output")
        return OnnxFile(
            path, ir_version, opsets, tuple(inputs), tuple(outputs), tuple(initializers), self._num_nodes,
            tuple(self._external), size,
        )  # fmt: skip

    # ---- the fields of one message

    def _members(self, kind: str, span: Span) -> _Members:
        members: _Members = {}
        known = _FIELDS[kind]
        for field in self._reader.fields(span):
            if (expected := known.get(field.number)) is None:
                continue
            if field.wire not in expected.wires:
                raise self._fail(f"field {field.number} of a {kind} has the wire type {field.wire}")
            if field.number in members and not expected.is_repeated:
                raise self._fail(f"field {field.number} of a {kind} stands there twice (at byte {field.span.start:,})")
            members.setdefault(field.number, []).append(field)
        return members

    def _number(self, members: _Members, number: int) -> int:
        return members[number][0].value if number in members else 0

    def _numbers(self, members: _Members, number: int) -> Iterator[int]:
        for field in members.get(number, []):
            if field.wire == VARINT:
                yield field.value
            else:
                yield from self._reader.varints(field.span)

    def _text(self, members: _Members, number: int) -> str:
        text = self._reader.text(members[number][0].span) if number in members else ""
        if not text.isprintable():
            raise self._fail(f"the text {text[:60]!r} is not printable")
        return text

    def _pairs(self, fields: list[Field]) -> Mapping[str, bytes]:
        found: dict[str, bytes] = {}
        for field in fields:
            pair = self._members("pair", field.span)
            key = self._text(pair, 1)
            if key in found:
                raise self._fail(f"the key '{key[:60]}' stands there twice")
            found[key] = self._reader.read(pair[2][0].span, limit=1 << 20) if 2 in pair else b""
        return found

    # ---- operators

    def _opsets(self, fields: list[Field]) -> Mapping[str, int]:
        found: dict[str, int] = {}
        for field in fields:
            members = self._members("opset", field.span)
            domain, version = self._domain(members, 1), self._number(members, 2)
            if domain in found or not 1 <= version <= MAX_VERSION:
                raise self._fail(f"it asks for the operators '{domain[:60]}' twice, or in version {version}")
            found[domain] = version
        if not found:
            raise self._fail("it does not say which operators it is made of")
        return found

    def _domain(self, members: _Members, number: int) -> str:
        domain = self._text(members, number)
        return "" if domain == "ai.onnx" else domain

    def _check_domains(self, opsets: Mapping[str, int], own: set[str]) -> None:
        for domain in sorted(self._domains - own):
            if domain not in DOMAINS or domain not in opsets:
                raise self._fail(f"it needs the operators '{domain[:60]}', which this appliance does not have")

    def _function(self, span: Span) -> str:
        """Check a function and give the domain that it belongs to."""
        members = self._members("function", span)
        if not self._text(members, 1):
            raise self._fail("a function has no name")
        self._opsets(members.get(9, []))
        self._pairs(members.get(14, []))
        for field in members.get(11, []):
            self._attribute(field.span, depth=1)
        for field in members.get(12, []):
            self._value(field.span)
        for field in members.get(7, []):
            self._node(field.span, depth=1)
        return self._domain(members, 10)

    def _graph(self, members: _Members, *, depth: int) -> list[OnnxTensor]:
        """Check a graph and give its initializers."""
        if depth > MAX_DEPTH:
            raise self._fail(f"its graphs are nested deeper than {MAX_DEPTH}")
        self._pairs(members.get(16, []))
        for number in (11, 12, 13):
            for field in members.get(number, []):
                self._value(field.span)
        for field in members.get(1, []):
            self._node(field.span, depth=depth)
        tensors = [self._tensor(field.span) for field in members.get(5, [])]
        names = [tensor.name for tensor in tensors] + [self._sparse(field.span) for field in members.get(15, [])]
        if len(set(names)) != len(names) or "" in names:
            raise self._fail("two initializers have the same name, or one has none")
        return tensors

    def _node(self, span: Span, *, depth: int) -> None:
        self._num_nodes += 1
        members = self._members("node", span)
        operator = self._text(members, 4)
        if not operator or operator in _REFUSED_OPERATORS:
            raise self._fail(f"the operator '{operator}' brings code of its own" if operator else "a node has none")
        self._domains.add(self._domain(members, 7))
        for number in (1, 2):
            for field in members.get(number, []):
                self._reader.text(field.span)
        names = {self._attribute(field.span, depth=depth) for field in members.get(5, [])}
        if len(names) != len(members.get(5, [])):
            raise self._fail(f"a node '{operator[:60]}' has two attributes of the same name")

    def _attribute(self, span: Span, *, depth: int) -> str:
        """Check an attribute and give its name."""
        members = self._members("attribute", span)
        for field in members.get(5, []) + members.get(10, []):
            self._tensor(field.span)
        for field in members.get(22, []) + members.get(23, []):
            self._sparse(field.span)
        for field in members.get(14, []) + members.get(15, []):
            self._type(field.span, depth=0)
        for field in members.get(6, []) + members.get(11, []):
            self._graph(self._members("graph", field.span), depth=depth + 1)
        if not (name := self._text(members, 1)):
            raise self._fail("an attribute has no name")
        return name

    # ---- types

    def _value(self, span: Span) -> OnnxValue:
        members = self._members("value", span)
        if not (name := self._text(members, 1)):
            raise self._fail("a value of a graph has no name")
        self._pairs(members.get(4, []))
        kind, shape = self._type(members[2][0].span, depth=0) if 2 in members else ("", ())
        return OnnxValue(name, kind, shape)

    def _type(self, span: Span, *, depth: int) -> tuple[str, tuple[int | str, ...]]:
        """A type's name and shape, where it is one of a tensor."""
        if depth > MAX_DEPTH:
            raise self._fail(f"its types are nested deeper than {MAX_DEPTH}")
        members = self._members("type", span)
        for number, kind, inner in ((4, "element type", 1), (9, "element type", 1), (5, "map type", 2)):
            for field in members.get(number, []):
                for element in self._members(kind, field.span).get(inner, []):
                    self._type(element.span, depth=depth + 1)
        found = [self._tensor_type(field.span) for number in (8, 1) for field in members.get(number, [])]
        return found[0] if len(found) == 1 and 1 in members else ("", ())

    def _tensor_type(self, span: Span) -> tuple[str, tuple[int | str, ...]]:
        members = self._members("tensor type", span)
        code = self._number(members, 1)
        if code not in DATA_TYPES:
            raise self._fail(f"a value has the unknown type {code}")
        shape = self._members("shape", members[2][0].span).get(1, []) if 2 in members else []
        if len(shape) > MAX_DIMENSIONS:
            raise self._fail(f"a value has {len(shape):,} dimensions")
        return DATA_TYPES[code].name, tuple(self._dimension(field.span) for field in shape)

    def _dimension(self, span: Span) -> int | str:
        members = self._members("dimension", span)
        if 1 not in members or self._number(members, 1) >> 63:  # older exporters write -1 for what is not known
            return self._text(members, 2)
        if (size := self._number(members, 1)) > MAX_ELEMENTS:
            raise self._fail(f"a value has a dimension of {size:,}")
        return size

    # ---- tensors

    def _sparse(self, span: Span) -> str:
        """Check a sparse tensor and give its name, which is that of its values."""
        members = self._members("sparse tensor", span)
        if 1 not in members or 2 not in members:
            raise self._fail("a sparse tensor lacks its values or their places")
        values, indices = (self._tensor(members[number][0].span) for number in (1, 2))
        shape = self._shape(members, 3)
        if len(shape) > MAX_DIMENSIONS or math.prod(shape) > MAX_ELEMENTS or indices.type != "INT64":
            raise self._fail(f"the sparse tensor '{values.name[:60]}' is too large, or its places are no INT64")
        return values.name

    def _shape(self, members: _Members, number: int) -> tuple[int, ...]:
        """No more of a shape than shows that it is too long: the product of millions of numbers takes minutes."""
        return tuple(itertools.islice(self._numbers(members, number), MAX_DIMENSIONS + 1))

    def _tensor(self, span: Span) -> OnnxTensor:
        members = self._members("tensor", span)
        name, shape = self._text(members, 8), self._shape(members, 1)
        num_elements = math.prod(shape) if len(shape) <= MAX_DIMENSIONS else MAX_ELEMENTS + 1
        if num_elements > MAX_ELEMENTS or any(size >> 63 for size in shape):
            raise self._fail(f"tensor '{name[:60]}' has the shape {str(shape)[:80]}")
        if not (kind := DATA_TYPES.get(self._number(members, 2))) or 3 in members:
            raise self._fail(f"tensor '{name[:60]}' has the unknown type {self._number(members, 2)}, or is in segments")
        size_bytes = -(-num_elements * kind.bits // 8)
        is_external = self._number(members, 14) == 1
        if self._number(members, 14) > 1 or is_external != (13 in members) or (is_external and not kind.bits):
            raise self._fail(f"tensor '{name[:60]}' does not say where its data is")
        given = {number: count for number in _VALUES if (count := self._count(members.get(number, [])))}
        has_values = num_elements > 0 and not is_external
        if given != (_expected(kind, num_elements, is_raw=_RAW in members) if has_values else {}):
            raise self._fail(f"tensor '{name[:60]}' has not the bytes of {num_elements:,} {kind.name}")
        data = self._data(self._pairs(members[13]), name, size_bytes) if is_external else None
        return OnnxTensor(name, kind.name, shape, size_bytes, data)

    def _count(self, fields: list[Field]) -> int:
        """How many values these fields of a tensor hold; of raw data, how many bytes."""
        return sum(self._count_of(field) for field in fields)

    def _count_of(self, field: Field) -> int:
        if field.number == _RAW:
            return field.span.size
        if field.number == _STRINGS or field.wire != BYTES:
            return 1
        if field.number in (_FLOATS, _DOUBLES):
            count, rest = divmod(field.span.size, 4 if field.number == _FLOATS else 8)
            if rest:
                raise self._fail(f"the numbers at byte {field.span.start:,} are cut short")
            return count
        return self._reader.count_varints(field.span)

    def _data(self, notes: Mapping[str, bytes], name: str, size_bytes: int) -> OnnxData:
        location = notes.get("location", b"").decode("utf-8", "replace")
        is_path = all(part not in ("", ".", "..") for part in location.split("/")) and location.isprintable()
        if not is_path or len(location) > 1024 or re.search(rf"[\\*:]|{_MEMORY_ADDRESS}", location):
            raise self._fail(f"the data of tensor '{name[:60]}' is said to lie in {location[:80]!r}")
        offset, length = (notes.get(key, b"%d" % default) for key, default in (("offset", 0), ("length", size_bytes)))
        if not re.fullmatch(rb"[0-9]{1,15}", offset) or length != b"%d" % size_bytes:
            raise self._fail(f"the data of tensor '{name[:60]}' is said to be {length[:20]!r} bytes at {offset[:20]!r}")
        data = OnnxData(location, int(offset), size_bytes)
        self._external.append(data)
        return data


def _expected(kind: DataType, num_elements: int, *, is_raw: bool) -> Mapping[int, int]:
    """How many values a tensor's fields have to hold; of raw data, how many bytes."""
    if is_raw:
        return {_RAW: -(-num_elements * kind.bits // 8)}  # texts have no raw form: 0 is never given
    if kind.name.startswith("COMPLEX"):
        return {kind.field: 2 * num_elements}
    per_value = 8 // kind.bits if 0 < kind.bits < 8 else 1
    return {kind.field: -(-num_elements // per_value)}
