"""How fast, when, and by which way models come: rate, window, mirrors, proxy."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import override

from edge.config import load_settings
from edge.errors import Cancelled, ConfigError, SourceUnavailable
from edge.store.fetch import Progress, pull
from edge.store.models import ModelStore
from edge.store.network import Network, Pace, Window, parse_mirrors, parse_rate
from edge.store.transfer import Control
from tests.edge.file_server import ServedFile, serve
from tests.edge.gguf_files import sized_gguf

TIMES = st.times().map(lambda time: time.replace(second=0, microsecond=0))


@pytest.mark.parametrize(
    ("text", "rate"), [("", 0), ("off", 0), ("500k", 500_000), ("2M", 2_000_000), ("1.5MB/s", 1_500_000), ("7", 7)]
)
def test_rates(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["0", "0.1", "-1", "fast", "2T", "2M 3", "1e9", "M"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no rate"):
        parse_rate(text)


@given(TIMES, TIMES, TIMES)
def test_a_window_and_the_rest_of_the_day_are_a_whole_day(
    start: datetime.time, end: datetime.time, now: datetime.time
) -> None:
    if start == end:
        return
    parsed = Window.parse(f"{start:%H:%M}-{end:%H:%M}")
    assert parsed is not None
    assert parsed == Window(start, end)
    assert parsed.has(now) != Window(end, start).has(now)
    assert parsed.has(start)
    assert not parsed.has(end)


@pytest.mark.parametrize("text", ["22:00", "22-6", "24:00-01:00", "22:60-06:00", "06:00-06:00", "night"])
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Window.parse(text)


class Clock:
    """Seconds that pass by waiting only."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.day = datetime.datetime(2026, 11, 20, 21, 59, tzinfo=datetime.UTC)

    def wait(self, duration_s: float) -> None:
        self.now_s += duration_s
        self.day += datetime.timedelta(seconds=duration_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()

    def pause(_: Control, duration_s: float) -> None:
        found.wait(duration_s)

    monkeypatch.setattr(Control, "pause", pause)
    return found


def test_bytes_take_as_long_as_the_rate_says_for_all_together(clock: Clock) -> None:
    pace, control = Pace(1000, clock=lambda: clock.now_s), Control(lambda _: None, lambda: False)
    for num_bytes in (300, 0, 1200, 500):
        pace.take(num_bytes, control)
    assert round(clock.now_s, 6) == 102.0
    clock.wait(60)
    pace.take(1000, control)
    assert round(clock.now_s, 6) == 163.0, "what was not used is not made up for"


def test_a_pull_waits_for_its_window_and_pauses_when_it_is_over(clock: Clock, tmp_path: Path) -> None:
    window, data, seen = Window(datetime.time(22), datetime.time(22, 10)), sized_gguf(8_000), set[str]()

    def progress(at: Progress) -> None:
        seen.add(at.message)
        if at.message.startswith("fetching"):
            assert clock.day.hour == 22
            assert clock.day.minute <= 11
            clock.wait(60)

    with serve({"/m.gguf": ServedFile(data)}) as server:
        network = Network(pace=Pace(0, window, now=lambda: clock.day.time()))
        model = pull(ModelStore(tmp_path / "store"), f"{server.url}/m.gguf", network=network, progress=progress)
        assert len(server.requests("GET")) > 2
    assert model.weights.read_bytes() == data
    assert "waiting until 22:00, as the schedule has it" in seen


def test_a_pull_that_waits_can_be_cancelled(tmp_path: Path) -> None:
    pace = Pace(0, Window(datetime.time(1), datetime.time(2)), now=lambda: datetime.time(12))
    with serve({"/m.gguf": ServedFile(sized_gguf(10))}) as server, pytest.raises(Cancelled):
        pull(
            ModelStore(tmp_path / "store"), f"{server.url}/m.gguf", network=Network(pace=pace),
            cancelled=lambda: bool(server.requests("HEAD")),
        )  # fmt: skip


def test_mirrors_are_read_in_their_order() -> None:
    text = "Registry.example.org=mirror.lan:5000, registry.example.org=registry.example.org ,docker.io=mirror.lan/hub"
    assert parse_mirrors(text) == {
        "registry.example.org": ("mirror.lan:5000", "registry.example.org"), "docker.io": ("mirror.lan/hub",),
    }  # fmt: skip
    assert parse_mirrors("") == {}


@pytest.mark.parametrize("text", ["mirror.lan", "=mirror.lan", "a=", "a=https://b", "a=u@b"])
def test_what_is_no_mirror_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no mirror"):
        parse_mirrors(text)


def test_settings_say_how_and_a_command_may_say_otherwise(tmp_path: Path) -> None:
    environ = {
        "EDGE_HOME": str(tmp_path), "EDGE_PULL_RATE": "1M", "EDGE_PULL_WINDOW": "22:00-06:00",
        "EDGE_PULL_HTTP_HOSTS": "10.0.0.5:5000", "EDGE_PULL_NO_PROXY": ".lan",
    }  # fmt: skip
    settings = load_settings(environ)
    network = Network.of(settings)
    assert network.pace.rate_bytes_s == 1_000_000
    assert network.pace.window == Window(datetime.time(22), datetime.time(6))
    assert network.auth_file == tmp_path / "registry-auth.json"
    other = Network.of(settings, rate="off", window="off")
    assert (other.pace.rate_bytes_s, other.pace.window) == (0, None)
    urls = [network.base_url(host) for host in ("10.0.0.5:5000", "127.0.0.1:5000", "[::1]:5", "localhost", "a.org")]
    assert [url.partition(":")[0] for url in urls] == ["http", "http", "http", "http", "https"]


@pytest.mark.parametrize("proxy", ["nonsense", "ftp://proxy.lan"])
def test_a_proxy_that_is_none_is_named(proxy: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pull_proxy"):
        pull(ModelStore(tmp_path / "store"), "http://example.org/m.gguf", network=Network(proxy=proxy))


class Endless(httpx.SyncByteStream):
    """A body that fails the test when it is read."""

    @override
    def __iter__(self) -> Iterator[bytes]:
        raise AssertionError("nobody may read this")


def answering(monkeypatch: pytest.MonkeyPatch, *answers: httpx.Response) -> httpx.Client:
    left = iter(answers)

    def answer(_transport: httpx.HTTPTransport, _request: httpx.Request) -> httpx.Response:
        return next(left)

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", answer)
    return Network().client({})


@pytest.mark.parametrize("encoding", ["", "gzip"])
def test_what_a_redirect_says_beside_its_place_is_not_read(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    headers = {"Location": "/there", **({"Content-Encoding": encoding} if encoding else {})}
    redirect = httpx.Response(302, headers=headers, stream=Endless())
    with answering(monkeypatch, redirect, httpx.Response(200, content=b"here")) as client:
        assert client.get("http://a.example.org/").content == b"here"


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "identity, br"])
def test_packed_answers_are_refused_unread(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    packed = httpx.Response(200, headers={"Content-Encoding": encoding}, stream=Endless())
    with answering(monkeypatch, packed) as client, pytest.raises(SourceUnavailable, match="packed"):
        client.get("http://a.example.org/")


def test_a_packed_error_keeps_its_status_only(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = httpx.Response(404, headers={"Content-Encoding": "gzip"}, stream=Endless())
    with answering(monkeypatch, packed, httpx.Response(200, headers={"Content-Encoding": "identity"})) as client:
        found = client.get("http://a.example.org/")
        assert (found.status_code, found.content) == (404, b"")
        assert client.get("http://a.example.org/").status_code == 200
