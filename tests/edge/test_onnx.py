"""The strict ONNX reader: sound models are read, broken ones refused with the reason, nothing hangs."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import pytest

from edge.errors import InvalidModelFile
from edge.formats.onnx import MAX_FIELDS, OnnxData, OnnxFile, OnnxValue, read_onnx
from tests.edge.onnx_files import (
    FLOAT16,
    INT8,
    INT64,
    TEXT,
    UINT4,
    Field,
    Message,
    Raw,
    encode,
    external,
    graph,
    model,
    node,
    onnx_bytes,
    small_graph,
    tensor,
    value,
    varint,
)


def read(data: bytes, tmp_path: Path) -> OnnxFile:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    return read_onnx(path)


def test_a_sound_model_is_read(tmp_path: Path) -> None:
    found = read(onnx_bytes(), tmp_path)
    assert (found.ir_version, dict(found.opsets)) == (9, {"": 18, "com.microsoft": 1})
    assert found.inputs == (OnnxValue("x", "FLOAT", ("batch", 4)), OnnxValue("flag", "BOOL", ()))
    assert found.outputs == (OnnxValue("out", "FLOAT", ("batch", 2)),)
    assert [(of.name, of.type, of.shape, of.size_bytes) for of in found.initializers] == [
        ("w", "FLOAT", (4, 2), 32),
        ("q", "INT64", (3,), 24),
    ]
    assert (found.num_nodes, found.external, found.size) == (5, (), found.path.stat().st_size)


def test_every_way_to_hold_values_is_read(tmp_path: Path) -> None:
    floats = struct.pack("<2f", 1, 2)
    tensors = [
        tensor("packed", [2], 1, (4, floats)),
        tensor("unpacked", [2], 1, (4, 1.0), (4, 2.0)),
        tensor("complex", [1], 14, (4, floats)),
        tensor("doubles", [1], 11, (10, bytes(8))),
        tensor("halves", [2], FLOAT16, (5, varint(1) + varint(2))),
        tensor("nibbles", [3], UINT4, (9, b"\x12\x03")),
        tensor("typed nibbles", [3], UINT4, (5, varint(0x12) + varint(3))),
        tensor("texts", [2], TEXT, (6, "a"), (6, "b")),
        tensor("unsigned", [1], 13, (11, varint((1 << 64) - 1))),
        tensor("single", [], INT8, (9, b"\x01")),
        tensor("nothing", [0, 4], 1, (9, b"")),
        tensor("packed dimensions", [], 1, (1, varint(2) + varint(1)), (9, bytes(8))),
    ]
    found = read(onnx_bytes(*tensors), tmp_path)
    assert [of.size_bytes for of in found.initializers] == [8, 8, 8, 8, 4, 2, 2, 0, 8, 1, 0, 8]
    assert found.initializers[-1].shape == (2, 1)


def test_values_beside_the_file_are_told(tmp_path: Path) -> None:
    found = read(
        onnx_bytes(tensor("w", [4, 2], 1, *external("weights/model.data", offset="64", length="32"))), tmp_path
    )
    assert found.external == (OnnxData("weights/model.data", 64, 32),)
    assert found.initializers[0].external == found.external[0]


def test_functions_and_fields_of_later_versions_are_passed(tmp_path: Path) -> None:
    function: Message = [
        (1, "Twice"),
        (4, "a"),
        (5, "b"),
        (7, node("Add", ["a", "a"], ["b"])),
        (9, [(2, 18)]),
        (10, "mine"),
    ]
    nodes = [node("Twice", ["x"], ["y"], (7, "mine"))]
    whole = graph(nodes, [], (99, "later"), inputs=[value("x", [-1])], outputs=[value("y", [1])])
    found = read(encode(model(whole, (25, function), opsets=[("ai.onnx", 18), ("mine", 1)])), tmp_path)
    assert (found.num_nodes, found.opsets) == (2, {"": 18, "mine": 1})
    assert found.inputs == (OnnxValue("x", "FLOAT", ("",)),)


def with_tensor(*fields: Field, shape: tuple[int, ...] = (4, 2), code: int = 1) -> bytes:
    return onnx_bytes(tensor("w", shape, code, *fields))


def with_node(*nodes: Message) -> bytes:
    return encode(model(graph([*nodes], [], outputs=[value("y", [1])])))


def nested(depth: int) -> Message:
    inner = graph([], [], outputs=[value("y", [1])])
    for _ in range(depth):
        inner = graph([node("If", ["x"], ["y"], (5, [(1, "then_branch"), (6, inner)]))], [], outputs=[value("y", [1])])
    return inner


def nested_type(depth: int) -> Message:
    inner: Message = [(1, [(1, 1)])]
    for _ in range(depth):
        inner = [(4, [(1, inner)])]
    return inner


HUGE = varint(1 << 62)
REFUSED = {
    "nothing": (b"", "it has 0 bytes"),
    "text": (b"<!DOCTYPE html><html>Not found", "of wire type 4"),
    "no graph": (encode([(1, 9), (8, [(2, 18)])]), "is missing"),
    "no opset": (encode(model(small_graph(), opsets=[])), "which operators"),
    "no output": (encode(model(graph([], []))), "no output"),
    "opset twice": (encode(model(small_graph(), opsets=[("", 18), ("ai.onnx", 19)])), "twice"),
    "opset 0": (encode(model(small_graph(), opsets=[("", 0)])), "version 0"),
    "graph twice": (encode(model(small_graph(), (7, small_graph()))), "field 7 of a model stands there twice"),
    "training": (encode(model(small_graph(), (20, b""))), "trained"),
    "a length past the end": (encode([(1, 9)]) + b"\x3a" + HUGE, "wants 4,611,686,018,427,387,904 bytes"),
    "a number without an end": (b"\x08" + b"\xff" * 11, "has no end"),
    "a group": (b"\x0b\x0c", "wire type 3"),
    "field 0": (b"\x00\x01", "a field 0"),
    "a number as text": (encode([(1, "9")]), "field 1 of a model has the wire type 2"),
    "a graph as number": (encode([(1, 9), (7, 1)]), "field 7 of a model has the wire type 0"),
    "a name that is not UTF-8": (with_node([(4, b"\xff")]), "not UTF-8"),
    "a name with an escape": (with_node(node("\x1b[2J", [], ["y"])), "not printable"),
    "a long name": (with_node(node("x" * 5000, [], ["y"])), "more than 4,096"),
    "no operator": (with_node([(2, "y")]), "a node has none"),
    "unknown operators": (with_node(node("Run", [], ["y"], (7, "evil"))), "'evil', which this appliance does not have"),
    "operators not asked for": (
        encode(model(graph([node("Gelu", [], ["y"], (7, "com.microsoft"))], [], outputs=[value("y", [])]),
                     opsets=[("", 18)])),
        "needs the operators 'com.microsoft'",
    ),
    "compiled code": (with_node(node("EPContext", [], ["y"], (7, "com.microsoft"))), "code of its own"),
    "attributes of one name": (with_node(node("Add", [], ["y"], (5, [(1, "a")]), (5, [(1, "a")]))), "the same name"),
    "graphs in graphs": (encode(model(nested(40))), "nested deeper than 16"),
    "types in types": (
        encode(model(graph([], [], outputs=[[(1, "y"), (2, nested_type(40))]]))), "nested deeper than 16",
    ),
    "initializers of one name": (onnx_bytes(tensor("w", [1]), tensor("w", [1])), "the same name"),
    "an initializer without a name": (onnx_bytes(tensor("", [1])), "has none"),
    "too few values": (with_tensor((9, bytes(31))), "not the bytes of 8 FLOAT"),
    "too many values": (with_tensor((4, bytes(36))), "not the bytes of 8 FLOAT"),
    "values twice": (with_tensor((9, bytes(32)), (4, bytes(32))), "not the bytes"),
    "values in the wrong field": (with_tensor((7, varint(1) * 8)), "not the bytes"),
    "no values": (with_tensor((12, "text")), "not the bytes"),
    "values cut short": (with_tensor((4, bytes(31))), "cut short"),
    "numbers cut short": (with_tensor((7, b"\x80"), shape=(1,), code=INT64), "cut short"),
    "numbers without an end": (with_tensor((7, b"\x80" * 20), shape=(1,), code=INT64), "without an end"),
    "raw texts": (with_tensor((9, b"abc"), shape=(1,), code=TEXT), "not the bytes"),
    "a negative dimension": (with_tensor((9, b""), shape=(-1,)), "has the shape"),
    "sizes that overflow": (with_tensor((9, b""), shape=(1 << 62, 1 << 62)), "has the shape"),
    "many dimensions": (with_tensor((9, bytes(4)), shape=(1,) * 65), "has the shape"),
    "millions of dimensions": (with_tensor((1, b"\x7f" * (4 << 20))), "has the shape"),
    "millions of dimensions of a sparse tensor": (
        encode(model([*small_graph(), (15, [(1, tensor("v", [1], 1, (9, bytes(4)))),
                                            (2, tensor("i", [1], INT64, (9, bytes(8)))), (3, b"\x7f" * (4 << 20))])])),
        "is too large",
    ),
    "unknown type": (with_tensor((9, bytes(32)), code=99), "unknown type 99"),
    "a segment": (with_tensor((9, bytes(32)), (3, b"")), "in segments"),
    "an output of unknown type": (
        encode(model(graph([], [], outputs=[value("y", [1], 77)]))), "a value has the unknown type 77",
    ),
    "a place without the mark": (with_tensor(*external("a.data")[1:]), "where its data is"),
    "the mark without a place": (with_tensor((14, 1)), "where its data is"),
    "values here and there": (with_tensor((9, bytes(32)), *external("a.data")), "not the bytes"),
    "a location twice": (with_tensor(*external("a"), (13, [(1, "location"), (2, "b")])), "twice"),
    "an absolute path": (with_tensor(*external("/etc/shadow")), "said to lie in '/etc/shadow'"),
    "a path that leads out": (with_tensor(*external("a/../../b")), "said to lie in"),
    "a path for another system": (with_tensor(*external("..\\b")), "said to lie in"),
    "no path": (with_tensor(*external("")), "said to lie in ''"),
    "an address in memory": (with_tensor(*external("*/_ORT_MEM_ADDR_/*", offset="4096")), "said to lie in"),
    "a negative offset": (with_tensor(*external("a", offset="-1")), "at b'-1'"),
    "another length": (with_tensor(*external("a", length="33")), "said to be b'33' bytes"),
    "a metadata key twice": (encode(model(small_graph(), (14, [(1, "a")]), (14, [(1, "a")]))), "twice"),
    "a raw tag": (encode([(0, Raw(b"\xff" * 5, b""))]), "has no end"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_broken_models_are_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    data, reason = REFUSED[case]
    with pytest.raises(InvalidModelFile) as caught:
        read(data, tmp_path)
    assert caught.value.what == "model.onnx"
    assert reason in caught.value.reason


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = encode(model(small_graph()))  # the graph comes last, and its length is known
    for length in range(len(data)):
        with pytest.raises(InvalidModelFile):
            read(data[:length], tmp_path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelFile, match="cannot be read"):
        read_onnx(tmp_path / "absent.onnx")


@pytest.mark.parametrize("filler", [b"\x9a\x06\x00", b"\x0a\x00", b"\x3a\x00"])
def test_the_most_fields_that_are_read_take_no_second(filler: bytes, tmp_path: Path) -> None:
    data = encode([(1, 9), (7, [(1, [(5, [(8, b"\0" * MAX_FIELDS)])])])]) + filler * (2 * MAX_FIELDS)
    started = time.process_time()
    with pytest.raises(InvalidModelFile, match=r"more than|twice|wire type"):
        read(data, tmp_path)
    assert time.process_time() - started < 1.5


def test_large_values_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    head = encode([(1, 9), (8, [(2, 18)])])
    size = 1 << 30
    fields: Message = [(1, size // 4), (2, 1), (8, "w")]
    raw = b"\x4a" + varint(size)
    whole = encode(fields) + raw
    output = encode([(12, value("y", [1]))])
    graph_size = len(output) + 1 + len(varint(len(whole) + size)) + len(whole) + size
    with path.open("wb") as file:
        file.write(head + b"\x3a" + varint(graph_size) + output + b"\x2a" + varint(len(whole) + size) + whole)
        file.truncate(file.tell() + size)
    started = time.process_time()
    assert read_onnx(path).initializers[0].size_bytes == size
    assert time.process_time() - started < 0.5


def test_random_mutations(tmp_path: Path) -> None:
    """A short form of the soak run's."""
    rng = random.Random(7)  # repeatable, nothing secret
    base = onnx_bytes()
    refused = 0
    for _ in range(1000):
        mutated = bytearray(base)
        for _ in range(rng.randint(1, 4)):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        try:
            read(bytes(mutated), tmp_path)
        except InvalidModelFile:
            refused += 1
    assert refused > 500
