"""Prompts and answers of the past, kept so that a conversation pays for each token once.

A tree over token ids: what conversations begin with in common is kept once. Used by the worker
alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from .kv import States

# So many tokens that conversations begin with, as their template has them, are rather kept for each
# of them than that they part its memory in two.
_FRONT = 64

# So few at the end of an answer are rather computed again: a prompt quotes it trimmed.
_TRIMMED = 8


class _Node:
    """Tokens that follow those of `parent`; `children` by their first token. `states` are those of
    the `front` tokens before them, which are all there are or none, and theirs.
    """

    def __init__(
        self, ids: Sequence[int], states: States, front: int = 0, parent: _Node | None = None
    ) -> None:
        self.ids = list(ids)
        self.states = states
        self.front = front
        self.parent = parent
        self.children: dict[int, _Node] = {}
        self.used = 0

    def part(self, start: int, end: int) -> States:
        """Of its own tokens."""
        return self.states.part(self.front + start, self.front + end)

    def trim(self, tokens: int) -> None:
        """Forget all after so many of its own tokens; its rooms are lent from there."""
        self.ids = self.ids[:tokens]
        self.states = States(self.states.part(0, self.front + tokens).pairs, self.states.rooms)


class PrefixCache:
    """Keys and values of past tokens, at most `limit` bytes of them; what was not used for the
    longest time goes first. With a limit of 0 nothing is kept.

    A conversation that begins like others for no more than a few tokens keeps the rooms that its
    row wrote into, and its next turn gets them back: nothing is copied.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._root = _Node((), States(()))
        self._clock = itertools.count(1)

    def find(self, ids: Sequence[int]) -> tuple[int, list[States]]:
        """How many of the first `ids` are known, and their states, in pieces that follow one
        another; views. A piece that can be lent ends where the next token of `ids` is written.
        """
        known, found = 0, []
        for node, common in self._walk(ids):
            trimmed = common < len(node.ids) <= common + _TRIMMED
            if trimmed and not node.children and node.states.lent:
                node.trim(common)
            if node.front == known:  # with all that was before
                found = [node.states.part(0, known + common)]
            else:
                found.append(node.part(0, common))
            known += common
        return known, found

    def keep(self, ids: Sequence[int], states: States) -> None:
        """Keep `states`, those of `ids`, as far as they are not known and fit: the rooms that they
        begin, where these would hardly be larger than a copy, or else that.
        """
        if not self.limit or not states.tokens:
            return
        each = states.nbytes // states.tokens
        ids = ids[: self.limit // each]
        path, known, common = [self._root], 0, 0
        for node, common in self._walk(ids):
            path.append(node)
            known += common
        if known == len(ids):
            return
        last = path[-1]
        if common < len(last.ids):
            self._split(last, common)
        whole = states.rooms and 2 * states.held <= 3 * states.nbytes
        if whole and self._go_on(path, ids, states):
            return
        if whole and known <= _FRONT and self._make_room(states.held, path):
            new = _Node(ids[known:], states, known, last)
        else:
            self._make_room((len(ids) - known) * each, path)
            ids = ids[: known + (self.limit - self.bytes) // each]
            if len(ids) == known:
                return
            new = _Node(ids[known:], states.part(known, len(ids)).copy(), 0, last)
        new.used = next(self._clock)
        last.children[new.ids[0]] = new
        self.bytes += new.states.held

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
            whole = common == len(child.ids)
            child.used = next(self._clock)
            yield child, common
            if not whole:
                return
            node, at = child, at + common

    def _go_on(self, path: Sequence[_Node], ids: Sequence[int], states: States) -> bool:
        """Let the last on `path` have the rest of `ids` too, with the rooms of `states`, if nothing
        else follows it, and little comes before it.
        """
        *above, last = path
        before = sum(len(node.ids) for node in above)
        more = states.held - last.states.held
        if last is self._root or last.children or before > _FRONT:
            return False
        if not self._make_room(more, path):
            return False
        last.ids, last.states, last.front = list(ids[before:]), states, before
        self.bytes += more
        return True

    def _split(self, node: _Node, at: int) -> None:
        """Make the tokens from `at` on a node of their own, below what then is left."""
        front, head = node.front + at, node.part(0, at).copy()
        rest = _Node(node.ids[at:], node.states, front, node)
        if not node.states.rooms or front > _FRONT:
            # A view would hold on to the whole.
            rest.states, rest.front = node.part(at, len(node.ids)).copy(), 0
        self.bytes += head.held + rest.states.held - node.states.held
        rest.used, rest.children = node.used, node.children
        for child in rest.children.values():
            child.parent = rest
        node.states, node.front = head, 0
        node.ids, node.children = node.ids[:at], {rest.ids[0]: rest}

    def _make_room(self, needed: int, path: Sequence[_Node]) -> bool:
        """Forget leaves that are not on `path`, the longest unused first, until `needed` bytes more
        fit; whether they do.
        """
        while self.bytes + needed > self.limit:
            leaves = [leaf for leaf in self._leaves() if leaf not in path]
            if not leaves:
                return False
            leaf = min(leaves, key=lambda node: node.used)
            assert leaf.parent is not None
            del leaf.parent.children[leaf.ids[0]]
            leaf.parent = None
            self.bytes -= leaf.states.held
        return True

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
