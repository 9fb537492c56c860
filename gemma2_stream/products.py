"""Matrix products that read bfloat16 weights faster than `nn.Linear` does on a CPU.

`hasten` changes the class of a model's own modules, so that names and ties stay. Knows torch and
Gemma 2's attention and MLP, and nothing of who decides what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as everywhere
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2MLP

from .attention import attend_few, scores_scale
from .compiled import compilation
from .kv import CACHE_NAME

# Beyond so many rows to arrange them takes longer than to arrange the weight.
MANY = 64

# Rows from which to arrange them pays without AMX, if torch has all products.
SOME = 7

# Rows of the head that are turned at once: few enough for the cache of a core.
BLOCK = 4096

# Bytes after which a weight's rows come to lie in the same places of a core's cache.
ALIAS = 4096


class Few(NamedTuple):
    """How few rows are multiplied soonest with a weight."""

    # Rows from which they are arranged, so that the weight is read as it is; MANY is the most.
    turned_from: int
    # For fewer: the product of rows (n, in) with the weight (out, in), as (n, out).
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def hasten(model: nn.Module, few: Callable[[torch.Tensor], Few] | None = None) -> None:
    """Let products read their weights nearer to the speed of memory, and keep the weights.

    For each product `F.linear` arranges bfloat16 anew for the processor's matrix units, a sixth to
    a third of its time; few rows are multiplied without that. Many pay for it, and have what
    follows a product in Gemma 2's MLP computed while it is still at hand. `few` says how for each
    weight; None is what was measured to be best for the processor.
    """
    few = few or best_here()
    for module in model.modules():
        if is_plain(module) and module.weight.dtype == torch.bfloat16:
            module.__class__ = RowLinear
            cast(RowLinear, module).few = few(module.weight)
    if type(head := getattr(model, "lm_head", None)) is RowLinear:
        head.__class__ = HeadLinear
    for module in model.modules():
        if type(module) is Gemma2MLP and type(module.gate_proj) is RowLinear:
            _leave_turned(module.down_proj)
            if _fuses(module):
                module.__class__ = FusedMLP
        elif type(module) is Gemma2Attention and type(module.q_proj) is RowLinear:
            _leave_turned(module.o_proj)
            module.__class__ = JoinedAttention
    if any(isinstance(module, RowLinear) for module in model.modules()):
        # They don't come back from oneDNN's products, nor from what is written in place.
        model.requires_grad_(False)


def _leave_turned(linear: nn.Module) -> None:
    if type(linear) is RowLinear:
        linear.__class__ = TurnedLinear  # type: ignore[assignment]


def neighbours(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Weights that few rows are multiplied by at once, if they lie behind one another in memory:
    three products take a third longer than one of their size.
    """
    for module in model.modules():
        if isinstance(module, JoinedAttention):
            yield [projection.weight for projection in module.joined]


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether nobody has changed it, and it adds nothing."""
    return type(module) is nn.Linear and module._parameters["bias"] is None


def _fuses(mlp: Gemma2MLP) -> bool:
    """Whether oneDNN has the matrix products of `mlp`, and what is between them."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    ready: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return ready and mlp.config.hidden_activation == "gelu_pytorch_tanh"


def best_here() -> Callable[[torch.Tensor], Few]:
    """Which of the following is for this processor. May compile, once in a process."""
    units = torch.cpu.get_capabilities()
    if units.get("amx_bf16"):
        return with_amx
    if not units.get("avx512_bf16"):
        return with_neither
    return with_avx512 if compilation().kernels is None else with_compiler


def with_amx(_: torch.Tensor) -> Few:
    """Measured on processors of Intel."""
    return Few(2, _by_vector)


def with_avx512(weight: torch.Tensor) -> Few:
    """AVX512-BF16, measured on Zen 4."""
    return Few(MANY + 1 if _aliases(weight) else SOME, _two_by_two)


def with_compiler(_: torch.Tensor) -> Few:
    """The same, and what kernels.py has."""
    return Few(MANY + 1, _compiled)


def with_neither(_: torch.Tensor) -> Few:
    """Seen on Zen 4 with either unit hidden from oneDNN and torch."""
    return Few(MANY + 1, _by_vector)


def _aliases(weight: torch.Tensor) -> bool:
    """Then a product that reads it as it is takes twice as long."""
    return weight.stride(0) * weight.itemsize % ALIAS == 0


