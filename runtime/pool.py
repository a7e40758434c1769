"""The models of a store, loaded on first use, unloaded when idle or when another needs the memory."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from edge.config import Settings
from edge.errors import DoesNotFit, EdgeError, ModelLoading, Quarantined, ServerStopping, StoreError
from edge.store.digest import Digest
from edge.store.drafts import DraftChoice, draft_for
from edge.store.models import ModelStore, StoredModel
from edge.store.slots import Slot
from edge.trust.gate import LoadGate
from runtime import wire
from runtime.host import ModelHost
from runtime.poison import PoisonCabinet
from runtime.process import WorkerProcess
from runtime.selection import SEPARATOR, Selection, Selector, refuse_adapter
from runtime.state_dirs import forget_states

log = logging.getLogger("edge.pool")

READY_WAIT_S = 120.0
"""How long a request waits for its model before it is told to come back."""

CROWDED_S = 120.0
"""How long batches leave their models alone, so that one that did not fit beside them finds room."""

MAX_KNOWN_NAMES = 1000


@dataclass(frozen=True, slots=True)
class Serving:
    """What the name of a slot means now.

    Attributes:
        name: Of the model.
        is_open: Cleared while one version makes room for the other: then requests wait.
    """

    digest: Digest
    name: str
    is_open: asyncio.Event = field(default_factory=asyncio.Event, compare=False)

    @classmethod
    def of(cls, digest: Digest, name: str) -> Serving:
        """One that requests go to."""
        serving = cls(digest, name)
        serving.is_open.set()
        return serving


def serving_of(slots: Mapping[str, Slot]) -> dict[str, Serving]:
    """The confirmed version of each slot that has one."""
    return {n: Serving.of(s.current, s.names.get(s.current, n)) for n, s in slots.items() if s.current is not None}


class Pool:
    """The models of a store, loaded on first use."""

    def __init__(self, settings: Settings, store: ModelStore) -> None:
        self._settings = settings
        self._store = store
        self._hosts: dict[str, ModelHost] = {}
        """By the name of the model; where that leads to another version now, with ``@`` and the digest."""
        self.slots: dict[str, Serving] = {}
        """By the slot's name; see `runtime.activation`, which keeps it."""
        self.spared: set[ModelHost] = set()
        """Those that never give way."""
        self.poison = PoisonCabinet(settings.poison_dir)
        self._known: dict[str, tuple[object, ModelHost]] = {}
        """Hosts by what people typed, and the version of the store that said so: no file is read for most requests."""
        self._gate = LoadGate(store, settings)
        self._selector = Selector(store, check=self._gate.check)
        self._stopping = False
        self._crowded_until_s: dict[str, float] = {}
        """Models that did not fit beside those that are busy, by their references; until when."""

    @property
    def is_crowded(self) -> bool:
        """Whether somebody waits for a model that did not fit lately, and that would if others became idle."""
        now_s = time.monotonic()
        return any(until_s > now_s for until_s in self._crowded_until_s.values())

    @property
    def is_stopping(self) -> bool:
        """Whether it takes no more requests."""
        return self._stopping

    def read_slots(self) -> None:
        """Take what slots mean from the disk. Where that cannot be read, no slot means anything.

        Raises:
            StoreError: It cannot.
        """
        self.slots = serving_of(self._store.slots())

    def hosts(self) -> list[ModelHost]:
        """Models that were asked for since the start."""
        return list(self._hosts.values())

    def heartbeats(self) -> list[wire.Heartbeat]:
        """The last word of each engine that runs."""
        return [h.heartbeat for h in self._hosts.values() if h.heartbeat is not None]

    async def select(self, name: str, asked: Sequence[tuple[str, float]]) -> Selection:
        """The model and the adapters that a request means; see :meth:`runtime.selection.Selector.select`."""
        if not asked and SEPARATOR not in name:
            return Selection(name)
        base = name.partition(SEPARATOR)[0]
        serving = (await self.host(base)).model if base in self.slots else None
        return await asyncio.to_thread(self._selector.select, name, asked, serving=serving)

    async def combinations(self, models: Sequence[StoredModel]) -> list[tuple[StoredModel, StoredModel]]:
        """Each model with each adapter that fits it."""
        return await asyncio.to_thread(self._selector.combinations, models)

    async def host(self, ref: str) -> ModelHost:
        """The host of a model, by the name people type.

        Raises:
            ModelNotFound: It is not in the store.
            InvalidRequest: It is an adapter.
        """
        if (serving := self.slots.get(ref)) is not None:
            return await self.version(serving.digest, serving.name)
        version = self._store.generation()
        if (known := self._known.get(ref)) is not None and known[0] == version:
            return known[1]
        model = await asyncio.to_thread(self._store.get, ref)
        await asyncio.to_thread(refuse_adapter, model, self._store)
        name = str(model.ref)
        host = self._hosts.get(name)
        if host is None or (host.model.digest != model.digest and host.state in ("unloaded", "failed")):
            # A slot may have this version already, and need the other one again.
            if host is not None:
                self._hosts.setdefault(f"{name}@{host.model.digest}", host)
            host = self._host_with(model.digest, f"{name}@{model.digest}") or self._make(name, model)
        if len(self._known) < MAX_KNOWN_NAMES:
            self._known[ref] = (version, host)
        return host

    async def version(self, digest: Digest, name: str) -> ModelHost:
        """The host of one version of a model, to which its name need not lead any more.

        Raises:
            StoreError: Its bytes are not there.
        """
        key = f"{name}@{digest}"
        if (host := self._host_with(digest, name, key)) is not None:
            return host
        try:
            named = await self.host(name)
        except EdgeError:
            named = None  # it leads nowhere, or to what does not serve: that says nothing of this version
        if named is not None and named.model.digest == digest:
            return named
        model = await asyncio.to_thread(self._store.version, digest, name)
        return self._host_with(digest, key) or self._make(key, model)

    def _host_with(self, digest: Digest, *keys: str) -> ModelHost | None:
        found = (self._hosts.get(key) for key in keys)
        return next((h for h in found if h is not None and h.model.digest == digest), None)

    def _make(self, key: str, model: StoredModel) -> ModelHost:
        host = self._hosts[key] = ModelHost(
            self._settings, model, self.poison, reserved_bytes=lambda: self._reserved_bytes(but=key),
            find_draft=lambda: self._draft(model), check=self._check, lease=self._store.lease,
        )  # fmt: skip
        return host

    def _check(self, model: StoredModel) -> None:
        """Refuse to load what is not trusted, or was found damaged since it was opened."""
        self._gate.check(model)
        marks = self._store.quarantined()
        for file in model.files:
            if reason := marks.get(file.digest):
                raise Quarantined(str(file.path), reason)

    def _draft(self, model: StoredModel) -> DraftChoice | None:
        choice = draft_for(model, self._store)
        if choice is None or choice.model is None:
            return choice
        try:
            self._gate.check(choice.model)
        except EdgeError as e:
            return DraftChoice(choice.name, None, e.message)
        return choice

    async def preload(self, ref: str, process: WorkerProcess) -> None:
        """Begin to load a model in a process that waits for it; it knows its model when this returns. A model that is
        not in the store is left out."""
        try:
            host = await self.host(ref)
        except EdgeError as e:
            log.info("%s is not loaded at the start: %s", ref, e)
            process.discard()
        else:
            await host.begin_load(process)

    def _reserved_bytes(self, *, but: str) -> int:
        """Memory that still looks free: weights of models that are being loaded, cells that nobody used yet."""
        others = [h for key, h in self._hosts.items() if key != but]
        weights = sum(h.model.size_bytes + h.draft_bytes for h in others if h.state == "loading")
        return weights + sum(h.promised_bytes for h in others)

    async def ready(
        self, ref: str, *, timeout_s: float = READY_WAIT_S, tenant: str = "", may_make_room: bool = True
    ) -> ModelHost:
        """A host that answers; where memory lacks, idle models that are not pinned give way, the least worth first.

        Args:
            may_make_room: False for whom nobody waits: then no model gives way.

        Raises:
            ServerStopping: The appliance is shutting down.
            EdgeError: The model cannot be loaded.
        """
        if self._stopping:
            raise ServerStopping("The appliance is shutting down.")
        await self._pass_slot(ref, timeout_s, tenant)
        host = await self.host(ref)
        while True:
            try:
                await host.wait_ready(timeout_s, tenant=tenant)
                self._crowded_until_s.pop(host.ref, None)
                if host.probation is None:
                    await self._confirm(host)
                return host
            except DoesNotFit as e:
                if not may_make_room:
                    raise
                if not await self.make_room(host, missing_bytes=e.missing_bytes):
                    self._note_crowded(host, missing_bytes=e.missing_bytes)
                    raise

    async def _pass_slot(self, ref: str, timeout_s: float, tenant: str) -> None:
        """Wait while a slot changes its version, as one of those whom the version that serves has room for.

        Raises:
            QueueFull: Too many wait.
            ModelLoading: It took too long.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while (serving := self.slots.get(ref)) is not None and not serving.is_open.is_set():
                    with (await self.version(serving.digest, serving.name)).waiting(tenant):
                        await serving.is_open.wait()
        except TimeoutError as e:
            raise ModelLoading(ref, retry_after_s=10) from e

    async def _confirm(self, host: ModelHost) -> None:
        """It serves: older releases of it are refused from now on."""
        if self._gate.is_confirmed(host.model):
            return
        try:
            await asyncio.to_thread(self._gate.confirm, host.model)
        except EdgeError as e:
            log.warning("the release of %s is not noted as confirmed: %s", host.ref, e.message)

    def _note_crowded(self, wanted: ModelHost, *, missing_bytes: int) -> None:
        """Have batches pause where that may help."""
        loaded = [h for h in self._hosts.values() if h is not wanted and h.state in ("loading", "ready")]
        if sum(h.memory_bytes for h in loaded) >= missing_bytes:
            self._crowded_until_s[wanted.ref] = time.monotonic() + CROWDED_S

    async def make_room(self, keep: ModelHost, *, missing_bytes: int) -> bool:
        """Unload the idle model that is worth the least, for another's sake. False where there is none, or where all of
        them together would not be enough."""
        pins = await asyncio.to_thread(self._store.pins)
        idle = self._idle(but=keep, pins=pins)
        if not idle or sum(h.memory_bytes for h in idle) < missing_bytes:
            return False
        victim = min(idle, key=lambda h: h.worth())
        log.info("unloading %s to make room for %s", victim.ref, keep.ref)
        await victim.unload()
        return True

    async def idle_bytes(self, *, but: ModelHost) -> int:
        """What could be made free for a model."""
        pins = await asyncio.to_thread(self._store.pins)
        return sum(h.memory_bytes for h in self._idle(but=but, pins=pins))

    def _idle(self, *, but: ModelHost, pins: Set[str]) -> list[ModelHost]:
        others = (h for h in self._hosts.values() if h is not but and h not in self.spared)
        return [h for h in others if h.is_idle and h.ref not in pins]

    async def unload_idle(self) -> None:
        """Unload what nobody used for as long as it is kept."""
        pins = await asyncio.to_thread(self._store.pins)
        for host in self.hosts():
            limit, unused_s = self.keep_alive_s(host), time.monotonic() - host.last_used
            if 0 <= limit <= unused_s and host.is_idle and host.ref not in pins and host not in self.spared:
                log.info("unloading %s: unused for %.0f s", host.ref, limit)
                await host.unload()

    def keep_alive_s(self, host: ModelHost) -> float:
        """How long a model stays loaded unused; negative is for ever."""
        return self._settings.keep_alive_s if host.keep_alive_s is None else host.keep_alive_s

    async def condemn(self, blob: Digest, error: EdgeError) -> None:
        """Unload the models that have a file whose bytes are wrong, and throw away what their engines saved. Requests
        that they hold end with `error`."""
        hosts = [h for h in self._hosts.values() if h.has(blob) and h.state in ("loading", "ready")]
        for host in hosts:
            log.error("unloading %s: %s", host.ref, error)
        await asyncio.gather(*(h.unload(sick=error) for h in hosts))
        await asyncio.to_thread(forget_states, self._settings.home, [h.model for h in hosts])

    async def forget(self, ref: str) -> None:
        """Unload a model that leaves the store, but one that a slot has."""
        self._known.clear()
        self._crowded_until_s.pop(ref, None)
        host = self._hosts.get(ref)
        in_slots = {serving.digest for serving in self.slots.values()}
        try:
            slots = await asyncio.to_thread(self._store.slots)
        except StoreError as e:
            log.warning("%s stays in memory: %s", ref, e)  # what slots have is not known
            return
        in_slots |= {digest for slot in slots.values() for digest in slot.digests()}
        if host is not None and host not in self.spared and host.model.digest not in in_slots:
            del self._hosts[ref]
            await host.unload()

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests and wait for those under way, at most `timeout_s`."""
        self._stopping = True
        deadline = time.monotonic() + timeout_s
        while any(h.num_active for h in self.hosts()) and time.monotonic() < deadline:  # noqa: ASYNC110  # at shutdown only
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """End every worker."""
        self._stopping = True
        await asyncio.gather(*(h.unload() for h in self.hosts()))
