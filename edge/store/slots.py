"""Slots: names such as ``chat`` behind which one version of a model serves and the one before it is kept.

``slots.json`` beside the index. Which version goes in and whether it stays is decided by activation; here is only what
is written down, and that both versions' bytes stay while it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from .digest import Digest
from .files import FileOps
from .side_files import read_side_file, write_side_file

SLOTS_NAME = "slots.json"
_HINT = "Put a copy of it back, or take it away and activate the models again: edge activate MODEL."


class Trial(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A version that is to prove itself."""

    candidate: Digest
    trial_s: float
    """How long it has to serve without a crash."""
    served_s: float = 0.0
    """How long it did before the appliance was last stopped in order."""
    num_starts: int = 0
    """Loads that were begun for it, each counted before it began."""
    is_open: bool = False
    """One was begun, and nobody wrote yet what came of it."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What came of the last change."""

    digest: Digest
    outcome: Literal["confirmed", "rolled_back", "withdrawn"]
    """Withdrawn is what somebody asked to go."""
    reason: str = ""
    """Why it went."""
    time_s: float = 0.0
    """Unix time, by a clock that may be wrong: for people."""


class Slot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The versions of one slot, as digests of their manifests."""

    current: Digest | None = None
    """The one that serves, or that serves again where the trial fails."""
    previous: Digest | None = None
    trial: Trial | None = None
    names: dict[str, str] = {}
    """The names under which versions came here, by digest: a name may lead to another one by now."""
    last: Verdict | None = None

    def digests(self) -> Iterator[Digest]:
        """Every version whose bytes must stay."""
        candidate = self.trial.candidate if self.trial else None
        yield from (digest for digest in (self.current, self.previous, candidate) if digest)


ChangeSlots = Callable[[Mapping[str, Slot]], Mapping[str, Slot]]
"""Gives the slots as they should be; what it leaves out is no slot any more."""


class _Slots(msgspec.Struct, frozen=True, kw_only=True):
    version: Literal[1] = 1
    slots: dict[str, Slot] = {}


def read_slots(root: Path) -> dict[str, Slot]:
    """The slots of the store in this directory.

    Raises:
        StoreError: The file is damaged, or of a newer version.
    """
    return read_side_file(root / SLOTS_NAME, _Slots, absent=_Slots(), hint=_HINT).slots


def write_slots(root: Path, slots: Mapping[str, Slot], files: FileOps) -> None:
    """Replace the slots. Hold the store's lock."""
    write_side_file(files, root / SLOTS_NAME, _Slots(slots=dict(sorted(slots.items()))))
