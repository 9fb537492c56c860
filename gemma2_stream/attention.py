"""Gemma 2's attention without a copy of the keys and values for every head that shares them.

Knows torch and transformers. The operations and their order are those of transformers' own
`eager_attention_forward`, soft-capping included, which `sdpa` does not have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
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
    scores = _scores(queries, key).view(rows, shared, heads // shared, new, -1)
    scores *= scaling
    if softcap is not None:
        _tanh_(scores.div_(softcap)).mul_(softcap)
    if attention_mask is not None:
        scores += attention_mask[:, :, None]
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    output = _weighted(weights.view(rows, shared, heads // shared * new, -1), value)
    return output.view(rows, heads, new, size).transpose(1, 2).contiguous()


def _tanh_(scores: torch.Tensor) -> torch.Tensor:
    """In place; torch's own for bfloat16 on a CPU takes twice as long for the same bits."""
    if scores.dtype == torch.bfloat16 and scores.device.type == "cpu":
        return scores.copy_(scores.float().tanh_())
    return scores.tanh_()


def _copies(queries: torch.Tensor) -> bool:
    """Whether torch would copy all keys and values, which have gaps, to multiply a token's few."""
    few = queries.shape[-2] <= FEW and queries.device.type == "cpu"
    return few and queries.dtype == torch.bfloat16


def _scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`queries @ keys.mT`; the other way round, and with what is in the gaps, where that spares a
    copy: a tenth of the time.
    """
    if _copies(queries):
        return (with_room(keys) @ queries.mT)[..., : keys.shape[-2], :].mT.contiguous()
    return queries @ keys.mT


def _weighted(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`weights @ values`; what is in the gaps weighs nothing."""
    if _copies(weights):
        values = with_room(values)
        weights = functional.pad(weights, (0, values.shape[-2] - weights.shape[-1]))
    return weights @ values


def register_grouped() -> None:
    """Make `attn_implementation="grouped"` known to transformers."""
    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", eager_mask)


def prefer_grouped(model: Any) -> None:
    """For Gemma 2, take this where transformers has taken eager because nobody said."""
    if model.config.model_type == "gemma2":
        register_grouped()
        model.set_attn_implementation("grouped")
