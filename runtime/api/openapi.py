"""The description of the API (OpenAPI 3.1.1): made of the routes, the scopes they need, the structs that parse bodies,
and the table of errors. It takes some hundredths of a second, so it is made when it is first asked for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin

import msgspec
from litestar import Litestar, Response
from litestar.enums import MediaType
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute

from edge import errors
from runtime.api.access import METERED, Need
from runtime.api.describe import ASKING, EVENTS, NAMING, OPERATING, Errors, Exchange
from runtime.api.errors import (
    STATUS,
    AnthropicError,
    OpenAIError,
    RegistryErrors,
    is_anthropic_path,
    is_ollama_path,
    is_openai_path,
    is_registry_path,
)
from runtime.api.responses import EventStream
from runtime.api.schema import OllamaError, Problem

VERSION = "1"
"""Of this API, for who reads its description without a key; the appliance's own is told to those who have one."""
JSON = "application/json"
Schema = dict[str, Any]

_INJECTED = frozenset({"request", "state", "scope", "headers", "body"})
"""Parameters of handlers that no client sends."""
_STREAMED: Mapping[str, Schema] = {
    EVENTS: {"description": "Server-sent events: `data` is JSON, and `event` says which where there are kinds."}
}
"""Some read the schema of a stream as that of each of its events: so it names no type."""
_NO_ERROR_CLASS = {413: "body_too_large", 414: "target_too_long", 500: "internal_error"}
_HEADERS: Mapping[int, str] = {401: "WWW-Authenticate", 429: "Retry-After", 503: "Retry-After"}
_SECURITY = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "A key of `edge key create`, as OpenAI's clients do.",
    },
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "As Anthropic's clients do."},
}


def document(app: Litestar) -> Schema:
    """All routes of an application."""
    operations = list(_operations(app))
    kinds = _unique(kind for o in operations for kind in o.kinds())
    found, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}", schema_hook=_anything
    )
    schemas = _Schemas(kinds, found)
    paths: dict[str, Schema] = {}
    for o in operations:
        paths.setdefault(o.path, {})[o.method.lower()] = o.described(schemas)
    return {
        "openapi": "3.1.1",
        "info": {"title": "slm-edge", "version": VERSION},
        "servers": [{"url": "/"}],
        "paths": dict(sorted(paths.items())),
        "components": {"schemas": components, "securitySchemes": _SECURITY},
    }


def _operations(app: Litestar) -> Iterator[_Operation]:
    for route in app.routes:
        if isinstance(route, HTTPRoute):
            for handler in route.route_handlers:
                for method in sorted(handler.http_methods - {"OPTIONS"}):  # those are the browsers', and the guard's
                    yield _Operation(str(method), route.path_format or "/", handler, frozenset(route.path_parameters))


def _anything(kind: type) -> Schema:
    if kind is object:
        return {"description": "Any JSON."}
    raise NotImplementedError(kind)  # how a schema hook says that it has no schema for a type (msgspec)


def _unique(kinds: Iterable[object]) -> list[object]:
    found: list[object] = []
    for kind in kinds:
        if kind not in found:
            found.append(kind)
    return found


class _Schemas:
    """The schema of each type."""

    def __init__(self, kinds: list[object], schemas: tuple[Schema, ...]) -> None:
        self._kinds = kinds
        self._schemas = schemas

    def of(self, kind: object) -> Schema:
        return self._schemas[self._kinds.index(kind)]


