"""The work of one engine step."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.request import AdapterSet, TokenId
from runtime.sequence import Sequence
from runtime.states import StateId

TILE_TOKENS = 64
"""From so many rows on, ggml's attention on a CPU computes them in tiles (``GGML_FA_TILE_Q``): each tile over all cells
that any of its rows may see, and each as if it were full."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of one sequence's tokens.

    Attributes:
        start: Position of the first token.
        tokens: What is computed, in order.
        num_logits: The scores after each of the last so many tokens are needed: one where the next token is drawn,
            one more for each guessed token.
        num_scored: The first so many of these tell what the model thought of the prompt's own tokens.
    """

    sequence: Sequence
    slot: int
    start: int
    tokens: list[TokenId]
    num_logits: int
    num_scored: int = 0


@dataclass(frozen=True, slots=True)
class CopyPrefix:
    """Before the step: share the first `length` cells of `source` with `target`, which is empty."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Truncate:
    """Before the step: drop what `slot` holds beyond its first `length` cells."""

    slot: int
    length: int


@dataclass(frozen=True, slots=True)
class SaveState:
    """Before the step: keep what `slot` holds under `state`."""

    slot: int
    state: StateId


@dataclass(frozen=True, slots=True)
class RestoreState:
    """Before the step: put a kept state into `slot`, which is empty, and cut it to `length`."""

    slot: int
    state: StateId
    length: int


@dataclass(frozen=True, slots=True)
class DropState:
    """Before the step: forget a kept state."""

    state: StateId


CacheOp = CopyPrefix | Truncate | SaveState | RestoreState | DropState


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: changes to the cache in order, then one ragged decode, where there are chunks.

    Attributes:
        chunks: Ordered by slot, each slot at most once.
        adapters: What all chunks are computed with.
    """

    cache_ops: tuple[CacheOp, ...]
    chunks: tuple[Chunk, ...]
    adapters: AdapterSet = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(c.tokens) for c in self.chunks)

    @property
    def num_logits(self) -> int:
        return sum(c.num_logits for c in self.chunks)
