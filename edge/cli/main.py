"""The command `edge`. Each subcommand is a module of its own, imported when it is called."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click
from typing_extensions import override

from edge import __version__
from edge.config import Settings, load_settings
from edge.errors import ConfigError, EdgeError, InvalidReference, InvalidRequest, KeyNotFound, ModelNotFound

# name -> (module:attribute, one line of help). `edge --help` reads this table and imports nothing.
COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("edge.cli.serve:serve", "Serve the store's models on a local API."),
    "chat": ("edge.cli.chat:chat", "Ask a model from the shell, or talk with it."),
    "tui": ("edge.cli.tui:tui", "Open the operator's terminal."),
    "pull": ("edge.cli.pull:pull", "Fetch a model into the store."),
    "push": ("edge.cli.push:push", "Give a model of the store to a registry."),
    "list": ("edge.cli.models:list_models", "List the models in the store."),
    "show": ("edge.cli.models:show", "Show one model: files, digests, quality report."),
    "rm": ("edge.cli.models:rm", "Remove a model from the store."),
    "verify": ("edge.cli.verify:verify", "Check stored bytes against their digests, and mend them."),
    "export": ("edge.cli.bundle:export", "Write models into one file, for places without a network."),
    "import": ("edge.cli.bundle:import_bundle", "Take models from such a file."),
    "ps": ("edge.cli.running:ps", "List the loaded models."),
    "load": ("edge.cli.running:load", "Load a model into the running appliance."),
    "unload": ("edge.cli.running:unload", "Unload a model from the running appliance."),
    "pin": ("edge.cli.models:pin", "Keep a model in memory once it is loaded."),
    "activate": ("edge.cli.slots:activate", "Put a model into a slot, on trial, in the place of the one that serves."),
    "rollback": ("edge.cli.slots:rollback", "Have the version before serve again."),
    "slots": ("edge.cli.slots:slots", "List the slots and the versions in them."),
    "draft": ("edge.cli.drafts:draft", "Have a smaller model guess for another one."),
    "batch": ("edge.cli.batch:batch", "Have a file of requests answered when there is room."),
    "warm": ("edge.cli.warm:warm", "Compute a system prompt once and keep it for all who begin with it."),
    "replay": ("edge.cli.replay:replay", "Look into requests that ended the engine."),
    "tune": ("edge.cli.tune:tune", "Measure which engine settings are fastest for a model on this device."),
    "quantize": ("edge.cli.quantize:quantize", "Turn a checkpoint into measured, packaged models."),
    "sign": ("edge.cli.sign:sign", "Vouch for a package, so that devices may insist on it."),
    "trust": ("edge.cli.trust:trust", "Say whose models this device takes."),
    "delta": ("edge.cli.delta:delta", "Make what a device with one version of a model needs for the next."),
    "image": ("edge.cli.image:image", "Build a container image for a hardware target."),
    "telemetry": ("edge.cli.telemetry:telemetry", "Show, flush or follow the telemetry outbox."),
    "gateway": ("edge.cli.gateway:gateway", "Run the reference telemetry gateway."),
    "key": ("edge.cli.key:key", "Make, list and revoke API keys."),
    "usage": ("edge.cli.usage:usage", "Show what each key used."),
    "audit": ("edge.cli.audit:audit", "Read and verify the log of what operators did."),
    "explain": ("edge.cli.explain:explain", "Tell why a model is served as it is."),
    "config": ("edge.cli.config:config", "Show every setting, its value and where it came from."),
}

EXIT_ERROR, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_UNAVAILABLE = 1, 2, 3, 4
_EXIT_CODES: dict[type[EdgeError], int] = {
    ConfigError: EXIT_USAGE,
    InvalidRequest: EXIT_USAGE,
    InvalidReference: EXIT_USAGE,
    KeyNotFound: EXIT_NOT_FOUND,
    ModelNotFound: EXIT_NOT_FOUND,
}
_UNAVAILABLE = ("server_unavailable", "gateway_unavailable", "source_unavailable")


class LazyGroup(click.Group):
    """A group that imports a subcommand only when it is run."""

    @override
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    @override
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    @override
    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    @override
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as e:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if not near:
                raise
            raise click.UsageError(f"{e.message} Did you mean '{near[0]}'?", ctx) from e


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edge")
def cli() -> None:
    """Run small language models on this device: fetch, quantize, serve, operate.

    \b
    First steps:
      edge serve                 serve on http://127.0.0.1:8080
      edge chat "Who are you?"   ask the default model
      edge tui                   the operator's terminal

    State lives in EDGE_HOME (default: ~/.local/share/slm-edge). Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no such
    model or key, 4 a server or source is out of reach. Tab completion: eval "$(_EDGE_COMPLETE=bash_source edge)"
    """


def settings_from(**flags: object) -> Settings:
    """The settings in force for a command, flags last. A flag that is None was not given."""
    return load_settings(os.environ, flags)


def exit_code_of(error: EdgeError) -> int:
    """The documented exit code for an error."""
    if error.code in _UNAVAILABLE:
        return EXIT_UNAVAILABLE
    return next((code for kind, code in _EXIT_CODES.items() if isinstance(error, kind)), EXIT_ERROR)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit. An `EdgeError` is printed as its message and its hint."""
    try:
        result: Any = cli.main(args=list(argv) if argv is not None else None, prog_name="edge", standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except click.exceptions.Abort:
        click.echo("stopped", err=True)
        sys.exit(130)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except EdgeError as e:
        click.echo(f"{click.style('error:', fg='red', bold=True)} {e.message}", err=True)
        if e.hint:
            click.echo(f"  {e.hint}", err=True)
        sys.exit(exit_code_of(e))
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
