"""Weights in 8 bits on a CPU, and the products with them.

`shrink` changes the class of a model's own modules, so that names and ties stay. Knows torch, and
nothing of who decides what is wanted.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .compiled import compilation
from .products import is_plain

# `_weight_int8pack_mm` gains up to here, and loses beyond: measured on Gemma-2-2b's shapes.
FEW = 8

# Weights that are widened at once: a whole layer's in most, and never the vocabulary's.
WIDE = 2**25

# `_weight_int8pack_mm` reads beyond rows that are no multiple of 16, and crashes.
MULTIPLE = 32

# Rows of a packed product at a time: two halves of each, and oneDNN fills up with zeros to 256.
PIECE = 128

# oneDNN packs an int8 weight in groups of so many rows, and within them of so many columns.
GROUP = (64, 4)


def shrink(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold the weights of products and embeddings as int8, with a scale for each row, and compute
    in `dtype`. On processors with AMX, oneDNN arranges those of products once for all.

    One weight after the other, so that no more than one is there twice; tied ones stay tied.
    """
    packs = dtype in (torch.float32, torch.bfloat16) and _packs()
    compilation()  # now, and not in the middle of an answer
    for modules in list(_by_weight(model)):
        narrow, scale = _narrowed(modules[0].weight.data, dtype)
        shared = nn.Parameter(narrow, requires_grad=False)
        for module in modules:
            module.weight = shared
            module.register_buffer("scale", scale, persistent=False)
            module.__class__ = Int8Linear if isinstance(module, nn.Linear) else Int8Embedding
        if packs:
            _pack(modules)
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype, copy=True)  # or the whole file stays mapped
    model.to(dtype)


def _by_weight(model: nn.Module) -> Iterator[list[Any]]:
    """Modules that can be shrunk, together where they share a weight."""
    found: dict[int, list[Any]] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding) or is_plain(module):
            weight: Any = module.weight
            if weight.shape[1] % MULTIPLE == 0:
                found.setdefault(id(weight), []).append(module)
    yield from found.values()


