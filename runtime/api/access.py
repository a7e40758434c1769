"""Who asks, what he may do, and what he used. Owned by the event loop."""

from __future__ import annotations

import asyncio
import binascii
import dataclasses
import datetime
import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal, Protocol

from edge.access.audit import Act, Head, read_head
from edge.access.keys import Key, KeyReader, Limits, Scope
from edge.access.quota import RequestWindow, TokenDay
from edge.access.state import SCHEMA_VERSION
from edge.access.usage import Account, Usage
from edge.access.writer import SavedDay, StateWriter, load_day
from edge.config import Settings
from edge.database import NewerFormat, connect_read_only, errors_of
from edge.errors import EdgeError, Forbidden, KeyNotFound, RateLimited, StoreError, Unauthorized

log = logging.getLogger("edge.access")

Need = Scope | Literal["nothing", "key"]
"""What a route asks of its caller: nothing at all, any valid key, or a key of this scope."""
METERED: frozenset[Need] = frozenset({"chat", "embed"})
BYTES_PER_TOKEN = 4
"""About what a token of a body takes."""
UNSTATED_TOKENS = 512
"""What an answer is taken to be that may be as long as it likes."""
LAST = 3
"""The priority of what nobody waits for."""
SPARED_SHARE = 4
"""Batches leave one part in so many of their key's requests a minute alone."""
LOG_INTERVAL_S = 10.0
"""Refused callers are logged together: nobody shall fill the log by being refused."""


def needs(need: Need) -> dict[str, Need]:
    """The `opt` of a route that asks this of its caller. A route that says nothing asks for `admin`."""
    return {"needs": need}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request.

    Attributes:
        key: Its key; None for a program of this machine that needs none.
        address: Where it came from: an IP address, or ``unix``.
        is_local: It came over the Unix socket, which has file permissions instead of keys.
        is_background: Nobody waits for the answer: whatever the key says, it is served last.
    """

    key: Key | None
    address: str
    is_local: bool = False
    is_background: bool = False

    @property
    def id(self) -> str:
        """The key's; empty for who has none. Shares and computed prompts are parted by it."""
        return self.key.id if self.key else ""

    @property
    def limits(self) -> Limits:
        """What it may do; without a key, everything."""
        limits = self.key.limits if self.key else _EVERYTHING
        return dataclasses.replace(limits, priority=LAST) if self.is_background else limits

    @property
    def may_read_files(self) -> bool:
        """Whether it may name files of this machine and hosts of its networks: a program of it. Keys are for those who
        come from elsewhere."""
        return self.key is None or self.is_local

    @property
    def jobs_of(self) -> str | None:
        """Whose jobs it sees: everybody's (None), or its own where it may not use every model."""
        return self.id if self.limits.models else None

    def check(self, need: Need) -> None:
        """Let it do what needs this.

        Raises:
            Forbidden: Its key does not reach so far.
        """
        if self.key is not None and need not in ("nothing", "key") and not self.limits.may(need):
            have = ", ".join(sorted(self.limits.scopes))
            raise Forbidden(
                f"This key may not do that: it takes the scope '{need}', and the key has {have}.",
                hint="Ask the operator for another key.",
            )

    def check_all_models(self) -> None:
        """Let it see or do what concerns all models.

        Raises:
            Forbidden: Its key is for some of them.
        """
        if self.limits.models:
            raise Forbidden(
                "This concerns all models, and this key is for some of them.",
                hint="Ask the operator for a key that is for all.",
            )

    def __str__(self) -> str:
        return f"key {self.key.id} ({self.key.name})" if self.key else f"anyone at {self.address}"


_EVERYTHING = Limits(scopes=frozenset({"chat", "embed", "view", "operate", "admin"}))


