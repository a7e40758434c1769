"""Guesses at the tokens that come next, so that one step can check several; made only where that is faster. Pure.

A guess is what followed the same words earlier in the text, which is looked up, or what a smaller model says, which
takes time to ask (`Drafter`). Wrong guesses cost time: on a CPU a step of 16 tokens takes five times as long as one of
a single token. So three things are learned while the engine runs. How often guesses are right: every token drawn tells,
guessed or not, where it is known what would have been guessed (`Acceptance`). What a step costs: the time of each step,
by its width (`StepCosts`). And what all guesses together have won or lost (`Purse`), which bounds the loss whatever the
two others believe.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from runtime.acceptance import Acceptance, bucket_of_confidence, bucket_of_match
from runtime.batch import Batch
from runtime.ngram import MAX_MATCH, Lookup
from runtime.request import TokenId
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
"""Share of right guesses before anything is known, by bucket of match; measured ones are 0.15 to 0.99."""
PRIOR_WEIGHT = 8.0
"""Outcomes for which the engine's rates stand in the rates of one text."""
MOST_SEQUENCES = 4
"""Beside more sequences nothing is guessed: their tokens together fill a step that computes about as fast as it can
(SmolLM2-135M Q4_1, 16 sequences: guessing lost 4 % of the tokens a second, with 8 it lost 2 %)."""
LEAST_CHANCE = 0.02
"""Guesses less likely than this are not looked at."""

DRAFT_PRIOR = [0.1, 0.3, 0.5, 0.65, 0.8, 0.9, 0.95]
"""The same for a draft model's guesses, by bucket of its confidence."""
DRAFT_RATE = 0.6
"""The share of its guesses that are right before anything is known."""
DRAFT_PRIOR_WEIGHT = 2.0
"""Texts differ more than models: a story is guessed right nine times as often as a table. So a text's own outcomes
count early."""
MOST_DRAFTED = 15
"""Guesses that a draft model makes for one text in one step."""
HORIZON_TOKENS = 64
"""What a draft model reads of a text before its first guess has to pay within so many tokens."""
PROBE, UNSURE = 4, 0.5
"""Guesses that are only compared with what comes, and the confidence after which no more are made. Where nothing is
known of a text they tell whether guesses would pay, and cost no wider step."""
PROBE_OUTCOMES = 8
"""What is known after so many of them is believed, for `PROBE_STEPS`."""
PROBE_STEPS, PROBE_GAP = 256, 64
"""Steps after which a text is probed again; and least steps between two probes, once `KNOWN_OUTCOMES` have told that
the draft model does not pay in general."""
KNOWN_OUTCOMES = 32
RECONSIDER_STEPS = 4
"""Where asking a draft model does not pay, it is thought about again after so many steps: thinking takes 50 µs."""


@dataclass(frozen=True, slots=True)
class Guess:
    """A token that a draft model expects, and the probability that it gives it.

    Attributes:
        is_last: It ends the text.
    """

    token: TokenId
    confidence: float
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class Drafted:
    """What a draft model was asked.

    Attributes:
        guesses: One for each text; None where it has none, and `num_missing` is None from now on.
        num_tokens: Tokens it had to compute for that.
    """

    guesses: list[Guess | None]
    num_tokens: int
    seconds: float


class Drafter(Protocol):
    """A smaller model with the same vocabulary. It reads what it has not read of a text when it is asked."""

    @property
    def relative_cost(self) -> float:
        """What a step of it is hoped to cost, against one of the model, until it was measured."""
        ...

    def num_missing(self, sequence: Sequence) -> int | None:
        """Tokens that it would compute for its first guess; None where it cannot guess for this text."""
        ...

    def draft(self, texts: list[tuple[Sequence, list[TokenId]]], *, threads: int) -> Drafted:
        """The token after each of at most `MOST_SEQUENCES` texts, which are sequences and guesses after them."""
        ...


