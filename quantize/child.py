"""Native work in a process of its own: llama.cpp may abort, and then only the job is lost.

The parent writes one job as a line of JSON to the child's standard input and keeps that pipe open; the child answers
with lines of progress and one result or failure. When the pipe closes, because the parent is gone however it went, the
child ends at once.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar, assert_never

import msgspec

from edge.errors import BackendError, EdgeError, RecipeError

STALL_S = 1800.0
"""A job silent for so long is taken for hung. Each tensor and each window is a sign of life."""

_MAX_LINE = 1 << 20
T = TypeVar("T")


class QuantizeJob(msgspec.Struct, frozen=True, tag="quantize"):
    """Make `target` out of `source`. The result is null."""

    source: str
    target: str
    ftype: int
    num_threads: int


class QualityJob(msgspec.Struct, frozen=True, tag="quality"):
    """Compare `model` with `source` on a text. The result is an `evaluate.Quality`."""

    source: str
    model: str
    text: str
    num_tokens: int
    num_threads: int


class SpeedJob(msgspec.Struct, frozen=True, tag="speed"):
    """Time `model`. The result is an `evaluate.Speed`."""

    model: str
    text: str
    num_threads: int


class GoldenJob(msgspec.Struct, frozen=True, tag="golden"):
    """Record what `model` thinks of the beginning of a text. The result is an `edge.store.goldens.Goldens`."""

    model: str
    text: str
    num_threads: int


Job = QuantizeJob | QualityJob | SpeedJob | GoldenJob


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    share: float


class Result(msgspec.Struct, frozen=True, tag="result"):
    value: msgspec.Raw


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    code: str
    message: str
    hint: str | None


Message = Progress | Result | Failure


def _lines(pipe: IO[bytes], stall_s: float) -> Iterator[bytes]:
    """Lines as they come, until the pipe closes.

    Raises:
        RecipeError: Nothing came for `stall_s`.
    """
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if not selector.select(stall_s):
                raise RecipeError(f"llama.cpp showed no sign of life for {stall_s:.0f} s and was stopped.")
            data = os.read(pipe.fileno(), 1 << 16)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            yield from lines
            if len(pending) > _MAX_LINE:
                raise RecipeError("The quantizing process sent an endless line.")


def _epitaph(process: subprocess.Popen[bytes], errors: IO[bytes]) -> BackendError:
    """What is known of a child that ended without a word."""
    code = process.wait(timeout=30)
    how = f"with {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    errors.seek(0, os.SEEK_END)
    errors.seek(max(0, errors.tell() - 4000))
    said = [line.strip() for line in errors.read().decode("utf-8", "replace").splitlines() if line.strip()]
    assertion = next((line for line in reversed(said) if "GGML_ASSERT" in line or "error" in line.lower()), None)
    words = assertion or (said[-1] if said else "it said nothing")
    return BackendError(f"The process that runs llama.cpp ended {how}: {words[:400]}.")


def run_job(
    job: Job, result: type[T], *, on_progress: Callable[[float], None] = lambda _: None, stall_s: float = STALL_S
) -> T:
    """Run a job in a child process and wait for it.

    Raises:
        RecipeError: The job failed, with the library's reason; or it hung.
        BackendError: The library failed, or its process ended on the way (an abort, or killed for memory).
    """
    command = [sys.executable, "-P", "-m", "quantize.child"]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # The epitaph says why it is gone.
                process.stdin.write(msgspec.json.encode(job) + b"\n")
                process.stdin.flush()
            for line in _lines(process.stdout, stall_s):
                message: Message = msgspec.json.decode(line, type=Message)
                match message:
                    case Progress(share):
                        on_progress(share)
                    case Result(value):
                        return msgspec.json.decode(value, type=result)
                    case Failure(code, words, hint):
                        kind = BackendError if code == BackendError.code else RecipeError
                        raise kind(words, hint=hint)
            raise _epitaph(process, errors)
        finally:
            process.kill()
            process.wait(timeout=30)
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


def _perform(job: Job, on_progress: Callable[[float], None]) -> Any:
    # Imported here: the parent takes this module for the messages, and must not load the library.
    from . import evaluate
    from .gguf import llama

    match job:
        case QuantizeJob():
            return llama.quantize_file(
                Path(job.source),
                Path(job.target),
                ftype=job.ftype,
                num_threads=job.num_threads,
                on_progress=on_progress,
            )
        case QualityJob():
            return evaluate.measure_quality(
                Path(job.source),
                Path(job.model),
                text=job.text,
                num_tokens=job.num_tokens,
                num_threads=job.num_threads,
                on_progress=on_progress,
            )
        case SpeedJob():
            return evaluate.measure_speed(Path(job.model), text=job.text, num_threads=job.num_threads)
        case GoldenJob():
            return evaluate.measure_goldens(Path(job.model), text=job.text, num_threads=job.num_threads)
        case _:
            assert_never(job)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(3)


def main() -> int:
    """Read one job, do it, answer."""
    # Whatever the library prints goes to standard error; the answers have the pipe for themselves.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    job: Job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    told_at = 0.0

    def on_progress(share: float) -> None:
        nonlocal told_at
        now = time.monotonic()
        if now - told_at > 0.05 or share >= 1:
            told_at = now
            answers.write(msgspec.json.encode(Progress(share)) + b"\n")

    try:
        answer: Message = Result(msgspec.Raw(msgspec.json.encode(_perform(job, on_progress))))
    except EdgeError as e:
        answer = Failure(e.code, e.message, e.hint)
    answers.write(msgspec.json.encode(answer) + b"\n")
    return 0


if __name__ == "__main__":
    # Without the interpreter's own teardown, which may wait for the thread that reads standard input.
    code = main()
    sys.stderr.flush()
    os._exit(code)
