"""`edge pull`, `list` and `show` of LoRA adapters, as people and scripts see them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge.cli.main import main
from edge.formats.gguf import read_gguf
from quantize.checkpoint import open_checkpoint
from quantize.gguf.convert import convert
from tests.adapters import make_lora
from tests.quantize.checkpoints import make_peft, make_smollm


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.setenv("EDGE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EDGE_SEED", str(tmp_path / "no-seed"))
    path = tmp_path / "tiny.gguf"
    convert(open_checkpoint(make_smollm(tmp_path / "checkpoint")), path, use_f16=False)
    run(capsys, "pull", str(path), "--name", "tiny")
    return path


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(args)
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_a_peft_directory_becomes_an_adapter(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = make_peft(tmp_path / "My_Lora")
    code, out, err = run(capsys, "pull", str(directory), "--base", "tiny")
    assert (code, out.split()[0]) == (0, "my-lora:latest")
    assert 'edge chat MODEL+my-lora "' in err
    code, out, _ = run(capsys, "show", "my-lora", "--json")
    shown = json.loads(out)
    tiny = json.loads(run(capsys, "show", "tiny", "--json")[1])
    assert shown["adapter"] == {"type": "lora", "rank": 4, "base": f"tiny:latest ({tiny['digest']})"}
    assert tiny["adapter"] is None
    assert (shown["architecture"], shown["source"]) == ("llama", str(directory))
    _, out, _ = run(capsys, "show", "my-lora")
    assert "lora, rank 4" in out
    assert "MODEL+my-lora" in out
    _, out, _ = run(capsys, "list")
    assert [line.split()[4:6] for line in out.splitlines() if line.startswith("my-lora")] == [["lora", "r4"]]


def test_a_gguf_becomes_an_adapter(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_for = {"general.base_model.0.name": "Tiny"}
    path = make_lora(tmp_path / "polite.gguf", read_gguf(base), seed=1, rank=8, keys=made_for)
    code, out, _ = run(capsys, "pull", str(path), "--name", "polite", "--json")
    assert code == 0
    assert json.loads(out)["adapter"] == {"type": "lora", "rank": 8, "base": "Tiny"}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "--base MODEL"),
        (("--base", "nobody"), "nobody"),
        (("--base", "tiny", "--dry-run"), "a directory that is converted"),
    ],
)
def test_what_is_missing_is_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], says: str
) -> None:
    code, _, err = run(capsys, "pull", str(make_peft(tmp_path / "lora")), *args)
    assert code != 0
    assert says in err


def test_an_adapter_is_not_quantized(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "pull", str(make_lora(tmp_path / "polite.gguf", read_gguf(base), seed=1)), "--name", "polite")
    code, _, err = run(capsys, "quantize", "polite", "--type", "Q8_0")
    assert code != 0
    assert "is an adapter" in err
