"""The files of a batch that ends: what was answered, and what was not."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge.config import Settings
from runtime.api.threads import until_stopped

from .answers import no_answer
from .ledger import read_answers
from .lines import unanswered
from .schema import Batch
from .store import BatchStore
from .uploads import Upload

Ending = Literal["completed", "expired", "cancelled", "failed"]
_WHY = {
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
    "cancelled": ("batch_cancelled", "The batch was cancelled before this request was executed."),
    "failed": ("storage_full", "The key had no room for more answers before this request was executed."),
}
_BUFFER_BYTES = 1 << 20
_NO_LIMIT = 1 << 60
"""What a batch was answered counted before; only the disk's reserve holds."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """Files that are whole and on the disk, and are nobody's yet."""

    answers: Upload | None
    errors: Upload | None
    num_unanswered: int

    def discard(self) -> None:
        """Remove them."""
        for upload in (self.answers, self.errors):
            if upload is not None:
                upload.discard()


def write_outputs(
    settings: Settings,
    batch: Batch,
    ending: Ending,
    answered: set[int],
    *,
    max_line_bytes: int,
    stop: threading.Event,
) -> Outputs:
    """Write the files of a batch whose lines get no more answers; on any thread, it takes as long as it takes.

    Raises:
        StoreError: The disk fails or has no room; then nothing is left behind.
        Stopped: `stop` was set meanwhile; likewise.
    """
    num_unanswered = 0

    def not_done() -> Generator[bytes]:
        nonlocal num_unanswered
        yield from read_answers(settings.batches_db, batch.id, is_error=True)
        path = settings.files_dir / batch.input_file_id
        for line in unanswered(path, batch.endpoint, answered, max_bytes=max_line_bytes):
            num_unanswered += 1
            code, message = _WHY[ending]
            yield no_answer(line, code=code, message=message).data

    good = read_answers(settings.batches_db, batch.id, is_error=False)
    answers = _written(settings.files_dir, until_stopped(good, stop))
    try:
        errors = _written(settings.files_dir, until_stopped(not_done(), stop))
    except BaseException:
        if answers is not None:
            answers.discard()
        raise
    return Outputs(answers, errors, num_unanswered)


def _written(directory: Path, lines: Iterable[bytes]) -> Upload | None:
    """A file of these lines, on the disk; None where there are none."""
    upload = Upload(directory, limit_bytes=_NO_LIMIT)
    try:
        held = bytearray()
        for line in lines:
            held += line + b"\n"
            if len(held) > _BUFFER_BYTES:
                upload.write(bytes(held))
                held.clear()
        upload.write(bytes(held))
        if upload.size_bytes:
            upload.keep()
            return upload
    except BaseException:
        upload.discard()
        raise
    upload.discard()
    return None


def finish(store: BatchStore, batch: Batch, key: str, outputs: Outputs, ending: Ending, *, now_s: float) -> None:
    """Make them the key's, and the batch what it ends as: both, or neither."""
    expiry = batch.output_expires_after
    expires_s = expiry.seconds if expiry is not None else None

    def made(upload: Upload | None, name: str) -> str | None:
        if upload is None:
            return None
        store.files.insert(
            key, upload, purpose="batch_output", name=f"{batch.id}_{name}.jsonl", now_s=now_s, expires_s=expires_s
        )
        return upload.id

    with store.transaction():
        store.batches.finish(
            batch.id, ending, output=made(outputs.answers, "output"), errors=made(outputs.errors, "errors"),
            num_unanswered=outputs.num_unanswered, now_s=now_s,
        )  # fmt: skip
