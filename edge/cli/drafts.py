"""`edge draft`: which model guesses for which."""

from __future__ import annotations

from pathlib import Path

import click

from edge.cli.models import print_json
from edge.cli.options import complete_chat_models, json_option, open_store, store_option
from edge.store.drafts import draft_for
from edge.store.models import ModelStore


@click.command()
@click.argument("model", required=False, shell_complete=complete_chat_models)
@click.argument("guesser", required=False, metavar="[DRAFT]", shell_complete=complete_chat_models)
@click.option("--off", is_flag=True, help="Use none, whatever the package says.")
@click.option("--reset", is_flag=True, help="Use what the package says.")
@store_option
@json_option
def draft(
    model: str | None, guesser: str | None, *, off: bool, reset: bool, store_dir: Path | None, as_json: bool
) -> None:
    """Have DRAFT, a much smaller model with the same vocabulary, guess what MODEL will say.

    MODEL checks several guesses in one step, where that is faster; its answers are the same. Takes effect when MODEL is
    loaded the next time; edge ps then shows how often guesses are right. Without DRAFT the choice is shown, without
    MODEL all of them.

    \b
    Examples:
      edge draft tinyllama:1.1b stories:15m
      edge draft tinyllama:1.1b --off
      edge draft
    """
    if off + reset + (guesser is not None) > 1 or ((off or reset) and model is None):
        raise click.UsageError("Give MODEL and one of DRAFT, --off and --reset.")
    store = open_store(store_dir)
    if model is not None and (guesser or off or reset):
        store.set_draft(model, guesser or ("" if off else None))
    chosen = _choices(store, model)
    if as_json:
        print_json({"drafts": [{"model": m, "draft": d or None, "problem": p or None} for m, d, p in chosen]})
        return
    for name, guessing, problem in chosen:
        click.echo(f"{name}  {guessing or 'no draft model'}" + (f"  ({problem})" if problem else ""))
    if not chosen:
        click.echo("no model has a draft model", err=True)


def _choices(store: ModelStore, model: str | None) -> list[tuple[str, str, str]]:
    """Of one model, or of all that have one: its name, that of its draft model, and why that is not to be had."""
    models = [store.get(model)] if model is not None else store.list()
    found = [(str(m.ref), draft_for(m, store)) for m in models]
    return [(n, c.name if c else "", c.problem if c else "") for n, c in found if c is not None or model is not None]
