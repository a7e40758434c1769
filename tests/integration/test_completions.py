"""Texts to continue: several prompts, echoes, the best of several answers, stop strings, cut prompts, and what is told
of tokens."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.support import DEFAULT_MODEL, GreedyLaw, RunningAppliance, chat_body, sse_events

PROMPTS = ["One, two, three,", "The capital of France is", "Water boils at"]


def text_body(prompt: Any, **more: Any) -> dict[str, Any]:
    return {"model": DEFAULT_MODEL, "prompt": prompt, "temperature": 0} | {"max_tokens": 8, **more}


def ask(http: httpx.Client, body: dict[str, Any], path: str = "/v1/completions") -> dict[str, Any]:
    reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    answered: dict[str, Any] = reply.json()
    return answered


def streamed(http: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
        assert reply.status_code == 200, reply.read()
        return [dict(e) for e in sse_events(reply.iter_lines())]


def texts(answered: dict[str, Any]) -> list[str]:
    return [c["text"] for c in answered["choices"]]


def test_each_prompt_is_continued_by_itself(appliance: RunningAppliance) -> None:
    with appliance.client() as http:
        alone = [ask(http, text_body(p)) for p in PROMPTS]
        together = ask(http, text_body(PROMPTS))
        ids = [ask(http, text_body(p, return_token_ids=True))["prompt_token_ids"] for p in PROMPTS]
        by_tokens = ask(http, text_body(ids, return_token_ids=True))
    assert texts(together) == texts(by_tokens) == [texts(a)[0] for a in alone]
    assert [c["index"] for c in together["choices"]] == [0, 1, 2]
    assert [c["prompt_token_ids"] for c in by_tokens["choices"]] == ids
    for kind in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert together["usage"][kind] == sum(a["usage"][kind] for a in alone)


def test_choices_stand_by_prompt_and_then_by_draw(appliance: RunningAppliance) -> None:
    body = text_body(PROMPTS[:2], n=2, temperature=1, seed=5, max_tokens=3, ignore_eos=True)
    with appliance.client() as http:
        alone = [ask(http, {**body, "prompt": p}) for p in PROMPTS[:2]]
        together = ask(http, body)
        events = streamed(http, {**body, "stream_options": {"include_usage": True}})
    assert [c["index"] for c in together["choices"]] == [0, 1, 2, 3]
    alike = sum(a == b for a, b in zip(texts(together), [*texts(alone[0]), *texts(alone[1])], strict=True))
    assert alike >= 3, "each prompt's draws begin with the seed; rounding may part one"
    found = ["", "", "", ""]
    for event in events:
        for choice in event["choices"]:
            found[choice["index"]] += choice["text"]
    assert sum(a == b for a, b in zip(found, texts(together), strict=True)) >= 3
    assert [e for e in events if not e["choices"]] == [events[-1]]
    told = {k: v for k, v in events[-1]["usage"].items() if isinstance(v, int)}
    assert told == {k: v for k, v in together["usage"].items() if isinstance(v, int)}
    assert told["completion_tokens"] == 12


def test_the_openai_client_asks_for_prompts_and_their_echo(appliance: RunningAppliance) -> None:
    with openai.OpenAI(base_url=f"{appliance.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        found = client.completions.create(
            model=DEFAULT_MODEL, prompt=PROMPTS, echo=True, logprobs=2, max_tokens=3, temperature=0
        )
    for choice, prompt in zip(found.choices, PROMPTS, strict=True):
        assert choice.text.startswith(prompt)
        assert choice.logprobs is not None
        assert (choice.logprobs.text_offset or [])[0] == 0


def test_an_echo_tells_what_the_model_thought_of_each_token(appliance: RunningAppliance, law: GreedyLaw) -> None:
    """Also where the prompt was computed before, and of a prompt longer than a step."""
    prompt = "The pump’s pressure was low — 日本 😀. " * 9
    body = text_body(prompt, echo=True, logprobs=3, return_token_ids=True, max_tokens=4)
    with appliance.client() as http:
        ask(http, text_body(prompt))
        told = ask(http, body)
        alone = ask(http, {**body, "max_tokens": 0})
        plain = ask(http, text_body(prompt, max_tokens=4))
    choice, ids = told["choices"][0], told["prompt_token_ids"]
    assert choice["text"] == prompt + texts(plain)[0]
    logprobs = choice["logprobs"]
    assert {len(v) for v in logprobs.values()} == {len(ids) + 4}
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    rows = law.scores([*ids, *choice["token_ids"]])
    for i, token in enumerate([*ids, *choice["token_ids"]][1:]):
        row = rows[i].astype(np.float64)
        expected = row[token] - row.max() - math.log(np.exp(row - row.max()).sum())
        assert abs(logprobs["token_logprobs"][i + 1] - expected) < 2 * law.epsilon + 0.01
        assert max(logprobs["top_logprobs"][i + 1].values()) >= logprobs["token_logprobs"][i + 1]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert "\ufffd" in token or choice["text"][offset:].startswith(token)
    assert told["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert (alone["choices"][0]["text"], alone["choices"][0]["finish_reason"]) == (prompt, "length")
    assert alone["usage"]["completion_tokens"] == 0
    assert alone["choices"][0]["logprobs"]["tokens"] == logprobs["tokens"][: len(ids)]


def test_streams_echo_first(appliance: RunningAppliance) -> None:
    body = text_body(PROMPTS[:2], echo=True, logprobs=1, max_tokens=4)
    with appliance.client() as http:
        whole, events = ask(http, body), streamed(http, body)
        plain = streamed(http, text_body(PROMPTS[0], echo=True))
    found: list[dict[str, Any]] = [{"text": "", "tokens": [], "text_offset": []} for _ in PROMPTS[:2]]
    for choice in (c for e in events for c in e["choices"]):
        found[choice["index"]]["text"] += choice["text"]
        for name in ("tokens", "text_offset"):
            found[choice["index"]][name] += choice["logprobs"][name] if choice["logprobs"] else []
    for got, choice in zip(found, whole["choices"], strict=True):
        assert got == {"text": choice["text"], **{k: choice["logprobs"][k] for k in ("tokens", "text_offset")}}
    assert plain[0]["choices"][0]["text"] == PROMPTS[0]


def test_the_best_of_several_are_those_that_the_model_thought_likeliest(appliance: RunningAppliance) -> None:
    """Of the same draws, but for rounding."""
    body = text_body("My favourite animal is", temperature=1.5, seed=1, max_tokens=3, logprobs=0, ignore_eos=True)

    def likeliness(answered: dict[str, Any]) -> list[float]:
        return [sum(c["logprobs"]["token_logprobs"]) for c in answered["choices"]]

    with appliance.client() as http:
        drawn, best = ask(http, {**body, "n": 8}), ask(http, {**body, "n": 2, "best_of": 8})
        unasked = ask(http, {**body, "n": 2, "best_of": 8, "logprobs": None})
    assert likeliness(best) == sorted(likeliness(best), reverse=True)
    assert min(likeliness(best)) > sorted(likeliness(drawn))[4], "better than most"
    assert [c["index"] for c in best["choices"]] == [0, 1]
    assert unasked["choices"][0]["logprobs"] is None
    assert best["usage"]["completion_tokens"] == 24, "all that was drawn was computed"


@pytest.mark.parametrize(("more", "param", "part"), [
    ({"prompt": ["a", [1]]}, "prompt", "mixes"),
    ({"prompt": [1, "a"]}, "prompt", "mixes"),
    ({"prompt": ["a"] * 129}, "prompt", "128"),
    ({"prompt": ["a"] * 20, "n": 8}, "prompt", "128"),
    ({"prompt": [[1], []]}, "prompt", "empty"),
    ({"prompt": [[1], [-1]]}, "prompt[1][0]", ">= 0"),
    ({"prompt": [[1], [10**8]]}, "prompt", "token"),
    ({"suffix": "b"}, "suffix", "cannot fill in"),
    ({"suffix": "b", "echo": True}, "echo", "suffix"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"best_of": 2, "stream": True}, "best_of", "stream"),
    ({"best_of": 1, "n": 2}, "best_of", "less"),
    ({"best_of": 9}, "best_of", "<= 8"),
    ({"echo": "yes"}, "echo", "bool"),
    ({"prompt": "x" * 40_000, "echo": True, "logprobs": 20}, "echo", "too long"),
    ({"truncation": "left"}, "truncation", "left"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused(
    appliance: RunningAppliance, more: dict[str, Any], param: str, part: str
) -> None:
    with appliance.client() as http:
        reply = http.post("/v1/completions", json={**text_body("a"), **more})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param
    assert part in error["message"]


# ---------------------------------------------------------------- stop strings


COUNTING = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,"
"""How this goes on is no near tie, however the answer is computed."""


def test_stop_strings_cut_wherever_they_lie(appliance: RunningAppliance) -> None:
    """Across the borders of tokens and in the middle of them; the rest of the text is not lost."""
    with appliance.client() as http:
        (whole,) = texts(ask(http, text_body(COUNTING, max_tokens=40)))
        for at in range(3, 24, 4):
            for size in (1, 3, 9):
                stop = whole[at : at + size]
                expected = whole[: whole.find(stop)]
                answered = ask(http, text_body(COUNTING, max_tokens=40, stop=[stop, "\0never"]))
                assert (texts(answered)[0], answered["choices"][0]["finish_reason"]) == (expected, "stop")
        never = whole[-3:] + "and something that does not come"
        answered = ask(http, text_body(COUNTING, max_tokens=40, stop=never))
        assert (texts(answered)[0], answered["choices"][0]["finish_reason"]) == (whole, "length")
        events = streamed(http, text_body(COUNTING, max_tokens=40, stop=never))
        assert "".join(c["text"] for e in events for c in e["choices"]) == whole


def test_no_piece_has_half_a_character(appliance: RunningAppliance) -> None:
    """Of letters that take several tokens each."""
    form = {"structured_outputs": {"regex": "(😀|🙈|日|ぬ|ḁ){20}"}}
    with appliance.client() as http:
        events = streamed(http, text_body("Letters:", max_tokens=200, temperature=1, seed=4, stop=["😀ḁ"], **form))
    pieces = [c["text"] for e in events for c in e["choices"]]
    assert len([p for p in pieces if p]) > 3
    assert not any("\ufffd" in p for p in pieces)
    assert re.fullmatch("(😀|🙈|日|ぬ|ḁ){1,20}", "".join(pieces))


# ---------------------------------------------------------------- too much, and what is left out


def test_far_too_long_a_prompt_is_refused_by_its_count(appliance: RunningAppliance) -> None:
    text = "The pump is on the boat. " * 600_000
    with appliance.client() as http:
        for path, body, field in (
            ("/v1/completions", text_body(text), "prompt"),
            ("/v1/chat/completions", chat_body(text), "messages"),
        ):
            reply = http.post(path, json=body)
            error = reply.json()["error"]
            assert (reply.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", field)
            assert "This model's maximum context length is 8192 tokens. However, you requested" in error["message"]


def test_the_oldest_messages_go_where_that_is_asked_for(appliance: RunningAppliance) -> None:
    """With a long answer that ends soon, so that little room is left and little is computed."""
    filler = "The keeper counted ships and wrote their names into a book. " * 3
    messages = [{"role": "system", "content": "Answer with the code word: lighthouse."}]
    for i in range(20):
        messages += [{"role": "user", "content": f"{i}: {filler}"}, {"role": "assistant", "content": "Noted."}]
    messages.append({"role": "user", "content": "What is the code word?"})
    short = {"max_tokens": 7900, "stop": ["e", "a", " ", "i", "o"], "return_token_ids": True}
    body = chat_body("", **short) | {"messages": messages}
    with appliance.client() as http:
        refused = http.post("/v1/chat/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
        told = ask(http, {**body, "truncation": "auto"}, "/v1/chat/completions")
        dropped = told["usage"]["prompt_tokens_details"]["dropped_tokens"]
        assert told["usage"]["prompt_tokens"] == len(told["prompt_token_ids"]) <= 8192 - 7900
        assert dropped > 500
        kept = [messages[0], *messages[-3:]]
        fitting = ask(http, {**body, "messages": kept, "truncation": "auto"}, "/v1/chat/completions")
        assert "dropped_tokens" not in fitting["usage"]["prompt_tokens_details"]
        last = [messages[0], {"role": "user", "content": filler * 30}]
        alone = http.post("/v1/chat/completions", json={**body, "messages": last, "truncation": "auto"})
        assert (alone.status_code, alone.json()["error"]["code"]) == (400, "context_length_exceeded")
        text = ask(http, text_body(filler * 10, **short, truncation="auto"))
        line = http.post("/api/chat", json={
            "model": DEFAULT_MODEL, "messages": [{"role": "user", "content": filler * 300}, *messages[-3:]],
            "truncate": True, "stream": False, "options": {"num_predict": 1},
        }).json()  # fmt: skip
    assert text["usage"]["prompt_tokens"] == len(text["prompt_token_ids"]) == 8192 - 7900
    assert text["usage"]["prompt_tokens_details"]["dropped_tokens"] > 50
    assert [w.split()[:3] for w in line["warnings"]] == [["truncate", "left", "out"]]


# ---------------------------------------------------------------- strict requests


STRICT = {"x-edge-strict": "true"}


@pytest.mark.parametrize(("path", "body", "field"), [
    ("/v1/completions", text_body("a", colour="red"), "colour"),
    ("/v1/completions", text_body("a", user="me"), "user"),
    ("/v1/chat/completions", chat_body("a", colour="red"), "colour"),
    ("/v1/chat/completions", chat_body("a", metadata={"a": "b"}), "metadata"),
    ("/v1/chat/completions", {"model": DEFAULT_MODEL, "messages": [{"role": "user", "content": "a", "mood": 1}]},
     "messages.mood"),
    ("/v1/embeddings", {"model": "minilm:l6-v2", "input": "a", "colour": 1}, "colour"),
    ("/v1/rerank", {"model": "minilm:l6-v2", "query": "a", "documents": ["b"], "colour": 1}, "colour"),
    ("/api/chat", {"model": DEFAULT_MODEL, "messages": [{"role": "user", "content": "a"}], "options": {"num_gpu": 1}},
     "options.num_gpu"),
    ("/api/generate", {"model": DEFAULT_MODEL, "prompt": "a", "shift": True}, "shift"),
    ("/api/show", {"model": DEFAULT_MODEL, "verbose": True}, "verbose"),
    ("/edge/v1/models/load", {"model": DEFAULT_MODEL, "colour": 1}, "colour"),
])  # fmt: skip
def test_a_strict_request_has_no_field_without_effect(
    appliance: RunningAppliance, path: str, body: dict[str, Any], field: str
) -> None:
    with appliance.client() as http:
        reply = http.post(path, json=body, headers=STRICT)
    assert reply.status_code == 400, reply.text
    assert f"{field.rpartition('.')[2].rpartition(']')[2]}" in reply.text
    if path.startswith("/v1/"):
        assert reply.json()["error"]["param"] == field


def test_strict_requests_of_known_fields_are_answered(appliance: RunningAppliance) -> None:
    with appliance.client() as http:
        reply = http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=1, seed=1, user=None), headers=STRICT)
        assert reply.status_code == 200, reply.text
        loose = http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=1, colour=1))
        assert "colour" in loose.headers["x-edge-warnings"]
        wrong = http.post("/v1/chat/completions", json=chat_body("Hi"), headers={"x-edge-strict": "perhaps"})
        assert (wrong.status_code, json.loads(wrong.content)["error"]["param"]) == (400, "x-edge-strict")