class Speculator(Protocol):
    """Where guesses come from. The engine's thread owns it."""

    def plan(self, decoding: list[Sequence], *, costs: StepCosts, threads: int) -> None:
        """Before a step of these sequences and no prompt: set the `draft` of each, empty where none is worth it."""
        ...

    def learn(self, batch: Batch, gained: list[int], *, seconds: float, costs: StepCosts, threads: int) -> None:
        """After a step, which `costs` knows already.

        Args:
            gained: For each chunk, the tokens drawn beyond the first that no grammar forced.
        """
        ...

    def stats(self) -> SpeculationStats:
        """Counters since the start."""
        ...


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """Tokens guessed and checked, and how many of them were right; those of a draft model also by themselves."""

    num_drafted: int = 0
    num_accepted: int = 0
    num_drafted_by_model: int = 0
    num_accepted_by_model: int = 0


@dataclass(slots=True)
class Purse:
    """What guesses have won and lost, in plain steps. Empty, it ends them until plain steps have filled it again.

    It begins with `START` and gets `ALLOWANCE` of a step from each plain one; a step with guesses pays its time, that
    of making them included, and gets the time that its tokens would have taken without. No guesses are made on an empty
    purse. So with T the time of plain decoding and t that of a plain step, no run takes longer than
    ``1.02 T + START t`` and the loss of one step, however wrong every estimate is. What it holds is bounded (`FULL`),
    so that an hour of copying does not pay for an hour of losses.
    """

    steps: float = START

    def add(self, steps: float) -> None:
        """Put in, or take out."""
        self.steps = min(FULL, self.steps + steps)


@dataclass(slots=True)
class _Texts:
    """Of one sequence: where it repeats itself, what a draft model expects of it, and how often both held.

    Attributes:
        expected: What the draft model said comes after the first `at` tokens, as far as nothing else came.
        probed: The step of the last probe.
    """

    lookup: Lookup = field(default_factory=Lookup)
    acceptance: Acceptance = field(default_factory=lambda: Acceptance(memory=32))
    expected: list[Guess] = field(default_factory=list[Guess])
    at: int = 0
    drafts: Acceptance = field(default_factory=lambda: Acceptance(memory=32))
    probed: int = -PROBE_STEPS


@dataclass(slots=True)
class _Outlook:
    """What may follow one text.

    Attributes:
        chances: Of each guess there is, that it and all before it are right; falling.
        rate: The chance of a further guess that would have to be made; 0 where none can.
        most: Guesses that there can be.
        room: Guesses that can be of use until the answer ends.
        num_missing: Tokens that the draft model has to read before a further guess.
    """

    tokens: list[TokenId]
    chances: list[float]
    rate: float = 0.0
    most: int = 0
    room: int = 0
    num_missing: int = 0

    def hopes(self) -> list[float]:
        """The chances, and those of guesses that could be made."""
        hopes = list(self.chances)
        chance = (hopes[-1] if hopes else 1.0) * self.rate
        while chance >= LEAST_CHANCE and len(hopes) < self.most:
            hopes.append(chance)
            chance *= self.rate
        return hopes


@dataclass(frozen=True, slots=True)
class _Choice:
    """How many guesses to check for each text, and the tokens a second which that promises."""

    speed: float
    counts: list[int]


