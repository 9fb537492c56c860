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
from torch.nn import functional
from transformers import LogitsProcessor

from .errors import NotFiniteError
from .grammar import Constraint
from .types import Request, SamplingParams

# A number falls on a block of tokens first, and then on one within it: two short sums, in which
# double precision costs nothing. 256,000 is a multiple of it.
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

    def choose(self, logits: torch.Tensor) -> int:
        """The next token id, from `logits` of shape (vocabulary,), in float32."""
        ids: torch.Tensor | None = None
        if 0 < self._top_k < len(logits):
            logits, ids = logits.topk(self._top_k, sorted=False)
        # Relative to the largest, whose weight is 1, so that no temperature can overflow.
        weights = logits.sub(logits.max()).div_(self._temperature).exp_()
        enough = self._top_p * float(weights.sum()) if self._top_p < 1 else math.inf
        if self._min_p:
            torch.threshold_(weights, _below(self._min_p), 0.0)
        position = self._draw(weights)
        # Nothing is sorted to find where top_p ends. What is drawn from beyond is taken out, with
        # all that comes after it, and drawn anew: ln(1 / top_p) times on average.
        while enough < math.inf and float((ahead := _ahead(weights, position)).sum()) >= enough:
            weights = ahead
            position = self._draw(weights)
        return position if ids is None else int(ids[position])

    def _draw(self, weights: torch.Tensor) -> int:
        """The position that one uniform number falls on along the cumulated weights."""
        share: float | torch.Tensor = 1 - self._random.random()  # never 0: no weight, no chance
        blocks = functional.pad(weights, (0, -len(weights) % _BLOCK)).view(-1, _BLOCK)
        block, share = _find(blocks.sum(-1), share)
        position = int(block * _BLOCK + _find(blocks[block], share)[0])
        return min(position, len(weights) - 1)  # more only where there is NaN


def _find(
    weights: torch.Tensor, share: float | torch.Tensor
) -> tuple[torch.Tensor, float | torch.Tensor]:
    """Where the cumulated `weights` reach `share` (above 0) of their sum, and the share of that
    weight which it takes.
    """
    ends = weights.double().cumsum(-1)
    reached = share * ends[-1]
    # No end is NaN, and no NaN is an index.
    position = torch.searchsorted(ends, reached).clamp_(max=len(ends) - 1)
    begin = functional.pad(ends, (1, 0))[position]
    return position, (reached - begin) / (ends[position] - begin)


def _ahead(weights: torch.Tensor, position: int) -> torch.Tensor:
    """`weights` with only those left that are larger than the one at `position`, or come before it
    and are equal.
    """
    least = float(weights[position])
    return torch.cat(
        (
            torch.threshold(weights[:position], _below(least), 0.0),
            torch.threshold(weights[position:], least, 0.0),
        )
    )


def _below(value: float) -> float:
    """The largest number in float32 below `value`; `threshold` takes what is larger."""
    return float(np.nextafter(np.float32(value), np.float32(0)))


class Chooser:
    """What one row needs for its choices, however many calls of `generate` it goes through."""

    def __init__(self, request: Request, constraint: Constraint | None) -> None:
        params = request.params
        self._penalty = params.repetition_penalty or 1.0
        self._sampler = Sampler(params) if params.temperature else None
        self._constraint = constraint

    @property
    def needed(self) -> bool:
        """Whether the most likely token of the model's logits may be another than the choice."""
        return not (self._penalty == 1 and self._sampler is None and self._constraint is None)

    def choose(self, ids: torch.Tensor, logits: torch.Tensor) -> int:
        """The next token id of a row of text `ids`, shape (tokens,), without padding; from
        `logits`, shape (vocabulary,), which may be changed.

        Raises GrammarError when the grammar has outgrown what can be computed.
        """
        if self._penalty != 1:
            said = logits[ids]
            logits[ids] = torch.where(said < 0, said * self._penalty, said / self._penalty)
        constraint = self._constraint
        if constraint is not None and not constraint.done:
            constraint.mask(logits)
        choice = _likeliest(logits) if self._sampler is None else self._sampler.choose(logits)
        if constraint is not None and not constraint.done:
            choice = constraint.take(choice)
        return choice


def _likeliest(logits: torch.Tensor) -> int:
    """The id with the largest of `logits`; on a CPU torch takes twenty times as long as numpy."""
    return int(logits.numpy().argmax() if logits.device.type == "cpu" else logits.argmax())


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
        """Logits in which nothing but the rows' choices is possible, shape (rows, largest + 1).

        `input_ids` are (rows, tokens so far); `scores`, (rows, vocabulary), are overwritten.
        """
        choices = [
            self.choose(row, ids[padding:], scores[row])
            for row, (ids, padding) in enumerate(zip(input_ids, self._padding, strict=True))
        ]
        # `generate` takes the largest, for which torch reads 256,000 numbers in a third of a
        # millisecond on a CPU; it need not read further than it must.
        shown = scores[:, : max(choices) + 1].fill_(-torch.inf)
        return shown.scatter_(1, torch.tensor(choices, device=scores.device)[:, None], 0.0)

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
