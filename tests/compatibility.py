"""Writes docs/compatibility.md: what becomes of each field that clients may send. The fields are those of the API's own
description and of the clients' types; what becomes of them is what a running appliance does with them.

    python -m tests.compatibility > docs/compatibility.md    # or: make compatibility
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.client_fields import OPENED, client_fields, client_of
from tests.support import DEFAULT_MODEL, running_appliance

TABLE = Path(__file__).parents[1] / "docs" / "compatibility.md"
EMBEDDER = "minilm:l6-v2"
HI = {"role": "user", "content": "hi"}
MADE = "probe:latest"
"""The model that requests to make one make."""

BASES: dict[str, dict[str, Any]] = {
    "POST /v1/chat/completions": {"model": DEFAULT_MODEL, "messages": [HI], "max_tokens": 1},
    "POST /v1/completions": {"model": DEFAULT_MODEL, "prompt": "hi", "max_tokens": 1},
    "POST /v1/responses": {"model": DEFAULT_MODEL, "input": "hi", "max_output_tokens": 16, "store": False},
    "POST /v1/messages": {"model": DEFAULT_MODEL, "messages": [HI], "max_tokens": 1},
    "POST /v1/messages/count_tokens": {"model": DEFAULT_MODEL, "messages": [HI]},
    "POST /v1/chat/completions/input_tokens": {"model": DEFAULT_MODEL, "messages": [HI]},
    "POST /v1/embeddings": {"model": EMBEDDER, "input": "hi"},
    "POST /v1/rerank": {"model": "none:such", "query": "hi", "documents": ["hi"]},
    "POST /v1/moderations": {"model": "none", "input": "hi"},
    "POST /v1/batches": {"input_file_id": "none", "endpoint": "/v1/embeddings", "completion_window": "24h"},
    "POST /tokenize": {"content": "hi"},
    "POST /detokenize": {"tokens": [1]},
    "POST /apply-template": {"messages": [HI]},
    "POST /api/chat": {"model": DEFAULT_MODEL, "messages": [HI], "options": {"num_predict": 1}, "stream": False},
    "POST /api/generate": {"model": DEFAULT_MODEL, "prompt": "hi", "options": {"num_predict": 1}, "stream": False},
    "POST /api/embed": {"model": EMBEDDER, "input": "hi"},
    "POST /api/embeddings": {"model": EMBEDDER, "prompt": "hi"},
    "POST /api/show": {"model": DEFAULT_MODEL},
    "POST /api/create": {"model": MADE, "from": DEFAULT_MODEL, "stream": False},
    "POST /api/copy": {"source": DEFAULT_MODEL, "destination": MADE},
}
"""A small request to each operation, to which fields are added one at a time."""
SAMPLES: dict[str, Any] = {
    "keep_alive": "5m", "timeout_s": 60, "model": DEFAULT_MODEL, "response_format.schema": {"type": "object"},
}  # fmt: skip
"""Of fields for which the smallest value would do harm, or say nothing."""
OUTCOMES = ("done", "without effect", "warned", "refused")

HEAD = """# What becomes of each field

Made by `make compatibility`; a test compares it with what the appliance does. Fields are those that the named client
can send, and those that we take beyond it. Fields of fields are written `messages[].role`.

- **done**: as the client's makers describe it, or as [api.md](api.md) says.
- **without effect**: taken without a word, since the answer is the same.
- **warned**: the request is answered, and `x-edge-warnings` names the field. So is every other field, also of messages
  and options; only in what else holds fields, such as `stream_options`, unknown ones are passed over.