class AdaptiveSpeculator(Speculator):
    """Guesses in steps as wide as pays, out of the text itself and, where there is one, by a draft model."""

    def __init__(self, drafter: Drafter | None = None) -> None:
        self._drafter = drafter
        self._draft_costs = StepCosts()
        self._drafting_s = 0.0
        self._acceptance = Acceptance(memory=1000)
        self._drafts = Acceptance(memory=256)
        self._purse = Purse()
        self._trials: Counter[tuple[int, int]] = Counter()
        self._texts: dict[Sequence, _Texts] = {}
        self._by_model: set[Sequence] = set()
        """Whose guesses in the step that was planned are the draft model's."""
        self._steps = self._probed = self._ask_at = 0
        self._stats = SpeculationStats()

    def stats(self) -> SpeculationStats:
        """Counters since the start."""
        return self._stats

    # ------------------------------------------------------------------ before a step

    def plan(self, decoding: list[Sequence], *, costs: StepCosts, threads: int) -> None:
        """Set each sequence's draft: of all widths of a step, the one that promises most tokens for its time."""
        self._by_model = set()
        for sequence in decoding:
            sequence.draft = []
        if len(decoding) > MOST_SEQUENCES:
            return
        # Who runs and is in no step now has adapters whose turn comes again.
        self._texts = {s: t for s, t in self._texts.items() if s.status is Status.RUNNING or s in decoding}
        self._texts |= {s: _Texts() for s in decoding if s not in self._texts}
        for sequence in decoding:
            self._follow(sequence)
        prices = self._prices(len(decoding), costs, threads)
        if prices is None or self._purse.steps <= 0:
            return
        prior = self._acceptance.rates(PRIOR, weight=PRIOR_WEIGHT)
        outlooks = [self._repeated(s, prior) for s in decoding]
        choice = prices.best(outlooks)
        if self._drafter is not None and self._steps >= self._ask_at:
            choice, outlooks = self._ask(self._drafter, decoding, outlooks, choice, prices, threads)
        for sequence, outlook, count in zip(decoding, outlooks, choice.counts, strict=True):
            sequence.draft = outlook.tokens[:count]

    def _follow(self, sequence: Sequence) -> None:
        texts = self._texts[sequence]
        for matched, hit in texts.lookup.follow(sequence.tokens, sequence.forced):
            texts.acceptance.add(bucket_of_match(matched), hit=hit)
            self._acceptance.add(bucket_of_match(matched), hit=hit)
        for at in range(texts.at, len(sequence.tokens)):
            if not texts.expected:
                break
            guess, hit = texts.expected[0], texts.expected[0].token == sequence.tokens[at]
            texts.expected = texts.expected[1:] if hit else []
            if at not in sequence.forced:
                texts.drafts.add(bucket_of_confidence(guess.confidence), hit=hit)
                self._drafts.add(bucket_of_confidence(guess.confidence), hit=hit)
        texts.at = len(sequence.tokens)

    def _repeated(self, sequence: Sequence, prior: list[float]) -> _Outlook:
        """What followed the same words before."""
        texts = self._texts[sequence]
        guesses = texts.lookup.guess(sequence.tokens, min(WIDTHS[-1] - 1, _room(sequence)))
        if not guesses:
            return _Outlook([], [])
        rates = texts.acceptance.rates(prior, weight=PRIOR_WEIGHT)
        matches = (min(texts.lookup.matched + i, MAX_MATCH) for i in range(len(guesses)))
        return _Outlook(guesses, _chances(rates[bucket_of_match(m)] for m in matches))

    def _prices(self, num_plain: int, costs: StepCosts, threads: int) -> _Prices | None:
        """What steps of each width take; None until plain ones are known."""
        plain = costs.predict(num_plain, threads=threads)
        if plain is None or self._trials[threads, num_plain] < TRIALS:
            return None
        steps = [(w, self._cost(w, num_plain, plain, costs, threads)) for w in WIDTHS if w > num_plain]
        drafting = partial(self._drafting, costs=costs, threads=threads)
        return _Prices(num_plain, plain, steps, drafting, self._purse.steps * plain)

    def _cost(self, width: int, num_plain: int, plain: float, costs: StepCosts, threads: int) -> float:
        measured = costs.predict(width, threads=threads) or plain
        if self._trials[threads, width] >= TRIALS:
            return measured
        return min(measured, plain * (1 + HOPED_SLOPE * (width - num_plain) / num_plain))

    # ------------------------------------------------------------------ the draft model

    def _ask(
        self, drafter: Drafter, decoding: list[Sequence], repeated: list[_Outlook], choice: _Choice, prices: _Prices,
        threads: int,
    ) -> tuple[_Choice, list[_Outlook]]:  # fmt: skip
        """Have guesses made as long as more of them promise to be faster than what is there."""
        rates = self._drafts.rates(DRAFT_PRIOR, weight=PRIOR_WEIGHT)
        outlooks = [self._drafted(drafter, s, rates) or o for s, o in zip(decoding, repeated, strict=True)]
        other = prices.best(outlooks)
        if other.speed <= choice.speed:
            self._ask_at = self._steps + RECONSIDER_STEPS
            if not any(choice.counts):
                self._probe(drafter, decoding, prices, threads)
            return choice, repeated
        while any(count > len(o.tokens) for count, o in zip(other.counts, outlooks, strict=True)):
            wanting = [i for i, count in enumerate(other.counts) if count > len(outlooks[i].tokens)]
            self._extend(drafter, [decoding[i] for i in wanting], threads)
            for i in wanting:
                outlooks[i] = self._drafted(drafter, decoding[i], rates) or repeated[i]
            other = prices.best(outlooks)
        if other.speed < choice.speed:
            return choice, repeated
        self._by_model = {s for s, o, r in zip(decoding, outlooks, repeated, strict=True) if o is not r}
        return other, outlooks

    def _drafted(self, drafter: Drafter, sequence: Sequence, prior: list[float]) -> _Outlook | None:
        """What the draft model expects, and may go on to; None where it cannot guess."""
        texts, room = self._texts[sequence], _room(sequence)
        expected = texts.expected[: min(MOST_DRAFTED, room)]
        num_missing = drafter.num_missing(sequence)
        if num_missing is None and not expected:
            return None
        rates = texts.drafts.rates(prior, weight=PRIOR_WEIGHT)
        chances = _chances(rates[bucket_of_confidence(g.confidence)] for g in expected)
        is_over = num_missing is None or len(chances) < len(expected) or any(g.is_last for g in expected[-1:])
        return _Outlook(
            [g.token for g in expected], chances, rate=0.0 if is_over else self._rate(texts),
            most=min(MOST_DRAFTED, room), room=room, num_missing=num_missing or 0,
        )  # fmt: skip

    def _rate(self, texts: _Texts) -> float:
        prior = self._drafts.rate(DRAFT_RATE, weight=PRIOR_WEIGHT)
        return texts.drafts.rate(prior, weight=DRAFT_PRIOR_WEIGHT)

    def _extend(self, drafter: Drafter, sequences: list[Sequence], threads: int) -> None:
        """One more guess for each."""
        texts = [(s, [g.token for g in self._texts[s].expected]) for s in sequences]
        drafted = drafter.draft(texts, threads=threads)
        self._draft_costs.record(drafted.num_tokens, threads=threads, seconds=drafted.seconds)
        self._drafting_s += drafted.seconds
        for sequence, guess in zip(sequences, drafted.guesses, strict=True):
            if guess is not None:
                self._texts[sequence].expected.append(guess)

    def _probe(self, drafter: Drafter, decoding: list[Sequence], prices: _Prices, threads: int) -> None:
        """Have a few guesses made at a text of which too little is known, where that costs little."""
        if self._drafts.num_tries >= KNOWN_OUTCOMES and self._steps - self._probed < PROBE_GAP:
            return
        for sequence in decoding:
            texts, missing = self._texts[sequence], drafter.num_missing(sequence)
            is_known = texts.drafts.num_tries >= PROBE_OUTCOMES and self._steps - texts.probed < PROBE_STEPS
            if is_known or texts.expected or missing is None or _room(sequence) < 2 * PROBE:
                continue
            seconds = prices.drafting(missing) + (PROBE - 1) * prices.drafting(1)
            if seconds > prices.purse - prices.plain * START / 2:
                continue
            while len(texts.expected) < PROBE and all(g.confidence >= UNSURE for g in texts.expected[-1:]):
                self._extend(drafter, [sequence], threads)
                if drafter.num_missing(sequence) is None:
                    break
            self._probed = texts.probed = self._steps
            return

    def _drafting(self, num_tokens: int, *, costs: StepCosts, threads: int) -> float:
        """What the draft model takes to compute so many tokens, as far as it is known."""
        assert self._drafter is not None, "who asks has one"
        measured = self._draft_costs.predict(num_tokens, threads=threads)
        if measured is not None and num_tokens <= self._draft_costs.widest(threads=threads):
            return measured
        hoped = self._drafter.relative_cost * (costs.predict(num_tokens, threads=threads) or 0.0)
        return hoped if measured is None else min(hoped, measured)

    # ------------------------------------------------------------------ after a step

    def learn(self, batch: Batch, gained: list[int], *, seconds: float, costs: StepCosts, threads: int) -> None:
        """Book what a step took and gave. Steps that read prompts say nothing about others."""
        spent_s, self._drafting_s = self._drafting_s, 0.0
        num_sequences, guessed = len(batch.chunks), [max(0, c.num_logits - 1) for c in batch.chunks]
        plain = costs.predict(num_sequences, threads=threads)
        is_decoding = batch.num_logits == batch.num_tokens
        if sum(guessed):
            self._count(batch, guessed, gained)
            without = costs.predict(batch.num_tokens - sum(guessed), threads=threads)
            if plain is not None and without is not None:
                self._purse.add(sum(gained) / num_sequences + (without - seconds - spent_s) / plain)
        elif plain is not None:
            self._purse.add(is_decoding * ALLOWANCE - spent_s / plain)
        if is_decoding:
            self._steps += 1
            if self._steps % RETRY_STEPS == 0:
                self._trials = Counter(dict.fromkeys(self._trials, TRIALS - 1))
            self._trials[threads, batch.num_tokens] += 1

    def _count(self, batch: Batch, guessed: list[int], gained: list[int]) -> None:
        rows = [(g, a, c.sequence in self._by_model) for c, g, a in zip(batch.chunks, guessed, gained, strict=True)]
        s = self._stats
        self._stats = SpeculationStats(
            s.num_drafted + sum(g for g, _, _ in rows),
            s.num_accepted + sum(a for _, a, _ in rows),
            s.num_drafted_by_model + sum(g for g, _, is_model in rows if is_model),
            s.num_accepted_by_model + sum(a for _, a, is_model in rows if is_model),
        )


