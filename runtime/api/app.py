"""The application: every route, and errors in one place."""

from __future__ import annotations

import asyncio
import time

from litestar import Litestar, Response, get
from litestar.datastructures import State
from litestar.plugins import PluginProtocol
from litestar.plugins.core import MsgspecDIPlugin
from typing_extensions import override

from runtime.api import (
    admin,
    anthropic,
    completions,
    docs,
    embeddings,
    keys,
    moderations,
    ollama,
    ollama_models,
    openai,
    openai_responses,
    registry,
    slots,
    tokens,
)
from runtime.api.access import needs
from runtime.api.appliance import Appliance, appliance_of
from runtime.api.batches import routes as batches
from runtime.api.batches.service import BatchService
from runtime.api.call import HttpRequest
from runtime.api.describe import exchanges
from runtime.api.errors import to_response
from runtime.api.guard import caller_of, guard
from runtime.api.moderations import Moderator
from runtime.api.schema import ModelInfo

PARTS = (
    openai, completions, openai_responses, anthropic, tokens, embeddings, moderations, batches, ollama, ollama_models,
    admin, slots, keys, registry, docs,
)  # fmt: skip
HEALTH_S = 1.0
PROMETHEUS_TYPE = "text/plain; version=0.0.4"


class Health:
    """The state of the models, looked at once in `every_s` seconds: anyone may ask for it, as often as he likes."""

    def __init__(self, appliance: Appliance, *, every_s: float = HEALTH_S) -> None:
        self._appliance = appliance
        self._every_s = every_s
        self._infos: list[ModelInfo] = []
        self._looked_s = float("-inf")
        self._lock = asyncio.Lock()

    async def infos(self) -> list[ModelInfo]:
        """Every model of the store and its state."""
        async with self._lock:
            if time.monotonic() - self._looked_s > self._every_s:
                self._infos = await self._appliance.model_infos()
                self._looked_s = time.monotonic()
            return self._infos


@get("/livez", opt=needs("nothing"), sync_to_thread=False)
def livez() -> dict[str, str]:
    """The front process answers."""
    return {"status": "ok"}


@get("/readyz", opt=needs("nothing") | exchanges(also={503: dict[str, str]}))
async def readyz(state: State) -> Response[dict[str, str]]:
    """Whether requests can be served: a model is there that did not fail to load, and nobody asked it to stop."""
    if appliance_of(state).pool.is_stopping:
        return Response({"status": "stopping"}, status_code=503)
    infos = _that_count(await _health_of(state).infos())
    if not infos:
        return Response({"status": "no models"}, status_code=503)
    if all(i.state == "failed" for i in infos):
        return Response({"status": "no model can be loaded"}, status_code=503)
    return Response({"status": "ok"}, status_code=200)


@get("/health", opt=needs("nothing") | exchanges(also={503: dict[str, str]}))
async def health(state: State) -> Response[dict[str, str]]:
    """As `/readyz`, under llama-server's name."""
    if appliance_of(state).pool.is_stopping:
        return Response({"status": "stopping"}, status_code=503)
    known = await _health_of(state).infos()
    infos = _that_count(known)
    if not infos or all(i.state == "failed" for i in infos):
        return Response({"status": "error"}, status_code=503)
    if any(i.state == "loading" for i in known) and not any(i.state == "ready" for i in infos):
        return Response({"status": "loading model"}, status_code=503)
    return Response({"status": "ok"}, status_code=200)


def _health_of(state: State) -> Health:
    health: Health = state.health
    return health


def _that_count(infos: list[ModelInfo]) -> list[ModelInfo]:
    """Models that make text; the others only where there is none of these, lest one of them hide that all failed."""
    return [i for i in infos if i.kind == "text"] or [i for i in infos if i.kind != "adapter"]


@get("/metrics", opt=needs("view"), media_type=PROMETHEUS_TYPE)
async def metrics(request: HttpRequest, state: State) -> str:
    """Prometheus text format; of all models, so not for a key that is for some."""
    caller_of(request.scope).check_all_models()
    return appliance_of(state).telemetry.prometheus()


class _MsgspecApp(Litestar):
    """Litestar for msgspec only. What it adds for pydantic and attrs where they are installed would take 70 ms of every
    start, and 15 MB."""

    @staticmethod
    @override
    def _get_default_plugins(plugins: list[PluginProtocol]) -> list[PluginProtocol]:
        return [*plugins, MsgspecDIPlugin()]


def create_app(appliance: Appliance) -> Litestar:
    """The ASGI application of an appliance, which it starts and closes."""
    service = BatchService(appliance)
    state = {
        "appliance": appliance, "health": Health(appliance), "batches": service,
        "moderator": Moderator(appliance.settings.moderation),
    }  # fmt: skip
    return _MsgspecApp(
        [livez, readyz, health, metrics, *(handler for part in PARTS for handler in part.HANDLERS)],
        state=State(state),
        middleware=[guard(appliance.settings, appliance.access)],
        exception_handlers={Exception: to_response},
        request_max_body_size=appliance.settings.max_body_bytes,
        openapi_config=None,
        on_startup=[appliance.start, service.start],
        on_shutdown=[service.close, appliance.close],
        logging_config=None,
    )
