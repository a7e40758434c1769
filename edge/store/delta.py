"""The difference between two weight files, from which a device that has the one rebuilds the other.

A delta file is ``SLMDELTA``, the length of a JSON header (four bytes, little-endian), the header, and one zstd frame
(RFC 8878). The header lists the new file's parts in order. Of a part that the base has too (a tensor of the same name,
type and shape) the frame holds the differences of the bytes modulo 256, the first bytes of all blocks first, then the
second ones, and so on: zeros where nothing changed, and like beside like. That takes half of what exclusive or takes
(measured on Q4_1, whose blocks are two scales and 32 weights). Of any other part it holds the bytes themselves. The
beginning of the base is the frame's dictionary: headers are alike, but shifted.

It travels as a referrer of the new model's manifest, one for each base, so it changes nothing that is signed: what was
rebuilt counts only if it has the digest that the manifest names. Whoever cannot use it fetches the whole file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import msgspec
import zstandard

from edge.errors import DigestMismatch, InvalidModelFile, InvalidReference, UnsupportedFormat
from edge.formats.gguf import TENSOR_TYPES, read_gguf
from edge.formats.safetensors import DTYPE_BITS, read_safetensors

from .blobs import BlobStore, Partial, Staged
from .digest import Digest
from .files import translated
from .manifest import MAX_DOCUMENT_BYTES, OURS, Descriptor, Size, decode, encode
from .models import ModelStore
from .stored import PackageFile, StoredFile, StoredModel
from .transfer import Control, require_room

DELTA_TYPE = "application/vnd.slm-edge.delta.v1"
"""Artifact type of the referrer, and media type of its one layer."""
DELTA_BASE = f"{OURS}delta.base"
"""Annotation of the referrer: the digest of the weight file that one must have."""
DELTA_TARGET = f"{OURS}delta.target"
"""Annotation of the referrer: the digest of the weight file that one gets."""
DELTA_BYTES = f"{OURS}delta.bytes"
"""Annotation of the referrer: how much there is to fetch."""
WORTH_IT = 0.8
"""A delta of more than this share of the whole file is not worth a second way to fail."""

_MAGIC = b"SLMDELTA"
_LENGTH = struct.Struct("<I")
_MAX_PARTS = 1 << 18
_MAX_DICTIONARY_BYTES = 32 << 20
_MAX_WINDOW_LOG = 26
"""64 MiB, the most memory that rebuilding takes: the header of a new file reaches back over all of the base's."""
_LEVEL = 6
"""Of zstd. Higher ones win two in a hundred, or nothing where most weights changed."""
_PIECE_BYTES = 4 << 20
"""How much is held at once, rounded down to whole blocks."""
_MAX_BLOCK_BYTES = 1 << 12
_WHOLE = -1
_BLOCKS = {kind.name: kind.block_bytes for kind in TENSOR_TYPES.values()}


class Part(msgspec.Struct, frozen=True, array_like=True):
    """So many bytes of the new file, and how they are told."""

    size_bytes: Size
    base_offset: Annotated[int, msgspec.Meta(ge=_WHOLE, lt=1 << 53)] = _WHOLE
    """Where their counterpart begins in the base; -1 where there is none."""
    block_bytes: Annotated[int, msgspec.Meta(ge=1, le=_MAX_BLOCK_BYTES)] = 1


