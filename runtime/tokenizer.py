"""Text to tokens and back: incremental detokenizing and stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.request import TokenId


class Tokenizer(Protocol):
    """A model's vocabulary."""

    @property
    def eog_tokens(self) -> frozenset[TokenId]:
        """Tokens with which the model ends an answer."""
        ...

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[TokenId]:
        """Tokens of a text.

        Args:
            add_special: Put the tokens in front (and behind) that the model wants, such as BOS.
            parse_special: Read control tokens' texts as the control tokens; else they are plain text.
        """
        ...

    def piece(self, token: TokenId) -> bytes:
        """Bytes of a token in an answer; empty for control tokens."""
        ...

    def text(self, token: TokenId) -> str:
        """What spells a token, control tokens too; where these have no spelling, as in an answer."""
        return self.piece(token).decode("utf-8", "replace")

    @property
    def fim_tokens(self) -> tuple[TokenId, TokenId, TokenId] | None:
        """Tokens before a prefix, a suffix and the middle that is to be filled in; None where the model has none."""
        return None


class Detokenizer:
    """Bytes of tokens to text. A character whose bytes are not complete is held back."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, piece: bytes) -> str:
        """Text that is complete after this piece."""
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left at the end; an incomplete character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


@dataclass(frozen=True, slots=True)
class Emission:
    """Text that may be sent, and whether a stop string was reached."""

    text: str
    stopped: bool


class StopMatcher:
    """Holds text back while it may be the beginning of a stop string. The first one to be complete counts.

    Attributes:
        num_known: Characters that came in.
        found: The stop string that was reached; empty before.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(s for s in stops if s)
        self._held = ""
        self.num_known = 0
        self.found = ""

    def push(self, text: str) -> Emission:
        """Add text; what is certain comes out. After a stop string nothing more does."""
        self.num_known += len(text)
        if not self._stops:
            return Emission(text, stopped=False)
        self._held += text
        found = [(at + len(s), at, s) for s in self._stops if (at := self._held.find(s)) >= 0]
        if found:
            _, at, self.found = min(found)  # what is complete first, however the text was cut
            text, self._held = self._held[:at], ""
            return Emission(text, stopped=True)
        keep = self._longest_beginning()
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return Emission(text, stopped=False)

    def finish(self) -> str:
        """The text still held: the answer ended before a stop string was complete."""
        text, self._held = self._held, ""
        return text

    def _longest_beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(len(s) for s in self._stops) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-n:]
            if any(s.startswith(tail) for s in self._stops):
                return n
        return 0
