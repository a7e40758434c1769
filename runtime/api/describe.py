"""What a route takes and gives beyond what its signature says. It stands beside the route, and `runtime.api.openapi`
writes the API's description from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edge import errors
from edge.errors import EdgeError

EVENTS = "text/event-stream"
Errors = tuple[type[EdgeError], ...]

ASKING: Errors = (
    errors.InvalidReference, errors.ModelNotFound, errors.AdapterMismatch, errors.ContextOverflow, errors.InvalidImage,
    errors.VisionUnsupported, errors.ConstraintFailed, errors.RequestPoisoned, errors.RateLimited, errors.QueueFull,
    errors.Cancelled, errors.BackendError, errors.WorkerDied, errors.ModelLoading, errors.ServerStopping,
    errors.DeadlineExceeded, errors.DoesNotFit, errors.MissingExtra, errors.InvalidModelFile, errors.UnsupportedFormat,
)  # fmt: skip
"""What can go wrong where a model answers."""
OPERATING: Errors = (
    errors.InvalidReference, errors.ModelNotFound, errors.AdapterMismatch, errors.UnsupportedFormat,
    errors.InvalidModelFile, errors.DigestMismatch, errors.Cancelled, errors.SourceUnavailable, errors.BackendError,
    errors.StoreError, errors.ModelLoading, errors.ServerStopping, errors.DeadlineExceeded, errors.DiskFull,
    errors.DoesNotFit, errors.MissingExtra,
)  # fmt: skip
"""What can go wrong where models come, go and are loaded."""
NAMING: Errors = (errors.InvalidReference, errors.ModelNotFound, errors.AdapterMismatch)
"""What can go wrong where a model is only named."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """What passes between a route and who asks it.

    Attributes:
        body: The struct that a JSON body is parsed into; None where none is read.
        sends: Media type of a body that is not JSON.
        streams: Media type of an answer that is sent as it comes to be, if there is one.
        also: Statuses beside the route's own that are no errors, or errors of another shape, and what their bodies are;
            None has none.
        errors: What can go wrong, beyond what follows from scope, body and parameters.
    """

    body: type | None = None
    sends: str = ""
    streams: str = ""
    also: Mapping[int, object] = field(default_factory=dict[int, object])
    errors: Errors = ()


def exchanges(
    body: type | None = None,
    *,
    sends: str = "",
    streams: str = "",
    also: Mapping[int, object] | None = None,
    errors: Errors = (),
) -> dict[str, Exchange]:
    """The `opt` of a route that takes and gives this; see :class:`Exchange`."""
    return {"exchange": Exchange(body, sends, streams, also or {}, errors)}
