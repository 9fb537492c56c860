"""Gemma 2's decoder with what compiled.py has: products of few rows, and all that is between them.

`equip` changes the class of a model's own modules, so that names and ties stay. Knows torch and
Gemma 2's modules, and nothing of who decides what is wanted.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2Attention,
    Gemma2MLP,
    Gemma2RMSNorm,
)
from transformers.utils.generic import can_return_tuple

from .compiled import Kernels, compilation
from .int8 import Int8Linear
from .kv import CACHE_NAME
from .norms import InPlaceNorm
from .products import FusedMLP, HeadLinear, JoinedAttention, RowLinear, as_one, columns, few_rows


def equip(model: nn.Module) -> None:
    """Have few tokens computed by the kernels, if there are any here, in modules whose products are
    in bfloat16 or int8. What they don't take is computed as before.
    """
    if compilation().kernels is None:
        return
    equipped: dict[type, Any] = {
        modeling_gemma2.Gemma2ForCausalLM: Gemma2ForCausalLM,
        Gemma2RMSNorm: CompiledNorm,
        InPlaceNorm: CompiledNorm,
        Gemma2MLP: CompiledMLP,
        FusedMLP: CompiledFusedMLP,
        Gemma2Attention: CompiledAttention,
        JoinedAttention: CompiledAttention,
    }
    for module in model.modules():
        kind = equipped.get(type(module))
        if kind is not None and kind.fits(module):
            module.__class__ = kind


def _kernels() -> Kernels:
    """Not kept in modules, which are copied."""
    kernels = compilation().kernels
    assert kernels is not None
    return kernels


def _known(*products: nn.Module) -> bool:
    """Whether nobody has changed them, and their weights are what the kernels read."""
    if {*map(type, products)} not in ({RowLinear}, {HeadLinear}, {Int8Linear}):
        return False
    return not any(module.weight.is_mkldnn for module in products)


class Gemma2ForCausalLM(modeling_gemma2.Gemma2ForCausalLM):  # type: ignore[no-untyped-call]
    """Logits are capped where they are, in float32. It is named like what it extends, since a
    checkpoint that is saved says the name.
    """

    @staticmethod
    def fits(model: Any) -> bool:
        return model.config.final_logit_softcapping is not None and _known(model.lm_head)

    @can_return_tuple  # type: ignore[untyped-decorator]
    @functools.wraps(modeling_gemma2.Gemma2ForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) > 1 or kwargs.get("labels") is not None:
            return super().forward(*args, **kwargs)
        keep = kwargs.pop("logits_to_keep", 0)
        output = self.model(*args, **kwargs, return_dict=True)
        states = output.last_hidden_state[:, slice(-keep, None) if isinstance(keep, int) else keep]
        return CausalLMOutputWithPast(
            logits=self._capped(states),
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
            **{CACHE_NAME: output.get(CACHE_NAME)},
        )

    def _capped(self, states: torch.Tensor) -> torch.Tensor:
        kernels = _kernels()
        softcap = cast(float, self.config.final_logit_softcapping)
        rows, weight = states.reshape(-1, states.shape[-1]), self.lm_head.weight
        if kernels.takes(rows, weight):
            scale = getattr(self.lm_head, "scale", None)
            logits = kernels.product(rows, weight, scale, torch.float32)
            logits = logits.view(*states.shape[:-1], -1)
        else:
            logits = self.lm_head(states).float()
        if not kernels.takes_capping(logits):
            return torch.tanh(logits / softcap) * softcap
        kernels.cap(logits, softcap)
        return logits


class CompiledNorm(InPlaceNorm):
    """Of any number of rows."""

    @staticmethod
    def fits(_: Any) -> bool:
        return True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernels = _kernels()
        if not kernels.takes_norm(x, self.weight):
            return super().forward(x)
        return kernels.normed(x, self.weight, self.eps)


class CompiledMLP(Gemma2MLP):
    """Few rows of gate and up, whose sums are rounded after the activation."""

    @staticmethod
    def fits(mlp: Any) -> bool:
        gelu = mlp.config.hidden_activation == "gelu_pytorch_tanh"
        return gelu and _known(mlp.gate_proj, mlp.up_proj)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernels, rows = _kernels(), x.reshape(-1, x.shape[-1])
        if not all(kernels.takes(rows, at.weight) for at in (self.gate_proj, self.up_proj)):
            return super().forward(x)  # type: ignore[no-any-return,no-untyped-call]
        gate, up = (
            kernels.product(rows, at.weight, getattr(at, "scale", None), torch.float32)
            for at in (self.gate_proj, self.up_proj)
        )
        gated = kernels.gated(gate, up)
        return self.down_proj(gated.view(*x.shape[:-1], -1))  # type: ignore[no-any-return]


class CompiledFusedMLP(CompiledMLP, FusedMLP):
    """The same, and more rows as that has them."""


class CompiledAttention(JoinedAttention):
    """Of few tokens; queries, keys and values are one product if their weights are neighbours."""

    @staticmethod
    def fits(attention: Any) -> bool:
        return _known(attention.q_proj, attention.k_proj, attention.v_proj)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not self._takes(hidden_states, position_embeddings, attention_mask):
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        kernels, product = _kernels(), self._product(hidden_states)
        queries, keys, values = kernels.rotated(product, *position_embeddings, heads, groups)
        if (cache := kwargs.get(CACHE_NAME)) is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
        output = kernels.attended(
            queries, keys, values, attention_mask, self.scaling, self.attn_logit_softcapping
        )
        return self.o_proj(output.flatten(2)), None

    def _takes(
        self,
        states: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> bool:
        return (
            few_rows(states)
            and self.config._attn_implementation == "grouped"
            and _kernels().takes_attention(states, *positions, mask)
        )

    def _product(self, states: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values, (rows, new, all of them)."""
        weight = as_one(*(at.weight for at in self.joined))
        if weight is None:
            return torch.cat([at(states) for at in self.joined], -1)
        if isinstance(self.q_proj, RowLinear):
            product = columns(states, weight, self.q_proj.few).mT
            return product.contiguous().view(*states.shape[:2], -1)
        rows = states.reshape(-1, states.shape[-1])
        if not _kernels().takes(rows, weight):
            return torch.cat([at(states) for at in self.joined], -1)
        scale = torch.cat([at.scale for at in self.joined])
        return _kernels().product(rows, weight, scale).view(*states.shape[:2], -1)
