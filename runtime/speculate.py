"""Guesses at the tokens that come next, so that one step can check several; made only where that is faster. Pure.

Wrong guesses cost time: on a CPU a step of 16 tokens takes five times as long as one of a single token. So three things
are learned while the engine runs. How often guesses are right: every token drawn tells, guessed or not, since what
would have been guessed is known (`Acceptance`). What a step costs: the time of each step, by its width (`StepCosts`).
And what all guesses together have won or lost (`Purse`), which bounds the loss whatever the two others believe.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from runtime.batch import Batch
from runtime.ngram import MAX_MATCH, Lookup
from runtime.sequence import Sequence, Status
from runtime.step_cost import StepCosts

WIDTHS = (2, 4, 8, 16, 32, 64)
"""Tokens of a step with guesses. Kernels like multiples of eight: on AVX-512, Q8_0, 15 tokens take longer than 16."""
LEAST_GAIN = 1.05
"""Guesses are made where they promise to be this much faster."""
LONGEST_WAIT = 1.5
"""How much longer a step with guesses may take where a sequence of it has none: it would only wait for the others."""
HOPED_SLOPE = 0.25
"""Until a width was tried: what a further token of a sequence is hoped to add to a step, in plain steps. It is 0.24 for
15 more in Q8_0 on two threads of AVX-512."""
TRIALS = 2
"""Steps of a width before its measured time is believed."""
RETRY_STEPS = 1024
"""After so many steps every width gets one more trial: the machine may have changed."""
ALLOWANCE = 0.02
"""Share of the time of plain steps that guesses may lose."""
START, FULL = 12.0, 24.0
"""What the purse holds at first, and at most, in plain steps."""
PRIOR = [0.2, 0.3, 0.5, 0.6, 0.75, 0.85, 0.9]
"""Share of right guesses before anything is known, by bucket of `Acceptance`; measured ones are 0.15 to 0.99."""
PRIOR_WEIGHT = 8.0
"""Outcomes for which the engine's rates stand in the rates of one text."""
MOST_SEQUENCES = 4
"""Beside more sequences nothing is guessed: their tokens together fill a step that computes about as fast as it can
(SmolLM2-135M Q4_1, 16 sequences: guessing lost 4 % of the tokens a second, with 8 it lost 2 %)."""
LEAST_CHANCE = 0.02
"""Guesses less likely than this are not looked at."""


class Speculator(Protocol):
    """Where guesses come from. The engine's thread owns it."""

    def plan(self, decoding: list[Sequence], *, threads: int) -> None:
        """Before a step of these sequences and no prompt: set the `draft` of each, empty where none is worth it."""
        ...

    def learn(self, batch: Batch, *, num_drawn: int, seconds: float, threads: int) -> None:
        """After a step: `num_drawn` tokens came of it."""
        ...

    def stats(self) -> SpeculationStats:
        """Counters since the start."""
        ...


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """Tokens guessed and checked, and how many of them were right."""

    num_drafted: int = 0
    num_accepted: int = 0


@dataclass(slots=True)
class Acceptance:
    """How often a guess is right, by how long the text had matched before it; old outcomes fade.

    Attributes:
        memory: Outcomes after which one counts a third.
    """

    memory: float
    hits: list[float] = field(default_factory=lambda: [0.0] * 7)
    tries: list[float] = field(default_factory=lambda: [0.0] * 7)

    def add(self, matched: int, *, hit: bool) -> None:
        """Learn from one token."""
        i, fade = _bucket(matched), 1 - 1 / self.memory
        self.hits[i] = self.hits[i] * fade + hit
        self.tries[i] = self.tries[i] * fade + 1

    def rates(self, prior: list[float], *, weight: float) -> list[float]:
        """The share of right guesses in each bucket; `prior` counts as `weight` outcomes."""
        return [(h + weight * p) / (t + weight) for h, t, p in zip(self.hits, self.tries, prior, strict=True)]


def _bucket(matched: int) -> int:
    """0, 1, 2-3, 4-7, 8-15, 16-31, 32 and more."""
    return min(matched.bit_length(), 6)


@dataclass(slots=True)
class Purse:
    """What guesses have won and lost, in plain steps. Empty, it ends them until plain steps have filled it again.

    It begins with `START` and gets `ALLOWANCE` of a step from each plain one; a step with guesses pays its time and
    gets the time that its tokens would have taken without. No guesses are made on an empty purse. So with T the time of
    plain decoding and t that of a plain step, no run takes longer than ``1.02 T + START t`` and the loss of one step,
    however wrong every estimate is. What it holds is bounded (`FULL`), so that an hour of copying does not pay for an
    hour of losses.
    """

    steps: float = START

    def add(self, steps: float) -> None:
        """Put in, or take out."""
        self.steps = min(FULL, self.steps + steps)


@dataclass(slots=True)
class _Texts:
    """Of one sequence: where it repeats itself, and how often that held."""

    lookup: Lookup = field(default_factory=Lookup)
    acceptance: Acceptance = field(default_factory=lambda: Acceptance(memory=32))


