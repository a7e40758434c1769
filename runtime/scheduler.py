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
from dataclasses import dataclass, field

from edge.errors import ContextOverflow
from runtime.batch import Batch, CacheOp, Chunk, CopyPrefix, DropState, RestoreState, SaveState, Truncate
from runtime.fair_shares import FairShares, share_out
from runtime.request import AdapterSet, FinishReason, Request, RequestId, TokenId
from runtime.sequence import Sequence, Status
from runtime.states import MIN_STATE_TOKENS, SavedState, SavedStates, common_prefix
from runtime.turns import Turns

MIN_SHARED_TOKENS = 32
"""A prefix shorter than this is not worth waiting for, nor worth a copy between slots."""
MAX_IDLE_CELLS = 256
"""Cells that slots without a sequence may hold while others run. Attention looks at every used cell of the cache:
1,500 idle ones made a one-token step of the default model 19 % longer. Saved, they come back in a millisecond."""
CLASS_RATIO = 16
"""What a class of priority gets, against the class after it."""
TAKE_AFTER_TOKENS = 64
"""Tokens that a class must have had beyond its share before one of its sequences gives its slot to a higher class:
saving and restoring after each token would cost more than they gain."""
GROWTH_TOKENS = 32
"""A sequence is admitted where every running one can grow by so many tokens, or to its end: so many steps pass before
one has to give way again. Without it two long answers in few cells take turns at each token."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the backend can hold and the scheduler may plan.

    Attributes:
        num_slots: Sequences computed at once.
        num_cells: KV cells that all slots share.
        step_tokens: Most tokens of a step.
        max_prefills: Prompts that are read beside each other; the rest wait their turn.
        partial_reuse: Whether a sequence's cells can be cut or shared at any length; recurrent models only go on
            from where they stand.
        state_cells: Cells that states saved outside the cache may hold together; 0 saves none.
    """

    num_slots: int
    num_cells: int
    step_tokens: int
    max_prefills: int = 8
    partial_reuse: bool = True
    state_cells: int = 0


