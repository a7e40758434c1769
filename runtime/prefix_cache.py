"""Which computed tokens a prompt goes on from: cells of the KV cache, states in memory, states on the disk.

Pure: token ids and numbers. The scheduler asks where a sequence goes and gets a slot; the changes to the cells that
make it so are given to the backend with the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import itemgetter

from runtime.batch import CacheOp, CopyPrefix, DropState, RestoreState, SaveState, Truncate
from runtime.radix import RadixTree, common_prefix
from runtime.request import TokenId
from runtime.sequence import Sequence
from runtime.states import HOT_USES, MIN_STATE_TOKENS, DiskOp, SavedState, SavedStates, Scope, StateLimits, scope_of

MIN_SHARED_TOKENS = 32
"""A prefix shorter than this is not worth waiting for, nor worth putting back a state."""
MIN_COPIED_TOKENS = 4
"""A prefix in another slot is shared from so many on: its cells are marked, not copied. Chat templates begin alike."""
MIN_PARTING_TOKENS = 8
"""Where a prompt leaves a cached text so many tokens before its end, it is another text with the same beginning; a chat
that goes on leaves none, or the few in which the template writes an answer otherwise than the model did."""
MAX_IDLE_CELLS = 256
"""Cells that slots without a sequence may hold while others run. Attention looks at every used cell of the cache:
1,500 idle ones made a one-token step of the default model 19 % longer. Saved, they come back in a millisecond."""

NOBODY = Scope()


@dataclass(slots=True, eq=False)
class Slot:
    """A place in the KV cache and the tokens whose cells it holds, of a running sequence or of one long gone.

    Attributes:
        scope: Who may go on from what it holds.
        affinity: The `prompt_cache_key` of the request that filled it.
        shared_from: It serves from so many tokens on: it was put back from a state that lacks what lay before a sliding
            window.
    """

    index: int
    tokens: list[TokenId] = field(default_factory=list[TokenId])
    is_busy: bool = False
    scope: Scope = NOBODY
    affinity: str = ""
    last_used: int = 0
    shared_from: int = 0


class PrefixCache:
    """The slots, what was saved from them, and the rules by which prompts share them.

    Args:
        num_cells: KV cells that all slots share.
        partial_reuse: Whether cells can be cut or shared at any length.
        reserved: Cells that running sequences still need for tokens they already have.
    """

    def __init__(self, *, num_slots: int, num_cells: int, states: StateLimits, reserved: Callable[[], int]) -> None:
        self.slots = [Slot(i) for i in range(num_slots)]
        self.states = SavedStates(states)
        self._num_cells = num_cells
        self._partial = states.partial_reuse
        self._reserved = reserved
        self._trees: dict[Scope, RadixTree[int]] = {}
        self._ops: list[CacheOp] = []
        self._clock = 0

    @property
    def cells_used(self) -> int:
        """Cells in use. Cells that two slots share count twice."""
        return sum(len(s.tokens) for s in self.slots)

    @property
    def has_ops(self) -> bool:
        """Whether something waits for `take_ops`."""
        return bool(self._ops)

    def take_ops(self) -> tuple[CacheOp, ...]:
        """The changes to the cells since the last call, for the backend, in order."""
        ops, self._ops = tuple(self._ops), []
        return ops

    def take_disk_ops(self) -> list[DiskOp]:
        """What the disk has to do; see :meth:`SavedStates.take_disk_ops`."""
        return self.states.take_disk_ops()

    def forget(self) -> None:
        """Drop every slot's cells and every state in memory from the books: the cache was cleared."""
        self._ops = []
        for slot in self.slots:
            self._set_tokens(slot, [])
        self.states.clear()
        self._drop_states()

    # ------------------------------------------------------------------ cells of a slot

    def append(self, slot: Slot, tokens: list[TokenId]) -> None:
        """Book tokens that were computed in a slot."""
        if slot.tokens:
            self._trees[slot.scope].extend(slot.index, tokens)
        else:
            self._trees.setdefault(slot.scope, RadixTree()).insert(slot.index, tokens)
        slot.tokens.extend(tokens)

    def cut(self, slot: Slot, length: int) -> None:
        """Drop what a slot holds beyond its first `length` tokens."""
        self._ops.append(Truncate(slot.index, length))
        if length < len(slot.tokens):
            self._set_tokens(slot, slot.tokens[:length])

    def empty(self, slot: Slot) -> None:
        """Drop all that a slot holds; it is saved where that is worth it."""
        if slot.tokens:
            self._save(slot)
            self.cut(slot, 0)

    def release(self, slot: Slot) -> None:
        """A slot's sequence is gone; what it computed stays for others."""
        slot.is_busy = False
        self._clock += 1
        slot.last_used = self._clock

    def _set_tokens(self, slot: Slot, tokens: list[TokenId]) -> None:
        if slot.tokens:
            tree = self._trees[slot.scope]
            tree.remove(slot.index)
            if not len(tree):
                del self._trees[slot.scope]
        slot.tokens = []
        if tokens:
            self.append(slot, tokens)
        else:
            slot.shared_from = 0

    def _save(self, slot: Slot, *, uses: int = 1) -> SavedState | None:
        state = self.states.add(slot.tokens, slot.scope, uses=uses)
        self._drop_states()
        if state is not None:
            self._ops.append(SaveState(slot.index, state.id))
        return state

    def _drop_states(self) -> None:
        self._ops += [DropState(d) for d in self.states.take_dropped()]

    # ------------------------------------------------------------------ what a prompt may go on from

    def must_wait(self, sequence: Sequence, running: Iterable[Sequence]) -> bool:
        """Whether a prefix of a sequence is on its way: a running one reads it, or it comes from the disk."""
        scope = scope_of(sequence.request)
        limit = sequence.num_reusable
        here = self._best_slot(sequence)[1]
        here = max(here, self.states.find_in_memory(sequence.tokens, scope, limit=limit)[1])
        stored, length = self.states.find_on_disk(sequence.tokens, scope, limit=limit)
        if stored is not None and length >= here + MIN_SHARED_TOKENS:
            self.states.load(stored)
            return True
        reading = [r for r in running if r.is_prefilling and scope_of(r.request) in scope.visible]
        soon = [(r, n) for r in reading if (n := r.shared_with(sequence)) >= here + MIN_SHARED_TOKENS]
        return any(self._will_serve(r, n) for r, n in soon)

    def _will_serve(self, running: Sequence, length: int) -> bool:
        """Whether another prompt can go on from the beginning of what a running sequence reads: from its cells, or from
        its state, which is then saved there. Of a sequence that was computed anew it is not: where memory lacks, the
        library takes no state back, and all would begin again."""
        if self._partial:
            return running.slot is not None and length >= self.slots[running.slot].shared_from
        too_large = self.states.size_bytes(length) > self.states.limits.memory_bytes
        if running.num_computed >= length or running.num_preemptions or too_large:
            return False
        running.checkpoints.add(length)
        return True

    def _add_checkpoint(self, sequence: Sequence, slot: Slot) -> None:
        """Where a sequence parts from what was computed, and could not go on from there, have its state saved: the next
        one that parts there can (R. Pan et al., "Marconi", arXiv:2411.19379)."""
        if self.states.limits.may_cut_all:
            return
        scope, limit = scope_of(sequence.request), len(sequence.tokens) - 1
        trees = [self._trees[s] for s in scope.visible if s in self._trees]
        length = max((tree.find(sequence.tokens, limit=limit)[1] for tree in trees), default=0)
        length = max(length, self.states.num_shared(sequence.tokens, scope, limit=limit))
        if length >= len(slot.tokens) + MIN_SHARED_TOKENS:
            sequence.checkpoints.add(length)

    def keep_checkpoints(self, running: Iterable[Sequence]) -> None:
        """Save the states of sequences that the last step brought to a checkpoint."""
        for sequence in running:
            if sequence.num_computed in sequence.checkpoints and sequence.slot is not None:
                sequence.checkpoints.remove(sequence.num_computed)
                self._save(self.slots[sequence.slot], uses=HOT_USES)

    def loaded(self, state: SavedState, *, is_good: bool) -> bool:
        """Book what came of reading a state from the disk: whether the backend is to hold it."""
        holds = self.states.loaded(state, is_good=is_good)
        self._drop_states()
        return holds

    def _best_slot(self, sequence: Sequence) -> tuple[Slot | None, int]:
        """The slot that holds the longest computed prefix of a sequence."""
        best: list[Slot] = []
        length = 0
        limit = sequence.num_reusable
        for scope in scope_of(sequence.request).visible:
            if (tree := self._trees.get(scope)) is None:
                continue
            found, n = (
                tree.find(sequence.tokens, limit=limit)
                if self._partial
                else tree.find_whole(sequence.tokens, limit=limit)
            )
            slots = [s for i in found if self._serves(s := self.slots[i], n)]
            if not slots and self.states.limits.window_tokens:
                slots, n = self._search(sequence.tokens, scope, limit=limit)
            if slots and n > length:
                best, length = slots, n
        affinity = sequence.request.cache_key
        return min(best, key=lambda s: (s.is_busy, s.affinity != affinity, -s.last_used), default=None), length

    def _serves(self, slot: Slot, length: int) -> bool:
        """Whether a sequence may go on from the first `length` tokens of a slot, which it shares."""
        return length >= slot.shared_from if self._partial else not slot.is_busy

    def _search(self, tokens: list[TokenId], scope: Scope, *, limit: int) -> tuple[list[Slot], int]:
        """The slot that serves the longest beginning, where the one that shares the longest does not serve."""
        shared = [(common_prefix(s.tokens, tokens, limit=limit), s) for s in self.slots if s.scope == scope]
        length, slot = max(((n, s) for n, s in shared if self._serves(s, n)), key=itemgetter(0), default=(0, None))
        return ([slot] if slot else []), length

    # ------------------------------------------------------------------ placing a sequence

    def place(self, sequence: Sequence, *, cells: int) -> Slot | None:
        """A slot for a sequence that needs so many cells, with the longest prefix of it that is here; None where the
        cells do not reach."""
        source, length = self._best_slot(sequence)
        scope, limit = scope_of(sequence.request), sequence.num_reusable
        state, saved = self.states.find_in_memory(sequence.tokens, scope, limit=limit)
        if state is not None and saved >= length + MIN_SHARED_TOKENS:
            return self._place_restored(sequence, state, saved, cells)
        targets = [self._choose_slot(source, length)]
        if source is not None and not source.is_busy and targets[0] is not source:
            targets.append(source)  # without room for a copy, take over what would be copied
        for target in targets:
            # What the target holds beyond the shared prefix goes when it is taken over.
            freed = len(target.tokens)
            if self.make_room(cells - freed, keep={target.index, source.index if source else -1}):
                self._take(target, source, length, scope)
                return self._occupy(target, sequence)
        return None

    def _place_restored(self, sequence: Sequence, state: SavedState, length: int, cells: int) -> Slot | None:
        target = self._choose_slot(None, 0)
        cells = max(cells, len(state.tokens))  # the whole state is put back before it is cut
        if not self._has_room(cells - len(target.tokens), keep={target.index}):
            return None
        if not sequence.num_preemptions:
            self.states.use(state)  # first, so that what is saved to make room pushes out others
        self.make_room(cells - len(target.tokens), keep={target.index})
        self.empty(target)
        target.scope = scope_of(sequence.request)
        if state.in_memory:  # else what was saved to make room has pushed it out
            self._ops.append(RestoreState(target.index, state.id, length))
            self._set_tokens(target, state.tokens[:length])
            if not self.states.limits.may_cut(len(state.tokens)):
                target.shared_from = len(state.tokens)
            if len(state.tokens) > length:
                self._keep_shared(target)
        return self._occupy(target, sequence)

    def _choose_slot(self, source: Slot | None, length: int) -> Slot:
        """Take over the source where little of it is lost, else the idle slot that was used longest ago."""
        idle = [s for s in self.slots if not s.is_busy]
        if source in idle and (length * 2 >= len(source.tokens) or len(idle) == 1):
            return source
        return min((s for s in idle if s is not source), key=lambda s: (bool(s.tokens), s.last_used, s.index))

    def _take(self, target: Slot, source: Slot | None, length: int, scope: Scope) -> None:
        if source is not target:
            self.empty(target)
            target.scope = scope
            if source is not None and length >= MIN_COPIED_TOKENS and self._partial:
                self._ops.append(CopyPrefix(source.index, target.index, length))
                self._set_tokens(target, source.tokens[:length])
                target.shared_from = source.shared_from
                self._keep_shared(target)
            return
        lost = len(target.tokens) - length
        if lost >= MIN_STATE_TOKENS:
            self._save(target)
        self.cut(target, length)
        if target.scope != scope:  # what was pinned for all, gone on from by one
            tokens, shared_from = target.tokens, target.shared_from
            self._set_tokens(target, [])
            target.scope, target.shared_from = scope, shared_from
            self._set_tokens(target, tokens)
        if lost >= MIN_PARTING_TOKENS:
            self._keep_shared(target)

    def _keep_shared(self, slot: Slot) -> None:
        """Save a prefix that a second request shares, by itself: all that is in the slot now. It is what others will
        want, after a restart too, and the state of one who went on from it would hold much more."""
        if not self._partial:
            return
        known = self.states.find_near(slot.tokens, slot.scope, slack=MIN_SHARED_TOKENS)
        if known is not None:
            self.states.use(known)  # nearly the same: the questions of two users may begin with the same word
        else:
            self._save(slot, uses=HOT_USES)

    def _occupy(self, slot: Slot, sequence: Sequence) -> Slot:
        self._clock += 1
        slot.is_busy, slot.last_used, slot.affinity = True, self._clock, sequence.request.cache_key
        self._add_checkpoint(sequence, slot)
        return slot

    # ------------------------------------------------------------------ room

    def make_room(self, cells: int, *, keep: set[int]) -> bool:
        """Drop idle slots' cells, longest unused first, until `cells` more fit; none where they would not."""
        if not self._has_room(cells, keep=keep):
            return False
        free = self._free()
        for slot in self._idle():
            if free >= cells:
                break
            if slot.index not in keep:
                free += len(slot.tokens)
                self.empty(slot)
        return True

    def _has_room(self, cells: int, *, keep: set[int]) -> bool:
        free = self._free()
        return free >= cells or free + sum(len(s.tokens) for s in self._idle() if s.index not in keep) >= cells

    def _free(self) -> int:
        return self._num_cells - self.cells_used - self._reserved()

    def trim_idle(self) -> None:
        """Move what idle slots hold beyond a little to the saved states, longest unused first."""
        if not self.states.limits.memory_bytes:
            return
        idle = self._idle()
        excess = sum(len(s.tokens) for s in idle) - MAX_IDLE_CELLS
        for slot in idle:
            if excess <= 0:
                break
            excess -= len(slot.tokens)
            self.empty(slot)

    def _idle(self) -> list[Slot]:
        return sorted((s for s in self.slots if not s.is_busy and s.tokens), key=lambda s: s.last_used)

    # ------------------------------------------------------------------ pins, and the end

    def pin(self, slot: Slot, name: str) -> SavedState | None:
        """Keep what a slot holds, for all, until it is unpinned; what had that name goes. None where room lacks."""
        tokens, scope = list(slot.tokens), slot.scope
        if not self.states.may_pin(tokens, scope, name):
            return None
        state = self.states.find_near(tokens, scope, slack=0)
        if state is None or state.pin != name:
            self.unpin(name, keep=slot)
        if state is None or not state.in_memory:
            state = self._save(slot, uses=HOT_USES)
        if state is not None:
            self.states.pin(state, name)
        return state

    def unpin(self, name: str, *, keep: Slot | None = None) -> bool:
        """Let go what is pinned under a name, but for the cells of `keep`; whether something was."""
        gone = self.states.unpin(name)
        self._drop_states()
        for slot in (s for s in self._idle() if s is not keep):
            if any(slot.scope == s.scope and slot.tokens == s.tokens[: len(slot.tokens)] for s in gone):
                self.cut(slot, 0)  # unsaved: it is for all no more
        return bool(gone)

    def adopt(self, tokens: list[TokenId], scope: Scope, *, uses: int, pin: str) -> SavedState | None:
        """Take a file of an earlier run into the books; None where it cannot be used."""
        return self.states.adopt(tokens, scope, uses=uses, pin=pin) if len(tokens) <= self._num_cells else None

    def save_all(self) -> None:
        """Save what idle slots hold and have every state written: the process is about to end."""
        for slot in reversed(self._idle()):
            self.empty(slot)
        self.states.persist_all()
