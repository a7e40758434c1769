"""One request on its way through a worker, as the front sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from edge import errors
from edge.errors import BackendError, EdgeError
from runtime import wire

SILENCE_S = 15.0
"""A stream that is silent for so long gets a sign of life: proxies and clients cut silent connections."""
MAX_HELD_BYTES = 4 << 20
"""Of an answer that its reader has not taken yet: some ten thousand tokens."""
HELD_PIECES = 32
"""Of an answer that its reader has not taken yet: the engine waits for it. No reader that takes what it can is so far
behind for long, and between two looks of the event loop come a few."""
_PIECE_BYTES, _LOGPROB_BYTES = 300, 100
"""About what a piece takes, and each probability in it."""


def error_from_wire(f: wire.Failed, *, ref: str) -> EdgeError:
    """The error a worker sent, as the class of the same code."""
    if f.code == "queue_full":
        return errors.QueueFull(retry_after_s=f.retry_after_s or 5)
    for kind in (
        errors.InvalidRequest, errors.ConstraintFailed, errors.InvalidModelFile, errors.DoesNotFit,
        errors.UnsupportedFormat, errors.NoRoomToPin, errors.InvalidImage,
    ):  # fmt: skip
        if f.code == kind.code:
            return _rebuilt(kind, f)
    if f.code == errors.ContextOverflow.code:
        return _rebuilt(errors.ContextOverflow, f)
    return BackendError(f"{ref}: {f.message}", hint=f.hint)


def _rebuilt(kind: type[EdgeError], f: wire.Failed) -> EdgeError:
    """An error of a class whose constructor takes facts that did not travel: only message, hint and field did."""
    error = kind.__new__(kind)
    EdgeError.__init__(error, f.message, hint=f.hint)
    if isinstance(error, errors.InvalidRequest):
        error.field = f.field
    if isinstance(error, errors.DoesNotFit):
        error.missing_bytes = f.missing_bytes
    return error


class Generation:
    """One request on its way through a worker: an iterator of what each step gave it.

    Holds what its reader has not taken yet. The engine computes nothing for one who is `HELD_PIECES` behind until he
    has taken it; one that falls `MAX_HELD_BYTES` behind all the same loses the rest of the answer.

    Args:
        cancel: Has the engine drop the request of this id.
        hold: Has it compute nothing of it, or go on.
    """

    def __init__(
        self, message: wire.Ask, cancel: Callable[[int], None], hold: Callable[[int, bool], None] = lambda _, __: None,
        *, tenant: str = "",
    ) -> None:  # fmt: skip
        self.id = message.id
        self.message = message
        self.tenant = tenant
        self.num_output = 0
        """Tokens of the answer that arrived."""
        self.expiry: asyncio.TimerHandle | None = None
        """Ends it at its deadline."""
        self.is_held = False
        """Whether the engine waits for its reader."""
        self._cancel, self._hold = cancel, hold
        self._pieces: list[wire.Piece] = []
        self._held_bytes = 0
        self._error: EdgeError | None = None
        self._done = False
        self._wake: asyncio.Future[None] | None = None
        self._num_pushed = self._num_at_tick = 0
        self._timer: asyncio.TimerHandle | None = None

    def push(self, piece: wire.Piece) -> None:
        """Take a step's result."""
        self._num_pushed += 1
        self.num_output = piece.num_output
        self._pieces.append(piece)
        self._held_bytes += _size_bytes(piece)
        self._done = self._done or piece.finish_reason is not None
        self._notify()
        if len(self._pieces) >= HELD_PIECES and not (self.is_held or self._done):
            self._set_held(is_held=True)
        if self._held_bytes > MAX_HELD_BYTES and not self._done:
            self._cancel(self.id)
            self.fail(errors.SlowReader())

    def _set_held(self, *, is_held: bool) -> None:
        self.is_held = is_held
        self._hold(self.id, is_held)

    def fail(self, error: EdgeError) -> None:
        """End with an error, after what came before it."""
        if not self._done:
            self._error, self._done = error, True
            self._notify()

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def cancel(self) -> None:
        """Give up; the engine drops it before its next step. Harmless when it is over."""
        if not self._done:
            self._done = True
            self._cancel(self.id)

    async def steps(self, *, silence_s: float = SILENCE_S) -> AsyncIterator[list[wire.Piece]]:
        """What came since the last look, until the answer ends; an empty list after `silence_s` without anything.

        Raises:
            EdgeError: The request failed.
        """
        loop = asyncio.get_running_loop()
        # One timer for the whole stream: a task or a timer for each token would cost more than its text.
        timer = loop.call_later(silence_s, self._tick, loop, silence_s)
        try:
            while True:
                if not self._pieces and not self._done:
                    self._wake = loop.create_future()
                    await self._wake
                pieces, self._pieces = self._pieces, []
                self._held_bytes = 0
                if self.is_held and not self._done:
                    self._set_held(is_held=False)
                if pieces or not self._done:
                    yield pieces
                if self._done and not self._pieces:
                    if self._error is not None:
                        raise self._error.copy()
                    return
        finally:
            timer.cancel()
            if self._timer is not None:
                self._timer.cancel()

    def _tick(self, loop: asyncio.AbstractEventLoop, silence_s: float) -> None:
        """Wake a reader to whom nothing came since the last tick."""
        if self._num_pushed == self._num_at_tick:
            self._notify()
        self._num_at_tick = self._num_pushed
        self._timer = loop.call_later(silence_s, self._tick, loop, silence_s)


def _size_bytes(piece: wire.Piece) -> int:
    """About what a piece takes in memory."""
    texts = len(piece.text) + len(piece.reasoning) + sum(len(call.arguments) for call in piece.calls)
    return _PIECE_BYTES + texts + _LOGPROB_BYTES * sum(1 + len(p.top) for p in piece.logprobs or ())
