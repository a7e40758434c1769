"""`edge chat` from scripts: what it takes as the model, as the prompt, and from standard input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import RunningAppliance, edge_env

SHORT = ("--max-tokens", "4", "--temperature", "0")


def edge_chat(
    appliance: RunningAppliance, *args: str, stdin: int = subprocess.DEVNULL, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge.cli", "chat", *SHORT, *args]
    env = edge_env(appliance.home)
    if text is not None:
        return subprocess.run(command, env=env, input=text, capture_output=True, text=True, timeout=60, check=False)
    return subprocess.run(command, env=env, stdin=stdin, capture_output=True, text=True, timeout=60, check=False)


def test_a_model_may_come_first_also_without_its_tag(appliance: RunningAppliance) -> None:
    for name in ("smollm2:135m-instruct", "smollm2"):
        done = edge_chat(appliance, name, "Hello")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("args", [("qwen2:0.5b", "Say hi."), ("-m", "nope", "hi")])
def test_a_model_that_is_not_there_is_no_part_of_the_prompt(appliance: RunningAppliance, args: tuple[str, ...]) -> None:
    done = edge_chat(appliance, *args)
    assert done.returncode == 3
    assert "smollm2:135m-instruct" in done.stderr


def test_nothing_to_ask_is_wrong_usage(appliance: RunningAppliance) -> None:
    assert edge_chat(appliance).returncode == 2
    assert edge_chat(appliance, "").returncode == 2


def test_a_pipe_is_read_where_it_is_meant(appliance: RunningAppliance) -> None:
    assert edge_chat(appliance, text="Hello").stdout.strip()
    assert edge_chat(appliance, "Answer:", "-", text="Hello").stdout.strip()


def test_a_pipe_that_nobody_writes_into_is_left_alone(appliance: RunningAppliance) -> None:
    with subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE) as silent:
        assert silent.stdout is not None
        try:
            assert edge_chat(appliance, "Hello", stdin=silent.stdout.fileno()).returncode == 0
        finally:
            silent.kill()


def test_a_loop_over_a_file_keeps_its_lines(appliance: RunningAppliance, tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("One?\nTwo?\nThree?\n")
    script = (
        f'while read -r line; do "{sys.executable}" -m edge.cli chat --max-tokens 2 "$line" || exit 1; echo =; done'
    )
    with lines.open() as stdin:
        done = subprocess.run(
            ["sh", "-c", script], stdin=stdin, env=edge_env(appliance.home), capture_output=True, text=True, timeout=90,
            check=False,
        )  # fmt: skip
    assert done.stdout.count("=\n") == 3, done.stderr
