"""Which tokens the next step computes. Pure: token ids and numbers, no backend and no clock.

Continuous batching with chunked prefill (Yu et al. 2022, "Orca"; Agrawal et al. 2023, "Sarathi"): every decoding
sequence gets its token in every step, and prompts share what is left of the step's token budget.

Between classes of priority and between tenants, shares are fair over the tokens computed (`runtime.fair_shares`). A
class of priority gets `CLASS_RATIO` times what the next one gets, while both want more than there is: so the first is
served almost alone, and none starves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from edge.errors import ContextOverflow
from runtime.batch import Batch, Chunk
from runtime.fair_shares import FairShares, share_out
from runtime.prefix_cache import PrefixCache, Slot
from runtime.request import AdapterSet, FinishReason, Request, RequestId
from runtime.sequence import Sequence, Status
from runtime.states import NO_STATES, StateLimits
from runtime.turns import Turns

CLASS_RATIO = 16
"""What a class of priority gets, against the class after it."""
TAKE_AFTER_TOKENS = 64
"""Tokens that a class must have had beyond its share before one of its sequences gives its slot to a higher class:
saving and restoring after each token would cost more than they gain."""
GROWTH_TOKENS = 32
"""A sequence is admitted where every running one can grow by so many tokens, or to its end: so many steps pass before
one has to give way again. Without it two long answers in few cells take turns at each token."""
MAX_SCORED_TOKENS = 32
"""Of one prompt whose scores are wanted, in one step: each has a row as long as the vocabulary, and what that tells is
computed between two steps."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the backend can hold and the scheduler may plan.

    Attributes:
        num_slots: Sequences computed at once.
        num_cells: KV cells that all slots share.
        step_tokens: Most tokens of a step.
        max_prefills: Prompts that are read beside each other; the rest wait their turn.
        states: What may be kept outside the cells, and whether cells can be cut or shared at any length.
    """

    num_slots: int
    num_cells: int
    step_tokens: int
    max_prefills: int = 8
    states: StateLimits = NO_STATES


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """A view of the queues. Cells that two slots share count twice."""

    num_waiting: int
    num_running: int
    num_preemptions: int
    cells_used: int
    num_cells: int
    num_states: int = 0


class Scheduler:
    """Admits, batches, preempts and retires sequences.

    A caller loops: `add` and `cancel` at any time between steps; `schedule`; compute the batch; `update` each chunk.
    Not thread-safe: one thread owns it.

    Args:
        prompt_tokens: Prompt tokens of a step, for so many tokens of decoding sequences that it has, and so many wanted
            for which it has room; without it, all of these.
    """

    def __init__(self, limits: Limits, prompt_tokens: Callable[[int, int], int] = lambda _, room: room) -> None:
        self.limits = limits
        self._prompt_tokens = prompt_tokens
        self._classes: FairShares[int] = FairShares()
        self._tenants: FairShares[str] = FairShares()
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.cache = PrefixCache(
            num_slots=limits.num_slots, num_cells=limits.num_cells, states=limits.states, reserved=self._reserved
        )
        self._turns = Turns(CLASS_RATIO)
        self._adapters: AdapterSet = ()
        self._arrivals = 0
        self._preemptions = 0

    def add(self, request: Request) -> Sequence:
        """Queue a request behind those of its tenant and priority.

        Raises:
            ContextOverflow: It could never fit the cells, however empty.
        """
        if len(request.prompt) + request.max_tokens > self.limits.num_cells:
            raise ContextOverflow(
                limit_tokens=self.limits.num_cells,
                prompt_tokens=len(request.prompt),
                completion_tokens=request.max_tokens,
            )
        self._arrivals += 1
        sequence = Sequence(request, self._arrivals)
        self._wait(sequence)
        return sequence

    @property
    def has_work(self) -> bool:
        """Whether `schedule` may find something to do."""
        return bool(self.waiting or self.running or self.cache.has_ops)

    def stats(self) -> SchedulerStats:
        """Counts of the moment."""
        return SchedulerStats(
            len(self.waiting), len(self.running), self._preemptions, self.cache.cells_used, self.limits.num_cells,
            self.cache.states.num_states,
        )  # fmt: skip

    def sequences(self) -> Iterable[Sequence]:
        """All that is not finished."""
        return [*self.running, *self.waiting]

    def cancel(self, request_id: RequestId) -> Sequence | None:
        """Drop a sequence; its slot is free at once and keeps the cells as cache. None if it is unknown."""
        for sequence in self.sequences():
            if sequence.request.id == request_id:
                self.retire(sequence, reason=None)
                return sequence
        return None

    def hold(self, request_id: RequestId, *, is_held: bool) -> None:
        """Compute nothing of a sequence, since nobody reads its answer, or go on with it. An unknown one is ignored."""
        for sequence in self.sequences():
            if sequence.request.id == request_id:
                sequence.is_held = is_held

    def retire(self, sequence: Sequence, *, reason: FinishReason | None) -> None:
        """End a sequence, finished or cancelled."""
        if sequence.slot is not None:
            self._release(sequence)
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
            self._classes.leave(sequence.request.priority)
            self._tenants.leave(sequence.request.tenant)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        if not (self.waiting or self.running):
            self._classes.reset()
            self._tenants.reset()

    def restart(self) -> None:
        """The cache was cleared: what runs is computed again, from its beginning or from what comes from the disk."""
        self.cache.forget()
        for sequence in list(self.running):
            if sequence.num_computed <= sequence.num_cached:
                sequence.num_cached = 0  # it had nothing of it yet
            self._preempt(sequence)

    # ------------------------------------------------------------------ one step

    def schedule(self, guess: Callable[[list[Sequence]], None] | None = None) -> Batch | None:
        """Plan the next step, or None where there is nothing to do. Without chunks it only changes the cache.

        Args:
            guess: Told of the sequences of the step; it may set the `draft` of each.
        """
        self.cache.keep_checkpoints(self.running)
        self._admit()
        if self.running:
            self.cache.trim_idle()
        self._relieve()
        wanted = ((s.request.adapters, s.request.priority) for s in self.running if not s.is_held)
        self._adapters = self._turns.choose(wanted)
        if guess is not None:
            guess(self._in_turn())
        chunks = self._decode_chunks()
        chunks += self._prefill_chunks(sum(len(c.tokens) for c in chunks))
        chunks.sort(key=lambda c: c.slot)
        ops = self.cache.take_ops()
        if not (ops or chunks):
            return None
        batch = Batch(ops, tuple(chunks), self._adapters)
        self._turns.book(batch.num_tokens)
        return batch

    def pausing(self) -> list[Sequence]:
        """The answers that pause while this step reads prompts, but for those of a lower class than one of these."""
        in_turn = self._in_turn()
        urgent = min((s.request.priority for s in in_turn if s.is_prefilling), default=0)
        return [s for s in in_turn if not s.is_prefilling and s.request.priority <= urgent]

    def _in_turn(self) -> list[Sequence]:
        """The running sequences that this step may compute."""
        return [s for s in self.running if s.request.adapters == self._adapters and not s.is_held]

    def update(self, chunk: Chunk, *, num_rejected: int = 0) -> None:
        """Book a chunk as computed; the cells of its last `num_rejected` tokens, which were guessed wrong, are cut."""
        sequence = chunk.sequence
        if sequence.slot != chunk.slot:
            return
        slot = self.cache.slots[chunk.slot]
        kept = len(chunk.tokens) - num_rejected
        self.cache.append(slot, chunk.tokens[:kept])
        sequence.num_computed = chunk.start + kept
        if chunk.num_scored:
            sequence.num_scored = max(sequence.num_scored, chunk.start + chunk.num_scored)
        self._classes.charge(sequence.request.priority, kept * CLASS_RATIO**sequence.request.priority)
        self._charge_tenant(sequence, max(sequence.num_charged, sequence.num_computed))
        if num_rejected:
            self.cache.cut(slot, sequence.num_computed)

    # ------------------------------------------------------------------ admission

    def _admit(self) -> None:
        if not self.waiting or not self._may_admit():
            return
        candidates = sorted((s for s in self.waiting if not s.is_held), key=self._turn, reverse=True)
        while candidates and self._may_admit():
            sequence = candidates.pop()
            if self._must_wait(sequence):
                continue
            if not self._place_or_take(sequence):
                return  # what others would take it needs: who goes next is not passed over for being large
            self.waiting.remove(sequence)
            candidates.sort(key=self._turn, reverse=True)

    def _may_admit(self) -> bool:
        """Whether a slot is free, or one might be taken from a lower class or from who does not read."""
        if len(self.running) < self.limits.num_slots or any(s.is_held for s in self.running):
            return True
        return min(s.request.priority for s in self.waiting) < max(s.request.priority for s in self.running)

    def _turn(self, sequence: Sequence) -> tuple[float, int, float, int]:
        """Who is admitted first: the least."""
        request = sequence.request
        class_time, tenant_time = self._classes.time(request.priority), self._tenants.time(request.tenant)
        return class_time, request.priority, tenant_time, sequence.arrival

    def _wait(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self._classes.enter(sequence.request.priority)
        self._tenants.enter(sequence.request.tenant)

    def _charge_tenant(self, sequence: Sequence, num_charged: int) -> None:
        """Have the tenant pay up to there, or give it back down to there."""
        request = sequence.request
        self._tenants.charge(request.tenant, (num_charged - sequence.num_charged) / request.weight)
        sequence.num_charged = num_charged

    def _place_or_take(self, sequence: Sequence) -> bool:
        """Place a sequence, if need be where one stands that nobody reads, or one of a lower class that has had its
        share."""
        while len(self.running) >= self.limits.num_slots or not self._place(sequence):
            victim = max(self.running, key=lambda s: s.rank, default=None)
            if victim is None or not self._gives_way(victim, sequence):
                return False
            self._preempt(victim)
        return True

    def _gives_way(self, victim: Sequence, sequence: Sequence) -> bool:
        if victim.is_held:
            return True
        low, high = victim.request.priority, sequence.request.priority
        lead = TAKE_AFTER_TOKENS * CLASS_RATIO**low
        return victim.priority > high and self._classes.time(low) >= self._classes.time(high) + lead

    def _must_wait(self, sequence: Sequence) -> bool:
        """Whether a prefix is on its way that the sequence would otherwise compute; not from one who may starve."""
        priority = sequence.request.priority
        readers = (r for r in self.running if r.request.priority <= priority and not r.is_held)
        return self.cache.must_wait(sequence, readers)

    def _place(self, sequence: Sequence) -> bool:
        slot = self.cache.place(sequence, cells=self._cells_to_grow(sequence))
        if slot is not None:
            self._start(sequence, slot)
        return slot is not None

    def _start(self, sequence: Sequence, slot: Slot) -> None:
        sequence.slot = slot.index
        sequence.num_computed = len(slot.tokens)
        if not sequence.num_preemptions:
            sequence.num_cached = min(len(slot.tokens), sequence.num_prompt)
        sequence.status = Status.RUNNING
        self.running.append(sequence)
        self._classes.serve(sequence.request.priority)
        self._tenants.serve(sequence.request.tenant)
        sequence.num_charged = sequence.num_computed
        self._charge_tenant(sequence, len(sequence.tokens))

    # ------------------------------------------------------------------ cells

    def _reserved(self) -> int:
        """Cells that running sequences still need for tokens they already have."""
        return sum(s.num_pending for s in self.running)

    def _cells_to_grow(self, sequence: Sequence) -> int:
        """Cells that a sequence needs, and beside which it and the running ones can grow for a while."""
        growth = (min(GROWTH_TOKENS, s.request.max_tokens - s.num_output) for s in (sequence, *self.running))
        return len(sequence.tokens) + sum(growth)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.cache.release(self.cache.slots[sequence.slot])
        sequence.slot = None
        self.running.remove(sequence)
        self._charge_tenant(sequence, sequence.num_computed)

    def _preempt(self, sequence: Sequence) -> None:
        """Give a running sequence's cells back; it goes on later from the saved state, or is computed again."""
        assert sequence.slot is not None
        slot = self.cache.slots[sequence.slot]
        self._release(sequence)
        self.cache.empty(slot)
        sequence.num_computed = 0
        sequence.checkpoints.clear()  # they are set anew when it is placed
        sequence.num_preemptions += 1
        sequence.status = Status.WAITING
        self._preemptions += 1
        self._wait(sequence)

    # ------------------------------------------------------------------ chunks

    def _relieve(self) -> None:
        """Where the cells do not reach, one that nobody reads gives way, or the youngest of the lowest class."""
        while not self.cache.make_room(0, keep=set()) and len(self.running) > 1:
            self._preempt(max(self.running, key=lambda s: s.rank))

    def _decode_chunks(self) -> list[Chunk]:
        """What every decoding sequence of the turn has pending."""
        decoding = [s for s in self._in_turn() if not s.is_prefilling]
        room = self.limits.step_tokens - len(decoding)
        chunks: list[Chunk] = []
        for s in decoding:
            chunk = self._chunk(s, min(s.num_pending, 1 + room))
            room -= len(chunk.tokens) - 1
            chunks.append(chunk)
        return [self._with_draft(c, room // len(chunks)) for c in chunks]

    def _with_draft(self, chunk: Chunk, room: int) -> Chunk:
        """The chunk with the guesses for which there is room, in the step and in the cells that nobody needs."""
        draft = chunk.sequence.draft
        if not draft or not chunk.num_logits or not self.limits.states.partial_reuse:
            return chunk
        free = self.limits.num_cells - self.cache.cells_used - self._reserved()
        draft = draft[: max(0, min(room, free // len(self.running)))]
        return Chunk(chunk.sequence, chunk.slot, chunk.start, chunk.tokens + draft, num_logits=1 + len(draft))

    def _prefill_chunks(self, num_decoding: int) -> list[Chunk]:
        """Share what the step has beside tokens of decoding sequences among the classes of priority, in each among its
        tenants, and so among their prompts."""
        prompts = sorted((s for s in self._in_turn() if s.is_prefilling), key=self._turn)
        scored = [s for s in prompts if s.wants_scores]
        prompts = [s for s in prompts if s not in scored[1:]]
        if not prompts:
            return []
        wanted = sum(map(_num_wanted, prompts))
        room = self._prompt_tokens(num_decoding, min(wanted, self.limits.step_tokens - num_decoding))
        shares: dict[int, int] = {}
        for members, part in _split(
            prompts, room, lambda s: s.request.priority, lambda s: CLASS_RATIO**-s.request.priority
        ):
            for own, tokens in _split(members, part, lambda s: s.request.tenant, lambda s: s.request.weight):
                shares |= self._shares(own, tokens)
        return [self._chunk(s, shares[s.arrival]) for s in prompts if s.arrival in shares]

    def _shares(self, prompts: list[Sequence], room: int) -> dict[int, int]:
        """Tokens by arrival: a quarter to the prompt that waits longest, the rest to the shortest remainders.

        Shortest first keeps a short question from waiting behind a long document; the quarter keeps the document
        from starving.
        """
        if room <= 0:
            return {}
        oldest = min(prompts, key=lambda s: s.arrival)
        shares = {oldest.arrival: min(_num_wanted(oldest), max(1, room // 4))}
        left = room - shares[oldest.arrival]
        for s in sorted(prompts, key=lambda s: (_num_wanted(s), s.arrival))[: self.limits.max_prefills]:
            more = min(_num_wanted(s) - shares.get(s.arrival, 0), left)
            if more > 0:
                shares[s.arrival] = shares.get(s.arrival, 0) + more
                left -= more
        return shares

    @staticmethod
    def _chunk(sequence: Sequence, length: int) -> Chunk:
        assert sequence.slot is not None
        start, length = sequence.num_computed, sequence.before_checkpoint(length)
        tokens = sequence.tokens[start : start + length]
        if sequence.wants_scores:
            num_scored = min(length, sequence.num_prompt - 1 - start)
            return Chunk(sequence, sequence.slot, start, tokens, num_logits=length, num_scored=num_scored)
        return Chunk(sequence, sequence.slot, start, tokens, num_logits=int(start + length == len(sequence.tokens)))


def _num_wanted(sequence: Sequence) -> int:
    """Tokens of a prompt that a step may compute."""
    return min(sequence.num_pending, MAX_SCORED_TOKENS) if sequence.wants_scores else sequence.num_pending


def _split(
    prompts: list[Sequence], room: int, key: Callable[[Sequence], str | int], weight: Callable[[Sequence], float]
) -> list[tuple[list[Sequence], int]]:
    """Prompts by group, and each group's part of the room; who is next in turn comes first."""
    groups: dict[str | int, list[Sequence]] = {}
    for s in prompts:
        groups.setdefault(key(s), []).append(s)
    members = list(groups.values())
    wants = [(weight(m[0]), sum(map(_num_wanted, m))) for m in members]
    return list(zip(members, share_out(room, wants), strict=True))
