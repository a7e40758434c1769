"""What was asked of the engine: frozen, and in token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, NewType

if TYPE_CHECKING:
    from runtime.grammar import Grammar
    from runtime.images import PlacedTile

RequestId = NewType("RequestId", int)
TokenId = int

Breakers = Mapping[TokenId, tuple[tuple[TokenId, ...], ...]]
"""Tokens that begin a sequence breaker of DRY, each with what may follow it to complete one."""
NO_BREAKERS: Breakers = {}


class FinishReason(StrEnum):
    """Why a sequence ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn from the scores. The fields stand in the order in which they act.

    Attributes:
        logit_bias: Added to the scores, by token id.
        repeat_penalty: Divides the positive scores of the last tokens and multiplies the negative ones; 1 does nothing.
        repeat_last_n: How many tokens of prompt and answer that concerns; negative is all.
        presence_penalty: Taken off the score of every token generated before.
        frequency_penalty: Taken off the score of a token once for each time it was generated before.
        dry_multiplier: Taken off the score of a token that would prolong a repetition; 0 does nothing.
        dry_base: That grows by this factor with each repeated token beyond `dry_allowed_length`.
        dry_allowed_length: Repeated tokens that are let pass.
        dry_penalty_last_n: How many tokens of prompt and answer are searched for repetitions; negative is all.
        dry_sequence_breakers: Texts across which nothing counts as repeated.
        top_k: Keep the k best; 0 keeps all.
        typical_p: Keep the tokens of most usual surprise that reach this probability together; 1 keeps all.
        top_p: Keep the smallest set of best tokens whose probabilities reach this sum.
        min_p: Keep tokens at least this likely, relative to the best.
        xtc_probability: How often the best tokens are excluded.
        xtc_threshold: Those that are this likely, but for the least likely of them; above 0.5 none are.
        temperature: Divides the scores that are left; 0 means the best token of all, always.
        seed: Start of the sequence's own random numbers; None draws one.
        logprobs: Report the model's own log-probability of each token, and this many of the best beside it.
    """

    logit_bias: tuple[tuple[TokenId, float], ...] = ()
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    top_k: int = 0
    typical_p: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    temperature: float = 1.0
    seed: int | None = None
    logprobs: int | None = None

    @property
    def has_penalties(self) -> bool:
        """Whether the scores are changed before anything is drawn from them."""
        return bool(
            self.logit_bias or self.repeat_penalty != 1 or self.presence_penalty or self.frequency_penalty
            or self.dry_multiplier
        )  # fmt: skip

    @property
    def is_greedy(self) -> bool:
        """Whether the answer is plain argmax over the model's own scores."""
        return self.temperature == 0 and not self.has_penalties


ConstraintKind = Literal["json_object", "json_schema", "regex", "choice", "lark", "gbnf", "calls"]


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must look like.

    Attributes:
        text: The schema as JSON, the expression, the grammar, or a JSON list of the choices; empty for any JSON object;
            of ``calls`` a grammar of our own making, with schemas inside.
        field: Where the request asked for it, as a JSON path.
        begins_after: The answer is free up to and with this text, such as the end of a thinking block; empty constrains
            it from its beginning.
        opens_with: Only where the answer begins with this text does it have that free part.
        trigger: After that it is free, and may end, until it writes this text, behind which the constraint begins.
        triggers_at_start: Only where that text comes first.
    """

    kind: ConstraintKind
    text: str = ""
    field: str = ""
    begins_after: str = ""
    opens_with: str = ""
    trigger: str = ""
    triggers_at_start: bool = False


@dataclass(frozen=True, slots=True, order=True)
class Adapter:
    """A change of the model's weights that a request asks for.

    Attributes:
        digest: Of the file; two are the same adapter if it is the same.
        scale: By how much of it.
        path: Where the file lies.
        size_bytes: Of the file, about what it takes in memory.
    """

    digest: str
    scale: float = 1.0
    path: str = field(default="", compare=False)
    size_bytes: int = field(default=0, compare=False)


AdapterSet = tuple[Adapter, ...]
"""In one order and none twice, so that equal sets are equal; empty is the model itself."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """What the model itself thought of a token: natural logarithms of the softmax of its scores, before bias,
    penalties, masks and temperature.

    Attributes:
        token: The token's bytes; of a control token, what spells it.
        top: The likeliest tokens and theirs, best first.
        offset: Characters of the answer before it.
    """

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt, given back before its answer.

    Attributes:
        text: What it says.
        first: The bytes of its first token, of which the model thought nothing: nothing comes before it.
        logprobs: Of the tokens after it, whose offsets count from the beginning of `text`; None for who did not ask.
    """

    text: str
    first: bytes = b""
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Pin:
    """A prefix that is kept for all.

    Attributes:
        size_bytes: Of its saved state.
        in_memory: Whether it is there, or read when a prompt wants it.
        on_disk: Whether it outlives the process.
        num_uses: Requests that it served, the one that pinned it included.
    """

    name: str
    num_tokens: int
    size_bytes: int
    in_memory: bool
    on_disk: bool
    num_uses: int


@dataclass(frozen=True, slots=True)
class Request:
    """One generation.

    Attributes:
        id: Unique within the engine.
        prompt: Token ids; at least one. Negative ones are placeholders (`runtime.images`).
        max_tokens: Most tokens to generate; 0 where the prompt alone is to be computed, such as for its scores.
        stop: Strings that end the answer and are not part of it.
        ignore_eos: Go on past the model's own end, up to `max_tokens` (benchmarks).
        return_tokens: Give the token ids, of prompt and answer, with the last delta.
        breakers: The tokens of `SamplingParams.dry_sequence_breakers`.
        priority: A lower value is served first, as in vLLM: 0 for who waits at a screen, more for what can wait.
        tenant: Whose it is: tenants share the machine by weight, and each finds only what its own requests computed.
        weight: The tenant's share against others'; above 0.
        grammar: What the answer must look like, compiled. It ends the answer, also where `ignore_eos` would go on.
        adapters: What the model is changed by; what was computed under other adapters is of no use to it.
        cache_key: The client's `prompt_cache_key`: of equal prefixes, it goes on from that of a request with the same.
        pin: Keep the prompt's keys and values for all, under this name, until it is unpinned. The answer is for
            nobody: `max_tokens` is 1.
        tiles: Parts of images, by position; the prompt holds their placeholders there.
        spelled: Control tokens that are part of the answer's text, and how: markers of thinking and of calls.
        echo: Give this text, which is what the prompt says, before the answer; with log-probabilities, those of the
            prompt too.
        num_dropped: Tokens of the prompt that were left out, so that it fits.
    """

    id: RequestId
    prompt: tuple[TokenId, ...]
    max_tokens: int
    params: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    return_tokens: bool = False
    breakers: Breakers = field(default_factory=lambda: NO_BREAKERS)
    priority: int = 0
    tenant: str = ""
    weight: float = 1.0
    grammar: Grammar | None = None
    adapters: AdapterSet = ()
    cache_key: str = ""
    pin: str = ""
    tiles: tuple[PlacedTile, ...] = ()
    spelled: Mapping[TokenId, bytes] = field(default_factory=dict[TokenId, bytes])
    echo: str | None = None
    num_dropped: int = 0

    @property
    def scores_prompt(self) -> bool:
        """Whether the model's scores after each token of the prompt are wanted."""
        return self.echo is not None and self.params.logprobs is not None
