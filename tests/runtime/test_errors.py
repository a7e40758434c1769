"""Every error has a status and both shapes."""

from __future__ import annotations

from edge import errors
from edge.errors import EdgeError
from runtime.api.errors import STATUS, fault_of, status_of


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
