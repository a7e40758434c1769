"""Every error has a status and both shapes."""

from __future__ import annotations

from typing import Any

from litestar import Request

from edge import errors
from edge.errors import EdgeError
from runtime.api.errors import STATUS, fault_of, status_of, to_response


def all_errors(kind: type[EdgeError] = EdgeError) -> set[type[EdgeError]]:
    return {kind}.union(*(all_errors(k) for k in kind.__subclasses__()))


def test_each_error_of_the_kernel_is_in_the_table() -> None:
    ours = {k for k in all_errors() if k.__module__ == errors.__name__}
    assert ours - set(STATUS) == set()


def test_codes_are_stable_names_of_their_own() -> None:
    codes = [k.code for k in STATUS]
    assert len(codes) == len(set(codes))
    assert all(c.replace("_", "").isalpha() and c.islower() for c in codes)


def test_what_is_not_ours_shows_nothing_of_its_inside() -> None:
    fault = fault_of(RuntimeError("secret path /etc/x"))
    assert fault.status == 500
    assert "secret" not in fault.openai().error.message


def test_hint_and_field_reach_the_client() -> None:
    fault = fault_of(errors.InvalidRequest("Wrong.", field="top_p", hint="Send less."))
    assert fault.openai().error.message == "Wrong. Send less."
    assert fault.openai().error.param == "top_p"
    assert fault.problem().status == status_of(errors.InvalidRequest("x")) == 400


def headers_of(error: EdgeError) -> dict[str, str]:
    scope: Any = {
        "type": "http", "path": "/v1/x", "method": "POST", "headers": [], "query_string": b"", "scheme": "http",
        "root_path": "", "server": ("x", 80),
    }  # fmt: skip
    request: Request[Any, Any, Any] = Request(scope)
    return {name.lower(): str(value) for name, value in to_response(request, error).headers.items()}


def test_clients_are_told_whether_and_when_to_try_again() -> None:
    for permanent in (
        errors.RequestPoisoned("a"), errors.DiskFull(required_bytes=2, available_bytes=1), errors.Cancelled("x"),
        errors.MissingExtra("onnx", needed_for="It"), errors.RateLimited("1 a day", retry_after_s=3000),
    ):  # fmt: skip
        assert headers_of(permanent)["x-should-retry"] == "false", permanent
    for passing in (
        errors.QueueFull(retry_after_s=5), errors.ServerStopping("x"), errors.ModelLoading("m", retry_after_s=5),
    ):  # fmt: skip
        assert headers_of(passing)["retry-after"] == "5"
        assert "x-should-retry" not in headers_of(passing)


def test_anthropics_clients_read_their_own_types() -> None:
    found = fault_of(errors.InvalidRequest("Wrong.", field="top_p", hint="Send less.")).anthropic("req_1")
    assert (found.type, found.request_id) == ("error", "req_1")
    assert (found.error.type, found.error.message) == ("invalid_request_error", "Wrong. Send less.")
    types = {status_of(e): fault_of(e).anthropic("").error.type for e in (
        errors.Unauthorized("x"), errors.Forbidden("x"), errors.ModelNotFound("x"), errors.QueueFull(retry_after_s=1),
        errors.ModelLoading("x", retry_after_s=1), errors.BackendError("x"), errors.DeadlineExceeded(timeout_s=1),
    )}  # fmt: skip
    assert types == {
        401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
        503: "overloaded_error", 500: "api_error", 504: "timeout_error",
    }  # fmt: skip
