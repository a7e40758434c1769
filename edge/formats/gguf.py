"""A strict, bounded reader of GGUF: nothing native sees a file before it, and no length in it is believed.

Format: ggml docs/gguf.md, versions 2 and 3. What is accepted is what llama.cpp (ggml/src/gguf.cpp as vendored by
llama-cpp-python 0.3.36) accepts, less what no real model has: tensors must lie one after the other, aligned, and end
where the file ends.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeGuard

from edge.errors import InvalidModelFile

MAX_HEADER_BYTES = 256 << 20
MAX_STRING_BYTES = 8 << 20
MAX_KEY_BYTES = 1024
MAX_KEYS = 8192
MAX_TENSORS = 1 << 16
MAX_ARRAY_ITEMS = 4 << 20
"""Over all arrays of a file. The largest vocabularies shipped (262,144 tokens with merges, scores and types) have
about 1.3 million, of which 0.8 million are texts."""
MAX_ARRAY_TEXTS = 2 << 20
"""Of them; as many take half a second and 130 MB."""
MAX_TENSOR_NAME_BYTES = 63
"""GGML_MAX_NAME of ggml.h, less the closing zero."""
MAX_DIMENSIONS = 4
MAX_ELEMENTS = 1 << 48
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16


@dataclass(frozen=True, slots=True)
class TensorType:
    """A ggml type: its name, and how many bytes a block of elements takes."""

    name: str
    block_elements: int
    block_bytes: int


# ggml_type of ggml.h; sizes as libggml-base of llama-cpp-python 0.3.36 states them (a test asks it).
# 4, 5, 31-33 and 36-38 were removed from the format.
TENSOR_TYPES: Mapping[int, TensorType] = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    9: TensorType("Q8_1", 32, 36),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    15: TensorType("Q8_K", 256, 292),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136),
    24: TensorType("I8", 1, 1),
    25: TensorType("I16", 1, 2),
    26: TensorType("I32", 1, 4),
    27: TensorType("I64", 1, 8),
    28: TensorType("F64", 1, 8),
    29: TensorType("IQ1_M", 256, 56),
    30: TensorType("BF16", 1, 2),
    34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17),
    40: TensorType("NVFP4", 64, 36),
    41: TensorType("Q1_0", 128, 18),
    42: TensorType("Q2_0", 64, 18),
}

# llama_ftype of llama.h: the mixture that a quantizer was asked for.
FILE_TYPES: Mapping[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4",
    40: "Q1_0", 41: "Q2_0",
}  # fmt: skip

GgufScalar = int | float | bool | str
GgufValue = GgufScalar | list[int] | list[float] | list[bool] | list[str]

_STRING, _ARRAY, _BOOL = 8, 9, 7
_ONLY = {"adapter.lora.alpha": 6}
"""Keys that llama.cpp reads as one type and aborts at any other, which a Python value does not show."""
_SCALARS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor's place in the file."""

    name: str
    shape: tuple[int, ...]
    """Elements along each dimension, the fastest-running first (ggml's ``ne``: numpy's shape reversed)."""
    type: str
    """As ``Q4_1``."""
    offset: int
    """Of the first byte, from the start of the file."""
    size_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The checked header of a GGUF file."""

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, GgufValue]
    """Scalars as their Python value, arrays as lists. Array strings that are not UTF-8 (raw byte tokens of old
    vocabularies) hold their bytes as surrogate escapes."""
    tensors: tuple[GgufTensor, ...]
    data_offset: int
    size: int
    """Of the file, in bytes."""

    @property
    def architecture(self) -> str:
        """``general.architecture``, as ``llama``; the reader made sure that it is there."""
        return str(self.metadata["general.architecture"])

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.num_elements for tensor in self.tensors)

    @property
    def context_tokens(self) -> int | None:
        """The context that the model was trained for, where the file states it."""
        value = self.metadata.get(f"{self.architecture}.context_length")
        return value if isinstance(value, int) else None

    @property
    def pooling(self) -> str | None:
        """How the vectors of a text's tokens become its answer, where the model is made for that: ``mean``, ``cls``
        or ``last`` for embeddings, ``rank`` for judging pairs of texts. None for a model that generates text."""
        code = self.metadata.get(f"{self.architecture}.pooling_type")
        if isinstance(code, int) and code in _POOLING:
            return _POOLING[code]
        return "mean" if self.metadata.get(f"{self.architecture}.attention.causal") is False else None

    @property
    def is_projector(self) -> bool:
        """Whether it makes images or sounds readable for a model, and is none itself (``mmproj``)."""
        return self.architecture == "clip"

    @property
    def dominant_type(self) -> str | None:
        """The type that most bytes of the matrices have; None in a file without matrices."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            if len(tensor.shape) > 1:
                sizes[tensor.type] += tensor.size_bytes
        return max(sizes, key=lambda name: (sizes[name], name), default=None)

    @property
    def quantization(self) -> str | None:
        """The mixture that the file names (``general.file_type``) if any of its matrices has that type, else the
        dominant type: names lie, in files and of files."""
        code = self.metadata.get("general.file_type")
        named = FILE_TYPES.get(code) if isinstance(code, int) else None
        kinds = {tensor.type for tensor in self.tensors if len(tensor.shape) > 1}
        if named and any(named == kind or named.startswith(f"{kind}_") or _is_mixture(named, kind) for kind in kinds):
            return named
        return self.dominant_type

    def text(self, key: str) -> str | None:
        """A string of the metadata; None where it is absent, empty or no string."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) and value else None


_POOLING = {1: "mean", 2: "cls", 3: "last", 4: "rank"}
"""`enum llama_pooling_type` of llama.h."""


def _is_mixture(named: str, kind: str) -> bool:
    # Mixtures whose name is no tensor type: IQ2_M is made of IQ2_S, IQ3_M and IQ3_XS of IQ3_S (llama-quant.cpp).
    return named[:4] in ("IQ2_", "IQ3_") and kind.startswith(named[:4])


class _Reader:
    """Reads the header front to back; every read is held against the file's end and the header's budget."""

    def __init__(self, file: BinaryIO, what: str) -> None:
        self._file = file
        self.what = what
        self.size = file.seek(0, 2)
        self.offset = file.seek(0)
        self.array_items = self.array_texts = 0

    def fail(self, reason: str) -> InvalidModelFile:
        return InvalidModelFile(self.what, reason)

    def take(self, num_bytes: int, naming: str) -> bytes:
        end = self.offset + num_bytes
        if end > self.size:
            raise self.fail(
                f"{naming} at byte {self.offset:,} wants {num_bytes:,} bytes and the file ends at {self.size:,}"
            )
        if end > MAX_HEADER_BYTES:
            raise self.fail(f"its header is longer than {MAX_HEADER_BYTES:,} bytes")
        data = self._file.read(num_bytes)
        if len(data) != num_bytes:
            raise self.fail("it became shorter while it was read")
        self.offset = end
        return data

    def u32(self, naming: str) -> int:
        return int.from_bytes(self.take(4, naming), "little")

    def u64(self, naming: str) -> int:
        return int.from_bytes(self.take(8, naming), "little")

    def string_bytes(self, naming: str, limit: int) -> bytes:
        length = self.u64(naming)
        if length > limit:
            raise self.fail(f"{naming} is {length:,} bytes long, more than {limit:,}")
        return self.take(length, naming)

    def string(self, naming: str, limit: int = MAX_STRING_BYTES) -> str:
        try:
            return self.string_bytes(naming, limit).decode("utf-8")
        except UnicodeDecodeError as e:
            raise self.fail(f"{naming} is not UTF-8") from e

    def scalar(self, code: int, naming: str) -> GgufScalar:
        if code == _STRING:
            return self.string(naming)
        if not (fmt := _SCALARS.get(code)):
            raise self.fail(f"{naming} has the unknown type {code}")
        value: int | float = struct.unpack(f"<{fmt}", self.take(struct.calcsize(fmt), naming))[0]
        return self._bool(value, naming) if code == _BOOL else value

    def _bool(self, value: int | float, naming: str) -> bool:
        if value not in (0, 1):
            raise self.fail(f"{naming} is a bool of value {value}")
        return bool(value)

    def array(self, naming: str) -> GgufValue:
        code, count = self.u32(naming), self.u64(naming)
        self.array_items += count
        if self.array_items > MAX_ARRAY_ITEMS:
            raise self.fail(f"{naming} has {count:,} items; a file may have {MAX_ARRAY_ITEMS:,}")
        if code == _STRING:
            return self._strings(count, naming)
        if not (fmt := _SCALARS.get(code)):
            raise self.fail(f"{naming} is an array of the unknown type {code}")
        data = self.take(count * struct.calcsize(fmt), naming)
        values: list[int] = list(struct.unpack(f"<{count}{fmt}", data))
        return [self._bool(value, naming) for value in values] if code == _BOOL else values

    def _strings(self, count: int, naming: str) -> list[str]:
        if count * 8 > self.size - self.offset:
            raise self.fail(f"{naming} has {count:,} strings and the file no room for them")
        self.array_texts += count
        if self.array_texts > MAX_ARRAY_TEXTS:
            raise self.fail(f"{naming} has {count:,} strings; a file may have {MAX_ARRAY_TEXTS:,}")
        read, texts = self._file.read, list[str]()
        end, at = min(self.size, MAX_HEADER_BYTES), self.offset
        for _ in range(count):  # as `string_bytes`, in half the time
            length = int.from_bytes(read(8), "little")
            at += 8 + length
            if length > MAX_STRING_BYTES or at > end:
                raise self.fail(f"{naming} has a string of {length:,} bytes that ends past the file or the bounds")
            texts.append(read(length).decode("utf-8", "surrogateescape"))
        self.offset = at
        return texts

    def value(self, naming: str, *, only: int | None) -> GgufValue:
        code = self.u32(naming)
        if only is not None and code != only:
            raise self.fail(f"{naming} has the type {code} instead of {only}")
        return self.array(naming) if code == _ARRAY else self.scalar(code, naming)


def read_gguf(path: Path, *, what: str | None = None, is_part: bool = False) -> GgufFile:
    """Read and check a file's header, and that its tensors fill the file. Tensor bytes are not read.

    Args:
        what: What to call the file in an error; its name by default.
        is_part: It is a part after the first of a model in several files, which says nothing of the model.

    Raises:
        InvalidModelFile: The file is missing, cut short, damaged, or no GGUF; the error has the reason.
    """
    what = what or path.name
    try:
        with path.open("rb", buffering=1 << 20) as file:
            return _read(_Reader(file, what), path, is_part=is_part)
    except OSError as e:
        raise InvalidModelFile(what, f"it cannot be read ({e.strerror or e})") from e


def _read(reader: _Reader, path: Path, *, is_part: bool) -> GgufFile:
    version, num_tensors, num_keys = _read_preamble(reader)
    metadata = _read_metadata(reader, num_keys)
    if not is_part:
        _check_metadata(reader, metadata)
    elif any(not key.startswith("split.") for key in metadata):
        raise reader.fail("a part after the first says more than its place among the parts")
    alignment = _alignment(reader, metadata)
    infos = [_read_tensor_info(reader, index) for index in range(num_tensors)]
    data_offset = _padded(reader.offset, alignment) if infos else reader.offset
    tensors = _place(reader, infos, data_offset=data_offset, alignment=alignment)
    return GgufFile(path, version, alignment, metadata, tensors, data_offset, reader.size)


def _read_preamble(reader: _Reader) -> tuple[int, int, int]:
    magic = reader.take(4, "the magic")
    if magic != b"GGUF":
        raise reader.fail(f"it is not a GGUF file ({_looks_like(magic)})")
    version = reader.u32("the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        reason = "it is big-endian" if swapped in (2, 3) else f"GGUF version {version} is not supported, 2 and 3 are"
        raise reader.fail(reason)
    num_tensors, num_keys = reader.u64("the number of tensors"), reader.u64("the number of keys")
    if num_tensors > MAX_TENSORS or num_keys > MAX_KEYS:
        raise reader.fail(f"it claims {num_tensors:,} tensors and {num_keys:,} keys")
    return version, num_tensors, num_keys


def _looks_like(magic: bytes) -> str:
    if magic[:2] == b"PK" or magic[:1] == b"\x80":
        return "it looks like a pickled PyTorch checkpoint or a zip archive; those can run code and are never loaded"
    if magic[:1] == b"<":
        return "it looks like a web page"
    if magic in (b"lmgg", b"fmgg", b"tjgg", b"algg"):
        return "it looks like a GGML file from before GGUF"
    return f"it begins with {magic!r}"


def _read_metadata(reader: _Reader, num_keys: int) -> dict[str, GgufValue]:
    metadata: dict[str, GgufValue] = {}
    for index in range(num_keys):
        key = reader.string(f"key {index}", MAX_KEY_BYTES)
        if not key or not key.isascii() or not key.isprintable():
            raise reader.fail(f"key {index} is empty or not printable ASCII")
        if key in metadata:
            raise reader.fail(f"the key '{key}' stands there twice")
        metadata[key] = reader.value(f"'{key}'", only=_ONLY.get(key))
    return metadata


def _alignment(reader: _Reader, metadata: Mapping[str, GgufValue]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    is_power_of_two = type(value) is int and 8 <= value <= MAX_ALIGNMENT and value & (value - 1) == 0
    if not isinstance(value, int) or not is_power_of_two:
        raise reader.fail(f"the alignment {value!r} is no power of two from 8 to {MAX_ALIGNMENT}")
    return value


# Upper bounds a little above what any model of the families served has; llama.cpp allocates by these.
_COUNT_LIMITS = {
    "block_count": 512,  # LLAMA_MAX_LAYERS, at which it aborts
    "embedding_length": 1 << 20,
    "attention.head_count": 1 << 14,
    "attention.key_length": 1 << 16,
    "expert_count": 512,  # LLAMA_MAX_EXPERTS, likewise
    "rope.dimension_count": 1 << 16,
    "context_length": 1 << 31,
    "vocab_size": MAX_ARRAY_ITEMS,
}


def _check_metadata(reader: _Reader, metadata: Mapping[str, GgufValue]) -> None:
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture.isascii() or not architecture.isprintable():
        raise reader.fail("it does not name its architecture (general.architecture)")
    if not 0 < len(architecture) <= 64:
        raise reader.fail("the name of its architecture is empty or too long")
    for key, limit in _COUNT_LIMITS.items():
        value = metadata.get(f"{architecture}.{key}")
        if isinstance(value, int | float | str) and not (type(value) is int and 0 <= value <= limit):
            raise reader.fail(f"'{architecture}.{key}' is {str(value)[:40]}, not a whole number up to {limit:,}")
    _check_arithmetic(reader, {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()})
    _check_vocabulary(reader, metadata)


def _check_arithmetic(reader: _Reader, metadata: Mapping[str, GgufValue]) -> None:
    """Numbers that llama.cpp computes places in memory with, or asserts something of. Keys lack the architecture."""
    rotated, heads = metadata.get("rope.dimension_count"), metadata.get("attention.head_count")
    width = metadata.get("attention.key_length")
    if width is None and isinstance(width := metadata.get("embedding_length"), int) and isinstance(heads, int):
        width //= max(heads, 1)
    if isinstance(rotated, int) and isinstance(width, int) and (rotated % 2 or rotated > width):
        raise reader.fail(f"it rotates {rotated:,} numbers of a head's {width:,}; it has to be an even share of them")
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        if isinstance(epsilon := metadata.get(key), float) and not 0 <= epsilon <= 1:
            raise reader.fail(f"'{key}' is {epsilon}, not a number from 0 to 1")


def _check_vocabulary(reader: _Reader, metadata: Mapping[str, GgufValue]) -> None:
    # llama.cpp once cast these arrays unchecked (its advisories of 2025 and 2026); loaders other than ours still do.
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is not None and not _is_list_of(merges, str):
        raise reader.fail("'tokenizer.ggml.merges' is no array of strings")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        return
    if not _is_list_of(tokens, str):
        raise reader.fail("'tokenizer.ggml.tokens' is no array of strings")
    for key, kind in (("scores", float), ("token_type", int)):
        values = metadata.get(f"tokenizer.ggml.{key}")
        if values is not None and not (_is_list_of(values, kind) and len(values) == len(tokens)):
            raise reader.fail(f"'tokenizer.ggml.{key}' does not fit the {len(tokens):,} tokens")


def _is_list_of(value: GgufValue, kind: type) -> TypeGuard[Sequence[GgufScalar]]:
    return isinstance(value, list) and (not value or type(value[0]) is kind)


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    name: str
    shape: tuple[int, ...]
    type: TensorType
    relative_offset: int
    size_bytes: int


def _read_tensor_info(reader: _Reader, index: int) -> _TensorInfo:
    name = reader.string(f"the name of tensor {index}", MAX_TENSOR_NAME_BYTES)
    if not name or not name.isprintable():
        raise reader.fail(f"tensor {index} has no printable name")
    num_dimensions = reader.u32(f"tensor '{name}'")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise reader.fail(f"tensor '{name}' has {num_dimensions} dimensions")
    shape = tuple(reader.u64(f"tensor '{name}'") for _ in range(num_dimensions))
    code, relative_offset = reader.u32(f"tensor '{name}'"), reader.u64(f"tensor '{name}'")
    num_elements = math.prod(shape)
    if not 0 < num_elements <= MAX_ELEMENTS:
        raise reader.fail(f"tensor '{name}' has the shape {shape}")
    if not (kind := TENSOR_TYPES.get(code)):
        raise reader.fail(f"tensor '{name}' has the unknown type {code}")
    if shape[0] % kind.block_elements:
        raise reader.fail(f"the rows of tensor '{name}' ({shape[0]}) are no multiple of {kind.name}'s block")
    size_bytes = num_elements // kind.block_elements * kind.block_bytes
    return _TensorInfo(name, shape, kind, relative_offset, size_bytes)


def _place(reader: _Reader, infos: list[_TensorInfo], *, data_offset: int, alignment: int) -> tuple[GgufTensor, ...]:
    tensors: list[GgufTensor] = []
    names: set[str] = set()
    expected = 0
    for info in infos:
        if info.name in names:
            raise reader.fail(f"there are two tensors '{info.name}'")
        names.add(info.name)
        if info.relative_offset != expected:
            raise reader.fail(f"tensor '{info.name}' lies at {info.relative_offset:,}, expected {expected:,}")
        offset = data_offset + expected
        if offset + info.size_bytes > reader.size:
            missing = offset + info.size_bytes - reader.size
            raise reader.fail(f"it is cut short: tensor '{info.name}' ends {missing:,} bytes past the end of the file")
        tensors.append(GgufTensor(info.name, info.shape, info.type.name, offset, info.size_bytes))
        expected = _padded(expected + info.size_bytes, alignment)
    if reader.size > data_offset + expected:
        raise reader.fail(f"{reader.size - data_offset - expected:,} bytes follow the last tensor")
    return tuple(tensors)


def _padded(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
