"""`edge export` and `edge import` as people and scripts see them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from edge.cli.main import main
from edge.store.models import ModelStore
from edge.store.stored import PackageFile
from tests.edge.edge_command import edge_at
from tests.edge.store_support import add_model, write_gguf


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Appliance:
    """One appliance's command line, in this process."""

    home: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    environ: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def store(self) -> Path:
        return self.home / "store"

    def run(self, *args: str) -> Ran:
        for name, value in {"EDGE_HOME": str(self.home), "EDGE_SEED": "no-seed", **self.environ}.items():
            self.monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main(args)
        out, err = self.capsys.readouterr()
        return Ran(int(str(ended.value.code)), out, err)


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Appliance:
    """An appliance with two models."""
    edge = Appliance(tmp_path / "builder", monkeypatch, capsys)
    for name, fill in (("one:f32", b"\x01"), ("two:f32", b"\x02")):
        add_model(ModelStore(edge.store), name, write_gguf(tmp_path / f"{name[:3]}.gguf", fill=fill))
    return edge


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Appliance:
    """An appliance without models."""
    return Appliance(tmp_path / "device", monkeypatch, capsys)


def test_export_and_import(builder: Appliance, device: Appliance, tmp_path: Path) -> None:
    stick = tmp_path / "stick.tar"
    planned = builder.run("export", "one", "two", "-o", str(stick), "--dry-run")
    assert "would be written" in planned.stdout
    assert not stick.exists()
    written = builder.run("export", "one", "two", "-o", str(stick))
    assert (written.returncode, written.stdout.splitlines()[0].endswith("kB")) == (0, True), written.stderr
    assert "edge import stick.tar" in written.stderr
    again = builder.run("export", "one", "-o", str(stick))
    assert (again.returncode, "--force" in again.stderr) == (2, True)

    shown = device.run("import", str(stick), "--dry-run")
    assert shown.returncode == 0
    assert "one:f32  text" in shown.stdout
    assert "no signature" in shown.stdout
    assert shown.stdout.count("is new") == 2
    assert not device.home.exists()
    refused = device.run("import", str(stick))
    assert (refused.returncode, "--yes" in refused.stderr) == (2, True)
    done = device.run("import", str(stick), "--yes")
    assert done.returncode == 0, done.stderr
    assert [str(model.ref) for model in ModelStore(device.store).list()] == ["one:f32", "two:f32"]
    assert "edge serve" in done.stderr
    assert device.run("import", str(stick), "--dry-run").stdout.count("is there") == 2
    lines = json.loads(device.run("audit", "show", "--json").stdout)["lines"]
    assert [(line["act"], line["target"]) for line in lines] == [
        ("model.import", "stick.tar one:f32"),
        ("model.import", "stick.tar two:f32"),
    ]


def test_json(builder: Appliance, device: Appliance, tmp_path: Path) -> None:
    stick = str(tmp_path / "stick.tar")
    written = json.loads(builder.run("export", "one", "-o", stick, "--json").stdout)
    assert written["size_bytes"] == (tmp_path / "stick.tar").stat().st_size
    assert [model["ref"] for model in written["models"]] == ["one:f32"]
    [planned] = json.loads(device.run("import", stick, "--dry-run", "--json").stdout)["models"]
    assert (planned["ref"], planned["is_present"], planned["replaces"]) == ("one:f32", False, None)
    assert planned["trust"]["state"] == "unsigned"
    [model] = json.loads(device.run("import", stick, "--yes", "--json", "--name", "mine").stdout)["models"]
    assert (model["ref"], model["digest"]) == ("mine:latest", planned["digest"])


def test_unsigned_models_are_refused_where_the_policy_is_enforced(builder: Appliance, tmp_path: Path) -> None:
    stick, device = str(tmp_path / "stick.tar"), edge_at(tmp_path / "device", EDGE_TRUST="enforce")
    builder.run("export", "one", "-o", stick)
    refused = device.run("import", stick, "--yes")
    assert (refused.returncode, "it has no signature" in refused.stderr) == (1, True)
    assert ModelStore(device.store).list() == []
    shown = device.run("import", stick, "--dry-run")
    assert (shown.returncode, "it has no signature" in shown.stdout) == (0, True)


def test_what_cannot_be_used_is_told(builder: Appliance, device: Appliance, tmp_path: Path) -> None:
    (tmp_path / "no.tar").write_bytes(b"nothing" * 1000)
    for args, code, words in (
        (["import", str(tmp_path / "none.tar")], 4, "does not exist"),
        (["import", str(tmp_path / "no.tar")], 1, "no tar archive"),
        (["export", "three", "-o", "x.tar"], 3, "one:f32"),
        (["export", "one", "-o", str(tmp_path / "absent" / "x.tar")], 1, "absent"),
    ):
        ran = builder.run(*args)
        assert (ran.returncode, words in ran.stderr) == (code, True), ran.stderr


def test_what_a_package_says_of_itself_does_nothing_to_the_terminal(
    builder: Appliance, device: Appliance, tmp_path: Path
) -> None:
    store = ModelStore(builder.store)
    details = replace(store.get("one").details, license="[/red]:boom:\x1b[2J", architecture="\x1b]0;x\x07")
    store.add("one:f32", [PackageFile(tmp_path / "one.gguf", "one.gguf")], details)
    stick = str(tmp_path / "stick.tar")
    assert builder.run("export", "one", "-o", stick).returncode == 0
    for args in (["import", stick, "--dry-run"], ["import", stick, "--yes"], ["list"], ["show", "one"]):
        ran = device.run(*args)
        assert (ran.returncode, "[/red]:boom:" in ran.stdout, "\x1b" in ran.stdout) == (0, True, False), ran


def test_the_shell_completes_names(builder: Appliance, tmp_path: Path) -> None:
    stick = tmp_path / "stick.tar"
    builder.run("export", "one", "two", "-o", str(stick))
    for words, number, expected in (
        ("edge export o", "2", ["plain,one:f32"]),
        (f"edge import {stick} t", "3", ["plain,two:f32"]),
    ):
        environ = {"EDGE_SEED": "no-seed", "_EDGE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": number}
        assert edge_at(builder.home, **environ).run().stdout.split() == expected