@dataclass(frozen=True, slots=True)
class _Prices:
    """What steps take now, in seconds.

    Attributes:
        plain: One without guesses.
        steps: Width and time of wider ones.
        drafting: The draft model computing so many tokens.
        purse: What guesses may lose.
    """

    num_plain: int
    plain: float
    steps: list[tuple[int, float]]
    drafting: Callable[[int], float]
    purse: float

    def best(self, outlooks: list[_Outlook]) -> _Choice:
        """The width that gives most tokens for its time; that without guesses where none is better."""
        n = self.num_plain
        likely = sorted(((p, i) for i, o in enumerate(outlooks) for p in o.hopes()), reverse=True)
        best = _Choice(n * LEAST_GAIN / self.plain, [0] * n)
        for width, seconds in self.steps:
            if width > n + len(likely):
                break
            taken = Counter(i for _, i in likely[: width - n])
            tokens = n + sum(p for p, _ in likely[: width - n])
            seconds += self._making(outlooks, taken, tokens)
            if len(taken) < n and seconds > LONGEST_WAIT * self.plain:
                continue
            if tokens / seconds > best.speed:
                best = _Choice(tokens / seconds, [taken[i] for i in range(n)])
        return best

    def _making(self, outlooks: list[_Outlook], taken: Counter[int], tokens: float) -> float:
        """Seconds for the guesses that are still to be made. What the draft model has to read first is spread over the
        tokens that it will serve; more than the purse holds is never spent on that."""
        lacking = [(i, count - len(outlooks[i].tokens)) for i, count in taken.items()]
        lacking = [(outlooks[i], more) for i, more in lacking if more > 0]
        if not lacking:
            return 0.0
        one = self.drafting(len(lacking))
        reading = max(0.0, self.drafting(sum(o.num_missing for o, _ in lacking)) - one)
        if reading > self.purse:
            return math.inf
        horizon = min(HORIZON_TOKENS, max(o.room + 1 for o, _ in lacking))
        return max(more for _, more in lacking) * one + reading * tokens / horizon


def _room(sequence: Sequence) -> int:
    """Guesses that can be of use: the step itself gives one token."""
    return max(0, sequence.request.max_tokens - sequence.num_output - 1)


def _chances(rates: Iterable[float]) -> list[float]:
    """The chance of each guess that it and all before are right, as far as it is worth a look."""
    chances, chance = list[float](), 1.0
    for rate in rates:
        chance *= rate
        if chance < LEAST_CHANCE:
            break
        chances.append(chance)
    return chances
