"""`edge export`, `edge import`: models as one file, for places without a network."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click
from rich.table import Table

from edge.cli.main import settings_from
from edge.cli.models import ask_first, model_json, print_json, print_table
from edge.cli.notes import note
from edge.cli.options import complete_models, how_to_ask, human_size, json_option, open_store, plain, store_option
from edge.cli.pull import progress_on_stderr
from edge.config import Settings
from edge.errors import ConfigError, EdgeError, ReleaseTooOld
from edge.store.bundle import Bundle
from edge.store.digest import Digest
from edge.store.exporting import ExportPlan, plan_export
from edge.store.exporting import export as write_bundle
from edge.store.importing import ImportPlan, import_models, plan_import, put_documents
from edge.store.manifest import ModelRef
from edge.store.models import ModelStore, StoredModel
from edge.trust.keys import TrustFiles
from edge.trust.policy import Verdict, admit, insist, judge


@click.command("export")
@click.argument("refs", nargs=-1, required=True, metavar="MODEL...", shell_complete=complete_models)
@click.option(
    "-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The file to write."
)
@click.option(
    "--image", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
    help="A container image that travels too, as an OCI archive.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace a file that is there already.")
@click.option("--no-check", is_flag=True, help="Do not read the file back from the medium at the end.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@store_option
@json_option
def export(
    refs: Sequence[str],
    *,
    output: Path,
    image: Path | None,
    force: bool,
    no_check: bool,
    dry_run: bool,
    store_dir: Path | None,
    as_json: bool,
) -> None:
    """Write models into one file, with their reports, licences and signatures, for places without a network.

    The file is an OCI archive; skopeo and podman read it as oci-archive:FILE:NAME. What an interrupted export wrote is
    not written again, and at the end all of it is read back.

    \b
    Examples:
      edge export smollm2:135m-instruct -o /media/stick/models.tar
      edge export smollm2:135m-instruct minilm:l6-v2 -o models.tar --dry-run
      podman save --format oci-archive localhost/slm-edge:cpu-x86_64 -o appliance.tar
      edge export smollm2:135m-instruct --image appliance.tar -o stick.tar
    """
    if output.exists() and not force and not dry_run:
        raise click.UsageError(f"{output} is there already. To replace it: --force.")
    store = open_store(store_dir)
    with ExitStack() as stack:
        bundled = stack.enter_context(Bundle(image)) if image else None
        plan = plan_export(store, refs, output, image=bundled)
        if not dry_run:
            with progress_on_stderr() as report:
                write_bundle(store, plan, check=not no_check, progress=report)
    _show_export(plan, is_done=not dry_run, as_json=as_json)


def _show_export(plan: ExportPlan, *, is_done: bool, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "path": str(plan.path),
                "size_bytes": plan.size_bytes,
                "free_bytes": plan.free_bytes,
                "models": [{"ref": str(m.ref), "digest": m.digest, "size_bytes": m.size_bytes} for m in plan.models],
                "images": plan.images,
            }
        )
        return
    click.echo(f"{plan.path}  {human_size(plan.size_bytes)}{'' if is_done else ' would be written'}")
    for model in plan.models:
        click.echo(f"  {model.ref}  {human_size(model.size_bytes)}  {model.digest}")
    for name in plan.images:
        click.echo(f"  image {plain(name)}")
    if is_done:
        click.echo(f"On the device: edge import {plan.path.name}", err=True)


def complete_bundled(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Shell completion: the models of the bundle."""
    try:
        with Bundle(ctx.params["path"]) as bundle:
            return [str(model.ref) for model in bundle.models if str(model.ref or "").startswith(incomplete)]
    except (EdgeError, KeyError):
        return []  # a shell that completes has no place for an error


