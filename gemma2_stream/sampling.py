"""Choosing a token from logits, row by row, each row with its own parameters and its own generator.

`model.generate` is always asked for the most likely token; a row makes its choice here, and what
`generate` is shown leaves nothing else. So a seed means the same tokens alone, in a batch, and
beside strangers, and the global random state is neither read nor moved.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LogitsProcessor

from .errors import NotFiniteError
from .grammar import Constraint
from .types import Request, SamplingParams

# float32, shape (vocabulary,). numpy, since torch takes twenty times as long for an argmax, sorts
# what it could partition, and has its threads wait for each other at every step of this.
Logits = NDArray[np.float32]

# A number falls on a block of tokens first, and then on one within it: short sums, in which double
# precision costs nothing.
_BLOCK = 512


class Sampler:
    """One row's choices: temperature, then top_k, top_p and min_p, in transformers' order.

    Without a seed the generator starts from the operating system's entropy.
    """

    def __init__(self, params: SamplingParams) -> None:
        # What float32 can divide by: 0 and infinity make NaN.
        self._temperature = min(max(params.temperature or 0.0, 1e-30), 1e30)
        self._top_k = params.top_k or 0
        self._top_p = max(params.top_p, 1e-30) if params.top_p is not None else 1.0
        self._min_p = params.min_p or 0.0
        self._random = random.Random(params.seed)

    def choose(self, logits: Logits) -> int:
        """The next token id."""
        ids: NDArray[np.intp] | None = None
        if 0 < self._top_k < len(logits):
            ids = _largest(logits, self._top_k)
            logits = logits[ids]
        with np.errstate(all="ignore"):  # what is infinitely unlikely may overflow
            # Relative to the largest, so that the largest weight is 1.
            weights = logits - logits.max()
            weights /= np.float32(self._temperature)
            np.exp(weights, out=weights)
        enough = self._top_p * weights.sum() if self._top_p < 1 else math.inf
        if self._min_p:
            weights *= weights >= np.float32(self._min_p)
        position = self._draw(weights)
        # Nothing is sorted to find where top_p ends. What is drawn from beyond is taken out, with
        # all that comes after it, and drawn anew: ln(1 / top_p) times on average.
        while enough < math.inf and (ahead := _ahead(weights, position)).sum() >= enough:
            weights = ahead
            position = self._draw(weights)
        return position if ids is None else int(ids[position])

    def _draw(self, weights: Logits) -> int:
        """The position that one uniform number falls on along the cumulated weights."""
        share = 1 - self._random.random()  # never 0, which would fall on what has no weight
        starts = np.arange(0, len(weights), _BLOCK)
        block, share = _find(np.add.reduceat(weights, starts), share)
        start = int(starts[block])
        return start + _find(weights[start : start + _BLOCK], share)[0]


def _largest(logits: Logits, count: int) -> NDArray[np.intp]:
    """Positions of the `count` largest. What is as large as the last of them stays, as in
    transformers; and so does NaN.
    """
    # The blocks' maxima are few, and `count` tokens are no smaller than the last that is kept of
    # them. To partition all takes ten times as long, and twenty on Zen 4, in numpy's AVX-512.
    starts = np.arange(0, len(logits), 1 + len(logits) // (8 * count))
    ids = _reaching(np.maximum.reduceat(logits, starts), count, logits)
    return ids[_reaching(logits[ids], count, logits[ids])]


def _reaching(some: Logits, count: int, logits: Logits) -> NDArray[np.intp]:
    """Positions of `logits` that are not smaller than the last of the `count` largest of `some`."""
    reached: NDArray[np.bool_] = ~(logits < np.partition(some, -count)[-count])
    return reached.nonzero()[0]


def _find(weights: Logits, share: float) -> tuple[int, float]:
    """Where the cumulated `weights` reach `share`, in (0, 1], of their sum, and the share of that
    weight which it takes.
    """
    ends = weights.cumsum(dtype=np.float64)
    reached = share * ends[-1]
    position = int(ends.searchsorted(reached))
    begin = ends[position - 1] if position else 0.0
    return position, min(float((reached - begin) / (ends[position] - begin)), 1.0)


def _ahead(weights: Logits, position: int) -> Logits:
    """`weights` without what is smaller than the one at `position`, or equal and not before it."""
    kept: NDArray[np.bool_] = weights > weights[position]
    kept[:position] = weights[:position] >= weights[position]
    return weights * kept


class Chooser:
    """What one row needs for its choices, however many calls of `generate` it goes through."""

    def __init__(self, request: Request, constraint: Constraint | None) -> None:
        params = request.params
        # What float32 can multiply and divide by, as above.
        self._penalty = min(max(params.repetition_penalty or 1.0, 1e-30), 1e30)
        self._sampler = Sampler(params) if params.temperature else None
        self._constraint = constraint

    @property
    def needed(self) -> bool:
        """Whether the choice may be another than the model's most likely token."""
        return self._penalty != 1 or self._sampler is not None or self._constraint is not None

    def choose(self, ids: torch.Tensor, logits: torch.Tensor) -> int:
        """The next token id of a row whose text so far is `ids`, shape (tokens,), from `logits`,
        shape (vocabulary,) in float32, which may be changed.

        Raises GrammarError when the grammar has outgrown what can be computed.
        """
        scores = logits.cpu().numpy()
        if self._penalty != 1:
            said = ids.cpu().numpy()
            old = scores[said]
            scores[said] = np.where(old < 0, old * self._penalty, old / self._penalty)
        constraint = self._constraint
        if constraint is None or constraint.done:
            return self._pick(scores)
        allowed, scores = constraint.among(scores)
        choice = self._pick(scores)
        return constraint.take(choice if allowed is None else int(allowed[choice]))

    def _pick(self, scores: Logits) -> int:
        return int(scores.argmax()) if self._sampler is None else self._sampler.choose(scores)


