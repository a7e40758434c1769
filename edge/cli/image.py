"""``edge image``: container images, one per hardware target."""

from __future__ import annotations

import dataclasses
import json
import shlex
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from edge.errors import RecipeError
from images.build import Builder, BuildResult, BuiltImage, Storage, check_image_name, project_root
from images.seed import write_seed
from images.target import Target, get_target, load_targets

from .options import as_wrong_usage, complete_models, open_store

_STORAGE = click.option(
    "--storage-root",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory for buildah's images and layers. Default: where buildah and podman keep this user's anyway.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def _complete_targets(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in load_targets() if name.startswith(incomplete)]


@click.group()
def image() -> None:
    """Build a container image for a hardware target.

    The tools come from Debian: buildah runc mmdebstrap (to build), podman netavark iptables catatonit (to run); uidmap
    and fuse-overlayfs too when not run as root. See docs/targets.md.
    """


@image.command()
@click.argument("target", shell_complete=_complete_targets)
@click.option(
    "--model",
    metavar="REF",
    shell_complete=complete_models,
    help="Bake this model of the store in, as the seed of an empty one.",
)
@click.option("--tag", metavar="NAME", help="Name of the image. Default: localhost/slm-edge:TARGET[-MODEL].")
@click.option(
    "--base",
    metavar="IMAGE|debian",
    help="Base image; 'debian' makes one from Debian packages. Default: the target's, and if no registry is in reach "
    "the one from packages.",
)
@click.option(
    "--context", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Checkout to build from."
)
@click.option("--no-cache", is_flag=True, help="Build every layer anew, a base from Debian packages included.")
@click.option("--dry-run", is_flag=True, help="Print the commands and run none.")
@click.option("--verbose", "-v", is_flag=True, help="Show all that the tools say, not only their steps.")
@_STORAGE
@_JSON
def build(
    target: str,
    model: str | None,
    tag: str | None,
    base: str | None,
    context: Path | None,
    no_cache: bool,
    dry_run: bool,
    verbose: bool,
    storage_root: Path | None,
    as_json: bool,
) -> None:
    """Build the image of TARGET, measure it and hold it against its size budget.

    \b
    Examples:
      edge image build cpu-x86_64
      edge image build cpu-x86_64 --model smollm2:135m-instruct
      edge image build cpu-x86_64 --base debian --tag registry.plant.example/slm-edge:1

    The first build compiles the inference library and takes some minutes; later ones use its layer.
    """
    with as_wrong_usage(RecipeError):
        row = get_target(target)
        plain = check_image_name(tag if tag and not model else f"localhost/slm-edge:{target}", what="--tag")
        baked = check_image_name(tag or f"{plain}-{_as_tag(model)}", what="--tag") if model else None
    root = project_root(context)
    builder = Builder(Storage(storage_root), say=_say, verbose=verbose)
    if dry_run:
        known = str(open_store(None).resolve(model)) if model else None
        commands = builder.plan(target, row, base=base, tag=plain, baked=baked, model=known, context=root)
        _print_plan(commands, target=target, image=baked or plain, model=known, as_json=as_json)
        return
    with tempfile.TemporaryDirectory(prefix="slm-edge-seed-") as directory:
        # First, because a model that is not there should not be found out after minutes of building.
        full_name = write_seed(open_store(None), model, Path(directory)) if model else None
        chosen = builder.choose_base(row, base, fresh=no_cache)
        result = builder.build(target, row, base=chosen, tag=plain, context=root, no_cache=no_cache)
        if baked and full_name:
            image_id = builder.bake(image=plain, tag=baked, seed=Path(directory), model=full_name)
            result = dataclasses.replace(result, image=baked, image_id=image_id, model=full_name)
    _print_result(result, row, as_json=as_json)


@image.command("list")
@_STORAGE
@_JSON
def list_images(storage_root: Path | None, as_json: bool) -> None:
    """List the targets, and the images built for them on this machine.

    \b
    Example:
      edge image list --json
    """
    builder = Builder(Storage(storage_root), say=_say)
    built = builder.list_images() if builder.is_available() else []
    if as_json:
        rows = [{"target": name, **_row(row)} for name, row in load_targets().items()]
        click.echo(json.dumps({"targets": rows, "images": [dataclasses.asdict(found) for found in built]}))
        return
    console = Console()
    console.print(_target_table())
    console.print(_image_table(built) if built else "No image yet. Build one: edge image build TARGET")


def _say(line: str) -> None:
    click.echo(line, err=True)


def _as_tag(model: str | None) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in model or "")


def _row(row: Target) -> dict[str, object]:
    return {
        "summary": row.summary,
        "base": row.base,
        "architecture": row.architecture,
        "accelerator": row.accelerator,
        "smoke_model": row.smoke_model,
        "max_compressed_mb": row.max_compressed_mb,
    }


def _target_table() -> Table:
    table = Table("TARGET", "ARCH", "ACCELERATOR", "BUDGET", "FOR", box=None)
    for name, row in load_targets().items():
        table.add_row(name, row.architecture, row.accelerator, f"{row.max_compressed_mb} MB", row.summary)
    return table


def _image_table(built: list[BuiltImage]) -> Table:
    table = Table("IMAGE", "ID", "SIZE", box=None)
    for found in built:
        table.add_row(found.image, found.image_id[:12], f"{found.size_bytes / 1e6:.0f} MB")
    return table


def _print_plan(commands: list[list[str]], *, target: str, image: str, model: str | None, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"target": target, "image": image, "model": model, "commands": commands}))
        return
    for command in commands:
        click.echo(shlex.join(command))


def _print_result(result: BuildResult, row: Target, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result)))
        return
    click.echo(f"{result.image} ({result.image_id[:12]})")
    click.echo(f"  unpacked    {result.size_bytes / 1e6:7.1f} MB{' without the model' if result.model else ''}")
    click.echo(f"  compressed  {result.compressed_bytes / 1e6:7.1f} MB of {row.max_compressed_mb} MB allowed")
    click.echo(f"  took        {sum(result.seconds.values()):7.1f} s")
