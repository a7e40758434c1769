"""The appliance's log: a rotated file, the terminal, and the last lines in memory for whoever looks."""

from __future__ import annotations

import logging
import logging.handlers
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

from typing_extensions import override

_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_MAX_FILE_BYTES = 4 << 20
_KEPT_FILES = 3


class RecentLines(logging.Handler):
    """The last lines of the log.

    Attributes:
        on_lines: Called with each record's lines, on the thread that logs; must not log itself.
    """

    def __init__(self, *, limit: int = 5000) -> None:
        super().__init__()
        self.on_lines: Callable[[list[str]], object] = lambda _: None
        self._lines: deque[str] = deque(maxlen=limit)
        self.setFormatter(logging.Formatter(_FORMAT))

    @override
    def emit(self, record: logging.LogRecord) -> None:
        lines = self.format(record).splitlines()
        self._lines.extend(lines)
        self.on_lines(lines)

    def last(self, count: int) -> list[str]:
        """At most `count` lines, the newest last."""
        return list(self._lines)[-count:] if count > 0 else []


def set_up(directory: Path, *, verbose: bool) -> RecentLines:
    """Send the log of this process to a file in `directory`, to stderr, and to the handler that is returned. Where
    the file cannot be written, the log goes on without it and says so. Directories made here are this user's alone."""
    recent = RecentLines()
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(logging.INFO if verbose else logging.WARNING)
    handlers: list[logging.Handler] = [recent, terminal]
    failure: OSError | None = None
    try:
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        handlers.append(
            logging.handlers.RotatingFileHandler(
                directory / "edge.log", maxBytes=_MAX_FILE_BYTES, backupCount=_KEPT_FILES, encoding="utf-8"
            )
        )
    except OSError as e:
        failure = e
    logging.basicConfig(level=logging.INFO, format=_FORMAT, handlers=handlers, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if failure is not None:
        logging.getLogger("edge").warning("no log file: %s", failure)
    return recent
