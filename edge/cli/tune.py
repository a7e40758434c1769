"""`edge tune`: which engine settings are fastest for a model on this device."""

from __future__ import annotations

import os
import subprocess
import sys

import click
import msgspec
from rich.console import Console
from rich.table import Table

from edge.cli.main import settings_from
from edge.cli.models import print_json
from edge.cli.options import complete_models, json_option, open_store
from edge.errors import BackendError
from edge.store.models import StoredModel
from runtime.tuning import Tuning, load_tuning, save_tuning, tuning_path

_SLACK_S = 120.0
"""A last measure, and the load before the first, may take so long beyond the stated time."""


@click.command()
@click.argument("ref", shell_complete=complete_models)
@click.option("--seconds", type=click.FloatRange(5, 3600), default=60.0, show_default=True, help="Time to measure.")
@click.option("--show", is_flag=True, help="Print what was found before; measure nothing.")
@click.option("--reset", is_flag=True, help="Forget it: the model is loaded with the defaults again.")
@json_option
def tune(ref: str, *, seconds: float, show: bool, reset: bool, as_json: bool) -> None:
    """Measure which engine settings are fastest for a model on this device.

    Tries threads for prompts and for answers, micro-batch sizes, and flash attention on and off, in a process of its
    own that needs the memory of a second copy of the model. Settings that are at least 5 % faster than the defaults are
    kept in EDGE_HOME/tuning and used from the next load on, unless the setting `threads` says otherwise. A cache in
    eight bits (kv q8_0) is measured for information: it changes answers, so it is never chosen. Best on a machine that
    does nothing else.

    \b
    Examples:
      edge tune smollm2:135m-instruct
      edge tune smollm2:135m-instruct --seconds 20 --json
      edge tune smollm2:135m-instruct --reset
    """
    settings, model = settings_from(), open_store(None).get(ref)
    path = tuning_path(settings.tuning_dir, str(model.digest))
    if reset:
        path.unlink(missing_ok=True)
        click.echo(f"{model.ref} is loaded with the defaults.", err=True)
        return
    tuning = load_tuning(settings.tuning_dir, str(model.digest)) or Tuning() if show else _measure(model, seconds)
    if not show:
        save_tuning(settings.tuning_dir, str(model.digest), tuning)
    if as_json:
        print_json({"ref": str(model.ref), "path": str(path), **msgspec.to_builtins(tuning)})
    else:
        _print(tuning)


def _measure(model: StoredModel, seconds: float) -> Tuning:
    """Have a child measure.

    Raises:
        BackendError: It failed, or did not end in time.
    """
    command = [sys.executable, "-m", "runtime.tuner", str(model.weights), str(seconds), str(os.getpid())]
    click.echo(f"Measuring {model.ref} for {seconds:.0f} s ...", err=True)
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=seconds + _SLACK_S, check=False
        )
    except subprocess.TimeoutExpired as e:
        raise BackendError(f"Measuring {model.ref} did not end in time.", hint="Give it more --seconds.") from e
    if done.returncode != 0:
        raise BackendError(f"Measuring {model.ref} failed with status {done.returncode}.")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Tuning)


def _print(tuning: Tuning) -> None:
    if not tuning.measures:
        click.echo("Not tuned yet.", err=True)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("THREADS", "UBATCH", "FLASH ATTENTION", "KV", "PROMPT tok/s", "ANSWER tok/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for m in tuning.measures:
        table.add_row(
            str(m.threads), str(m.ubatch_tokens), _attention(m.flash_attention), m.kv_type, f"{m.prefill_tok_s:.0f}",
            f"{m.decode_tok_s:.1f}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    click.echo(
        f"\nUsed: {tuning.prefill_threads} threads for prompts, {tuning.decode_threads} for answers, micro-batches of "
        f"{tuning.ubatch_tokens}, flash attention {_attention(tuning.flash_attention)}."
    )


def _attention(value: bool | None) -> str:
    return {None: "auto", True: "on", False: "off"}[value]
