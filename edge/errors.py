"""The error tree: facts as attributes, a stable code, and what to do next. Nothing here knows about HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self


class EdgeError(Exception):
    """Base of every error a user may see.

    Attributes:
        code: Stable, machine-readable name of the kind of error.
        hint: What to do next, or None where the message already says it.
    """

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message

    def copy(self) -> Self:
        """The same error, to be raised: one that was raised keeps alive all that it passed, and more each time."""
        copy = type(self).__new__(type(self), *self.args)
        copy.__dict__.update(self.__dict__)
        copy.__cause__ = self.__cause__
        return copy


class ConfigError(EdgeError):
    """A setting that cannot be used."""

    code = "invalid_config"


class InvalidRequest(EdgeError):
    """A request that breaks the API's rules; `field` is the JSON path of what is wrong, where one is."""

    code = "invalid_request"

    def __init__(self, message: str, *, field: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.field = field


class ContextOverflow(InvalidRequest):
    """The prompt and the tokens asked for do not fit the context."""

    code = "context_length_exceeded"

    def __init__(
        self, *, limit_tokens: int, prompt_tokens: int, completion_tokens: int, field: str = "messages"
    ) -> None:
        requested = prompt_tokens + completion_tokens
        # The wording agents parse: OpenAI's own, as llama-cpp-python repeats it.
        super().__init__(
            f"This model's maximum context length is {limit_tokens} tokens. However, you requested {requested} "
            f"tokens ({prompt_tokens} in the {field}, {completion_tokens} in the completion). "
            f"Please reduce the length of the {field} or completion.",
            field=field,
        )
        self.limit_tokens = limit_tokens
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = completion_tokens

    @classmethod
    def of_text(cls, field: str, *, num_tokens: int, limit_tokens: int, can_cut: bool = True) -> Self:
        """One text of several is too long; none is read."""
        error = cls(limit_tokens=limit_tokens, prompt_tokens=num_tokens, completion_tokens=0)
        error.field = field
        limit = f"This model's maximum context length is {limit_tokens} tokens."
        error.message = f"{limit} However, '{field}' has {num_tokens} or more."
        error.hint = 'Part the text, or have its end cut off: "truncate": true.' if can_cut else "It is never cut."
        return error


class AdapterMismatch(InvalidRequest):
    """An adapter and a model that do not go together."""

    code = "adapter_mismatch"

    def __init__(self, adapter: str, model: str, reason: str) -> None:
        super().__init__(
            f"The adapter '{adapter}' does not fit the model '{model}': {reason}.",
            field="lora",
            hint="Use it with the model it was trained for: edge show names it, where the file does.",
        )
        self.adapter = adapter
        self.model = model
        self.reason = reason


class InvalidImage(InvalidRequest):
    """An image that is not read; `reason` says why, as the end of a sentence about it. `number` is its place among
    those of the request, from 1."""

    code = "invalid_image"

    def __init__(
        self, reason: str, *, number: int | None = None, field: str | None = None, hint: str | None = None
    ) -> None:
        name = "The image" if number is None else f"Image {number}"
        super().__init__(f"{name} cannot be read: {reason}.", field=field, hint=hint)
        self.reason = reason


class VisionUnsupported(InvalidRequest):
    """An image for a model that reads text only."""

    code = "vision_unsupported"

    def __init__(self, model: str, *, field: str, known: Sequence[str]) -> None:
        seeing = f"Models here that see: {', '.join(known)}. " if known else ""
        super().__init__(
            f"The model '{model}' reads no images: its package has no projector.",
            field=field,
            hint=f"{seeing}Where there is a projector for it, pull both: edge pull MODEL.gguf --projector MMPROJ.gguf.",
        )
        self.model = model


class Forbidden(EdgeError):
    """Somebody who may not do this."""

    code = "forbidden"


class Unauthorized(EdgeError):
    """Nobody, or somebody whose key is none."""

    code = "invalid_api_key"


class RateLimited(EdgeError):
    """A key has used up what it may use for now."""

    code = "rate_limit_exceeded"

    def __init__(self, what: str, *, retry_after_s: float) -> None:
        super().__init__(f"This key has used up its {what}.", hint=f"Try again in {retry_after_s:.0f} s.")
        self.what = what
        self.retry_after_s = retry_after_s


class KeyNotFound(EdgeError):
    """No API key has that name or id."""

    code = "key_not_found"

    def __init__(self, name: str, *, hint: str | None = None) -> None:
        super().__init__(f"There is no key {name[:100]!r}.", hint=hint or "See what keys there are: edge key list.")
        self.name = name


class AuditBroken(EdgeError):
    """The audit log is not what was written to it."""

    code = "audit_broken"

    def __init__(self, seq: int, what: str) -> None:
        super().__init__(
            f"The audit log is not as it was written: line {seq} {what}.",
            hint="Compare with a backup of state.db, and with the head in the telemetry of the time before.",
        )
        self.seq = seq


class InvalidReference(EdgeError):
    """A model name or source that cannot be parsed."""

    code = "invalid_reference"


class ModelNotFound(EdgeError):
    """No model of that name is in the store, or wherever else it was looked for."""

    code = "model_not_found"

    def __init__(
        self, ref: str, *, known: Sequence[str] = (), message: str | None = None, hint: str | None = None
    ) -> None:
        listed = ", ".join(known) if known else "none yet"
        super().__init__(
            message or f"The model '{ref}' is not in the store.",
            hint=hint or f"Models here: {listed}. Get one with: edge pull NAME.",
        )
        self.ref = ref
        self.known = tuple(known)


class ResponseNotFound(InvalidRequest):
    """No response of that id is kept for this key, or no item."""

    code = "response_not_found"

    def __init__(self, name: str, *, kind: str = "response", field: str | None = None) -> None:
        super().__init__(
            f"No {kind} '{name[:100]}' is stored.",
            field=field,
            hint="It was not to be stored, was deleted, is too old or made room for others; or it is another key's.",
        )
        self.name = name


class StoredFileNotFound(EdgeError):
    """No file of that id was sent or made for who asks."""

    code = "file_not_found"

    def __init__(self, file_id: str) -> None:
        super().__init__(f"There is no file {file_id[:64]!r}.", hint="GET /v1/files lists those that there are.")
        self.file_id = file_id


class FileTooLarge(EdgeError):
    """A file that is larger than files may be."""

    code = "file_too_large"

    def __init__(self, *, limit_bytes: int) -> None:
        super().__init__(
            f"The file is larger than {limit_bytes:,} bytes.", hint="Send it in parts, or raise max_file_bytes."
        )
        self.limit_bytes = limit_bytes


class FileInUse(EdgeError):
    """A file that a batch still reads."""

    code = "file_in_use"

    def __init__(self, file_id: str, *, batch: str) -> None:
        super().__init__(f"The file {file_id} is being read by the batch {batch}.", hint="Cancel the batch first.")
        self.file_id = file_id
        self.batch = batch


class StorageFull(EdgeError):
    """As many files as one may keep, or as large ones."""

    code = "storage_full"

    def __init__(self, *, num_files: int, max_files: int, size_bytes: int, max_bytes: int) -> None:
        super().__init__(
            f"There is no room for this file: {num_files:,} files of {size_bytes:,} bytes are kept, and "
            f"{max_files:,} of {max_bytes:,} bytes may be.",
            hint="Remove files that are not needed any more: DELETE /v1/files/ID.",
        )
        self.size_bytes = size_bytes
        self.max_bytes = max_bytes


class BatchNotFound(EdgeError):
    """No batch of that id belongs to who asks."""

    code = "batch_not_found"

    def __init__(self, batch_id: str) -> None:
        super().__init__(f"There is no batch {batch_id[:64]!r}.", hint="GET /v1/batches lists those that there are.")
        self.batch_id = batch_id


class ModerationUnavailable(EdgeError):
    """Nothing here judges texts."""

    code = "moderation_unavailable"


class ClassifierBusy(EdgeError):
    """What judges texts has too much to do, or does not answer."""

    code = "classifier_busy"

    def __init__(self, *, retry_after_s: float) -> None:
        super().__init__(
            "The classifier has not answered in time, or has too much to do.",
            hint=f"Try again in {retry_after_s:.0f} s.",
        )
        self.retry_after_s = retry_after_s


class JobNotFound(EdgeError):
    """No job of that id is known."""

    code = "job_not_found"


class InvalidModelFile(EdgeError):
    """A file that claims to be a model and breaks its format."""

    code = "invalid_model_file"

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(
            f"{what} is refused: {reason}.",
            hint="The file is damaged, cut short or not of this format; fetch it again from its source.",
        )
        self.what = what
        self.reason = reason


class UnsupportedFormat(EdgeError):
    """A format or model family that this version does not handle."""

    code = "unsupported_format"


class DigestMismatch(EdgeError):
    """Bytes that are not what their digest says."""

    code = "digest_mismatch"

    def __init__(self, what: str, *, expected: str, actual: str, hint: str | None = None) -> None:
        super().__init__(
            f"{what}: expected {expected}, got {actual}.",
            hint=hint or "The bytes were changed on the way or on the disk; fetch them again.",
        )
        self.expected = expected
        self.actual = actual


class Untrusted(EdgeError):
    """A model that the trust policy refuses. Each kind of reason is a class of its own."""

    code = "untrusted"

    def __init__(self, ref: str, reason: str, *, hint: str) -> None:
        super().__init__(f"The model '{ref[:240]}' is not trusted: {reason}.", hint=hint)
        self.ref = ref
        self.reason = reason


class Unsigned(Untrusted):
    """A model without any signature."""

    code = "unsigned"


class SignatureInvalid(Untrusted):
    """A signature that cannot be read, or that its key did not make."""

    code = "signature_invalid"


class SignatureMismatch(Untrusted):
    """A good signature of something else than what is there."""

    code = "signature_mismatch"


class SignedForOtherName(Untrusted):
    """A good signature of these bytes under another name."""

    code = "signed_for_other_name"


class KeyNotTrusted(Untrusted):
    """A signature by a key that nobody here trusts."""

    code = "key_not_trusted"


class KeyRevoked(Untrusted):
    """A signature by a key that is on the revocation list."""

    code = "key_revoked"


class ReleaseRevoked(Untrusted):
    """A signed release that is on the revocation list itself."""

    code = "release_revoked"


class ReleaseTooOld(Untrusted):
    """A good signature of a release that is older than one that proved itself here."""

    code = "release_too_old"

    def __init__(self, ref: str, *, release: int, least: int) -> None:
        super().__init__(
            ref,
            f"it is release {release}, and release {least} of it was confirmed here",
            hint="Older releases may have holes that newer ones mended. To go back all the same, run the command with "
            "--force.",
        )
        self.release = release
        self.least = least


class StoreError(EdgeError):
    """The store on disk cannot be read or written."""

    code = "store_error"


class DiskFull(StoreError):
    """Not enough room on the disk."""

    code = "disk_full"

    def __init__(self, *, required_bytes: int, available_bytes: int, promised_bytes: int = 0) -> None:
        beside = f" beside the {promised_bytes:,} that downloads under way still need" if promised_bytes else ""
        super().__init__(
            f"Not enough disk space: {required_bytes:,} bytes are needed, {available_bytes:,} are free{beside}.",
            hint="Remove a model with: edge rm NAME.",
        )
        self.required_bytes = required_bytes
        self.available_bytes = available_bytes
        self.promised_bytes = promised_bytes


class Quarantined(StoreError):
    """A model with a file that proved damaged."""

    code = "quarantined"

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(
            f"{what} is quarantined: {reason.rstrip('.')}.",
            hint="Mend it with: edge verify --repair; or pull the model again.",
        )
        self.reason = reason


class NotRepaired(StoreError):
    """A damaged file that could not be put right; `reason` says why, as the end of a sentence about it."""

    code = "not_repaired"

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(
            f"{what} cannot be repaired: {reason}.",
            hint="Name a place that has it: edge verify MODEL --repair --from SOURCE; or pull the model again.",
        )
        self.what = what
        self.reason = reason


class BlobNotFound(EdgeError):
    """No model that who asks may use has a file of that digest, or its bytes are damaged."""

    code = "blob_unknown"

    def __init__(self, digest: str) -> None:
        super().__init__(
            f"There is no blob {digest[:80]}.",
            hint="The manifest of a model names those that it has: /v2/NAME/manifests/TAG.",
        )
        self.digest = digest


class SourceUnavailable(EdgeError):
    """A place that models come from could not be reached or answered with an error."""

    code = "source_unavailable"


class Cancelled(EdgeError):
    """Long work that somebody stopped."""

    code = "cancelled"


class DoesNotFit(EdgeError):
    """A model needs more memory than there is. What is available is below 0 where more was promised already."""

    code = "does_not_fit"

    def __init__(self, what: str, *, required_bytes: int, available_bytes: int, fits: Sequence[str] = ()) -> None:
        options = "; ".join(fits) or "a smaller model or quantization"
        super().__init__(
            f"{what} needs {required_bytes / 2**20:,.0f} MiB of memory and {max(0, available_bytes) / 2**20:,.0f} MiB "
            f"are available.",
            hint=f"What would fit: {options}.",
        )
        self.missing_bytes = required_bytes - available_bytes


class QueueFull(EdgeError):
    """Too much is waiting already."""

    code = "queue_full"

    def __init__(self, *, retry_after_s: float) -> None:
        super().__init__("The queue is full.", hint=f"Try again in {retry_after_s:.0f} s.")
        self.retry_after_s = retry_after_s


class ModelLoading(EdgeError):
    """The model is being loaded and did not become ready in the time the request could wait."""

    code = "model_loading"

    def __init__(self, ref: str, *, retry_after_s: float) -> None:
        super().__init__(f"The model '{ref}' is still loading.", hint=f"Try again in {retry_after_s:.0f} s.")
        self.retry_after_s = retry_after_s


class NoRoomToPin(EdgeError):
    """A prefix that cannot be pinned beside the others, or not be written to the disk."""

    code = "no_room_to_pin"

    def __init__(self, *, num_tokens: int, required_bytes: int) -> None:
        super().__init__(
            f"A prefix of {num_tokens:,} tokens takes {required_bytes / 2**20:,.1f} MiB, for which there is no room: "
            "pins take at most half of what saved states may take, in memory and on the disk.",
            hint="Remove a pin: edge warm MODEL --remove NAME. Or raise state_bytes or state_disk_bytes.",
        )
        self.num_tokens = num_tokens
        self.required_bytes = required_bytes


class PinNotFound(EdgeError):
    """No prefix is pinned under that name."""

    code = "pin_not_found"

    def __init__(self, name: str, *, model: str) -> None:
        super().__init__(
            f"No prefix of '{model}' is pinned as '{name}'.", hint=f"See what is: edge warm {model} --list."
        )
        self.name = name
        self.model = model


class BackendError(EdgeError):
    """The inference library failed."""

    code = "backend_error"


class ConstraintFailed(EdgeError):
    """An answer cannot be brought to the form that was asked for; what was sent of it is not to be used."""

    code = "constraint_failed"


class WorkerDied(BackendError):
    """The engine process ended while it held this request."""

    code = "worker_died"

    def __init__(self, ref: str, *, reason: str, hint: str | None = None) -> None:
        super().__init__(
            f"The engine of '{ref}' ended in the middle of this request ({reason}).",
            hint=hint or "It is being restarted; send the request again.",
        )
        self.ref = ref
        self.reason = reason


class RequestPoisoned(EdgeError):
    """A request that ended the engine twice, the second time when it was alone there."""

    code = "request_poisoned"

    def __init__(self, request_id: str) -> None:
        super().__init__(
            "This request ended the engine twice, the second time alone, and is refused.",
            hint=f"It is kept for the operator: edge replay {request_id}; "
            f"allow it again with: edge replay {request_id} --remove.",
        )
        self.request_id = request_id


class DeadlineExceeded(EdgeError):
    """A request that had no whole answer in time."""

    code = "deadline_exceeded"

    def __init__(self, *, timeout_s: float) -> None:
        super().__init__(
            f"The answer was not complete after {timeout_s:g} s.",
            hint="Ask for fewer tokens, or allow more time with 'timeout_s' or the setting request_timeout_s.",
        )
        self.timeout_s = timeout_s


class SlowReader(EdgeError):
    """A client that reads its answer far more slowly than it is written."""

    code = "slow_reader"

    def __init__(self) -> None:
        super().__init__("The answer was ended: it is read too slowly.", hint="Read on, or ask for less.")


class ServerStopping(EdgeError):
    """The appliance is shutting down."""

    code = "server_stopping"
    retry_after_s = 5.0


class SlotNotFound(EdgeError):
    """No version is in a slot of that name."""

    code = "slot_not_found"

    def __init__(self, name: str, *, known: Sequence[str]) -> None:
        listed = f"Slots here: {', '.join(known)}." if known else "Fill one: edge activate MODEL --slot chat."
        super().__init__(f"There is no slot {name[:64]!r}.", hint=listed)
        self.name = name


class SlotBusy(EdgeError):
    """A slot that is being changed already, or whose version is needed by requests."""

    code = "slot_busy"


class ActivationFailed(EdgeError):
    """A version that did not prove itself; the one before it serves."""

    code = "activation_failed"

    def __init__(self, ref: str, slot: str, reason: str) -> None:
        super().__init__(
            f"'{ref}' was not activated as '{slot}': {reason}",
            hint="What served before serves on. See: edge slots.",
        )
        self.ref = ref
        self.reason = reason


class RecipeError(EdgeError):
    """A quantization that cannot be done as asked."""

    code = "invalid_recipe"


class GatewayUnavailable(EdgeError):
    """The telemetry gateway could not be reached or refused."""

    code = "gateway_unavailable"


class ServerUnavailable(EdgeError):
    """No appliance answers at that address."""

    code = "server_unavailable"


class MissingExtra(EdgeError):
    """A library of an optional part is not installed."""

    code = "missing_extra"

    def __init__(self, extra: str, *, needed_for: str) -> None:
        super().__init__(f"{needed_for} needs the extra '{extra}'.", hint=f"pip install 'slm-edge[{extra}]'")
        self.extra = extra


class ToolMissing(EdgeError):
    """A program of the operating system is not installed."""

    code = "tool_missing"


def root_cause(error: BaseException) -> str:
    """What the system itself said, below all that libraries made of it: ``Connection refused``.

    Where no system error is in the chain: the first line of the error's own text, or its name.
    """
    link: BaseException | None = error
    while link is not None:
        # The nearest: behind it the chain may go on to what was being handled when all this began.
        if isinstance(link, OSError) and (link.strerror or isinstance(link, TimeoutError)):
            return link.strerror or str(link) or "timed out"
        link = link.__cause__ or link.__context__
    return next(iter(str(error).splitlines()), "") or type(error).__name__
