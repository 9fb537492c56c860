"""Gemma 2 whose weights bfloat16 has too, and what its attention and all of it say in steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from tiny import random_gemma
from transformers import StaticCache

from gemma2_stream.kv import CACHE_NAME, KVCache

# Scores come nowhere near 50 here.
CAP = 10.0


def capped_gemma(softcap: float | None = CAP) -> Any:
    """In float32, with weights that bfloat16 has too."""
    model = random_gemma(vocab=320, query_pre_attn_scalar=4)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = softcap
    return model


def attended(model: Any, states: torch.Tensor, mask: torch.Tensor, past: int, cache: Any) -> Any:
    """What the first attention of `model` makes of `states` (rows, tokens, 64) behind `past`."""
    return in_two(model.model.layers[0].self_attn, model, states, mask, past, cache)[0]


def in_two(
    module: Any, model: Any, states: torch.Tensor, mask: torch.Tensor, past: int, cache: Any
) -> Any:
    """What `module`, an attention or a layer, makes of those from `past` on, after the others."""
    dtype = model.dtype
    positions = torch.arange(states.shape[1])[None]
    embeddings = model.model.rotary_emb(states.bfloat16(), positions)
    for part in (slice(0, past), slice(past, None)):
        if part.stop != 0:
            found = module(
                hidden_states=states[:, part].to(dtype),
                position_embeddings=tuple(each[:, part].to(dtype) for each in embeddings),
                attention_mask=mask[..., part, : part.stop].to(dtype),
                **{CACHE_NAME: cache},
            )
    return found


def causal(rows: int, tokens: int) -> torch.Tensor:
    """Of rows that don't begin at once, and within a window."""
    ahead = torch.arange(tokens)[None] - torch.arange(tokens)[:, None]
    hidden = ((ahead > 0) | (ahead < -64)).expand(rows, 1, tokens, tokens).clone()
    for row in range(rows):
        hidden[row, ..., : row % 3 * 20] = True
    return hidden * torch.finfo(torch.bfloat16).min


def off(found: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    return (found - true).abs().mean()


def logits(model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
    """Of all that is no padding, fed in chunks, of which most are few rows."""
    positions, parts = (mask.cumsum(-1) - 1).clamp(min=0), []
    for ids_of, places in zip(
        torch.split(ids, [90, 20, *[1] * 10], 1),
        torch.split(positions, [90, 20, *[1] * 10], 1),
        strict=True,
    ):
        end = sum(part.shape[1] for part in parts) + ids_of.shape[1]
        parts.append(
            model(
                input_ids=ids_of,
                attention_mask=mask[:, :end],
                position_ids=places,
                use_cache=True,
                **{CACHE_NAME: cache},
            ).logits.float()
        )
    return torch.cat(parts, 1)[mask == 1]


def off_of_logits(
    change: Callable[[Any], Any], rows: int, kind: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far from float32 the logits are of what `change` makes of a model, and those of eager in
    bfloat16; of `rows`, padded but for the first, with a cache of `kind`.
    """
    wide = capped_gemma()
    ids = torch.randint(3, 320, (rows, 120))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 30 * row] = 0

    def cache() -> Any:
        if kind is StaticCache:
            return kind(config=wide.config, max_cache_len=128)
        return kind() if kind is KVCache else kind(config=wide.config)

    true = logits(wide, ids, mask, KVCache())
    eager = logits(copy.deepcopy(wide).bfloat16(), ids, mask, cache())
    return off(logits(change(wide), ids, mask, cache()), true), off(eager, true)
