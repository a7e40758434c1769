"""`edge list`, `show`, `rm`: the store's models."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from edge.cli.main import settings_from
from edge.cli.notes import note
from edge.cli.options import complete_models, human_size, json_option, open_store, plain, store_option
from edge.cli.vouching import Vouching, read_sbom, vouching
from edge.store.details import QUANTIZED_FROM, short_count
from edge.store.drafts import draft_for
from edge.store.models import Collected, ModelStore, StoredModel
from runtime.state_dirs import remove_states


def print_json(value: object) -> None:
    """Print data for programs."""
    click.echo(msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2).decode())


def model_json(model: StoredModel) -> dict[str, object]:
    """What `edge show --json` prints of a model."""
    return {
        "ref": str(model.ref),
        "digest": str(model.digest),
        "size_bytes": model.size_bytes,
        "kind": model.kind,
        "capabilities": model.capabilities,
        "architecture": model.architecture,
        "quantization": model.quantization,
        "num_parameters": model.num_parameters,
        "context_tokens": model.context_tokens,
        "pooling": model.details.pooling,
        "adapter": model.details.adapter,
        "draft": model.details.draft,
        "license": model.license,
        "source": model.source,
        "made_from": model.manifest.annotations.get(QUANTIZED_FROM),
        "created": model.created,
        "annotations": model.manifest.annotations,
        "files": [
            {
                "name": file.name,
                "path": str(file.path),
                "digest": str(file.digest),
                "size_bytes": file.size_bytes,
                "media_type": file.media_type,
            }
            for file in model.files
        ],
        "report": model.report,
    }


@click.command("list")
@store_option
@json_option
def list_models(*, store_dir: Path | None, as_json: bool) -> None:
    """List the models in the store.

    \b
    Examples:
      edge list
      edge list --json | jq -r '.models[].ref'
    """
    store = open_store(store_dir)
    models, damaged = store.list(), store.damaged()
    if as_json:
        print_json(
            {
                "models": [model_json(model) for model in models],
                "damaged": [{"ref": str(bad.ref), "reason": bad.reason} for bad in damaged],
            }
        )
        return
    if models:
        _print_table(models)
    else:
        click.echo("No models yet. Get one with: edge pull smollm2:135m-instruct", err=True)
    for bad in damaged:
        click.echo(f"damaged: {bad.ref}: {bad.reason} Pull it again, or: edge rm {bad.ref}", err=True)


def _print_table(models: Sequence[StoredModel]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("NAME", "KIND", "SIZE", "TYPE", "PARAMETERS", "CONTEXT", "LICENCE", "ADDED"):
        table.add_column(title, justify="right" if title in ("SIZE", "PARAMETERS", "CONTEXT") else "left", no_wrap=True)
    for model in models:
        table.add_row(
            str(model.ref),
            model.kind,
            human_size(model.size_bytes),
            plain(_type(model)),
            "-" if model.num_parameters is None else short_count(model.num_parameters),
            "-" if model.context_tokens is None else f"{model.context_tokens:,}",
            plain(model.license or "-"),
            _date(model.created),
        )
    print_table(table)


def print_table(table: Table) -> None:
    """Print what may come from packages: what looks like markup is none."""
    # A pipe has no width; nothing may be cut off there.
    Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False).print(table)


def _type(model: StoredModel) -> str:
    """What a model is stored as; of an adapter ``lora r16``."""
    adapter = model.details.adapter
    return f"{adapter.type} r{adapter.rank or '?'}" if adapter else model.quantization or "-"


def _date(unix_time: float) -> str:
    return datetime.datetime.fromtimestamp(unix_time, datetime.UTC).astimezone().strftime("%Y-%m-%d %H:%M")


@click.command()
@click.argument("ref", required=False, shell_complete=complete_models)
@click.option("--unpin", is_flag=True, help="Let it go again when it is idle or room is needed.")
@store_option
@json_option
def pin(ref: str | None, *, unpin: bool, store_dir: Path | None, as_json: bool) -> None:
    """Keep a model in memory once it is loaded: not unloaded when idle, nor to make room for another.

    Holds for a running appliance at once, and after a restart. Without a model the pinned ones are listed.

    \b
    Examples:
      edge pin smollm2:135m-instruct
      edge pin smollm2:135m-instruct --unpin
    """
    store = open_store(store_dir)
    if ref is not None:
        found = store.pin(ref, is_pinned=not unpin)
        note("model.unpin" if unpin else "model.pin", str(found), store_dir=store_dir)
        click.echo(f"{found} is {'no longer pinned' if unpin else 'pinned'}", err=True)
    elif unpin:
        raise click.UsageError("Name the model: edge pin MODEL --unpin.")
    pinned = sorted(store.pins())
    if as_json:
        print_json({"pinned": pinned})
    elif ref is None:
        click.echo("\n".join(pinned)) if pinned else click.echo("no model is pinned", err=True)


@click.command()
@click.argument("ref", shell_complete=complete_models)
@click.option("--sbom", "as_sbom", is_flag=True, help="Print its bill of materials (CycloneDX), where one is attached.")
@store_option
@json_option
def show(ref: str, *, as_sbom: bool, store_dir: Path | None, as_json: bool) -> None:
    """Show one model: its files and where they lie, digests, origin, signature, quality report.

    \b
    Examples:
      edge show smollm2:135m-instruct
      edge show smollm2:135m-instruct --sbom > sbom.cdx.json
      llama-cli -m "$(edge show smollm2:135m-instruct --json | jq -r '.files[0].path')"
    """
    store = open_store(store_dir)
    model = store.get(ref)
    vouched = vouching(store, model, settings_from())
    if as_sbom:
        text = read_sbom(store, model, vouched)
        if not vouched.is_sbom_signed:
            click.echo("This bill of materials is not one that a trusted key signed.", err=True)
        click.echo(plain(text, keep="\n\t") if sys.stdout.isatty() else text, nl=False)
        return
    if as_json:
        print_json({**model_json(model), "signature": vouched})
        return
    facts = {
        "name": str(model.ref),
        "digest": str(model.digest),
        "architecture": model.architecture,
        "type": model.quantization,
        **_adapter_facts(model),
        "parameters": None if model.num_parameters is None else f"{model.num_parameters:,}",
        "context": None if model.context_tokens is None else f"{model.context_tokens:,} tokens",
        "makes": _made_by(model),
        "licence": model.license,
        **_origin(model),
        **({"sampling": _sampling(model)} if model.kind == "text" else {}),
        **_draft_facts(model, store),
        "signature": vouched.in_words,
        "materials": _materials(vouched),
        "added": _date(model.created),
        "size": human_size(model.size_bytes),
    }
    for name, value in facts.items():
        click.echo(f"{name:<13}{plain(value or 'unknown')}")
    for file in model.files:
        kind = plain(file.media_type)
        click.echo(f"\n{file.name} ({human_size(file.size_bytes)}, {kind})\n  {file.digest}\n  {file.path}")
    if model.report is not None:
        click.echo("\n" + plain("\n".join(_report_lines(model.report)), keep="\n"))


def _materials(vouched: Vouching) -> str:
    if not vouched.sbom:
        return (
            "no list (SBOM) is attached that was signed" if vouched.state == "trusted" else "no list (SBOM) is attached"
        )
    return "sbom.cdx.json, see --sbom" + ("" if vouched.is_sbom_signed else " (not signed by who is trusted)")


def _adapter_facts(model: StoredModel) -> dict[str, str | None]:
    if not (adapter := model.details.adapter):
        return {}
    name = str(model.ref).removesuffix(":latest")
    return {
        "adapter": f"{adapter.type}, rank {adapter.rank or 'unknown'}",
        "made for": adapter.base,
        "ask it with": f"MODEL+{name}",
    }


def _draft_facts(model: StoredModel, store: ModelStore) -> dict[str, str | None]:
    if (choice := draft_for(model, store)) is None:
        return {}
    return {"draft model": f"{choice.name} (not to be had: {choice.problem})" if choice.problem else choice.name}


def _origin(model: StoredModel) -> dict[str, str | None]:
    made_from = model.manifest.annotations.get(QUANTIZED_FROM)
    source = {"source": model.source} if model.source or not made_from else {}
    return {**source, **({"made from": made_from} if made_from else {})}


def _report_lines(report: dict[str, object]) -> list[str]:
    """The figures of a quality report that a person compares; `--json` has all of it."""
    from quantize.report import Report

    try:
        parsed = msgspec.convert(report, Report)
    except msgspec.ValidationError:
        return ["quality report of another version: see it with --json"]
    lines = [f"quality, against {parsed.source.label} ({parsed.source.precision})"]
    for v in parsed.variants:
        mark = "*" if v.type == parsed.subject else " "
        q = v.quality
        figures = (
            f"KL divergence {q.kld_mean.value:.4f} ±{q.kld_mean.error or 0:.4f}",
            f"same top token {100 * q.top1_agreement.value:.1f} %",
            f"perplexity x{q.perplexity_ratio.value:.3f}",
        )
        lines.append(f" {mark} {v.type:<8} {human_size(v.size_bytes):>9}  {'  '.join(figures)}")
    return lines + [f"   note: {note}" for note in parsed.notes]


def _made_by(model: StoredModel) -> str:
    """What the model answers with."""
    match model.kind:
        case "adapter":
            return "other answers of a model"
        case "text":
            return "text, also about images" if model.projector else "text"
        case "reranking":
            return "scores of pairs of texts (/v1/rerank)"
        case "embeddings":
            return f"embeddings, pooled by {model.details.pooling} (/v1/embeddings)"


def _sampling(model: StoredModel) -> str:
    """What the makers advise, or that they do not."""
    advised = msgspec.to_builtins(model.details.sampling)
    return ", ".join(f"{name} {value}" for name, value in advised.items()) or "no advice"


@click.command()
@click.argument("refs", nargs=-1, required=True, metavar="REF...", shell_complete=complete_models)
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@store_option
def rm(refs: Sequence[str], *, dry_run: bool, yes: bool, store_dir: Path | None) -> None:
    """Remove models from the store, with the prompts computed for them. Files that another model shares stay.

    \b
    Examples:
      edge rm smollm2:135m-instruct --dry-run
      edge rm smollm2:135m-instruct --yes
    """
    store = open_store(store_dir)
    found = list(dict.fromkeys(store.resolve(ref) for ref in refs))
    if dry_run:
        for ref in found:
            click.echo(f"would remove {ref}")
        return
    if not yes:
        ask_first(f"Remove {', '.join(map(str, found))}?")
    models = [model for model in store.list() if model.ref in found]
    for ref in found:
        store.remove(ref)
        note("model.delete", str(ref), store_dir=store_dir)
        click.echo(f"removed {ref}")
    _report_collected(store.collect())
    if store_dir is None:
        remove_states(settings_from().home, models, store)


def ask_first(question: str) -> None:
    """Ask, and end the command where the answer is no, or nobody is there to give one."""
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Nobody is at a terminal to answer, so nothing was done: give --yes.")
    click.confirm(question, abort=True, err=True)


def _report_collected(collected: Collected) -> None:
    click.echo(f"freed {human_size(collected.freed_bytes)}", err=True)
    for name in collected.blocked_by:
        click.echo(f"No file was removed, for '{name}' is damaged: pull it again or remove it.", err=True)
