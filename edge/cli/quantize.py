"""`edge quantize`: a checkpoint or a GGUF into measured, packaged models."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from edge.cli.main import settings_from
from edge.cli.models import print_json
from edge.cli.options import as_wrong_usage, complete_models_and_files, how_to_ask, human_size, json_option
from edge.errors import RecipeError
from edge.store.manifest import ModelRef
from edge.store.models import ModelStore

if TYPE_CHECKING:
    from quantize.evaluate import Estimate
    from quantize.pipeline import Event, Outcome, Plan, Workshop
    from quantize.report import Report, Variant


def _complete_types(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    from quantize.recipe import usable_types

    return [name for name in usable_types() if name.startswith(incomplete.upper())]


@click.command()
@click.argument("source", shell_complete=complete_models_and_files)
@click.option("--type", "types", multiple=True, metavar="TYPE", shell_complete=_complete_types,
              help="A type, as Q8_0; may be given several times. [default: Q8_0, Q4_K_M]")  # fmt: skip
@click.option("--name", metavar="NAME", help="Packages become NAME:type; by default made of the source's name.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Also write the GGUF files, the report and the plot there.")  # fmt: skip
@click.option("--precision", type=click.Choice(["auto", "f16", "f32"]), default="auto", show_default=True,
              help="Of the GGUF made from a checkpoint; auto loses nothing.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(min=1), metavar="N",
              help="Tokens to judge on: more is slower and surer. [default: 4096]")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="[default: every core]")
@click.option(
    "--draft", metavar="MODEL", help="A much smaller model that shall guess for the packages: see edge draft."
)
@click.option("--force", is_flag=True, help="Replace packages of the same name, and do every step again.")
@click.option("--dry-run", is_flag=True, help="Print the steps and the disk space they take, and do nothing.")
@json_option
def quantize(
    source: str,
    *,
    types: tuple[str, ...],
    name: str | None,
    out: Path | None,
    precision: str,
    tokens: int | None,
    threads: int | None,
    draft: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Quantize SOURCE, measure what that cost, and put the results into the store.

    SOURCE is a GGUF file, a Hugging Face checkpoint directory (Llama family, safetensors) or a model of the store.
    Each result is compared with the source on a public-domain text: perplexity, KL divergence, how often both choose
    the same token, size, speed. A run that was killed goes on where it was.

    \b
    Examples:
      edge quantize smollm2:135m-instruct --type Q8_0 --type Q4_K_M
      edge quantize ./SmolLM2-360M-Instruct --type Q4_0 --name smollm2-360m
      edge quantize ./model-f16.gguf --type IQ4_XS --out ./built --json
      edge quantize ./model-f16.gguf --dry-run
    """
    from quantize.pipeline import plan, run
    from quantize.recipe import DEFAULT_TOKENS, Recipe, parse_types
    from quantize.source import open_source

    settings = settings_from()
    shop = _workshop(settings.home, ModelStore(settings.store_dir, seed=settings.seed))
    found = open_source(source, shop.store)
    with as_wrong_usage(RecipeError):
        recipe = Recipe(
            name=name or found.name,
            types=parse_types(types or ("Q8_0", "Q4_K_M")),
            precision="f16" if precision == "f16" else "f32" if precision == "f32" else "auto",
            num_tokens=tokens or DEFAULT_TOKENS,
            num_threads=threads or settings.threads or len(os.sched_getaffinity(0)),
            draft=None if draft is None else str(ModelRef.parse(draft)),
        )
    with _progress() as show:
        planned = plan(found, recipe, shop, force=force)
        if dry_run:
            _print_plan(planned, as_json=as_json)
            return
        outcome = run(planned, _watched(shop, show))
    places = _write_files(outcome, out or settings.home / "reports" / recipe.name, with_models=out is not None)
    _print_outcome(outcome, places, as_json=as_json)


def _workshop(home: Path, store: ModelStore) -> Workshop:
    from quantize.cache import StepCache
    from quantize.pipeline import Workshop

    return Workshop(StepCache(home / "work" / "quantize"), store)


def _watched(shop: Workshop, on_event: Callable[[Event], None]) -> Workshop:
    from dataclasses import replace

    return replace(shop, on_event=on_event)


