"""Work that ends what it has begun also when its command is killed."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable


def outlive() -> Callable[[], bool]:
    """Go on in a process of its own, whose exit code the command's own process waits for and takes as its own.

    Gives what tells whether that one is gone or somebody wants the work to stop. Call it before there are threads.
    Registries on the distribution project's code (docker-registry 2.8, Harbor) forget an upload of which a chunk
    arrived in part, or whose answer nobody read: the place where it goes on stands signed in each answer, and any other
    is refused (registry/handlers/blobupload.go, "upload resumed at wrong offset").
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child:
        os.close(read_end)
        _wait_for(child, write_end)
    os.close(write_end)
    os.setsid()  # so that an interrupt from the keyboard reaches the one that waits only
    is_told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: is_told.append(number))
    return lambda: bool(is_told) or bool(select.select([read_end], [], [], 0)[0])


def _wait_for(child: int, write_end: int) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _, status = os.waitpid(child, 0)
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.close(write_end)
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    sys.stdout.flush()
    os._exit(code if code >= 0 else 128 - code)
