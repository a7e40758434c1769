"""Speculation on the real model: the answers are those of plain decoding."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import pytest

from benchmarks.workloads import WORKLOADS
from edge.store.models import ModelStore
from runtime.engine import Engine
from runtime.request import Request, RequestId, SamplingParams, TokenId
from runtime.speculate import AdaptiveSpeculator, SpeculationStats
from tests.support import DEFAULT_MODEL, SEED, CollectingSink, GreedyLaw

Tokens = tuple[TokenId, ...]


@pytest.fixture(scope="module")
def law() -> Iterator[GreedyLaw]:
    law = GreedyLaw(ModelStore(SEED).get(DEFAULT_MODEL).weights)
    yield law
    law.close()


def prompts_of(law: GreedyLaw, number: int) -> list[Tokens]:
    """Prompts whose answers copy, edit or are prose, a third each."""
    rng = random.Random(6)
    makers = itertools.cycle(WORKLOADS[name].make for name in ("copy", "edit", "short"))
    texts = (make(1, rng)[0][0].text for make in makers)
    encode = law.backend.tokenizer.encode
    return [tuple(encode(t, add_special=True, parse_special=False)) for t in itertools.islice(texts, number)]


def answers(
    law: GreedyLaw, prompts: list[Tokens], *, max_tokens: int, speculator: AdaptiveSpeculator | None
) -> tuple[list[list[TokenId]], SpeculationStats]:
    """Greedy answers, one after the other. The clock says that all steps take equally long: so guesses always pay."""
    law.backend.clear()
    sink, ticks = CollectingSink(), itertools.count()
    clock: Callable[[], float] = lambda: float(next(ticks))  # noqa: E731  # short, and named by its use
    engine = Engine(law.backend, sink, max_queue=len(prompts), speculator=speculator, clock=clock)
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0)
        engine.submit(Request(RequestId(i), prompt, max_tokens, params, ignore_eos=True, return_tokens=True))
        while engine.advance():
            pass
    tokens = [sink.last[RequestId(i)].tokens or () for i in range(len(prompts))]
    return [list(t[len(p) :]) for t, p in zip(tokens, prompts, strict=True)], engine.stats().speculation


def check(law: GreedyLaw, *, num_prompts: int, max_tokens: int) -> float:
    """The law, prompt by prompt; the share of equal answers."""
    prompts = prompts_of(law, num_prompts)
    plain, _ = answers(law, prompts, max_tokens=max_tokens, speculator=None)
    guessed, stats = answers(law, prompts, max_tokens=max_tokens, speculator=AdaptiveSpeculator())
    assert stats.num_accepted > num_prompts * max_tokens / 5, "it was speculated at all"
    assert stats.num_drafted > 1.1 * stats.num_accepted, "and wrongly too"
    equal = sum(a == b for a, b in zip(plain, guessed, strict=True)) / num_prompts
    print(f"speculation: {100 * equal:.1f} % of {num_prompts} answers equal, epsilon {law.epsilon:.3f}, {stats}")
    for prompt, answer, reference in zip(prompts, guessed, plain, strict=True):
        assert law.obeys(list(prompt), answer, reference)
    return equal


def test_guesses_do_not_change_greedy_answers(law: GreedyLaw) -> None:
    check(law, num_prompts=12, max_tokens=48)


@pytest.mark.soak
def test_guesses_change_hardly_any_of_many_answers(law: GreedyLaw) -> None:
    assert check(law, num_prompts=200, max_tokens=128) >= 0.98
