"""`edge chat`."""

from __future__ import annotations

import asyncio
import os
import re
import stat
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import click

from edge.cli.connection import address_of, connection_options, with_client
from edge.cli.main import settings_from
from edge.cli.options import complete_chat_models, plain
from edge.errors import InvalidRequest, ModelNotFound
from tui.client import ChatMessage, ChatParams, RuntimeClient, Usage

_MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._/-]*:[a-z0-9][a-z0-9._-]*")


@click.command("chat")
@click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]", shell_complete=complete_chat_models)
@click.option("-m", "--model", help="Model to ask (the default model).", shell_complete=complete_chat_models)
@click.option("-s", "--system", help="System prompt.")
@click.option(
    "--temperature", type=click.FloatRange(0, 2), help="0 always takes the likeliest token (the model's own)."
)
@click.option("--top-p", type=click.FloatRange(0, 1), help="Nucleus sampling (the model's own).")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer in tokens (as many as fit).")
@click.option("--seed", type=int, help="Makes a sampled answer repeatable.")
@click.option("--stats", is_flag=True, help="Print tokens and speed to stderr.")
@connection_options
def chat(
    words: Sequence[str], model: str | None, system: str | None, temperature: float | None, top_p: float | None,
    max_tokens: int | None, seed: int | None, stats: bool, url: str | None, socket: Path | None,
) -> None:  # fmt: skip
    """Ask a model of the running appliance, or talk with it where no PROMPT is given.

    Text on standard input is put after PROMPT when it is a file, or when PROMPT is missing or ends with "-".

    \b
    Examples:
      edge chat "What is a lighthouse for?"
      edge chat smollm2:135m-instruct "Write a haiku about rain."
      edge chat smollm2:135m-instruct+polite "May I come in?"      with an adapter
      edge chat --temperature 0 "Summarize this:" < notes.txt
      dmesg | edge chat "What is wrong here?" -
      edge chat                       talk; an empty line or Ctrl-D ends
    """
    params = ChatParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    first = [ChatMessage("system", system)] if system else []

    async def work(client: RuntimeClient) -> None:
        chosen, prompt = await _choose(client, list(words), model)
        if prompt := _with_input(prompt):
            await _answer(client, chosen, [*first, ChatMessage("user", prompt)], params, stats=stats)
        elif words or not _has_terminal():
            raise click.UsageError("There is nothing to ask: give a PROMPT, or talk from a terminal.")
        else:
            await _talk(client, chosen, first, params, stats=stats)

    with_client(address_of(url, socket), work)


async def _choose(client: RuntimeClient, words: list[str], model: str | None) -> tuple[str, str]:
    """Model and prompt. A first word that looks like a model's name is one, and has to be in the store."""
    if model is None and words:
        known = await client.names()
        base, plus, adapters = words[0].partition("+")  # a model with adapters
        named = [ref for ref in known if base in (ref, ref.partition(":")[0])]
        if len(named) == 1:
            model = named[0] + plus + adapters
            words.pop(0)
        elif named or (len(words) > 1 and _MODEL_NAME.fullmatch(words[0])):
            raise ModelNotFound(words[0], known=known)
    return model or settings_from().default_model, " ".join(words).strip()


def _has_terminal() -> bool:
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def _with_input(prompt: str) -> str:
    """The prompt, and what stands on standard input where that is meant: a pipe that nobody wrote into is left alone,
    since a caller's loop or a remote shell may own it."""
    wanted = not prompt or prompt == "-" or prompt.endswith(" -")
    prompt = prompt.removesuffix("-").strip() if wanted else prompt
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return prompt
    if os.isatty(0) or not (wanted or stat.S_ISREG(mode)):
        return prompt
    # A loop such as `while read line; do edge chat "$line"; done < file` shares its file with us, half read.
    if stat.S_ISREG(mode) and not wanted and os.lseek(0, 0, os.SEEK_CUR) > 0:
        return prompt
    text = sys.stdin.read().strip()
    return f"{prompt}\n\n{text}" if prompt and text else prompt or text


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
        turn = [*messages, ChatMessage("user", said)]
        try:
            answer = await _answer(client, model, turn, params, stats=stats)
        except InvalidRequest as e:  # such as a conversation that has grown too long: it can go on without this turn
            click.echo(f"{e} This turn was left out.", err=True)
            continue
        messages = [*turn, ChatMessage("assistant", answer)]


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
                click.echo(plain(delta.content, keep="\n\t"), nl=False)
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
