"""The strict safetensors reader."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import InvalidModelFile
from edge.formats.safetensors import MAX_HEADER_BYTES, SafetensorsFile, read_safetensors

SOUND: Mapping[str, object] = {
    "__metadata__": {"format": "pt"},
    "b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [8, 20]},
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "scalar": {"dtype": "I64", "shape": [], "data_offsets": [20, 28]},
}


def safetensors_bytes(header: object = SOUND, *, data: bytes = bytes(28)) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def read(data: bytes, tmp_path: Path) -> SafetensorsFile:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    return read_safetensors(path)


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    found = read(safetensors_bytes(), tmp_path)
    assert [(tensor.name, tensor.dtype, tensor.shape, tensor.size_bytes) for tensor in found.tensors] == [
        ("a", "F32", (2,), 8),
        ("b", "BF16", (2, 3), 12),
        ("scalar", "I64", (), 8),
    ]
    start = found.size - 28
    assert [tensor.offset - start for tensor in found.tensors] == [0, 8, 20]
    assert found.metadata == {"format": "pt"}
    assert found.get("a") == found.tensors[0]
    assert found.get("missing") is None


def changed(name: str, **members: object) -> bytes:
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **members}
    return safetensors_bytes({**SOUND, name: {key: of for key, of in tensor.items() if of is not None}})


REFUSED = {
    "short": (b"\x02\0\0\0\0\0\0\0{", "only 9 bytes"),
    "long header": ((1 << 62).to_bytes(8, "little") + b"{}", "claims 4,611,686,018,427,387,904 bytes"),
    "no JSON": (safetensors_bytes(b"{]"), "no JSON"),
    "a list": (safetensors_bytes(b"[1,2]"), "no JSON object"),
    "nested deeply": (safetensors_bytes(b'{"a":' + b"[" * 100_000), "no JSON"),
    "a huge number": (safetensors_bytes(b'{"a":' + b"9" * 10_000 + b"}"), "no JSON"),
    "a name twice": (safetensors_bytes(b'{"a":1,"a":2}'), "twice"),
    "metadata of numbers": (safetensors_bytes({**SOUND, "__metadata__": {"a": 1}}), "more than text"),
    "unknown dtype": (changed("a", dtype="F31"), "dtype F31"),
    "dtype of another type": (changed("a", dtype=["F32"]), "dtype"),
    "another member": (changed("a", extra=1), "not described by"),
    "missing member": (changed("a", dtype=None), "not described by"),
    "negative shape": (changed("a", shape=[-2]), "shape None"),
    "shape of bools": (changed("a", shape=[True, 2]), "shape None"),
    "huge shape": (changed("a", shape=[1 << 62] * 4), "shape"),
    "offsets of another size": (changed("a", data_offsets=[0, 4]), "do not fit its 8 bytes"),
    "offsets backwards": (changed("a", data_offsets=[8, 0]), "do not fit"),
    "overlap": (changed("c", data_offsets=[4, 12]), "overlaps"),
    "gap": (changed("a", shape=[1], data_offsets=[0, 4]), "gap"),
    "cut short": (safetensors_bytes(data=bytes(27)), "is cut short"),
    "more after the end": (safetensors_bytes(data=bytes(29)), "after the last tensor"),
    "a name of control characters": (changed("\n"), "not printable"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_broken_files_are_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    data, reason = REFUSED[case]
    with pytest.raises(InvalidModelFile) as caught:
        read(data, tmp_path)
    assert reason in caught.value.reason


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_mutated_files_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    mutated = bytearray(safetensors_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(mutated)
    try:
        read_safetensors(path)
    except InvalidModelFile:
        return


def test_the_longest_header_of_brackets_is_refused_at_once(tmp_path: Path) -> None:
    filler = b"[]," * ((MAX_HEADER_BYTES - 20) // 3)
    started = time.process_time()
    with pytest.raises(InvalidModelFile, match="more than 65,536 tensors"):
        read(safetensors_bytes(b'{"a":[' + filler + b"[]]}"), tmp_path)
    assert time.process_time() - started < 0.5
