"""What texts and prompts are in tokens, against what the engine says of answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge.access.keys import Keys, Limits
from tests.support import DEFAULT_MODEL, RunningAppliance, chat_body, running_appliance

EMBEDDER = "minilm:l6-v2"
TEXTS = ["Hello world", " two  spaces\n\n", "naïve café", "🙂 and 漢字", "<|im_end|> is a marker", ""]
COUNT = "/v1/chat/completions/input_tokens"


@pytest.fixture
def http(appliance: RunningAppliance) -> Iterator[httpx.Client]:
    with appliance.client() as http:
        yield http


def post(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_and_texts_are_inverse(http: httpx.Client, text: str) -> None:
    tokens = post(http, "/tokenize", model=DEFAULT_MODEL, content=text)["tokens"]
    assert post(http, "/detokenize", model=DEFAULT_MODEL, tokens=tokens)["content"] == text
    pieces = post(http, "/tokenize", model=DEFAULT_MODEL, content=text, with_pieces=True)["tokens"]
    assert [p["id"] for p in pieces] == tokens
    spelled = [p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces]
    assert b"".join(spelled).decode() == text


def test_tokens_are_those_of_prompts(http: httpx.Client) -> None:
    asked = {"model": DEFAULT_MODEL, "prompt": TEXTS[3], "max_tokens": 1, "return_token_ids": True}
    prompt = http.post("/v1/completions", json=asked).json()["prompt_token_ids"]
    assert post(http, "/tokenize", content=TEXTS[3], add_special=True)["tokens"] == prompt
    (first, *rest) = prompt
    texts = [post(http, "/detokenize", tokens=tokens)["content"] for tokens in ([first], rest)]
    assert "\ufffd" in "".join(texts), "a character of several tokens is none of its parts"


def test_control_tokens_and_mixed_contents(http: httpx.Client) -> None:
    marker = "<|im_end|>"
    (token,) = post(http, "/tokenize", content=marker)["tokens"]
    as_text = post(http, "/tokenize", content=marker, parse_special=False)["tokens"]
    assert len(as_text) > 1
    assert post(http, "/detokenize", tokens=as_text)["content"] == marker
    mixed = post(http, "/tokenize", content=["Hello", token, " world"])["tokens"]
    hello, world = (post(http, "/tokenize", content=text)["tokens"] for text in ("Hello", " world"))
    assert mixed == [*hello, token, *world]


def test_the_prompt_of_a_conversation_is_the_one_that_is_answered(http: httpx.Client) -> None:
    """Also one that spells the template's markers: as they stand in the text, they would be read as such."""
    asked = chat_body("Hi <|im_end|> you", max_tokens=1, return_token_ids=True)
    asked["messages"] = [{"role": "developer", "content": "Be terse."}, *asked["messages"]]
    answered = http.post("/v1/chat/completions", json=asked).raise_for_status().json()
    counted = post(http, COUNT, **asked)
    assert counted == {"input_tokens": answered["usage"]["prompt_tokens"], "model": DEFAULT_MODEL}
    prompt = post(http, "/apply-template", messages=asked["messages"])["prompt"]
    assert prompt.startswith("<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nHi <|im_end|> you<|im_end|>\n")
    plain = [{"role": "user", "content": "Hi you"}]
    text = post(http, "/apply-template", messages=plain)["prompt"]
    assert len(post(http, "/tokenize", content=text)["tokens"]) == post(http, COUNT, messages=plain)["input_tokens"]


def test_models_of_vectors_have_tokens_too(http: httpx.Client) -> None:
    used = post(http, "/v1/embeddings", model=EMBEDDER, input="A boat floats.")["usage"]["prompt_tokens"]
    found = post(http, "/tokenize", model=EMBEDDER, content="A boat floats.", add_special=True)
    assert (len(found["tokens"]), found["model"]) == (used, EMBEDDER)
    text = post(http, "/detokenize", model=EMBEDDER, tokens=found["tokens"][1:-1])["content"]
    assert text.replace(" ", "") == "aboatfloats.", "its tokens keep no spaces"
    for path in ("/apply-template", COUNT):
        refused = http.post(path, json={"model": EMBEDDER, "messages": [{"role": "user", "content": "x"}]})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")


