"""Guesses of what a row says next, which the model checks in one forward, all at once.

A wrong guess costs a little time, and never changes a token.

Knows torch and transformers' models; nothing of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from .batch import PREFILL_CHUNK, feed
from .kv import KVCache
from .prefixes import common_length

# Tokens in a row that make a place one to copy from; the longest are tried first.
_SAID = (3, 2, 1)

# Where the assistant stops: after so many, or when it gives its next one less than this chance.
_DRAFTED, _SURE = 8, 0.4


class Drafter(Protocol):
    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` ids that may follow `ids`. What is asked next mostly begins with `ids`."""
        ...


class Lookup:
    """Guesses that the text goes on as it did when its last tokens were said before: up to `tokens`
    ids, and fewer while none of them is right, since a forward of many costs more than one of one.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = self._most = tokens
        self._ids: list[int] = []
        self._guess: list[int] = []  # of what follows the id after those
        self._after: dict[tuple[int, ...], int] = {}  # where what followed the tokens last begins

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        known = len(self._ids)
        if len(ids) > known and ids[:known] == self._ids:
            self._learn(ids[known + 1 :])
        else:
            known, self._most = 0, self._tokens
            self._after.clear()
        for end in range(known + 1, len(ids)):
            for length in _SAID:
                self._after[tuple(ids[max(0, end - length) : end])] = end
        self._ids = list(ids[:-1])
        self._guess = self._copied(ids, min(most, self._most))
        return self._guess

    def _learn(self, said: Sequence[int]) -> None:
        """`said` came where the last guess had been made; nothing, if the row was over."""
        if common_length(self._guess, said):
            self._most = min(2 * self._most, self._tokens)
        elif self._guess and said:
            self._most = (self._most + 1) // 2

    def _copied(self, ids: Sequence[int], most: int) -> list[int]:
        for length in _SAID:
            start = self._after.get(tuple(ids[-length:]))
            if start is not None:
                text = list(ids[start:])
                for at in range(most):
                    text.append(text[at])  # where it comes to its own end, it goes around
                return text[:most]
        return []


class Assistant:
    """Guesses what a smaller `model` with the same vocabulary would say."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = KVCache()
        self._ids: list[int] = []  # whose states the cache has

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """As in Drafter. It reads one chunk of a prompt at a time and guesses nothing before it has
        read all, so that no row has to wait for that.
        """
        known = common_length(self._ids, ids[:-1])
        self._cache.crop(known - len(self._ids))
        self._ids = list(ids[:known])
        text = list(ids)
        while len(text) < len(ids) + min(most, _DRAFTED):
            chance, choice = self._feed(text[len(self._ids) :][:PREFILL_CHUNK]).softmax(-1).max(-1)
            if len(self._ids) < len(text) or chance < _SURE:
                break
            text.append(int(choice))
        return text[len(ids) :]

    def _feed(self, ids: list[int]) -> torch.Tensor:
        """Logits after `ids`, of shape (vocabulary,)."""
        try:
            logits = feed(self._model, self._cache, ids, 1)
        except BaseException:
            self.clear()  # some layers have the states now, and others don't
            raise
        self._ids += ids
        return logits[0]

    def clear(self) -> None:
        """Free its memory."""
        self._ids = []
        self._cache.layers.clear()
