"""How the places that models come from are reached: proxy, certificates, mirrors, and how fast and when."""

from __future__ import annotations

import datetime
import re
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from edge import __version__
from edge.config import Settings, is_loopback, listed
from edge.errors import ConfigError, SourceUnavailable

from .internet import InternetTransport
from .transfer import Control

_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_RATE = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)\s?([kmg]?)(?:i?b)?(?:/s)?", re.IGNORECASE)
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3}
_WINDOW = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)-([01]?\d|2[0-3]):([0-5]\d)")
_LOOK_AGAIN_S = 30.0
"""While a window is closed: somebody may set the clock."""
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Window:
    """A part of each day, by this machine's clock and time zone; it may go over midnight."""

    start: datetime.time
    end: datetime.time

    @classmethod
    def parse(cls, text: str) -> Window | None:
        """Read ``22:00-06:00``; nothing, or ``off``, is any time.

        Raises:
            ConfigError: It is something else, or no time at all.
        """
        if text.strip() in ("", "off"):
            return None
        found = _WINDOW.fullmatch(text.strip())
        if found is None:
            raise ConfigError(f"{text[:40]!r} is no part of a day.", hint="Write it as 22:00-06:00.")
        start, end = datetime.time(int(found[1]), int(found[2])), datetime.time(int(found[3]), int(found[4]))
        if start == end:
            raise ConfigError(f"{text[:40]!r} begins when it ends.", hint="For any time of the day, leave it out.")
        return cls(start, end)

    def has(self, now: datetime.time) -> bool:
        """Whether this time is within."""
        if self.start < self.end:
            return self.start <= now < self.end
        return now >= self.start or now < self.end


def parse_rate(text: str) -> int:
    """Bytes a second of ``2M``, ``500k`` or ``1.5MB/s``, in powers of 1000; 0, without a limit, of nothing or ``off``.

    Raises:
        ConfigError: It is no rate, or 0.
    """
    if text.strip() in ("", "off"):
        return 0
    found = _RATE.fullmatch(text.strip())
    rate = int(float(found[1]) * _UNITS[found[2].lower()]) if found else 0
    if rate < 1:
        raise ConfigError(f"{text[:40]!r} is no rate.", hint="Bytes a second, as 500k or 2M.")
    return rate


