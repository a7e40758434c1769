"""`edge chat`."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import click

from edge.cli.connection import address_of, connection_options, with_client
from edge.cli.main import settings_from
from tui.client import ChatMessage, ChatParams, RuntimeClient, Usage


@click.command("chat")
@click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]")
@click.option("-m", "--model", help="Model to ask (the default model).")
@click.option("-s", "--system", help="System prompt.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 always takes the likeliest token (1).")
@click.option("--top-p", type=click.FloatRange(0, 1), help="Nucleus sampling (1).")
@click.option("--max-tokens", type=click.IntRange(min=1), default=1024, help="Longest answer in tokens (1024).")
@click.option("--seed", type=int, help="Makes a sampled answer repeatable.")
@click.option("--stats", is_flag=True, help="Print tokens and speed to stderr.")
@connection_options
def chat(
    words: Sequence[str], model: str | None, system: str | None, temperature: float | None, top_p: float | None,
    max_tokens: int, seed: int | None, stats: bool, url: str | None, socket: Path | None,
) -> None:  # fmt: skip
    """Ask a model of the running appliance, or talk with it where no PROMPT is given.

    A prompt on standard input is taken as well: the text is put after PROMPT.

    \b
    Examples:
      edge chat "What is the capital of France?"
      edge chat smollm2:135m-instruct "Write a haiku about rain."
      edge chat --temperature 0 "Summarize this:" < notes.txt
      edge chat                       talk; an empty line or Ctrl-D ends
    """
    params = ChatParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    first = [ChatMessage("system", system)] if system else []

    async def work(client: RuntimeClient) -> None:
        chosen, prompt = await _choose(client, list(words), model)
        if piped := _piped():
            prompt = f"{prompt}\n\n{piped}" if prompt else piped
        if prompt:
            await _answer(client, chosen, [*first, ChatMessage("user", prompt)], params, stats=stats)
        else:
            await _talk(client, chosen, first, params, stats=stats)

    with_client(address_of(url, socket), work)


async def _choose(client: RuntimeClient, words: list[str], model: str | None) -> tuple[str, str]:
    """Model and prompt: a first word that names a model of the store is one."""
    if model is None and words:
        known = {m.ref for m in await client.models()}
        if words[0] in known or f"{words[0]}:latest" in known:
            model = words.pop(0)
    return model or settings_from().default_model, " ".join(words)


def _piped() -> str:
    return "" if sys.stdin.isatty() or sys.stdin.closed else sys.stdin.read().strip()


async def _talk(
    client: RuntimeClient, model: str, first: list[ChatMessage], params: ChatParams, *, stats: bool
) -> None:
    click.echo(f"talking with {model}; an empty line ends", err=True)
    messages = list(first)
    while True:
        try:
            said = (await asyncio.to_thread(input, "> ")).strip()
        except EOFError:
            return
        if not said:
            return
        messages.append(ChatMessage("user", said))
        messages.append(ChatMessage("assistant", await _answer(client, model, messages, params, stats=stats)))


async def _answer(
    client: RuntimeClient, model: str, messages: Sequence[ChatMessage], params: ChatParams, *, stats: bool
) -> str:
    parts: list[str] = []
    usage: Usage | None = None
    started = time.perf_counter()
    first: float | None = None
    async with aclosing(client.chat(model, messages, params)) as deltas:
        async for delta in deltas:
            if delta.content:
                first = first or time.perf_counter()
                parts.append(delta.content)
                click.echo(delta.content, nl=False)
            usage = delta.usage or usage
    click.echo()
    if stats and usage is not None and first is not None:
        _print_stats(usage, first - started, time.perf_counter() - first)
    return "".join(parts)


def _print_stats(usage: Usage, ttft_s: float, decode_s: float) -> None:
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    rate = (usage.completion_tokens - 1) / decode_s if usage.completion_tokens > 1 and decode_s > 0 else 0.0
    click.echo(
        f"{usage.prompt_tokens} tokens in ({cached} cached), {usage.completion_tokens} out, "
        f"first after {ttft_s * 1000:.0f} ms, then {rate:.1f} tok/s",
        err=True,
    )
