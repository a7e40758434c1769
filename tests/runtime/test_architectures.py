"""Every way in which llama.cpp remembers a text, under the prefix cache: attention to everything or through a window,
recurrent states, both beside each other, experts. The greedy law holds, and what can be reused is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from runtime.backends.llama_cpp import LlamaBackend, LlamaOptions
from runtime.engine import Engine
from runtime.request import Request, RequestId, SamplingParams, TokenId
from runtime.speculate import AdaptiveSpeculator
from tests.runtime.tiny_models import TINY, VOCABULARY, WINDOW, make_tiny
from tests.support import CollectingSink, GreedyLaw, ScriptedDisk

GREEDY = SamplingParams(temperature=0)
SLOTS, STEP = 4, 32


@pytest.fixture(scope="module", params=sorted(TINY))
def law(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GreedyLaw]:
    law = GreedyLaw(make_tiny(tmp_path_factory.mktemp("tiny") / f"{request.param}.gguf", request.param))
    yield law
    law.close()


class Device:
    """An engine driven step by step, whose disk works at once."""

    def __init__(self, backend: LlamaBackend, *, drive: ScriptedDisk | None = None) -> None:
        self.backend, self.drive, self.sink = backend, drive or ScriptedDisk([]), CollectingSink()
        self.engine = Engine(backend, self.sink, max_queue=100, disk=self.drive, speculator=AdaptiveSpeculator())
        for (scope, tokens), (_, pin) in list(self.drive.files.items()):
            self.engine.adopt(list(tokens), scope, uses=1, pin=pin)
        self._next_id = 0

    def submit(self, prompt: list[TokenId], *, max_tokens: int) -> RequestId:
        self._next_id += 1
        asked = RequestId(self._next_id)
        self.engine.submit(Request(asked, tuple(prompt), max_tokens, GREEDY, return_tokens=True))
        return asked

    def advance(self) -> bool:
        """One step, and what the disk has to do; whether there was anything."""
        return self.engine.advance() | self.drive.work()

    def answer(self, prompt: list[TokenId], *, max_tokens: int = 12) -> list[TokenId]:
        """Prompt and answer, when nothing else asks."""
        asked = self.submit(prompt, max_tokens=max_tokens)
        while self.advance():
            pass
        return self.tokens(asked)

    def is_done(self, asked: RequestId) -> bool:
        assert asked not in self.sink.failures, self.sink.failures[asked].error
        return asked in self.sink.last and self.sink.last[asked].finish_reason is not None

    def tokens(self, asked: RequestId) -> list[TokenId]:
        assert self.is_done(asked)
        return list(self.sink.last[asked].tokens or ())

    def num_cached(self) -> int:
        """Tokens that the last request reused."""
        return self.sink.last[RequestId(self._next_id)].num_cached

    def end(self) -> None:
        """As a worker ends: what is worth keeping goes to the disk."""
        self.engine.persist()
        while self.advance():
            pass
        self.backend.close()


def open_backend(law: GreedyLaw, *, cells: int, state_bytes: int) -> LlamaBackend:
    options = LlamaOptions(1, SLOTS, STEP, cells, 1 << 30, state_bytes=state_bytes, state_disk_bytes=state_bytes)
    return LlamaBackend(law.weights, options)


def check(law: GreedyLaw, tokens: list[TokenId], *, num_prompt: int) -> bool:
    """Hold an answer against the same request alone in an empty cache; whether both are equal."""
    prompt, answer = tokens[:num_prompt], tokens[num_prompt:]
    law.backend.clear()
    expected = Device(law.backend).answer(prompt, max_tokens=len(answer))[num_prompt:]
    assert law.obeys(prompt, answer, expected), (prompt, answer, expected)
    return answer == expected


def text(rng: random.Random, length: int) -> list[TokenId]:
    return [rng.randrange(3, VOCABULARY) for _ in range(length)]


@dataclass
class Chats:
    """Conversations that share beginnings of all lengths, go on after each answer, and are broken off."""

    device: Device
    rng: random.Random
    done: list[tuple[int, list[TokenId]]] = field(default_factory=list[tuple[int, list[TokenId]]])
    """Of each answered request: the length of its prompt, prompt and answer."""
    open: dict[RequestId, int] = field(default_factory=dict[RequestId, int])
    """The lengths of prompts that wait for an answer."""

    def begin(self, shared: list[TokenId]) -> None:
        self._ask(shared[: self.rng.choice([len(shared), len(shared) // 2, self.rng.randint(1, len(shared))])])

    def _ask(self, tokens: list[TokenId]) -> None:
        prompt = tokens + text(self.rng, self.rng.randint(1, 20))
        self.open[self.device.submit(prompt, max_tokens=self.rng.choice([1, 6, 12]))] = len(prompt)

    def go_on(self) -> None:
        for asked in list(self.open):
            if self.device.is_done(asked):
                tokens = self.device.tokens(asked)
                self.done.append((self.open.pop(asked), tokens))
                if self.rng.random() < 0.6 and len(tokens) < 250:
                    self._ask(tokens)
            elif self.rng.random() < 0.01:
                self.device.engine.cancel(asked)
                del self.open[asked]


def test_a_busy_engine_with_few_cells_answers_as_each_request_alone(law: GreedyLaw) -> None:
    rng = random.Random(5)
    device = Device(open_backend(law, cells=512, state_bytes=200_000))
    shared = [text(rng, n) for n in (20, WINDOW + 30, 2 * WINDOW + 60)]
    chats = Chats(device, rng)
    for now in range(2000):
        if now < 60 and rng.random() < 0.3 and len(chats.open) < 6:
            chats.begin(rng.choice(shared))
        chats.go_on()
        if not device.advance() and not chats.open and now > 60:
            break
    else:
        raise AssertionError("a request starved")
    device.backend.close()
    equal = sum(check(law, tokens, num_prompt=n) for n, tokens in chats.done)
    assert equal >= 0.7 * len(chats.done) > 10, f"only {equal} of {len(chats.done)} answers are equal"


def memory_of(law: GreedyLaw) -> str:
    limits = law.backend.capabilities.states
    return "window" if limits.window_tokens else "cells" if limits.partial_reuse else "recurrent"


def test_what_can_be_reused_is(law: GreedyLaw) -> None:
    rng, memory = random.Random(6), memory_of(law)
    device = Device(open_backend(law, cells=2048, state_bytes=4 << 20))

    def ask(prompt: list[TokenId], *, cached: int) -> list[TokenId]:
        tokens = device.answer(prompt)
        assert device.num_cached() == cached
        check(law, tokens, num_prompt=len(prompt))
        return tokens

    document = text(rng, 2 * WINDOW + 40)
    chat = ask(document, cached=0)
    chat = ask(chat + text(rng, 9), cached=len(chat) - 1)
    part = document[: 2 * WINDOW]
    ask(part + text(rng, 20), cached=0 if memory == "recurrent" else len(part))
    ask(part + text(rng, 20), cached=len(part))
    device.end()
    device = Device(open_backend(law, cells=2048, state_bytes=4 << 20), drive=device.drive)
    ask(part + text(rng, 20), cached=len(part))
    chat = ask(chat + text(rng, 9), cached=len(chat) - 1)
    other = document[: 2 * WINDOW + 35]
    ask(other + text(rng, 20), cached=len(other) if memory == "cells" else len(part))
    ask(other + text(rng, 20), cached=len(other))
    device.end()


def test_prompts_that_come_together_compute_what_they_share_once(law: GreedyLaw) -> None:
    rng = random.Random(7)
    device = Device(open_backend(law, cells=2048, state_bytes=4 << 20))
    shared = text(rng, 2 * WINDOW)
    prompts = [shared + text(rng, 12) for _ in range(6)]
    asked = [device.submit(p, max_tokens=4) for p in prompts]
    while device.advance():
        pass
    for prompt, request in zip(prompts, asked, strict=True):
        check(law, device.tokens(request), num_prompt=len(prompt))
    assert device.engine.stats().prompt_tokens == len(shared) + 6 * 12
    device.backend.close()


def test_states_take_what_is_counted_for_them(law: GreedyLaw) -> None:
    rng, limits = random.Random(8), law.backend.capabilities.states
    device = Device(open_backend(law, cells=2048, state_bytes=4 << 20))
    device.answer(text(rng, 40))
    device.answer(text(rng, 90))
    device.end()
    assert device.drive.files
    for (_, tokens), (data, _) in device.drive.files.items():
        counted = limits.overhead_bytes + len(tokens) * limits.cell_bytes
        lacks_some = not limits.may_cut(len(tokens)) and limits.partial_reuse
        assert (0.5 if lacks_some else 0.95) * counted <= data.nbytes <= 1.06 * counted
