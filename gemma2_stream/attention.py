"""Gemma 2's attention without a copy of the keys and values for every head that shares them.

Knows torch and transformers. The operations and their order are those of transformers' own
`eager_attention_forward`, soft-capping included, which `sdpa` does not have; few tokens' scores in
bfloat16 are rounded less often, and their queries take the scale of the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from .kv import with_room

# New tokens, times the heads that share keys, that are few beside the keys they look at.
FEW = 64

# Scores that stay in the processor's caches.
SMALL = 2**20


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` (rows, heads, new tokens, head size) over `key` and `value` (rows, key
    heads, tokens, head size), where heads/key heads neighbours share one; `attention_mask`
    (rows or 1, 1, new tokens, tokens) is added. Returns (rows, new tokens, heads, head size).
    """

    rows, heads, new, size = query.shape
    queries = query.reshape(rows, key.shape[1], -1, size)
    if _copies(queries):
        queries = (queries * scores_scale(scaling, softcap)).mT
        output = attend_few(queries, key, value, attention_mask, softcap)
    else:

        def attend(queries: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return _attend_many(queries, key, value, attention_mask, scaling, softcap)

        output = _in_cache(attend, queries.shape[-2], queries, key, value)
    return output.view(rows, heads, new, size).transpose(1, 2).contiguous(), None


def scores_scale(scaling: float, softcap: float | None) -> float:
    """What `attend_few` wants queries to be multiplied with."""
    return scaling if softcap is None else scaling / softcap


def attend_few(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """The attention of few tokens: with what is in the gaps of `keys` and `values`, which spares a
    copy, a tenth of the time; keys times queries instead of the other way round; and in float32
    between the two products.

    `queries` (rows, key heads, head size, heads that share keys times new tokens) are multiplied
    with `scores_scale` already, and `mask` is (rows or 1, 1, new tokens, tokens). Returns (rows,
    key heads, heads that share keys times new tokens, head size).
    """

    def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        tokens = keys.shape[-2]
        turned = with_room(keys) @ queries
        scores = turned[..., :tokens, :].mT.to(torch.float32, memory_format=torch.contiguous_format)
        if softcap is not None:
            scores.tanh_()
        if mask is not None:
            by_token = _by_token(scores, mask)
            torch.add(mask[:, :, None], by_token, alpha=softcap or 1, out=by_token)
        elif softcap is not None:
            scores *= softcap
        with_gaps = with_room(values)
        weights = queries.new_empty(*scores.shape[:-1], with_gaps.shape[-2])
        weights[..., :tokens] = torch.softmax(scores, -1, out=scores)
        weights[..., tokens:] = 0
        return weights @ with_gaps

    return _in_cache(attend, queries.shape[-1], queries, keys, values)


def _copies(queries: torch.Tensor) -> bool:
    """Whether torch would copy all keys and values, which have gaps, to multiply a token's few. Who
    wants gradients pays for that: they don't come back from what is written in place.
    """
    few = queries.shape[-2] <= FEW and queries.device.type == "cpu"
    return few and queries.dtype == torch.bfloat16 and not queries.requires_grad


def _attend_many(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """`queries` (rows, key heads, heads that share keys times new tokens, head size), and so
    returned; `mask` as above.
    """
    scores = queries @ keys.mT
    scores *= scaling
    if softcap is not None:
        _tanh_(scores.div_(softcap)).mul_(softcap)
    if mask is not None:
        _by_token(scores, mask).add_(mask[:, :, None])
    return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values


def _in_cache(
    attend: Callable[..., torch.Tensor], each: int, *states: torch.Tensor
) -> torch.Tensor:
    """`attend` on queries, keys and values, of which each key head has `each` rows of scores. All
    at once, what is between the operations may leave the processor's caches: twice the time.
    """
    rows, groups, tokens, _ = states[1].shape
    if rows * groups * each * tokens <= SMALL:
        return attend(*states)
    heads = zip(*(torch.chunk(part, groups, 1) for part in states), strict=True)
    return torch.cat([attend(*parts) for parts in heads], 1)


def _tanh_(scores: torch.Tensor) -> torch.Tensor:
    """In place; torch's own for bfloat16 on a CPU takes twice as long for the same bits."""
    if scores.dtype == torch.bfloat16 and scores.device.type == "cpu":
        return scores.copy_(scores.float().tanh_())
    return scores.tanh_()


def _by_token(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scores of all heads that share keys, as (rows, key heads, heads, new tokens, tokens)."""
    rows, shared, _, tokens = scores.shape
    return scores.view(rows, shared, -1, mask.shape[-2], tokens)


def register_grouped() -> None:
    """Make `attn_implementation="grouped"` known to transformers."""
    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", eager_mask)


def prefer_grouped(model: Any) -> None:
    """For Gemma 2, take this where transformers has taken eager because nobody said."""
    if model.config.model_type == "gemma2":
        register_grouped()
        model.set_attn_implementation("grouped")
