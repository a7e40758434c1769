"""Who may use the API over TCP."""

from __future__ import annotations

import pytest

from edge.errors import Forbidden
from runtime.api.guard import check_caller, host_of


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost", "LOCALHOST:1", "[::1]:8080", None])
@pytest.mark.parametrize("origin", [None, "http://localhost:3000", "https://127.0.0.1", "http://[::1]:80"])
def test_programs_and_pages_of_this_machine_pass(host: str | None, origin: str | None) -> None:
    check_caller(host=host, origin=origin, bound_to="127.0.0.1")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "", "192.168.1.2", "localhost.evil"])
def test_a_rebound_name_is_refused(host: str) -> None:
    with pytest.raises(Forbidden):
        check_caller(host=host, origin=None, bound_to="127.0.0.1")


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "file://", "", "http://localhost.evil.example", "http://[", "chrome://x"]
)
def test_a_page_from_elsewhere_is_refused(origin: str) -> None:
    with pytest.raises(Forbidden):
        check_caller(host="127.0.0.1", origin=origin, bound_to="127.0.0.1")


def test_the_host_is_what_stands_before_the_port() -> None:
    assert [host_of(h) for h in ("a:1", "A", "[::1]:2", "[::1]")] == ["a", "a", "::1", "::1"]
