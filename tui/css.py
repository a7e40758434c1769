"""Style sheets that lie beside the module of their widget."""

from __future__ import annotations

from pathlib import Path


def beside(module_file: str) -> str:
    """The text of the ``.tcss`` file beside a module."""
    return Path(module_file).with_suffix(".tcss").read_text("utf-8")
