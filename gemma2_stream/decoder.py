"""Gemma 2's decoder with what kernels.py has: products, and all that is between them.

`equip` changes the class of a model's own modules, so that names and ties stay. Knows torch and
Gemma 2's modules, and nothing of who decides what is wanted.
"""

from __future__ import annotations

import functools
from itertools import repeat
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2Attention,
    Gemma2DecoderLayer,
    Gemma2MLP,
    Gemma2RMSNorm,
)
from transformers.utils.generic import can_return_tuple

from .compiled import compilation
from .int8 import Int8Linear
from .kernels import MOST, Kernels, Layer
from .kv import CACHE_NAME, KVCache
from .norms import InPlaceNorm
from .products import (
    GELU,
    FusedMLP,
    HeadLinear,
    JoinedAttention,
    RowLinear,
    TurnedLinear,
    as_one,
    heard,
)


def equip(model: nn.Module) -> None:
    """Have tokens computed by the kernels, if there are any here, in modules whose products are in
    bfloat16 or int8. What they don't take is computed as before.
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
        output = self._in_one_call(*args, **kwargs)
        if output is None:
            output = self.model(*args, **kwargs, return_dict=True)
        states = output.last_hidden_state[:, slice(-keep, None) if isinstance(keep, int) else keep]
        return CausalLMOutputWithPast(
            logits=self._capped(states),
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
            **{CACHE_NAME: output.get(CACHE_NAME)},
        )

    def _in_one_call(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> Any:
        """What `self.model` says to few tokens behind others, without its layers, or None where it
        has to be asked: to call one layer after the other is a twentieth of a token's time.
        """
        # A cache that is given is written, whatever `use_cache` says: as in transformers.
        model, cache, kernels = cast(Any, self.model), others.pop(CACHE_NAME, None), _kernels()
        if (
            type(cache) is not KVCache
            or input_ids is None
            or not 0 < input_ids.numel() <= MOST
            or isinstance(attention_mask, dict)
            or any(value is not None for value in others.values())
            or (layers := self._described(len(cache.layers))) is None
        ):
            return None
        past = cache.get_seq_length()
        if any(at.get_seq_length() != past for at in cache.layers):
            return None
        states = model.embed_tokens(input_ids)
        if position_ids is None:
            positions = torch.arange(past, past + states.shape[1], device=states.device)
            position_ids = positions[None]
        cos, sin = model.rotary_emb(states, position_ids)
        masks = self._masks(states, attention_mask, position_ids, cache)
        rooms = [at.reserve(past + states.shape[1]) for at in cache.layers]
        if not (
            all(kernels.takes_attention(states, cos, sin, mask) for mask in masks.values())
            and all(map(kernels.keeps, rooms, layers, repeat(states), repeat(cos)))
        ):
            return None
        kinds = model.config.layer_types[: len(layers)]
        states = kernels.decoded(layers, rooms, kinds, masks, states, cos, sin, past)
        for at in cache.layers:
            at.show(past + states.shape[1])
        return BaseModelOutputWithPast(model.norm(states), cache)

    def _described(self, count: int) -> list[Layer] | None:
        """Its layers as the kernels want them, or None if there are not `count`, or one is another,
        or somebody listens.
        """
        config, layers = self.config, cast(Any, self.model.layers)
        if (
            not count == len(layers) == config.num_hidden_layers
            or config._attn_implementation != "grouped"
            or getattr(config, "output_hidden_states", False)
            or getattr(config, "output_attentions", False)
            or any(type(layer) is not CompiledLayer for layer in layers)
            or any(map(heard, (self.model, *layers)))
        ):
            return None
        attentions = (layer._modules["self_attn"] for layer in layers)
        if any(attention.layer_idx != number for number, attention in enumerate(attentions)):
            return None
        described = [layer._described() for layer in layers]
        return None if None in described else described

    def _masks(
        self,
        states: torch.Tensor,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: KVCache,
    ) -> dict[str, torch.Tensor | None]:
        """By the kind of layer; None where one new token sees all others."""
        config, (_, new, _) = cast(Any, self.config), states.shape
        if mask is None and new == 1 and cache.get_seq_length() < config.sliding_window:
            return dict.fromkeys(config.layer_types)
        given = {"config": config, "inputs_embeds": states, "attention_mask": mask}
        given |= {"position_ids": position_ids, CACHE_NAME: cache}
        return {
            "full_attention": create_causal_mask(**given),
            "sliding_attention": create_sliding_window_causal_mask(**given),
        }

    def _capped(self, states: torch.Tensor) -> torch.Tensor:
        kernels = _kernels()
        softcap = cast(float, self.config.final_logit_softcapping)
        rows = states.reshape(-1, states.shape[-1])
        direct = _known(self.lm_head) and not heard(self.lm_head)
        if direct and kernels.takes(rows, self.lm_head.weight):
            scale = getattr(self.lm_head, "scale", None)
            logits = kernels.product(rows, self.lm_head.weight, scale, torch.float32)
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
        return _normed(self, x)


class CompiledLayer(Gemma2DecoderLayer):  # type: ignore[no-untyped-call]
    """Of few tokens in two calls: calling one module after the other takes as long as most of what
    they compute. Of many, products are what they were.
    """

    @staticmethod
    def fits(layer: Any) -> bool:
        attention, mlp = layer.self_attn, layer.mlp
        return (
            mlp.config.hidden_activation == "gelu_pytorch_tanh"
            and type(attention) in (Gemma2Attention, JoinedAttention)
            and type(mlp) in (Gemma2MLP, FusedMLP)
            and _known(attention.q_proj, attention.k_proj, attention.v_proj)
            and _known(mlp.gate_proj, mlp.up_proj)
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
        kernels, layer, attention = _kernels(), None, self.self_attn
        if (
            hidden_states.shape[-1] == self.hidden_size
            and position_embeddings[0].shape[-1] == attention.head_dim
            and self.config._attn_implementation == "grouped"
            and kernels.takes_attention(hidden_states, *position_embeddings, attention_mask)
        ):
            layer = self._described()
        if layer is None:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, position_ids, *args, **kwargs
            )
        states, before, after = hidden_states.contiguous(), kernels.before, kernels.after
        if states.numel() > MOST * states.shape[-1]:
            before, after = self._before, self._after
        queries, keys, values = before(layer, states, *position_embeddings)
        if (cache := kwargs.get(CACHE_NAME)) is not None:
            keys, values = cache.update(keys, values, attention.layer_idx)
        return after(layer, states, queries, keys, values, attention_mask)

    def _before(
        self, layer: Layer, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the kernels', of more rows than their products gain for."""
        normed = _normed(self.input_layernorm, states)
        attention = cast(JoinedAttention, self.self_attn)
        product = torch.cat([linear(normed) for linear in attention.joined], -1)
        return _kernels().rotated(product, cos, sin, layer.heads, layer.groups)

    def _after(
        self,
        layer: Layer,
        states: torch.Tensor,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        at, softcap = self.self_attn, self.self_attn.attn_logit_softcapping
        attended = _kernels().attended(queries, keys, values, mask, at.scaling, softcap)
        attended = at.o_proj(attended.flatten(2))
        states = _normed(self.post_attention_layernorm, attended, states)
        gated = self.mlp(_normed(self.pre_feedforward_layernorm, states))
        return _normed(self.post_feedforward_layernorm, gated, states)

    def _described(self) -> Layer | None:
        """If nobody has changed its modules or listens to them, and their weights are what the
        kernels read.
        """
        # From their dicts, at every step: attributes of modules take ten times as long.
        own = self._modules
        attention, mlp = cast(Any, own["self_attn"]), cast(Any, own["mlp"])
        if type(attention) is not JoinedAttention or type(mlp) not in (Gemma2MLP, FusedMLP):
            return None
        modules: tuple[Any, ...] = (
            *map(attention._modules.get, _ATTENTION),
            *map(mlp._modules.get, _MLP),
            *map(own.get, _NORMS),
        )
        if tuple(map(type, modules)) not in _KINDS:
            return None
        others = (attention, mlp, activation := mlp._modules["act_fn"])
        if type(activation) is not GELU or any(map(heard, (*others, *modules))):
            return None
        scales = [module._buffers.get("scale") for module in modules]
        key = (
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            *[module._parameters["weight"].data_ptr() for module in modules],
            *[scale.data_ptr() for scale in scales if scale is not None],
            *[norm.eps for norm in modules[-len(_NORMS) :]],
            *(attention.scaling, attention.attn_logit_softcapping),
        )
        known = _DESCRIBED.get(self)
        if known is None or known[0] != key:
            known = _DESCRIBED[self] = key, self._describe(*modules)
        return known[1]

    def _describe(self, *modules: Any) -> Layer | None:
        inputs, (output, gate, up, down), norms = modules[:3], modules[3:7], modules[7:]
        if torch.is_grad_enabled() and any(module.weight.requires_grad for module in modules):
            return None
        kernels = _kernels()
        if not all(kernels.takes_norm(norm.weight, norm.weight) for norm in norms):
            return None
        if len({norm.eps for norm in norms}) > 1:
            return None
        at, config, size = self.self_attn, self.config, self.hidden_size
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        width, inner = heads * at.head_dim, config.intermediate_size
        weights = [as_one(*(module.weight for module in inputs))]
        weights += [module.weight for module in (output, gate, up, down)]
        shapes = [(width + 2 * groups * at.head_dim, size), (size, width)]
        shapes += [(inner, size), (inner, size), (size, inner)]
        if any(
            weight is None or weight.shape != shape or not kernels.reads(weight, 1)
            for weight, shape in zip(weights, shapes, strict=True)
        ):
            return None
        scales: list[torch.Tensor | None] = [None] * 5
        if isinstance(output, Int8Linear):
            scales = [torch.cat([module.scale for module in inputs]).bfloat16()]
            scales += [module.scale.bfloat16() for module in (output, gate, up, down)]
        softcap = at.attn_logit_softcapping or 0.0
        return Layer.of(
            [*zip(weights, scales, strict=True)],
            [norm.weight for norm in norms],
            *(size, heads, groups, at.head_dim),
            *(norms[0].eps, at.scaling / (softcap or 1), softcap),
        )


# A layer's modules with a weight, in the order of what they say.
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)

# Of the products and norms of a layer that is as it was equipped, in bfloat16 and in int8.
_KINDS = tuple(
    (*products, *4 * [CompiledNorm])
    for products in (
        (*3 * [RowLinear], TurnedLinear, RowLinear, RowLinear, TurnedLinear),
        7 * [Int8Linear],
    )
)

# Not kept in modules, which are copied.
_DESCRIBED: WeakKeyDictionary[CompiledLayer, tuple[Any, Layer | None]] = WeakKeyDictionary()


def _normed(norm: Any, states: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    return _kernels().normed(states, norm.weight, norm.eps, residual)