class Answered(Protocol):
    """One answer of a request, as far as it came; see `runtime.api.call.Call`."""

    @property
    def known_model(self) -> str:
        """The model's whole name; empty where none was found."""
        ...

    @property
    def error_type(self) -> str | None:
        """Code of what ended it; None where it ended well or did not end."""
        ...

    @property
    def tokens(self) -> tuple[int, int, int]:
        """Of the prompt, those of it that were cached, and of the answer."""
        ...

    @property
    def prompt_number(self) -> int:
        """Which of the request's prompts it is the answer to."""
        ...


def tokens_of(answers: Iterable[Answered]) -> tuple[int, int, int]:
    """Of the prompts, those of them that were cached, and of the answers. Answers to one prompt share it; what was
    cached of it is what the first to be read found, since the others find the whole."""
    shared: dict[int, list[tuple[int, int]]] = {}
    output = 0
    for answer in answers:
        prompt, cached, made = answer.tokens
        output += made
        if prompt:
            shared.setdefault(answer.prompt_number, []).append((prompt, cached))
    prompts = sum(max(p for p, _ in found) for found in shared.values())
    return prompts, sum(min(c for _, c in found) for found in shared.values()), output


@dataclass(slots=True)
class Meter:
    """One request and what it used.

    Attributes:
        day: Where its tokens count, if its key's are limited.
    """

    caller: Caller
    answers: list[Answered] = field(default_factory=list[Answered])
    status: int | None = None
    day: TokenDay | None = None
    _held: int = 0
    _num_bytes: int = 0
    _seen_bytes: int = 0

    def hold(self, tokens: int) -> None:
        """Set aside what it may take of its key's day, until it ends.

        Raises:
            RateLimited: Requests that are under way may use up the day.
        """
        if self.day is None:
            return
        if not self.day.hold(tokens, self._held, time.monotonic()):
            raise RateLimited(
                f"{self.day.limit:,} tokens a day, if what is under way takes all it may", retry_after_s=5
            )
        self._held += tokens

    def announce(self, num_bytes: int) -> None:
        """Hold for a body of so many bytes.

        Raises:
            RateLimited: As `hold`.
        """
        self._num_bytes = num_bytes
        self.hold(num_bytes // BYTES_PER_TOKEN)

    def arrive(self, num_bytes: int) -> None:
        """Hold for bytes that came, as far as they were not announced: a body that comes in chunks is not.

        Raises:
            RateLimited: As `hold`.
        """
        self._seen_bytes += num_bytes
        if self._seen_bytes > self._num_bytes:
            held = self._num_bytes // BYTES_PER_TOKEN
            self._num_bytes = self._seen_bytes
            self.hold(self._seen_bytes // BYTES_PER_TOKEN - held)

    def release(self) -> None:
        """Give that back."""
        if self.day is not None:
            self.day.release(self._held)
            self._held = 0

    def usage(self) -> Usage:
        """What to count."""
        errors = {answer.error_type for answer in self.answers} - {None}
        prompt, cached, output = tokens_of(self.answers)
        if self.status == _CLIENT_CLOSED or errors & _LEFT or (self.status is None and not errors):
            return Usage(requests=1, cancelled=1, undelivered_tokens=prompt + output)
        if errors or self.status is None or self.status >= 400:
            return Usage(requests=1, failures=1, undelivered_tokens=prompt + output)
        return Usage(requests=1, input_tokens=prompt, output_tokens=output, cached_tokens=cached)


_CLIENT_CLOSED = 499
_LEFT: frozenset[str | None] = frozenset({"cancelled", "client_closed"})


class Access:
    """Knows callers by their keys, holds them to their limits, and counts what they use."""

    def __init__(self, settings: Settings) -> None:
        self.keys_required = settings.needs_keys
        self._path = settings.state_db
        self._writer = StateWriter(settings.state_db)
        self._reader: KeyReader | None = None
        self._windows: dict[str, RequestWindow] = {}
        self._days: dict[str, TokenDay] = {}
        self._num_refused = self._num_logged = 0
        self._logged_at_s = float("-inf")

    @property
    def error(self) -> str | None:
        """Why nothing can be counted at present; None while it can."""
        return self._writer.error

    @property
    def num_refused(self) -> int:
        """Requests without a valid key, since the start."""
        return self._num_refused

    def start(self) -> None:
        """Open `state.db`; blocks. Where no keys are needed, a disk that is full or read-only is tried again later.

        Raises:
            StoreError: It cannot be opened, and keys are needed; or a newer version wrote it.
        """
        try:
            self._writer.start()
        except NewerFormat:
            raise
        except StoreError as e:
            if self.keys_required:
                raise
            log.warning("requests are not counted yet: %s", e)

    async def close(self) -> None:
        """Write what was counted."""
        if self._reader is not None:
            self._reader.close()
        await asyncio.to_thread(self._writer.close)

    def identify(self, headers: Iterable[tuple[bytes, bytes]], *, address: str, is_local: bool) -> Caller:
        """Who presents these headers.

        Args:
            is_local: It came over the Unix socket, which has file permissions instead of keys.

        Raises:
            Unauthorized: It has no valid key and needs one, or presents one that is none.
        """
        presented = _credentials(headers)
        ours = {p for p in presented if p.startswith("edge_")}
        if not ours:  # clients always send something: where none is needed, it passes
            if self.keys_required and not is_local:
                raise self._refusal(address, _not_a_key() if presented else _no_key())
            return Caller(None, address, is_local)
        if len(presented) > 1:
            raise self._refusal(address, Unauthorized("The request has several keys.", hint="Send one."))
        key = self._open_reader().find(ours.pop())
        if key is None:
            raise self._refusal(address, _not_a_key())
        return Caller(key, address, is_local)

    def background_caller(self, key_id: str) -> Caller:
        """Who asks for what a key left to be done; an empty id is who needed none.

        Raises:
            KeyNotFound: The key was revoked.
        """
        key = self._open_reader().get(key_id) if key_id else None
        if key_id and key is None:
            raise KeyNotFound(key_id)
        return Caller(key, "batch", is_background=True)

    def is_valid(self, caller: Caller) -> bool:
        """Whether its key still holds."""
        return caller.key is None or self._open_reader().is_valid(caller.key)

    def admit(self, meter: Meter, *, num_bytes: int) -> None:
        """Count a request against the caller's limits.

        Args:
            num_bytes: Of its body.

        Raises:
            RateLimited: They are used up.
        """
        now_s, caller = time.monotonic(), meter.caller
        day, window = self._day(caller, now_s), self._window(caller)
        if day is not None:
            if day.left(now_s) == 0:
                raise RateLimited(f"{day.limit:,} tokens a day", retry_after_s=day.reset_s(now_s))
            meter.day = day
            meter.announce(num_bytes)
        if window is not None and (wait_s := window.take(now_s, spared=_spared(caller, window))) is not None:
            raise RateLimited(f"{window.limit:,} requests a minute", retry_after_s=wait_s)

    def limit_headers(self, caller: Caller) -> dict[str, str]:
        """What is left of the caller's limits, in OpenAI's headers."""
        now_s = time.monotonic()
        found: dict[str, str] = {}
        if (window := self._window(caller)) is not None:
            found |= _headers("requests", window.limit, window.left(now_s), window.reset_s(now_s))
        if (day := self._day(caller, now_s)) is not None:
            found |= _headers("tokens", day.limit, day.left(now_s), day.reset_s(now_s))
        return found

    def settle(self, meter: Meter) -> None:
        """Count a request that ended."""
        used, caller, saved = meter.usage(), meter.caller, None
        meter.release()
        if meter.day is not None:
            now_s = time.monotonic()
            meter.day.take(used.tokens, now_s)
            saved = SavedDay(*meter.day.state(now_s))
        model = next((a.known_model for a in meter.answers if a.known_model), "")
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        self._writer.meter(Account(today, caller.id, model), used, saved)

    async def note(self, caller: Caller | str, act: str, target: str, outcome: str) -> None:
        """Add a line to the audit log, and return when it is on the disk. A disk that takes none is told in the log
        and among the alerts; the act is done."""
        try:
            await asyncio.wrap_future(self._writer.note(Act(str(caller), act, target, outcome)))
        except EdgeError as e:
            log.error("not in the audit log: %s by %s: %s", act, caller, e)

    def audit_head(self) -> Head:
        """The end of the audit log; from any thread.

        Raises:
            StoreError: It cannot be read.
        """
        return read_head(self._path)

    def _open_reader(self) -> KeyReader:
        if self._reader is not None and not self._reader.is_current:
            self._reader.close()
            self._reader = None
        self._reader = self._reader or KeyReader(self._path)
        return self._reader

    def _window(self, caller: Caller) -> RequestWindow | None:
        if (limit := caller.limits.rpm) is None:
            return None
        window = self._windows.get(caller.id)
        if window is None or window.limit != limit:
            window = self._windows[caller.id] = RequestWindow(limit)
        return window

    def _day(self, caller: Caller, now_s: float) -> TokenDay | None:
        if (limit := caller.limits.tokens_per_day) is None:
            return None
        day = self._days.get(caller.id)
        if day is None or day.limit != limit:
            saved = self._saved_day(caller.id)
            day = TokenDay(limit, now_s=now_s, used_tokens=saved.used_tokens, elapsed_s=saved.elapsed_s)
            self._days[caller.id] = day
        return day

    def _saved_day(self, key_id: str) -> SavedDay:
        with errors_of(self._path), closing(connect_read_only(self._path, version=SCHEMA_VERSION)) as db:
            return load_day(db, key_id, now_s=time.time())

    def _refusal(self, address: str, error: Unauthorized) -> Unauthorized:
        self._num_refused += 1
        if time.monotonic() - self._logged_at_s > LOG_INTERVAL_S:
            num = self._num_refused - self._num_logged
            log.warning("requests without a valid API key: %d, the last from %s", num, address)
            self._logged_at_s, self._num_logged = time.monotonic(), self._num_refused
        return error


def _spared(caller: Caller, window: RequestWindow) -> int:
    """Of a key's requests a minute, those that its batches leave to whoever waits for an answer: a quarter."""
    return -(-window.limit // SPARED_SHARE) if caller.is_background else 0


def _no_key() -> Unauthorized:
    return Unauthorized(
        "This appliance asks for an API key.",
        hint="Send it as 'Authorization: Bearer KEY'. Its operator makes one with: edge key create.",
    )


def _not_a_key() -> Unauthorized:
    return Unauthorized(
        "The API key is not valid.", hint="It was mistyped or revoked. The operator sees all with: edge key list."
    )


def _credentials(headers: Iterable[tuple[bytes, bytes]]) -> set[str]:
    """What is presented as a key: by OpenAI's clients as a bearer (RFC 6750, section 2.1), by Anthropic's as
    ``x-api-key``, by those of registries as a password under any name (RFC 7617)."""
    found: set[str] = set()
    for name, value in headers:
        if name == b"x-api-key":
            found.add(value.decode("latin-1").strip(" \t"))
        elif name == b"authorization":
            scheme, _, token = value.decode("latin-1").strip(" \t").partition(" ")
            if scheme.lower() == "bearer":
                found.add(token.strip(" \t"))
            elif scheme.lower() == "basic":
                found.add(_password_of(token.strip(" \t")))
    return found - {""}


def _password_of(token: str) -> str:
    """Of basic authentication; empty where it is none."""
    try:
        return binascii.a2b_base64(token, strict_mode=True).decode("utf-8").partition(":")[2]
    except ValueError:
        return ""


def _headers(what: str, limit: int, left: int, reset_s: float) -> Mapping[str, str]:
    names = ("limit", "remaining", "reset")
    return dict(
        zip((f"x-ratelimit-{n}-{what}" for n in names), (str(limit), str(left), _duration(reset_s)), strict=True)
    )


def _duration(seconds: float) -> str:
    """As OpenAI writes it: ``6m0s``, ``1s``, ``120ms``."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s" if minutes else f"{rest}s"