- **refused**: 400 that names it, where it asks for something.
"""


@dataclass(frozen=True, slots=True)
class Prober:
    """Asks a running appliance."""

    http: httpx.Client
    document: dict[str, Any]

    def tables(self) -> str:
        """The whole page."""
        return "\n".join([HEAD, *(self._table(operation) for operation in BASES if self._body_of(operation))])

    def _table(self, operation: str) -> str:
        ours, theirs = set(self._known(self._body_of(operation))), client_fields(operation)
        found: dict[str, list[str]] = {outcome: [] for outcome in OUTCOMES}
        for field in sorted(ours | theirs):
            outcome = self._outcome(operation, field, is_known=field in ours)
            found[outcome].append(f"`{field}`" if field in theirs or not theirs else f"*`{field}`*")
        client = client_of(operation)
        note = f"Fields of {client}'s client; *beyond it*.\n\n" if client else ""
        rows = "".join(f"| {outcome} | {', '.join(fields)} |\n" for outcome, fields in found.items() if fields)
        return f"## `{operation}`\n\n{note}| is | fields |\n|---|---|\n{rows}"

    def _outcome(self, operation: str, field: str, *, is_known: bool) -> str:
        schema = self._schema_at(self._body_of(operation), field) if is_known else {}
        if "without effect" in str(schema.get("description", "")).lower():
            return "without effect"
        body = copy.deepcopy(BASES[operation])
        self._put(body, self._body_of(operation), field, self._sample(schema, field) if is_known else "x")
        method, path = operation.split()
        reply = self.http.request(method, path, json=body)
        if reply.status_code == 400 and re.search(r"not supported|does not support|unknown field", reply.text):
            return "refused"
        if field.rpartition(".")[2] in reply.headers.get("x-edge-warnings", ""):
            return "warned"
        assert is_known or reply.is_success, f"{operation} with {field}: {reply.text}"
        return "done" if is_known else "without effect"

    def _body_of(self, operation: str) -> dict[str, Any]:
        method, path = operation.split()
        asked = self.document["paths"].get(path, {}).get(method.lower(), {}).get("requestBody", {})
        return self._resolved(asked.get("content", {}).get("application/json", {}).get("schema", {}))

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        ref = schema.get("$ref", "")
        return {**self.document["components"]["schemas"][ref.rpartition("/")[2]], **schema} if ref else schema

    def _options(self, schema: dict[str, Any]) -> list[dict[str, Any]]:
        """What a schema lets be, of which null is left out."""
        parts = schema.get("anyOf", [schema])
        return [self._resolved(p) for p in parts if p != {"type": "null"}]

    def _records(self, schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        for option in self._options(schema):
            if "properties" in option:
                yield "", option
            elif "items" in option:
                yield from (("[]", record) for _, record in self._records(option["items"]))
            elif "anyOf" in option:
                yield from self._records(option)

    def _known(self, schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, inner in schema.get("properties", {}).items():
            yield f"{prefix}{name}"
            if name in OPENED and not prefix:
                for mark, record in self._records(inner):
                    yield from self._known(record, f"{name}{mark}.")

    def _schema_at(self, schema: dict[str, Any], field: str) -> dict[str, Any]:
        first, _, rest = field.partition(".")
        found = schema["properties"][first.removesuffix("[]")]
        if not rest:
            return found
        return next(r["properties"][rest] for _, r in self._records(found) if rest in r["properties"])

    def _sample(self, schema: dict[str, Any], field: str = "") -> Any:
        """A small value that a schema allows and that asks for something."""
        if field in SAMPLES:
            return SAMPLES[field]
        options = self._options(self._resolved(schema))
        if options != [self._resolved(schema)]:
            return self._sample(options[0])
        return self._plain_sample(options[0])

    def _plain_sample(self, schema: dict[str, Any]) -> Any:
        if "enum" in schema:
            return schema["enum"][0]
        match schema.get("type"):
            case "boolean":
                return True
            case "integer" | "number":
                return max(1, schema.get("minimum", 1))
            case "array":
                return [self._sample(schema.get("items", {}))]
            case "object":
                properties = schema.get("properties", {"1": schema.get("additionalProperties", {})})
                return {name: self._sample(properties[name]) for name in schema.get("required", properties)}
            case _:
                return "x"

    def _put(self, body: dict[str, Any], schema: dict[str, Any], field: str, value: Any) -> None:
        """Put a value where the field is, in a sample of what holds it where that is not there."""
        outer, _, inner = field.partition(".")
        name = outer.removesuffix("[]")
        if not inner:
            body[name] = value
            return
        if name not in body:
            body[name] = self._sample(schema["properties"][name]) if name in schema["properties"] else {}
            if outer != name and not body[name]:
                body[name] = [{}]
        holder = body[name][0] if outer != name else body[name]
        holder[inner] = value


def table(http: httpx.Client) -> str:
    """The page, as this appliance would have it."""
    prober = Prober(http, http.get("/docs/openapi.json").json())
    try:
        return prober.tables()
    finally:
        http.request("DELETE", "/api/delete", json={"model": MADE})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home, running_appliance(Path(home)) as appliance, appliance.client() as http:
        sys.stdout.write(table(http))
