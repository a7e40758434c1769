"""What routes need, and what requests hold of their key's day."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from litestar import Litestar
from typing_extensions import override

from edge.access.keys import Key, Limits
from edge.access.quota import TokenDay
from edge.access.usage import Usage
from edge.config import Settings, client_key, load_settings, shown
from edge.errors import ConfigError, RateLimited
from edge.store.models import ModelStore
from edge.telemetry.service import Telemetry
from runtime.api.access import Caller, Meter
from runtime.api.app import Health, create_app
from runtime.api.appliance import Appliance
from runtime.api.schema import ModelInfo
from runtime.logs import RecentLines
from runtime.pool import Pool
from runtime.server import check_bind


def app_of(home: Path) -> Litestar:
    settings = Settings(home=home)
    store = ModelStore(settings.store_dir)
    return create_app(Appliance(settings, store, Pool(settings, store), Telemetry(settings), RecentLines()))


@pytest.mark.filterwarnings("ignore::litestar.exceptions.LitestarDeprecationWarning")
def test_every_route_says_what_it_needs_and_only_these_need_nothing(tmp_path: Path) -> None:
    needed: dict[str, object] = {}
    for route in app_of(tmp_path).routes:
        for handler in getattr(route, "route_handlers", []):
            for method in handler.http_methods - {"OPTIONS"}:
                needed[f"{method} {route.path}"] = handler.opt.get("needs")
    assert None not in needed.values(), needed
    open_routes = {name.partition(" ")[2] for name, need in needed.items() if need == "nothing"}
    assert {p for p in open_routes if not p.startswith("/docs")} == {"/", "/livez", "/readyz", "/health"}
    for name, need in needed.items():
        method, _, path = name.partition(" ")
        if path.startswith("/edge/v1/keys"):
            assert need == "admin", name
        elif path.startswith("/edge/v1/"):
            assert need in (("view",) if method == "GET" else ("operate", "admin")), name
        elif path.startswith(("/v1/files", "/v1/batches")):
            assert need == "key", name  # for those who may ask anything; what a batch asks is looked at by itself
        elif path.startswith("/v1/") and method == "POST":
            assert need in ("chat", "embed"), name


async def test_health_is_looked_at_once_however_many_ask(tmp_path: Path) -> None:
    class Counting(Appliance):
        num = 0

        @override
        async def model_infos(self, limits: Limits | None = None) -> list[ModelInfo]:
            self.num += 1
            return await super().model_infos(limits)

    settings = Settings(home=tmp_path)
    store = ModelStore(settings.store_dir)
    appliance = Counting(settings, store, Pool(settings, store), Telemetry(settings), RecentLines())
    health = Health(appliance, every_s=1000)
    await asyncio.gather(*(health.infos() for _ in range(20)))
    assert appliance.num == 1


class Answer:
    def __init__(self, prompt: int, cached: int, output: int, error: str | None = None, *, number: int = 0) -> None:
        self.known_model = "m"
        self.error_type = error
        self.tokens = (prompt, cached, output)
        self.prompt_number = number


@pytest.mark.parametrize(
    ("answers", "status", "used"),
    [
        ([Answer(10, 4, 3)], 200, Usage(1, 0, 0, 10, 3, 4, 0)),
        ([Answer(10, 9, 3), Answer(10, 4, 2)], 200, Usage(1, 0, 0, 10, 5, 4, 0)),
        ([Answer(10, 4, 3), Answer(8, 2, 2, number=1), Answer(8, 7, 2, number=1)], 200, Usage(1, 0, 0, 18, 7, 6, 0)),
        ([Answer(10, 4, 3, "worker_died")], 200, Usage(1, 1, 0, 0, 0, 0, 13)),
        ([Answer(10, 4, 3), Answer(0, 0, 0, "worker_died")], 500, Usage(1, 1, 0, 0, 0, 0, 13)),
        ([Answer(10, 4, 3, "cancelled")], 200, Usage(1, 0, 1, 0, 0, 0, 13)),
        ([Answer(10, 4, 3, "client_closed")], 499, Usage(1, 0, 1, 0, 0, 0, 13)),
        ([], 400, Usage(1, 1, 0, 0, 0, 0, 0)),
        ([], None, Usage(1, 0, 1, 0, 0, 0, 0)),
    ],
)
def test_a_request_is_charged_what_its_client_was_told(answers: list[Answer], status: int | None, used: Usage) -> None:
    assert Meter(Caller(None, "unix"), [*answers], status).usage() == used


def test_requests_at_once_cannot_take_more_than_the_day_and_one(tmp_path: Path) -> None:
    key = Key(id="k", name="k", limits=Limits(tokens_per_day=100), created_s=0.0, digest=b"")
    day = TokenDay(100, now_s=0.0)
    meters = [Meter(Caller(key, "unix"), day=day) for _ in range(3)]
    meters[0].hold(10)
    meters[0].hold(5000)  # the first may, with all that it asks for
    with pytest.raises(RateLimited):
        meters[1].hold(1)
    meters[0].release()
    meters[1].hold(60)
    meters[2].hold(30)
    with pytest.raises(RateLimited):
        meters[2].hold(30)
    meters[1].release()
    meters[2].hold(30)


def test_a_body_in_chunks_holds_what_comes() -> None:
    key = Key(id="k", name="k", limits=Limits(tokens_per_day=100), created_s=0.0, digest=b"")
    day = TokenDay(100, now_s=0.0)
    first, second, third = (Meter(Caller(key, "unix"), day=day) for _ in range(3))
    first.announce(0)
    for _ in range(200):
        first.arrive(1)
    second.announce(200)
    for _ in range(2):
        second.arrive(100)  # was announced
    third.announce(0)
    with pytest.raises(RateLimited):
        third.arrive(4)
    for meter in (first, second, third):
        meter.release()
    third.announce(400)


def settings_of(tmp_path: Path, **fields: object) -> Settings:
    return load_settings({"EDGE_HOME": str(tmp_path)}, fields)


def wide(**fields: object) -> Callable[[Path], Settings]:
    return lambda home: settings_of(home, host="192.0.2.1", **fields)


def test_a_wide_address_is_refused_without_keys_and_tls(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        settings = settings_of(tmp_path, host=host)
        check_bind(settings)
        assert not settings.needs_keys
    for host in ("0.0.0.0", "::", "192.0.2.1", "::ffff:127.0.0.1"):
        settings = settings_of(tmp_path, host=host)
        assert settings.needs_keys
        with pytest.raises(ConfigError) as refused:
            check_bind(settings)
        assert "edge key create" in str(refused.value)
        assert "--tls-cert" in str(refused.value)
    with pytest.raises(ConfigError, match="edge key create"):
        check_bind(wide(tls_by_proxy="nginx")(tmp_path))
    for host in ("edge.example", "127.1", "0", ""):
        with pytest.raises(ConfigError):
            check_bind(settings_of(tmp_path, host=host))


@pytest.mark.parametrize(
    "fields",
    [
        {"cors_origins": "*"},
        {"cors_origins": "https://panel.example/"},
        {"cors_origins": "panel.example"},
        {"cors_origins": "https://a@b.example"},
        {"cors_origins": "https://[oops"},
        {"tls_cert": "only.pem"},
        {"require_keys": "off"},
    ],
)
def test_settings_that_would_open_a_door_by_mistake_are_refused(tmp_path: Path, fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        settings_of(tmp_path, **fields)


def test_settings_are_shown_with_their_origin_and_no_password(tmp_path: Path) -> None:
    environ = {"EDGE_HOME": str(tmp_path), "EDGE_GATEWAY_URL": "https://me:secret@host:1", "EDGE_THREADS": "2"}
    found = {s.name: (s.value, s.origin) for s in shown(load_settings(environ, {"port": 9}))}
    assert found["gateway_url"] == ("https://***@host:1", "environment")
    assert (found["port"], found["threads"]) == ((9, "flag"), (2, "environment"))
    assert found["home"] == (str(tmp_path), "environment")
    assert found["step_tokens"] == (512, "default")


def test_a_proxy_that_ends_tls_makes_keys_needed_on_loopback(tmp_path: Path) -> None:
    assert settings_of(tmp_path, tls_by_proxy="nginx").needs_keys
    assert settings_of(tmp_path, require_keys="on").needs_keys


def test_the_key_of_commands_is_checked_and_not_told() -> None:
    assert client_key({}) is None
    assert client_key({"EDGE_API_KEY": " edge_x \n"}) == "edge_x"
    with pytest.raises(ConfigError) as refused:
        client_key({"EDGE_API_KEY": "edge_s3cret\r\nHost: x"})
    assert "s3cret" not in str(refused.value)
