"""Kernels in C, called on tensors.

Knows what layer.c wants, and nothing of models, and of who computes what.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

# What columns and sizes of heads must be a multiple of.
STEP = 32

TYPES = {torch.bfloat16: "bfloat16", torch.int8: "int8"}

# Rows up to which a product gains over torch's. In int8 it does beyond, by less and less.
MOST = 192


class Product(ctypes.Structure):
    """With a weight (outs, in), which may be int8 with a scale (outs,)."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("outs", ctypes.c_long),
        ("narrow", ctypes.c_int),
    )


class Layer(ctypes.Structure):
    """Addresses and sizes of a decoder layer, for as long as its weights stay where they are."""

    _fields_ = (
        *((name, Product) for name in ("inputs", "output", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("before_attention", "after_attention")),
        *((name, ctypes.c_void_p) for name in ("before_mlp", "after_mlp")),
        *((name, ctypes.c_long) for name in ("size", "heads", "groups", "head_size")),
        *((name, ctypes.c_float) for name in ("eps", "scaling", "softcap")),
        ("threads", ctypes.c_int),
    )

    @classmethod
    def of(
        cls,
        products: Sequence[tuple[Any, torch.Tensor | None]],
        norms: Sequence[torch.Tensor],
        *sizes: float,
    ) -> Self:
        """Of five weights with their scales, four norms, and the numbers in the order of fields."""
        described = [
            Product(
                weight.data_ptr(),
                None if scale is None else scale.data_ptr(),
                len(weight),
                weight.dtype == torch.int8,
            )
            for weight, scale in products
        ]
        addresses = [norm.data_ptr() for norm in norms]
        layer = cls(*described, *addresses, *sizes, torch.get_num_threads())
        layer.kept = products
        return layer


class Kept(ctypes.Structure):
    """Addresses of a layer's keys and values, and of its mask."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "mask")),
        *((name, ctypes.c_long) for name in ("row_step", "group_step")),
    )


class Kernels:
    """Calls into a library made of layer.c, on tensors in bfloat16 on the CPU. They are read by
    addresses: what `takes`, `takes_norm` and `takes_attention` refuse must not come here.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        address, number, real, count = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
        product = [*4 * [address], count, *3 * [number], count]

        def function(name: str, arguments: list[Any]) -> Any:
            found = getattr(library, name)
            found.argtypes, found.restype = arguments, None
            return found

        self._products = {dtype: function(name, product) for dtype, name in TYPES.items()}
        self._norm = function("norm", [*4 * [address], number, number, real, count])
        self._gated = function("gated", [*3 * [address], number, count])
        self._capped = function("capped", [address, number, real, count])
        self._rotated = function("rotated", [*6 * [address], *6 * [number], count])
        self._attend = function("attend", [*5 * [address], *9 * [number], real, real, count])
        layer = ctypes.POINTER(Layer)
        self._before = function("before", [layer, *6 * [address], *3 * [number]])
        self._after = function("after", [layer, *6 * [address], *6 * [number]])
        self._decoded = function(
            "decoded", [layer, ctypes.POINTER(Kept), number, *3 * [address], *5 * [number]]
        )
        for allocates in (self._attend, self._before, self._after, self._decoded):
            allocates.restype = ctypes.c_int

    def takes(self, rows: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether this is a product, and one that the library has. It reads memory by addresses, so
        whatever else comes is torch's, and its error.
        """
        return _ours(rows) and rows.shape[1] == weight.shape[1] and self.reads(weight, len(rows))

    def reads(self, weight: torch.Tensor, rows: int) -> bool:
        """Whether it has products of so many rows with `weight`."""
        return (
            0 < rows <= MOST
            and weight.dtype in TYPES
            and weight.shape[1] % STEP == 0
            and weight.is_contiguous()
            and weight.is_cpu
        )

    def product(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> torch.Tensor:
        """Of `rows` (n, in) with `weight` (out, in) in bfloat16 or int8, and `scale` (out,): (n,
        out) in `dtype`, which is bfloat16 or float32, like all sums.
        """
        (outs, ins), rows = weight.shape, rows.contiguous()
        scale = None if scale is None else scale.to(torch.bfloat16).contiguous()
        product = torch.empty((len(rows), outs), dtype=dtype, device=rows.device)
        self._products[weight.dtype](
            weight.data_ptr(),
            rows.data_ptr(),
            product.data_ptr(),
            None if scale is None else scale.data_ptr(),
            dtype == torch.bfloat16,
            len(rows),
            ins,
            outs,
            torch.get_num_threads(),
        )
        return product

    def takes_norm(self, x: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether `normed` has it."""
        fits = len(weight) % STEP == 0 and x.shape[-1:] == weight.shape
        return fits and _ours(x, weight) and weight.is_contiguous()

    def normed(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`x / rms(x) * (1 + weight)` for x of shape (..., size), added to `residual` of the same
        shape, which is contiguous.
        """
        x, size = x.contiguous(), len(weight)
        result = torch.empty_like(x)
        self._norm(
            x.data_ptr(),
            weight.data_ptr(),
            None if residual is None else residual.data_ptr(),
            result.data_ptr(),
            x.numel() // size,
            size,
            eps,
            torch.get_num_threads(),
        )
        return result

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """`gelu(gate) * up`, by tanh, of what `product` gave in float32, in bfloat16."""
        result = gate.new_empty(gate.shape, dtype=torch.bfloat16)
        threads = torch.get_num_threads()
        self._gated(gate.data_ptr(), up.data_ptr(), result.data_ptr(), gate.numel(), threads)
        return result

    def takes_capping(self, logits: torch.Tensor) -> bool:
        """Whether `cap` has it."""
        return (
            logits.is_cpu
            and logits.dtype == torch.float32
            and logits.is_contiguous()
            and logits.numel() % STEP == 0
            and not (torch.is_grad_enabled() and logits.requires_grad)
        )

    def cap(self, logits: torch.Tensor, softcap: float) -> None:
        """`softcap * tanh(logits / softcap)`, where they are."""
        self._capped(logits.data_ptr(), logits.numel(), softcap, torch.get_num_threads())

    def takes_attention(
        self,
        states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> bool:
        """Whether `rotated` and `attended` have it, for states (rows, new, ...) that heads of the
        size of `cos` and `sin` are made of, and what is added to their scores.
        """
        (rows, new, _), size = states.shape, cos.shape[-1]
        each, all_alike = (rows, new, size), (1, new, size)
        return (
            rows * new > 0
            and size % STEP == 0
            and _ours(states, cos, sin)
            and cos.shape == sin.shape
            and cos.shape in (each, all_alike)
            and (mask is None or (_ours(mask) and mask.shape[:-1] in ((rows, 1, new), (1, 1, new))))
        )

    def before(
        self, layer: Layer, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, as `rotated` gives them, of contiguous `states` (rows, new,
        size).
        """
        (rows, new, _), size = states.shape, layer.head_size
        heads, groups = layer.heads, layer.groups
        cos, sin = cos.contiguous(), sin.contiguous()
        queries, keys, values = (
            states.new_empty(rows, count, new, size) for count in (heads, groups, groups)
        )
        tensors = (states, cos, sin, queries, keys, values)
        addresses = [tensor.data_ptr() for tensor in tensors]
        _done(self._before(layer, *addresses, rows, new, len(cos) > 1))
        return queries, keys, values

    def after(
        self,
        layer: Layer,
        states: torch.Tensor,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """What the layer makes of `states` (rows, new, size), the rest as `attended` has it."""
        (rows, new, _), tokens = states.shape, keys.shape[2]
        keys, values = _alike(keys, values)
        mask = _spread(mask, new, tokens)
        result = torch.empty_like(states)
        done = self._after(
            layer,
            states.data_ptr(),
            queries.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            None if mask is None else mask.data_ptr(),
            result.data_ptr(),
            rows,
            new,
            tokens,
            keys.stride(0),
            keys.stride(1),
            mask is not None and len(mask) > 1,
        )
        _done(done)
        return result

    def keeps(self, room: Any, layer: Layer, states: torch.Tensor, cos: torch.Tensor) -> bool:
        """Whether `decoded` can compute `layer` of `states` (rows, new, size) at the positions of
        `cos`, and write its keys and values into `room`.
        """
        of_one = (states.shape[0], layer.groups, room.tokens, layer.head_size)
        return (
            (layer.size, layer.head_size) == (states.shape[2], cos.shape[-1])
            and _ours(room.keys, room.values)
            and room.keys.shape == room.values.shape == of_one
            and room.keys.is_contiguous()
            and room.values.is_contiguous()
        )

    def decoded(
        self,
        layers: Sequence[Layer],
        rooms: Sequence[Any],
        kinds: Sequence[str],
        masks: Mapping[str, torch.Tensor | None],
        states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        past: int,
    ) -> torch.Tensor:
        """What `layers` make of `states` (rows, new, size), behind `past` tokens whose keys and
        values are in `rooms`; theirs are written behind. Layers of one of `kinds` have its mask, as
        `attended` has it, and all masks have rows or none.
        """
        (rows, new, _), states = states.shape, states.clone(memory_format=torch.contiguous_format)
        cos, sin = cos.contiguous(), sin.contiguous()
        spread = {kind: _spread(mask, new, past + new) for kind, mask in masks.items()}
        kept = [
            Kept(
                room.keys.data_ptr(),
                room.values.data_ptr(),
                None if (mask := spread[kind]) is None else mask.data_ptr(),
                *room.keys.stride()[:2],
            )
            for room, kind in zip(rooms, kinds, strict=True)
        ]
        done = self._decoded(
            (Layer * len(layers))(*layers),
            (Kept * len(kept))(*kept),
            len(layers),
            *(tensor.data_ptr() for tensor in (states, cos, sin)),
            rows,
            new,
            past,
            len(cos) > 1,
            any(mask is not None and len(mask) > 1 for mask in spread.values()),
        )
        _done(done)
        return states

    def rotated(
        self, product: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, groups: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (rows, heads, new, size), keys and values (rows, groups, new, size) of a product
        (rows, new, all of them), at the positions of `cos` and `sin` (rows or 1, new, size).
        """
        (rows, new, _), size = product.shape, cos.shape[-1]
        product = product.contiguous().view(rows, new, heads + 2 * groups, size)
        cos, sin = cos.contiguous(), sin.contiguous()
        states = [product.new_empty(rows, count, new, size) for count in (heads, groups, groups)]
        self._rotated(
            *(tensor.data_ptr() for tensor in (product, cos, sin, *states)),
            rows,
            new,
            heads,
            groups,
            size,
            len(cos) > 1,
            torch.get_num_threads(),
        )
        return states[0], states[1], states[2]

    def attended(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attention of `queries` (rows, heads, new, size) over `keys` and `values` (rows, groups,
        tokens, size), which may have gaps between heads; `mask` (rows or 1, 1, new, tokens) is
        added. Returns (rows, new, heads, size).
        """
        (rows, heads, new, size), (groups, tokens) = queries.shape, keys.shape[1:3]
        keys, values = _alike(keys, values)
        mask = _spread(mask, new, tokens)
        output = queries.new_empty(rows, new, heads, size)
        done = self._attend(
            queries.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            None if mask is None else mask.data_ptr(),
            output.data_ptr(),
            rows,
            groups,
            heads // groups * new,
            new,
            tokens,
            size,
            keys.stride(0),
            keys.stride(1),
            mask is not None and len(mask) > 1,
            scaling / (softcap or 1),
            softcap or 0,
            torch.get_num_threads(),
        )
        _done(done)
        return output


def _spread(mask: torch.Tensor | None, new: int, tokens: int) -> torch.Tensor | None:
    return None if mask is None else mask.expand(-1, 1, new, tokens).contiguous()


def _alike(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the same strides, contiguous within a head, and in bfloat16, whatever a cache has."""
    keys, values = keys.bfloat16(), values.bfloat16()
    if keys.stride() != values.stride() or keys.stride()[2:] != (keys.shape[3], 1):
        keys, values = keys.contiguous(), values.contiguous()
    return keys, values


def _done(done: int) -> None:
    if not done:
        raise MemoryError(
            "no memory is left for what a layer computes at the side: lower max_rows or "
            "max_cached_tokens"
        )


def _ours(*tensors: torch.Tensor) -> bool:
    """Whether they are in bfloat16 on the CPU, and nobody wants gradients."""
    graded = torch.is_grad_enabled()
    return all(
        tensor.is_cpu and tensor.dtype == torch.bfloat16 and not (graded and tensor.requires_grad)
        for tensor in tensors
    )
