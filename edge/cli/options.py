"""Options and completions that several commands share."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import click
from click.shell_completion import CompletionItem

from edge.cli.main import settings_from
from edge.errors import ConfigError, EdgeError
from edge.formats.gguf import read_gguf
from edge.store.files import translated
from edge.store.models import ModelStore, StoredModel

_F = TypeVar("_F", bound=Callable[..., Any])


def store_option(command: _F) -> _F:
    """``--store DIR``: another layout directory than the appliance's."""
    kind = click.Path(file_okay=False, path_type=Path)
    return click.option("--store", "store_dir", type=kind, help="Another store: any OCI layout directory.")(command)


def json_option(command: _F) -> _F:
    """``--json``: data for programs."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def pace_options(command: _F) -> _F:
    """``--rate`` and ``--window``: how fast and when models come and go."""
    rate_help = "Most bytes a second: 500k, 2M; off lifts the setting pull_rate."
    window_help = "Only at this time of the day: 22:00-06:00; off lifts the setting pull_window."
    command = click.option("--window", metavar="HH:MM-HH:MM", default="", help=window_help)(command)
    return click.option("--rate", metavar="RATE", default="", help=rate_help)(command)


_OF_A_STORE = frozenset(
    {"oci-layout", "index.json", "index.json.new", "pins.json", "drafts.json", "blobs", "ingest", "lock"}
)


def open_store(store_dir: Path | None, *, create: bool = False) -> ModelStore:
    """The store that a command works on: the appliance's, filled from the seed, or the one that was named as it is.

    Raises:
        ConfigError: `store_dir` holds something else; or it is absent, and not to be created.
    """
    if store_dir:
        if create or _check_there(store_dir):
            _check_is_store(store_dir)
        return ModelStore(store_dir.absolute())
    settings = settings_from()
    return ModelStore(settings.store_dir, seed=settings.seed)


def _check_there(store_dir: Path) -> bool:
    if not store_dir.is_dir():
        raise ConfigError(f"There is no store at {store_dir}.", hint="A pull makes one: edge pull NAME --store DIR.")
    return True


def _check_is_store(store_dir: Path) -> None:
    if not store_dir.is_dir():
        return
    with translated(store_dir, "Reading"):
        names = {path.name for path in itertools.islice(store_dir.iterdir(), 1000)}
    # The directory of a first pull that was interrupted has nothing but what stands in the list.
    if not names & {"oci-layout", "index.json"} and not names <= _OF_A_STORE:
        raise ConfigError(f"{store_dir} is not a store: it holds other things and no oci-layout.")


@contextmanager
def as_wrong_usage(kind: type[EdgeError]) -> Generator[None]:
    """Arguments that prove wrong in the block end the command as wrong usage does."""
    try:
        yield
    except kind as e:
        raise click.UsageError(str(e)) from e


def complete_models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Shell completion: the models of the store."""
    return [str(model.ref) for model in _models_like(ctx, incomplete)]


def complete_chat_models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Shell completion: the models of the store that make text."""
    return [str(model.ref) for model in _models_like(ctx, incomplete) if model.kind == "text"]


def _models_like(ctx: click.Context, incomplete: str) -> list[StoredModel]:
    try:
        store = open_store(ctx.params.get("store_dir"))
        return [model for model in store.list() if str(model.ref).startswith(incomplete)]
    except EdgeError:
        return []  # a shell that completes has no place for an error


def complete_models_and_files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Shell completion: the models of the store, else files."""
    return or_files(complete_models(ctx, param, incomplete), incomplete)


def or_files(names: Sequence[str], incomplete: str) -> list[CompletionItem]:
    """Names that fit, and the shell's own file names where none does. The order is click's: bash forgets what came
    before the file item, and asks for files when nothing comes after."""
    return [CompletionItem(incomplete, type="file"), *(CompletionItem(name) for name in names)]


def how_to_ask(model: StoredModel, *, prompt: str) -> str:
    """The command that tries a model out: a chat where the model has a template of one, else what it is made for."""
    if model.kind == "adapter":
        return f'edge chat MODEL+{str(model.ref).removesuffix(":latest")} "{prompt}"'
    if model.kind == "text" and read_gguf(model.weights).text("tokenizer.chat_template"):
        return f'edge chat {model.ref} "{prompt}"'
    settings = settings_from()
    path, question = _question_for(model.kind)
    body = json.dumps({"model": str(model.ref), **question})
    address = f"{settings.url}/v1/{path}"
    return f"edge serve, then: curl {address} -H 'Content-Type: application/json' -d '{body}'"


def _question_for(kind: Literal["text", "embeddings", "reranking"]) -> tuple[str, dict[str, object]]:
    """Path and body of a request that a model without a chat template can answer."""
    match kind:
        case "text":
            return "completions", {"prompt": "Once upon a time", "max_tokens": 100}
        case "reranking":
            return "rerank", {"query": "What floats?", "documents": ["A boat.", "A stone."]}
        case "embeddings":
            return "embeddings", {"input": "A boat on the sea."}


def human_size(size_bytes: float) -> str:
    """A size for people, in powers of 1000 as disks are sold: ``98.4 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def plain(text: str, *, keep: str = "") -> str:
    """The text without what a terminal would obey, but for the characters of `keep`: names come from clients and files,
    and models repeat what they were given."""
    return "".join(c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}" for c in text)
