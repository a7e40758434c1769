"""Which messages go where a conversation does not fit."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import ContextOverflow
from runtime import wire
from runtime.truncation import cut_conversation, droppable

SIZES = st.integers(1, 40)
Step = tuple[str, int]
turns = st.lists(
    st.tuples(st.just("user"), SIZES, st.lists(st.tuples(st.sampled_from(["assistant", "tool"]), SIZES), max_size=4)),
    max_size=6,
)


def conversation(turns: list[tuple[str, int, list[Step]]], systems: list[int]) -> list[wire.ChatMessage]:
    found = [wire.ChatMessage("system", "s" * size) for size in systems]
    for role, size, steps in turns:
        found.append(wire.ChatMessage(role, "u" * size))
        has_called = False
        for kind, length in steps:
            # a result follows a call, or another result
            has_called = has_called or kind == "assistant"
            found.append(wire.ChatMessage(kind if has_called else "assistant", "a" * length))
            has_called = True
    return found


def tokens_of(messages: list[wire.ChatMessage]) -> list[int]:
    """Two for each message, and one for each letter."""
    return [0] * sum(2 + len(m.content) for m in messages)


@given(turns, st.lists(SIZES, max_size=2), st.integers(1, 200))
def test_a_cut_conversation_fits_and_keeps_what_has_to_stay(
    turns: list[tuple[str, int, list[Step]]], systems: list[int], room: int
) -> None:
    messages = conversation(turns, systems)
    gone = {i for group in droppable([m.role for m in messages]) for i in group}
    if len(tokens_of([m for i, m in enumerate(messages) if i not in gone])) > room:
        with pytest.raises(ContextOverflow, match=f"maximum context length is {room + 10} tokens"):
            cut_conversation(messages, tokens_of, room=room, limit=room + 10)
        return
    kept, num_dropped = cut_conversation(messages, tokens_of, room=room, limit=room + 10)
    assert len(tokens_of(kept)) <= room
    assert num_dropped == len(tokens_of(messages)) - len(tokens_of(kept))
    assert [m for m in kept if m.role == "system"] == messages[: len(systems)]
    assert kept[-1:] == messages[-1:]
    users = [m for m in messages if m.role == "user"]
    assert not users or users[-1] in kept
    others = [m for m in kept if m.role != "system"]
    assert not others or others[0].role == "user", "templates refuse conversations that begin with an answer"
    for before, after in pairwise(kept):
        assert after.role != "tool" or before.role in ("assistant", "tool"), "a result stands behind its call"


@given(turns, st.integers(1, 200))
def test_no_more_goes_than_has_to(turns: list[tuple[str, int, list[Step]]], room: int) -> None:
    messages = conversation(turns, [])
    groups = droppable([m.role for m in messages])
    sizes = [len(tokens_of([messages[i] for i in group])) for group in groups]
    whole = len(tokens_of(messages))
    fitting = [n for n in range(len(groups) + 1) if whole - sum(sizes[:n]) <= room]
    if not fitting:
        with pytest.raises(ContextOverflow):
            cut_conversation(messages, tokens_of, room=room, limit=room)
    else:
        assert cut_conversation(messages, tokens_of, room=room, limit=room)[1] == sum(sizes[: fitting[0]])


@pytest.mark.parametrize(("roles", "groups"), [
    ("sua ua u", [[1, 2], [3, 4]]),
    ("suattat u", [[1, 2, 3, 4, 5, 6]]),
    ("suatatat", [[2, 3], [4, 5]]),
    ("suasua u", [[1, 2], [4, 5]]),
    ("au a u", [[0], [1, 2]]),
    ("u", []),
    ("s", []),
    ("aaa", [[0], [1]]),
])  # fmt: skip
def test_what_goes_at_once(roles: str, groups: list[list[int]]) -> None:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    assert droppable([names[r] for r in roles.replace(" ", "")]) == groups