def test_unknown_fields_are_named(http: httpx.Client) -> None:
    found = post(http, "/tokenize", content="a", speed="fast")
    assert found["warnings"] == ["unknown field 'speed' was ignored"]


HI = [{"role": "user", "content": "hi"}]
CASES: list[tuple[str, str, Any, int, str | None, str]] = [
    ("no content", "/tokenize", {}, 400, "content", "content"),
    ("content a number", "/tokenize", {"content": 3}, 400, "content", "int"),
    ("content of lists", "/tokenize", {"content": [[1]]}, 400, "content[0]", "array"),
    ("a token beyond the vocabulary", "/tokenize", {"content": ["a", 10**8]}, 400, "content", "token"),
    ("a negative token", "/detokenize", {"tokens": [-1]}, 400, "tokens[0]", ">= 0"),
    ("an unknown token", "/detokenize", {"tokens": [10**8]}, 400, "tokens", "token"),
    ("tokens a text", "/detokenize", {"tokens": "abc"}, 400, "tokens", "array"),
    ("no tokens", "/detokenize", {}, 400, "tokens", "tokens"),
    ("a crowd of texts", "/tokenize", {"content": ["a"] * 3000}, 400, "content", "texts"),
    ("a text for no context", "/tokenize", {"content": "x" * 15_000_000}, 400, "content", "maximum context length"),
    ("a text for no encoder", "/tokenize", {"content": "x" * 20_000, "model": EMBEDDER}, 400, "content", "512"),
    ("tokens for no context", "/detokenize", {"tokens": [1] * 280_000}, 400, "tokens", "maximum context length"),
    ("unknown model", "/tokenize", {"content": "a", "model": "gpt-4o"}, 404, None, "edge pull"),
    ("no messages", "/apply-template", {}, 400, "messages", "messages"),
    ("an unknown role", COUNT, {"messages": [{"role": "king", "content": "x"}]}, 400, "messages[0].role", "king"),
    ("a prompt too long", COUNT, {"messages": [{"role": "user", "content": "x " * 200_000}]}, 400, "messages",
     "maximum context length"),
    ("an image", COUNT, {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": "data:image/png;base64,AAAA"}]}]}, 400,
     "messages[0].content[0].image_url", "no projector"),
    ("not json", "/tokenize", b"{", 400, None, "JSON"),
    ("not utf-8", "/tokenize", b'{"content":"\xff"}', 400, None, "JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "param", "part"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_malformed_requests(
    http: httpx.Client, path: str, body: Any, status: int, param: str | None, part: str
) -> None:  # fmt: skip
    reply = http.post(path, content=body) if isinstance(body, bytes) else http.post(path, json=body)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert part in error["message"]
    assert param is None or error["param"] == param
    assert post(http, "/tokenize", content="a")["tokens"]


def test_what_keys_may_ask(tmp_path: Path) -> None:
    with running_appliance(tmp_path, "--require-keys", "on") as guarded:
        keys = Keys(guarded.home / "state.db", actor="test")
        _, writer = keys.create(Limits(scopes=frozenset({"chat"}), models=(EMBEDDER,)))
        _, reader = keys.create(Limits(scopes=frozenset({"embed"})))
        with guarded.client(headers={"x-api-key": writer}) as http:
            assert post(http, "/tokenize", content="a")["model"] == EMBEDDER, "the only one that it may use"
            hidden = http.post("/tokenize", json={"content": "a", "model": DEFAULT_MODEL})
            assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, "model_not_found")
        with guarded.client(headers={"x-api-key": reader}) as http:
            for path in ("/tokenize", "/detokenize", "/apply-template", COUNT, "/v1/messages/count_tokens"):
                assert http.post(path, json={"content": "a", "tokens": [1], "messages": HI}).status_code == 403
