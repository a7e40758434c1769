"""The progress of one request."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from runtime.radix import common_prefix
from runtime.request import FinishReason, Request, TokenId

MAX_STEP_TOKENS = 64
"""Most tokens of a decoding sequence in one step; with more to compute, it takes its share as a prompt does."""
GAVE_WAY_ENOUGH = 8
"""A sequence that gave way so many times counts as of the next higher class from then on: were its state lost each
time, and each stay too short to come further, it would never end."""


class Status(Enum):
    """Where a sequence stands."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens of one request and how far they are computed.

    Attributes:
        tokens: The prompt, then what was generated.
        num_computed: Tokens whose keys and values are in the cache; at most ``len(tokens)``.
        num_cached: Prompt tokens that were reused instead of computed when it was first admitted.
        draft: Guesses at the tokens that come next: computed with the next step where there is room, and kept as far as
            they prove right.
        forced: Places of tokens that a grammar left no choice about: they came for nothing, guessed or not.
        slot: Its place in the KV cache while it runs.
        arrival: Position in the order of arrival; kept over a preemption.
        checkpoints: Lengths at which its state is saved while it is computed, since another text parts from it there;
            steps end at them.
        num_charged: Tokens whose computing its tenant has paid for; ahead of `num_computed` while a prompt is read.
        num_scored: Tokens of prompt after which the scores were reported, for who asked for them.
        is_held: Whether it waits for its reader: no step computes it, and it gives way before all others.
    """

    request: Request
    arrival: int
    tokens: list[TokenId] = field(default_factory=list[TokenId])
    num_computed: int = 0
    num_cached: int = 0
    draft: list[TokenId] = field(default_factory=list[TokenId])
    forced: set[int] = field(default_factory=set[int])
    slot: int | None = None
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    num_preemptions: int = 0
    checkpoints: set[int] = field(default_factory=set[int])
    num_charged: int = 0
    num_scored: int = 0
    is_held: bool = False

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def priority(self) -> int:
        """Its class, or a higher one after it gave way often."""
        return max(0, self.request.priority - self.num_preemptions // GAVE_WAY_ENOUGH)

    @property
    def rank(self) -> tuple[bool, int, int]:
        """Who gives way first: the greatest."""
        return self.is_held, self.priority, self.arrival

    @property
    def num_pending(self) -> int:
        """Tokens that are known and not yet computed: 1 while decoding, more where a grammar forced some, and while
        the prompt is read."""
        return len(self.tokens) - self.num_computed

    @property
    def is_prefilling(self) -> bool:
        return self.num_pending > (MAX_STEP_TOKENS if self.num_output else 1)

    @property
    def wants_scores(self) -> bool:
        """Whether the scores after the next tokens of the prompt are to be reported."""
        return self.request.scores_prompt and self.num_scored < self.num_prompt - 1

    @property
    def num_reusable(self) -> int:
        """How many of its tokens need not be computed, if somebody has: never the last, nor those whose scores are
        wanted."""
        return self.num_scored if self.wants_scores else len(self.tokens) - 1

    def before_checkpoint(self, length: int) -> int:
        """How many of the next `length` tokens a step may compute: a checkpoint ends it."""
        ahead = (c - self.num_computed for c in self.checkpoints if c > self.num_computed)
        return min([length, *ahead])

    def shared_with(self, other: Sequence) -> int:
        """Tokens that both begin with, of which the other has one more to compute."""
        return common_prefix(self.tokens, other.tokens, limit=other.num_reusable)
