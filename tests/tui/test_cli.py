"""`edge tui` before the terminal opens."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from edge.cli.tui import tui
from edge.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a terminal"),
        (["--url", "http://127.0.0.1:1", "--socket", "s"], "not both"),
        (["--url", "ftp://x"], "must be like http://HOST:PORT"),
    ],
)
def test_what_cannot_work_says_what_to_do(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(tui, arguments, env={"EDGE_HOME": str(tmp_path)})
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_help_teaches() -> None:
    result = CliRunner().invoke(tui, ["--help"])
    assert result.exit_code == 0
    for part in ("--readonly", "--socket", "Examples:", "edge tui --url"):
        assert part in result.output