class RowLogits(LogitsProcessor):
    """Makes the choices of a batch, each row by its own chooser.

    `padding` counts the columns on the left of each row of the ids that are no text. An error of a
    row is given to `failed` with the row's index, and the other rows go on; without `failed` it is
    raised. `check_finite` makes a NaN among a row's logits a NotFiniteError.
    """

    def __init__(
        self,
        choosers: Sequence[Chooser],
        padding: Sequence[int],
        *,
        check_finite: bool,
        failed: Callable[[int, BaseException], object] | None = None,
    ) -> None:
        self._choosers = choosers
        self._padding = padding
        self._check_finite = check_finite
        self._failed = failed
        self._over: set[int] = set()

    @property
    def needed(self) -> bool:
        return self._check_finite or any(chooser.needed for chooser in self._choosers)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """1 for each row's choice and 0 for all others, shape (rows, largest + 1), in int8.

        `input_ids` are (rows, tokens so far); `scores`, (rows, vocabulary), may be overwritten.
        """
        host = scores.cpu()  # all rows at once: to wait for each would take longer
        choices = [
            self.choose(row, ids[padding:], host[row])
            for row, (ids, padding) in enumerate(zip(input_ids, self._padding, strict=True))
        ]
        # `generate` takes the largest, for which torch needs a third of a millisecond a row if it
        # is to read 256,000, and half of that for small numbers.
        shown = scores.new_zeros(len(choices), max(choices) + 1, dtype=torch.int8)
        return shown.scatter_(1, torch.tensor(choices, device=scores.device)[:, None], 1)

    def choose(self, row: int, ids: torch.Tensor, logits: torch.Tensor) -> int:
        """The row's choice, as by its chooser."""
        if row in self._over:
            return 0
        try:
            if self._check_finite and logits.amax().isnan():
                raise NotFiniteError(
                    "the model computed NaN: float16 overflows in Gemma 2; load it with "
                    "dtype='bfloat16' or dtype='float32'"
                )
            return self._choosers[row].choose(ids, logits)
        except Exception as error:
            if self._failed is None:
                raise
            self._over.add(row)
            self._failed(row, error)
            return 0
