"""Malformed requests: the right status, the error body that the path's clients read, the field and the fix, and a
server that goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.described import Described
from tests.support import DEFAULT_MODEL, RunningAppliance, chat_body

CHAT, TEXT, VECTORS, RERANK = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank"
EMBEDDER = "minilm:l6-v2"
DIGEST = f"sha256:{'0' * 64}"
HI = [{"role": "user", "content": "hi"}]


def chat(**more: Any) -> dict[str, Any]:
    return {"model": DEFAULT_MODEL, "messages": HI, **more}


def create(**more: Any) -> dict[str, Any]:
    return {"model": "x", "from": DEFAULT_MODEL, **more}


SCHEMA = "response_format.json_schema.schema"


def schema(body: dict[str, Any]) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": body}})


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        inner = {"type": "array", "items": inner}
    return inner


CASES: list[tuple[str, str, Any, int, str | None, str]] = [
    # name, path, body, status, param, part of the message
    ("not json", CHAT, b"{", 400, None, "not valid JSON"),
    ("empty body", CHAT, b"", 400, None, "not valid JSON"),
    ("not utf-8", CHAT, b'{"model":"\xff"}', 400, None, "JSON"),
    ("a list", CHAT, b"[]", 400, None, "object"),
    ("a number", CHAT, b"3", 400, None, "object"),
    ("deeply nested", CHAT, b'{"messages":' + b"[" * 100_000, 400, None, "JSON"),
    ("no model", CHAT, {"messages": HI}, 400, "model", "model"),
    ("model a number", CHAT, chat(model=3), 400, "model", "str"),
    ("unknown model", CHAT, chat(model="gpt-4o"), 404, None, "edge pull"),
    ("unparsable model", CHAT, chat(model="a b:c:d"), 400, None, "a b:c:d"),
    ("path as model", CHAT, chat(model="../../etc/passwd"), 400, None, "passwd"),
    ("no messages", CHAT, {"model": DEFAULT_MODEL}, 400, "messages", "messages"),
    ("empty messages", CHAT, chat(messages=[]), 400, "messages", "length"),
    ("messages a text", CHAT, chat(messages="hi"), 400, "messages", "array"),
    ("message without role", CHAT, chat(messages=[{"content": "x"}]), 400, "messages[0]", "role"),
    ("unknown role", CHAT, chat(messages=[{"role": "king", "content": "x"}]), 400, "messages[0].role", "king"),
    ("content a number", CHAT, chat(messages=[{"role": "user", "content": 1}]), 400, "messages[0].content", "int"),
    ("image part", CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
     400, "messages[0].content[0].image_url", "fetches nothing"),
    ("sound part", CHAT, chat(messages=[{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]),
     400, "messages[0].content[0].type", "input_audio"),
    ("temperature a text", CHAT, chat(temperature="hot"), 400, "temperature", "float"),
    ("temperature negative", CHAT, chat(temperature=-1), 400, "temperature", ">= 0"),
    ("temperature huge", CHAT, chat(temperature=9), 400, "temperature", "<= 2"),
    ("temperature infinite", CHAT, b'{"model":"x","messages":[],"temperature":1e999}', 400, None, ""),
    ("top_p above one", CHAT, chat(top_p=1.5), 400, "top_p", "<= 1"),
    ("max_tokens zero", CHAT, chat(max_tokens=0), 400, "max_tokens", ">= 1"),
    ("max_tokens negative", CHAT, chat(max_tokens=-5), 400, "max_tokens", ">= 1"),
    ("max_tokens a fraction", CHAT, chat(max_tokens=1.5), 400, "max_tokens", "int"),
    ("max_completion_tokens a text", CHAT, chat(max_completion_tokens="all"), 400, "max_completion_tokens", "int"),
    ("stop a number", CHAT, chat(stop=3), 400, "stop", "int"),
    ("stop empty", CHAT, chat(stop=""), 400, "stop", "length"),
    ("too many stops", CHAT, chat(stop=["a"] * 50), 400, "stop", "length"),
    ("seed a text", CHAT, chat(seed="lucky"), 400, "seed", "int"),
    ("seed huge", CHAT, chat(seed=1 << 70), 400, "seed", "int"),
    ("stream a text", CHAT, chat(stream="yes"), 400, "stream", "bool"),
    ("n zero", CHAT, chat(n=0), 400, "n", ">= 1"),
    ("n nine", CHAT, chat(n=9), 400, "n", "<= 8"),
    ("repeat_penalty zero", CHAT, chat(repeat_penalty=0), 400, "repeat_penalty", ">= 0.01"),
    ("two repetition penalties", CHAT, chat(repeat_penalty=1.1, repetition_penalty=1.2),
     400, "repetition_penalty", "differ"),
    ("repeat_last_n below -1", CHAT, chat(repeat_last_n=-2), 400, "repeat_last_n", ">= -1"),
    ("typical_p above one", CHAT, chat(typical_p=2), 400, "typical_p", "<= 1"),
    ("dry_base below one", CHAT, chat(dry_base=0.5), 400, "dry_base", ">= 1"),
    ("no dry breakers", CHAT, chat(dry_sequence_breakers=[]), 400, "dry_sequence_breakers", "length"),
    ("a long dry breaker", CHAT, chat(dry_sequence_breakers=["x" * 99]), 400, "dry_sequence_breakers[0]", "length"),
    ("xtc_threshold above one", CHAT, chat(xtc_threshold=1.5), 400, "xtc_threshold", "<= 1"),
    ("mirostat", CHAT, chat(mirostat=2), 400, "mirostat", "not supported"),
    ("penalty out of range", CHAT, chat(presence_penalty=3), 400, "presence_penalty", "<= 2"),
    ("logit_bias a word", CHAT, chat(logit_bias={"dog": 1}), 400, "logit_bias", "token ids"),
    ("logit_bias out of range", CHAT, chat(logit_bias={"1": 500}), 400, "logit_bias[...]", "<= 100"),
    ("tools", CHAT, chat(tools=[{"type": "function"}]), 400, "tools[0]", "function"),
    ("unknown format", CHAT, chat(response_format={"type": "xml"}), 400, "response_format.type", "xml"),
    ("unknown part of a format", CHAT, chat(response_format={"type": "text", "x": 1}), 400, "response_format", "x"),
    ("format without schema", CHAT, chat(response_format={"type": "json_schema"}), 400,
     "response_format.json_schema", "missing"),
    ("schema keyword not done", CHAT, schema({"type": "object", "properties": {"a": {"not": {}}}}), 400,
     f"{SCHEMA}.properties.a.not", "Leave it out"),
    ("schema that is not one", CHAT, schema({"type": "strin"}), 400, f"{SCHEMA}.type", "integer"),
    ("schema too deep", CHAT, schema(nested(60)), 400, f"{SCHEMA}{'.items' * 32}.type", "deeper"),
    ("schema too large", CHAT, schema({"enum": list(range(5000))}), 400, f"{SCHEMA}.enum", "2,000"),
    ("schema that is not read", CHAT, schema({"enum": list(range(100_000))}), 400, "response_format", "10,000 values"),
    ("schema that allows nothing", CHAT, schema({"allOf": [{"type": "string"}, {"type": "null"}]}), 400,
     SCHEMA, "Unsatisfiable"),
    ("schema that goes in a circle", CHAT, schema({"$ref": "#"}), 400, SCHEMA, "cannot be followed"),
    ("pattern with look-ahead", CHAT, schema({"type": "string", "pattern": "(?=a)b"}), 400, SCHEMA, "look-a"),
    ("patterns that intersect", CHAT, schema({"allOf": [{"pattern": f"(.*a){{9}}.{{{i}}}"} for i in range(20)]}), 400,
     SCHEMA, "patterns"),
    ("broken expression", CHAT, chat(structured_outputs={"regex": "("}), 400, "structured_outputs.regex", "regex"),
    ("endless expression", TEXT, {"model": DEFAULT_MODEL, "prompt": "x", "structured_outputs": {"regex": "(" * 50_000}},
     400, "structured_outputs.regex", "regex"),
    ("no choices", CHAT, chat(structured_outputs={"choice": []}), 400, "structured_outputs.choice", "length"),
    ("grammar of nothing", CHAT, chat(grammar="root ::= root"), 400, "grammar", "cannot be followed"),
    ("grammar without end", CHAT, chat(grammar="start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(2500))),
     400, "grammar", "rules"),
    ("two forms", CHAT, chat(response_format={"type": "json_object"}, grammar='start: "a"'), 400, "grammar", "two"),
    ("structured outputs of nothing", CHAT, chat(structured_outputs={}), 400, "structured_outputs", "nothing"),
    ("old name of structured outputs", CHAT, chat(guided_regex="a"), 400, "guided_regex", "not supported"),
    ("logprobs a number", CHAT, chat(logprobs=3), 400, "logprobs", "bool"),
    ("top_logprobs alone", CHAT, chat(top_logprobs=3), 400, "top_logprobs", "logprobs"),
    ("too many logprobs", CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", "<= 20"),
    ("logprobs a bool", TEXT, {"model": DEFAULT_MODEL, "prompt": "a", "logprobs": True}, 400, "logprobs", "int"),
    ("too long a prompt", CHAT, chat(messages=[{"role": "user", "content": "word " * 20_000}]),
     400, "messages", "maximum context length is 8192 tokens"),
    ("far too long a prompt", CHAT, chat(messages=[{"role": "user", "content": "x" * 2_000_000}]),
     400, "messages", "maximum context length is 8192 tokens"),
    ("too many tokens asked for", CHAT, chat(max_tokens=9000), 400, "messages", "maximum context length"),
    ("top_k beyond any integer", CHAT, chat(top_k=1 << 64), 400, "top_k", "<="),
    ("many logit_bias", CHAT, chat(logit_bias={str(i): 1 for i in range(2000)}), 400, "logit_bias", "length"),
    ("logit_bias in other digits", CHAT, chat(logit_bias={"١٢": 1}), 400, "logit_bias", "token ids"),
    ("a message of calls", CHAT, chat(messages=[{"role": "assistant", "tool_calls": [{}]}]),
     400, "messages[0].tool_calls[0]", "function"),
    ("a crowd of empty messages", CHAT, chat(messages=[{"role": "user", "content": ""}] * 20_000),
     400, "messages", "maximum context length"),
    ("token beyond any integer", TEXT, {"model": DEFAULT_MODEL, "prompt": [1 << 64]}, 400, "prompt[0]", "<="),
    ("no prompt", TEXT, {"model": DEFAULT_MODEL}, 400, "prompt", "prompt"),
    ("empty prompt", TEXT, {"model": DEFAULT_MODEL, "prompt": ""}, 400, "prompt", "empty"),
    ("empty token prompt", TEXT, {"model": DEFAULT_MODEL, "prompt": []}, 400, "prompt", "empty"),
    ("unknown token", TEXT, {"model": DEFAULT_MODEL, "prompt": [1, 10**8]}, 400, "prompt", "token"),
    ("negative token", TEXT, {"model": DEFAULT_MODEL, "prompt": [-1]}, 400, "prompt[0]", ">= 0"),
    ("echo in a chat", CHAT, chat(echo=True), 400, "echo", "not supported"),
    ("suffix in a chat", CHAT, chat(suffix="b"), 400, "suffix", "not supported"),
    ("no input", VECTORS, {"model": EMBEDDER}, 400, "input", "input"),
    ("empty input", VECTORS, {"model": EMBEDDER, "input": []}, 400, "input", "empty"),
    ("input a number", VECTORS, {"model": EMBEDDER, "input": 3}, 400, "input", "int"),
    ("texts and tokens", VECTORS, {"model": EMBEDDER, "input": ["a", 3]}, 400, "input", "mixes"),
    ("an input of null", VECTORS, {"model": EMBEDDER, "input": [None]}, 400, "input[0]", "null"),
    ("too many texts", VECTORS, {"model": EMBEDDER, "input": ["a"] * 2049}, 400, "input", "2,048"),
    ("a long text", VECTORS, {"model": EMBEDDER, "input": "word " * 5000}, 400, "input[0]", "maximum context length"),
    ("negative token to read", VECTORS, {"model": EMBEDDER, "input": [-1]}, 400, "input[0]", ">= 0"),
    ("unknown token to read", VECTORS, {"model": EMBEDDER, "input": [10**8]}, 400, "input", "token"),
    ("unknown form of vectors", VECTORS, {"model": EMBEDDER, "input": "a", "encoding_format": "hex"},
     400, "encoding_format", "hex"),
    ("no dimensions", VECTORS, {"model": EMBEDDER, "input": "a", "dimensions": 0}, 400, "dimensions", ">= 1"),
    ("too many dimensions", VECTORS, {"model": EMBEDDER, "input": "a", "dimensions": 385}, 400, "dimensions", "384"),
    ("cut at nothing", VECTORS, {"model": EMBEDDER, "input": "a", "truncate_prompt_tokens": 0},
     400, "truncate_prompt_tokens", "at least 1"),
    ("vectors of a model that chats", VECTORS, {"model": DEFAULT_MODEL, "input": "a"}, 400, "model", "embedding"),
    ("vectors of no model", VECTORS, {"model": "none:such", "input": "a"}, 404, None, "none:such"),
    ("vectors not json", VECTORS, b"input=a", 400, None, "not valid JSON"),
    ("chat with a model that reads", CHAT, {"model": EMBEDDER, "messages": HI}, 400, "model", "embedding"),
    ("no query", RERANK, {"model": EMBEDDER, "documents": ["a"]}, 400, "query", "query"),
    ("empty query", RERANK, {"model": EMBEDDER, "query": "", "documents": ["a"]}, 400, "query", "length"),
    ("no documents", RERANK, {"model": EMBEDDER, "query": "a", "documents": []}, 400, "documents", "length"),
    ("document a number", RERANK, {"model": EMBEDDER, "query": "a", "documents": [1]}, 400, "documents[0]", "int"),
    ("document without text", RERANK, {"model": EMBEDDER, "query": "a", "documents": [{}]},
     400, "documents[0]", "text"),
    ("the best none", RERANK, {"model": EMBEDDER, "query": "a", "documents": ["a"], "top_n": 0}, 400, "top_n", ">= 1"),
    ("scores of a model that chats", RERANK, {"model": DEFAULT_MODEL, "query": "a", "documents": ["a"]},
     400, "model", "rerank"),
    ("lora a name", CHAT, chat(lora="polite"), 400, "lora", "array"),
    ("lora without a name", CHAT, chat(lora=[{"scale": 1}]), 400, "lora[0]", "name"),
    ("lora too strong", CHAT, chat(lora=[{"name": "a", "scale": 1000}]), 400, "lora[0].scale", "<= 100"),
    ("lora unknown", CHAT, chat(lora=[{"name": "none:such"}]), 404, None, "none:such"),
    ("priority four", CHAT, chat(priority=4), 400, "priority", "<= 3"),
    ("no time", CHAT, chat(timeout_s=0), 400, "timeout_s", "> 0"),
    ("a long cache key", CHAT, chat(prompt_cache_key="x" * 300), 400, "prompt_cache_key", "length"),
    ("stream options a text", CHAT, chat(stream=True, stream_options="usage"), 400, "stream_options", "object"),
    ("tokens in a stream", CHAT, chat(stream=True, return_token_ids=True), 400, "return_token_ids", "streams"),
    ("a thousand unknown fields", CHAT, chat(**{f"field{i}": 1 for i in range(1001)}), 400, None, "1,000 fields"),
    ("an array of a million", CHAT, b'{"model":"x","messages":[],"stop":[' + b"1," * 400_000 + b"1]}",
     400, "stop", "300,000"),
]  # fmt: skip

OTHERS: list[tuple[str, str, Any, int, str]] = [
    # name, method and path, body, status, part of the text
    ("not json", "POST /api/chat", b"{", 400, "not valid JSON"),
    ("a list", "POST /api/chat", b"[]", 400, "object"),
    ("no model", "POST /api/chat", {"messages": HI}, 400, "model"),
    ("model a number", "POST /api/chat", {"model": 1}, 400, "model"),
    ("model too long", "POST /api/chat", {"model": "x" * 500}, 400, "length"),
    ("unknown model", "POST /api/chat", {"model": "none:such", "messages": HI}, 404, "model not found"),
    ("unparsable model", "POST /api/chat", {"model": "a b:c:d", "messages": HI}, 400, "a b:c:d"),
    ("messages a text", "POST /api/chat", chat(messages="hi"), 400, "messages"),
    ("message without role", "POST /api/chat", chat(messages=[{"content": "x"}]), 400, "role"),
    ("unknown role", "POST /api/chat", chat(messages=[{"role": "king", "content": "x"}]), 400, "king"),
    ("content a number", "POST /api/chat", chat(messages=[{"role": "user", "content": 1}]), 400, "content"),
    ("image no base64", "POST /api/chat", chat(messages=[{"role": "user", "content": "x", "images": ["%"]}]),
     400, "base64"),
    ("stream a text", "POST /api/chat", chat(stream="yes"), 400, "stream"),
    ("format a number", "POST /api/chat", chat(format=3), 400, "format"),
    ("format unknown", "POST /api/chat", chat(format="xml"), 400, "format"),
    ("format no schema", "POST /api/chat", chat(format={"type": "strin"}), 400, "format"),
    ("options a list", "POST /api/chat", chat(options=[]), 400, "options"),
    ("temperature a text", "POST /api/chat", chat(options={"temperature": "hot"}), 400, "options.temperature"),
    ("temperature huge", "POST /api/chat", chat(options={"temperature": 9}), 400, "options.temperature"),
    ("num_predict below -2", "POST /api/chat", chat(options={"num_predict": -3}), 400, "options.num_predict"),
    ("mirostat", "POST /api/chat", chat(options={"mirostat": 1}), 400, "not supported"),
    ("too many stops", "POST /api/chat", chat(options={"stop": ["a"] * 50}), 400, "options.stop"),
    ("keep_alive no duration", "POST /api/chat", chat(keep_alive="soon"), 400, "keep_alive"),
    ("keep_alive a list", "POST /api/chat", chat(keep_alive=[]), 400, "keep_alive"),
    ("top_logprobs alone", "POST /api/chat", chat(top_logprobs=3), 400, "logprobs"),
    ("too many logprobs", "POST /api/chat", chat(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    ("too long a prompt", "POST /api/chat", chat(messages=[{"role": "user", "content": "word " * 20_000}]),
     400, "maximum context length"),
    ("prompt a number", "POST /api/generate", {"model": DEFAULT_MODEL, "prompt": 1}, 400, "prompt"),
    ("raw with system", "POST /api/generate", {"model": DEFAULT_MODEL, "prompt": "a", "raw": True, "system": "b"},
     400, "system"),
    ("raw with images", "POST /api/generate", {"model": DEFAULT_MODEL, "prompt": "a", "raw": True, "images": ["aa"]},
     400, "raw"),
    ("template", "POST /api/generate", {"model": DEFAULT_MODEL, "prompt": "a", "template": "b"}, 400, "not supported"),
    ("context", "POST /api/generate", {"model": DEFAULT_MODEL, "prompt": "a", "context": [1]}, 400, "not supported"),
    ("generate unknown", "POST /api/generate", {"model": "none:such", "prompt": "a"}, 404, "model not found"),
    ("unknown to load", "POST /api/generate", {"model": "none:such"}, 404, "model not found"),
    ("no input", "POST /api/embed", {"input": "a"}, 400, "model"),
    ("input a number", "POST /api/embed", {"model": EMBEDDER, "input": 1}, 400, "input"),
    ("input of tokens", "POST /api/embed", {"model": EMBEDDER, "input": [1]}, 400, "input"),
    ("negative dimensions", "POST /api/embed", {"model": EMBEDDER, "input": "a", "dimensions": -1}, 400, "dimensions"),
    ("vectors of a model that chats", "POST /api/embed", {"model": DEFAULT_MODEL, "input": "a"}, 400, "embedding"),
    ("too long and not to be cut", "POST /api/embed", {"model": EMBEDDER, "input": "a " * 5000, "truncate": False},
     400, "maximum context length"),
    ("texts for one vector", "POST /api/embeddings", {"model": EMBEDDER, "prompt": ["a"]}, 400, "prompt"),
    ("vector of no model", "POST /api/embeddings", {"model": "none:such", "prompt": "a"}, 404, "model not found"),
    ("show nothing", "POST /api/show", {}, 400, "model"),
    ("show a list", "POST /api/show", {"model": []}, 400, "model"),
    ("show unknown", "POST /api/show", {"model": "none:such"}, 404, "model not found"),
    ("show not json", "POST /api/show", b"smollm2", 400, "not valid JSON"),
    ("delete nothing", "DELETE /api/delete", {}, 400, "model"),
    ("delete unknown", "DELETE /api/delete", {"model": "none:such"}, 404, "model not found"),
    ("delete not json", "DELETE /api/delete", b"", 400, "not valid JSON"),
    ("copy without a name", "POST /api/copy", {"source": DEFAULT_MODEL}, 400, "destination"),
    ("copy to an empty name", "POST /api/copy", {"source": DEFAULT_MODEL, "destination": ""}, 400, "destination"),
    ("copy to no name", "POST /api/copy", {"source": DEFAULT_MODEL, "destination": "a b"}, 400, "a b"),
    ("copy unknown", "POST /api/copy", {"source": "none:such", "destination": "x"}, 404, "model not found"),
    ("pull nothing", "POST /api/pull", {}, 400, "model"),
    ("pull unknown", "POST /api/pull", {"model": "none:such"}, 404, "model not found"),
    ("pull a file", "POST /api/pull", {"model": "/etc/passwd"}, 404, "model not found"),
    ("pull another hub's tag", "POST /api/pull", {"model": "hf.co/a/b:Q4_0"}, 400, "names no file"),
    ("pull unsafely a text", "POST /api/pull", {"model": "x", "insecure": "x"}, 400, "insecure"),
    ("push not json", "POST /api/push", b"", 400, "not valid JSON"),
    ("create of nothing", "POST /api/create", {"model": "x"}, 400, "from"),
    ("create of two", "POST /api/create", create(files={"a": "b"}), 400, "from"),
    ("create without a name", "POST /api/create", {"from": DEFAULT_MODEL}, 400, "model"),
    ("create of unknown", "POST /api/create", {"model": "x", "from": "none:such"}, 404, "model not found"),
    ("create of two files", "POST /api/create", {"model": "x", "files": {"a": "b", "c": "d"}}, 400, "files"),
    ("create of no digest", "POST /api/create", {"model": "x", "files": {"a": "b"}}, 400, "b"),
    ("create of no blob", "POST /api/create", {"model": "x", "files": {"a": DIGEST}}, 400, "no blob"),
    ("create and quantize", "POST /api/create", create(quantize="q4_0"), 400, "not supported"),
    ("create with adapters", "POST /api/create", create(adapters={"a": "b"}), 400, "not supported"),
    ("create with messages", "POST /api/create", create(messages=HI), 400, "not supported"),
    ("create with a Go template", "POST /api/create", create(template="{{ .Prompt }}"), 400, "template"),
    ("create with a broken template", "POST /api/create", create(template="{% if %}"), 400, "template"),
    ("create with a long license", "POST /api/create", create(license="x" * 501), 400, "license"),
    ("create with a hot parameter", "POST /api/create", create(parameters={"temperature": 9}), 400, "parameters"),
    ("blob of no digest", "POST /api/blobs/abc", b"x", 400, "abc"),
    ("blob of another digest", f"POST /api/blobs/{DIGEST}", b"x", 422, "sha256"),
    ("load unknown", "POST /edge/v1/models/load", {"model": "none:such"}, 404, "model_not_found"),
    ("load nothing", "POST /edge/v1/models/load", {}, 400, "invalid_request"),
    ("load not json", "POST /edge/v1/models/load", b"", 400, "invalid_request"),
    ("load no name", "POST /edge/v1/models/load", {"model": "a b"}, 400, "invalid_reference"),
    ("unload unknown", "POST /edge/v1/models/unload", {"model": "none:such"}, 404, "model_not_found"),
    ("unload a list", "POST /edge/v1/models/unload", {"model": []}, 400, "invalid_request"),
    ("remove unknown", "DELETE /edge/v1/models/none:such", None, 404, "model_not_found"),
    ("remove no name", "DELETE /edge/v1/models/a%20b", None, 400, "invalid_reference"),
    ("fetch a number", "POST /edge/v1/models/pull", {"source": 3}, 400, "invalid_request"),
    ("fetch a long name", "POST /edge/v1/models/pull", {"source": "x" * 5000}, 400, "invalid_request"),
    ("fetch nothing", "POST /edge/v1/models/pull", {"source": ""}, 400, "invalid_request"),
    ("fetch by another protocol", "POST /edge/v1/models/pull", {"source": "ftp://a/b.gguf"}, 400, "invalid_reference"),
    ("unknown job", "GET /edge/v1/jobs/none", None, 404, "job_not_found"),
    ("cancel an unknown job", "POST /edge/v1/jobs/none/cancel", None, 404, "job_not_found"),
    ("too few lines", "GET /edge/v1/logs?lines=-1", None, 400, "invalid_request"),
    ("too many lines", "GET /edge/v1/logs?lines=5001", None, 400, "invalid_request"),
    ("lines a text", "GET /edge/v1/logs?lines=all", None, 400, "invalid_request"),
    ("warm nothing", "POST /edge/v1/prefixes", {"model": DEFAULT_MODEL}, 400, "invalid_request"),
    ("warm an empty prompt", "POST /edge/v1/prefixes", {"model": DEFAULT_MODEL, "system": ""}, 400, "invalid_request"),
    ("warm a short prompt", "POST /edge/v1/prefixes", {"model": DEFAULT_MODEL, "system": "a"}, 400, "invalid_request"),
    ("warm under no name", "POST /edge/v1/prefixes", {"model": DEFAULT_MODEL, "system": "a", "name": "../x"},
     400, "invalid_request"),
    ("warm an unknown model", "POST /edge/v1/prefixes", {"model": "none:such", "system": "a"}, 404, "model_not_found"),
    ("pins of an unknown model", "GET /edge/v1/prefixes?model=none:such", None, 404, "model_not_found"),
    ("pins of a long name", f"GET /edge/v1/prefixes?model={'x' * 401}", None, 400, "invalid_reference"),
    ("unpin without a model", "DELETE /edge/v1/prefixes/x", None, 400, "invalid_request"),
    ("unpin what is not", f"DELETE /edge/v1/prefixes/x?model={DEFAULT_MODEL}", None, 404, "pin_not_found"),
    ("activate nothing", "POST /edge/v1/slots/chat/activate", {}, 400, "invalid_request"),
    ("activate not json", "POST /edge/v1/slots/chat/activate", b"", 400, "invalid_request"),
    ("activate an unknown model", "POST /edge/v1/slots/chat/activate", {"model": "none:such"}, 404, "model_not_found"),
    ("activate no name", "POST /edge/v1/slots/chat/activate", {"model": "a b"}, 400, "invalid_reference"),
    ("activate for no time", "POST /edge/v1/slots/chat/activate", {"model": DEFAULT_MODEL, "trial_s": -1},
     400, "invalid_request"),
    ("activate in no time", "POST /edge/v1/slots/chat/activate", {"model": DEFAULT_MODEL, "within_s": 0},
     400, "invalid_request"),
    ("activate for ever", "POST /edge/v1/slots/chat/activate", {"model": DEFAULT_MODEL, "trial_s": 1e30},
     400, "invalid_request"),
    ("activate in a slot of no name", "POST /edge/v1/slots/..%2f/activate", {"model": DEFAULT_MODEL},
     400, "no name of a slot"),
    ("activate in a slot like a model", "POST /edge/v1/slots/a:b/activate", {"model": DEFAULT_MODEL},
     400, "invalid_request"),
    ("activate in a long slot", f"POST /edge/v1/slots/{'x' * 500}/activate", {"model": DEFAULT_MODEL},
     400, "invalid_request"),
    ("roll an unknown slot back", "POST /edge/v1/slots/none/rollback", None, 404, "slot_not_found"),
    ("remove an unknown slot", "DELETE /edge/v1/slots/none", None, 404, "slot_not_found"),
    ("no limit for Anthropic's", "POST /v1/messages", {"model": DEFAULT_MODEL, "messages": HI}, 400, "max_tokens"),
    ("Anthropic's not json", "POST /v1/messages", b"{", 400, "not valid JSON"),
    ("Anthropic's without a model", "POST /v1/messages", {"max_tokens": 1, "messages": HI}, 400, "model"),
    ("Anthropic's unknown model", "POST /v1/messages", {"model": "none:such", "max_tokens": 1, "messages": HI},
     404, "not_found_error"),
    ("Anthropic's unknown role", "POST /v1/messages",
     {"model": DEFAULT_MODEL, "max_tokens": 1, "messages": [{"role": "king", "content": "x"}]}, 400, "king"),
    ("count without messages", "POST /v1/messages/count_tokens", {"model": DEFAULT_MODEL}, 400, "messages"),
    ("tokenize nothing", "POST /tokenize", {}, 400, "content"),
    ("tokenize a number", "POST /tokenize", {"content": 3}, 400, "content"),
    ("detokenize a text", "POST /detokenize", {"tokens": "a"}, 400, "tokens"),
    ("detokenize a negative token", "POST /detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
    ("render no messages", "POST /apply-template", {}, 400, "messages"),
    ("response without input", "POST /v1/responses", {"model": DEFAULT_MODEL}, 400, "input"),
    ("response in the background", "POST /v1/responses", {"model": DEFAULT_MODEL, "input": "a", "background": True},
     400, "background"),
    ("response to none", "POST /v1/responses", {"model": DEFAULT_MODEL, "input": "a", "previous_response_id": "x"},
     404, "previous_response_id"),
    ("unknown response", "GET /v1/responses/none", None, 404, "none"),
    ("forget an unknown response", "DELETE /v1/responses/none", None, 404, "none"),
    ("items of an unknown response", "GET /v1/responses/none/input_items", None, 404, "none"),
    ("no path of a registry", "GET /v2/nothing", None, 400, "NAME_INVALID"),
    ("no name of a registry", "GET /v2/UPPER/tags/list", None, 400, "NAME_INVALID"),
    ("unknown name of a registry", "GET /v2/none/tags/list", None, 404, "MANIFEST_UNKNOWN"),
    ("unknown manifest", "GET /v2/smollm2/manifests/none", None, 404, "MANIFEST_UNKNOWN"),
    ("manifest of no tag", "GET /v2/smollm2/manifests/a%20b", None, 400, "NAME_INVALID"),
    ("blob of no digest", "GET /v2/smollm2/blobs/abc", None, 400, "NAME_INVALID"),
    ("unknown blob", f"GET /v2/smollm2/blobs/{DIGEST}", None, 404, "BLOB_UNKNOWN"),
    ("push to an appliance", "POST /v2/smollm2/blobs/uploads/", b"x", 405, "UNSUPPORTED"),
    ("no such path of OpenAI's", "GET /v1/nothing", None, 404, "not_found"),
    ("no such model of OpenAI's", "GET /v1/models/none:such", None, 404, "model_not_found"),
    ("no model's name", "GET /v1/models/a%20b", None, 400, "invalid_reference"),
    ("chat by GET", f"GET {CHAT}", None, 405, "method_not_allowed"),
    ("models by POST", "POST /v1/models", None, 405, "method_not_allowed"),
    ("models by DELETE", "DELETE /v1/models", None, 405, "method_not_allowed"),
    ("no such path of Ollama's", "GET /api/nothing", None, 404, ""),
    ("Ollama's chat by GET", "GET /api/chat", None, 405, ""),
    ("no such path of the operator's", "GET /edge/v1/nothing", None, 404, "not_found"),
    ("status by POST", "POST /edge/v1/status", None, 405, "method_not_allowed"),
    ("no such page", "GET /docs/nothing", None, 404, "not_found"),
    ("health by PUT", "PUT /livez", None, 405, "method_not_allowed"),
]  # fmt: skip


@pytest.fixture(scope="module")
def described(appliance: RunningAppliance) -> Described:
    """What the appliance says of itself; every answer to a malformed request is as it says."""
    with appliance.client() as http:
        return Described(http.get("/docs/openapi.json").json())


@pytest.fixture(autouse=True)
def still_serving(appliance: RunningAppliance) -> Iterator[None]:
    yield
    with appliance.client() as http:
        http.post(CHAT, json=chat_body("Hi", max_tokens=1)).raise_for_status()


def answer(appliance: RunningAppliance, method: str, path: str, body: Any) -> httpx.Response:
    with appliance.client() as http:
        if isinstance(body, bytes):
            return http.request(method, path, content=body)
        return http.request(method, path, json=body)


@pytest.mark.parametrize(("path", "body", "status", "param", "part"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_malformed_requests(
    appliance: RunningAppliance, described: Described, path: str, body: Any, status: int, param: str | None, part: str
) -> None:
    reply = answer(appliance, "POST", path, body)
    assert reply.status_code == status, reply.text
    described.check(reply)
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert part in error["message"]
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    ("route", "body", "status", "part"), [c[1:] for c in OTHERS], ids=[f"{c[1][:40]} {c[0]}" for c in OTHERS]
)
def test_malformed_requests_of_the_others(
    appliance: RunningAppliance, described: Described, route: str, body: Any, status: int, part: str
) -> None:
    method, path = route.split()
    reply = answer(appliance, method, path, body)
    assert reply.status_code == status, reply.text
    described.check(reply)
    told = reply.json()
    assert part in reply.text
    if path.startswith("/v1/messages"):
        assert set(told) == {"type", "error", "request_id"}
    elif path.startswith(("/v1/", "/tokenize", "/detokenize", "/apply-template")):
        assert set(told["error"]) == {"message", "type", "param", "code"}
    elif path.startswith("/api/"):
        assert set(told) == {"error"}
    elif path.startswith("/v2/"):
        assert [set(error) for error in told["errors"]] == [{"code", "message"}]
    else:
        assert reply.headers["content-type"] == "application/problem+json"
        assert told["status"] == status
        assert told["detail"]


def test_the_table_is_long_enough() -> None:
    assert len(CASES) + len(OTHERS) >= 150


def test_a_stream_that_cannot_start_has_a_status(appliance: RunningAppliance) -> None:
    with appliance.client() as http:
        reply = http.post(CHAT, json=chat(stream=True, max_tokens=9000))
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"


def test_a_body_over_the_limit_is_refused_while_it_is_read(appliance: RunningAppliance) -> None:
    with appliance.client() as http:
        reply = http.post(CHAT, content=b" " * (17 << 20))
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}])
def test_pages_of_other_sites_are_refused(appliance: RunningAppliance, headers: dict[str, str]) -> None:
    with appliance.client() as http:
        reply = http.post(CHAT, json=chat_body("Hi"), headers=headers)
    assert reply.status_code == 403
    assert reply.json()["error"]["code"] == "forbidden"


def test_unknown_fields_of_messages_are_listed(appliance: RunningAppliance) -> None:
    body = chat_body("Hi", max_tokens=1)
    body["messages"][0]["mood"] = "good"
    with appliance.client() as http:
        assert http.post(CHAT, json=body).json()["warnings"] == ["unknown field 'mood' in messages was ignored"]


def test_unknown_fields_are_listed(appliance: RunningAppliance) -> None:
    with appliance.client() as http:
        reply = http.post(CHAT, json=chat_body("Hi", max_tokens=1, colour="red", user="me"))
    assert reply.json()["warnings"] == ["unknown field 'colour' was ignored"]
    assert "colour" in reply.headers["x-edge-warnings"]
