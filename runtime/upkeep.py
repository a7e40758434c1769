"""The store's bytes, looked after while the appliance runs: read again, quarantined where they are wrong, and repaired.

A damaged file of a loaded model: where memory still has the right bytes, they are written back and nobody notices. Else
the engine has computed with wrong weights, so it is ended at once and what it saved is thrown away; requests get the
error until the file is repaired, which begins by itself.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from edge.config import Settings
from edge.errors import Cancelled, EdgeError, NotRepaired, Quarantined
from edge.store.digest import Digest
from edge.store.models import DamagedModel, ModelStore
from edge.store.repair import MemorySource, Mended, Source, repair
from edge.store.scrub import Flaw, Scrubber, names_with, part_with
from edge.store.transfer import Control
from runtime.api.schema import Alert
from runtime.api.threads import BackgroundThreads, Stopped
from runtime.pool import Pool

log = logging.getLogger("edge.upkeep")

START_S = 1.0
"""After the start, before the first look."""
CALM_S = 60.0
"""How long it waits for the models that are loaded at the start, and for requests that waited for it."""
SAMPLED_PIECES = 16
"""At each start: 64 MiB at most."""
MIN_INTERVAL_S = 0.1
PAUSE_S = 0.02
"""After each MiB that is read: some 40 MB a second at most, and a tenth of one core."""
RETRY_S = (60.0, 300.0, 1800.0, 7200.0)
"""After a repair that failed; the last again and again."""
DAY_S = 86400.0

Tell = Callable[[str, str, str], Awaitable[None]]
"""Notes an act, what it was done to and what came of it, in the audit log."""


@dataclass(slots=True)
class Damage:
    """A quarantined blob."""

    blob: Digest
    problem: str
    models: tuple[str, ...]
    failure: str = ""
    """Why the last repair failed."""
    num_tries: int = 0
    next_try_s: float = 0.0
    task: asyncio.Task[None] | None = field(default=None, repr=False)


class Upkeep:
    """Looks after a store. Owned by the event loop; reading and repairing happen on threads."""

    def __init__(self, settings: Settings, store: ModelStore, pool: Pool, tell: Tell) -> None:
        self._settings = settings
        self._store = store
        self._pool = pool
        self._tell = tell
        self._stop = threading.Event()
        self._threads = BackgroundThreads(2, name="upkeep")
        self._scrubber = Scrubber(store, before_read=self._breathe)
        self._damage: dict[Digest, Damage] = {}
        self._broken: list[DamagedModel] = []
        self._seen: object = None
        """The version of the store at the last look."""
        self._tending = asyncio.Lock()

    @property
    def checked_bytes(self) -> int:
        """Read again since the start."""
        return self._scrubber.checked_bytes

    @property
    def num_damaged(self) -> int:
        """Quarantined blobs."""
        return len(self._damage)

    def _breathe(self) -> None:
        if self._stop.wait(PAUSE_S):
            raise Stopped

    async def close(self) -> None:
        """Stop; what was read of a piece is read again."""
        self._stop.set()
        tasks = [damage.task for damage in self._damage.values() if damage.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.close()

    # ------------------------------------------------------------------ reading again

    async def scrub(self) -> None:
        """Check a sample, and then everything, round after round, until it is cancelled."""
        if self._settings.scrub_days <= 0:
            return
        await asyncio.sleep(START_S)
        await self._calm(CALM_S)
        await self._check(lambda: list(self._scrubber.sample(SAMPLED_PIECES)))
        while True:
            await self._turn()
            await self._check(lambda: [flaw] if (flaw := self._scrubber.step()) is not None else [])

    async def _check(self, read: Callable[[], list[Flaw]]) -> None:
        """Read something again and see to what is wrong with it; an error ends this time only."""
        try:
            await self._found(await self._threads.run(read))
        except EdgeError as e:
            log.warning("the store is not checked: %s", e)

    async def _turn(self) -> None:
        """Wait until a piece is due; then for a moment without requests, but for no longer than that once more."""
        due_s = self._settings.scrub_days * DAY_S / max(1, self._scrubber.num_pieces)
        wait_s = max(MIN_INTERVAL_S, due_s if self._scrubber.num_pieces else 0.0)
        await asyncio.sleep(wait_s)
        await self._calm(wait_s)

    async def _calm(self, timeout_s: float) -> None:
        """Wait until no model is being loaded or asked."""
        latest_s = time.monotonic() + timeout_s
        while self._is_busy() and time.monotonic() < latest_s:  # noqa: ASYNC110  # nothing tells of the last request
            await asyncio.sleep(min(0.5, timeout_s))

    def _is_busy(self) -> bool:
        return any(host.num_active or host.state == "loading" for host in self._pool.hosts())

    async def _found(self, flaws: list[Flaw]) -> None:
        for flaw in flaws:
            names = await asyncio.to_thread(names_with, self._store, flaw.piece.blob)
            await self._tell("model.damage", f"{', '.join(names)}: {flaw.problem}", "ok")
        if flaws:
            await self.tend()

    # ------------------------------------------------------------------ what is damaged

    async def tend(self) -> None:
        """Look which blobs are quarantined now, by whomever, and do what is to be done about each."""
        async with self._tending:
            if (version := self._store.generation()) != self._seen:
                await self._look()
                self._seen = version
            self._begin_repairs()

    async def _look(self) -> None:
        marks = await asyncio.to_thread(self._store.quarantined)
        for blob in self._damage.keys() - marks.keys():
            self._damage.pop(blob)
        for blob in marks.keys() - self._damage.keys():
            names = await asyncio.to_thread(names_with, self._store, blob)
            self._damage[blob] = Damage(blob, marks[blob], tuple(names))
            await self._isolate(self._damage[blob])
        self._broken = await asyncio.to_thread(self._store.damaged)

    def _begin_repairs(self) -> None:
        for damage in self._damage.values():
            is_due = damage.task is None and time.monotonic() >= damage.next_try_s
            if is_due and self._settings.repair == "auto":
                damage.task = asyncio.create_task(self._repair(damage), name=f"repair {damage.blob}")

    async def _isolate(self, damage: Damage) -> None:
        """See that no engine goes on with wrong bytes."""
        if await self._mended(damage, [MemorySource(self._store.blobs)]):
            return
        error = Quarantined(", ".join(damage.models) or damage.blob, damage.problem)
        await self._pool.condemn(damage.blob, error)

    async def _repair(self, damage: Damage) -> None:
        try:
            sources = await self._threads.run(lambda: self._sources(damage))
            if await self._mended(damage, sources):
                return
        except EdgeError as e:
            damage.failure = e.message
        except Exception as e:  # the supervisor of a task: it is tried again, and the others go on
            log.exception("the repair of %s failed", damage.blob)
            damage.failure = f"{type(e).__name__}; the log says more"
        finally:
            damage.task = None
        damage.next_try_s = time.monotonic() + RETRY_S[min(damage.num_tries, len(RETRY_S) - 1)]
        damage.num_tries += 1

    def _sources(self, damage: Damage) -> list[Source]:
        from edge.store.repair_sources import sources_for  # brings an HTTP client, which few appliances ever need

        return sources_for(self._settings, self._store, damage.models)

    async def _mended(self, damage: Damage, sources: list[Source]) -> bool:
        """Whether these sources could put it right."""
        control = Control(lambda _: None, self._stop.is_set)

        def work() -> Mended | None:
            part = part_with(self._store, damage.blob)
            return repair(self._store, part, sources, control) if part is not None else None

        try:
            done = await self._threads.run(work)
        except Cancelled:
            return False
        except EdgeError as e:
            damage.failure = e.reason if isinstance(e, NotRepaired) else e.message
            log.error("%s stays quarantined: %s", damage.blob, e)
            return False
        if done is None:
            return False  # its models were removed
        self._damage.pop(damage.blob, None)
        where = ", ".join(done.sources) or "nowhere: it reads right again"
        log.warning("%s was mended: %d bytes from %s", damage.blob, done.mended_bytes, where)
        await self._tell("model.repair", f"{', '.join(damage.models)} from {where}", "ok")
        return True

    def alerts(self) -> list[Alert]:
        """What an operator should know."""
        failures = {name: damage.failure for damage in self._damage.values() for name in damage.models}
        return [_alert(broken, failures.get(str(broken.ref))) for broken in self._broken]


def _alert(broken: DamagedModel, failure: str | None) -> Alert:
    if not isinstance(broken.error, Quarantined):
        return Alert(
            level="critical", what=f"{broken.ref} is damaged: {broken.reason}", fix=f"edge verify {broken.ref}"
        )
    doing = f"not repaired yet: {failure}" if failure else "being repaired"
    what = f"{broken.ref} is damaged on the disk and not used ({broken.error.reason}); {doing}"
    return Alert(level="critical", what=what, fix=f"edge verify {broken.ref} --repair")
