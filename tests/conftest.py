"""Rules that hold for every test."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")


def _allowed() -> set[str]:
    lines = ALLOWED_SKIPS.read_text("utf-8").splitlines()
    return {line.split("#")[0].strip() for line in lines} - {""}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In the gate a skip is a failure: the gate installs what tests need. `allowed_skips.txt` names the exceptions."""
    report = yield
    if report.skipped and os.environ.get("CI") and item.nodeid not in _allowed():
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped in the gate: {report.longrepr}"
    return report
