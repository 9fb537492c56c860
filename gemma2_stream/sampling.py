"""Choosing a token from logits, row by row, each row with its own parameters and its own generator.

`model.generate` is always asked for the most likely token; a row that samples makes its choice here
and shows `generate` logits in which nothing else is possible. So a seed means the same tokens
alone, in a batch, and beside strangers, and the global random state is neither read nor moved.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor

from .errors import NotFiniteError
from .grammar import Constraint
from .types import Request, SamplingParams

# top_p needs sorted logits. Nearly always these many hold the mass, and finding them among 256,000
# costs a tenth of sorting all.
_CANDIDATES = 1024


class Sampler:
    """One row's choices: temperature, then top_k, top_p and min_p, in transformers' order.

    Without a seed the generator starts from the operating system's entropy.
    """

    def __init__(self, params: SamplingParams) -> None:
        # What float32 can divide by: 0 and infinity make NaN, and NaN the last token.
        self._temperature = min(max(params.temperature or 0.0, 1e-30), 1e30)
        self._top_k = params.top_k or 0
        self._top_p = max(params.top_p, 1e-30) if params.top_p is not None else 1.0
        self._min_p = params.min_p or 0.0
        self._random = random.Random(params.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token id, from `logits` of shape (vocabulary,), in float32."""
        # Relative to the largest, so that no temperature can overflow.
        probabilities = ((logits - logits.max()) / self._temperature).softmax(-1)
        ids: torch.Tensor | None = None
        if self._top_k or self._top_p < 1:
            probabilities, ids = self._head(probabilities)
        if self._top_p < 1:
            # The smallest head that reaches top_p: a token stays if those before it do not.
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.where(before < self._top_p, 0.0)
        if self._min_p:
            enough = probabilities >= self._min_p * probabilities.max()
            probabilities = probabilities.where(enough, 0.0)
        position = self._draw(probabilities)
        return position if ids is None else int(ids[position])

    def _head(self, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The most likely in order, as many as top_k and top_p can need, and their ids."""
        size = probabilities.shape[-1]
        if self._top_k:
            values, ids = probabilities.topk(min(self._top_k, size))
            return values / values.sum(), ids
        values, ids = probabilities.topk(min(_CANDIDATES, size))
        if values.sum() >= self._top_p:
            return values, ids
        values, ids = probabilities.sort(descending=True)
        return values, ids

    def _draw(self, weights: torch.Tensor) -> int:
        """The position that one uniform number falls on along the cumulated weights."""
        cumulated = weights.cpu().double().cumsum(-1)
        target = self._random.random() * cumulated[-1]
        position = torch.searchsorted(cumulated, target, right=True)
        return min(int(position), len(weights) - 1)


class RowLogits(LogitsProcessor):
    """Gives each row of a batch its own penalty, its own grammar and its own choice.

    `constraints` are the rows' grammars, None for a row without; `width` is the rows' common prompt
    length once left-padded.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        constraints: Sequence[Constraint | None],
        width: int,
        *,
        check_finite: bool,
    ) -> None:
        params = [request.params for request in requests]
        self._constraints = constraints
        self._samplers = [Sampler(p) if p.temperature else None for p in params]
        self._penalties = [
            RepetitionPenaltyLogitsProcessor(p.repetition_penalty)
            if p.repetition_penalty not in (None, 1)
            else None
            for p in params
        ]
        self._padding = [width - len(request.prompt_ids) for request in requests]
        self._check_finite = check_finite

    @property
    def needed(self) -> bool:
        needs = (*self._samplers, *self._penalties, *self._constraints)
        return self._check_finite or any(need is not None for need in needs)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`input_ids` (rows, tokens so far); `scores` (rows, vocabulary), changed in place."""
        if self._check_finite and scores.isnan().any():
            raise NotFiniteError(
                "the model computed NaN: float16 overflows in Gemma 2; load it with "
                "dtype='bfloat16' or dtype='float32'"
            )
        rows = zip(self._samplers, self._penalties, self._constraints, strict=True)
        for row, (sampler, penalty, constraint) in enumerate(rows):
            if penalty is not None:
                # Padding is not part of the text, so it is not penalised.
                ids = input_ids[row : row + 1, self._padding[row] :]
                scores[row : row + 1] = penalty(ids, scores[row : row + 1])
            if sampler is not None or constraint is not None:
                choice = _choose(scores[row], sampler, constraint)
                scores[row] = -torch.inf
                scores[row, choice] = 0.0
        return scores


def _choose(logits: torch.Tensor, sampler: Sampler | None, constraint: Constraint | None) -> int:
    """The next token id of one row, from `logits` of shape (vocabulary,), which may be changed."""
    if constraint is not None and not constraint.done:
        constraint.mask(logits)
    choice = int(logits.argmax()) if sampler is None else sampler.choose(logits)
    if constraint is not None and not constraint.done:
        choice = constraint.take(choice)
    return choice
