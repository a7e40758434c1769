"""Who may use the API over TCP."""

from __future__ import annotations

import pytest

from edge.errors import Forbidden
from runtime.api.guard import check_host, check_origin, host_of

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
LISTED = frozenset({"https://panel.example", "http://10.0.0.7:3000"})


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost", "LOCALHOST:1", "[::1]:8080", None])
def test_programs_of_this_machine_pass(host: str | None) -> None:
    check_host(host, allowed=LOCAL)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example:80", "", "192.168.1.2", "localhost.evil", "127.0.0.1, evil.example"],
)
def test_a_rebound_name_is_refused(host: str) -> None:
    with pytest.raises(Forbidden):
        check_host(host, allowed=LOCAL)


@pytest.mark.parametrize(
    "origin",
    [
        None, "http://localhost:3000", "https://127.0.0.1", "http://[::1]:80", "https://panel.example",
        "HTTPS://Panel.Example", "http://10.0.0.7:3000",
    ],
)  # fmt: skip
def test_pages_of_this_machine_and_listed_ones_pass(origin: str | None) -> None:
    check_origin(origin, hosts=LOCAL, listed_origins=LISTED)


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example", "null", "file://", "", "http://localhost.evil.example", "http://[", "chrome://x",
        "http://panel.example", "https://panel.example:8443", "https://panel.example.evil", "http://10.0.0.7",
        "https://panel.example, http://evil.example",
    ],
)  # fmt: skip
def test_a_page_from_elsewhere_is_refused(origin: str) -> None:
    with pytest.raises(Forbidden):
        check_origin(origin, hosts=LOCAL, listed_origins=LISTED)


def test_the_host_is_what_stands_before_the_port() -> None:
    assert [host_of(h) for h in ("a:1", "A", "[::1]:2", "[::1]")] == ["a", "a", "::1", "::1"]
