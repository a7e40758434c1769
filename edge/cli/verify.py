"""`edge verify`: read the models from the disk again, and mend what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from edge.cli.main import settings_from
from edge.cli.models import print_json
from edge.cli.notes import note
from edge.cli.options import complete_models, human_size, json_option, open_store, or_files, store_option
from edge.cli.pull import progress_on_stderr
from edge.errors import ConfigError, EdgeError, NotRepaired
from edge.store.digest import READ_BYTES, Digest
from edge.store.fetch import Progress
from edge.store.manifest import Descriptor
from edge.store.models import FileCheck, ModelStore
from edge.store.network import Network
from edge.store.repair import Mended, repair
from edge.store.repair_sources import named_source, source_of, sources_for
from edge.store.scrub import Flaw, flaws_of
from edge.store.transfer import Control

Report = Callable[[Progress], None]


@dataclass(slots=True)
class _Result:
    """What was found of one model, and done about it; by the names of its files."""

    ref: str
    checks: Sequence[FileCheck] = ()
    flaws: dict[str, Sequence[Flaw]] = field(default_factory=dict[str, Sequence[Flaw]])
    mended: dict[str, Mended] = field(default_factory=dict[str, Mended])
    failures: dict[str, str] = field(default_factory=dict[str, str])
    error: EdgeError | None = None

    def is_right(self, check: FileCheck) -> bool:
        """Whether a file is as it should be, now."""
        return check.is_good or check.name in self.mended

    @property
    def is_good(self) -> bool:
        """Whether all are."""
        return self.error is None and all(map(self.is_right, self.checks))


def _complete_source(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    known = [text for text in ("oci://", "https://", "hf://") if text.startswith(incomplete)]
    return or_files(known, incomplete)


@click.command()
@click.argument("refs", nargs=-1, metavar="[REF...]", shell_complete=complete_models)
@click.option("--repair", "is_repair", is_flag=True, help="Fetch what is wrong again, and only that.")
@click.option(
    "--from", "places", multiple=True, metavar="SOURCE", shell_complete=_complete_source,
    help="Where to fetch it from; may be given several times.",
)  # fmt: skip
@store_option
@json_option
def verify(
    refs: Sequence[str], *, is_repair: bool, places: Sequence[str], store_dir: Path | None, as_json: bool
) -> int:
    """Read every byte of the models again, from the disk and not from memory, and check it against its digest. Exits 1
    when one is bad, and stays so.

    A model with a bad file is quarantined: it is not loaded until the file is right again. --repair fetches the parts
    of 4 MiB that are wrong, and no others, writes them in their place and reads the file once more. It asks, in this
    order: SOURCE, where it is given, else memory, the seed, the setting `peers`, and where the model came from.

    \b
    SOURCE is one of
      oci://HOST[:PORT]          another appliance, or a registry: oci://10.0.0.7:8080
      oci://HOST[:PORT]/NAME     one that has the model under another name
      https://HOST/FILE.gguf     the model's file on a web server
      hf://OWNER/REPO/FILE.gguf  or on a hub
      ./stick.tar                what edge export wrote
      ./store                    another store: any OCI layout directory
      ./model.gguf               the model's file

    \b
    Examples:
      edge verify
      edge verify smollm2:135m-instruct --json
      edge verify --repair
      edge verify smollm2:135m-instruct --repair --from oci://10.0.0.7:8080
    """
    if places and not is_repair:
        raise click.UsageError("--from says where to repair from: give --repair too.")
    store = open_store(store_dir)
    known = store.quarantined()
    found = [str(store.resolve(ref)) for ref in refs] if refs else [str(ref) for ref in store.refs()]
    with progress_on_stderr() as report:
        results = [_verified(store, ref, report) for ref in found]
        for result in results:
            if is_repair and result.flaws:
                _repair(store, result, places, report)
    for result in results:
        _note(result, known, store_dir)
    if as_json:
        print_json([_json(result) for result in results])
    else:
        for result in results:
            _print(store, result)
    return int(any(not result.is_good for result in results))


def _verified(store: ModelStore, ref: str, report: Report) -> _Result:
    result = _Result(ref)
    try:
        parts = dict(store.parts(ref))
        result.checks = store.verify(ref, before_read=_counting(ref, parts.values(), report))
        for check in result.checks:
            if check.is_good:
                store.release(check.expected)
            elif check.name in parts:
                result.flaws[check.name] = flaws_of(store, parts[check.name])
    except ConfigError:
        raise
    except EdgeError as e:
        result.error = e
    return result


def _counting(ref: str, parts: Iterable[Descriptor], report: Report) -> Callable[[], None]:
    total, done = sum(part.size for part in parts), 0

    def before_read() -> None:
        nonlocal done
        report(Progress(min(done, total), total, f"reading {ref}"))
        done += READ_BYTES

    return before_read


def _repair(store: ModelStore, result: _Result, places: Sequence[str], report: Report) -> None:
    settings = settings_from()
    control = Control(report, lambda: False)
    network = Network.of(settings)
    sources = [named_source(text, store, result.ref, network) for text in places]
    sources = sources or sources_for(settings, store, [result.ref])
    parts = dict(store.parts(result.ref))
    for name in result.flaws:
        try:
            result.mended[name] = repair(store, parts[name], sources, control)
        except NotRepaired as e:
            result.failures[name] = e.reason


def _note(result: _Result, known: Container[Digest], store_dir: Path | None) -> None:
    for name, flaws in result.flaws.items():
        if flaws and flaws[0].piece.blob not in known:
            note("model.damage", f"{result.ref}: {name}: {flaws[0].problem}", store_dir=store_dir)
    for name, mended in result.mended.items():
        note("model.repair", f"{result.ref}: {name} from {', '.join(mended.sources)}", store_dir=store_dir)


def _json(result: _Result) -> dict[str, object]:
    return {
        "ref": result.ref,
        "is_good": result.is_good,
        "error": result.error.message if result.error else None,
        "files": [_file_json(result, check) for check in result.checks],
    }


def _file_json(result: _Result, check: FileCheck) -> dict[str, object]:
    mended = result.mended.get(check.name)
    return {
        "name": check.name,
        "path": str(check.path),
        "size_bytes": check.size_bytes,
        "is_good": result.is_right(check),
        "expected": str(check.expected),
        "actual": None if check.actual is None else str(check.actual),
        "damaged": [{"start": f.piece.start, "stop": f.piece.stop} for f in result.flaws.get(check.name, ())],
        "problem": result.failures.get(check.name),
        "repaired": None if mended is None else {"bytes": mended.mended_bytes, "from": mended.sources},
    }


def _print(store: ModelStore, result: _Result) -> None:
    if result.error is not None:
        click.echo(f"BAD   {result.ref}: {result.error.message}")
        return
    for check in result.checks:
        if not check.is_good:
            _print_bad(result, check)
    if result.is_good:
        click.echo(f"good  {result.ref}  {human_size(sum(check.size_bytes for check in result.checks))}")
    else:
        click.echo(f"        fix: {_fix(store, result)}")


def _print_bad(result: _Result, check: FileCheck) -> None:
    click.echo(f"{'mend' if result.is_right(check) else 'BAD '}  {result.ref}: {check.name} ({check.path})")
    click.echo(f"        expected {check.expected}\n        actual   {check.actual or 'the file is missing'}")
    for flaw in result.flaws.get(check.name, ())[:8]:
        click.echo(f"        {flaw.problem}")
    if mended := result.mended.get(check.name):
        where = ", ".join(mended.sources) or "nowhere: it reads right again"
        click.echo(f"        repaired: {human_size(mended.mended_bytes)} from {where}")
    elif failure := result.failures.get(check.name):
        click.echo(f"        not repaired: {failure}")


def _fix(store: ModelStore, result: _Result) -> str:
    source = source_of(store, result.ref)
    pulling = f"edge pull '{source}' --name {result.ref}" if source else f"edge rm {result.ref}, then pull it again"
    if result.failures:
        return f"edge verify {result.ref} --repair --from SOURCE, or {pulling}"
    return f"edge verify {result.ref} --repair, or {pulling}"
