"""Log-probabilities of tokens in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.api.openai_schema import ChatLogprobs, ContentLogprob, TextLogprobs, TopLogprob
from runtime.request import TokenLogprob


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    """As chat completions have them."""
    return ChatLogprobs(
        content=[
            ContentLogprob(
                token=_text(t.token),
                logprob=t.logprob,
                bytes=list(t.token),
                top_logprobs=[TopLogprob(token=_text(b), logprob=p, bytes=list(b)) for b, p in t.top],
            )
            for t in tokens
        ]
    )


def text_logprobs(tokens: Sequence[TokenLogprob]) -> TextLogprobs:
    """As text completions have them: the token itself is among the likeliest, and offsets begin with the answer."""
    tops: list[dict[str, float]] = []
    for t in tokens:
        top: dict[str, float] = {}
        for token, logprob in (*t.top, (t.token, t.logprob)):
            top.setdefault(_text(token), logprob)  # parts of characters look alike; the likeliest stays
        tops.append(top)
    return TextLogprobs(
        tokens=[_text(t.token) for t in tokens],
        token_logprobs=[t.logprob for t in tokens],
        top_logprobs=tops,
        text_offset=[t.offset for t in tokens],
    )


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")
