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
    Gemma2DecoderLayer,
    Gemma2RMSNorm,
)
from transformers.utils.generic import can_return_tuple

from .compiled import STEP, Kernels, compilation
from .int8 import Int8Linear
from .kv import CACHE_NAME
from .norms import InPlaceNorm
from .products import (
    HeadLinear,
    JoinedAttention,
    RowLinear,
    TurnedLinear,
    as_one,
    columns,
    few_rows,
)


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
        Gemma2DecoderLayer: CompiledLayer,
    }
    for module in model.modules():
        kind = equipped.get(type(module))
        if kind is not None and kind.fits(module):
            module.__class__ = kind
            if kind is CompiledLayer:
                module.self_attn.__class__ = JoinedAttention  # so that they come to be neighbours


def _kernels() -> Kernels:
    """Not kept in modules, which are copied."""
    kernels = compilation().kernels
    assert kernels is not None
    return kernels


def _known(*products: nn.Module) -> bool:
    """Whether nobody has changed them, and their weights are what the kernels read."""
    if {*map(type, products)} not in ({RowLinear}, {TurnedLinear}, {HeadLinear}, {Int8Linear}):
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


class CompiledLayer(Gemma2DecoderLayer):  # type: ignore[no-untyped-call]
    """Of few tokens, in one go: a call of a module takes as long as most of what is computed."""

    @staticmethod
    def fits(layer: Any) -> bool:
        attention, mlp = layer.self_attn, layer.mlp
        inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
        return (
            mlp.config.hidden_activation == "gelu_pytorch_tanh"
            and mlp.config.intermediate_size % STEP == 0
            and _known(*inputs, mlp.gate_proj, mlp.up_proj)
            and _known(attention.o_proj, mlp.down_proj)
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        attention, kernels = cast(JoinedAttention, self.self_attn), _kernels()
        residual = hidden_states.reshape(-1, hidden_states.shape[-1])
        if not (
            few_rows(residual)
            and self.config._attn_implementation == "grouped"
            and kernels.takes_norm(residual, self.input_layernorm.weight)
            and kernels.takes_attention(hidden_states, *position_embeddings, attention_mask)
        ):
            return super().forward(
                hidden_states, position_embeddings, attention_mask, position_ids, *args, **kwargs
            )

        def normed(
            norm: Any, states: torch.Tensor, residual: torch.Tensor | None = None
        ) -> torch.Tensor:
            return kernels.normed(states, norm.weight, norm.eps, residual)

        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        product = _product(normed(self.input_layernorm, residual), *attention.joined)
        product = product.view(*hidden_states.shape[:2], -1)
        queries, keys, values = kernels.rotated(product, *position_embeddings, heads, groups)
        if (cache := kwargs.get(CACHE_NAME)) is not None:
            keys, values = cache.update(keys, values, attention.layer_idx)
        states = kernels.attended(
            queries,
            keys,
            values,
            attention_mask,
            attention.scaling,
            attention.attn_logit_softcapping,
        )
        states = _product(states.view(len(residual), -1), attention.o_proj)
        residual = normed(self.post_attention_layernorm, states, residual)
        states = self._fed(normed(self.pre_feedforward_layernorm, residual))
        return normed(self.post_feedforward_layernorm, states, residual).view(hidden_states.shape)

    def _fed(self, rows: torch.Tensor) -> torch.Tensor:
        """What the MLP makes of `rows` (n, hidden size)."""
        mlp, kernels = self.mlp, _kernels()
        if not all(kernels.takes(rows, at.weight) for at in (mlp.gate_proj, mlp.up_proj)):
            return mlp(rows)  # type: ignore[no-any-return]
        gate, up = (
            kernels.product(rows, at.weight, getattr(at, "scale", None), torch.float32)
            for at in (mlp.gate_proj, mlp.up_proj)
        )
        return _product(kernels.gated(gate, up), mlp.down_proj)


def _product(rows: torch.Tensor, *modules: Any) -> torch.Tensor:
    """Of `rows` (n, in) and all `modules`, (n, all outputs): one, if weights are neighbours."""
    if len(modules) == 1:
        weight, scale = modules[0].weight, getattr(modules[0], "scale", None)
    else:
        weight = as_one(*(module.weight for module in modules))
        scales = [module.scale for module in modules if isinstance(module, Int8Linear)]
        scale = torch.cat(scales) if scales else None
    kernels = _kernels()
    if weight is not None and kernels.takes(rows, weight):
        return kernels.product(rows, weight, scale)
    if weight is not None and isinstance(modules[0], TurnedLinear):
        return columns(rows, weight, modules[0].few).mT.contiguous()
    return torch.cat([module(rows) for module in modules], -1)
