"""What the load generator is told, and what it gives back: msgspec structs, one JSON document each way."""

from __future__ import annotations

import msgspec

MAX_CLIENTS = 64
MAX_REQUESTS = 4096


class Ask(msgspec.Struct, frozen=True):
    """One request: a text to go on with, or the next turn of the client's conversation.

    Attributes:
        may_end: Whether the model may end its answer before `max_tokens`.
        schema: What the answer has to obey, a JSON schema as JSON text; asked of the chat endpoint, without history.
    """

    text: str
    max_tokens: int
    is_turn: bool = False
    may_end: bool = False
    schema: str = ""


class Plan(msgspec.Struct, frozen=True):
    """Work for one server. Each client sends its requests one after the other; all clients begin at once.

    Attributes:
        limit_s: After this time the rest is abandoned; what was received counts.
    """

    port: int
    model: str
    clients: list[list[Ask]]
    limit_s: float


class Answer(msgspec.Struct, frozen=True):
    """One request as its client saw it. Times are seconds since the plan began.

    Attributes:
        arrivals: When each piece of text came.
        num_output: Tokens, as the server counted them; the pieces, where it was cut off before it said.
        error: Empty, or why there is no whole answer.
    """

    client: int
    sent_s: float
    arrivals: list[float]
    text: str
    num_prompt: int
    num_cached: int
    num_output: int
    error: str = ""

    @property
    def first_token_s(self) -> float | None:
        """Seconds from sending to the first text."""
        return self.arrivals[0] - self.sent_s if self.arrivals else None

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between pieces of text."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


class Outcome(msgspec.Struct, frozen=True):
    """All answers of a plan, client by client, and what the generator itself cost."""

    answers: list[Answer]
    wall_s: float
    cpu_s: float
