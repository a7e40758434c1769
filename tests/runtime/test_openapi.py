"""The description of the API: it lists every route, names what each takes and gives, and costs a start nothing."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute

from runtime.api.describe import Exchange
from runtime.api.openapi import document
from tests.runtime.test_access import app_of

# The path parameters are written as litestar 3 still reads them.
pytestmark = pytest.mark.filterwarnings("ignore::litestar.exceptions.LitestarDeprecationWarning")
WITHOUT_BODY = {
    "POST /edge/v1/jobs/{job_id}/cancel", "POST /edge/v1/telemetry/flush", "POST /v1/responses/{response_id}/cancel",
    "POST /v1/batches/{batch_id}/cancel", "POST /edge/v1/slots/{slot}/rollback",
}  # fmt: skip


@pytest.fixture
def app(tmp_path: Path) -> Litestar:
    return app_of(tmp_path)


@pytest.fixture
def described(app: Litestar) -> dict[str, Any]:
    return document(app)


def handlers(app: Litestar) -> Iterator[tuple[str, HTTPRouteHandler]]:
    """Every method of every route by its name; preflights, which the guard answers, are no routes of ours."""
    for route in app.routes:
        assert isinstance(route, HTTPRoute)
        path = re.sub(r"{(.*?):.*?}", r"{\1}", route.path)
        for handler in route.route_handlers:
            for method in handler.http_methods - {"OPTIONS"}:
                yield f"{method} {path}", handler


def operations(described: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{m.upper()} {path}": o for path, item in described["paths"].items() for m, o in item.items()}


def test_every_route_is_described_and_every_described_route_is_there(app: Litestar, described: dict[str, Any]) -> None:
    names = {name for name, _ in handlers(app)}
    assert len(names) > 40
    assert set(operations(described)) == names


def test_each_body_is_described_by_the_struct_that_parses_it(app: Litestar, described: dict[str, Any]) -> None:
    for name, handler in handlers(app):
        asked, module = handler.opt.get("exchange", Exchange()), inspect.getmodule(handler.fn)
        has_body = bool(asked.body or asked.sends)
        assert ("requestBody" in operations(described)[name]) == has_body
        assert has_body or not name.startswith("POST") or name in WITHOUT_BODY, f"{name} says nothing of its body"
        if "parse_body" in inspect.getsource(handler.fn):
            assert asked.body is not None, f"{name} says nothing of its body"
        if asked.body is not None:
            assert module is not None
            assert f"{asked.body.__name__})" in inspect.getsource(module), f"{name} does not parse {asked.body}"


def test_path_parameters_are_described(described: dict[str, Any]) -> None:
    for name, operation in operations(described).items():
        in_path = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"}
        assert in_path == set(re.findall(r"{(.*?)}", name)), name
    (lines,) = operations(described)["GET /edge/v1/logs"]["parameters"]
    assert lines == {
        "name": "lines", "in": "query", "required": False,
        "schema": {"type": "integer", "minimum": 1, "maximum": 5000, "default": 200},
    }  # fmt: skip


def test_every_schema_is_one_and_every_reference_leads_somewhere(described: dict[str, Any]) -> None:
    schemas = described["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    wanted = set(re.findall(r"'#/components/schemas/([^']+)'", repr(described)))
    assert wanted == set(schemas)


def test_errors_have_the_shape_of_the_paths_clients(described: dict[str, Any]) -> None:
    shapes = {
        "POST /v1/chat/completions": ("application/json", "OpenAIError"),
        "POST /api/chat": ("application/json", "OllamaError"),
        "POST /v1/messages": ("application/json", "AnthropicError"),
        "POST /tokenize": ("application/json", "OpenAIError"),
        "POST /edge/v1/models/load": ("application/problem+json", "Problem"),
    }
    for name, (media_type, struct) in shapes.items():
        responses = operations(described)[name]["responses"]
        assert {"200", "400", "401", "403", "404", "413", "500", "503", "504", "507"} <= set(responses), name
        for status in set(responses) - {"200"}:
            (body,) = responses[status]["content"].values()
            assert body["schema"] == {"$ref": f"#/components/schemas/{struct}"}
            assert media_type in responses[status]["content"]


def test_media_types_are_described(described: dict[str, Any]) -> None:
    answers = {
        name: o["responses"]["200"].get("content", {})
        for name, o in operations(described).items()
        if "200" in o["responses"]
    }
    assert set(answers["POST /v1/chat/completions"]) == {"application/json", "text/event-stream"}
    assert set(answers["POST /api/chat"]) == {"application/json", "application/x-ndjson"}
    assert set(answers["GET /livez"]) == {"application/json"}
    assert set(answers["GET /edge/v1/events"]) == {"text/event-stream"}
    assert all(len(name.split("/")) == 2 for content in answers.values() for name in content)


def test_keys_are_described(described: dict[str, Any]) -> None:
    assert set(described["components"]["securitySchemes"]) == {"bearer", "x-api-key"}
    assert "security" not in operations(described)["GET /livez"]
    assert operations(described)["POST /v1/embeddings"]["security"] == [
        {},
        {"bearer": ["embed"]},
        {"x-api-key": ["embed"]},
    ]
