"""Matrix products that read bfloat16 weights faster than `nn.Linear` does on a CPU.

`hasten` changes the class of a model's own modules, so that names and ties stay. Knows torch and
Gemma 2's MLP, and nothing of who decides what is wanted.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn
from torch.nn import functional
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP

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


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether nobody has changed it, and it adds nothing."""
    return type(module) is nn.Linear and module._parameters["bias"] is None


def _fuses(mlp: Gemma2MLP) -> bool:
    """Whether oneDNN has the matrix products of `mlp`, and what is between them."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    ready = torch.ops.mkldnn._is_mkldnn_bf16_supported() and type(mlp.gate_proj) is RowLinear
    return ready and mlp.config.hidden_activation == "gelu_pytorch_tanh"


class RowLinear(nn.Linear):
    """`nn.Linear` without bias in bfloat16; few rows of x, shape (..., in), take the product the
    other way round, in which it is they that are arranged, and the weight is read as it is.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // self.in_features
        if rows == 1:
            return torch.mv(self.weight, x.reshape(-1)).view(*x.shape[:-1], self.out_features)
        if rows > MANY:
            return functional.linear(x, self.weight)
        return self.beside(self.turned(x))

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """The product of few rows as it leaves the processor: in memory, rows lie side by side."""
        product = torch.matmul(self.weight, x.reshape(-1, self.in_features).mT)
        return product.mT.reshape(*x.shape[:-1], self.out_features)

    def beside(self, product: torch.Tensor) -> torch.Tensor:
        """With each row's outputs side by side, as all that adds or normalizes them reads them: it
        would take two to four times as long.
        """
        return product.contiguous()


class HeadLinear(RowLinear):
    """The same for a vocabulary of outputs."""

    def beside(self, product: torch.Tensor) -> torch.Tensor:
        # In blocks that stay in a core's cache: half the time of `contiguous`.
        rows = torch.empty_like(product, memory_format=torch.contiguous_format)
        for block, copy in zip(
            torch.split(product, BLOCK, -1), torch.split(rows, BLOCK, -1), strict=True
        ):
            copy.copy_(block)
        return rows


class FusedMLP(Gemma2MLP):
    """`down(gelu(gate(x)) * up(x))`; of many rows, the activation and the product with it are
    computed where the matrix product leaves its sums, before they are rounded; of few, they stay
    as they are turned, which is how `down` wants them.
    """

    gate_proj: RowLinear
    up_proj: RowLinear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        if rows == 1:
            return super().forward(x)  # type: ignore[no-any-return,no-untyped-call]
        if rows <= MANY:
            gate, up = self.gate_proj.turned(x), self.up_proj.turned(x)
            return self.down_proj(self.act_fn(gate).mul_(up))  # type: ignore[no-any-return]
        linear = torch.ops.mkldnn._linear_pointwise
        gate = linear(x, self.gate_proj.weight, None, "gelu", [], "tanh")
        gated = linear.binary(x, gate, self.up_proj.weight, None, "mul")
        return functional.linear(gated, self.down_proj.weight)
