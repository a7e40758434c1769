"""Marks on blobs that proved damaged: no model is opened with one until its bytes came anew.

``quarantine.json`` beside the index. The bytes stay, because most of them are right and repair builds on them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from edge.errors import InvalidReference, StoreError

from .digest import Digest
from .files import FileOps
from .side_files import read_side_file, write_side_file

QUARANTINE_NAME = "quarantine.json"
log = logging.getLogger("edge.store")


def read_marks(root: Path) -> dict[Digest, str]:
    """The marked blobs of the store in this directory, and why. A damaged list counts as an empty one: what it knew is
    found again by the next scrub."""
    try:
        found = read_side_file(root / QUARANTINE_NAME, dict[str, str], absent={}, hint="")
        return {Digest(digest): reason for digest, reason in found.items()}
    except (InvalidReference, StoreError) as e:
        log.warning("no blob counts as quarantined: %s", e)
        return {}


def write_marks(root: Path, marks: Mapping[Digest, str], files: FileOps) -> None:
    """Replace the marks. Hold the store's lock."""
    write_side_file(files, root / QUARANTINE_NAME, dict(sorted(marks.items())))
