"""Streams that begin before their model is loaded."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge.config import Settings
from edge.store.models import ModelStore
from edge.telemetry.service import Telemetry
from runtime.api import call
from runtime.api.app import create_app
from runtime.api.appliance import Appliance
from runtime.logs import RecentLines
from runtime.pool import Pool
from tests.support import DEFAULT_MODEL, sse_events


@pytest.mark.filterwarnings("ignore::litestar.exceptions.LitestarDeprecationWarning")
async def test_a_response_that_began_late_ends_with_what_its_model_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call, "SILENCE_S", 0.02)
    settings = Settings(home=tmp_path)
    store = ModelStore(settings.store_dir, seed=settings.seed)
    app = create_app(Appliance(settings, store, Pool(settings, store), Telemetry(settings), RecentLines()))
    body: dict[str, Any] = {
        "model": DEFAULT_MODEL,
        "input": "Hi",
        "max_output_tokens": 2,
        "reasoning": {"effort": "low"},
    }
    transport = httpx.ASGITransport(app)  # pyright: ignore[reportArgumentType]  # both name the same ASGI types their own way
    async with (
        app.lifespan(),
        asyncio.timeout(100),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as http,
    ):
        reply = await http.post("/v1/responses", json=body | {"stream": True})
        events = list(sse_events(iter(reply.text.splitlines())))
        whole = (await http.post("/v1/responses", json=body)).json()
        kept = (await http.get(f"/v1/responses/{events[-1]['response']['id']}")).json()
    first, last = events[0]["response"], events[-1]["response"]
    assert (first["temperature"], first.get("warnings")) == (None, None), "it began before its model was loaded"
    for found in (last, kept, whole):
        assert (found["model"], found["temperature"], found["top_p"]) == (DEFAULT_MODEL, 0.2, 0.9)
        assert [w.partition(" ")[0] for w in found["warnings"]] == ["reasoning.effort"]
