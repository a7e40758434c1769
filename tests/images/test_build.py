"""Which commands a build runs, and what happens when one fails. A script stands in for buildah."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from edge.cli.main import cli
from edge.errors import RecipeError, ToolMissing
from edge.store.models import ModelStore
from images.build import (
    Base,
    Builder,
    Storage,
    bake_command,
    build_command,
    check_image_name,
    debian_base_name,
    project_root,
    read_layer_sizes,
)
from images.hostconfig import Mount
from images.target import Target, get_target
from tests.edge.store_support import add_model, write_gguf

ROOT = project_root()
CPU = get_target("cpu-x86_64")


def command_for(storage: Storage | None = None, *, no_cache: bool = False) -> list[str]:
    mounts = [Mount(Path("/in"), "/mnt")]
    return build_command(
        storage or Storage(), "cpu-x86_64", CPU, base="b:1", tag="t:1", context=ROOT, mounts=mounts, no_cache=no_cache
    )


def test_a_build_is_isolated_offline_and_keeps_the_health_check() -> None:
    command = command_for()
    assert command[:2] == ["buildah", "bud"]
    assert command[-1] == str(ROOT)
    joined = " ".join(command)
    for part in (
        "--isolation chroot",
        "--pull-never",
        "--format docker",
        "--layers",
        "--build-arg BASE=b:1",
        "--volume /in:/mnt:ro",
        f"--file {ROOT}/images/cpu-x86_64/Containerfile",
        "--tag t:1",
        "--label dev.slm-edge.target=cpu-x86_64",
    ):
        assert part in joined
    assert f"CMAKE_ARGS={' '.join(CPU.cmake_args)}" in command


def test_without_cache_no_layer_is_taken_from_before() -> None:
    command = command_for(no_cache=True)
    assert "--no-cache" in command
    assert "--layers" not in command


def test_a_storage_of_its_own_comes_before_the_subcommand(tmp_path: Path) -> None:
    command = command_for(Storage(tmp_path))
    assert command[1:6] == ["--root", f"{tmp_path}/storage", "--runroot", f"{tmp_path}/run", "--storage-driver=overlay"]
    assert command[6] == "bud"


def test_baking_starts_from_the_finished_image() -> None:
    command = bake_command(Storage(), image="t:1", tag="t:2", seed=Path("/seed"), model="smollm2:135m-instruct")
    assert "IMAGE=t:1" in command
    assert command[-1] == "/seed"
    assert "dev.slm-edge.model=smollm2:135m-instruct" in command


def test_another_script_or_suite_is_another_base() -> None:
    name = debian_base_name(CPU)
    assert name.startswith("localhost/slm-edge-base:bookworm-amd64-")
    assert debian_base_name(msgspec.structs.replace(CPU, suite="trixie")) != name


@pytest.mark.parametrize("name", ["", "--root=/", "UP:1", "a b", "a;b", "a" * 300])
def test_a_name_that_is_no_image_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="--tag"):
        check_image_name(name, what="--tag")


def test_a_directory_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="checkout"):
        project_root(tmp_path)


def write_script(directory: Path, body: str, *, name: str = "buildah") -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that goes first in PATH."""
    path = tmp_path / "tools"
    path.mkdir()
    monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")
    return path


def test_a_missing_tool_names_its_debian_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolMissing, match="apt-get install buildah"):
        Builder(Storage(), say=print).run("build", command_for())


def test_the_base_asked_for_is_taken_from_the_storage(tools: Path) -> None:
    write_script(tools, "exit 0")
    assert Builder(Storage(), say=print).choose_base(CPU, "corp/base:1") == Base("corp/base:1", None)
    own = debian_base_name(CPU)
    assert Builder(Storage(), say=print).choose_base(CPU, own) == Base(own, "bookworm")


def test_a_base_asked_for_that_is_nowhere_is_an_error(tools: Path) -> None:
    write_script(tools, "exit 1")
    with pytest.raises(RecipeError, match="--base debian"):
        Builder(Storage(), say=print).choose_base(CPU, "corp/base:1")


def test_out_of_reach_of_a_registry_the_base_is_made_from_packages(tools: Path) -> None:
    made = debian_base_name(CPU)
    write_script(tools, f'for last; do :; done; [ "$last" = "{made}" ]')
    said: list[str] = []
    assert Builder(Storage(), say=said.append).choose_base(CPU, None) == Base(made, "bookworm")
    assert any("out of reach" in line for line in said)


def test_a_failing_step_says_what_the_tool_said(tools: Path) -> None:
    write_script(tools, "echo STEP 1/2: FROM x; echo noise; echo 'disk is full' >&2; exit 7")
    said: list[str] = []
    with pytest.raises(RecipeError, match="exit code 7") as failed:
        Builder(Storage(), say=said.append).run("build", ["buildah", "bud"])
    assert "disk is full" in failed.value.message
    assert "STEP 1/2: FROM x" in said
    assert "noise" not in said