@dataclass(slots=True, eq=False)
class Slot:
    """A place in the KV cache and the tokens whose cells it holds, of a running sequence or of one long gone; they
    were computed with `adapters`, and are of use only with them."""

    index: int
    tokens: list[TokenId] = field(default_factory=list[TokenId])
    adapters: AdapterSet = ()
    sequence: Sequence | None = None
    last_used: int = 0


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
        prompt_tokens: Most prompt tokens of a step, for so many tokens of decoding sequences that it has, and so much
            room beside them; without it, all the room.
    """

    def __init__(self, limits: Limits, prompt_tokens: Callable[[int, int], int] = lambda _, room: room) -> None:
        self.limits = limits
        self._prompt_tokens = prompt_tokens
        self._classes: FairShares[int] = FairShares()
        self._tenants: FairShares[str] = FairShares()
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._slots = [Slot(i) for i in range(limits.num_slots)]
        self._ops: list[CacheOp] = []
        self._states = SavedStates(limits.state_cells)
        self._turns = Turns()
        self._adapters: AdapterSet = ()
        self._arrivals = 0
        self._clock = 0
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
        return bool(self.waiting or self.running)

    def stats(self) -> SchedulerStats:
        """Counts of the moment."""
        return SchedulerStats(
            len(self.waiting), len(self.running), self._preemptions, self._cells_used(), self.limits.num_cells,
            self._states.num_states,
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
        if not self.has_work:
            self._classes.reset()
            self._tenants.reset()

    def forget_cache(self) -> None:
        """Drop every slot's cells and every state from the books: a step failed half-way, and the cache was cleared."""
        self._ops = [DropState(state) for state in self._states.clear()]
        for slot in self._slots:
            slot.tokens = []

    # ------------------------------------------------------------------ one step

    def schedule(self) -> Batch | None:
        """Plan the next step, or None where nothing can be computed."""
        self._clock += 1
        self._admit()
        self._trim_idle()
        self._relieve()
        self._adapters = self._turns.choose(s.request.adapters for s in self.running)
        chunks = self._decode_chunks()
        decoding = sum(len(c.tokens) for c in chunks)
        chunks += self._prefill_chunks(self._prompt_tokens(decoding, self.limits.step_tokens - decoding))
        if not chunks:
            return None
        chunks.sort(key=lambda c: c.slot)
        ops, self._ops = tuple(self._ops), []
        batch = Batch(ops, tuple(chunks), self._adapters)
        self._turns.book(batch.num_tokens)
        return batch

    def _in_turn(self) -> list[Sequence]:
        """The running sequences that this step may compute."""
        return [s for s in self.running if s.request.adapters == self._adapters]

    def update(self, chunk: Chunk, *, num_rejected: int = 0) -> None:
        """Book a chunk as computed; the cells of its last `num_rejected` tokens, which were guessed wrong, are cut."""
        sequence = chunk.sequence
        slot = self._slots[chunk.slot]
        if slot.sequence is not sequence:
            return
        kept = len(chunk.tokens) - num_rejected
        slot.tokens.extend(chunk.tokens[:kept])
        sequence.num_computed = chunk.start + kept
        self._classes.charge(sequence.request.priority, kept * CLASS_RATIO**sequence.request.priority)
        self._charge_tenant(sequence, max(sequence.num_charged, sequence.num_computed))
        if num_rejected:
            self._ops.append(Truncate(chunk.slot, sequence.num_computed))

    # ------------------------------------------------------------------ admission

    def _admit(self) -> None:
        candidates = list(self.waiting)
        while candidates and self._may_admit():
            sequence = min(candidates, key=self._turn)
            candidates.remove(sequence)
            if self._worth_waiting(sequence):
                continue
            if not self._place_or_take(sequence):
                return  # what others would take it needs: who goes next is not passed over for being large
            self.waiting.remove(sequence)

    def _may_admit(self) -> bool:
        """Whether a slot is free, or one might be taken from a lower class."""
        if len(self.running) < self.limits.num_slots:
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
        """Place a sequence, if need be where one of a lower class stands that has had its share."""
        while len(self.running) >= self.limits.num_slots or not self._place(sequence):
            victim = max(self.running, key=lambda s: s.rank, default=None)
            if victim is None or not self._gives_way(victim, sequence):
                return False
            self._preempt(victim)
        return True

    def _gives_way(self, victim: Sequence, sequence: Sequence) -> bool:
        low, high = victim.request.priority, sequence.request.priority
        lead = TAKE_AFTER_TOKENS * CLASS_RATIO**low
        return victim.rank[0] > high and self._classes.time(low) >= self._classes.time(high) + lead

    def _worth_waiting(self, sequence: Sequence) -> bool:
        """Whether a running sequence is reading a prefix that this one would otherwise read again."""
        if not self.limits.partial_reuse:
            return False
        limit = len(sequence.tokens) - 1
        asked = sequence.request
        readers = (
            r
            for r in self.running
            if r.is_prefilling and r.request.priority <= asked.priority and r.request.adapters == asked.adapters
        )
        soon = max((common_prefix(r.tokens, sequence.tokens, limit=limit) for r in readers), default=0)
        here = max(self._best_source(sequence)[1], self._best_state(sequence)[1])
        return soon >= here + MIN_SHARED_TOKENS

    def _best_state(self, sequence: Sequence) -> tuple[SavedState | None, int]:
        """The saved state that holds the longest beginning of a sequence."""
        limit = len(sequence.tokens) - 1
        state, length = self._states.find(sequence.tokens, limit=limit, adapters=sequence.request.adapters)
        if state is not None and not self.limits.partial_reuse and length < len(state.tokens):
            return None, 0
        return state, length

    def _best_source(self, sequence: Sequence) -> tuple[Slot | None, int]:
        """The slot that holds the longest computed prefix of a sequence. One token is always left to compute."""
        best, length = None, 0
        limit = len(sequence.tokens) - 1
        for slot in self._slots:
            if slot.adapters != sequence.request.adapters:
                continue
            n = common_prefix(slot.tokens, sequence.tokens, limit=limit)
            if not self.limits.partial_reuse and (n < len(slot.tokens) or slot.sequence is not None):
                continue
            if n > length or (n == length and n and slot.sequence is None):
                best, length = slot, n
        return best, length

    def _place(self, sequence: Sequence) -> bool:
        source, length = self._best_source(sequence)
        state, saved = self._best_state(sequence)
        if state is not None and saved >= length + MIN_SHARED_TOKENS:
            return self._place_restored(sequence, state, saved)
        targets = [self._choose_slot(source, length)]
        if source is not None and source.sequence is None and targets[0] is not source:
            targets.append(source)  # without room for a copy, take over what would be copied
        for target in targets:
            # What the target holds beyond the shared prefix goes when it is taken over.
            freed = len(target.tokens)
            if self._make_room(
                self._cells_to_grow(sequence) - freed, keep={target.index, source.index if source else -1}
            ):
                self._take(target, sequence, source, length)
                return True
        return False

    def _place_restored(self, sequence: Sequence, state: SavedState, length: int) -> bool:
        self._states.use(state)
        target = self._choose_slot(None, 0)
        cells = max(self._cells_to_grow(sequence), len(state.tokens))  # the whole state is put back before it is cut
        if not self._make_room(cells - len(target.tokens), keep={target.index}):
            return False
        self._drop_cells(target)
        if self._states.holds(state):  # else what was saved to make room has pushed it out
            self._ops.append(RestoreState(target.index, state.id, length))
            target.tokens = state.tokens[:length]
        self._occupy(target, sequence)
        return True

    def _choose_slot(self, source: Slot | None, length: int) -> Slot:
        """Take over the source where little of it is lost, else the idle slot that was used longest ago."""
        idle = [s for s in self._slots if s.sequence is None]
        if source in idle and (length * 2 >= len(source.tokens) or len(idle) == 1):
            return source
        return min((s for s in idle if s is not source), key=lambda s: (bool(s.tokens), s.last_used, s.index))

    def _take(self, target: Slot, sequence: Sequence, source: Slot | None, length: int) -> None:
        if source is target:
            if len(target.tokens) - length >= MIN_STATE_TOKENS:
                self._save(target)
            self._ops.append(Truncate(target.index, length))
            del target.tokens[length:]
        else:
            self._drop_cells(target)
            if source is not None and length >= MIN_SHARED_TOKENS and self.limits.partial_reuse:
                self._ops.append(CopyPrefix(source.index, target.index, length))
                target.tokens = source.tokens[:length]
        self._occupy(target, sequence)

    def _occupy(self, target: Slot, sequence: Sequence) -> None:
        target.sequence = sequence
        target.adapters = sequence.request.adapters
        target.last_used = self._clock
        sequence.slot = target.index
        sequence.num_computed = len(target.tokens)
        if not sequence.num_preemptions:
            sequence.num_cached = min(len(target.tokens), sequence.num_prompt)
        sequence.status = Status.RUNNING
        self.running.append(sequence)
        self._classes.serve(sequence.request.priority)
        self._tenants.serve(sequence.request.tenant)
        sequence.num_charged = sequence.num_computed
        self._charge_tenant(sequence, len(sequence.tokens))

    # ------------------------------------------------------------------ cells

    def _cells_used(self) -> int:
        return sum(len(s.tokens) for s in self._slots)

    def _reserved(self) -> int:
        """Cells that running sequences still need for tokens they already have."""
        return sum(s.num_pending for s in self.running)

    def _cells_to_grow(self, sequence: Sequence) -> int:
        """Cells that a sequence needs, and beside which it and the running ones can grow for a while."""
        growth = (min(GROWTH_TOKENS, s.request.max_tokens - s.num_output) for s in (sequence, *self.running))
        return len(sequence.tokens) + sum(growth)

    def _make_room(self, cells: int, *, keep: set[int]) -> bool:
        """Drop idle slots' cells, longest unused first, until `cells` more fit."""
        free = self.limits.num_cells - self._cells_used() - self._reserved()
        if free >= cells:
            return True
        idle = sorted(
            (s for s in self._slots if s.sequence is None and s.tokens and s.index not in keep),
            key=lambda s: s.last_used,
        )
        for slot in idle:
            if free >= cells:
                break
            free += len(slot.tokens)
            self._drop_cells(slot)
        return free >= cells

    def _trim_idle(self) -> None:
        """While something runs, move what idle slots hold beyond a little to the saved states, longest unused first."""
        if not self.running or not self.limits.state_cells:
            return
        idle = [s for s in self._slots if s.sequence is None and s.tokens]
        excess = sum(len(s.tokens) for s in idle) - MAX_IDLE_CELLS
        for slot in sorted(idle, key=lambda s: s.last_used) if excess > 0 else ():
            if excess > 0:
                excess -= len(slot.tokens)
                self._drop_cells(slot)

    def _drop_cells(self, slot: Slot) -> None:
        """Empty a slot; what it held is saved where that is worth it."""
        if slot.tokens:
            self._save(slot)
            self._ops.append(Truncate(slot.index, 0))
            slot.tokens = []

    def _save(self, slot: Slot) -> None:
        state, dropped = self._states.add(slot.tokens, adapters=slot.adapters)
        self._ops += [DropState(d) for d in dropped]
        if state is not None:
            self._ops.append(SaveState(slot.index, state.id))

    def _release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        slot = self._slots[sequence.slot]
        slot.sequence = None
        slot.last_used = self._clock
        sequence.slot = None
        self.running.remove(sequence)
        self._charge_tenant(sequence, sequence.num_computed)

    def _preempt(self, sequence: Sequence) -> None:
        """Give a running sequence's cells back; it goes on later from the saved state, or is computed again."""
        assert sequence.slot is not None
        slot = self._slots[sequence.slot]
        self._release(sequence)
        self._drop_cells(slot)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        sequence.status = Status.WAITING
        self._preemptions += 1
        self._wait(sequence)

    # ------------------------------------------------------------------ chunks

    def _relieve(self) -> None:
        """Where the cells do not reach, the youngest of the lowest class gives way."""
        while not self._make_room(0, keep=set()) and len(self.running) > 1:
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
        if not draft or not chunk.num_logits or not self.limits.partial_reuse:
            return chunk
        free = self.limits.num_cells - self._cells_used() - self._reserved()
        draft = draft[: max(0, min(room, free // len(self.running)))]
        return Chunk(chunk.sequence, chunk.slot, chunk.start, chunk.tokens + draft, num_logits=1 + len(draft))

    def _prefill_chunks(self, room: int) -> list[Chunk]:
        """Share the budget among the classes of priority, in each among its tenants, and so among their prompts."""
        prompts = sorted((s for s in self._in_turn() if s.is_prefilling), key=self._turn)
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
        shares = {oldest.arrival: min(oldest.num_pending, max(1, room // 4))}
        left = room - shares[oldest.arrival]
        for s in sorted(prompts, key=lambda s: (s.num_pending, s.arrival))[: self.limits.max_prefills]:
            more = min(s.num_pending - shares.get(s.arrival, 0), left)
            if more > 0:
                shares[s.arrival] = shares.get(s.arrival, 0) + more
                left -= more
        return shares

    @staticmethod
    def _chunk(sequence: Sequence, length: int) -> Chunk:
        assert sequence.slot is not None
        start = sequence.num_computed
        tokens = sequence.tokens[start : start + length]
        return Chunk(sequence, sequence.slot, start, tokens, num_logits=int(start + length == len(sequence.tokens)))


def _split(
    prompts: list[Sequence], room: int, key: Callable[[Sequence], str | int], weight: Callable[[Sequence], float]
) -> list[tuple[list[Sequence], int]]:
    """Prompts by group, and each group's part of the room; who is next in turn comes first."""
    groups: dict[str | int, list[Sequence]] = {}
    for s in prompts:
        groups.setdefault(key(s), []).append(s)
    members = list(groups.values())
    wants = [(weight(m[0]), sum(s.num_pending for s in m)) for m in members]
    return list(zip(members, share_out(room, wants), strict=True))
