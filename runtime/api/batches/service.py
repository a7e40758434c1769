"""Files and batches of one appliance: what the routes act on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Generator

from litestar import Litestar
from litestar.datastructures import State

from edge.config import Settings
from edge.errors import DeadlineExceeded, EdgeError, FileTooLarge, InvalidRequest, QueueFull
from edge.hardware.memory import available_bytes, total_bytes
from runtime.api.access import Caller
from runtime.api.appliance import LOW_MEMORY_SHARE, Appliance
from runtime.api.call import HttpRequest

from .forms import FORM_BYTES, Form, read_form
from .gate import Gate, has_room
from .inside import Reply, post
from .runner import Runner
from .schema import Batch, BatchRequest, FileObject
from .store import StoreThread
from .uploads import RESERVE_BYTES, Upload

log = logging.getLogger("edge.batches")

HOUSE_INTERVAL_S = 60.0
WINDOW_S = 86_400
MAX_UPLOADS, MAX_UPLOADS_OF_KEY = 16, 2
_EXPIRY = "expires_after[seconds]"
_FIELDS = ("purpose", "expires_after[anchor]", _EXPIRY)


class BatchService:
    """Owned by the event loop."""

    def __init__(self, appliance: Appliance) -> None:
        self._appliance = appliance
        self._settings: Settings = appliance.settings
        self.store = StoreThread(appliance.settings)
        self._runner = Runner(appliance.settings, self.store, Gate(self._has_room), self._ask)
        self._app: Litestar | None = None
        self._house: asyncio.Task[None] | None = None
        self._uploads: Counter[str] = Counter()

    async def start(self, app: Litestar) -> None:
        """Go on with batches that are not over. The API may be used before.

        Args:
            app: What their lines are sent to.
        """
        self._app = app
        self._house = asyncio.create_task(self._keep_house(), name="batches")

    async def pause(self) -> None:
        """Give up what is under way of batches, and begin nothing more: the appliance ends."""
        await self._runner.close()

    async def close(self) -> None:
        """Close what is on the disk."""
        if self._house is not None:
            self._house.cancel()
            await asyncio.gather(self._house, return_exceptions=True)
        await self.pause()
        await self.store.close()

    async def _keep_house(self) -> None:
        is_resumed = False
        while True:
            try:
                if self.store.is_there:
                    if not is_resumed:
                        for batch_id, key in await self.store.run(lambda s: s.batches.unfinished()):
                            self._runner.add(batch_id, key)
                    while await self.store.run(lambda s: s.tidy()):
                        pass
                is_resumed = True
            except EdgeError as e:
                log.error("batches wait: %s", e)
            await asyncio.sleep(HOUSE_INTERVAL_S)

    def _has_room(self, own: int) -> bool:
        pool = self._appliance.pool
        return (
            not pool.is_crowded
            and has_room(
                own=own,
                active=sum(h.num_active for h in pool.hosts()),
                waiting=sum(beat.waiting for beat in pool.heartbeats()),
                slots=self._settings.max_sequences,
            )
            and available_bytes() > LOW_MEMORY_SHARE * total_bytes()
            and shutil.disk_usage(self._settings.home).free > RESERVE_BYTES
        )

    async def _ask(self, key_id: str, path: str, body: bytes) -> Reply:
        assert self._app is not None
        return await post(self._app, self._appliance.access.background_caller(key_id), path, body)

    # ------------------------------------------------------------------ files

    async def receive(self, http: HttpRequest, caller: Caller) -> FileObject:
        """Take an upload; when this returns it is on the disk.

        Raises:
            EdgeError: It is malformed, for another purpose, too large, or there is no room.
        """
        kind, options = http.content_type
        announced, limit_bytes = http.content_length or 0, self._settings.max_file_bytes
        if kind != "multipart/form-data":
            raise InvalidRequest("A file comes in a form.", hint="Send multipart/form-data with 'purpose' and 'file'.")
        if announced > limit_bytes + FORM_BYTES:
            raise FileTooLarge(limit_bytes=limit_bytes)
        with self._one_more_upload(caller.id):
            await self.store.run(lambda s: s.files.check_room(caller.id, announced))
            upload = await asyncio.to_thread(Upload, self._settings.files_dir, limit_bytes=limit_bytes)
            try:
                form = await self._read(http, options.get("boundary", ""), upload)
                return await self._kept(caller.id, upload, form)
            except Exception:
                await asyncio.to_thread(upload.discard)
                raise

    @contextlib.contextmanager
    def _one_more_upload(self, key: str) -> Generator[None]:
        if self._uploads.total() >= MAX_UPLOADS or self._uploads[key] >= MAX_UPLOADS_OF_KEY:
            raise QueueFull(retry_after_s=5)
        self._uploads[key] += 1
        try:
            yield
        finally:
            self._uploads[key] -= 1

    async def _read(self, http: HttpRequest, boundary: str, upload: Upload) -> Form:
        timeout_s = self._settings.request_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await read_form(
                    http.receive, boundary, upload, limit_bytes=self._settings.max_file_bytes, check=_check_field
                )
        except TimeoutError as e:
            raise DeadlineExceeded(timeout_s=timeout_s) from e

    async def _kept(self, key: str, upload: Upload, form: Form) -> FileObject:
        if form.filename is None or "purpose" not in form.fields:
            missing = "file" if form.filename is None else "purpose"
            raise InvalidRequest(f"The form has no '{missing}'.", field=missing)
        if not upload.size_bytes:
            raise InvalidRequest("The file is empty.", field="file")
        name, expiry = form.filename, form.fields.get(_EXPIRY)
        expires_s = float(expiry) if expiry else None
        await asyncio.to_thread(upload.keep)
        return await self.store.run(
            lambda s: s.files.add(key, upload, name=name, now_s=time.time(), expires_s=expires_s)
        )

    # ------------------------------------------------------------------ batches

    async def create(self, caller: Caller, body: BatchRequest) -> Batch:
        """Begin a batch.

        Raises:
            StoredFileNotFound: The key has no such file.
            InvalidRequest: The file is not for a batch.
            QueueFull: The key has enough of them.
        """
        now_s = time.time()
        batch = Batch(
            id=f"batch_{secrets.token_hex(12)}", endpoint=body.endpoint, input_file_id=body.input_file_id,
            created_at=int(now_s), expires_at=int(now_s) + WINDOW_S, metadata=body.metadata,
            output_expires_after=body.output_expires_after,
        )  # fmt: skip

        await self.store.run(lambda s: s.create_batch(caller.id, batch))
        self._runner.add(batch.id, caller.id)
        return batch

    async def cancel(self, caller: Caller, batch_id: str) -> Batch:
        """Have a batch end with what it has.

        Raises:
            BatchNotFound: The key has no such batch.
            InvalidRequest: It is over.
        """
        batch = await self.store.run(lambda s: s.batches.cancel(caller.id, batch_id, now_s=time.time()))
        self._runner.stop(batch_id)
        return batch


def _check_field(name: str, value: str) -> None:
    if name not in _FIELDS:
        raise InvalidRequest(f"'{name[:64]}' is no field of an upload.", field=name[:64], hint="Leave it out.")
    if name == "purpose" and value != "batch":
        raise InvalidRequest(
            f"Files of purpose {value[:40]!r} are not supported by this version.", field=name, hint="Send 'batch'."
        )
    if name == "expires_after[anchor]" and value != "created_at":
        raise InvalidRequest(f"The anchor is 'created_at', not {value[:40]!r}.", field="expires_after.anchor")
    if name == _EXPIRY and not (value.isascii() and value.isdecimal() and 3600 <= int(value[:9]) <= 2_592_000):
        raise InvalidRequest("A file expires after 3,600 to 2,592,000 seconds.", field="expires_after.seconds")


def batches_of(state: State) -> BatchService:
    """Files and batches of an application."""
    service: BatchService = state.batches
    return service
