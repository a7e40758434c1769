"""The strict GGUF reader: real files pass, broken ones are refused with the reason, nothing hangs."""

from __future__ import annotations

import ctypes
import importlib.util
import random
import struct
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import InvalidModelFile
from edge.formats.gguf import TENSOR_TYPES, GgufFile, read_gguf
from tests.edge.gguf_files import METADATA, TENSORS, Raw, Tensor, array, gguf_bytes, string, strings, value

SEED = Path(sys.prefix) / "share" / "slm-edge" / "seed"


def read(data: bytes, tmp_path: Path) -> GgufFile:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return read_gguf(path)


def refusal(data: bytes, tmp_path: Path) -> str:
    with pytest.raises(InvalidModelFile) as caught:
        read(data, tmp_path)
    assert caught.value.what == "model.gguf"
    return caught.value.reason


def test_a_sound_file_is_read_whole(tmp_path: Path) -> None:
    gguf = read(gguf_bytes(), tmp_path)
    assert (gguf.architecture, gguf.context_tokens, gguf.quantization) == ("llama", 512, "Q4_0")
    assert gguf.metadata["tokenizer.ggml.tokens"] == ["a", "b", "\udcff"]
    assert gguf.metadata["tokenizer.ggml.scores"] == [0.5] * 3
    assert gguf.metadata["tokenizer.ggml.add_bos_token"] is False
    embedding, norm = gguf.tensors
    assert (embedding.name, embedding.shape, embedding.type, embedding.size_bytes) == (
        "token_embd.weight",
        (64, 3),
        "Q4_0",
        108,
    )
    assert (embedding.offset, norm.offset) == (gguf.data_offset, gguf.data_offset + 128)
    assert gguf.num_parameters == 64 * 3 + 64
    assert gguf.data_offset % 32 == 0
    assert gguf.size == gguf.path.stat().st_size


def test_the_last_tensor_needs_no_padding(tmp_path: Path) -> None:
    tensors = (Tensor("a", (32,), 2, 18),)
    assert read(gguf_bytes(tensors=tensors)[:-14], tmp_path).tensors[0].size_bytes == 18


def test_the_real_model_is_read_in_half_a_second() -> None:
    paths = [path for path in SEED.glob("blobs/sha256/*") if path.stat().st_size > 90_000_000]
    if not paths:
        pytest.skip("the seed model is not there: make setup")
    started = time.process_time()
    gguf = read_gguf(paths[0])
    assert time.process_time() - started < 0.5
    assert (gguf.architecture, gguf.num_parameters, gguf.context_tokens) == ("llama", 134_515_008, 8192)
    assert gguf.quantization == gguf.dominant_type == "Q4_1"
    assert len(gguf.tensors) == 272


def test_type_sizes_are_those_of_the_native_library() -> None:
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.submodule_search_locations
    lib = ctypes.CDLL(str(Path(spec.submodule_search_locations[0]) / "lib" / "libggml-base.so"))
    lib.ggml_type_name.restype = ctypes.c_char_p
    lib.ggml_type_size.restype = ctypes.c_size_t
    lib.ggml_blck_size.restype = ctypes.c_int64
    native = {
        code: (lib.ggml_type_name(code).decode().upper(), lib.ggml_blck_size(code), lib.ggml_type_size(code))
        for code in range(43)
        if lib.ggml_blck_size(code)
    }
    assert native == {code: (of.name, of.block_elements, of.block_bytes) for code, of in TENSOR_TYPES.items()}


def with_key(key: str, of: object) -> bytes:
    return gguf_bytes({**METADATA, key: of})


def with_tensor(tensor: Tensor) -> bytes:
    return gguf_bytes(tensors=(*TENSORS, tensor))


