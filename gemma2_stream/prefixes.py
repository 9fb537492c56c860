"""Prompts and answers of the past, kept so that a conversation pays for each token once.

A tree over token ids: what conversations begin with in common is kept once. Used by the worker
alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from .kv import States, part, size


class _Node:
    """Tokens that follow those of `parent`; `children` by their first token."""

    def __init__(self, ids: Sequence[int], states: States, parent: _Node | None) -> None:
        self.ids = list(ids)
        self.states = states
        self.parent = parent
        self.children: dict[int, _Node] = {}
        self.used = 0


class PrefixCache:
    """Keys and values of past tokens, at most `limit` bytes of them; what was not used for the
    longest time goes first. With a limit of 0 nothing is kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._root = _Node((), (), None)
        self._clock = itertools.count(1)

    def find(self, ids: Sequence[int]) -> tuple[int, list[States]]:
        """How many of the first `ids` are known, and their states, in pieces that follow one
        another; views.
        """
        known, found = 0, []
        for node, common in self._walk(ids):
            known += common
            found.append(part(node.states, 0, common))
        return known, found

    def keep(self, ids: Sequence[int], states: States) -> None:
        """Keep a copy of `states`, those of `ids`, as far as they are not known and fit."""
        each = size(states) // len(ids) if ids else 0
        if not each or not self.limit:
            return
        ids = ids[: self.limit // each]
        node, known = self._root, 0
        for node, common in self._walk(ids):  # noqa: B007  # the last one is what is wanted
            known += common
        if known == len(ids):
            return
        if node is not self._root and common < len(node.ids):
            self._split(node, common)
        self._make_room((len(ids) - known) * each)
        new = _Node(ids[known:], _copied(part(states, known, len(ids))), node)
        new.used = next(self._clock)
        node.children[new.ids[0]] = new
        self.bytes += size(new.states)

    def clear(self) -> None:
        self._root.children.clear()
        self.bytes = 0

    def _walk(self, ids: Sequence[int]) -> Iterator[tuple[_Node, int]]:
        """The nodes along `ids`, each with how many of its tokens they share; all but the last of
        them whole. They count as used now.
        """
        node, at = self._root, 0
        while at < len(ids) and (child := node.children.get(ids[at])) is not None:
            common = common_length(child.ids, ids[at : at + len(child.ids)])
            child.used = next(self._clock)
            yield child, common
            if common < len(child.ids):
                return
            node, at = child, at + common

    def _split(self, node: _Node, at: int) -> None:
        """Make the tokens from `at` on a node of their own, below what then is left."""
        rest = _Node(node.ids[at:], _copied(part(node.states, at, len(node.ids))), node)
        rest.used, rest.children = node.used, node.children
        for child in rest.children.values():
            child.parent = rest
        node.states = _copied(part(node.states, 0, at))  # a view would hold on to the whole
        node.ids, node.children = node.ids[:at], {rest.ids[0]: rest}

    def _make_room(self, needed: int) -> None:
        """Forget leaves, the longest unused first, until `needed` bytes more fit."""
        while self.bytes + needed > self.limit and self._root.children:
            leaf = min(self._leaves(), key=lambda node: node.used)
            assert leaf.parent is not None
            del leaf.parent.children[leaf.ids[0]]
            leaf.parent = None
            self.bytes -= size(leaf.states)

    def _leaves(self) -> Iterator[_Node]:
        nodes = [self._root]
        while nodes:
            node = nodes.pop()
            nodes += node.children.values()
            if not node.children:
                yield node


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two lists begin with in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # comparing slices is a hundred times as fast as comparing ids
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _copied(states: States) -> States:
    return [(keys.clone(), values.clone()) for keys, values in states]
