"""What commands did to the appliance's own store, as lines of the audit log."""

from __future__ import annotations

from pathlib import Path

import click

from edge.cli.main import settings_from
from edge.errors import EdgeError


def note(act: str, target: str, *, store_dir: Path | None) -> None:
    """Note what was done; nothing of a store that is not the appliance's. Where no line can be written, say so."""
    if store_dir is not None:
        return
    from edge.access.audit import Act, add_line  # SQLite, which commands that change nothing do without
    from edge.access.keys import local_actor

    try:
        add_line(settings_from().state_db, Act(local_actor(), act, target))
    except EdgeError as e:
        click.echo(f"not in the audit log: {e.message}", err=True)