PLAYED = """
here=$(dirname "$0")
case "$*" in
  *"push --quiet"*) for last; do :; done; copy=${last#oci:}; cp -r "$here/layout" "${copy%:image}" ;;
  *"inspect --type image"*) cat "$here/inspected.json" ;;
  *bud*) echo "$@" > "$here/called" ;;
esac
"""


def play_a_build(tools: Path, *, layer_bytes: int) -> None:
    layout = tools / "layout"
    (layout / "blobs" / "sha256").mkdir(parents=True)
    (layout / "index.json").write_text(json.dumps({"manifests": [{"digest": "sha256:ab", "size": 2}]}))
    layers = [{"size": layer_bytes, "digest": "sha256:1"}, {"size": 5, "digest": "sha256:2"}]
    (layout / "blobs" / "sha256" / "ab").write_text(json.dumps({"layers": layers}))
    inspected = {"FromImageID": "f" * 64, "Manifest": json.dumps({"layers": [{"size": 300}, {"size": 30}]})}
    (tools / "inspected.json").write_text(json.dumps(inspected))
    write_script(tools, PLAYED)


def test_a_build_is_measured_and_held_against_its_budget(tools: Path) -> None:
    play_a_build(tools, layer_bytes=100)
    builder = Builder(Storage(), say=print)
    result = builder.build("cpu-x86_64", CPU, base=Base("b:1", None), tag="t:1", context=ROOT)
    assert (result.compressed_bytes, result.size_bytes, result.num_layers) == (105, 330, 2)
    assert set(result.seconds) == {"build", "measure"}
    tight: Target = msgspec.structs.replace(CPU, max_compressed_mb=1)
    (tools / "layout" / "blobs" / "sha256" / "ab").write_text(json.dumps({"layers": [{"size": 1_000_001}]}))
    with pytest.raises(RecipeError, match=r"1\.0 MB compressed; cpu-x86_64 allows 1 MB"):
        builder.build("cpu-x86_64", tight, base=Base("b:1", None), tag="t:1", context=ROOT)


def test_sizes_of_layers_are_read_from_a_layout(tools: Path) -> None:
    play_a_build(tools, layer_bytes=100)
    assert read_layer_sizes(tools / "layout") == [100, 5]


def test_the_command_prints_json_and_nothing_else_to_stdout(tools: Path) -> None:
    play_a_build(tools, layer_bytes=100)
    done = CliRunner().invoke(cli, ["image", "build", "cpu-x86_64", "--base", "corp/base:1", "--tag", "t:9", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["image"], result["base"], result["compressed_bytes"]) == ("t:9", "corp/base:1", 105)
    assert "--tag t:9" in (tools / "called").read_text()


def test_a_dry_run_runs_nothing(tools: Path, tmp_path: Path) -> None:
    write_script(tools, f'[ "$1" = inspect ] || touch {tools}/ran; exit 1')
    add_model(ModelStore(tmp_path / "home" / "store"), "tiny:f32", write_gguf(tmp_path / "tiny.gguf"))
    arguments = ["image", "build", "cpu-x86_64", "--base", "debian", "--model", "tiny:f32", "--dry-run"]
    environment = {"EDGE_HOME": str(tmp_path / "home"), "EDGE_SEED": str(tmp_path / "none")}
    done = CliRunner().invoke(cli, arguments, env=environment)
    assert done.exit_code == 0, done.output
    base, build, bake = done.stdout.splitlines()
    assert "base.sh bookworm amd64" in base
    assert build.startswith("buildah bud")
    assert "localhost/slm-edge:cpu-x86_64-tiny-f32" in bake
    planned = json.loads(CliRunner().invoke(cli, [*arguments, "--json"], env=environment).stdout)
    assert planned["commands"] == [shlex.split(line) for line in (base, build, bake)]
    assert (planned["target"], planned["model"]) == ("cpu-x86_64", "tiny:f32")
    assert not (tools / "ran").exists()


def test_the_list_shows_targets_without_any_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = CliRunner().invoke(cli, ["image", "list", "--json"])
    assert [row["target"] for row in json.loads(done.stdout)["targets"]] == ["cpu-x86_64"]
    assert "cpu-x86_64" in CliRunner().invoke(cli, ["image", "list"]).stdout


def test_a_model_that_is_not_there_is_found_out_before_the_build(tools: Path, tmp_path: Path) -> None:
    write_script(tools, f"touch {tools}/ran; exit 1")
    environment = {"EDGE_HOME": str(tmp_path / "home"), "EDGE_SEED": str(tmp_path / "none")}
    done = CliRunner().invoke(cli, ["image", "build", "cpu-x86_64", "--model", "absent:1"], env=environment)
    assert "absent:1" in str(done.exception)
    assert not (tools / "ran").exists()