@click.command("import")
@click.argument("path", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("names", nargs=-1, metavar="[MODEL...]", shell_complete=complete_bundled)
@click.option("--name", "rename", metavar="NAME[:TAG]", help="What to call the model, where it is one.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="Take a release that is older than one that was confirmed here.")
@store_option
@json_option
def import_bundle(
    path: Path,
    names: Sequence[str],
    *,
    rename: str | None,
    dry_run: bool,
    yes: bool,
    force: bool,
    store_dir: Path | None,
    as_json: bool,
) -> None:
    """Take models from a file that `edge export` wrote, or skopeo (oci-archive), into the store. Needs no network.

    Shows first what it will do, and asks. Signatures are checked before anything is copied, every byte while it is;
    an interrupted import goes on where it stopped. A container image in the file stays there: podman reads it itself.

    \b
    Examples:
      edge import /media/stick/models.tar --dry-run
      edge import /media/stick/models.tar --yes
      edge import models.tar smollm2:135m-instruct     only this one
      podman pull oci-archive:/media/stick/models.tar:localhost/slm-edge:cpu-x86_64
    """
    settings = settings_from()
    store = open_store(store_dir, create=True)
    with Bundle(path) as bundle:
        plan = plan_import(store, bundle, names, rename=rename)
        verdicts = _verdicts(bundle, plan, settings)
        if dry_run or not as_json:
            _show_plan(bundle, plan, verdicts, as_json=as_json)
        if dry_run:
            return
        _refuse(verdicts, settings, force=force)
        if not yes:
            ask_first(f"Import {', '.join(str(planned.ref) for planned in plan.models)}?")
        imported: list[StoredModel] = []

        def admitted(store: ModelStore, digest: Digest, ref: ModelRef) -> object:
            return admit(store, digest, ref, settings, force=force)

        with progress_on_stderr() as report:
            for model in import_models(store, bundle, plan, admit=admitted, progress=report):
                if force:
                    insist(store, model.digest, model.ref, settings)
                note("model.import", f"{path.name} {model.ref}", store_dir=store_dir)
                imported.append(model)
    _show_imported(imported, as_json=as_json)


def _verdicts(bundle: Bundle, plan: ImportPlan, settings: Settings) -> Sequence[Verdict]:
    """What the signatures in the bundle are worth here. Nothing of it comes into the store."""
    if settings.trust == "off":
        return [Verdict("off", "the trust policy is off") for _ in plan.models]
    try:
        trust = TrustFiles.of(settings).load()
    except ConfigError as e:  # refused where the policy is enforced, and only there
        return [Verdict("untrusted", e.message, error=e) for _ in plan.models]
    with tempfile.TemporaryDirectory(prefix="slm-edge-import-") as directory:
        scratch = ModelStore(Path(directory))
        for planned in plan.models:
            put_documents(scratch, bundle, planned.model)
        return [judge(scratch, planned.model.digest, planned.ref, trust) for planned in plan.models]


def _refuse(verdicts: Sequence[Verdict], settings: Settings, *, force: bool) -> None:
    """Raise the first refusal, before anything is copied."""
    for error in (verdict.error for verdict in verdicts):
        if error and settings.trust == "enforce" and not (force and isinstance(error, ReleaseTooOld)):
            raise error


def _show_plan(bundle: Bundle, plan: ImportPlan, verdicts: Sequence[Verdict], *, as_json: bool) -> None:
    if as_json:
        print_json(_plan_json(bundle, plan, verdicts))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("NAME", "KIND", "SIZE", "LICENCE", "SIGNATURE", "IN THE STORE"):
        table.add_column(title, justify="right" if title == "SIZE" else "left")
    for planned, verdict in zip(plan.models, verdicts, strict=True):
        details = planned.model.details
        table.add_row(
            str(planned.ref),
            details.kind,
            human_size(planned.model.size_bytes),
            plain(details.license or "-"),
            plain(_signature(verdict)),
            "is there" if planned.is_present else "is replaced" if planned.before else "is new",
        )
    print_table(table)
    for image in bundle.images:
        name = plain(image.name)
        click.echo(
            f"container image {name or image.digest}, not imported: podman pull oci-archive:{bundle.path}:{name}"
        )
    click.echo(f"{human_size(plan.copied_bytes)} to copy, {human_size(plan.free_bytes)} free", err=True)


def _signature(verdict: Verdict) -> str:
    if verdict.state == "trusted":
        return f"{verdict.key_name or verdict.key_id}, release {verdict.release}"
    return verdict.reason


def _plan_json(bundle: Bundle, plan: ImportPlan, verdicts: Sequence[Verdict]) -> dict[str, object]:
    models = [
        {
            "ref": str(planned.ref),
            "digest": planned.model.digest,
            "kind": planned.model.details.kind,
            "size_bytes": planned.model.size_bytes,
            "copied_bytes": sum(blob.size for blob in planned.missing),
            "license": planned.model.details.license,
            "is_present": planned.is_present,
            "replaces": planned.before if planned.before != planned.model.digest else None,
            "attached": [found.referrer.kind for found in planned.model.attached],
            "trust": {
                "state": verdict.state,
                "reason": verdict.reason,
                "release": verdict.release,
                "key_id": verdict.key_id,
            },
        }
        for planned, verdict in zip(plan.models, verdicts, strict=True)
    ]
    return {
        "path": str(bundle.path),
        "models": models,
        "images": [{"name": i.name, "digest": i.digest, "size_bytes": i.size_bytes} for i in bundle.images],
        "copied_bytes": plan.copied_bytes,
        "free_bytes": plan.free_bytes,
    }


def _show_imported(models: Sequence[StoredModel], *, as_json: bool) -> None:
    if as_json:
        print_json({"models": [model_json(model) for model in models]})
        return
    for model in models:
        click.echo(f"{model.ref}  {human_size(model.size_bytes)}  {model.digest}")
    click.echo(f"Ask it: {how_to_ask(models[-1], prompt='Who are you?')}", err=True)
