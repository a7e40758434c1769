"""OpenAI's older endpoint: texts and tokens to continue, each by itself."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from litestar import Response, post
from litestar.datastructures import State

from runtime.api.access import needs
from runtime.api.call import Call, HttpRequest, Make, start_each, usage_of
from runtime.api.describe import EVENTS, exchanges
from runtime.api.logprobs import echo_logprobs, joined, text_logprobs
from runtime.api.openai import (
    Answer,
    Event,
    Started,
    asked,
    calls_for,
    stream_answers,
    warning_headers,
    whole_answers,
)
from runtime.api.openai_schema import Completion, CompletionChoice, CompletionRequest, TextLogprobs
from runtime.api.parsing import parse_body
from runtime.api.responses import EventStream

DEFAULT_TOKENS = 16
"""Of an answer; OpenAI's for this endpoint."""


async def start_completion(http: HttpRequest, state: State, body: CompletionRequest, *, max_tokens: int) -> Started:
    """Begin to continue each prompt; 0 tokens are as many as fit, unless the request itself asks for none."""
    prompts = body.prompts()
    calls = calls_for(state, http, body, "text_completion", max_tokens, num_prompts=len(prompts))
    makes = [_make(calls, body, max_tokens, prompt=prompt) for prompt in prompts]
    return calls, await start_each(calls, http.receive, [makes[c.prompt_number] for c in calls])


def _make(calls: list[Call], body: CompletionRequest, max_tokens: int, *, prompt: str | list[int]) -> Make:
    make = asked(calls, body, max_tokens, prompt=prompt)
    more = {"suffix": body.suffix, "echoes": bool(body.echo), "answers": body.max_tokens != 0}
    return lambda i, params: msgspec.structs.replace(make(i, params), **more)


@post("/v1/completions", opt=needs("chat") | exchanges(CompletionRequest, streams=EVENTS), status_code=200)
async def completions(request: HttpRequest, state: State) -> Response[Completion] | EventStream:
    """Continue texts, or token ids."""
    body, warnings = parse_body(await request.body(), CompletionRequest)
    max_tokens = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    calls, streams = await start_completion(request, state, body, max_tokens=max_tokens)
    if body.stream:
        return stream_answers(calls, streams, warnings, kind="text_completion", choice=_Choices())
    answers = await whole_answers(request, calls, streams)
    has_several = calls[-1].prompt_number > 0
    completion = Completion(
        id=calls[0].id,
        created=calls[0].created,
        model=calls[0].model,
        system_fingerprint=calls[0].fingerprint,
        choices=[
            CompletionChoice(
                index=index,
                text=a.echoed_text,
                logprobs=None if body.logprobs is None else _logprobs(a),
                finish_reason=a.reason,
                token_ids=c.answer_ids(),
                prompt_token_ids=c.prompt_ids() if has_several else msgspec.UNSET,
            )
            for index, (c, a) in enumerate(_best(calls, answers, num=body.n or 1))
        ],
        usage=usage_of(calls),
        prompt_token_ids=msgspec.UNSET if has_several else calls[0].prompt_ids(),
        warnings=warnings or msgspec.UNSET,
    )
    return Response(completion, headers=warning_headers(warnings))


def _best(calls: Sequence[Call], answers: Sequence[Answer], *, num: int) -> list[tuple[Call, Answer]]:
    """The best answers to each prompt: those whose tokens were likeliest on the average, as OpenAI has it."""
    by_prompt: dict[int, list[tuple[Call, Answer]]] = {}
    for call, answer in zip(calls, answers, strict=True):
        by_prompt.setdefault(call.prompt_number, []).append((call, answer))
    for found in by_prompt.values():
        if len(found) > num:
            found.sort(key=lambda pair: -pair[1].mean_logprob)
    return [pair for found in by_prompt.values() for pair in found[:num]]


def _logprobs(answer: Answer) -> TextLogprobs:
    if answer.echo is None:
        return text_logprobs(answer.logprobs)
    return joined(echo_logprobs(answer.echo), text_logprobs(answer.logprobs, start=len(answer.echo.text)))


class _Choices:
    """Writes the choices of a stream, and remembers where in them the answers begin."""

    def __init__(self) -> None:
        self._starts: dict[int, int] = {}

    def __call__(self, event: Event) -> bytes:
        text, logprobs = event.text, None
        if event.echo is not None:
            text, self._starts[event.index] = event.echo.text, len(event.echo.text)
            logprobs = None if event.echo.logprobs is None else echo_logprobs(event.echo)
        elif event.logprobs is not None:
            logprobs = text_logprobs(event.logprobs, start=self._starts.get(event.index, 0))
        why = b'"%s"' % event.reason.encode() if event.reason else b"null"
        parts = (event.index, msgspec.json.encode(text), msgspec.json.encode(logprobs), why)
        return b'{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s}' % parts


HANDLERS = [completions]
