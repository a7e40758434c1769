"""Threads for work that may take long, or for ever: it holds up neither asyncio's own threads nor the end of the
process."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """Work on a thread was to end before its end."""


def until_stopped(items: Iterable[T], stop: threading.Event) -> Generator[T]:
    """The items.

    Raises:
        Stopped: `stop` was set meanwhile.
    """
    for item in items:
        if stop.is_set():
            raise Stopped
        yield item


class BackgroundThreads:
    """So many threads, each begun when it is first needed. Owned by the event loop.

    They are daemons: unlike those of a `ThreadPoolExecutor`, the interpreter does not wait for them when it ends.
    """

    def __init__(self, num: int, *, name: str) -> None:
        self._num, self._name = num, name
        self._threads: list[threading.Thread] = []
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_held = 0

    @property
    def num_held(self) -> int:
        """How much is under way or waits, also of what nobody waits for any more."""
        return self._num_held

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` gives, in its turn. Cancelling this does not end it once it has begun."""
        done: Future[T] = Future()

        def act() -> None:
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(work())
                except BaseException as e:  # noqa: BLE001  # who waits is told
                    done.set_exception(e)

        self._count(1)
        self._work.put(act)
        if len(self._threads) < min(self._num, self._num_held):
            name = f"{self._name}_{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._run, name=name, daemon=True))
            self._threads[-1].start()
        return await asyncio.wrap_future(done)

    def close(self) -> None:
        """Have the threads end after what was handed in; does not wait for it."""
        for _ in self._threads:
            self._work.put(None)

    def _count(self, more: int) -> None:
        with self._lock:
            self._num_held += more

    def _run(self) -> None:
        while (act := self._work.get()) is not None:
            act()
            del act  # else it would be held while nothing is to be done
            self._count(-1)
