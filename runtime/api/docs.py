"""The API page: plain HTML, readable without a network, a script or a style from anywhere else."""

from __future__ import annotations

import html
from typing import Any

from litestar import Request
from litestar.openapi.plugins import JsonRenderPlugin, OpenAPIRenderPlugin
from typing_extensions import override

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "td{padding:.2rem 1rem .2rem 0;vertical-align:top}code{font-family:ui-monospace,monospace}"
)
_METHODS = ("get", "post", "put", "patch", "delete")


def _row(method: str, path: str, operation: dict[str, Any]) -> str:
    text = html.escape(str(operation.get("description") or operation.get("summary") or ""))
    return f"<tr><td><code>{method.upper()}</code></td><td><code>{html.escape(path)}</code></td><td>{text}</td></tr>"


class PlainPagePlugin(OpenAPIRenderPlugin):
    """Lists every route with its description."""

    def __init__(self) -> None:
        super().__init__(path="/")

    @override
    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        """The page."""
        title = html.escape(str(openapi_schema["info"]["title"]))
        rows = [
            _row(method, path, item[method])
            for path, item in openapi_schema["paths"].items()
            for method in _METHODS
            if method in item
        ]
        return (
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
            f"<h1>{title}</h1><p>For programs: <a href=/docs/openapi.json>openapi.json</a></p>"
            f"<table>{''.join(rows)}</table></html>"
        ).encode()


PLUGINS = [PlainPagePlugin(), JsonRenderPlugin()]
