"""`edge push`: give a model of the store to a registry."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem

from edge.cli.main import settings_from
from edge.cli.models import print_json
from edge.cli.notes import note
from edge.cli.options import (
    as_wrong_usage,
    complete_models,
    human_size,
    json_option,
    open_store,
    pace_options,
    store_option,
)
from edge.cli.outliving import outlive
from edge.cli.pull import progress_on_stderr
from edge.errors import ConfigError, InvalidReference
from edge.store.network import Network
from edge.store.registry.push import Pushed
from edge.store.registry.push import push as push_model
from edge.store.sources import RegistrySource, parse_source
from edge.store.transfer import Control


def complete_targets(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Shell completion: the scheme."""
    return [CompletionItem("oci://")] if "oci://".startswith(incomplete) else []


@click.command()
@click.argument("model", shell_complete=complete_models)
@click.argument("target", shell_complete=complete_targets)
@click.option("--docker-tag", metavar="TAG", default="", help="Also name it so in Docker's form, over the same bytes.")
@pace_options
@store_option
@json_option
def push(
    model: str,
    target: str,
    *,
    docker_tag: str,
    rate: str,
    window: str,
    store_dir: Path | None,
    as_json: bool,
) -> None:
    """Give a model of the store to an OCI registry, with its signature and all else that is attached to it.

    What the registry has already is not sent. An interrupted push goes on where it stopped. Name and password stand in
    registry-auth.json of EDGE_HOME, as `docker login` and `oras login` write them.

    \b
    TARGET is oci://HOST[:PORT]/NAME[:TAG]; without a tag the model's own is used.

    \b
    Examples:
      edge push smollm2:135m-instruct oci://registry.example.org/models/smollm2
      edge push smollm2:135m-instruct oci://127.0.0.1:5000/models/smollm2 --docker-tag docker
      edge push big:q4_k_m oci://registry.example.org/models/big --rate 2M --window 22:00-06:00
    """
    with as_wrong_usage(InvalidReference):
        parsed = parse_source(target)
    if not isinstance(parsed, RegistrySource):
        raise click.UsageError("TARGET is a registry: oci://HOST/NAME[:TAG].")
    with as_wrong_usage(ConfigError):
        network = Network.of(settings_from(), rate=rate, window=window)
    store = open_store(store_dir)
    is_alone = outlive()
    with progress_on_stderr() as report:
        control = Control(report, is_alone, "push")
        pushed = push_model(store, model, parsed, docker_tag=docker_tag, network=network, control=control)
    note("model.push", f"{model} {pushed.target}", store_dir=store_dir)
    _show(pushed, as_json=as_json)


def _show(pushed: Pushed, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "target": str(pushed.target),
                "sent_bytes": pushed.sent_bytes,
                "present_bytes": pushed.present_bytes,
                "attached": pushed.num_attached,
                "docker": str(pushed.docker) if pushed.docker else None,
            }
        )
        return
    click.echo(str(pushed.target))
    if pushed.docker:
        click.echo(str(pushed.docker))
    there = f"{human_size(pushed.present_bytes)} were there already"
    click.echo(f"{human_size(pushed.sent_bytes)} sent, {there}, {pushed.num_attached} attached", err=True)