HEADS = {"llama.embedding_length": 64, "llama.attention.head_count": 4}
REFUSED = {
    "pickled": (b"\x80\x02}q\x00" * 10, "pickle"),
    "zip": (b"PK\x03\x04" * 10, "pickle"),
    "web page": (b"<!DOCTYPE html><html>Not found", "web page"),
    "empty": (b"", "the magic at byte 0 wants 4 bytes and the file ends at 0"),
    "version 1": (gguf_bytes(version=1), "version 1 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "claims 1,152,921,504,606,846,976 tensors"),
    "no architecture": (gguf_bytes({"general.name": "x"}), "does not name its architecture"),
    "architecture of another type": (with_key("general.architecture", 3), "does not name its architecture"),
    "key twice": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (string("general.architecture") + value("llama")),
        "stands there twice",
    ),
    "long string": (with_key("x", Raw(8, struct.pack("<Q", 1 << 40))), "more than"),
    "bool of 7": (with_key("x", Raw(7, b"\x07")), "bool of value 7"),
    "unknown value type": (with_key("x", Raw(13, b"")), "unknown type 13"),
    "nested array": (with_key("x", array(9, [])), "array of the unknown type 9"),
    "array too long for the file": (with_key("x", Raw(9, struct.pack("<IQ", 4, 1 << 21))), "wants 8,388,608 bytes"),
    "more strings than bytes": (with_key("x", Raw(9, struct.pack("<IQ", 8, 1 << 21))), "no room for them"),
    "strings past the end": (with_key("x", Raw(9, struct.pack("<IQQ", 8, 1, 9000))), "a string of 9,000 bytes"),
    "too many strings": (
        with_key("x", Raw(9, struct.pack("<IQ", 8, (2 << 20) + 1) + bytes((16 << 20) + 8))),
        "may have 2,097,152",
    ),
    "merges of numbers": (with_key("tokenizer.ggml.merges", array(4, [bytes(4)])), "no array of strings"),
    "more rotated than there is": (
        gguf_bytes(
            {
                **METADATA,
                "llama.embedding_length": 64,
                "llama.attention.head_count": 4,
                "llama.rope.dimension_count": 18,
            }
        ),
        "rotates 18 numbers of a head's 16",
    ),
    "an odd share rotated": (
        gguf_bytes({**METADATA, "llama.attention.key_length": 64, "llama.rope.dimension_count": 7}),
        "even share",
    ),
    "an epsilon below zero": (with_key("llama.attention.layer_norm_rms_epsilon", -1.0), "is -1.0, not a number"),
    "many layers": (with_key("llama.block_count", 513), "whole number up to 512"),
    "too many items": (with_key("x", Raw(9, struct.pack("<IQ", 0, 1 << 40))), "may have 4,194,304"),
    "text that is not UTF-8": (with_key("x", Raw(8, string(b"\xff"))), "not UTF-8"),
    "alignment of 3": (with_key("general.alignment", 3), "no power of two"),
    "negative context": (with_key("llama.context_length", Raw(5, struct.pack("<i", -1))), "is -1"),
    "scores that do not fit": (
        with_key("tokenizer.ggml.scores", array(6, [struct.pack("<f", 0)])),
        "does not fit the 3 tokens",
    ),
    "scores of text": (with_key("tokenizer.ggml.scores", strings(["a", "b", "c"])), "does not fit"),
    "unknown tensor type": (with_tensor(Tensor("x", (32,), 4, 18)), "unknown type 4"),
    "row no multiple of a block": (with_tensor(Tensor("x", (33,), 2, 18)), "no multiple of Q4_0's block"),
    "dimension of zero": (with_tensor(Tensor("x", (32, 0), 2, 0)), "has the shape (32, 0)"),
    "sizes that overflow": (with_tensor(Tensor("x", (1 << 62, 1 << 62), 0, 0)), "has the shape"),
    "five dimensions": (with_tensor(Tensor("x", (1, 1, 1, 1, 1), 0, 4)), "5 dimensions"),
    "tensor twice": (with_tensor(TENSORS[0]), "two tensors 'token_embd.weight'"),
    "long tensor name": (with_tensor(Tensor("x" * 64, (1,), 0, 4)), "64 bytes long"),
    "overlap": (with_tensor(Tensor("x", (1,), 0, 4, offset=0)), "lies at 0, expected 384"),
    "tensor past the end": (gguf_bytes()[:-33], "cut short: tensor 'output_norm.weight' ends 33 bytes past"),
    "more after the end": (gguf_bytes() + b"x", "1 bytes follow the last tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_broken_files_are_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    data, reason = REFUSED[case]
    assert reason in refusal(data, tmp_path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = gguf_bytes(tensors=TENSORS)
    for length in range(len(data) - 1):
        refusal(data[:length], tmp_path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelFile, match="cannot be read"):
        read_gguf(tmp_path / "absent.gguf")


def test_the_quantization_does_not_trust_the_name_in_the_file(tmp_path: Path) -> None:
    assert read(with_key("general.file_type", 15), tmp_path).quantization == "Q4_0"
    assert read(with_key("general.file_type", 9999), tmp_path).quantization == "Q4_0"
    mixed = (Tensor("a", (256, 2), 12, 288), Tensor("b", (32, 400), 6, 8800))
    named = gguf_bytes({**METADATA, "general.file_type": 15}, mixed)
    assert read(named, tmp_path).quantization == "Q4_K_M"
    assert read(named, tmp_path).dominant_type == "Q5_0"


def survives(data: bytes, path: Path) -> bool:
    path.write_bytes(data)
    started = time.process_time()
    try:
        read_gguf(path)
    except InvalidModelFile:
        return False
    finally:
        assert time.process_time() - started < 1.0
    return True


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    survives(data, path)
    survives(b"GGUF" + struct.pack("<I", 3) + data, path)


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_mutated_files_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    mutated = bytearray(gguf_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        insert = data.draw(st.sampled_from([b"\0", b"\xff" * 8, b"\x7f", b"\xff\xff\xff\x7f", b"\x01" + bytes(7)]))
        mutated[at : at + len(insert)] = insert
    survives(bytes(mutated), tmp_path_factory.getbasetemp() / "mutated.gguf")


def test_random_mutations(tmp_path: Path) -> None:
    """A short form of the 100,000 mutations of the soak run."""
    rng = random.Random(7)  # repeatable, nothing secret
    base = gguf_bytes()
    refused = 0
    for _ in range(1500):
        mutated = bytearray(base)
        for _ in range(rng.randint(1, 4)):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        refused += not survives(bytes(mutated[: rng.choice([len(base), rng.randrange(len(base))])]), tmp_path / "m")
    assert refused > 750
