"""Texts off the wire to the tokens that an encoder reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge.errors import ContextOverflow, InvalidRequest
from runtime import wire
from runtime.backends.encoder import Encoder, EncoderText
from runtime.embedding import EmbedRequest
from runtime.lengths import MAX_CHARS_PER_TOKEN
from runtime.request import RequestId, TokenId


class TextMaker:
    """Requests off the wire to requests of the embedding engine."""

    def __init__(self, backend: Encoder) -> None:
        self._tokenizer = backend.tokenizer
        self._can = backend.capabilities
        self._vocab_size = backend.facts.vocab_size
        self._frame = backend.frame

    def request(self, message: wire.Embed) -> EmbedRequest:
        """The tokens of each text.

        Raises:
            InvalidRequest: A text is empty or nothing is left of it, a token id unknown, or more dimensions are asked
                for than there are.
            ContextOverflow: A text has more tokens than the model takes, and was not to be cut.
        """
        if self._can.is_ranker != (message.query is not None):
            raise InvalidRequest("This model does not do what is asked of it.", field="model")
        if message.dimensions > self._can.width:
            raise InvalidRequest(
                f"This model's vectors have {self._can.width} dimensions, and {message.dimensions} were asked for.",
                field="dimensions",
            )
        limit = min(self._can.max_text_tokens, message.max_tokens or self._can.max_text_tokens)
        head = self._head(message.query, limit)
        made = [self._made(message, index, head, limit) for index in range(len(message.texts))]
        cut = tuple(index for index, (_, is_cut) in enumerate(made) if is_cut)
        texts = [text for text, _ in made]
        return EmbedRequest(RequestId(message.id), texts, cut, message.dimensions, message.raw_scores)

    def _head(self, query: str | None, limit: int) -> Sequence[TokenId]:
        """What stands before each text."""
        frame = self._frame
        if query is None:
            return frame.first
        tokens, is_cut = self._tokens(query, limit)
        head = [*frame.first, *tokens, *frame.between]
        if is_cut or len(head) + len(frame.last) >= limit:
            raise ContextOverflow.of_text("query", num_tokens=len(head), limit_tokens=limit, can_cut=False)
        return head

    def _made(self, message: wire.Embed, index: int, head: Sequence[TokenId], limit: int) -> tuple[EncoderText, bool]:
        """A text with what stands around it, and whether it was cut."""
        text = message.texts[index]
        last = self._frame.last
        if not isinstance(text, str):
            head, last = (), ()  # who sends tokens means these and no others
        room = limit - len(head) - len(last)
        tokens, is_cut = self._tokens(text, room)
        name = f"{'input' if message.query is None else 'documents'}[{index}]"
        if is_cut and not message.truncate:
            raise ContextOverflow.of_text(name, num_tokens=len(head) + len(tokens) + len(last), limit_tokens=limit)
        if is_cut and room < 1:
            words = f"A limit of {limit} tokens leaves nothing of '{name}'."
            raise InvalidRequest(words, field="truncate_prompt_tokens")
        whole = np.array([*head, *tokens[:room], *last], np.int32)
        if not len(whole):
            raise InvalidRequest(f"'{name}' is empty.", field=name)
        return EncoderText(whole, 0 if message.query is None else len(head)), is_cut

    def _tokens(self, text: str | list[int], room: int) -> tuple[Sequence[TokenId], bool]:
        """A text's own tokens, and whether they are more than fit. Of a far too long text only the beginning."""
        if isinstance(text, list):
            if bad := [t for t in text if not 0 <= t < self._vocab_size]:
                raise InvalidRequest(f"There is no token {bad[0]}.", field="input")
            return text, len(text) > room
        beginning = text[: self._can.max_text_tokens * MAX_CHARS_PER_TOKEN]
        framed = self._tokenizer.encode(beginning, add_special=True, parse_special=False)
        tokens = framed[len(self._frame.first) : len(framed) - len(self._frame.last)]
        return tokens, len(tokens) > room or len(beginning) < len(text)
