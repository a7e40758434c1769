"""Log-probabilities of tokens in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.api.openai_schema import ChatLogprobs, ContentLogprob, TextLogprobs, TopLogprob
from runtime.request import Echo, TokenLogprob


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


def text_logprobs(tokens: Sequence[TokenLogprob], *, start: int = 0) -> TextLogprobs:
    """As text completions have them: the token itself is among the likeliest.

    Args:
        start: Characters of the choice's text before these tokens' answer.
    """
    tops: list[dict[str, float] | None] = []
    for t in tokens:
        top: dict[str, float] = {}
        for token, logprob in (*t.top, (t.token, t.logprob)):
            top.setdefault(_text(token), logprob)  # parts of characters look alike; the likeliest stays
        tops.append(top)
    return TextLogprobs(
        tokens=[_text(t.token) for t in tokens],
        token_logprobs=[t.logprob for t in tokens],
        top_logprobs=tops,
        text_offset=[start + t.offset for t in tokens],
    )


def echo_logprobs(echo: Echo) -> TextLogprobs:
    """Of the tokens of a prompt; of the first one, which follows nothing, there are none."""
    first = TextLogprobs(tokens=[_text(echo.first)], token_logprobs=[None], top_logprobs=[None], text_offset=[0])
    return joined(first, text_logprobs(echo.logprobs or ()))


def joined(one: TextLogprobs, other: TextLogprobs) -> TextLogprobs:
    """The tokens of both, one after the other."""
    return TextLogprobs(
        tokens=one.tokens + other.tokens,
        token_logprobs=one.token_logprobs + other.token_logprobs,
        top_logprobs=one.top_logprobs + other.top_logprobs,
        text_offset=one.text_offset + other.text_offset,
    )


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")
