"""What large requests leave behind in the front process."""

from __future__ import annotations

from pathlib import Path

import httpx
import psutil

from tests.chaos import CHAT, GRAMMAR_BOMBS, json_schema
from tests.support import chat_body, running_appliance

MOST_BYTES = 3 << 20
"""Twice what was seen; before large blocks went back to the kernel, and schemas were counted unread, it was 5.5 MiB."""


def ask(http: httpx.Client, **fields: object) -> None:
    assert http.post(CHAT, json=chat_body("Hi", model="none:x") | fields).status_code in (400, 404)


def test_large_bodies_leave_no_memory_taken(tmp_path: Path) -> None:
    with running_appliance(tmp_path / "home") as appliance, appliance.client() as http:
        front = psutil.Process(appliance.process.pid)
        for _ in range(100):
            ask(http)
        before = front.memory_info().rss
        for bomb in GRAMMAR_BOMBS * 3:
            ask(http, response_format=json_schema(bomb))
            ask(http, messages=[{"role": "user", "content": "Hi " * 200_000}])
        for _ in range(100):
            ask(http)
        assert front.memory_info().rss - before < MOST_BYTES
