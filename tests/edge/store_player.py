"""One of the processes that play at random at one store: ``python -m tests.edge.store_player``.

It loads as the runtime does (a lease, then the file mapped) and reads what it has loaded while others work. Prints how
often it did what; a law that broke is an error.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import random
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from edge.errors import ModelNotFound
from edge.store.fetch import pull
from edge.store.manifest import ModelRef
from edge.store.models import ModelStore, PackageFile
from edge.store.slots import Slot
from tests.edge.store_support import NoSync

NAMES = 4
SLOT = "chat"
MOST_LOADED = 4


@dataclass
class Loaded:
    """A model in use: its lease, and its mapped weights."""

    path: Path
    held: ExitStack
    mapped: mmap.mmap
    sha256: str


@dataclass
class Player:
    """One process."""

    store: ModelStore
    files: list[Path]
    rng: random.Random
    done: Counter[str] = field(default_factory=Counter[str])
    loaded: list[Loaded] = field(default_factory=list[Loaded])

    def turn(self) -> None:
        """One thing, by chance, and a look at all that is loaded."""
        act = self.rng.choice([self.pull, self.pull, self.remove, self.collect, self.load, self.load, self.unload])
        act = self.rng.choice([act, act, act, self.activate, self.attach, self.read])
        try:
            act()
        except ModelNotFound:
            self.done["not there"] += 1
        self.done[act.__name__] += 1
        for model in self.loaded:
            assert model.path.exists(), "a leased blob was collected"
            assert hashlib.sha256(model.mapped).hexdigest() == model.sha256, "a loaded model lost a byte"
            assert hashlib.sha256(model.path.read_bytes()).hexdigest() == model.sha256

    def name(self) -> str:
        """One of a few names, so that players meet."""
        return f"shared:{self.rng.randrange(NAMES)}"

    def pull(self) -> None:
        """Copied, or found to be there."""
        pull(self.store, str(self.rng.choice(self.files)), name=self.name())

    def remove(self) -> None:
        """The name only."""
        self.store.remove(self.name())

    def collect(self) -> None:
        """Nothing here is damaged, so nothing may be said to be in the way."""
        assert self.store.collect().blocked_by == ()

    def load(self) -> None:
        """As the runtime: look, lease, and use what is there still."""
        if len(self.loaded) == MOST_LOADED:
            self.unload()
        model = self.store.get(self.name())
        with ExitStack() as held:
            held.enter_context(self.store.lease(model.digest))
            if not self.store.blobs.has(model.digest):  # collected between the look and the lease
                self.done["went before it was leased"] += 1
                return
            assert self.store.blob_needs(model.manifest) == [], "it is leased and not whole"
            with model.weights.open("rb") as file:
                mapped = held.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            self.store.named_directory(model)
            self.loaded.append(Loaded(model.weights, held.pop_all(), mapped, model.weights.name))

    def unload(self) -> None:
        """Any of them."""
        if self.loaded:
            self.loaded.pop(self.rng.randrange(len(self.loaded))).held.close()

    def activate(self) -> None:
        """A version comes into the slot, the one before it is kept, by digest."""
        model = self.store.get(self.name())
        with self.store.lease(model.digest):
            if self.store.blobs.has(model.digest):
                self.store.write_slots(
                    lambda before: {SLOT: Slot(current=model.digest, previous=before.get(SLOT, Slot()).current)}
                )

    def attach(self) -> None:
        """Something small, to whatever has the name."""
        model = self.store.get(self.name())
        note = self.files[0].with_name(f"note-{id(self)}-{self.rng.randrange(3)}")
        note.write_text(note.name[-1])
        with self.store.lease(model.digest):
            if self.store.blobs.has(model.digest):
                self.store.attach(model.digest, "application/x-note", [PackageFile(note, "note")])

    def read(self) -> None:
        """No half state is seen: every name leads to a whole model, and both versions of the slot are there."""
        assert self.store.damaged() == []
        for model in self.store.list():
            for found in self.store.referrers(model.digest):
                assert found.artifact_type == "application/x-note"
        for slot in self.store.slots().values():
            for digest in slot.digests():
                with self.store.lease(digest):
                    if digest in {d for s in self.store.slots().values() for d in s.digests()}:
                        model = self.store.get_version(digest, ModelRef(SLOT))
                        assert all(self.store.blobs.has_sound(file.digest) for file in model.files)


def main() -> None:
    """Arguments: the store, the number of the player, how many seconds, the files to pull."""
    root, number, seconds, *files = sys.argv[1:]
    player = Player(ModelStore(Path(root), files=NoSync()), [Path(file) for file in files], random.Random(int(number)))
    end = time.monotonic() + float(seconds)
    for _ in itertools.takewhile(lambda _: time.monotonic() < end, itertools.count()):
        player.turn()
    while player.loaded:
        player.unload()
    print(json.dumps(dict(sorted(player.done.items()))))


if __name__ == "__main__":
    main()
