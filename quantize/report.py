"""What a quantization cost in quality, and where every figure comes from: the `report.json` of a package."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from edge.formats.gguf import GgufFile
from edge.store.digest import digest_bytes

from .evaluate import Quality, Speed
from .source import FLOAT_TYPES, is_quantized, tensor_types

SCHEMA_VERSION = 1

TEXT_PATH = Path(__file__).parent / "texts" / "report.txt"
TEXT_TITLE = "The Jargon File 4.4.7, macdink to mudhead (public domain)"


def report_text() -> str:
    """The public-domain text that models are judged on; see `texts/README.md`."""
    return TEXT_PATH.read_text("utf-8")


class TextInfo(msgspec.Struct, frozen=True):
    """The text that was read."""

    title: str
    sha256: str
    size_bytes: int


class Machine(msgspec.Struct, frozen=True):
    """Where the speeds were taken."""

    cpu: str
    num_cores: int
    system: str


class TensorInfo(msgspec.Struct, frozen=True):
    """The type that a tensor really got."""

    name: str
    shape: list[int]
    type: str
    size_bytes: int


class SourceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What everything is compared with.

    Attributes:
        kind: ``gguf`` or ``checkpoint``.
        digest: Of the GGUF, or over the checkpoint's files.
        precision: Type of the file compared with, as its GGUF names it.
        is_quantized: It was itself quantized before, so that loss is not in the figures.
        size_bytes: Of the GGUF compared with.
    """

    label: str
    kind: str
    digest: str
    architecture: str
    precision: str
    is_quantized: bool
    num_parameters: int
    size_bytes: int
    tensor_types: dict[str, int]
    license: str | None
    speed: Speed


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """One quantized model.

    Attributes:
        key: Of the inputs it was made and measured from; equal keys need no second run.
        bits_per_weight: The whole file's bits over the parameters.
        tensors: Each tensor's type; only in the report that travels with this variant, else empty.
    """

    type: str
    ref: str
    key: str
    digest: str
    size_bytes: int
    bits_per_weight: float
    tensor_types: dict[str, int]
    quality: Quality
    speed: Speed
    tensors: list[TensorInfo] = []


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of one run.

    Attributes:
        subject: The type whose package this copy travels with; None in the run's own copy.
        notes: What a reader must know to take the figures rightly.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    subject: str | None = None
    created: float
    source: SourceInfo
    variants: list[Variant]
    text: TextInfo
    machine: Machine
    tools: dict[str, str]
    recipe: dict[str, str | int | list[str]]
    notes: list[str]

    def about(self, kind: str) -> Report:
        """The copy for one variant's package: the others keep their figures and lose their tensor lists."""
        variants = [v if v.type == kind else msgspec.structs.replace(v, tensors=[]) for v in self.variants]
        return msgspec.structs.replace(self, subject=kind, variants=variants)

    def encode(self) -> bytes:
        """Indented JSON with a newline at its end."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"


def tensors_of(file: GgufFile) -> list[TensorInfo]:
    """Every tensor and its type, in the file's order."""
    return [TensorInfo(t.name, list(t.shape), t.type, t.size_bytes) for t in file.tensors]


def text_info(text: str) -> TextInfo:
    """Title and digest of the report text."""
    data = text.encode()
    return TextInfo(TEXT_TITLE, digest_bytes(data).hex, len(data))


def tool_versions() -> dict[str, str]:
    """Versions of everything that has a hand in the result; "absent" for an extra that is not installed."""
    found: dict[str, str] = {"python": platform.python_version()}
    for name in ("slm-edge", "llama-cpp-python", "gguf", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def describe_machine(num_cores: int) -> Machine:
    """The CPU's name as Linux gives it, else as Python does."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    return Machine(cpu, num_cores, f"{platform.system()} {platform.machine()}")


_DISTURBED_SHARE = 0.85
"""Threads wait for each other by spinning, which counts as work, so an undisturbed run has nearly all of its time."""


def notes_on(reference: GgufFile, source_speed: Speed, variants: Sequence[Variant]) -> list[str]:
    """Warnings that belong beside the figures."""
    notes: list[str] = []
    if any(speed.cpu_share < _DISTURBED_SHARE for speed in (source_speed, *(v.speed for v in variants))):
        notes.append("Other work had the cores while speeds were taken: they are lower than this machine's.")
    if is_quantized(reference):
        kinds = ", ".join(k for k in tensor_types(reference) if k not in FLOAT_TYPES)
        notes.append(
            f"The source is itself quantized ({kinds}). The figures compare with that file, not with the original "
            "weights; types on the same grid look better than they would on the original, others worse."
        )
    ragged = [t for t in reference.tensors if len(t.shape) > 1 and t.shape[0] % 256]
    if ragged:
        notes.append(
            f"{len(ragged)} of {len(reference.tensors)} tensors have rows that are no multiple of 256: there K- and "
            "IQ-types fall back to others, so sizes and figures of those types do not carry over to larger models."
        )
    over = [v.type for v in variants if v.size_bytes >= reference.size]
    if over:
        notes.append(f"No smaller than the source: {', '.join(over)}.")
    return notes
