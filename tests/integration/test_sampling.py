"""Sampling through the running appliance: log-probabilities, several answers, the samplers' fields."""

from __future__ import annotations

import math
from typing import Any

from openai.types.chat import ChatCompletionMessageParam

from tests.integration.test_serve import client_of
from tests.support import DEFAULT_MODEL, RunningAppliance, chat_body, sse_events

QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Name three colors, with a café 🎨."}]


def ask(appliance: RunningAppliance, path: str, body: dict[str, Any]) -> dict[str, Any]:
    with appliance.client() as http:
        return http.post(path, json=body).raise_for_status().json()


def test_the_openai_client_reads_logprobs_streaming_and_not(appliance: RunningAppliance) -> None:
    with client_of(appliance) as client:
        whole = client.chat.completions.create(
            model=DEFAULT_MODEL, messages=QUESTION, temperature=0, max_tokens=12, logprobs=True, top_logprobs=4
        )
        chunks = list(
            client.chat.completions.create(
                model=DEFAULT_MODEL, messages=QUESTION, temperature=0, max_tokens=12, logprobs=True, top_logprobs=4,
                stream=True,
            )
        )  # fmt: skip
    choice = whole.choices[0]
    assert choice.logprobs is not None
    tokens = choice.logprobs.content
    assert tokens is not None
    assert b"".join(bytes(t.bytes or ()) for t in tokens).decode("utf-8", "replace") == choice.message.content
    for t in tokens:
        assert len(t.top_logprobs) == 4
        assert math.isclose(t.top_logprobs[0].logprob, t.logprob, abs_tol=1e-6), "greedy takes the likeliest"
        assert sum(math.exp(o.logprob) for o in t.top_logprobs) <= 1 + 1e-6
    streamed = [t for c in chunks for choice in c.choices if choice.logprobs for t in choice.logprobs.content or ()]
    assert [t.token for t in streamed] == [t.token for t in tokens]


def test_text_completions_have_the_older_shape(appliance: RunningAppliance) -> None:
    body = {"model": DEFAULT_MODEL, "prompt": "One, two,", "temperature": 0, "max_tokens": 8, "logprobs": 2}
    choice = ask(appliance, "/v1/completions", body)["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert len({len(v) for v in logprobs.values()}) == 1
    for token, logprob, top, offset in zip(
        *(logprobs[k] for k in ("tokens", "token_logprobs", "top_logprobs", "text_offset")), strict=True
    ):
        assert top[token] == logprob == max(top.values())
        assert choice["text"][offset:].startswith(token)


def test_several_answers_read_the_prompt_once(appliance: RunningAppliance) -> None:
    story = "Once upon a time there was a lighthouse keeper who counted ships. " * 30
    body = chat_body(story + "What did he count?", temperature=1.0, seed=40, max_tokens=16, n=3, return_token_ids=True)
    answers = ask(appliance, "/v1/chat/completions", body)
    assert [c["index"] for c in answers["choices"]] == [0, 1, 2]
    ids = [c["token_ids"] for c in answers["choices"]]
    assert len({tuple(i) for i in ids}) == 3, "each has a seed of its own"
    usage = answers["usage"]
    assert usage["completion_tokens"] == sum(len(i) for i in ids)
    assert usage["prompt_tokens"] == len(answers["prompt_token_ids"])
    again = ask(appliance, "/v1/chat/completions", {**body, "n": 1})
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0.9 * usage["prompt_tokens"]


def test_streams_of_several_answers_carry_the_index(appliance: RunningAppliance) -> None:
    body = chat_body(
        "Say a word.", temperature=1.0, seed=3, max_tokens=6, n=2, stream=True, stream_options={"include_usage": True}
    )
    texts, reasons, usage = {0: "", 1: ""}, dict[int, str](), None
    with appliance.client() as http, http.stream("POST", "/v1/chat/completions", json=body) as reply:
        for event in sse_events(reply.raise_for_status().iter_lines()):
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                texts[choice["index"]] += choice["delta"].get("content", "")
                if choice["finish_reason"]:
                    reasons[choice["index"]] = choice["finish_reason"]
    assert set(reasons) == {0, 1}
    assert all(texts.values())
    assert usage is not None
    assert 2 < usage["completion_tokens"] <= 12


def test_the_samplers_fields_act(appliance: RunningAppliance) -> None:
    def text(**more: Any) -> str:
        prompt = "The old cat sat down. " * 5 + "The old"
        body = {"model": DEFAULT_MODEL, "prompt": prompt, "max_tokens": 5, "temperature": 0, **more}
        reply = ask(appliance, "/v1/completions", body)
        assert "warnings" not in reply
        return reply["choices"][0]["text"]

    plain = " cat sat down."
    assert text().startswith(plain)
    assert not text(repeat_penalty=50, repeat_last_n=-1).startswith(" cat")
    assert not text(repetition_penalty=50).startswith(" cat")
    assert not text(dry_multiplier=50, dry_sequence_breakers=["\n"]).startswith(" cat")
    assert text(dry_multiplier=50, dry_sequence_breakers=["a", "o"]).startswith(plain), "nothing repeats across these"
    assert text(temperature=1, top_k=1, typical_p=1, xtc_probability=0, xtc_threshold=0.2).startswith(plain)
    assert not text(temperature=1, top_p=1, seed=1, xtc_probability=1, xtc_threshold=1e-7).startswith(" cat")
