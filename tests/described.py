"""Holds what an appliance answers against its own description."""

from __future__ import annotations

import re
from typing import Any

import httpx
import jsonschema


class Described:
    """An OpenAPI document, and whether answers are as it says."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document

    def operation(self, method: str, path: str) -> dict[str, Any]:
        """What is said of a request; nothing where there is no such route."""
        paths: dict[str, dict[str, Any]] = self.document["paths"]
        fits = [known for known in paths if re.fullmatch(re.sub(r"\{.*?\}", ".+", known), path)]
        closest = max(fits, key=len, default="")  # a parameter may have slashes
        found: dict[str, Any] = paths.get(path, paths.get(closest, {})).get(method.lower(), {})
        return found

    def check(self, reply: httpx.Response) -> None:
        """Fail unless status, media type and body of an answer to a route that is there are as described."""
        method, path = reply.request.method, reply.request.url.path
        if not (operation := self.operation(method, path)):
            assert reply.status_code in (404, 405), f"{method} {path}: {reply.status_code}"
            return
        told: dict[str, Any] | None = operation["responses"].get(str(reply.status_code))
        assert told is not None, f"{method} {path}: {reply.status_code} is not described: {reply.text[:300]}"
        content: dict[str, Any] = told.get("content", {})
        media_type = reply.headers.get("content-type", "").partition(";")[0]
        media_type = "*/*" if "*/*" in content else media_type  # a file of any kind
        assert media_type in content or not (content or reply.content), f"{method} {path}: {media_type}, not {content}"
        if media_type.endswith("json") and content:
            schema = {**content[media_type]["schema"], "components": self.document["components"]}
            jsonschema.validate(reply.json(), schema, jsonschema.Draft202012Validator)
