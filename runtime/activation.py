"""Slots: a new version is loaded beside the one that serves, proves itself, serves on trial, and stays or goes.

What is written down, and when, `edge.store.activation` decides; here it is done. One event loop owns it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from edge.config import Settings
from edge.errors import (
    ActivationFailed,
    DoesNotFit,
    EdgeError,
    InvalidRequest,
    ServerStopping,
    SlotBusy,
    SlotNotFound,
    StoreError,
    WorkerDied,
)
from edge.store import activation as decide
from edge.store.goldens import goldens_of
from edge.store.models import ModelStore, StoredModel
from edge.store.slots import Slot
from edge.trust.policy import admit, insist
from runtime.host import ModelHost
from runtime.pool import READY_WAIT_S, Pool, Serving, serving_of
from runtime.proof import prove
from runtime.selection import refuse_adapter

log = logging.getLogger("edge.activation")

TRIAL_S = 600.0
LOAD_S = 600.0
"""How long the load of a version may take while the other one serves."""
ALONE_S = READY_WAIT_S / 2
"""The same while nobody serves: requests wait no longer than `READY_WAIT_S`."""
RETRY_S = 30.0
"""After which a verdict is written again that the disk did not take."""
CHANGING_S = 0.5
"""How often a trial whose time is over looks whether somebody still changes its slot."""
ASKED = "it was asked for"
UNWRITTEN = "what came of its trial could not be written"
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}")

Phase = Literal["checking", "trial"]


@dataclass(eq=False, slots=True)
class Attempt:
    """A version on its way into a slot.

    Attributes:
        was_loaded: Somebody used it already, by its name.
        old: What serves until it does, and again where it fails; `beside` is its host.
        served_s: How long it served before the last start of the appliance.
        proven: Done when it serves, or failed.
        over: Why its trial ended before its time, and whether it is sick.
    """

    slot: str
    host: ModelHost
    was_loaded: bool
    old: Serving | None
    beside: ModelHost | None
    trial_s: float
    served_s: float
    within_s: float | None
    proven: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    over: asyncio.Future[tuple[str, bool]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    phase: Phase = "checking"
    since: float = 0.0
    task: asyncio.Task[None] | None = None

    def total_s(self) -> float:
        """How long it served on trial."""
        return self.served_s + (time.monotonic() - self.since if self.phase == "trial" else 0.0)

    def tell(self, error: EdgeError | None = None) -> None:
        """Say that it serves, or why not, to who waits for that."""
        if self.proven.done():
            return
        if error is None:
            self.proven.set_result(None)
        else:
            self.proven.set_exception(error)
            self.proven.exception()  # nobody may be left to take it


class Activation:
    """The slots of an appliance."""

    def __init__(self, settings: Settings, store: ModelStore, pool: Pool) -> None:
        self._settings = settings
        self._store = store
        self._pool = pool
        self._slots: dict[str, Slot] = {}
        self._attempts: dict[str, Attempt] = {}
        self._changing: set[str] = set()
        """Slots of which somebody swaps the versions."""
        self._retiring: set[asyncio.Task[None]] = set()
        self.error: str | None = None
        """Why slots cannot be read."""

    # ------------------------------------------------------------------ what others ask

    def slots(self) -> dict[str, Slot]:
        """Every slot, by name."""
        return dict(self._slots)

    def attempt(self, name: str) -> Attempt | None:
        """The version on its way into a slot."""
        return self._attempts.get(name)

    async def start(self) -> None:
        """Take up what the last run left: a trial that was cut off is reverted, one that was paused goes on."""
        try:
            self._slots = await asyncio.to_thread(self._recover)
        except StoreError as e:
            self.error = e.message
            log.error("no slot serves: %s", e)
            return
        self._pool.slots = serving_of(self._slots)
        for name, slot in self._slots.items():
            if slot.trial is not None:
                self._later(self._resume(name))

    def _recover(self) -> dict[str, Slot]:
        before, now_s = self._store.slots(), time.time()
        after = {name: decide.recovered(slot, now_s=now_s) for name, slot in before.items()}
        if after != before:
            self._store.write_slots(lambda _: after)
        for name in (n for n in after if after[n] != before[n]):
            verdict = after[name].last
            log.error("a version was taken out of the slot %s: %s", name, verdict.reason if verdict else "")
        return after

    async def _resume(self, name: str) -> None:
        trial = self._slots[name].trial
        assert trial is not None
        with self._alone(name):
            try:
                host = await self._pool.version(trial.candidate, self._slots[name].names.get(trial.candidate, name))
                beside = await self._beside(name)
                await self._change(name, decide.started)
            except EdgeError as e:
                reason = e.message
                await self._write_verdict(name, lambda slot: decide.reverted(slot, reason, now_s=time.time()))
                return
            self._begin(name, host, beside, trial_s=trial.trial_s, served_s=trial.served_s, within_s=None)

    async def activate(
        self, name: str, ref: str, *, trial_s: float = TRIAL_S, within_s: float | None = None, force: bool = False
    ) -> None:
        """Put a version into a slot; returns when it serves. Goes on where nobody waits any more.

        Args:
            trial_s: How long it has to serve without a crash before the version before it is let go.
            within_s: In which it has to answer its golden prompts.
            force: Take a release that is older than one that was confirmed here.

        Raises:
            Untrusted: The trust policy refuses it.
            InvalidRequest: It is no name of a slot, or another kind of model serves there.
            SlotBusy: Another version is being loaded for it.
            ActivationFailed: It did not prove itself; what served before serves.
            EdgeError: There is no such model, or the slots cannot be written.
        """
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"{name[:64]!r} is no name of a slot.", field="slot", hint="Lower-case letters and digits, as in chat."
            )
        model = await asyncio.to_thread(self._candidate, ref)
        await asyncio.to_thread(admit, self._store, model.digest, model.ref, self._settings, force=force)
        with self._alone(name):
            if name in self._attempts:
                await self._withdraw(name, "another version was activated")
            if self._slot(name).current == model.digest:
                return
            host = await self._pool.version(model.digest, str(model.ref))
            beside = await self._beside(name)
            _check_kind(name, model, beside)
            self._check_untried(host)
            if force:  # before it is loaded, which asks again
                await asyncio.to_thread(insist, self._store, model.digest, model.ref, self._settings)
            await self._change(name, partial(_begun, model=model, trial_s=trial_s))
            attempt = self._begin(name, host, beside, trial_s=trial_s, served_s=0.0, within_s=within_s)
        await asyncio.shield(attempt.proven)

    def _candidate(self, ref: str) -> StoredModel:
        model = self._store.get(ref)
        refuse_adapter(model, self._store)
        goldens_of(model)
        return model

    async def _beside(self, name: str) -> ModelHost | None:
        """The host of the version that serves; None also where its bytes are gone or damaged: then the way is free."""
        try:
            return await self._pool.host(name) if name in self._pool.slots else None
        except EdgeError as e:
            log.error("the slot %s does not serve: %s", name, e)
            return None

    async def roll_back(self, name: str, *, force: bool = False) -> None:
        """Have the version before serve again; one on trial goes.

        Args:
            force: Also where the version before is an older release than one that was confirmed here.

        Raises:
            Untrusted: The trust policy refuses the version before.
            SlotNotFound: There is no such slot.
            SlotBusy: A version is being loaded for it.
            InvalidRequest: There is no version before.
            EdgeError: The version before cannot be loaded; then the present one stays.
        """
        self._check_known(name)
        with self._alone(name):
            if name in self._attempts:
                await self._withdraw(name, ASKED)
            elif self._slot(name).trial is not None:  # nobody tries it any more: the disk did not take its verdict
                await self._change(name, lambda slot: decide.reverted(slot, UNWRITTEN, now_s=time.time()))
            else:
                await self._swap(name, force=force)

    async def _swap(self, name: str, *, force: bool) -> None:
        slot = self._slot(name)
        decide.swapped(slot, ASKED, now_s=time.time())
        assert slot.previous is not None
        before = slot.names.get(slot.previous, name)
        await asyncio.to_thread(admit, self._store, slot.previous, before, self._settings, force=force)
        if force:
            await asyncio.to_thread(insist, self._store, slot.previous, before, self._settings)
        host = await self._pool.version(slot.previous, before)
        old = self._pool.slots[name]
        beside = await self._beside(name)  # None where its bytes are damaged: that is what one rolls back from
        try:
            with self._spared(host):
                await self._load(host, old, beside)
            await self._change(name, lambda now: decide.swapped(now, ASKED, now_s=time.time()))
            self._pool.slots[name] = Serving.of(slot.previous, before)
        finally:
            old.is_open.set()
        self._retire(beside)

    async def remove(self, name: str) -> None:
        """Have no slot of that name any more; the models stay.

        Raises:
            SlotNotFound: There is none.
            SlotBusy: A version is on its way into it.
        """
        self._check_known(name)
        with self._alone(name):
            if name in self._attempts:
                raise SlotBusy(f"A version is on trial in the slot '{name}'.", hint=f"First: edge rollback {name}.")
            await asyncio.to_thread(self._store.write_slots, lambda now: {n: s for n, s in now.items() if n != name})
            self._slots.pop(name, None)
            self._pool.slots.pop(name, None)

    async def close(self) -> None:
        """Write down how far trials are, so that they go on at the next start."""
        attempts, self._attempts = self._attempts, {}
        for task in [a.task for a in attempts.values() if a.task is not None] + [*self._retiring]:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for name, attempt in attempts.items():
            attempt.host.probation = None
            attempt.tell(ServerStopping("The appliance is shutting down."))
            change = partial(decide.paused, served_s=attempt.total_s())
            if attempt.over.done():
                reason, is_sick = attempt.over.result()
                change = partial(_gone, attempt, reason, was_asked=not is_sick)
            with contextlib.suppress(StoreError):
                await self._change(name, change)
            if attempt.old is not None:
                attempt.old.is_open.set()  # who waits there is told that the appliance stops

    # ------------------------------------------------------------------ one attempt

    def _begin(
        self, name: str, host: ModelHost, beside: ModelHost | None, *, trial_s: float, served_s: float,
        within_s: float | None,
    ) -> Attempt:  # fmt: skip
        old = self._pool.slots.get(name) if beside is not None else None
        was_loaded = host.state == "ready"
        attempt = self._attempts[name] = Attempt(name, host, was_loaded, old, beside, trial_s, served_s, within_s)
        attempt.task = asyncio.create_task(self._run(attempt), name=f"slot {name}")
        return attempt

    async def _run(self, attempt: Attempt) -> None:
        name = attempt.slot
        attempt.host.probation = lambda error: None
        with self._spared(attempt.host):
            try:
                await self._admit(attempt)
            except Exception as e:  # a version that does not get in, for whatever reason, must not keep the slot
                if not isinstance(e, EdgeError):
                    log.exception("slot %s", name)
                await self._refuse(attempt, e)
            else:
                await self._try_out(attempt)
        self._attempts.pop(name, None)

    async def _admit(self, attempt: Attempt) -> None:
        """Load it, have it prove itself, and send requests to it."""
        host, name = attempt.host, attempt.slot
        await self._load(host, attempt.old, attempt.beside)
        goldens = await asyncio.to_thread(goldens_of, host.model)
        is_alone = attempt.old is not None and not attempt.old.is_open.is_set()
        await prove(host, name, goldens, within_s=attempt.within_s, is_alone=is_alone)
        if host.state != "ready":
            raise host.error or WorkerDied(host.ref, reason="it ended")
        host.probation = partial(self._fall_back, attempt)
        self._pool.slots[name] = Serving.of(host.model.digest, host.ref)
        attempt.phase, attempt.since = "trial", time.monotonic()
        if attempt.old is not None:
            attempt.old.is_open.set()
        log.info("%s serves in the slot %s", host.ref, name)

    async def _load(self, host: ModelHost, old: Serving | None, beside: ModelHost | None) -> None:
        """Load a version beside the one that serves; where memory does not do for both, in its place: then `old` is
        closed.

        Raises:
            SlotBusy: The one that serves has too much to do to make room.
            EdgeError: It cannot be loaded.
        """
        with self._spared(beside):
            while True:
                is_alone = old is not None and not old.is_open.is_set()
                try:
                    await host.wait_ready(ALONE_S if is_alone else LOAD_S)
                except DoesNotFit as e:
                    if await self._pool.make_room(host, missing_bytes=e.missing_bytes):
                        continue
                    if old is None or beside is None or not await self._would_fit(host, beside, e.missing_bytes):
                        raise
                    await self._clear(old, beside)
                else:
                    return

    async def _would_fit(self, host: ModelHost, old: ModelHost, missing_bytes: int) -> bool:
        if old is host or old.state != "ready":
            return False
        return old.memory_bytes + await self._pool.idle_bytes(but=host) >= missing_bytes

    async def _clear(self, serving: Serving, old: ModelHost) -> None:
        """Hold new requests, wait for those under way, and unload.

        Raises:
            SlotBusy: They take too long; nothing is lost of them, so it goes on serving.
        """
        log.info("%s makes room for another version", old.ref)
        serving.is_open.clear()
        deadline = time.monotonic() + self._settings.drain_timeout_s
        while old.num_active and time.monotonic() < deadline:  # noqa: ASYNC110  # there is no event for it
            await asyncio.sleep(0.02)
        if old.num_active:
            raise SlotBusy(
                f"The memory is enough for one version only, and '{old.ref}' still answered after "
                f"{self._settings.drain_timeout_s:g} s.",
                hint="Try again when it is less busy, or raise drain_timeout_s.",
            )
        await old.unload()

    def _fall_back(self, attempt: Attempt, error: EdgeError) -> None:
        """Send requests to the old version again; at once, for those come next who wait for the one that failed."""
        if attempt.over.done():
            return
        reason = _reason(error)
        log.error("%s failed on trial in the slot %s: %s", attempt.host.ref, attempt.slot, reason)
        if attempt.old is not None and attempt.beside is not None and attempt.beside.state != "ready":
            attempt.old.is_open.clear()  # until the memory is free that it needs
        self._end_trial(attempt, reason, is_sick=True)

    def _end_trial(self, attempt: Attempt, reason: str, *, is_sick: bool) -> None:
        if attempt.old is None:
            self._pool.slots.pop(attempt.slot, None)
        else:
            self._pool.slots[attempt.slot] = attempt.old
        if not attempt.over.done():
            attempt.over.set_result((reason, is_sick))

    async def _try_out(self, attempt: Attempt) -> None:
        """Let it serve for its time; the first version of a slot has nothing to fall back to, and stays at once."""
        left_s = 0.0 if attempt.old is None else attempt.trial_s - attempt.total_s()
        if left_s > 0:
            attempt.tell()
        while not attempt.over.done():
            await asyncio.wait({attempt.over}, timeout=max(0.0, left_s))
            if attempt.slot in self._changing:
                left_s = CHANGING_S  # somebody is about to end it: it must not be confirmed meanwhile
            elif attempt.over.done() or await self._confirm(attempt):
                break
            else:
                left_s = RETRY_S
        attempt.host.probation = None
        if attempt.over.done():
            await self._revert(attempt, *attempt.over.result())
        else:
            log.info("%s stays in the slot %s", attempt.host.ref, attempt.slot)
            self._retire(attempt.beside)
        attempt.tell()

    async def _confirm(self, attempt: Attempt) -> bool:
        """Whether the disk took it. Until then it is on trial."""
        try:
            await self._change(attempt.slot, lambda slot: decide.confirmed(slot, now_s=time.time()))
        except StoreError as e:
            log.error("the slot %s cannot be written: %s", attempt.slot, e)
            return False
        return True

    async def _revert(self, attempt: Attempt, reason: str, is_sick: bool) -> None:
        if is_sick:
            await attempt.host.unload(sick=WorkerDied(attempt.host.ref, reason=reason))
            await self._reload(attempt)
        elif not attempt.was_loaded:
            self._retire(attempt.host)
        await self._write_verdict(attempt.slot, partial(_gone, attempt, reason, was_asked=not is_sick))

    async def _refuse(self, attempt: Attempt, error: Exception) -> None:
        """It does not get in: what served before serves."""
        host, name = attempt.host, attempt.slot
        reason = _reason(error)
        log.error("%s does not get into the slot %s: %s", host.ref, name, reason)
        if not attempt.over.done():
            attempt.over.set_result((reason, True))
        host.probation = None
        if not attempt.was_loaded:
            await host.unload(sick=WorkerDied(host.ref, reason=reason))
        await self._reload(attempt)
        await self._write_verdict(name, lambda slot: decide.reverted(slot, reason, now_s=time.time()))
        attempt.tell(ActivationFailed(host.ref, name, reason))

    async def _reload(self, attempt: Attempt) -> None:
        """See that the old version is loaded again where it made room, and let requests through."""
        if attempt.old is None or attempt.beside is None:
            return
        try:
            if not attempt.old.is_open.is_set():
                await self._load(attempt.beside, None, None)
        except EdgeError as e:
            log.error("the slot %s does not serve: %s", attempt.slot, e)
        finally:
            attempt.old.is_open.set()

    async def _withdraw(self, name: str, reason: str) -> None:
        """End a trial that somebody does not want any more.

        Raises:
            SlotBusy: The version is still being loaded.
            EdgeError: The version before cannot be loaded; then the trial goes on.
        """
        attempt = self._attempts[name]
        if attempt.phase == "checking" or attempt.task is None or attempt.beside is None:
            raise SlotBusy(
                f"'{attempt.host.ref}' is being loaded for the slot '{name}'.", hint="Wait until it serves or failed."
            )
        now = self._pool.slots[name]
        try:
            await self._load(attempt.beside, now, attempt.host)
            self._end_trial(attempt, reason, is_sick=False)
        finally:
            now.is_open.set()
        await asyncio.wait([attempt.task])

    # ------------------------------------------------------------------ small things

    def _slot(self, name: str) -> Slot:
        return self._slots.get(name, Slot())

    def _check_known(self, name: str) -> None:
        if name not in self._slots:
            raise SlotNotFound(name, known=sorted(self._slots))

    def _check_untried(self, host: ModelHost) -> None:
        for other in self._attempts.values():
            if other.host is host:
                message = f"'{host.ref}' is on trial in the slot '{other.slot}'."
                raise SlotBusy(message, hint="Wait until it is confirmed there: edge slots.")

    @contextlib.contextmanager
    def _alone(self, name: str) -> Generator[None]:
        if name in self._changing:
            raise SlotBusy(f"The slot '{name}' is being changed.", hint="Try again when that is done: edge slots.")
        self._changing.add(name)
        try:
            yield
        finally:
            self._changing.discard(name)

    @contextlib.contextmanager
    def _spared(self, host: ModelHost | None) -> Generator[None]:
        """Have a model not give way."""
        if host is None or host in self._pool.spared:
            yield
            return
        self._pool.spared.add(host)
        try:
            yield
        finally:
            self._pool.spared.discard(host)

    async def _change(self, name: str, change: Callable[[Slot], Slot]) -> None:
        """One write. What is decided is decided of what is on the disk."""
        self._slots = dict(
            await asyncio.to_thread(
                self._store.write_slots, lambda now: {**now, name: change(now.get(name, Slot()))}
            )
        )  # fmt: skip

    async def _write_verdict(self, name: str, change: Callable[[Slot], Slot]) -> None:
        """A write that need not succeed: where it fails, the next start finds a trial that was cut off."""
        try:
            await self._change(name, change)
        except StoreError as e:
            log.error("the slot %s cannot be written: %s", name, e)
            self._slots[name] = change(self._slot(name))

    def _retire(self, host: ModelHost | None) -> None:
        """Unload a version that nobody asks for as soon as it has answered."""
        if host is not None:
            self._later(self._let_go(host))

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _let_go(self, host: ModelHost) -> None:
        deadline = time.monotonic() + self._settings.drain_timeout_s
        while not host.is_idle and time.monotonic() < deadline:  # noqa: ASYNC110  # as above
            await asyncio.sleep(0.1)
        serving = {(s.digest, s.name) for s in self._pool.slots.values()}
        pins = await asyncio.to_thread(self._store.pins)
        is_wanted = (host.model.digest, host.ref) in serving or host in self._pool.spared or host.ref in pins
        if host.is_idle and not is_wanted:
            await host.unload()


def _check_kind(name: str, model: StoredModel, now: ModelHost | None) -> None:
    if now is not None and now.model.kind != model.kind:
        raise InvalidRequest(
            f"'{model.ref}' is for {model.kind}, and in the slot '{name}' is one for {now.model.kind}.",
            field="model", hint="Take another slot: --slot NAME.",
        )  # fmt: skip


def _reason(error: Exception) -> str:
    """Why a version failed, for those who read of it later."""
    if isinstance(error, WorkerDied):
        return f"its engine failed: {error.reason}"
    return error.reason if isinstance(error, ActivationFailed) else str(error)


def _begun(slot: Slot, *, model: StoredModel, trial_s: float) -> Slot:
    slot = decide.reverted(slot, UNWRITTEN, now_s=time.time())  # nobody tries what is still there
    return decide.begun(slot, model.digest, str(model.ref), trial_s=trial_s)


def _gone(attempt: Attempt, reason: str, slot: Slot, *, was_asked: bool) -> Slot:
    """The slot without the version on trial; also where that was confirmed in the moment in which it failed."""
    if slot.trial is None and slot.previous is not None and slot.current == attempt.host.model.digest:
        return decide.swapped(slot, reason, now_s=time.time())
    return decide.reverted(slot, reason, now_s=time.time(), was_asked=was_asked)
