"""A draft model: a backend of its own, which reads the texts that it is asked about, and no others.

Its cache is small and keeps the last part of a text: of one that is longer than a slot, the first tokens, which all
others attend to (Xiao et al. 2024, "StreamingLLM", arXiv:2309.17453), and the last half of a slot. Nothing in it needs
to be kept: what is lost is read again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge.errors import BackendError
from runtime.backends.base import Backend
from runtime.batch import Batch, Chunk, Truncate
from runtime.radix import common_prefix
from runtime.request import TokenId
from runtime.sequence import Sequence, Status
from runtime.speculate import MOST_DRAFTED, Drafted, Drafter, Guess

log = logging.getLogger("edge.drafter")

SINK_TOKENS = 4
"""The first tokens of a text that stay in view."""
MAX_WINDOW = 512
"""Tokens of a text in view at most; what comes next is seldom decided further back."""

MIN_REUSED_TOKENS = 32
"""A slot whose text is over is gone on with where that spares so many tokens."""


@dataclass(slots=True)
class _Slot:
    """A place in the draft model's cache.

    Attributes:
        start: Where in the text the part in view begins, after the first tokens.
        cells: Tokens that are computed: the view, and guesses after it.
        used: When it was last asked for.
    """

    index: int
    sequence: Sequence | None = None
    start: int = 0
    cells: list[TokenId] = field(default_factory=list[TokenId])
    used: int = 0

    def view(self, tokens: list[TokenId]) -> list[TokenId]:
        """What of a text is in view."""
        return tokens[: min(self.start, SINK_TOKENS)] + tokens[self.start :]


class ModelDrafter(Drafter):
    """Greedy guesses of a small model. The engine's thread owns it; `close` frees the backend.

    Args:
        vocab_size: Of the model it guesses for.
        relative_cost: Its weights' bytes against those of that model.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, backend: Backend, *, vocab_size: int, relative_cost: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        can = backend.capabilities
        self._backend = backend
        self._relative_cost = relative_cost
        self._clock = clock
        self._vocab_size = min(vocab_size, backend.facts.vocab_size)
        self._is_narrow = self._vocab_size < vocab_size
        self._step_tokens = can.max_step_tokens
        self._window = min(can.context_tokens, can.num_cells // can.num_slots, MAX_WINDOW)
        self._slots = [_Slot(i) for i in range(can.num_slots)]
        self._threads = self._calls = 0
        self._is_broken = self._window < 4 * MOST_DRAFTED

    @property
    def relative_cost(self) -> float:
        """What a step of it is hoped to cost, against one of the model."""
        return self._relative_cost

    def num_missing(self, sequence: Sequence) -> int | None:
        """Tokens that it would compute for its first guess; None where it cannot guess for this text, as for one with
        images, which it cannot see."""
        if self._is_broken or sequence.request.tiles or (self._is_narrow and max(sequence.tokens) >= self._vocab_size):
            return None
        slot = self._find(sequence) or _Slot(-1)
        if self._is_full(slot, len(sequence.tokens)):
            return SINK_TOKENS + self._window // 2
        return len(slot.view(sequence.tokens)) - self._num_held(slot, sequence)

    def _find(self, sequence: Sequence) -> _Slot | None:
        """The slot of a sequence, or one with a text that is over and that it goes on, as in a chat."""
        for slot in self._slots:
            if slot.sequence is sequence:
                return slot
        ended = [s for s in self._slots if s.sequence is not None and s.sequence.status is Status.FINISHED]
        best = max(ended, key=lambda s: self._num_held(s, sequence), default=None)
        return best if best is not None and self._num_held(best, sequence) >= MIN_REUSED_TOKENS else None

    @staticmethod
    def _num_held(slot: _Slot, sequence: Sequence) -> int:
        view = slot.view(sequence.tokens)
        return common_prefix(slot.cells, view, limit=len(view) - 1)

    def _is_full(self, slot: _Slot, num_tokens: int) -> bool:
        return min(slot.start, SINK_TOKENS) + num_tokens - slot.start + MOST_DRAFTED > self._window

    def draft(self, texts: list[tuple[Sequence, list[TokenId]]], *, threads: int) -> Drafted:
        """The token after each text. One that fails ends the guessing, and nothing else."""
        begin = self._clock()
        if threads and threads != self._threads:
            self._backend.set_threads(threads)
            self._threads = threads
        num_tokens, guesses = 0, list[Guess | None]()
        try:
            num_tokens = self._compute(texts, guesses)
        except BackendError as e:
            log.warning("the draft model is given up: %s", e)
            self._is_broken = True
            guesses[:] = (None for _ in texts)
        return Drafted(guesses, num_tokens, self._clock() - begin)

    def _compute(self, texts: list[tuple[Sequence, list[TokenId]]], guesses: list[Guess | None]) -> int:
        """Add a guess for each text; the tokens that were computed."""
        places = [(self._place(sequence, {s for s, _ in texts}), sequence, more) for sequence, more in texts]
        wanted = [(slot, sequence, slot.view(sequence.tokens) + more) for slot, sequence, more in places]
        num_tokens, share = 0, self._step_tokens // len(wanted)
        for slot, sequence, view in wanted:
            self._cut(slot, common_prefix(slot.cells, view, limit=len(view) - 1))
            while (left := len(view) - len(slot.cells)) > share:
                part = view[len(slot.cells) :][: min(self._step_tokens, left - 1)]
                self._decode([self._chunk(slot, sequence, part, num_logits=0)])
                num_tokens += len(part)
        wanted.sort(key=lambda w: w[0].index)
        chunks = [self._chunk(slot, s, view[len(slot.cells) :], num_logits=1) for slot, s, view in wanted]
        rows = dict(zip((c.sequence for c in chunks), self._decode(chunks), strict=True))
        guesses += [self._guess(rows[s]) for s, _ in texts]
        return num_tokens + sum(len(c.tokens) for c in chunks)

    def _place(self, sequence: Sequence, present: set[Sequence]) -> _Slot:
        """The slot of a sequence; else that which was unused for longest, begun anew."""
        self._calls += 1
        slot = self._find(sequence)
        if slot is None:
            slot = min((s for s in self._slots if s.sequence not in present), key=lambda s: s.used)
            slot.start = 0
        slot.sequence = sequence
        if self._is_full(slot, len(sequence.tokens)):
            slot.start = len(sequence.tokens) - self._window // 2
        slot.used = self._calls
        return slot

    def _cut(self, slot: _Slot, length: int) -> None:
        if length < len(slot.cells):
            self._backend.decode(Batch((Truncate(slot.index, length),), ()))
            del slot.cells[length:]

    @staticmethod
    def _chunk(slot: _Slot, sequence: Sequence, tokens: list[TokenId], *, num_logits: int) -> Chunk:
        start = len(slot.cells)
        slot.cells += tokens
        return Chunk(sequence, slot.index, start, tokens, num_logits)

    def _decode(self, chunks: list[Chunk]) -> NDArray[np.float32]:
        return self._backend.decode(Batch((), tuple(chunks)))

    def _guess(self, scores: NDArray[np.float32]) -> Guess:
        scores = scores[: self._vocab_size]
        token = int(scores.argmax())
        confidence = 1 / float(np.exp(scores - scores[token]).sum())
        return Guess(token, confidence, is_last=token in self._backend.tokenizer.eog_tokens)

    def close(self) -> None:
        """Free the model."""
        self._backend.close()
