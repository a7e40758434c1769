"""A tree over token sequences: what shares the longest beginning with a prompt, in the time it takes to read it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from runtime.request import TokenId

V = TypeVar("V", bound=Hashable)


def common_prefix(a: list[TokenId], b: list[TokenId], *, at: int = 0, limit: int) -> int:
    """Length of the longest common prefix of `a` and ``b[at:]``, at most `limit`: bisection over slice equality, at C
    speed."""
    high = max(0, min(len(a), len(b) - at, limit))
    if a[:high] == b[at : at + high]:
        return high
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[at + low : at + middle]:
            low = middle
        else:
            high = middle - 1
    return low


class _Node(Generic[V]):
    """A run of tokens, the values whose sequence ends with it, and what goes on from there."""

    __slots__ = ("children", "edge", "parent", "values")

    def __init__(self, parent: _Node[V] | None, edge: list[TokenId]) -> None:
        self.parent = parent
        self.edge = edge
        self.children: dict[TokenId, _Node[V]] = {}
        self.values: dict[V, None] = {}  # a set that keeps its order


class RadixTree(Generic[V]):
    """Values by token sequences; several may have the same sequence, and each value has one.

    Every node but the root has a value at or below it, so any match can be used.

    Source: D. R. Morrison, "PATRICIA", JACM 15 (1968); over tokens as in SGLang's RadixAttention (arXiv:2312.07104).
    """

    def __init__(self) -> None:
        self._root: _Node[V] = _Node(None, [])
        self._nodes: dict[V, _Node[V]] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, value: V) -> bool:
        return value in self._nodes

    def insert(self, value: V, tokens: list[TokenId]) -> None:
        """Put in a value that is not there."""
        self._settle(value, self._grow(self._root, tokens))

    def extend(self, value: V, tokens: list[TokenId]) -> None:
        """Lengthen the sequence of a value that is there."""
        node = self._nodes[value]
        if node is not self._root and not node.children and len(node.values) == 1:
            node.edge.extend(tokens)  # what a sequence that decodes does in every step
            return
        self._settle(value, self._grow(node, tokens))
        if self._nodes[value] is not node:
            del node.values[value]
            self._prune(node)

    def remove(self, value: V) -> None:
        """Take out a value; an absent one is fine."""
        node = self._nodes.pop(value, None)
        if node is not None:
            del node.values[value]
            self._prune(node)

    def find(self, tokens: list[TokenId], *, limit: int) -> tuple[Iterator[V], int]:
        """The values that share the longest beginning with `tokens`, and how long that is, at most `limit`."""
        node, length = self._root, 0
        limit = min(limit, len(tokens))
        while length < limit and (child := node.children.get(tokens[length])) is not None:
            n = common_prefix(child.edge, tokens, at=length, limit=limit - length)
            node, length = child, length + n
            if n < len(child.edge):
                break
        return (_below(node) if length else iter(())), length

    def find_whole(self, tokens: list[TokenId], *, limit: int) -> tuple[list[V], int]:
        """The values with the longest sequence that is itself a beginning of `tokens`, of `limit` tokens at most."""
        node, length = self._root, 0
        best: tuple[list[V], int] = [], 0
        limit = min(limit, len(tokens))
        while length < limit and (child := node.children.get(tokens[length])) is not None:
            n = common_prefix(child.edge, tokens, at=length, limit=limit - length)
            if n < len(child.edge):
                break
            node, length = child, length + n
            if node.values:
                best = list(node.values), length
        return best

    def _settle(self, value: V, node: _Node[V]) -> None:
        node.values[value] = None
        self._nodes[value] = node

    def _grow(self, node: _Node[V], tokens: list[TokenId]) -> _Node[V]:
        """The node at the end of `tokens` below `node`, made where there is none."""
        at = 0
        while at < len(tokens):
            child = node.children.get(tokens[at])
            if child is None:
                child = node.children[tokens[at]] = _Node(node, tokens[at:])
                return child
            n = common_prefix(child.edge, tokens, at=at, limit=len(tokens) - at)
            node = child if n == len(child.edge) else self._split(child, n)
            at += n
        return node

    @staticmethod
    def _split(node: _Node[V], length: int) -> _Node[V]:
        """A new node for the first `length` tokens of a node's run; the rest stays below it."""
        upper: _Node[V] = _Node(node.parent, node.edge[:length])
        assert node.parent is not None
        node.parent.children[node.edge[0]] = upper
        upper.children[node.edge[length]] = node
        node.edge = node.edge[length:]
        node.parent = upper
        return upper

    def _prune(self, node: _Node[V]) -> None:
        """Drop nodes without values below, and join a run that no longer parts."""
        while node.parent is not None and not node.values and len(node.children) < 2:
            parent = node.parent
            if node.children:
                (child,) = node.children.values()
                child.edge = node.edge + child.edge
                child.parent = parent
                parent.children[child.edge[0]] = child
                return
            del parent.children[node.edge[0]]
            node = parent


def _below(node: _Node[V]) -> Iterator[V]:
    stack = [node]
    while stack:
        node = stack.pop()
        yield from node.values
        stack.extend(node.children.values())
