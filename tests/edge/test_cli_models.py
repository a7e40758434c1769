"""`edge pull`, `list`, `show`, `rm`, `verify` as people and scripts see them."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

from edge.cli.main import main
from edge.store.models import ModelStore, PackageFile
from tests.edge.edge_command import COMMAND, edge_at
from tests.edge.store_support import add_model, write_gguf


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EDGE_SEED", str(tmp_path / "no-seed"))
    return tmp_path / "home"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny-f32.gguf")


@pytest.fixture
def store(home: Path) -> ModelStore:
    return ModelStore(home / "store")


class Ran:
    """What a command did."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *args: str) -> None:
        with pytest.raises(SystemExit) as ended:
            main(args)
        self.code = ended.value.code
        self.out, self.err = capsys.readouterr()


def test_a_new_home_has_no_models_and_says_what_to_do(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "list")
    assert (ran.code, ran.out) == (0, "")
    assert "edge pull smollm2:135m-instruct" in ran.err
    assert json.loads(Ran(capsys, "list", "--json").out) == {"models": [], "damaged": []}
    assert not home.exists()


def test_pull_list_show_rm(store: ModelStore, gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pulled = Ran(capsys, "pull", str(gguf))
    assert pulled.code == 0
    assert pulled.out.startswith("tiny:f32  1.2 kB  sha256:")
    assert """/v1/completions -H 'Content-Type: application/json' -d '{"model": "tiny:f32", """ in pulled.err
    listed = Ran(capsys, "list")
    assert listed.out.split()[:8] == ["NAME", "KIND", "SIZE", "TYPE", "PARAMETERS", "CONTEXT", "LICENCE", "ADDED"]
    assert "tiny:f32" in listed.out
    shown = json.loads(Ran(capsys, "show", "tiny", "--json").out)
    [file] = shown["files"]
    assert Path(file["path"]).read_bytes() == gguf.read_bytes()
    assert file["digest"].endswith(Path(file["path"]).name)
    assert file["media_type"] == "application/vnd.cncf.model.weight.v1.raw"
    assert shown["annotations"]["dev.slm-edge.context-tokens"] == "128"
    assert shown["report"] is None
    assert shown.pop("signature")["state"] == "unsigned"
    assert json.loads(Ran(capsys, "list", "--json").out)["models"] == [shown]
    assert "architecture llama" in Ran(capsys, "show", "tiny").out
    assert "would remove tiny:f32" in Ran(capsys, "rm", "tiny", "--dry-run").out
    assert len(store.list()) == 1
    removed = Ran(capsys, "rm", "tiny:f32", "--yes")
    assert (removed.out, removed.code) == ("removed tiny:f32\n", 0)
    assert list(store.blobs.digests()) == []


def test_a_report_is_shown(store: ModelStore, gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = add_model(store, "tiny", gguf)
    report = gguf.with_name("report.json")
    report.write_text('{"perplexity": 23.5}')
    store.add("tiny", [PackageFile(gguf, "a.gguf"), PackageFile(report, "report.json")], model.details)
    assert json.loads(Ran(capsys, "show", "tiny", "--json").out)["report"] == {"perplexity": 23.5}
    assert "quality report of another version: see it with --json" in Ran(capsys, "show", "tiny").out


def test_what_is_not_there_exits_3(home: Path, gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Ran(capsys, "pull", str(gguf))
    for args in (["show", "other"], ["rm", "tiny:f32", "other"], ["verify", "other"]):
        ran = Ran(capsys, *args)
        assert (ran.code, ran.out) == (3, "")
        assert "tiny:f32" in ran.err
    assert len(ModelStore(home / "store").list()) == 1, "nothing is removed when one name is wrong"


def test_what_is_no_model_is_refused_with_the_reason(
    home: Path, gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf.write_bytes(gguf.read_bytes()[:-1])
    ran = Ran(capsys, "pull", str(gguf))
    assert ran.code == 1
    assert "tiny-f32.gguf is refused: it is cut short" in ran.err
    assert Ran(capsys, "list").out == ""
    assert home.exists()


def test_a_dry_run_pulls_nothing(home: Path, gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "pull", str(gguf), "--name", "a:b", "--dry-run")
    assert "tiny-f32.gguf (1.2 kB) would be fetched" in ran.out
    assert "a:b" in ran.out
    found = json.loads(Ran(capsys, "pull", "smollm2:135m-instruct", "--dry-run", "--json").out)
    assert (found["size_bytes"], found["license"], found["is_present"]) == (98_362_432, "Apache-2.0", False)
    assert not home.exists()


def test_verify_names_the_file_and_the_way_out(
    store: ModelStore, gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Ran(capsys, "pull", str(gguf))
    good = Ran(capsys, "verify")
    assert (good.code, good.out.split()[:2]) == (0, ["good", "tiny:f32"])
    model = store.get("tiny")
    data = bytearray(model.weights.read_bytes())
    data[-1] ^= 1
    model.weights.write_bytes(data)
    bad = Ran(capsys, "verify", "tiny")
    assert bad.code == 1
    for part in (str(model.weights), f"expected {model.files[0].digest}", f"edge pull '{gguf}' --name tiny:f32"):
        assert part in bad.out
    [found] = json.loads(Ran(capsys, "verify", "--json").out)
    assert not found["is_good"]
    assert [file["is_good"] for file in found["files"]] == [True, True, False]
    Ran(capsys, "pull", str(gguf), "--name", "tiny:f32")
    assert Ran(capsys, "verify").code == 0


def test_a_missing_file_is_listed_as_damage(store: ModelStore, gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Ran(capsys, "pull", str(gguf))
    store.get("tiny").weights.unlink()
    listed = Ran(capsys, "list")
    assert listed.out == ""
    assert "damaged: tiny:f32" in listed.err
    assert "the file is missing" in Ran(capsys, "verify").out
    shown = Ran(capsys, "show", "tiny")
    assert (shown.code, "is missing.\n  Pull the model again; edge verify" in shown.err) == (1, True)
    assert Ran(capsys, "rm", "tiny:f32", "--yes").code == 0


def test_another_store_by_name(home: Path, gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(tmp_path / "other")
    assert Ran(capsys, "pull", str(gguf), "--store", other).code == 0
    assert "tiny:f32" in Ran(capsys, "list", "--store", other).out
    assert Ran(capsys, "verify", "--store", other).code == 0
    assert not home.exists()


def test_an_empty_store_is_filled_from_the_seed(
    home: Path, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Ran(capsys, "pull", str(gguf), "--store", str(tmp_path / "seed"))
    monkeypatch.setenv("EDGE_SEED", str(tmp_path / "seed"))
    assert "tiny:f32" in Ran(capsys, "list").out
    assert Ran(capsys, "verify").code == 0
    assert home.exists()


def test_the_shell_completes_names(home: Path, gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Ran(capsys, "pull", str(gguf))
    for words, expected in (
        ("edge show ti", "plain,tiny:f32"),
        ("edge load ti", "plain,tiny:f32"),
        ("edge unload ti", "plain,tiny:f32"),
        ("edge image build c", "plain,cpu-x86_64"),
        ("edge image build cpu-x86_64 --model ti", "plain,tiny:f32"),
        ("edge pull smo", "file,smo plain,smollm2:135m-instruct"),
        ("edge pull ./ti", "file,./ti"),
        ("edge quantize ti", "file,ti plain,tiny:f32"),
        ("edge quantize ./ti", "file,./ti"),
    ):
        number = str(len(words.split()) - 1)
        ran = edge_at(home, _EDGE_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=number).run()
        assert ran.stdout.split() == expected.split(), words


def on_terminal(home: Path, *args: str, answer: bytes) -> tuple[int, str]:
    """Run `edge` with a terminal as its input, and answer what it asks."""
    primary, secondary = pty.openpty()
    environ = {**os.environ, "EDGE_HOME": str(home)}
    with subprocess.Popen([COMMAND, *args], env=environ, stdin=secondary, stdout=-1, stderr=-2, text=True) as process:
        os.close(secondary)
        os.write(primary, answer)
        output = process.communicate(timeout=30)[0]
    os.close(primary)
    return process.returncode, output


def test_without_a_terminal_rm_wants_yes(store: ModelStore, gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_model(store, "tiny", gguf)
    refused = Ran(capsys, "rm", "tiny")
    assert (refused.code, "--yes" in refused.err, len(store.list())) == (2, True, 1)
    assert Ran(capsys, "rm", "tiny", "-y").code == 0


def test_what_is_no_store_is_not_taken_for_an_empty_one(
    home: Path, gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent, other = str(tmp_path / "absent"), str(tmp_path)
    for args, words in (
        (["list", "--store", absent], "There is no store at"),
        (["list", "--store", other], "is not a store"),
        (["pull", str(gguf), "--store", other], "is not a store"),
    ):
        ran = Ran(capsys, *args)
        assert (ran.code, words in ran.err) == (2, True), ran.err
    (tmp_path / "begun" / "ingest").mkdir(parents=True)
    assert Ran(capsys, "list", "--store", str(tmp_path / "begun")).code == 0
    assert Ran(capsys, "pull", str(gguf), "--store", str(tmp_path / "begun")).code == 0
    assert not home.exists()


def test_wrong_words_have_the_exit_code_that_help_promises(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, code in (
        (["show", "SmolLM2:X"], 2),
        (["pull", "./m.gguf", "--sha256", "abc"], 2),
        (["pull", "ftp://host/m.gguf"], 2),
        (["image", "build", "nope"], 2),
        (["image", "build", "cpu-x86_64", "--tag", "NO"], 2),
        (["image", "build", "cpu-x86_64", "--model", "nope", "--dry-run"], 3),
        (["pull", "llama3"], 3),
        (["quantize", "nope"], 3),
    ):
        assert Ran(capsys, *args).code == code, args
    assert not home.exists()


def test_what_a_model_was_made_from_is_shown(store: ModelStore, gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    details = add_model(store, "tiny", gguf).details
    assert "source       unknown" in Ran(capsys, "show", "tiny").out
    notes = {"dev.slm-edge.quantized-from": "stories15M"}
    store.add("made", [PackageFile(gguf, "a.gguf")], dataclasses.replace(details, annotations=notes))
    shown = Ran(capsys, "show", "made").out
    assert "made from    stories15M" in shown
    assert "source" not in shown
    assert json.loads(Ran(capsys, "show", "made", "--json").out)["made_from"] == "stories15M"


def test_rm_asks_on_a_terminal(store: ModelStore, home: Path, gguf: Path) -> None:
    add_model(store, "tiny", gguf)
    code, output = on_terminal(home, "rm", "tiny", answer=b"n\n")
    assert (code, len(store.list())) == (130, 1)
    assert "Remove tiny:latest?" in output
    assert on_terminal(home, "rm", "tiny", answer=b"y\n")[0] == 0
    assert store.list() == []


def test_pins_are_kept_listed_and_go_with_their_model(
    store: ModelStore, gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_model(store, "one:f32", gguf)
    assert json.loads(Ran(capsys, "pin", "--json").out) == {"pinned": []}
    assert Ran(capsys, "pin", "one").code == 0
    assert Ran(capsys, "pin").out == "one:f32\n"
    assert Ran(capsys, "pin", "none").code == 3
    assert Ran(capsys, "pin", "--unpin").code == 2
    assert json.loads(Ran(capsys, "pin", "one", "--unpin", "--json").out) == {"pinned": []}
    store.pin("one")
    store.remove("one")
    assert store.pins() == frozenset()
    (store.root / "pins.json").write_bytes(b"{")
    assert store.pins() == frozenset()


def test_what_commands_change_in_the_appliances_store_is_in_the_audit_log(
    home: Path, gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for store in ([], ["--store", str(tmp_path / "other")]):
        assert Ran(capsys, "pull", str(gguf), *store).code == 0
        assert Ran(capsys, "pin", "tiny", *store).code == 0
        assert Ran(capsys, "rm", "tiny", "--yes", *store).code == 0
    lines = json.loads(Ran(capsys, "audit", "show", "--json").out)["lines"]
    acts = [(line["act"], line["target"]) for line in lines]
    assert acts == [("model.pull", f"{gguf} tiny:f32"), ("model.pin", "tiny:f32"), ("model.delete", "tiny:f32")]
    assert all(line["actor"].startswith("cli") for line in lines)
    assert Ran(capsys, "audit", "verify").code == 0


def test_draft_models_are_chosen_listed_and_go_with_their_model(
    store: ModelStore, gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def listed(*args: str) -> list[tuple[str, str | None]]:
        found = json.loads(Ran(capsys, "draft", *args, "--json").out)["drafts"]
        return [(d["model"], d["draft"]) for d in found]

    add_model(store, "one:f32", gguf)
    add_model(store, "two:f32", gguf)
    assert listed() == []
    assert listed("one", "two") == [("one:f32", "two:f32")]
    assert listed() == [("one:f32", "two:f32")]
    assert "draft model  two:f32" in Ran(capsys, "show", "one").out
    assert listed("one", "--off") == [("one:f32", None)]
    assert listed() == []
    assert Ran(capsys, "draft", "one", "none").code == 3
    assert Ran(capsys, "draft", "--off").code == 2
    assert Ran(capsys, "draft", "one", "two", "--reset").code == 2
    store.set_draft("one", "two")
    store.remove("two")
    assert "not to be had" in Ran(capsys, "show", "one").out
    store.remove("one")
    assert store.drafts() == {}
    (store.root / "drafts.json").write_bytes(b"[")
    assert store.drafts() == {}
