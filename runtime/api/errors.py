"""The one place where errors become responses: OpenAI's error object under /v1, Anthropic's under /v1/messages,
Ollama's under /api, RFC 9457 elsewhere."""

from __future__ import annotations

import logging
import math
import secrets
from dataclasses import dataclass
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException
from litestar.status_codes import HTTP_500_INTERNAL_SERVER_ERROR

from edge import errors
from edge.errors import EdgeError
from runtime.api.responses import ClientClosed
from runtime.api.schema import OllamaError, Problem

log = logging.getLogger("edge.api")

# The status of each class of error; a subclass without a row has its nearest ancestor's.
STATUS: dict[type[EdgeError], int] = {
    EdgeError: 500,
    errors.InvalidRequest: 400,
    errors.ContextOverflow: 400,
    errors.AdapterMismatch: 400,
    errors.InvalidImage: 400,
    errors.VisionUnsupported: 400,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.KeyNotFound: 404,
    errors.RateLimited: 429,
    errors.AuditBroken: 500,
    errors.InvalidReference: 400,
    errors.ConfigError: 400,
    errors.RecipeError: 400,
    errors.UnsupportedFormat: 400,
    errors.InvalidModelFile: 422,
    errors.DigestMismatch: 422,
    errors.Untrusted: 403,
    errors.Unsigned: 403,
    errors.SignatureInvalid: 403,
    errors.SignatureMismatch: 403,
    errors.SignedForOtherName: 403,
    errors.KeyNotTrusted: 403,
    errors.KeyRevoked: 403,
    errors.ReleaseRevoked: 403,
    errors.ReleaseTooOld: 403,
    errors.ConstraintFailed: 422,
    errors.ModelNotFound: 404,
    errors.JobNotFound: 404,
    errors.ResponseNotFound: 404,
    errors.StoredFileNotFound: 404,
    errors.BatchNotFound: 404,
    errors.FileInUse: 409,
    errors.FileTooLarge: 413,
    errors.StorageFull: 507,
    errors.ModerationUnavailable: 501,
    errors.PinNotFound: 404,
    errors.SlotNotFound: 404,
    errors.SlotBusy: 409,
    errors.ActivationFailed: 422,
    errors.Cancelled: 409,
    ClientClosed: 499,
    errors.QueueFull: 429,
    errors.BackendError: 500,
    errors.WorkerDied: 500,
    errors.RequestPoisoned: 422,
    errors.DeadlineExceeded: 504,
    errors.SlowReader: 408,
    errors.MissingExtra: 501,
    errors.ToolMissing: 501,
    errors.SourceUnavailable: 502,
    errors.GatewayUnavailable: 502,
    errors.ModelLoading: 503,
    errors.ServerStopping: 503,
    errors.ClassifierBusy: 503,
    errors.ServerUnavailable: 503,
    errors.StoreError: 500,
    errors.NotRepaired: 500,
    errors.BlobNotFound: 404,
    errors.DiskFull: 507,
    errors.Quarantined: 503,
    errors.DoesNotFit: 507,
    errors.NoRoomToPin: 507,
}
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = _OPENAI_TYPES | {413: "request_too_large", 503: "overloaded_error", 504: "timeout_error"}
_REGISTRY_CODES = {
    "blob_unknown": "BLOB_UNKNOWN", "model_not_found": "MANIFEST_UNKNOWN", "invalid_reference": "NAME_INVALID",
    "not_found": "NAME_UNKNOWN",
}  # fmt: skip
_REGISTRY_STATUS = {401: "UNAUTHORIZED", 403: "DENIED", 405: "UNSUPPORTED", 429: "TOOMANYREQUESTS"}
_LLAMA_PATHS = frozenset({"/tokenize", "/detokenize", "/apply-template"})
"""llama-server's, whose errors are OpenAI's."""


class OpenAIErrorDetail(msgspec.Struct, kw_only=True):
    """What clients read of an error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class RegistryErrorDetail(msgspec.Struct, kw_only=True):
    """One error of a registry."""

    code: str
    message: str


class RegistryErrors(msgspec.Struct, kw_only=True):
    """A registry's error body (OCI distribution specification 1.1, "Error Codes")."""

    errors: list[RegistryErrorDetail]


class OpenAIError(msgspec.Struct, kw_only=True):
    """OpenAI's error body."""

    error: OpenAIErrorDetail


class AnthropicErrorDetail(msgspec.Struct, kw_only=True):
    """What clients read of an error."""

    type: str
    message: str


class AnthropicError(msgspec.Struct, kw_only=True):
    """Anthropic's error body."""

    type: str = "error"
    error: AnthropicErrorDetail
    request_id: str


