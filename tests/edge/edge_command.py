"""The command `edge` as people run it: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

COMMAND = str(Path(sys.executable).with_name("edge"))


@dataclass(frozen=True)
class Edge:
    """One appliance's command line."""

    home: Path
    environ: Mapping[str, str]

    @property
    def store(self) -> Path:
        return self.home / "store"

    def start(self, *args: str) -> subprocess.Popen[str]:
        """Start it, its output captured."""
        return subprocess.Popen(
            [COMMAND, *args],
            env=self._environ(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            [COMMAND, *args],
            env=self._environ(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def _environ(self) -> Mapping[str, str]:
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("EDGE_", "HF_"))}
        own = {"EDGE_HOME": str(self.home), "EDGE_SEED": str(self.home / "no-seed"), "HF_HOME": str(self.home / "hf")}
        return {**kept, **own, **self.environ}


def edge_at(home: Path, **environ: str) -> Edge:
    """The command line of the appliance in `home`, with more environment."""
    return Edge(home, environ)
