"""Golden prompts: what a package's model thought of a few texts where it was made, and so should think everywhere.

``golden.json`` of a package. Figures and no words are compared: rounding differs between machines, and after a near tie
a text goes on differently, while what the model thinks of a given text changes little (docs/reliability.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from .manifest import decode
from .models import StoredModel
from .side_files import read_document

GOLDEN_NAME = "golden.json"
TOLERANCE = 0.25
"""On one machine the default model's mean does not differ at all between one thread and two, batched and alone. With a
byte in 64 changed in a sixth of its weights it differs by 0.24 and 0.59 (two texts), with one in 16 by 1.06 and 1.56
(2026-11-20)."""
MAX_TOKENS = 512

_Figures = Annotated[list[float], msgspec.Meta(min_length=1, max_length=MAX_TOKENS)]
_Vector = Annotated[list[float], msgspec.Meta(min_length=1, max_length=65536)]


class GoldenText(msgspec.Struct, frozen=True, kw_only=True):
    """A text as tokens, and the natural logarithm of the probability of each after the first."""

    tokens: Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(min_length=2, max_length=MAX_TOKENS + 1)]
    logprobs: _Figures


class GoldenVector(msgspec.Struct, frozen=True, kw_only=True):
    """A text and its embedding."""

    text: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
    vector: _Vector


class Goldens(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a version has to show before it serves."""

    version: Literal[1] = 1
    texts: Annotated[list[GoldenText], msgspec.Meta(max_length=16)] = []
    vectors: Annotated[list[GoldenVector], msgspec.Meta(max_length=16)] = []
    tolerance: Annotated[float, msgspec.Meta(gt=0, le=10)] = TOLERANCE
    """How much a text's log-probabilities may differ on average, or a vector's direction: 1 - cosine."""
    max_seconds: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """For all of them, on the device; None where who made the package does not know it."""
    max_memory_bytes: Annotated[int, msgspec.Meta(gt=0)] | None = None
    """Of the engine, after them."""

    def encode(self) -> bytes:
        """The bytes of `golden.json`."""
        return msgspec.json.encode(self)


def goldens_of(model: StoredModel) -> Goldens | None:
    """What the package brings; None where it has none.

    Raises:
        InvalidModelFile: It is damaged, or of another version.
    """
    file = next((file for file in model.files if file.name == GOLDEN_NAME), None)
    return None if file is None else decode(read_document(file.path), Goldens, what=f"{GOLDEN_NAME} of {model.ref}")


def mean_difference(expected: Sequence[float], got: Sequence[float]) -> float:
    """How far figures differ on average; infinite where they are not as many, or no numbers."""
    if len(expected) != len(got) or not expected:
        return math.inf
    mean = math.fsum(abs(a - b) for a, b in zip(expected, got, strict=True)) / len(expected)
    return mean if math.isfinite(mean) else math.inf


def turned_by(expected: Sequence[float], got: Sequence[float]) -> float:
    """1 - cosine of two vectors: 0 to 2; infinite where they cannot be compared."""
    if len(expected) != len(got):
        return math.inf
    lengths = math.sqrt(math.fsum(a * a for a in expected) * math.fsum(b * b for b in got))
    product = math.fsum(a * b for a, b in zip(expected, got, strict=True))
    return 1 - product / lengths if lengths and math.isfinite(product / lengths) else math.inf