@dataclass(frozen=True, slots=True)
class Fault:
    """An error as a response is made of it."""

    status: int
    code: str
    message: str
    hint: str | None = None
    field: str | None = None
    retry_after_s: float | None = None

    @property
    def _whole_message(self) -> str:
        """The hint is part of it, where clients show nothing else."""
        return f"{self.message} {self.hint}" if self.hint else self.message

    def openai(self) -> OpenAIError:
        """As OpenAI's error object."""
        kind = _OPENAI_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        detail = OpenAIErrorDetail(message=self._whole_message, type=kind, param=self.field, code=self.code)
        return OpenAIError(error=detail)

    def anthropic(self, request_id: str) -> AnthropicError:
        """As Anthropic's."""
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return AnthropicError(
            error=AnthropicErrorDetail(type=kind, message=self._whole_message), request_id=request_id
        )  # fmt: skip

    def ollama(self) -> OllamaError:
        """As Ollama's. Its clients look for "not found" before they offer to pull a model."""
        message = self._whole_message
        return OllamaError(error=f"model not found: {message}" if self.code == "model_not_found" else message)

    def registry(self) -> RegistryErrors:
        """As a registry's."""
        code = _REGISTRY_CODES.get(self.code) or _REGISTRY_STATUS.get(self.status, "UNKNOWN")
        return RegistryErrors(errors=[RegistryErrorDetail(code=code, message=self._whole_message)])

    def problem(self) -> Problem:
        """As RFC 9457 problem details."""
        title = self.code.replace("_", " ").capitalize()
        return Problem(
            type="about:blank", title=title, status=self.status, detail=self.message, code=self.code, hint=self.hint
        )


def status_of(error: EdgeError) -> int:
    """The HTTP status of an error."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def fault_of(error: Exception) -> Fault:
    """Facts of any exception; what is not ours shows nothing of its inside."""
    if isinstance(error, EdgeError):
        return Fault(
            status_of(error),
            error.code,
            error.message,
            error.hint,
            error.field if isinstance(error, errors.InvalidRequest) else None,
            getattr(error, "retry_after_s", None),
        )
    if isinstance(error, HTTPException):
        return _http_fault(error)
    return Fault(
        HTTP_500_INTERNAL_SERVER_ERROR, "internal_error", "The appliance failed at this request; its log says how."
    )


def _http_fault(error: HTTPException) -> Fault:
    codes = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
    hints = {
        404: "See /docs for what there is.",
        405: "See /docs for the methods of this path.",
        413: "Send less, or raise max_body_bytes.",
    }
    code = codes.get(error.status_code, "invalid_request")
    return Fault(error.status_code, code, f"{error.detail.rstrip('.')}.", hints.get(error.status_code))


PERMANENT = frozenset({409, 501, 507})
"""Statuses of what goes no better at the next try; clients try some of them again unless they are told."""
LONG_WAIT_S = 60.0
"""OpenAI's clients wait no longer for a `Retry-After`, and would try again at once."""


def _headers(fault: Fault) -> dict[str, str]:
    headers: dict[str, str] = {}
    if fault.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="slm-edge"'
    if fault.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(fault.retry_after_s)))
    is_permanent = fault.status in PERMANENT or fault.code == errors.RequestPoisoned.code
    if is_permanent or (fault.retry_after_s or 0) > LONG_WAIT_S:
        headers["x-should-retry"] = "false"
    return headers


def is_openai_path(path: str) -> bool:
    """Whether errors of this path are OpenAI's."""
    return path == "/v1" or path.startswith("/v1/") or path in _LLAMA_PATHS


def is_anthropic_path(path: str) -> bool:
    """Whether errors of this path are Anthropic's."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def request_id_of(token: str = "") -> str:
    """How Anthropic's clients know a request again: it stands in the header `request-id`, and in errors."""
    return f"req_{token or secrets.token_hex(12)}"


def is_registry_path(path: str) -> bool:
    """Whether errors of this path are a registry's."""
    return path == "/v2" or path.startswith("/v2/")


def is_ollama_path(path: str) -> bool:
    """Whether errors of this path are Ollama's."""
    return path == "/api" or path.startswith("/api/")


def written(fault: Fault, path: str, *, request_id: str = "") -> tuple[bytes, str]:
    """Body and media type of a fault, in the shape that the path's clients read."""
    if is_anthropic_path(path):
        return msgspec.json.encode(fault.anthropic(request_id or request_id_of())), "application/json"
    if is_openai_path(path):
        return msgspec.json.encode(fault.openai()), "application/json"
    if is_ollama_path(path):
        return msgspec.json.encode(fault.ollama()), "application/json"
    if is_registry_path(path):
        return msgspec.json.encode(fault.registry()), "application/json"
    return msgspec.json.encode(fault.problem()), "application/problem+json"


def to_response(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """The response to an error, in the shape that the path's clients read."""
    fault = fault_of(error)
    if fault.status >= 500:
        unexpected = not isinstance(error, EdgeError | HTTPException)
        log.error("%s %s: %s", request.method, request.url.path, error, exc_info=error if unexpected else None)
    headers = _headers(fault)
    if fault.status == 401 and is_registry_path(request.url.path):
        headers["WWW-Authenticate"] = 'Basic realm="slm-edge"'  # all that docker's and oras's know of a key's kind
    if is_anthropic_path(request.url.path):
        headers["request-id"] = request_id_of()
    body, media_type = written(fault, request.url.path, request_id=headers.get("request-id", ""))
    return Response(body, status_code=fault.status, media_type=media_type, headers=headers)