@contextmanager
def _progress() -> Generator[Callable[[Event], None]]:
    """Shows each step: a bar on a terminal, else a line when one starts."""
    if not sys.stderr.isatty():
        yield _say
        return
    columns = (TextColumn("{task.description:<22}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(event: Event) -> None:
            if event.step.key not in tasks:
                tasks[event.step.key] = bars.add_task(event.step.label, total=1.0)
            note = f"{event.step.label} (kept)" if event.moment == "cached" else event.step.label
            bars.update(tasks[event.step.key], completed=event.share, description=note)

        yield show


def _say(event: Event) -> None:
    if event.moment in ("started", "cached"):
        click.echo(event.step.label + (": done before" if event.moment == "cached" else " …"), err=True)


def _print_plan(planned: Plan, *, as_json: bool) -> None:
    if as_json:
        steps = [{"kind": s.kind, "label": s.label, "key": s.key, "is_done": s.is_done} for s in planned.steps]
        refs = [{"ref": str(v.ref), "is_packaged": v.stored is not None} for v in planned.variants]
        print_json(
            {
                "source": planned.source.label,
                "digest": planned.digest,
                "steps": steps,
                "packages": refs,
                "required_bytes": planned.required_bytes,
            }
        )
        return
    for step in planned.steps:
        click.echo(f"{step.label}{' (done before)' if step.is_done else ''}")
    for variant in planned.variants:
        click.echo(f"package {variant.ref}{' (there already)' if variant.stored else ''}")
    click.echo(f"takes at most {human_size(planned.required_bytes)} of disk space")


def _write_files(outcome: Outcome, directory: Path, *, with_models: bool) -> dict[str, str]:
    """Write report and plot, and the models where asked; what each file is -> its path.

    Raises:
        RecipeError: The directory cannot be written.
    """
    contents = {"report": ("report.json", outcome.report.encode()), "plot": ("quality.svg", outcome.svg)}
    contents["plot_png"] = ("quality.png", outcome.png)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in contents.values():
            (directory / name).write_bytes(data)
        for model in outcome.models if with_models else ():
            target = directory / f"{model.ref.name}-{model.ref.tag.upper()}.gguf"
            # A copy, never a link: whoever edits the file must not edit the store.
            shutil.copyfile(model.weights, target.with_suffix(".partial"))
            target.with_suffix(".partial").replace(target)
    except OSError as e:
        raise RecipeError(
            f"{directory} cannot be written: {e.strerror}.", hint="The packages are in the store; see edge list."
        ) from e
    return {kind: str(directory / name) for kind, (name, _) in contents.items()}


def _print_outcome(outcome: Outcome, places: dict[str, str], *, as_json: bool) -> None:
    if as_json:
        models = [{"ref": str(m.ref), "digest": m.digest, "path": str(m.weights)} for m in outcome.models]
        print_json({"models": models, "files": places, "report": outcome.report})
        return
    Console(width=None if sys.stdout.isatty() else 160).print(report_table(outcome.report))
    for variant in outcome.report.variants:
        click.echo(f"{variant.type} tensors: {_types(variant.tensor_types)}")
    for note in outcome.report.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"report {places['report']}\nplot   {places['plot']}", err=True)
    click.echo(f"Ask it: {how_to_ask(outcome.models[0], prompt='Who are you?')}", err=True)


def _with_error(estimate: Estimate, form: str) -> str:
    error = "" if estimate.error is None else f" ±{format(estimate.error, form)}"
    return format(estimate.value, form) + error


_COLUMNS = ("TYPE", "SIZE", "PERPLEXITY", "KL MEAN", "KL 99 %", "SAME TOKEN", "PREFILL", "DECODE")


def report_table(report: Report) -> Table:
    """The figures of a run, one line a variant, the source first; speeds in tokens per second."""
    first = report.variants[0].quality
    table = Table(
        title=f"{report.name}: {first.num_tokens_scored:,} tokens judged against the source; PREFILL, DECODE in tok/s",
        box=None, pad_edge=False, header_style="bold", title_justify="left",
    )  # fmt: skip
    for title in _COLUMNS:
        table.add_column(title, justify="left" if title == "TYPE" else "right", no_wrap=True)
    source = report.source
    table.add_row(
        f"source {source.precision}", human_size(source.size_bytes), _with_error(first.source_perplexity, ".2f"),
        "", "", "", f"{source.speed.prefill_tok_s:,.0f}", f"{source.speed.decode_tok_s:,.0f}",
    )  # fmt: skip
    for variant in report.variants:
        table.add_row(*_cells(variant))
    return table


def _cells(variant: Variant) -> tuple[str, ...]:
    quality, speed = variant.quality, variant.speed
    kld_form = ".4f" if quality.kld_mean.value >= 0.0005 else ".0e"
    return (
        variant.type,
        human_size(variant.size_bytes),
        _with_error(quality.perplexity, ".2f"),
        _with_error(quality.kld_mean, kld_form),
        f"{quality.kld_p99:.3f}",
        _with_error(quality.top1_agreement, ".1%"),
        f"{speed.prefill_tok_s:,.0f}",
        f"{speed.decode_tok_s:,.0f}",
    )


def _types(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())
