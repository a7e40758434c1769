"""A run that kills its own process at a given moment: `python -m tests.quantize.killed_run SOURCE HOME PLACE NUMBER`.

PLACE is `event`, for the NUMBER-th event of the pipeline, or `store`, for the NUMBER-th change of the store's disk.
"""

from __future__ import annotations

import os
import signal
import sys
from io import FileIO
from pathlib import Path

from typing_extensions import override

from edge.store.files import FileOps
from edge.store.models import ModelStore
from quantize.cache import StepCache
from quantize.pipeline import Event, Workshop, plan, run
from quantize.recipe import Recipe, parse_types
from quantize.source import open_source


class Countdown:
    """Ends the process when it has been called often enough; 0 never does."""

    def __init__(self, number: int) -> None:
        self.left = number

    def tick(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class FatalFiles(FileOps):
    """Counts the durable changes."""

    def __init__(self, countdown: Countdown) -> None:
        self.countdown = countdown

    @override
    def rename(self, source: Path, target: Path) -> None:
        self.countdown.tick()
        super().rename(source, target)

    @override
    def sync(self, file: FileIO) -> None:
        self.countdown.tick()
        super().sync(file)


def recipe() -> Recipe:
    """Two small variants, judged on two windows."""
    return Recipe(name="tiny", types=parse_types(["Q8_0", "Q4_0"]), num_tokens=1024, num_threads=1)


def main() -> None:
    """Run to the end, or to the given moment."""
    source, home, place, number = sys.argv[1:]
    countdown = Countdown(int(number))
    seen: set[tuple[str, str]] = set()

    def on_event(event: Event) -> None:
        # Of a step's progress only what comes first counts: in the middle of the work, whatever its length.
        happening = (event.step.key, event.moment)
        if place == "event" and event.moment != "cached" and happening not in seen:
            seen.add(happening)
            countdown.tick()

    files = FatalFiles(countdown if place == "store" else Countdown(0))
    store = ModelStore(Path(home) / "store", files=files)
    shop = Workshop(StepCache(Path(home) / "work"), store, on_event=on_event, clock=lambda: 1.0)
    run(plan(open_source(source, store), recipe(), shop), shop)


if __name__ == "__main__":
    main()
