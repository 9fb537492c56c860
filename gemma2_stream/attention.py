"""Gemma 2's attention without a copy of the keys and values for every head that shares them.

Knows torch and transformers. The operations and their order are those of transformers' own
`eager_attention_forward`, soft-capping included, which `sdpa` does not have; few tokens' scores in
bfloat16 are rounded less often.
"""

from __future__ import annotations

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

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return _attend(query, key, value, attention_mask, scaling, softcap)

    groups = key.shape[1]
    if query[..., 0].numel() * key.shape[2] <= SMALL:
        return attend(query, key, value), None
    # All at once, what is between the operations leaves the processor's caches: twice the time.
    heads = zip(*(torch.chunk(states, groups, 1) for states in (query, key, value)), strict=True)
    return torch.cat([attend(*states) for states in heads], 2), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    rows, heads, new, size = query.shape
    shared = key.shape[1]
    queries = query.reshape(rows, shared, heads // shared * new, size)
    attend = _attend_few if _copies(queries) else _attend_many
    mask = None if attention_mask is None else attention_mask[:, :, None]
    output = attend(queries, key, value, mask, new, scaling, softcap)
    return output.view(rows, heads, new, size).transpose(1, 2).contiguous()


def _copies(queries: torch.Tensor) -> bool:
    """Whether torch would copy all keys and values, which have gaps, to multiply a token's few."""
    few = queries.shape[-2] <= FEW and queries.device.type == "cpu"
    return few and queries.dtype == torch.bfloat16


def _attend_many(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    new: int,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """`queries` (rows, key heads, heads that share keys times `new`, head size), and so returned;
    `mask` (rows or 1, 1, 1, `new`, tokens).
    """
    scores = queries @ keys.mT
    scores *= scaling
    if softcap is not None:
        _tanh_(scores.div_(softcap)).mul_(softcap)
    if mask is not None:
        _by_token(scores, new).add_(mask)
    return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values


def _tanh_(scores: torch.Tensor) -> torch.Tensor:
    """In place; torch's own for bfloat16 on a CPU takes twice as long for the same bits."""
    if scores.dtype == torch.bfloat16 and scores.device.type == "cpu":
        return scores.copy_(scores.float().tanh_())
    return scores.tanh_()


def _attend_few(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    new: int,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """The same with what is in the gaps, which spares a copy, a tenth of the time; keys times
    queries instead of the other way round; and in float32 between the two products.
    """
    tokens = keys.shape[-2]
    turned = with_room(keys) @ queries.mT
    scores = turned[..., :tokens, :].mT.to(torch.float32, memory_format=torch.contiguous_format)
    if softcap is None:
        scores *= scaling
    else:
        scores.mul_(scaling / softcap).tanh_().mul_(softcap)
    if mask is not None:
        _by_token(scores, new).add_(mask)
    with_gaps = with_room(values)
    weights = queries.new_zeros(*scores.shape[:-1], with_gaps.shape[-2])
    weights[..., :tokens] = scores.softmax(-1)
    return weights @ with_gaps


def _by_token(scores: torch.Tensor, new: int) -> torch.Tensor:
    """Scores of all heads that share keys, as (rows, key heads, heads, `new`, tokens)."""
    rows, shared, _, tokens = scores.shape
    return scores.view(rows, shared, -1, new, tokens)


def register_grouped() -> None:
    """Make `attn_implementation="grouped"` known to transformers."""
    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", eager_mask)


def prefer_grouped(model: Any) -> None:
    """For Gemma 2, take this where transformers has taken eager because nobody said."""
    if model.config.model_type == "gemma2":
        register_grouped()
        model.set_attn_implementation("grouped")