class NgramSpeculator(Speculator):
    """Guesses what followed the same words earlier in the text, in steps as wide as pays."""

    def __init__(self) -> None:
        self._costs = StepCosts()
        self._acceptance = Acceptance(memory=1000)
        self._purse = Purse()
        self._trials: Counter[tuple[int, int]] = Counter()
        self._texts: dict[Sequence, _Texts] = {}
        self._steps = self._drafted = self._accepted = 0

    def stats(self) -> SpeculationStats:
        """Counters since the start."""
        return SpeculationStats(self._drafted, self._accepted)

    def plan(self, decoding: list[Sequence], *, threads: int) -> None:
        """Set each sequence's draft: of all widths of a step, the one that promises most tokens for its time."""
        if len(decoding) > MOST_SEQUENCES:
            for sequence in decoding:
                sequence.draft = []
            return
        # Who runs and is in no step now has adapters whose turn comes again.
        self._texts = {s: t for s, t in self._texts.items() if s.status is Status.RUNNING or s in decoding}
        self._texts |= {s: _Texts() for s in decoding if s not in self._texts}
        prior = self._acceptance.rates(PRIOR, weight=PRIOR_WEIGHT)
        likely: list[tuple[float, int]] = []
        for i, sequence in enumerate(decoding):
            sequence.draft = []
            self._follow(sequence)
            likely += ((p, i) for p in self._chances(sequence, prior))
        if not likely or self._purse.steps <= 0:
            return
        likely.sort(reverse=True)
        chosen = Counter(i for _, i in likely[: self._best_width(len(decoding), likely, threads) - len(decoding)])
        for i, length in chosen.items():
            sequence = decoding[i]
            sequence.draft = self._texts[sequence].lookup.guess(sequence.tokens, length)

    def _follow(self, sequence: Sequence) -> None:
        texts = self._texts[sequence]
        for matched, hit in texts.lookup.follow(sequence.tokens):
            texts.acceptance.add(matched, hit=hit)
            self._acceptance.add(matched, hit=hit)

    def _chances(self, sequence: Sequence, prior: list[float]) -> list[float]:
        """The chance of each guess that it and all before it are right, falling."""
        texts = self._texts[sequence]
        limit = min(WIDTHS[-1] - 1, sequence.request.max_tokens - sequence.num_output - 1)
        guesses = len(texts.lookup.guess(sequence.tokens, limit))
        if not guesses:
            return []
        rates = texts.acceptance.rates(prior, weight=PRIOR_WEIGHT)
        matched, chance = texts.lookup.matched, 1.0
        chances: list[float] = []
        for _ in range(guesses):
            chance *= rates[_bucket(matched)]
            if chance < LEAST_CHANCE:
                break
            chances.append(chance)
            matched = min(matched + 1, MAX_MATCH)
        return chances

    def _best_width(self, num_plain: int, likely: list[tuple[float, int]], threads: int) -> int:
        """The width of the step that gives most tokens for its time; that without guesses where none is better."""
        plain = self._costs.predict(num_plain, threads=threads)
        if plain is None or self._trials[threads, num_plain] < TRIALS:
            return num_plain
        best, best_width = num_plain * LEAST_GAIN / plain, num_plain
        for width in WIDTHS:
            if not num_plain < width <= num_plain + len(likely):
                continue
            taken = likely[: width - num_plain]
            cost = self._cost(width, num_plain, plain, threads)
            if len({i for _, i in taken}) < num_plain and cost > LONGEST_WAIT * plain:
                continue
            speed = (num_plain + sum(p for p, _ in taken)) / cost
            if speed > best:
                best, best_width = speed, width
        return best_width

    def _cost(self, width: int, num_plain: int, plain: float, threads: int) -> float:
        measured = self._costs.predict(width, threads=threads) or plain
        if self._trials[threads, width] >= TRIALS:
            return measured
        return min(measured, plain * (1 + HOPED_SLOPE * (width - num_plain) / num_plain))

    def learn(self, batch: Batch, *, num_drawn: int, seconds: float, threads: int) -> None:
        """Book what a step took and gave. Steps that read prompts say nothing about others."""
        width, num_sequences = batch.num_tokens, len(batch.chunks)
        if batch.num_logits != width:
            return
        self._steps += 1
        if self._steps % RETRY_STEPS == 0:
            self._trials = Counter(dict.fromkeys(self._trials, TRIALS - 1))
        plain = self._costs.predict(num_sequences, threads=threads)
        if width == num_sequences:
            self._purse.add(ALLOWANCE)
        else:
            self._drafted += width - num_sequences
            self._accepted += num_drawn - num_sequences
            if plain is not None:
                self._purse.add(num_drawn / num_sequences - seconds / plain)
        self._costs.record(width, threads=threads, seconds=seconds)
        self._trials[threads, width] += 1
