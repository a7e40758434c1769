"""The models of a store, loaded on first use, unloaded when idle or when another needs the memory."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from edge.config import Settings
from edge.errors import DoesNotFit, EdgeError, ServerStopping
from edge.store.drafts import DraftChoice, draft_for
from edge.store.models import ModelStore, StoredModel
from edge.trust.gate import LoadGate
from runtime import wire
from runtime.host import ModelHost
from runtime.poison import PoisonCabinet
from runtime.process import WorkerProcess
from runtime.selection import SEPARATOR, Selection, Selector, refuse_adapter

log = logging.getLogger("edge.pool")

READY_WAIT_S = 120.0
"""How long a request waits for its model before it is told to come back."""

CROWDED_S = 120.0
"""How long batches leave their models alone, so that one that did not fit beside them finds room."""

MAX_KNOWN_NAMES = 1000


class Pool:
    """The models of a store, loaded on first use."""

    def __init__(self, settings: Settings, store: ModelStore) -> None:
        self._settings = settings
        self._store = store
        self._hosts: dict[str, ModelHost] = {}
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
        return await asyncio.to_thread(self._selector.select, name, asked)

    async def combinations(self, models: Sequence[StoredModel]) -> list[tuple[StoredModel, StoredModel]]:
        """Each model with each adapter that fits it."""
        return await asyncio.to_thread(self._selector.combinations, models)

    async def host(self, ref: str) -> ModelHost:
        """The host of a model, by the name people type.

        Raises:
            ModelNotFound: It is not in the store.
            InvalidRequest: It is an adapter.
        """
        version = self._store.generation()
        if (known := self._known.get(ref)) is not None and known[0] == version:
            return known[1]
        model = await asyncio.to_thread(self._store.get, ref)
        await asyncio.to_thread(refuse_adapter, model, self._store)
        name = str(model.ref)
        host = self._hosts.get(name)
        if host is None or (host.model.digest != model.digest and host.state in ("unloaded", "failed")):
            host = self._hosts[name] = ModelHost(
                self._settings, model, self.poison, reserved_bytes=lambda: self._reserved_bytes(but=name),
                find_draft=lambda: self._draft(model), check=self._gate.check, lease=self._store.lease,
            )  # fmt: skip
        if len(self._known) < MAX_KNOWN_NAMES:
            self._known[ref] = (version, host)
        return host

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
        loading = [h for h in self._hosts.values() if h.state == "loading" and h.ref != but]
        weights = sum(h.model.size_bytes + h.draft_bytes for h in loading)
        return weights + sum(h.promised_bytes for h in self._hosts.values() if h.ref != but)

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
        host = await self.host(ref)
        while True:
            try:
                await host.wait_ready(timeout_s, tenant=tenant)
                self._crowded_until_s.pop(host.ref, None)
                await self._confirm(host)
                return host
            except DoesNotFit as e:
                if not may_make_room:
                    raise
                if not await self.make_room(host, missing_bytes=e.missing_bytes):
                    self._note_crowded(host, missing_bytes=e.missing_bytes)
                    raise

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
        idle = [h for h in self._hosts.values() if h is not keep and h.is_idle and h.ref not in pins]
        if not idle or sum(h.memory_bytes for h in idle) < missing_bytes:
            return False
        victim = min(idle, key=lambda h: h.worth())
        log.info("unloading %s to make room for %s", victim.ref, keep.ref)
        await victim.unload()
        return True

    async def unload_idle(self) -> None:
        """Unload what nobody used for as long as it is kept."""
        pins = await asyncio.to_thread(self._store.pins)
        for host in self.hosts():
            limit, unused_s = self.keep_alive_s(host), time.monotonic() - host.last_used
            if 0 <= limit <= unused_s and host.is_idle and host.ref not in pins:
                log.info("unloading %s: unused for %.0f s", host.ref, limit)
                await host.unload()

    def keep_alive_s(self, host: ModelHost) -> float:
        """How long a model stays loaded unused; negative is for ever."""
        return self._settings.keep_alive_s if host.keep_alive_s is None else host.keep_alive_s

    async def forget(self, ref: str) -> None:
        """Unload a model that leaves the store."""
        self._known.clear()
        self._crowded_until_s.pop(ref, None)
        if host := self._hosts.pop(ref, None):
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
