"""What was asked of the engine: frozen, and in token ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

RequestId = NewType("RequestId", int)
TokenId = int


class FinishReason(StrEnum):
    """Why a sequence ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn from the scores.

    Attributes:
        temperature: 0 means the best token, always.
        top_k: Keep the k best; 0 keeps all.
        top_p: Keep the smallest set of best tokens whose probabilities reach this sum.
        min_p: Keep tokens at least this likely, relative to the best.
        presence_penalty: Taken off the score of every token generated before.
        frequency_penalty: Taken off the score of a token once for each time it was generated before.
        seed: Start of the sequence's own random numbers; None draws one.
        logit_bias: Added to the scores, by token id.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[TokenId, float], ...] = ()

    @property
    def is_greedy(self) -> bool:
        """Whether the answer is plain argmax over the model's own scores."""
        return self.temperature == 0 and not (self.presence_penalty or self.frequency_penalty or self.logit_bias)


@dataclass(frozen=True, slots=True)
class Request:
    """One generation.

    Attributes:
        id: Unique within the engine.
        prompt: Token ids; at least one.
        max_tokens: Most tokens to generate, at least one.
        stop: Strings that end the answer and are not part of it.
        ignore_eos: Go on past the model's own end, up to `max_tokens` (benchmarks).
        return_tokens: Give the token ids, of prompt and answer, with the last delta.
    """

    id: RequestId
    prompt: tuple[TokenId, ...]
    max_tokens: int
    params: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    return_tokens: bool = False
