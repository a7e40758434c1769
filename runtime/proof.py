"""What a version has to show before it serves: golden prompts of its package, and that it answers at all."""

from __future__ import annotations

import asyncio
import math
import struct
from collections.abc import Callable

from edge.errors import ActivationFailed, EdgeError
from edge.store.goldens import Goldens, GoldenText, mean_difference, turned_by
from runtime import wire
from runtime.host import ModelHost
from runtime.request import SamplingParams

WITHIN_S = 30.0
"""For all prompts together, where neither the package nor who activates says otherwise: some fifty tokens read and
four written, beside another version that serves."""
ALONE_S = 10.0
"""The same where the other version had to make room, so that everybody waits."""
SMOKE_TEXT = "The ship left the harbour in the morning and came back before the sun went down."
ANSWER_TOKENS = 4
BEAT_S = 5.0


async def prove(host: ModelHost, slot: str, goldens: Goldens | None, *, within_s: float | None, is_alone: bool) -> None:
    """See that a loaded model answers as it should, in the time and memory that it may take.

    Args:
        within_s: For all prompts together; None for what the package says.
        is_alone: Nobody else serves meanwhile.

    Raises:
        ActivationFailed: It does not.
    """
    asked = goldens or Goldens()
    seconds = within_s or asked.max_seconds or (ALONE_S if is_alone else WITHIN_S)
    proof = _Proof(host, asked, seconds)
    try:
        async with asyncio.timeout(seconds):
            flaw = await (proof.of_text() if host.model.kind == "text" else proof.of_vectors())
    except TimeoutError:
        flaw = f"it is too slow: its golden prompts were not answered in {seconds:g} s."
    except EdgeError as e:
        flaw = f"it failed at a golden prompt: {e.message}"
    if flaw := flaw or await proof.of_memory():
        raise ActivationFailed(host.ref, slot, flaw)


class _Proof:
    """Each part gives what is wrong, as the end of a sentence; None where nothing is."""

    def __init__(self, host: ModelHost, goldens: Goldens, seconds: float) -> None:
        self._host = host
        self._goldens = goldens
        self._seconds = seconds

    async def of_text(self) -> str | None:
        for golden in self._goldens.texts:
            if flaw := self._compare(golden, await self._scores(golden.tokens)):
                return flaw
        if not self._goldens.texts:
            scores = await self._scores(SMOKE_TEXT)
            assert self._host.ready is not None
            if not scores or not math.fsum(scores) / len(scores) > -math.log(self._host.ready.vocab_size):
                return "of an English sentence it knows less than who guesses each word."
        return await self._answer()

    def _compare(self, golden: GoldenText, scores: list[float]) -> str | None:
        difference = mean_difference(golden.logprobs, scores)
        if difference <= self._goldens.tolerance:
            return None
        return (
            f"its answers are wrong: what it thinks of a golden prompt differs by {difference:.2f} from what it should "
            f"({self._goldens.tolerance:g} is allowed)."
        )

    async def _scores(self, prompt: str | list[int]) -> list[float]:
        """What the model thinks of each token of a text after the first."""
        params = SamplingParams(temperature=0, logprobs=0)
        pieces = await self._ask(
            lambda i: wire.Generate(i, None, prompt, params, 0, [], echoes=True, answers=False)
        )  # fmt: skip
        return [t.logprob for p in pieces if p.echo is not None for t in p.echo.logprobs or ()]

    async def _answer(self) -> str | None:
        has_template = self._host.ready is not None and self._host.ready.has_chat_template
        messages, prompt = ([wire.ChatMessage("user", "Hello")], None) if has_template else (None, SMOKE_TEXT)
        params = SamplingParams(temperature=0)
        pieces = await self._ask(lambda i: wire.Generate(i, messages, prompt, params, ANSWER_TOKENS, []))
        return None if any(p.finish_reason for p in pieces) else "it did not answer."

    async def of_vectors(self) -> str | None:
        for golden in self._goldens.vectors:
            turned = turned_by(golden.vector, await self._vector(golden.text))
            if not turned <= self._goldens.tolerance:
                return f"its vectors are wrong: that of a golden text is turned by {turned:.2f}."
        vector = await self._vector(SMOKE_TEXT)
        if not vector or not all(map(math.isfinite, vector)) or not any(vector):
            return "what it makes of a text is no vector."
        return None

    async def _vector(self, text: str) -> list[float]:
        query = "What left?" if self._host.model.kind == "reranking" else None
        pieces = await self._ask(lambda i: wire.Embed(i, [text], query))
        rows = b"".join(p.rows or b"" for p in pieces)
        return [value for (value,) in struct.iter_unpack("<f", rows)]

    async def _ask(self, make: Callable[[int], wire.Ask]) -> list[wire.Piece]:
        generation = await self._host.start(make, timeout_s=self._seconds, allowed_s=self._seconds)
        try:
            return [piece async for pieces in generation.steps() for piece in pieces]
        finally:
            generation.cancel()

    async def of_memory(self) -> str | None:
        limit = self._goldens.max_memory_bytes
        if limit is None:
            return None
        try:
            async with asyncio.timeout(BEAT_S):
                while (beat := self._host.heartbeat) is None:  # noqa: ASYNC110  # it comes each second
                    await asyncio.sleep(0.1)
        except TimeoutError:
            return "it did not say how much memory it takes."
        if beat.memory_bytes <= limit:
            return None
        return f"it takes {beat.memory_bytes >> 20} MiB of memory, and its package allows {limit >> 20}."
