"""`edge serve`."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import sys

import click

from edge.cli.main import settings_from
from edge.config import Settings


@click.command("serve")
@click.option("--host", help="Address to listen on (127.0.0.1).")
@click.option("--port", type=int, help="Port to listen on (8080).")
@click.option("--tls-cert", metavar="FILE", help="Certificate to show (PEM); read again when it changes.")
@click.option("--tls-key", metavar="FILE", help="Its private key (PEM).")
@click.option("--tls-by-proxy", metavar="NAME", help="What ends TLS in front of this appliance, such as nginx.")
@click.option("--require-keys", type=click.Choice(["auto", "on"]), help="Ask for API keys on 127.0.0.1 too (auto).")
@click.option("--threads", type=int, help="Threads of one engine; 0 means every usable core.")
@click.option("--context-tokens", type=int, help="KV cells of one model; 0 chooses from model and memory.")
@click.option("--max-sequences", type=int, help="Sequences that one engine computes at once (16).")
@click.option("--speculation", type=click.Choice(["auto", "off"]), help="Guess tokens that the text repeats (auto).")
@click.option("--gateway-url", help="Where telemetry goes; without it nothing leaves the device.")
@click.option("-v", "--verbose", is_flag=True, help="Log more than warnings to the terminal.")
def serve(verbose: bool, **flags: object) -> None:
    """Serve the store's models on a local API: OpenAI's under /v1, the operator's under /edge/v1.

    The default model is loaded at the start (not with EDGE_PRELOAD=off), any other when it is first
    asked for. The API answers on TCP and on the Unix socket
    EDGE_HOME/run/edge.sock. An address that others can reach takes an API key and TLS: see `edge key`.

    \b
    Examples:
      edge serve
      edge serve --port 9000 --threads 4
      EDGE_GATEWAY_URL=http://127.0.0.1:4318 edge serve
      edge key create tablet && edge serve --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem
    """
    gc.disable()  # until it serves: imports make no garbage worth a look, and the looks take a tenth of the start
    # httpx would import its own command with rich and pygments, which take 3 MB: None says that there is none
    sys.modules["httpx._main"] = None  # pyright: ignore[reportArgumentType]  # as in the import system's reference
    settings = settings_from(**flags)
    from runtime.logs import set_up
    from runtime.process import start_first

    logs = set_up(settings.logs_dir, verbose=verbose)
    waiting = start_first(settings)
    from runtime.server import serve as run  # beside the worker, which takes as long to import what it needs

    run(settings, logs, on_ready=lambda port: _on_ready(settings, port), waiting=waiting)


def _on_ready(settings: Settings, port: int) -> None:
    _announce(settings, port)
    from edge.native import malloc  # what it takes to reach the C library would lengthen the start

    malloc.give_large_blocks_back(malloc.LARGE_BODY_BYTES, malloc.MOST_FREE_BESIDE_BODIES)


def _announce(settings: Settings, port: int) -> None:
    from edge.store.models import ModelStore

    url = dataclasses.replace(settings, port=port).url
    known = [str(m.ref) for m in ModelStore(settings.store_dir, seed=settings.seed).list() if m.kind == "text"]
    model = settings.default_model if settings.default_model in known else next(iter(known), None)
    lines = [f"slm-edge serves on {click.style(url, bold=True)}   (API page: {url}/docs)", ""]
    lines += (
        _try_next(url, model, key=settings.needs_keys) if model else ["No model yet: edge pull smollm2:135m-instruct"]
    )
    click.echo("\n".join([*lines, "", "Ctrl-C stops."]), err=True)


def _try_next(url: str, model: str, *, key: bool) -> list[str]:
    edge = "edge" if shutil.which("edge") else sys.argv[0]  # as in a clone, where nobody put .venv/bin on the PATH
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "What is a lighthouse for?"}]})
    return [
        "Try, in another terminal:",
        *(["  export EDGE_API_KEY=edge_…   (a key: edge key create NAME)"] if key else []),
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\",
        *(['    -H "Authorization: Bearer $EDGE_API_KEY" \\'] if key else []),
        f"    -d '{body}'",
        f'  {edge} chat "What is a lighthouse for?"',
        f"  {edge} tui",
        "",
        "or from Python (pip install openai):",
        "  from openai import OpenAI",
        f'  client = OpenAI(base_url="{url}/v1", api_key="{"edge_…" if key else "none"}")',
        f'  client.chat.completions.create(model="{model}", messages=[{{"role": "user", "content": "Hi"}}])',
    ]
