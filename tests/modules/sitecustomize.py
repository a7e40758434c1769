"""What a process of the product has imported by its end, for tests of what it must not.

A process whose PYTHONPATH names this directory writes the names of its modules, one a line, to a file named after its
process id in the directory EDGE_TEST_MODULES.
"""

from __future__ import annotations

import atexit
import os
import sys


def _write() -> None:
    path = os.path.join(os.environ["EDGE_TEST_MODULES"], str(os.getpid()))  # noqa: PTH118  # pathlib would be imported
    with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123  # as above
        file.write("\n".join(sys.modules))


atexit.register(_write)