class DeltaHeader(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What a delta says of itself; all of it is held against the files."""

    version: Literal[1]
    base: Digest
    base_bytes: Size
    target: Digest
    target_bytes: Size
    dictionary_bytes: Annotated[int, msgspec.Meta(ge=0, le=_MAX_DICTIONARY_BYTES)]
    parts: Annotated[list[Part], msgspec.Meta(max_length=_MAX_PARTS)]


@dataclass(frozen=True, slots=True)
class Delta:
    """A delta that was made and attached."""

    base: Digest
    target: Digest
    size_bytes: int
    target_bytes: int


def attach_delta(store: ModelStore, base: StoredModel, new: StoredModel, control: Control) -> Delta:
    """Make the delta between two models' weights and attach it to the new one, so that it travels with it.

    Raises:
        Cancelled: `control` said so.
        UnsupportedFormat: They have too little in common for a delta to be worth it, or the same weights.
        StoreError: The store cannot be read or written.
    """
    old, file = _weights(base), _weights(new)
    if old.digest == file.digest:
        raise UnsupportedFormat(
            f"{base.ref} and {new.ref} have the same weights.", hint="Who has the one fetches none."
        )
    with store.blobs.ingest(f"delta {old.digest} {file.digest}") as partial:
        try:
            staged = write_delta(old, file, partial, control)
            if staged.size_bytes > WORTH_IT * file.size_bytes:
                raise _not_worth_it(base, new, staged.size_bytes / file.size_bytes)
            package = PackageFile(staged.path, "weights.delta", DELTA_TYPE, move=True, digest=staged.digest)
            notes = {DELTA_BASE: old.digest, DELTA_TARGET: file.digest, DELTA_BYTES: str(staged.size_bytes)}
            store.attach(new.digest, DELTA_TYPE, [package], notes)
        finally:
            partial.discard()
    return Delta(old.digest, file.digest, staged.size_bytes, file.size_bytes)


def _weights(model: StoredModel) -> StoredFile:
    path = model.weights
    return next(file for file in model.files if file.path == path)


def _not_worth_it(base: StoredModel, new: StoredModel, share: float) -> UnsupportedFormat:
    return UnsupportedFormat(
        f"A delta from {base.ref} to {new.ref} would have {100 * share:.0f} % of the whole.",
        hint="Deltas are for new versions of the same model in the same type: see edge show of both.",
    )


def delta_for(layer: Descriptor, referrers: Iterable[Descriptor], blobs: BlobStore) -> Descriptor | None:
    """The smallest delta among what is attached to a manifest that makes this layer of what the store has; None where
    a whole fetch is the better way.

    Args:
        referrers: With their annotations, as registries list them.
    """
    found = [
        (size_bytes, referrer)
        for referrer in referrers
        if referrer.artifact_type == DELTA_TYPE
        and referrer.annotations.get(DELTA_TARGET) == layer.digest
        and (size_bytes := _size_said(referrer)) is not None
        and size_bytes < layer.size
        and _has(blobs, referrer.annotations.get(DELTA_BASE, ""))
    ]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _size_said(referrer: Descriptor) -> int | None:
    text = referrer.annotations.get(DELTA_BYTES, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None


def _has(blobs: BlobStore, digest: str) -> bool:
    try:
        return blobs.has(Digest(digest))
    except InvalidReference:
        return False


@contextmanager
def rebuilt(delta: Path, blobs: BlobStore, layer: Descriptor, control: Control) -> Generator[Staged]:
    """The layer's bytes, made of a delta file and of the base in the store; there for as long as the block runs, or
    until they are published. In constant memory.

    Raises:
        Cancelled: `control` said so.
        InvalidModelFile: The delta is damaged, or it is not for this layer and this store.
        DigestMismatch: What came out is not what the manifest names: the delta or the base is damaged.
        DiskFull: There is no room for the result.
        StoreError: The store cannot be read or written.
    """
    with blobs.ingest(f"rebuild {layer.digest}") as partial:
        try:
            yield _apply(delta, blobs, layer, partial, control)
        finally:
            partial.discard()


def _apply(delta: Path, blobs: BlobStore, layer: Descriptor, partial: Partial, control: Control) -> Staged:
    what = f"The delta to {layer.digest}"
    partial.restart()
    require_room(blobs, layer.size, partial)
    with translated(delta, "Reading"), delta.open("rb") as file:
        header = read_header(file, what=what)
        with _open_base(blobs, header, layer, what) as base:
            for data in _rebuilt_pieces(file, base, header, what):
                control.report(partial.size_bytes, layer.size, "rebuilding from a delta")
                partial.write(data)
    staged = partial.complete()
    if staged.digest != layer.digest:
        raise DigestMismatch(f"{what} makes other bytes", expected=layer.digest, actual=staged.digest)
    return staged


def _open_base(blobs: BlobStore, header: DeltaHeader, layer: Descriptor, what: str) -> BinaryIO:
    if (header.target, header.target_bytes) != (layer.digest, layer.size):
        raise InvalidModelFile(what, "it makes another file")
    path = blobs.path(header.base)
    if not path.is_file() or path.stat().st_size != header.base_bytes:
        raise InvalidModelFile(what, "the file that it starts from is not in the store")
    return path.open("rb")


def read_header(file: BinaryIO, *, what: str) -> DeltaHeader:
    """Read and check a delta's header; the file then stands at the frame.

    Raises:
        InvalidModelFile: It is no delta, or its parts do not make up the file or lie outside the base.
    """
    if file.read(len(_MAGIC)) != _MAGIC or len(length := file.read(_LENGTH.size)) != _LENGTH.size:
        raise InvalidModelFile(what, "it is no delta file")
    (num_bytes,) = _LENGTH.unpack(length)
    if num_bytes > MAX_DOCUMENT_BYTES or len(data := file.read(num_bytes)) != num_bytes:
        raise InvalidModelFile(what, "its header is cut short or too long")
    header = decode(data, DeltaHeader, what=what)
    if sum(part.size_bytes for part in header.parts) != header.target_bytes:
        raise InvalidModelFile(what, "its parts are not as long as the file that it makes")
    ends = [part.base_offset + part.size_bytes for part in header.parts if part.base_offset != _WHOLE]
    if max(ends, default=0) > header.base_bytes or header.dictionary_bytes > header.base_bytes:
        raise InvalidModelFile(what, "it reaches past the end of the file that it starts from")
    return header


def _rebuilt_pieces(file: BinaryIO, base: BinaryIO, header: DeltaHeader, what: str) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor(
        dict_data=_dictionary(base, header.dictionary_bytes), max_window_size=1 << _MAX_WINDOW_LOG
    )
    try:
        with decompressor.stream_reader(file, closefd=False) as frame:
            for part in _pieces(header.parts):
                yield _undone(_exactly(frame, part.size_bytes, what), base, part, what)
    except zstandard.ZstdError as e:
        raise InvalidModelFile(what, f"its frame is damaged ({e})") from e


def _exactly(frame: zstandard.ZstdDecompressionReader, num_bytes: int, what: str) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        if not (more := frame.read(num_bytes - len(data))):
            raise InvalidModelFile(what, "it ends too early")
        data += more
    return bytes(data)


def write_delta(base: StoredFile, new: StoredFile, partial: Partial, control: Control) -> Staged:
    """Write the delta between two stored weight files, in constant memory.

    Raises:
        InvalidModelFile: One of them is no sound GGUF or safetensors file.
        UnsupportedFormat: One of them is of another format, or they have too many tensors.
        StoreError: The disk refuses.
    """
    header = _header_of(base, new)
    document = encode(header)
    if len(document) > MAX_DOCUMENT_BYTES:
        raise UnsupportedFormat(f"{new.name} has too many tensors for a delta.", hint="Ship the whole file.")
    partial.restart()
    partial.write(_MAGIC + _LENGTH.pack(len(document)) + document)
    with translated(new.path, "Reading"), base.path.open("rb") as old, new.path.open("rb") as file:
        frame = _compressor(old, header).compressobj()
        for part in _pieces(header.parts):
            control.report(file.tell(), new.size_bytes, "making the delta")
            partial.write(frame.compress(_difference(file.read(part.size_bytes), old, part, new.name)))
        partial.write(frame.flush())
    return partial.complete()


def _header_of(base: StoredFile, new: StoredFile) -> DeltaHeader:
    old = _tensors(base)
    return DeltaHeader(
        version=1,
        base=base.digest,
        base_bytes=base.size_bytes,
        target=new.digest,
        target_bytes=new.size_bytes,
        dictionary_bytes=min(min((tensor.offset for tensor in old), default=0), _MAX_DICTIONARY_BYTES),
        parts=_parts(old, _tensors(new), new.size_bytes),
    )


@dataclass(frozen=True, slots=True)
class _Tensor:
    kind: tuple[str, str, tuple[int, ...]]
    """Name, type and shape: what it shares with its counterpart."""
    offset: int
    size_bytes: int
    block_bytes: int


def _tensors(file: StoredFile) -> Sequence[_Tensor]:
    """In the order of their bytes."""
    if file.name.endswith(".gguf"):
        gguf = read_gguf(file.path, what=file.name)
        found = [_Tensor((t.name, t.type, t.shape), t.offset, t.size_bytes, _BLOCKS[t.type]) for t in gguf.tensors]
    elif file.name.endswith(".safetensors"):
        tensors = read_safetensors(file.path, what=file.name).tensors
        found = [
            _Tensor((t.name, t.dtype, t.shape), t.offset, t.size_bytes, max(1, DTYPE_BITS[t.dtype] // 8))
            for t in tensors
        ]
    else:
        raise UnsupportedFormat(f"{file.name} is neither GGUF nor safetensors.", hint="Ship the whole file.")
    return sorted(found, key=lambda tensor: tensor.offset)


def _parts(base: Sequence[_Tensor], new: Sequence[_Tensor], size_bytes: int) -> list[Part]:
    offsets = {tensor.kind: tensor.offset for tensor in base}
    parts: list[Part] = []
    at = 0
    for tensor in new:
        _add(parts, Part(tensor.offset - at))
        if (base_offset := offsets.get(tensor.kind)) is None:
            _add(parts, Part(tensor.size_bytes))
        else:
            _add(parts, Part(tensor.size_bytes, base_offset, tensor.block_bytes))
        at = tensor.offset + tensor.size_bytes
    _add(parts, Part(size_bytes - at))
    return parts


def _add(parts: list[Part], part: Part) -> None:
    """Put a part at the end, as more of the last one where it goes on there."""
    if not part.size_bytes:
        return
    last = parts[-1] if parts else Part(0, _WHOLE, 0)
    next_offset = _WHOLE if last.base_offset == _WHOLE else last.base_offset + last.size_bytes
    if (part.base_offset, part.block_bytes) == (next_offset, last.block_bytes):
        parts[-1] = Part(last.size_bytes + part.size_bytes, last.base_offset, last.block_bytes)
    else:
        parts.append(part)


def _pieces(parts: Iterable[Part]) -> Iterator[Part]:
    """The parts, cut where they are longer than what is held in memory at once."""
    for part in parts:
        step = _PIECE_BYTES // part.block_bytes * part.block_bytes
        for start in range(0, part.size_bytes, step):
            base_offset = _WHOLE if part.base_offset == _WHOLE else part.base_offset + start
            yield Part(min(step, part.size_bytes - start), base_offset, part.block_bytes)


def _difference(data: bytes, base: BinaryIO, part: Part, what: str) -> bytes:
    """What the frame holds of a piece of the new file."""
    if part.base_offset == _WHOLE:
        return data
    import numpy as np  # here, because who rebuilds nothing is spared it

    changed = np.frombuffer(data, np.uint8) - np.frombuffer(_counterpart(base, part, what), np.uint8)
    in_blocks = len(data) // part.block_bytes * part.block_bytes
    return changed[:in_blocks].reshape(-1, part.block_bytes).T.tobytes() + changed[in_blocks:].tobytes()


def _undone(data: bytes, base: BinaryIO, part: Part, what: str) -> bytes:
    """The piece of the new file that the frame holds as `data`."""
    if part.base_offset == _WHOLE:
        return data
    import numpy as np

    held = np.frombuffer(data, np.uint8)
    in_blocks = len(data) // part.block_bytes * part.block_bytes
    changed = np.concatenate([held[:in_blocks].reshape(part.block_bytes, -1).T.reshape(-1), held[in_blocks:]])
    return (changed + np.frombuffer(_counterpart(base, part, what), np.uint8)).tobytes()


def _counterpart(base: BinaryIO, part: Part, what: str) -> bytes:
    data = os.pread(base.fileno(), part.size_bytes, part.base_offset)
    if len(data) != part.size_bytes:
        raise InvalidModelFile(what, "the file that it starts from became shorter")
    return data


def _compressor(base: BinaryIO, header: DeltaHeader) -> zstandard.ZstdCompressor:
    own = header.parts[0].size_bytes if header.parts else 0
    window_log = min(max((header.dictionary_bytes + own).bit_length(), 20), _MAX_WINDOW_LOG)
    # Tables as large as the dictionary, else most of it is forgotten before it is compared (250 kB more on the same
    # model). The stub leaves the further parameters untyped.
    tables = min(window_log, 24)
    parameters = zstandard.ZstdCompressionParameters.from_level(  # pyright: ignore[reportUnknownMemberType]
        _LEVEL, window_log=window_log, hash_log=tables, chain_log=tables
    )
    return zstandard.ZstdCompressor(compression_params=parameters, dict_data=_dictionary(base, header.dictionary_bytes))


def _dictionary(base: BinaryIO, num_bytes: int) -> zstandard.ZstdCompressionDict:
    data = os.pread(base.fileno(), num_bytes, 0)
    return zstandard.ZstdCompressionDict(data, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