@dataclass(frozen=True, slots=True)
class _Operation:
    """One method of one route."""

    method: str
    path: str
    handler: HTTPRouteHandler
    path_names: frozenset[str]

    @property
    def exchange(self) -> Exchange:
        found: Exchange = self.handler.opt.get("exchange", Exchange())
        return found

    @property
    def need(self) -> Need:
        need: Need = self.handler.opt.get("needs", "admin")
        return need

    @property
    def _media_type(self) -> str:
        """Of an answer that comes as a whole."""
        found = self.handler.media_type
        return (found.value if isinstance(found, MediaType) else found) or JSON

    def kinds(self) -> Iterator[object]:
        """Types of bodies."""
        yield _error_of(self.path)
        yield from (kind for kind in self._answers().values() if kind not in (None, bytes))
        if self.exchange.body is not None:
            yield self.exchange.body

    def described(self, schemas: _Schemas) -> Schema:
        """The operation object."""
        text = inspect.cleandoc(self.handler.fn.__doc__ or "")
        parameters = self._parameters()
        wanted: Schema = {
            "operationId": "_".join([self.method.lower(), *re.findall(r"\w+", self.path)]),
            "tags": [_tag(self.path)],
            "summary": " ".join(text.partition("\n\n")[0].split()),
            "responses": self._responses(schemas),
        }
        if parameters:
            wanted["parameters"] = parameters
        if content := self._body(schemas):
            wanted["requestBody"] = {"required": True, "content": content}
        if self.need != "nothing":
            # where no key is needed, none is sent; scopes are named in the description only, as 3.1 allows
            scopes = [] if self.need == "key" else [self.need]
            wanted["security"] = [{}, {"bearer": scopes}, {"x-api-key": scopes}]
        return wanted

    def _body(self, schemas: _Schemas) -> Schema:
        asked = self.exchange
        schema = {"type": "string", "format": "binary"} if asked.body is None else schemas.of(asked.body)
        return {asked.sends or JSON: {"schema": schema}} if asked.sends or asked.body else {}

    def _parameters(self) -> list[Schema]:
        """Those of path and query, as the handler's signature has them."""
        fields = msgspec.structs.fields(self.handler.signature_model)
        return [self._parameter(f) for f in fields if f.name not in _INJECTED]

    def _parameter(self, field: msgspec.structs.FieldInfo) -> Schema:
        is_path = field.name in self.path_names
        schema = _not_null(msgspec.json.schema(field.type))
        if field.default not in (None, msgspec.NODEFAULT):
            schema["default"] = field.default
        where = {"in": "path", "required": True} if is_path else {"in": "query", "required": field.required}
        return {"name": field.name, **where, "schema": schema}

    def _answers(self) -> dict[int, object]:
        """Each status of a good answer, and the type of its body."""
        kinds = list(_body_kinds(self.handler.parsed_fn_signature.return_type.annotation))
        if self.exchange.streams:
            kinds = [kind for kind in kinds if kind is not bytes]
        assert len(kinds) <= 1, f"{self.method} {self.path} answers with {kinds}"
        return {self.handler.status_code: kinds[0] if kinds else None, **self.exchange.also}

    def _responses(self, schemas: _Schemas) -> Schema:
        faults = self._faults()
        found = {status: self._fault(status, codes, schemas) for status, codes in faults.items()}
        for status, kind in self._answers().items():
            found[status] = self._answer(status, kind, schemas)
        return {str(status): found[status] for status in sorted(found)}

    def _answer(self, status: int, kind: object, schemas: _Schemas) -> Schema:
        content: Schema = {}
        if self.method != "HEAD":
            if kind is not None:
                content[self._media_type] = {"schema": {} if kind is bytes else schemas.of(kind)}
            if self.exchange.streams and status == self.handler.status_code:
                content[self.exchange.streams] = {"schema": _STREAMED.get(self.exchange.streams, {"type": "string"})}
        return {
            "description": "The answer." if status < 400 else "As it says.",
            **({"content": content} if content else {}),
        }

    def _fault(self, status: int, codes: list[str], schemas: _Schemas) -> Schema:
        media_type = JSON if _error_of(self.path) is not Problem else "application/problem+json"
        described: Schema = {"description": ", ".join(f"`{code}`" for code in codes)}
        if self.method != "HEAD":
            described["content"] = {media_type: {"schema": schemas.of(_error_of(self.path))}}
        if status in _HEADERS:
            described["headers"] = {_HEADERS[status]: {"schema": {"type": "string"}}}
        return described

    def _faults(self) -> dict[int, list[str]]:
        """Each status of an error, and the codes that come with it."""
        found = {500: [_NO_ERROR_CLASS[500]]}
        if self.exchange.body or self.exchange.sends:
            found[413] = [_NO_ERROR_CLASS[413]]
        if self._parameters():
            found[414] = [_NO_ERROR_CLASS[414]]
        for kind in self._errors():
            codes = found.setdefault(STATUS[kind], [])
            if kind.code not in codes:
                codes.append(kind.code)
        return found

    def _errors(self) -> Errors:
        reads = bool(self.exchange.body or self.exchange.sends or self._parameters())
        return (
            errors.Forbidden,
            *((errors.Unauthorized,) if self.need != "nothing" else ()),
            *((errors.InvalidRequest,) if reads else ()),
            *(ASKING if self.need in METERED and self.method == "POST" else ()),
            *(OPERATING if self.need in ("operate", "admin") and self.method != "GET" else ()),
            *(NAMING if self.need == "key" and reads else ()),
            *self.exchange.errors,
        )


def _body_kinds(annotation: Any) -> Iterator[object]:
    """The types of bodies that a handler's return annotation names."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from _body_kinds(part)
    elif origin is Response:
        yield from (kind for kind in get_args(annotation) if kind is not type(None))
    elif annotation not in (None, type(None), EventStream):
        yield annotation


def _not_null(schema: Schema) -> Schema:
    """Of a parameter: who leaves it out sends no null."""
    options = [option for option in schema.get("anyOf", ()) if option != {"type": "null"}]
    return {**schema, "anyOf": options} if len(options) > 1 else (options[0] if options else schema)


def _error_of(path: str) -> type[msgspec.Struct]:
    if is_anthropic_path(path):
        return AnthropicError
    if is_openai_path(path):
        return OpenAIError
    if is_registry_path(path):
        return RegistryErrors
    return OllamaError if is_ollama_path(path) else Problem


def _tag(path: str) -> str:
    tags = {
        "/v1/messages": "Anthropic", "/v1/": "OpenAI", "/api/": "Ollama", "/v2": "registry", "/edge/v1/": "operator",
    }  # fmt: skip
    return next((tag for prefix, tag in tags.items() if path.startswith(prefix)), "server")
