"""Matrix products that read bfloat16 weights faster than `nn.Linear` does on a CPU.

`hasten` changes the class of a model's own modules, so that names and ties stay. Knows torch and
Gemma 2's attention and MLP, and nothing of who decides what is wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn import functional
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2MLP

# Beyond so many rows to arrange them takes longer than to arrange the weight.
MANY = 64

# Rows of the head that are turned at once: few enough for the cache of a core.
BLOCK = 4096


def hasten(model: nn.Module) -> None:
    """Let products read their weights nearer to the speed of memory, and keep the weights.

    For each product `F.linear` arranges bfloat16 anew for the processor's matrix units, a sixth to
    a third of its time; few rows are multiplied without that. Many pay for it, and have what
    follows a product in Gemma 2's MLP computed while it is still at hand.
    """
    for module in model.modules():
        if is_plain(module) and module.weight.dtype == torch.bfloat16:
            module.__class__ = RowLinear
    if type(head := getattr(model, "lm_head", None)) is RowLinear:
        head.__class__ = HeadLinear
    for module in model.modules():
        if type(module) is Gemma2MLP and _fuses(module):
            module.__class__ = FusedMLP
        elif type(module) is Gemma2Attention and type(module.q_proj) is RowLinear:
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                projection.__class__ = JoinedLinear
            module.__class__ = JoinedAttention


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
    ready = torch.ops.mkldnn._is_mkldnn_bf16_supported() and type(mlp.gate_proj) is RowLinear
    return ready and mlp.config.hidden_activation == "gelu_pytorch_tanh"


def _few(x: torch.Tensor) -> bool:
    return x.numel() <= MANY * x.shape[-1]


def _turned(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product of x, shape (..., in), with `weight`, shape (out, in), as it leaves the
    processor: in memory, rows lie side by side.
    """
    if x.numel() == x.shape[-1]:
        product = torch.mv(weight, x.reshape(-1))
    else:
        product = torch.matmul(weight, x.reshape(-1, x.shape[-1]).mT).mT
    return product.view(*x.shape[:-1], len(weight))


def _as_one(first: nn.Parameter, *others: nn.Parameter) -> torch.Tensor | None:
    """Weights of shape (..., in) in one, where they lie behind one another in their memory."""
    memory, end, outs = first.untyped_storage().data_ptr(), first.data_ptr(), len(first)
    before = first
    for weight in others:
        end += before.nbytes
        if weight.data_ptr() != end or weight.untyped_storage().data_ptr() != memory:
            return None
        before, outs = weight, outs + len(weight)
    return first.as_strided((outs, first.shape[1]), first.stride())


class RowLinear(nn.Linear):
    """`nn.Linear` without bias in bfloat16; few rows of x, shape (..., in), take the product the
    other way round, in which it is they that are arranged, and the weight is read as it is.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not _few(x):
            return functional.linear(x, self.weight)
        # All that adds or normalizes them reads a row's outputs: beside one another, or it would
        # take two to four times as long.
        return _turned(x, self.weight).contiguous()


class JoinedLinear(RowLinear):
    """One of several products of the same x, which may be `ready` for it: (x, its product)."""

    ready: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ready, self.ready = self.ready, None
        # Another thread's forward on a model that is shared has an x of its own.
        return ready[1] if ready is not None and ready[0] is x else super().forward(x)


class JoinedAttention(Gemma2Attention):
    """Attention whose queries, keys and values are one product of few rows."""

    @property
    def joined(self) -> list[Any]:
        return [self.q_proj, self.k_proj, self.v_proj]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        projections = self.joined
        if _few(hidden_states):
            weights = [projection.weight for projection in projections]
            if (weight := _as_one(*weights)) is not None:
                product = _turned(hidden_states, weight).contiguous()
                parts = torch.split(product, [len(weight) for weight in weights], -1)
                for projection, part in zip(projections, parts, strict=True):
                    projection.ready = hidden_states, part
        return super().forward(hidden_states, *args, **kwargs)


class HeadLinear(RowLinear):
    """The same for a vocabulary of outputs, which are given in float32: `generate` makes that of
    them anyway, and what Gemma 2 does to them before takes a third of the time.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not _few(x):
            return super().forward(x).float()
        product = _turned(x, self.weight)
        if product.is_contiguous():
            return product.float()
        # In blocks that stay in a core's cache: half the time.
        rows = product.new_empty(product.shape, dtype=torch.float32)
        for block, copy in zip(
            torch.split(product, BLOCK, -1), torch.split(rows, BLOCK, -1), strict=True
        ):
            copy.copy_(block)
        return rows


class FusedMLP(Gemma2MLP):
    """`down(gelu(gate(x)) * up(x))`, where the activation and the product with it are computed
    where the matrix products leave their sums, before they are rounded. Few rows are turned, which
    is how `down` wants them.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) == 1:
            return super().forward(x)  # type: ignore[no-any-return,no-untyped-call]
        gate, up = self.gate_proj.weight, self.up_proj.weight
        if len(rows) > MANY:
            gated = _gated(rows, gate, rows, up)
        else:
            gated = _gated(gate, rows, up, rows).mT
        return self.down_proj(gated.view(*x.shape[:-1], -1))  # type: ignore[no-any-return]


def _gated(
    left: torch.Tensor, right: torch.Tensor, up_left: torch.Tensor, up_right: torch.Tensor
) -> torch.Tensor:
    """`gelu(left @ right.mT) * (up_left @ up_right.mT)`"""
    linear = torch.ops.mkldnn._linear_pointwise
    gate = linear(left, right, None, "gelu", [], "tanh")
    gated: torch.Tensor = linear.binary(up_left, gate, up_right, None, "mul")
    return gated
