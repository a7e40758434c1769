"""What computes vectors and scores of texts: the seam between the embedding engine and an inference library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import ModelFacts
from runtime.request import TokenId
from runtime.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class EncoderText:
    """A text, or a pair of texts in a row.

    Attributes:
        tokens: Shape ``(length,)``, with all special tokens.
        second_at: Where the second text of a pair begins; 0 for a single text.
    """

    tokens: NDArray[np.int32]
    second_at: int = 0


@dataclass(frozen=True, slots=True)
class Frame:
    """Tokens that a model wants around texts: ``first text last``, or ``first text between text last``."""

    first: Sequence[TokenId]
    between: Sequence[TokenId]
    last: Sequence[TokenId]


@dataclass(frozen=True, slots=True)
class EncoderCapabilities:
    """What an encoder can do.

    Attributes:
        max_text_tokens: Longest text.
        max_step_tokens: Of a step of several texts.
        max_step_texts: Most texts of a step.
        width: Numbers that come out for each text.
        is_ranker: Whether they judge a pair of texts, and are no vector.
    """

    max_text_tokens: int
    max_step_tokens: int
    max_step_texts: int
    width: int
    is_ranker: bool


class Encoder(Protocol):
    """One loaded model. All methods belong to one thread, but for `tokenizer`, which any may use."""

    @property
    def capabilities(self) -> EncoderCapabilities: ...

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def frame(self) -> Frame: ...

    def encode(self, texts: Sequence[EncoderText]) -> NDArray[np.float32]:
        """Read texts whole, each by itself.

        Returns:
            What the model makes of each, not normalised, shape ``(len(texts), width)``.

        Raises:
            BackendError: The step failed.
        """
        ...

    def set_threads(self, threads: int) -> None:
        """Use this many threads from the next step on."""
        ...

    def close(self) -> None:
        """Free everything. Further calls do nothing."""
        ...
