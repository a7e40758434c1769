"""The wire structs of files and batches, as OpenAI has them."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/moderations"]
"""What the lines of a batch may ask."""
BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
ObjectId = Annotated[str, msgspec.Meta(max_length=64)]
MetadataKey = Annotated[str, msgspec.Meta(max_length=64)]
MetadataValue = Annotated[str, msgspec.Meta(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], msgspec.Meta(max_length=16)]
ExpirySeconds = Annotated[int, msgspec.Meta(ge=3600, le=2_592_000)]


class ExpiresAfter(msgspec.Struct, kw_only=True):
    """When a file goes: this long after it was made."""

    anchor: Literal["created_at"]
    seconds: ExpirySeconds


class FileObject(msgspec.Struct, kw_only=True):
    """A file that somebody sent, or that a batch made."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    """Unix time, as all times here."""
    expires_at: int | None = None
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"


class FileList(msgspec.Struct, kw_only=True):
    """Some of the files of a key."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class FileDeleted(msgspec.Struct, kw_only=True):
    """A file that is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class BatchRequest(msgspec.Struct, kw_only=True):
    """`POST /v1/batches`."""

    input_file_id: ObjectId
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchError(msgspec.Struct, kw_only=True):
    """What is wrong with a batch, or with a line of its file."""

    code: str
    message: str
    line: int | None = None
    """From 1."""
    param: str | None = None


class BatchErrors(msgspec.Struct, kw_only=True):
    """Why a batch failed."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(msgspec.Struct, kw_only=True):
    """How far a batch is, in lines."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class InputDetails(msgspec.Struct, kw_only=True):
    """Where the tokens of prompts came from."""

    cached_tokens: int = 0


class OutputDetails(msgspec.Struct, kw_only=True):
    """What the tokens of answers were."""

    reasoning_tokens: int = 0


class BatchUsage(msgspec.Struct, kw_only=True):
    """Tokens of the lines that were answered, as each answer tells them."""

    input_tokens: int = 0
    input_tokens_details: InputDetails = msgspec.field(default_factory=InputDetails)
    output_tokens: int = 0
    output_tokens_details: OutputDetails = msgspec.field(default_factory=OutputDetails)
    total_tokens: int = 0


class Batch(msgspec.Struct, kw_only=True):
    """A file of requests, and how far it is."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: Endpoint
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: BatchStatus = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: BatchErrors | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = msgspec.field(default_factory=RequestCounts)
    usage: BatchUsage = msgspec.field(default_factory=BatchUsage)
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in ("completed", "failed", "expired", "cancelled")


class BatchList(msgspec.Struct, kw_only=True):
    """Some of the batches of a key, the newest first."""

    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False
