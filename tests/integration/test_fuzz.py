"""What schemathesis makes of the API's description: requests that obey it, and requests that do not. Every answer is a
described one, and none is a fault of the server."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from tests.support import DEFAULT_MODEL, RunningAppliance, chat_body

EMBEDDER = "minilm:l6-v2"
ENDLESS = ("GET", "/edge/v1/events")
DONE_BY_NOBODY = {"/api/push", "/v1/moderations"}
"""These say 501, which is described, and no fault."""
SHORT: dict[str, Any] = {
    "/v1/chat/completions": {"max_tokens": 2},
    "/v1/completions": {"max_tokens": 2},
    "/v1/responses": {"max_output_tokens": 16},
    "/v1/messages": {"max_tokens": 2},
    "/api/chat": {"options": {"num_predict": 2}},
    "/api/generate": {"options": {"num_predict": 2}},
}
"""What keeps answers short."""
MODELS = {
    "/v1/embeddings": EMBEDDER,
    "/api/embed": EMBEDDER,
    "/api/embeddings": EMBEDDER,
    **dict.fromkeys(SHORT, DEFAULT_MODEL),
}


def tame(path: str, body: dict[str, Any]) -> None:
    """Keep the answer short, and name a model that is there in every other request that would go to one."""
    draw = zlib.crc32(repr(body).encode())
    body.update(SHORT.get(path, {}))
    if path in MODELS and draw % 2:
        body["model"] = MODELS[path]
    if isinstance(allowed_s := body.get("timeout_s"), float | int) and 0 < allowed_s < 60:
        body["timeout_s"] = 60  # who has no time gets 504


def operations(appliance: RunningAppliance) -> Iterator[tuple[str, Any]]:
    schemathesis = import_module("schemathesis")  # slow to import
    with appliance.client() as http:
        schema = schemathesis.openapi.from_dict(http.get("/docs/openapi.json").json())
    schema.config.update(base_url=appliance.url)
    for found in schema.get_all_operations():
        operation = found.ok()
        if (operation.method.upper(), operation.path) != ENDLESS:
            yield f"{operation.method.upper()} {operation.path}", operation


def checks() -> list[Callable[..., object]]:
    module = import_module("schemathesis.specs.openapi.checks")
    names = ("status_code", "content_type", "response_headers", "response_schema")
    return [getattr(module, f"{name}_conformance") for name in names]


CALM = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


def _all_of(error: Any) -> str:
    return "\n".join([str(error), *map(_all_of, getattr(error, "exceptions", ()))])


def fuzz(appliance: RunningAppliance, *, num_examples: int, part: int = 0, num_parts: int = 1) -> int:
    """Ask every operation of a part so many times in each way; how many requests that were."""
    mode = import_module("schemathesis").GenerationMode
    wanted, num_asked, failed = checks(), 0, list[str]()
    for name, operation in list(operations(appliance))[part::num_parts]:
        for way in (mode.POSITIVE, mode.NEGATIVE):

            @settings(CALM, max_examples=num_examples)
            @given(case=operation.as_strategy(generation_mode=way))
            def ask(case: Any) -> None:
                nonlocal num_asked
                num_asked += 1
                if type(case.body) is dict:
                    tame(case.path, cast("dict[str, Any]", case.body))
                reply = case.call(timeout=60)
                assert reply.status_code < 500 or case.path in DONE_BY_NOBODY, reply.text
                case.validate_response(reply, checks=wanted)

            try:
                ask()
            except Unsatisfiable:
                assert way is mode.NEGATIVE, f"{name} allows nothing"  # where nothing is sent, nothing can be wrong
            except (Exception, BaseExceptionGroup) as e:
                failed.append(f"{name}: {_all_of(e)}")
    assert not failed, "\n\n".join(failed)
    return num_asked


def test_a_few_requests_of_each_kind(appliance: RunningAppliance) -> None:
    print(f"{fuzz(appliance, num_examples=2)} requests")
    with appliance.client() as http:
        http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=1)).raise_for_status()


@pytest.mark.soak
@pytest.mark.parametrize("part", range(6))
def test_a_hundred_requests_of_each_kind(appliance: RunningAppliance, part: int) -> None:
    print(f"{fuzz(appliance, num_examples=100, part=part, num_parts=6)} requests")
    with appliance.client() as http:
        http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=1)).raise_for_status()
