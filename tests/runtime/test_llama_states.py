"""Saved states of the real library where memory lacks: not read, told, and nothing ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from edge.store.models import ModelStore
from runtime.backends import llama_cpp
from runtime.backends.base import StateRefused
from runtime.backends.llama_cpp import LlamaBackend, LlamaOptions
from runtime.batch import Batch, CacheOp, Chunk, RestoreState, SaveState
from runtime.request import Request, RequestId
from runtime.sequence import Sequence
from runtime.states import StateId
from tests.support import DEFAULT_MODEL, SEED

TOKENS = list(range(1, 65))
STATE_BYTES = 2 << 20
"""Room for one state of these, not for two."""


@pytest.fixture
def backend() -> Iterator[LlamaBackend]:
    options = LlamaOptions(1, 2, len(TOKENS), 512, 4 << 30, state_bytes=STATE_BYTES)
    backend = LlamaBackend(ModelStore(SEED).get(DEFAULT_MODEL).weights, options)
    sequence = Sequence(Request(RequestId(0), tuple(TOKENS), 1), 0)
    backend.decode(Batch((), (Chunk(sequence, 0, 0, TOKENS, num_logits=1),)))
    yield backend
    backend.close()


def do(backend: LlamaBackend, *ops: CacheOp) -> list[StateId]:
    backend.decode(Batch(ops, ()))
    return backend.take_unsaved()


def test_states_keep_to_their_budget_by_their_real_size(backend: LlamaBackend) -> None:
    assert do(backend, SaveState(0, StateId(1)), SaveState(0, StateId(2))) == [2]
    assert STATE_BYTES / 2 < len(backend.state(StateId(1))) < STATE_BYTES
    assert do(backend, RestoreState(1, StateId(1), 60)) == []
    with pytest.raises(StateRefused):
        do(backend, RestoreState(1, StateId(2), 60))


def test_a_state_for_which_memory_lacks_is_not_read(backend: LlamaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def takeable_bytes(*, promised_bytes: int) -> int:
        return STATE_BYTES - promised_bytes

    monkeypatch.setattr(llama_cpp, "takeable_bytes", takeable_bytes)
    assert not backend.has_room(STATE_BYTES)
    assert do(backend, SaveState(0, StateId(1))) == [1]


def test_an_allocation_that_fails_is_no_end(backend: LlamaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(*_: object) -> object:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp.np, "empty", lack)
        backend._apply(SaveState(0, StateId(1)))  # pyright: ignore[reportPrivateUsage]  # a step needs numpy too
    assert backend.take_unsaved() == [1]
    assert do(backend, SaveState(0, StateId(1))) == []
