"""A conversation without its oldest messages, where it does not fit the context."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from edge.errors import ContextOverflow
from runtime import wire
from runtime.request import TokenId

_STAYING = frozenset({"system", "developer"})
_RESULTS = frozenset({"tool", "function"})


def droppable(roles: Sequence[str]) -> list[list[int]]:
    """Groups of messages, by their places, the oldest first: each goes as a whole, and those before it with it.

    System messages stay, the last message of the user, and what is last. Before the last message of the user a whole
    turn goes at once, with all that was answered and all the tools that were called: templates refuse conversations
    that begin with an answer. After it, an answer goes with the results of its calls.
    """
    last_user = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
    groups: list[list[int]] = []
    for i, role in enumerate(roles):
        if role in _STAYING or i == last_user:
            continue
        begins = role == "user" if i < last_user else role not in _RESULTS
        if begins or not groups or groups[-1][-1] < last_user < i:
            groups.append([])
        groups[-1].append(i)
    if groups and groups[-1][-1] > last_user:
        groups.pop()  # what is to be answered now
    return groups


def cut_conversation(
    messages: Sequence[wire.ChatMessage], tokens_of: Callable[[list[wire.ChatMessage]], list[TokenId]], *, room: int,
    limit: int,
) -> tuple[list[wire.ChatMessage], int]:  # fmt: skip
    """A conversation without as few of its oldest messages as it takes, and how many tokens went; about how many where
    there are so many that nobody counts them.

    Args:
        tokens_of: The prompt of messages. It may refuse more than `limit` tokens.
        room: Tokens that the prompt may have.
        limit: Those of prompt and answer.

    Raises:
        ContextOverflow: What has to stay does not fit.
    """
    groups = droppable([m.role for m in messages])

    def kept(num_groups: int) -> list[wire.ChatMessage]:
        gone = {i for group in groups[:num_groups] for i in group}
        return [m for i, m in enumerate(messages) if i not in gone]

    def without(num_groups: int) -> list[TokenId] | ContextOverflow:
        try:
            tokens = tokens_of(kept(num_groups))
        except ContextOverflow as e:
            return e
        if len(tokens) <= room:
            return tokens
        return ContextOverflow(limit_tokens=limit, prompt_tokens=len(tokens), completion_tokens=limit - room)

    whole = without(0)
    if not isinstance(whole, ContextOverflow):
        return [*messages], 0
    number = bisect_left(range(len(groups)), True, key=lambda n: not isinstance(without(n), ContextOverflow))
    left = without(number)
    if isinstance(left, ContextOverflow):
        raise left
    return kept(number), whole.prompt_tokens - len(left)