class Pace:
    """How fast bytes may go, and at which time of the day. Threads that share one share its rate.

    Args:
        rate_bytes_s: None or 0 is without a limit.
        clock: Seconds, never set back.
        now: This machine's time of the day.
    """

    def __init__(
        self,
        rate_bytes_s: int = 0,
        window: Window | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime.time] = lambda: datetime.datetime.now().astimezone().time(),
    ) -> None:
        self.rate_bytes_s = rate_bytes_s
        self.window = window
        self._clock = clock
        self._now = now
        self._free_at = 0.0
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether bytes may go now."""
        return self.window is None or self.window.has(self._now())

    def admit(self, control: Control) -> None:
        """Wait for the window to open.

        Raises:
            Cancelled: Somebody asked for it.
        """
        while self.window is not None and not self.is_open:
            control.report(0, None, f"waiting until {self.window.start:%H:%M}, as the schedule has it")
            control.pause(_LOOK_AGAIN_S)

    def take(self, num_bytes: int, control: Control) -> None:
        """Wait until so many bytes more may go, or have gone.

        Raises:
            Cancelled: Somebody asked for it.
        """
        if not self.rate_bytes_s:
            return
        with self._lock:
            now = self._clock()
            self._free_at = max(now, self._free_at) + num_bytes / self.rate_bytes_s
            wait_s = self._free_at - now
        control.pause(wait_s)


def parse_mirrors(text: str) -> dict[str, tuple[str, ...]]:
    """Read ``HOST=MIRROR, HOST=MIRROR``: for each registry the places that have the same, in the order of asking.

    Raises:
        ConfigError: A part is of another form.
    """
    found: dict[str, tuple[str, ...]] = {}
    for part in (part.strip() for part in text.split(",") if part.strip()):
        host, equals, mirror = (piece.strip() for piece in part.partition("="))
        if not equals or not host or not mirror or "://" in part or "@" in part:
            raise ConfigError(
                f"pull_mirrors: {part[:80]!r} is no mirror.",
                hint="Write HOST=MIRROR, as registry.example.org=mirror.lan:5000; more after a comma.",
            )
        found[host.lower()] = (*found.get(host.lower(), ()), mirror.lower())
    return found


@dataclass(frozen=True, slots=True)
class Network:
    """How this device reaches the places that models come from. What it says of is read from the settings."""

    proxy: str = ""
    """Empty: as HTTPS_PROXY, HTTP_PROXY and NO_PROXY say."""
    no_proxy: tuple[str, ...] = ()
    ca_file: str = ""
    """Certificates to believe beside the usual ones."""
    pace: Pace = field(default_factory=Pace)
    mirrors: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """``HOST[:PORT][/PREFIX]`` of the places that have what a registry has."""
    http_hosts: frozenset[str] = frozenset()
    """Registries that are spoken to without TLS, beside those of this machine."""
    auth_file: Path | None = None
    """Names and passwords for registries, in Docker's form."""
    private_hosts: frozenset[str] | None = None
    """Hosts that may be asked beside those of the internet; None is any. See `edge.store.internet`."""

    @classmethod
    def of(cls, settings: Settings, *, rate: str = "", window: str = "") -> Network:
        """As the settings say, with the rate and the window of one command in the place of theirs.

        Raises:
            ConfigError: A setting, or one of these, cannot be read.
        """
        pace = Pace(parse_rate(rate or settings.pull_rate), Window.parse(window or settings.pull_window))
        return cls(
            proxy=settings.pull_proxy,
            no_proxy=tuple(sorted(listed(settings.pull_no_proxy))),
            ca_file=settings.pull_ca,
            pace=pace,
            mirrors=parse_mirrors(settings.pull_mirrors),
            http_hosts=listed(settings.pull_http_hosts),
            auth_file=settings.registry_auth,
        )

    def client(self, headers: Mapping[str, str], *, auth: httpx.Auth | None = None) -> httpx.Client:
        """A client that the caller closes.

        Raises:
            ConfigError: The file of certificates cannot be read, or the proxy's address.
        """
        tls = _tls_context(self.ca_file)
        # identity: a compressed transfer has no stable byte positions to resume at.
        known = {"User-Agent": f"slm-edge/{__version__}", "Accept-Encoding": "identity", **headers}
        transport = InternetTransport(self.private_hosts, tls) if self.private_hosts is not None else None
        direct = {f"all://{_bracketed(host)}": None for host in (*_LOOPBACK, *self.no_proxy)} if self.proxy else {}
        try:
            return httpx.Client(
                headers=known, auth=auth, timeout=_TIMEOUT, follow_redirects=True, max_redirects=10, verify=tls,
                event_hooks={"response": [_harmless]},
                transport=transport, proxy=self.proxy if self.proxy and transport is None else None, mounts=direct,
            )  # fmt: skip
        except (ValueError, httpx.InvalidURL) as e:
            raise ConfigError(f"pull_proxy cannot be used: {e}.", hint="Write it as http://proxy.lan:3128.") from e

    def base_url(self, host: str) -> str:
        """Where a registry's API begins: with TLS, but for those of this machine and those that are listed."""
        plain = host in self.http_hosts or _is_loopback(host)
        return f"{'http' if plain else 'https'}://{host}"


def _harmless(response: httpx.Response) -> None:
    """Leave nothing to read that the library would read whole by itself, or decode: a small answer may unpack to
    gigabytes.

    Raises:
        SourceUnavailable: It is a good answer, packed though that was not asked for.
    """
    is_packed = response.headers.get("Content-Encoding", "").strip().lower() not in ("", "identity")
    if is_packed and response.is_success:
        raise SourceUnavailable(
            f"{response.url.host} answers with packed bytes, which nobody asked for.",
            hint="Have the server, or the proxy before it, send files as they are, without Content-Encoding.",
        )
    if is_packed or response.has_redirect_location:
        response.headers.pop("Content-Encoding", None)
        if isinstance(response.stream, httpx.SyncByteStream):
            response.stream.close()
        response.stream = httpx.ByteStream(b"")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else f"*{host}" if host.startswith(".") else host


def _is_loopback(host: str) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except (ConfigError, ValueError):
        return False


@cache
def _tls_context(ca_file: str) -> ssl.SSLContext:
    # Reading the certificates takes 40 ms; a client is made for each request.
    context = httpx.create_ssl_context()
    if ca_file:
        try:
            context.load_verify_locations(ca_file)
        except (OSError, ssl.SSLError) as e:
            raise ConfigError(f"pull_ca: {ca_file} cannot be read: {e}.", hint="It is a PEM file.") from e
    return context
