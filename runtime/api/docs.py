"""The API's description, for programs and as plain HTML, readable without a network, a script or a style from anywhere
else."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import msgspec
from litestar import Litestar, get

from runtime.api.access import needs
from runtime.api.call import HttpRequest

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "td{padding:.2rem 1rem .2rem 0;vertical-align:top}code{font-family:ui-monospace,monospace}"
)


@dataclass(frozen=True, slots=True)
class Description:
    """The API's, in both forms."""

    json: bytes
    page: bytes


@get("/docs", opt=needs("nothing"), media_type="text/html")
async def docs_page(request: HttpRequest) -> bytes:
    """Every route with what it does."""
    return (await _description(request)).page


@get("/docs/openapi.json", opt=needs("nothing"), media_type="application/json")
async def docs_json(request: HttpRequest) -> bytes:
    """Every route with its parameters, bodies and answers, as OpenAPI has it."""
    return (await _description(request)).json


async def _description(request: HttpRequest) -> Description:
    state = request.app.state
    if "description" not in state:
        state.description = await asyncio.to_thread(_describe, request.app)
    made: Description = state.description
    return made


def _describe(app: Litestar) -> Description:
    from runtime.api.openapi import document  # few ever read it

    described = document(app)
    return Description(msgspec.json.encode(described), _page(described))


def _page(described: dict[str, Any]) -> bytes:
    import html

    rows = "".join(
        f"<tr><td><code>{method.upper()}</code></td><td><code>{html.escape(path)}</code></td>"
        f"<td>{html.escape(operation['summary'])}</td></tr>"
        for path, item in described["paths"].items()
        for method, operation in item.items()
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>slm-edge</title><style>{_STYLE}</style>"
        f"<h1>slm-edge</h1><p>For programs: <a href=/docs/openapi.json>openapi.json</a></p><table>{rows}</table></html>"
    ).encode()


HANDLERS = [docs_page, docs_json]
