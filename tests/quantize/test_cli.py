"""`edge quantize` from a shell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edge.cli.main import cli
from tests.quantize.checkpoints import make_smollm


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_smollm(tmp_path_factory.mktemp("cli") / "Tiny-SmolLM")


def edge(home: Path, *arguments: str) -> Result:
    env = {"EDGE_HOME": str(home), "EDGE_SEED": str(home / "no-seed"), "EDGE_THREADS": "1", "COLUMNS": "100"}
    return CliRunner().invoke(cli, ["quantize", *arguments], env=env)


def test_a_run_prints_table_and_places(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = edge(tmp_path, str(tiny), "--type", "Q8_0", "--type", "q4_0", "--tokens", "1024", "--out", str(out))
    assert done.exit_code == 0, done.output
    for words in ("PERPLEXITY", "KL MEAN", "SAME TOKEN", "source F32", "Q4_0 tensors: "):
        assert words in done.stdout
    assert "quantize to Q8_0 …" in done.stderr
    assert 'Ask it: edge chat tiny-smollm:q8_0 "Who are you?"' in done.stderr
    assert sorted(p.name for p in out.iterdir()) == [
        "quality.png", "quality.svg", "report.json", "tiny-smollm-Q4_0.gguf", "tiny-smollm-Q8_0.gguf",
    ]  # fmt: skip
    again = edge(tmp_path, str(tiny), "--type", "Q8_0", "--tokens", "1024", "--name", "tiny-smollm", "--json")
    table = json.loads(again.stdout)
    assert [model["ref"] for model in table["models"]] == ["tiny-smollm:q8_0"]
    assert table["report"]["variants"][0]["quality"]["num_tokens_scored"] == 510
    assert Path(table["files"]["report"]).parent == tmp_path / "reports" / "tiny-smollm"


def test_dry_run_says_what_would_be_done(tiny: Path, tmp_path: Path) -> None:
    done = edge(tmp_path, str(tiny), "--dry-run")
    assert done.exit_code == 0, done.output
    for words in ("convert to F32", "quantize to Q4_K_M", "package tiny-smollm:q8_0", "disk space"):
        assert words in done.stdout
    plan = json.loads(edge(tmp_path, str(tiny), "--dry-run", "--json").stdout)
    assert [step["kind"] for step in plan["steps"]].count("quality") == 2
    assert not any(step["is_done"] for step in plan["steps"])
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(("arguments", "words"), [
    (["--type", "Q9"], "Q8_0"),
    (["--type", "IQ1_S"], "importance matrix"),
    (["--name", "Not A Name"], "cannot name"),
    (["--precision", "f16", "--type", "Q8_0", "--tokens", "1", "--threads", "1", "--name", "-"], "cannot name"),
])  # fmt: skip
def test_what_cannot_be_done_is_said(arguments: list[str], words: str, tiny: Path, tmp_path: Path) -> None:
    done = edge(tmp_path, str(tiny), *arguments)
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.split())
    assert not (tmp_path / "store" / "index.json").exists()


def test_help_teaches(tmp_path: Path) -> None:
    assert "edge quantize smollm2:135m-instruct --type Q8_0 --type Q4_K_M" in edge(tmp_path, "--help").stdout
