"""Guesses at the tokens that come next, so that one step can check several."""

from __future__ import annotations

from typing import Protocol

from runtime.request import TokenId
from runtime.sequence import Sequence


class Drafter(Protocol):
    """Where guesses come from. The engine's thread owns it."""

    def propose(self, sequence: Sequence) -> list[TokenId]:
        """Guesses at what follows the tokens of a decoding sequence, in order; empty where none is worth a step."""
        ...