def _by_vector(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if len(rows) == 1:
        return torch.mv(weight, rows[0])[None]
    return functional.linear(rows, weight)


def _two_by_two(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Two rows take less time than one."""
    several = rows.expand(2, -1) if len(rows) == 1 else rows
    return functional.linear(several, weight)[: len(rows)]


def _compiled(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    kernels = compilation().kernels
    if kernels is None or not kernels.takes(rows, weight):
        return _two_by_two(rows, weight)
    return kernels.product(rows, weight)


def heard(module: nn.Module) -> bool:
    """Whether somebody listens to its calls, or to those of all modules, or has put in another."""
    own = module.__dict__
    everyone = everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or everyone)


def few_rows(x: torch.Tensor) -> bool:
    return x.numel() <= MANY * x.shape[-1]


def columns(x: torch.Tensor, weight: torch.Tensor, few: Few) -> torch.Tensor:
    """The product of few rows x, shape (..., in), with `weight`, shape (out, in), as it leaves the
    processor: as (out, rows), contiguous where rows are turned.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) < few.turned_from:
        return few.product(rows, weight).mT
    return torch.matmul(weight, rows.mT)


def as_one(first: nn.Parameter, *others: nn.Parameter) -> torch.Tensor | None:
    """Weights of shape (..., in) in one, where they lie behind one another in their memory."""
    memory, end, outs = first.untyped_storage().data_ptr(), first.data_ptr(), len(first)
    before = first
    for weight in others:
        end += before.nbytes
        if weight.data_ptr() != end or weight.untyped_storage().data_ptr() != memory:
            return None
        before, outs = weight, outs + len(weight)
    return first.as_strided((outs, first.shape[1]), first.stride())


class TurnedLinear(nn.Linear):
    """`nn.Linear` without bias in bfloat16; few rows of x, shape (..., in), take the product the
    other way round, in which it is they that are arranged, and the weight is read as it is. Their
    outputs stay apart: for a norm, which copies what it gets, and puts them together.
    """

    few: Few

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not few_rows(x):
            # Of more dimensions, torch may copy a weight without gradients for each of the first.
            product = functional.linear(x.reshape(-1, x.shape[-1]), self.weight)
            return product.view(*x.shape[:-1], len(self.weight))
        return columns(x, self.weight, self.few).mT.view(*x.shape[:-1], len(self.weight))


class RowLinear(TurnedLinear):
    """The same for whatever reads a row's outputs: beside one another, or it would take two to four
    times as long.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).contiguous()


class JoinedAttention(Gemma2Attention):
    """Grouped attention of few rows: queries, keys and values are one product, and stay as it
    leaves the processor, with a row's outputs apart, until attention wants them otherwise.
    """

    @property
    def joined(self) -> list[Any]:
        return [self.q_proj, self.k_proj, self.v_proj]

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        weight = self._weight() if few_rows(hidden_states) else None
        if weight is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        (rows, new, _), size = hidden_states.shape, self.head_dim
        product = columns(hidden_states, weight, self.joined[0].few)
        product = product.view(-1, size, rows, new)
        shared = self.config.num_key_value_heads
        heads = len(product) - 2 * shared
        turned = _rotated(product[: heads + shared], *position_embeddings)
        queries = turned[:heads].mul_(scores_scale(self.scaling, self.attn_logit_softcapping))
        queries = queries.view(shared, -1, size, rows, new).permute(3, 0, 2, 1, 4)
        queries = queries.to(product.dtype, memory_format=torch.contiguous_format)
        keys = turned[heads:].to(product.dtype).permute(2, 0, 3, 1)
        values = product[heads + shared :].permute(2, 0, 3, 1)
        if (cache := kwargs.get(CACHE_NAME)) is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
        output = attend_few(
            queries.view(rows, shared, size, -1),
            keys,
            values,
            attention_mask,
            self.attn_logit_softcapping,
        )
        output = output.view(rows, heads, new, size).transpose(1, 2)
        return self.o_proj(output.reshape(rows, new, -1)), None

    def _weight(self) -> torch.Tensor | None:
        """Of all three, where they lie behind one another and nobody wants other attention."""
        joined = self.joined
        if self.config._attn_implementation != "grouped" or {*map(type, joined)} != {RowLinear}:
            return None
        if any(map(heard, joined)):
            return None
        return as_one(*(projection.weight for projection in joined))


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`states` (heads, head size, rows, new) at the positions of `cos` and `sin` (rows or 1, new,
    head size), in float32.
    """
    heads, size, rows, new = states.shape
    cos, sin = (each[..., : size // 2].permute(2, 0, 1).float() for each in (cos, sin))
    halves = states.view(heads, 2, size // 2, rows, new).float()
    turned = halves * cos
    turned[:, 0].addcmul_(halves[:, 1], sin, value=-1)
    turned[:, 1].addcmul_(halves[:, 0], sin)
    return turned.view(states.shape)


class HeadLinear(RowLinear):
    """The same for a vocabulary of outputs, which are given in float32: `generate` makes that of
    them anyway, and what Gemma 2 does to them before takes a third of the time.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not few_rows(x):
            return super().forward(x).float()
        product = TurnedLinear.forward(self, x)
        if product.is_contiguous():
            return product.float()
        # In blocks that stay in a core's cache: half the time.
        rows = product.new_empty(product.shape, dtype=torch.float32)
        for block, copy in zip(
            torch.split(product, BLOCK, -1), torch.split(rows, BLOCK, -1), strict=True
        ):
            copy.copy_(block)
        return rows


GELU = type(ACT2FN["gelu_pytorch_tanh"])


class FusedMLP(Gemma2MLP):
    """`down(gelu(gate(x)) * up(x))`, where the activation and the product with it are computed
    where the matrix products leave their sums, before they are rounded. Few rows are turned, which
    is how `down` wants them.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        # As an adapter may come, or another activation.
        inner = (self.gate_proj, self.up_proj, self.act_fn)
        if (*map(type, inner),) != (RowLinear, RowLinear, GELU) or any(map(heard, inner)):
            return super().forward(x)  # type: ignore[no-any-return,no-untyped-call]
        if few_rows(x) and len(rows) < cast(RowLinear, self.gate_proj).few.turned_from:
            return super().forward(x)  # type: ignore[no-any-return,no-untyped-call]
        gate, up = self.gate_proj.weight, self.up_proj.weight
        gated = _gated(gate, rows, up, rows).mT if few_rows(x) else _gated(rows, gate, rows, up)
        return self.down_proj(gated.view(*x.shape[:-1], -1))  # type: ignore[no-any-return]


def _gated(
    left: torch.Tensor, right: torch.Tensor, up_left: torch.Tensor, up_right: torch.Tensor
) -> torch.Tensor:
    """`gelu(left @ right.mT) * (up_left @ up_right.mT)`"""
    linear = torch.ops.mkldnn._linear_pointwise
    gate = linear(left, right, None, "gelu", [], "tanh")
    gated: torch.Tensor = linear.binary(up_left, gate, up_right, None, "mul")
    return gated
