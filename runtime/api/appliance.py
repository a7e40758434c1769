"""What the API acts on: store, workers, telemetry, jobs; and the one picture of them all."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import logging
import shutil
import socket
import statistics
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import psutil
from litestar.datastructures import State

from edge import __version__
from edge.access.keys import Limits
from edge.config import Settings, listed
from edge.errors import Forbidden, InvalidRequest, ModelNotFound, PinNotFound, QueueFull, VisionUnsupported
from edge.hardware.memory import available_bytes, total_bytes, usable_cores
from edge.kinds import ModelKind
from edge.responses import ResponseStore
from edge.store.digest import Digest
from edge.store.manifest import ModelRef
from edge.store.models import ModelStore, StoredModel
from edge.store.sources import FileSource, parse_source, without_query
from edge.telemetry.host import temperature_c
from edge.telemetry.service import Telemetry
from edge.telemetry.span import Operation, RequestRecord
from edge.trust.policy import admit, check_source
from runtime import wire
from runtime.activation import Activation
from runtime.api import sse
from runtime.api.access import Access, Caller
from runtime.api.responses import ClientClosed
from runtime.api.schema import (
    Alert,
    DeviceStatus,
    Explanation,
    Job,
    LogLines,
    ModelInfo,
    OutboxStatus,
    PinnedPrefix,
    PullRequest,
    WarmRequest,
)
from runtime.explain import Facts, explain
from runtime.host import ModelHost
from runtime.jobs import JobControl, Jobs
from runtime.logs import RecentLines
from runtime.pool import Pool
from runtime.request import SamplingParams
from runtime.selection import SEPARATOR
from runtime.state_dirs import remove_states
from runtime.upkeep import Upkeep

if TYPE_CHECKING:
    from edge.store.network import Network

log = logging.getLogger("edge.appliance")

STATUS_INTERVAL_S = 1.0
HOUSE_INTERVAL_S = 5.0
WARM_S = 600.0
"""How long a model may take to load, and a system prompt to be computed."""
MAX_WATCHERS = 64
LOW_DISK_BYTES = 256 << 20
LOW_MEMORY_SHARE = 0.05


_KINDS: dict[Operation, ModelKind] = {
    "chat": "text",
    "text_completion": "text",
    "embeddings": "embeddings",
    "rerank": "reranking",
    "count": "text",
}
"""What models an operation asks for; where it says nothing, any."""


@dataclasses.dataclass(slots=True)
class SentBlobs:
    """Blobs that others fetch."""

    num_open: int = 0
    """Those that are being sent now."""
    num_bytes: int = 0
    """Sent since the start."""


class Appliance:
    """One running appliance. Owned by the event loop."""

    def __init__(
        self, settings: Settings, store: ModelStore, pool: Pool, telemetry: Telemetry, logs: RecentLines
    ) -> None:
        self.settings = settings
        self.store = store
        self.telemetry = telemetry
        self.logs = logs
        self.pool = pool
        self.activation = Activation(settings, store, pool)
        self.access = Access(settings)
        self.responses = ResponseStore(settings.responses_db, limit_bytes=settings.responses_bytes)
        self.jobs = Jobs(self._job_changed)
        self.sent_blobs = SentBlobs()
        self.upkeep = Upkeep(settings, store, pool, partial(self.access.note, "scrub"))
        self._watchers: dict[asyncio.Queue[bytes | None], Caller] = {}
        self._started = time.monotonic()
        self._num_requests = self._num_failed = 0
        self._ttft_s: deque[float] = deque(maxlen=100)
        self._processes: dict[int, psutil.Process] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._untidy = asyncio.Event()

    async def start(self) -> None:
        """Begin to keep house. The API may be used before."""
        loop = asyncio.get_running_loop()
        self.logs.on_lines = lambda lines: self._watchers and loop.call_soon_threadsafe(self._logged, lines)
        psutil.cpu_percent()
        self._add_gauges()
        await asyncio.gather(
            asyncio.to_thread(self.access.start), asyncio.to_thread(self.telemetry.start), self.activation.start()
        )
        self._tasks = [
            asyncio.create_task(self._broadcast(), name="status"),
            asyncio.create_task(self._keep_house(), name="housekeeping"),
            asyncio.create_task(self.upkeep.scrub(), name="scrub"),
        ]

    def _add_gauges(self) -> None:
        hosts = self.pool.hosts
        add = self.telemetry.add_gauge
        add("edge.models.loaded", lambda: float(sum(h.state == "ready" for h in hosts())), text="Models in memory.")
        add("edge.requests.active", lambda: float(sum(h.num_active for h in hosts())), text="Requests in the engines.")
        beats = self.pool.heartbeats
        add("edge.speculation.drafted", lambda: float(sum(b.drafted_tokens for b in beats())), unit="{token}",
            text="Tokens guessed and checked by the engines that run.")  # fmt: skip
        add("edge.speculation.accepted", lambda: float(sum(b.accepted_tokens for b in beats())), unit="{token}",
            text="Tokens guessed right by the engines that run.")  # fmt: skip
        add("edge.speculation.draft_model.drafted", lambda: float(sum(b.drafted_by_model for b in beats())),
            unit="{token}", text="Of the tokens guessed, those of draft models.")  # fmt: skip
        add("edge.speculation.draft_model.accepted", lambda: float(sum(b.accepted_by_model for b in beats())),
            unit="{token}", text="Of the tokens guessed right, those of draft models.")  # fmt: skip
        add("edge.auth.refused", lambda: float(self.access.num_refused), unit="{request}",
            text="Requests without a valid API key.")  # fmt: skip
        add("edge.audit.lines", lambda: float(self.access.audit_head().seq), unit="{line}",
            text="Lines of the audit log.")  # fmt: skip
        add("edge.audit.head", lambda: float(int.from_bytes(self.access.audit_head().digest[:6], "big")),
            unit="{digest}", text="The first 48 bits of the last line's digest.")  # fmt: skip
        add("edge.store.checked", lambda: float(self.upkeep.checked_bytes), unit="By",
            text="Bytes of the store that were read again and compared with their digests.")  # fmt: skip
        add("edge.store.damaged", lambda: float(self.upkeep.num_damaged), text="Quarantined blobs.")
        add("edge.store.sent", lambda: float(self.sent_blobs.num_bytes), unit="By",
            text="Bytes of blobs that others fetched.")  # fmt: skip
        add("edge.workers.restarts", lambda: float(sum(h.num_restarts for h in hosts())), text="Engines restarted.")

    async def close(self) -> None:
        """End workers and jobs, and commit the telemetry."""
        self.logs.on_lines = lambda _: None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.upkeep.close()
        await self.jobs.close()
        await self.activation.close()
        await self.pool.close()
        await self.access.close()
        await asyncio.to_thread(self.responses.close)
        await asyncio.to_thread(self.telemetry.close)

    # ------------------------------------------------------------------ models

    async def stored_models(self) -> list[StoredModel]:
        """The models of the store."""
        return await asyncio.to_thread(self.store.list)

    async def stored_model(self, ref: str) -> StoredModel:
        """One of them, or the version that serves in a slot.

        Raises:
            ModelNotFound: There is none of that name.
        """
        if ref in self.pool.slots:
            return (await self.pool.host(ref)).model
        return await asyncio.to_thread(self.store.get, ref)

    async def check_allowed(self, limits: Limits, *names: str) -> None:
        """See that a key may use a model and adapters by these names. One that it may not use is as one that is not
        there.

        Raises:
            ModelNotFound: There is none of one of the names, or the key may not use it.
        """
        if not limits.models:
            return
        for name in (part for whole in names for part in whole.split(SEPARATOR)):
            if not await self._may_use(limits, name):
                raise ModelNotFound(
                    name,
                    message=f"The model '{name[:200]}' is not in the store, or this key may not use it.",
                    hint="GET /v1/models lists what it may use.",
                )

    async def _may_use(self, limits: Limits, name: str) -> bool:
        """Whether there is a model of that name that a key may use; or a slot, by its name or by that of the model in
        it."""
        if (serving := self.pool.slots.get(name)) is not None:
            return limits.may_use(name) or limits.may_use(serving.name)
        try:
            return limits.may_use(str(await asyncio.to_thread(self.store.resolve, name)))
        except ModelNotFound:
            return False

    def check_target(self, limits: Limits, name: str) -> None:
        """See that a key may use what will have this name.

        Raises:
            Forbidden: It may not.
            InvalidReference: It is not a model's name.
        """
        if limits.models and not limits.may_use(str(ModelRef.parse(name))):
            names = ", ".join(limits.models)
            raise Forbidden(
                f"This key may not use a model named '{name[:200]}'.", hint=f"Give a name that it may use: {names}."
            )

    async def may_use_blob(self, limits: Limits, digest: Digest) -> bool:
        """Whether the store has these bytes, and they are no others' model only. Of none at all yet they may be."""
        if not self.store.blobs.has(digest):
            return False
        if not limits.models:
            return True
        holders = [m for m in await self.stored_models() if any(f.digest == digest for f in m.files)]
        return not holders or any(limits.may_use(str(m.ref)) for m in holders)

    async def check_purpose(self, ref: str, operation: Operation, limits: Limits | None = None) -> str:
        """See that a model does what is asked of it, without loading it.

        Args:
            limits: Other models are named as far as these go.

        Returns:
            Its whole name.

        Raises:
            ModelNotFound: There is none of that name.
            InvalidRequest: It is made for something else.
        """
        wanted = _KINDS.get(operation)
        model = (await self.pool.host(ref)).model
        if wanted is not None and model.kind != wanted:
            names = [str(m.ref) for m in await self.stored_models() if m.kind == wanted]
            others = [name for name in names if limits is None or limits.may_use(name)]
            raise InvalidRequest(
                f"The model '{model.ref}' is for {model.kind}, not for {wanted}.",
                field="model",
                hint=f"Models here that are: {', '.join(others) or 'none'}.",
            )
        return str(model.ref)

    async def check_vision(self, ref: str, limits: Limits, *, field: str) -> None:
        """See that a model reads images, without loading it.

        Args:
            limits: Other models are named as far as these go.

        Raises:
            ModelNotFound: There is none of that name.
            VisionUnsupported: It has no projector.
        """
        model = (await self.pool.host(ref)).model
        if model.projector is None:
            names = [str(m.ref) for m in await self.stored_models() if m.projector is not None]
            raise VisionUnsupported(str(model.ref), field=field, known=[n for n in names if limits.may_use(n)])

    async def model_infos(self, limits: Limits | None = None) -> list[ModelInfo]:
        """Every model of the store, as far as `limits` go, with what the runtime does with it; those that make text
        first."""
        hosts = {h.ref: h for h in self.pool.hosts()}
        pins = await asyncio.to_thread(self.store.pins)
        usable = [m for m in await self.stored_models() if limits is None or limits.may_use(str(m.ref))]
        models = sorted(usable, key=lambda m: m.kind != "text")
        return [_model_info(m, hosts.get(str(m.ref)), pins) for m in models]

    async def model_info(self, ref: str) -> ModelInfo:
        """One of them."""
        model = await self.stored_model(ref)
        hosts = {h.ref: h for h in self.pool.hosts()}
        return _model_info(model, hosts.get(str(model.ref)), await asyncio.to_thread(self.store.pins))

    async def pin(self, ref: str, *, is_pinned: bool) -> ModelInfo:
        """Keep a model in memory once it is loaded, or no longer."""
        return await self.model_info(str(await asyncio.to_thread(self.store.pin, ref, is_pinned=is_pinned)))

    async def explain(self, ref: str) -> Explanation:
        """Why a model is served as it is, or would be."""
        host = await self.pool.host(ref)
        load = await host.plan()
        pins, drafts = await asyncio.to_thread(lambda: (self.store.pins(), self.store.drafts()))
        facts = Facts(
            host.model, self.settings, load, host.ready, host.heartbeat, host.promised_bytes,
            self.pool.keep_alive_s(host), host.ref in pins, drafts,
        )  # fmt: skip
        return Explanation(model=host.ref, state=host.state, decisions=explain(facts))

    async def remove(self, ref: str) -> None:
        """Unload a model and take it out of the store."""
        model = await asyncio.to_thread(self.store.get, ref)
        await asyncio.to_thread(self.store.remove, str(model.ref))
        await self.pool.forget(str(model.ref))
        await asyncio.to_thread(self.store.collect)
        await asyncio.to_thread(remove_states, self.settings.home, [model], self.store)
        log.info("removed %s", model.ref)

    # ------------------------------------------------------------------ pinned prefixes

    async def warm(self, body: WarmRequest) -> PinnedPrefix:
        """Compute what conversations with a system prompt share, and pin it.

        Raises:
            NoRoomToPin: Pins take their share already.
            EdgeError: The model cannot be had, or the template refuses such a conversation.
        """
        selection = await self.pool.select(body.model, ())
        await self.check_purpose(selection.model, "chat")
        host = await self.pool.ready(selection.model, timeout_s=WARM_S)
        wanted = "\0".join([str(host.model.digest), repr(selection.adapters), body.system])
        name = body.name or hashlib.sha256(wanted.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        system, params = [wire.ChatMessage("system", body.system)], SamplingParams(temperature=0)
        generation = await host.start(
            lambda i: wire.Generate(i, system, None, params, 1, [], adapters=selection.adapters, pin=name),
            timeout_s=WARM_S, allowed_s=WARM_S,
        )  # fmt: skip
        try:
            async for _ in generation.steps():
                pass
        finally:
            generation.cancel()
        for prefix in await self._prefixes_of(host):
            if prefix.name == name:
                return prefix
        raise PinNotFound(name, model=host.ref)

    async def prefixes(self, ref: str | None, limits: Limits) -> list[PinnedPrefix]:
        """What is pinned for a model; without one, for each that is loaded, as far as `limits` go."""
        if ref is not None:
            return await self._prefixes_of(await self._ready(ref))
        hosts = [h for h in self.pool.hosts() if h.state == "ready" and limits.may_use(h.ref)]
        return [p for host in hosts for p in await self._prefixes_of(host)]

    async def remove_prefix(self, ref: str, name: str) -> None:
        """Unpin a prefix.

        Raises:
            PinNotFound: There is none of that name.
        """
        host = await self._ready(ref)
        if not (await host.pins(remove=name)).is_removed:
            raise PinNotFound(name, model=host.ref)

    async def _ready(self, name: str) -> ModelHost:
        return await self.pool.ready((await self.pool.select(name, ())).model, timeout_s=WARM_S)

    async def _prefixes_of(self, host: ModelHost) -> list[PinnedPrefix]:
        pins = (await host.pins()).pins
        return [PinnedPrefix(model=host.ref, **dataclasses.asdict(pin)) for pin in pins]

    def pull(self, request: PullRequest, caller: Caller) -> Job:
        """Begin to fetch a model.

        Raises:
            Forbidden: The caller may not have it under that name, or not from there.
            InvalidReference: Source or name cannot be read.
            QueueFull: Too much is being fetched.
        """
        from edge.store.fetch import Progress, pull

        self._check_pull(request, caller)
        check_source(request.source, self.settings)
        hosts = None if caller.may_read_files else listed(self.settings.pull_hosts)
        network = dataclasses.replace(self._network, private_hosts=hosts)

        def work(control: JobControl) -> str:
            def report(p: Progress) -> None:
                control.report(p.done_bytes, p.total_bytes, p.message)

            model = pull(
                self.store, request.source, name=request.name, network=network, progress=report,
                cancelled=control.is_cancelled,
                admit=lambda digest, ref: admit(self.store, digest, ref, self.settings),
            )  # fmt: skip
            return f"{model.ref} is in the store"

        return self.jobs.start("pull", without_query(request.source), work, owner=caller.id)

    @functools.cached_property
    def _network(self) -> Network:
        # One for all pulls, which share its rate. Made when the first begins: it brings an HTTP client.
        from edge.store.network import Network

        return Network.of(self.settings)

    def _check_pull(self, request: PullRequest, caller: Caller) -> None:
        from edge.store.fetch import in_catalog

        known = in_catalog(request.source)
        if known is None and isinstance(parse_source(request.source), FileSource) and not caller.may_read_files:
            raise Forbidden(
                f"'{request.source[:200]}' is neither in the catalog nor on the network, and files of this device are "
                "pulled by programs that run on it.",
                hint="Name hf://OWNER/REPO/FILE.gguf, oci://HOST/NAME:TAG or https://HOST/FILE.gguf, or run on the "
                "device: edge pull FILE.",
            )
        name = request.name or (str(known[0]) if known else "")
        if caller.limits.models and not name:
            raise Forbidden(
                "This key has to say what to name the model.",
                hint=f"Give a 'name' that it may use: {', '.join(caller.limits.models)}.",
            )
        if name:
            self.check_target(caller.limits, name)

    # ------------------------------------------------------------------ telemetry and status

    def record(self, record: RequestRecord) -> None:
        """Count a request and hand it to the telemetry."""
        self._num_requests += 1
        if record.error_type not in (None, "cancelled", ClientClosed.code):
            self._num_failed += 1
        if record.ttft_s is not None:
            self._ttft_s.append(record.ttft_s)
        self.telemetry.record(record)

    def outbox(self) -> OutboxStatus:
        """The telemetry spool."""
        return msgspec.convert(self.telemetry.status(), OutboxStatus, from_attributes=True)

    async def status(self, caller: Caller) -> DeviceStatus:
        """How the device is now, as far as the caller may see it."""
        models = await self.model_infos(caller.limits)
        hosts = self.pool.hosts()
        rates = [h.rates() for h in hosts]
        disk_free = shutil.disk_usage(_existing(self.settings.home)).free
        available, total = available_bytes(), total_bytes()
        return DeviceStatus(
            version=__version__,
            device_id=self.telemetry.device_id,
            hostname=socket.gethostname(),
            time=time.time(),
            uptime_s=time.monotonic() - self._started,
            cpu_percent=psutil.cpu_percent(),
            cpu_count=usable_cores(),
            load_1m=psutil.getloadavg()[0],
            memory_total_bytes=total,
            memory_available_bytes=available,
            memory_used_bytes=self._resident_bytes(),
            disk_free_bytes=disk_free,
            temperature_c=temperature_c(),
            accelerator="CPU",
            requests_active=sum(m.requests_active for m in models),
            requests_waiting=sum(m.requests_waiting for m in models),
            requests_total=self._num_requests,
            requests_failed=self._num_failed,
            decode_tok_s=sum(r[1] for r in rates),
            prefill_tok_s=sum(r[0] for r in rates),
            ttft_p50_s=statistics.median(self._ttft_s) if self._ttft_s else None,
            models=models,
            outbox=self.outbox(),
            jobs=self.jobs.list(caller.jobs_of)[:10],
            alerts=self._alerts(models, disk_free=disk_free, memory_share=available / total),
        )

    def _resident_bytes(self) -> int:
        own = psutil.Process().memory_info().rss
        return own + sum(h.heartbeat.memory_bytes for h in self.pool.hosts() if h.heartbeat is not None)

    def _alerts(self, models: list[ModelInfo], *, disk_free: int, memory_share: float) -> list[Alert]:
        alerts = [
            Alert(level="critical", what=f"{m.ref} cannot be loaded: {m.error}", fix=f"edge verify {m.ref}")
            for m in models
            if m.state == "failed"
        ]
        alerts += [
            Alert(level="warning", what=f"{m.ref} has no draft model: {m.draft_problem}", fix=f"edge draft {m.ref}")
            for m in models
            if m.draft_problem is not None
        ]
        alerts += self._slot_alerts()
        alerts += self.upkeep.alerts()
        if num := self.pool.poison.num_refused:
            what = f"requests that ended the engine twice are refused: {num}"
            alerts.append(Alert(level="warning", what=what, fix="edge replay"))
        if disk_free < LOW_DISK_BYTES:
            alerts.append(Alert(level="critical", what=f"{disk_free >> 20} MiB of disk are free", fix="edge rm MODEL"))
        if memory_share < LOW_MEMORY_SHARE:
            alerts.append(Alert(level="warning", what="memory is nearly used up", fix="edge unload MODEL"))
        if (error := self.outbox().last_error) is not None:
            alerts.append(
                Alert(level="warning", what=f"telemetry: {error}", fix="start the gateway, or correct EDGE_GATEWAY_URL")
            )
        if self.access.error is not None:
            what = f"neither usage nor the audit log can be written: {self.access.error}"
            alerts.append(Alert(level="critical", what=what, fix="free disk space, and look at the log"))
        if self.responses.error is not None:
            what = f"responses are not stored: {self.responses.error}"
            alerts.append(Alert(level="warning", what=what, fix="free disk space, and look at the log"))
        if not models:
            alerts.append(Alert(level="info", what="no models yet", fix=f"edge pull {self.settings.default_model}"))
        return alerts

    def _slot_alerts(self) -> list[Alert]:
        if (error := self.activation.error) is not None:
            return [Alert(level="critical", what=f"no slot serves: {error}", fix="edge activate MODEL")]
        failed = {n: s for n, s in self.activation.slots().items() if s.last and s.last.outcome == "rolled_back"}
        return [
            Alert(level="warning", what=f"{s.names.get(s.last.digest)} was taken out of the slot {n}: {s.last.reason}",
                  fix="edge slots")
            for n, s in failed.items() if s.last is not None
        ]  # fmt: skip

    # ------------------------------------------------------------------ events

    async def events(self, caller: Caller) -> AsyncGenerator[bytes]:
        """A status each second, every job as it changes, and lines of the log. A watcher who reads too slowly misses
        events; one whose key is revoked gets no more."""
        if len(self._watchers) >= MAX_WATCHERS:
            raise QueueFull(retry_after_s=5)
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=64)
        self._watchers[queue] = caller
        try:
            yield sse.event("status", msgspec.json.encode(await self.status(caller)))
            while (event := await queue.get()) is not None and self.access.is_valid(caller):
                yield event
        finally:
            del self._watchers[queue]

    def end_events(self) -> None:
        """End every stream of events: they have no end of their own, and the server is to stop."""
        for queue in self._watchers:
            while queue.full():
                queue.get_nowait()
            queue.put_nowait(None)

    def _publish(self, event: bytes, queues: Iterable[asyncio.Queue[bytes | None]]) -> None:
        for queue in queues:
            with contextlib.suppress(asyncio.QueueFull):  # the next status tells it all again
                queue.put_nowait(event)

    def _job_changed(self, job: Job) -> None:
        owner = self.jobs.owner(job.id)
        if queues := [q for q, caller in self._watchers.items() if caller.jobs_of in (None, owner)]:
            self._publish(sse.event("job", msgspec.json.encode(job)), queues)

    def _logged(self, lines: list[str]) -> None:
        event = sse.event("log", msgspec.json.encode(LogLines(lines=lines)))
        self._publish(event, [q for q, caller in self._watchers.items() if not caller.limits.models])

    async def _broadcast(self) -> None:
        while True:
            await asyncio.sleep(STATUS_INTERVAL_S)
            try:
                await self._tell_status()
            except Exception:  # the supervisor of a task: the next second may be better
                log.exception("no status")

    async def _tell_status(self) -> None:
        watchers = dict(self._watchers)
        for who in {c.jobs_of: c for c in watchers.values()}.values():  # all who may see everything get one picture
            event = sse.event("status", msgspec.json.encode(await self.status(who)))
            self._publish(event, [q for q, caller in watchers.items() if caller.jobs_of == who.jobs_of])

    def tidy(self) -> None:
        """Have the house kept now: a model may have become one that nobody wants loaded."""
        self._untidy.set()

    async def _keep_house(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HOUSE_INTERVAL_S):
                    await self._untidy.wait()
            self._untidy.clear()
            try:
                await self.pool.unload_idle()
                await self.upkeep.tend()
                self.responses.tidy()
            except Exception:  # as above
                log.exception("housekeeping failed")


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _model_info(model: StoredModel, host: ModelHost | None, pins: frozenset[str]) -> ModelInfo:
    info = ModelInfo(
        ref=str(model.ref),
        digest=str(model.digest),
        size_bytes=model.size_bytes,
        state="unloaded",
        kind=model.kind,
        capabilities=tuple(model.capabilities),
        architecture=model.architecture,
        quantization=model.quantization,
        num_parameters=model.num_parameters,
        context_tokens=model.context_tokens,
        license=model.license,
        source=model.source,
        created=model.created,
        is_pinned=str(model.ref) in pins,
    )
    if host is not None:
        _add_runtime(info, host)
    return info


def _add_runtime(info: ModelInfo, host: ModelHost) -> None:
    info.state, info.num_restarts = host.state, host.num_restarts
    info.error = str(host.error) if host.error is not None else None
    info.requests_active = host.num_active
    info.prefill_tok_s, info.decode_tok_s = host.rates()
    info.loaded_s = time.monotonic() - host.ready_since if host.ready_since is not None else None
    if host.ready is not None:
        info.kv_cells = host.ready.num_cells
        info.draft, info.draft_problem = host.ready.draft or None, host.ready.draft_problem or None
    if (beat := host.heartbeat) is not None:
        info.memory_bytes, info.kv_cells_used, info.requests_waiting = beat.memory_bytes, beat.cells_used, beat.waiting
        info.drafted_tokens, info.draft_accepted_tokens = beat.drafted_by_model, beat.accepted_by_model


def appliance_of(state: State) -> Appliance:
    """The appliance of an application."""
    appliance: Appliance = state.appliance
    return appliance
