"""What is looked at before files become a model: every way into the store leads through here.

Weights are read by our own strict readers before any native loader sees a byte; formats that run code when they are
loaded are refused; chat templates render a conversation in a process that gets little time and memory.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType

import msgspec

from edge.errors import InvalidModelFile
from edge.formats.gguf import read_gguf
from edge.formats.lora import check_finite, is_adapter, read_lora
from edge.formats.onnx import read_onnx
from edge.formats.safetensors import read_safetensors
from edge.formats.template import MAX_TEMPLATE_BYTES, digest_of, fault_of

from .details import TEMPLATE, TEMPLATE_DIGEST
from .files import translated
from .manifest import MAX_DOCUMENT_BYTES, WEIGHT_TYPE, decode

MAX_TEMPLATES = 16
"""Of one package; each takes a process to check."""
_HEAD_BYTES = 64 << 10
_CODE_SUFFIXES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".h5"})
"""Names under which pickles go about, and archives of them."""
_CALLS = frozenset({"GLOBAL", "STACK_GLOBAL", "INST"})
"""How a pickle names the Python that it has called."""


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a package that is on its way in."""

    name: str
    """Its path in the package; may be empty."""
    path: Path
    """Where its bytes are now."""
    media_type: str = ""

    @property
    def what(self) -> str:
        """What to call it in an error."""
        return self.name or self.path.name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix.lower()


_SPLIT_NAME = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")
"""How llama.cpp names the files of a model in several (gguf-split)."""


class _NamedTemplate(msgspec.Struct):
    template: str


class _TokenizerConfig(msgspec.Struct):
    chat_template: str | list[_NamedTemplate] | None = None

    def templates(self) -> list[str]:
        found = self.chat_template or []
        return [found] if isinstance(found, str) else [named.template for named in found]


def scan(path: Path, name: str) -> None:
    """Check one file that is to become a model's.

    Raises:
        InvalidModelFile: It breaks its format, can run code, or leads out of its package; the error says how.
        UnsupportedFormat: It is an adapter of a kind that is not served.
        StoreError: It cannot be read.
    """
    scan_package([Part(name, path)])


def scan_package(parts: Sequence[Part], notes: Mapping[str, str] = MappingProxyType({})) -> None:
    """Check the files of a package, and what they and its manifest say of each other.

    Args:
        notes: The manifest's annotations: a chat template of its own, and the digest of the one in the weights.

    Raises:
        InvalidModelFile, UnsupportedFormat, StoreError: As `scan`.
    """
    elsewhere = _values_elsewhere(parts)
    _check_values(elsewhere, {part.name: part for part in parts})
    templates = [text for part in parts for text in _scanned(part, is_read_raw=part.name in elsewhere)]
    if (pinned := notes.get(TEMPLATE_DIGEST)) and pinned not in [digest_of(text) for text in templates]:
        raise InvalidModelFile("The chat template", "the weights bring another than the one that the manifest names")
    different = dict.fromkeys([*templates, notes.get(TEMPLATE, "")])
    if len(different) > MAX_TEMPLATES:
        raise InvalidModelFile("The package", f"it has more than {MAX_TEMPLATES} chat templates")
    for text in different:
        check_harmless(text)


def check_harmless(template: str, *, what: str = "The chat template") -> None:
    """Refuse a chat template that does not compile, reaches for Python, or takes too much time or memory.

    Raises:
        InvalidModelFile: It is one; the error says which.
    """
    fault = fault_of(template) if template else None
    if fault and fault.is_harmful:
        raise InvalidModelFile(what, fault.reason)


def _scanned(part: Part, *, is_read_raw: bool) -> list[str]:
    """Check one file and give its chat templates.

    Args:
        is_read_raw: An ONNX file says that it keeps weights in this one. Files of other formats are read all the same.
    """
    head = _head(part)
    if part.suffix == ".gguf" or head.startswith(b"GGUF"):
        return _gguf(part)
    if part.suffix == ".safetensors":
        read_safetensors(part.path, what=part.what)
    elif part.suffix != ".onnx" and not is_read_raw:
        _check_document(part, head)
        return _templates_of(part)
    return []


def _gguf(part: Part) -> list[str]:
    numbered = _SPLIT_NAME.search(part.name)
    file = read_gguf(part.path, what=part.what, is_part=numbered is not None and int(numbered[1]) > 1)
    if is_adapter(file):
        check_finite(read_lora(file, what=part.what), what=part.what)
    template = file.text("tokenizer.chat_template") or ""
    if "\0" in template:
        raise InvalidModelFile(part.what, "its chat template holds a zero byte, at which native code stops to read")
    return [template]


def _check_document(part: Part, head: bytes) -> None:
    """A file that nothing loads: it may be anything but code in the guise of data."""
    if part.suffix in _CODE_SUFFIXES or head.startswith((b"PK\3\4", b"\x93NUMPY", b"\x89HDF")) or _is_pickle(head):
        reason = "pickles, and the archives that hold them, can run code when they are loaded"
        raise InvalidModelFile(part.what, f"{reason}; models come as GGUF, safetensors or ONNX")
    if part.media_type == WEIGHT_TYPE:
        raise InvalidModelFile(part.what, f"its weights are in no format that is read here (they begin {head[:8]!r})")


def _is_pickle(head: bytes) -> bool:
    if head[:1] == b"\x80" and head[1:2] <= b"\5":
        return True
    names: set[str] = set()  # protocols 0 and 1 have no mark: only reading tells them from a text
    try:
        for opcode, _, _ in pickletools.genops(head):
            names.add(opcode.name)
    except (ValueError, IndexError, UnicodeError):
        return False
    return bool(names & _CALLS)


def _templates_of(part: Part) -> list[str]:
    name = PurePosixPath(part.name).name
    if name == "chat_template.jinja":
        return [_whole(part, MAX_TEMPLATE_BYTES).decode("utf-8", "replace")]
    if name != "tokenizer_config.json":
        return []
    return decode(_whole(part, MAX_DOCUMENT_BYTES), _TokenizerConfig, what=part.what).templates()


def _values_elsewhere(parts: Sequence[Part]) -> Mapping[str, int]:
    """Check the ONNX files, and give how long the files beside have to be that they keep weights in."""
    ends: dict[str, int] = {}
    for part in parts:
        for data in read_onnx(part.path, what=part.what).external if part.suffix == ".onnx" else ():
            name = str(PurePosixPath(part.name).parent / data.location)
            ends[name] = max(ends.get(name, 0), data.offset + data.size_bytes)
    return ends


def _check_values(elsewhere: Mapping[str, int], parts: Mapping[str, Part]) -> None:
    for name, needed_bytes in elsewhere.items():
        if name not in parts:
            raise InvalidModelFile(name, "a model has its weights in this file, which is not in the package")
        with translated(parts[name].path, "Looking at"):
            size_bytes = parts[name].path.stat().st_size
        if needed_bytes > size_bytes:
            raise InvalidModelFile(name, f"it is cut short: it has {size_bytes:,} bytes, its model {needed_bytes:,}")


def _head(part: Part) -> bytes:
    with translated(part.path, "Reading"), part.path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def _whole(part: Part, limit: int) -> bytes:
    with translated(part.path, "Reading"), part.path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise InvalidModelFile(part.what, f"it is longer than {limit:,} bytes")
    return data