def _narrowed(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` (out, in) as int8 of the same shape, and the scales (out,) in `dtype`."""
    narrow = torch.empty_like(weight, dtype=torch.int8)
    scale = torch.empty(len(weight), dtype=dtype)
    for start in range(0, len(weight), 512):  # what is wide stays small
        rows = slice(start, start + 512)
        wide = weight[rows].to(torch.float32, copy=True)
        scale[rows] = wide.abs().amax(1) / 127
        # By the scale as it was rounded, so that its rounding costs nothing; a row of zeros by 1.
        steps = scale[rows, None].float()
        narrow[rows] = wide.div_(steps.masked_fill(steps == 0, 1)).round_()
    return narrow, scale


@functools.cache
def _packs() -> bool:
    """Whether oneDNN has exact int8 products for the processor's matrix units: without AMX, one row
    takes it a hundred times as long.
    """
    most = torch.full((64, 64), -127, dtype=torch.int8)
    try:
        if not torch.cpu._is_amx_tile_supported():
            return False
        packed = torch.ops.onednn.qlinear_prepack(most, None)
        found = _packed_product(most, packed, torch.ones(64), torch.float32)
    except (AttributeError, RuntimeError):
        return False
    return bool((found == 64 * 127**2).all())


def _pack(modules: list[Any]) -> None:
    """Let `modules` share their int8 weight as oneDNN arranges it, (in, out) and opaque; those of
    them that look rows up get a view of its memory.
    """
    narrow: torch.Tensor = modules[0].weight
    tables = [module for module in modules if isinstance(module, nn.Embedding)]
    if len(tables) == len(modules):
        return
    packed = torch.ops.onednn.qlinear_prepack(narrow, None)
    if tables:
        if (table := _table(packed, narrow)) is None:
            return
        for module in tables:
            module.register_buffer("table", table, persistent=False)
    shared = nn.Parameter(packed, requires_grad=False)
    for module in modules:
        module.weight = shared


def _table(packed: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor | None:
    """The memory of `packed` as (groups, columns, rows, columns), if `narrow` is found there."""
    (outs, ins), (rows, columns) = narrow.shape, GROUP
    if outs % rows or ins % columns:
        return None
    address = torch.ops.mkldnn.data_ptr(packed)
    memory = torch.frombuffer(
        (ctypes.c_int8 * narrow.numel()).from_address(address), dtype=narrow.dtype
    )
    table = memory.view(outs // rows, ins // columns, rows, columns)
    for group, true in zip(table, torch.split(narrow, rows), strict=True):
        if not torch.equal(group.transpose(0, 1).reshape(rows, ins), true):
            return None
    return table


def _packed_product(
    rows: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """int8 `rows` (n, in) times the packed weight, times the `scale` of each output: (n, out)."""
    none = torch.empty(0, dtype=torch.int32)
    product = torch.ops.onednn.qlinear_pointwise
    return product(  # type: ignore[no-any-return]
        rows, 1.0, 0, packed, scale, none, None, 1.0, 0, dtype, "none", [], ""
    )


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` (n, in) as `(high + low / 256) * step`: int8 (2, n, in), and for each row a power of two,
    (n, 1), by which nothing is rounded. One byte would change what a model says; two do not.
    """
    # Infinity and NaN make step NaN, which then is all of the row's product.
    largest = x.abs().amax(-1, keepdim=True).div_(127).clamp_min_(1e-30)
    step = largest / torch.frexp(largest).mantissa
    whole = (x * (256 / step)).to(torch.int16)
    halves = torch.empty((2, *x.shape), dtype=torch.int8)
    halves[1] = whole  # what is over is cut off
    halves[0] = whole.add_(128).bitwise_right_shift_(8)
    return halves, step


class Int8Linear(nn.Linear):
    """`nn.Linear` without bias over int8 rows, each with its scale; computes in x's dtype."""

    scale: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.is_mkldnn:
            return self._packed(x)
        rows = x.reshape(-1, self.in_features)
        kernels = compilation().kernels
        if kernels is not None and kernels.takes(rows, self.weight):
            product = kernels.product(rows, self.weight, self.scale)
        elif len(rows) <= FEW:
            product = torch._weight_int8pack_mm(rows.contiguous(), self.weight, self.scale)
        else:
            blocks = torch.split(self.weight, max(1, WIDE // self.in_features))
            parts = [functional.linear(rows, _widened(block, x.dtype)) for block in blocks]
            product = (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).mul_(self.scale)
        return product.view(*x.shape[:-1], self.out_features)

    def _packed(self, x: torch.Tensor) -> torch.Tensor:
        product = x.new_empty(*x.shape[:-1], self.out_features)
        for (halves, step), into in zip(_halved(x), _pieces(product), strict=True):
            sums = _packed_product(halves.flatten(0, 1), self.weight, self.scale.float(), x.dtype)
            high, low = sums.view(2, len(into), -1)
            torch.add(high, low, alpha=1 / 256, out=into).mul_(step)
        return product


def _halved(x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The halves of each piece of `x` (..., in). Those of the tensor that this thread asked for
    last are still there: queries, keys and values are products of one.
    """
    versioned = not x.is_inference()
    known = getattr(_used, "halved", None)
    if versioned and known is not None and known[0] is x and known[1] == x._version:
        return known[2]  # type: ignore[no-any-return]
    halved = [_halves(piece) for piece in _pieces(x)]
    _used.halved = (x, x._version, halved) if versioned else None
    return halved


def _pieces(x: torch.Tensor) -> list[torch.Tensor]:
    return [piece for piece in torch.split(x.reshape(-1, x.shape[-1]), PIECE) if len(piece)]


_used = threading.local()


def _widened(block: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`block` in `dtype`, until this thread asks for another: in the same memory, since new memory
    takes several times as long to come by as to fill.
    """
    room: torch.Tensor | None = getattr(_used, "room", None)
    if room is None or room.dtype != dtype or room.numel() < block.numel():
        with torch.inference_mode(False):  # or nobody could write there outside of that mode
            room = _used.room = torch.empty(block.numel(), dtype=dtype)
    return room[: block.numel()].view(block.shape).copy_(block)


class Int8Embedding(nn.Embedding):
    """`nn.Embedding` over int8 rows, each with its scale, and what Gemma's multiplies it with."""

    scale: torch.Tensor
    table: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.weight.is_mkldnn:
            rows = self.table[input // GROUP[0], :, input % GROUP[0]].flatten(-2)
        else:
            rows = self.weight[input]
        rows = rows.to(self.scale.dtype) * self.scale[input, None]
        factor = getattr(self, "embed_scale", None)
        return rows if factor is None else rows * factor.to(rows.dtype)
