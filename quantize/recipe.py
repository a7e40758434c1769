"""What is to be made: quantization types, and the recipe that names source, types and how they are judged."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from edge.errors import RecipeError

Precision = Literal["auto", "f16", "f32"]
"""Of the GGUF made from a checkpoint; `auto` is the smaller one that holds every stored value exactly."""

DEFAULT_TOKENS = 4096
"""Tokens read for the judgement, half of them scored: enough for errors of 3 % of the KL divergence (SmolLM2-135M)."""

_NEEDS_IMATRIX = "it needs an importance matrix, which this version does not compute yet"
_NOT_A_TARGET = "llama.cpp reads it but cannot quantize to it"


@dataclass(frozen=True, slots=True)
class QuantType:
    """One of llama.cpp's file types (`enum llama_ftype` in llama.h of the build behind llama-cpp-python 0.3.36).

    Attributes:
        ftype: The enum's value.
        bits_per_weight: Nominal; used only to foresee the disk space.
        refusal: Why it cannot be made, or None.
    """

    name: str
    ftype: int
    bits_per_weight: float
    refusal: str | None = None

    @property
    def tag(self) -> str:
        return self.name.lower()


# Which ones need an importance matrix: tensor_requires_imatrix() in src/llama-quant.cpp. IQ3_XS puts IQ3_XXS into
# attention K and Q, so it is among them.
QUANT_TYPES: dict[str, QuantType] = {
    t.name: t
    for t in (
        QuantType("F32", 0, 32),
        QuantType("F16", 1, 16),
        QuantType("BF16", 32, 16),
        QuantType("Q8_0", 7, 8.5),
        QuantType("Q6_K", 18, 6.56),
        QuantType("Q5_K_M", 17, 5.69),
        QuantType("Q5_K_S", 16, 5.54),
        QuantType("Q5_1", 9, 6.0),
        QuantType("Q5_0", 8, 5.5),
        QuantType("Q4_K_M", 15, 4.85),
        QuantType("Q4_K_S", 14, 4.58),
        QuantType("Q4_1", 3, 5.0),
        QuantType("Q4_0", 2, 4.5),
        QuantType("IQ4_NL", 25, 4.5),
        QuantType("IQ4_XS", 30, 4.25),
        QuantType("MXFP4_MOE", 38, 4.25),
        QuantType("Q3_K_L", 13, 4.27),
        QuantType("Q3_K_M", 12, 3.91),
        QuantType("Q3_K_S", 11, 3.5),
        QuantType("IQ3_M", 27, 3.66),
        QuantType("IQ3_S", 26, 3.44),
        QuantType("IQ3_XS", 22, 3.3, _NEEDS_IMATRIX),
        QuantType("IQ3_XXS", 23, 3.06, _NEEDS_IMATRIX),
        QuantType("Q2_K", 10, 3.0),
        QuantType("Q2_K_S", 21, 2.6, _NEEDS_IMATRIX),
        QuantType("Q2_0", 41, 2.25),
        QuantType("IQ2_M", 29, 2.7, _NEEDS_IMATRIX),
        QuantType("IQ2_S", 28, 2.5, _NEEDS_IMATRIX),
        QuantType("IQ2_XS", 20, 2.31, _NEEDS_IMATRIX),
        QuantType("IQ2_XXS", 19, 2.06, _NEEDS_IMATRIX),
        QuantType("TQ2_0", 37, 2.06),
        QuantType("TQ1_0", 36, 1.69),
        QuantType("IQ1_M", 31, 1.75, _NEEDS_IMATRIX),
        QuantType("IQ1_S", 24, 1.56, _NEEDS_IMATRIX),
        QuantType("Q1_0", 40, 1.13),
        QuantType("NVFP4", 39, 4.5, _NOT_A_TARGET),
    )
}


def usable_types() -> list[str]:
    """Names of the types that can be made, most bits first as far as the families allow."""
    return [t.name for t in QUANT_TYPES.values() if t.refusal is None]


def parse_type(text: str) -> QuantType:
    """The type of that name; case and `-` for `_` do not matter.

    Raises:
        RecipeError: No such type, or one that cannot be made; the message lists those that can.
    """
    found = QUANT_TYPES.get(text.strip().upper().replace("-", "_"))
    if found is None:
        raise RecipeError(f"There is no quantization type '{text}'.", hint=f"Types: {', '.join(usable_types())}.")
    if found.refusal is not None:
        raise RecipeError(
            f"{found.name} cannot be made: {found.refusal}.", hint=f"Types that can: {', '.join(usable_types())}."
        )
    return found


def parse_types(texts: Iterable[str]) -> tuple[QuantType, ...]:
    """The types of those names, each once, in the order given.

    Raises:
        RecipeError: As `parse_type`, or none was named.
    """
    types = tuple(dict.fromkeys(parse_type(text) for text in texts))
    if not types:
        raise RecipeError("Name at least one quantization type.", hint="For example: --type Q8_0 --type Q4_K_M.")
    return types


_NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")


def model_name(text: str) -> str:
    """A name for references made from a title, a file's stem or a directory: lower case, other signs as dashes.

    Raises:
        RecipeError: Nothing usable is left.
    """
    name = re.sub(r"[^a-z0-9._]+", "-", text.lower())
    name = re.sub(r"[._-]{2,}", "-", name).strip("._-")[:100].rstrip("._-")
    if not _NAME.fullmatch(name):
        raise RecipeError(f"No model name can be made from {text!r}.", hint="Give one with --name.")
    return name


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to make of a source.

    Attributes:
        name: Packages become `name:type`.
        num_tokens: Tokens of the report text to read, at most; half of them are scored.
        num_threads: Of the measurement; quantizing gives the same bytes with any number.
        draft: The name of a smaller model that shall guess for the packages, where the store has it.
    """

    name: str
    types: tuple[QuantType, ...]
    precision: Precision = "auto"
    num_tokens: int = DEFAULT_TOKENS
    num_threads: int = 1
    draft: str | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise RecipeError(
                f"'{self.name}' cannot name a model.",
                hint="Use lower-case letters, digits and single dots, dashes or underscores.",
            )
        if self.num_tokens < 1:
            raise RecipeError("At least one window of tokens must be measured.", hint="Raise --tokens.")
