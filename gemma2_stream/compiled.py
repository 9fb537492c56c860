"""Kernels in C, compiled for this processor when a model is loaded.

Knows a C compiler and what layer.c wants; nothing of models, and of who computes what.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch.nn import functional

SOURCE = Path(__file__).with_name("layer.c")

# What columns and sizes of heads must be a multiple of.
STEP = 32

OPTIONS = ("-O3", "-march=native", "-fPIC")
TYPES = {torch.bfloat16: "bfloat16", torch.int8: "int8"}

# Rows up to which a product gains over torch's. In int8 it does beyond, by less and less.
MOST = 192
SECONDS = 60


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
        product = torch.empty((len(rows), outs), dtype=dtype)
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
        result = torch.empty(gate.shape, dtype=torch.bfloat16)
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
        if mask is not None:
            mask = mask.expand(-1, 1, new, tokens).contiguous()
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
        masks: Sequence[torch.Tensor | None],
        states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        past: int,
    ) -> torch.Tensor:
        """What `layers` make of `states` (rows, new, size), behind `past` tokens whose keys and
        values are in `rooms`; theirs are written behind. A mask for each layer is as `attended` has
        it, and all have rows or none.
        """
        (rows, new, _), states = states.shape, states.clone(memory_format=torch.contiguous_format)
        cos, sin, one_by_one = cos.contiguous(), sin.contiguous(), False
        wide: dict[int, torch.Tensor | None] = {id(None): None}
        for mask in masks:
            if mask is not None and id(mask) not in wide:  # layers of one kind have the same
                wide[id(mask)] = mask.expand(-1, 1, new, past + new).contiguous()
                one_by_one = len(mask) > 1
        kept = [
            Kept(
                room.keys.data_ptr(),
                room.values.data_ptr(),
                None if (own := wide[id(mask)]) is None else own.data_ptr(),
                *room.keys.stride()[:2],
            )
            for room, mask in zip(rooms, masks, strict=True)
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
            one_by_one,
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
        if mask is not None:
            mask = mask.expand(-1, 1, new, tokens).contiguous()
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


@dataclass(frozen=True)
class Compilation:
    """What came of it: the kernels, or None, and why in a few words."""

    kernels: Kernels | None
    reason: str


@functools.cache
def compilation() -> Compilation:
    """Of this process. Takes two seconds when it is first asked for, and leaves nothing on disk.

    Only for processors with AVX512-BF16 and no AMX: elsewhere torch's own are as fast as memory, or
    nothing was measured by us.
    """
    units = torch.cpu.get_capabilities()
    if units.get("amx_bf16"):
        return Compilation(None, "oneDNN's, for AMX")
    if not units.get("avx512_bf16"):
        return Compilation(None, "torch's, for a processor without AVX512-BF16")
    return compile_kernels()


def compile_kernels() -> Compilation:
    """By the compiler in the environment variable CC, or by `cc`. Never raises: a machine without a
    compiler, or with one that can't, has torch's products.
    """
    if not sys.platform.startswith("linux"):
        return Compilation(None, f"torch's, on {sys.platform}")
    named = os.environ.get("CC", "").strip() or "cc"
    try:
        compiler = shlex.split(named)
    except ValueError as error:
        return Compilation(None, f"torch's: CC={named!r} is no command: {error}")
    if shutil.which(compiler[0]) is None:
        return Compilation(
            None, f"torch's: no C compiler, {compiler[0]!r}, with which they would be faster"
        )
    try:
        kernels = Kernels(_built(compiler))
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        return Compilation(None, f"torch's: {compiler[0]!r} failed: {said[0]}")
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        return Compilation(None, f"torch's: those of {compiler[0]!r} can't be loaded: {error}")
    if not _are_right(kernels):
        return Compilation(None, f"torch's: those of {compiler[0]!r} are wrong")
    return Compilation(kernels, f"compiled by {compiler[0]!r}")


def _built(compiler: list[str]) -> ctypes.CDLL:
    """Linked without OpenMP, so that it takes torch's, with the threads that are there already."""
    with tempfile.TemporaryDirectory() as folder:
        unlinked, library = (str(Path(folder) / name) for name in ("kernels.o", "kernels.so"))
        for command in (
            [*compiler, *OPTIONS, "-fopenmp", "-c", str(SOURCE), "-o", unlinked],
            [*compiler, "-shared", unlinked, "-o", library],
        ):
            subprocess.run(
                command,
                check=True,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=SECONDS,
            )
        return ctypes.CDLL(library)


def _are_right(kernels: Kernels) -> bool:
    return _products_are_right(kernels) and _others_are_right(kernels)


def _products_are_right(kernels: Kernels) -> bool:
    """For each way to share rows out, and outputs that are no multiple of those computed at once;
    in whole numbers, so that nothing is rounded.
    """
    columns, outs, numbers = 2 * STEP, 43, torch.arange(-127, 128)
    weight = numbers[torch.arange(outs * columns) * 4 % 255].view(outs, columns)
    for rows in (*range(1, 37), MOST):
        x = numbers[torch.arange(rows * columns) * 7 % 255].view(rows, columns)
        for dtype in TYPES:
            found = kernels.product(x.bfloat16(), weight.to(dtype), dtype=torch.float32)
            if not torch.equal(found.long(), x @ weight.mT):
                return False
    return True


def _others_are_right(kernels: Kernels) -> bool:
    """Nearly, as torch has them in float32."""

    def wave(*shape: int) -> torch.Tensor:
        return torch.arange(float(math.prod(shape))).sin_().view(shape).bfloat16()

    def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
        return torch.allclose(found.float(), expected, rtol=0.02, atol=0.02)

    x, weight = wave(3, STEP), wave(STEP)
    scores, caps = 9 * x.float(), 9 * x.float()
    kernels.cap(caps, 5)
    queries, keys, values = wave(1, 6, 2, STEP), wave(1, 2, 67, STEP), 2 * wave(1, 2, 67, STEP)
    mask = wave(1, 1, 2, 67)
    mask[..., :3] = torch.finfo(mask.dtype).min
    shared = [states.repeat_interleave(3, 1).float() for states in (keys, values)]
    products = (queries.float() @ shared[0].mT).div_(5).tanh_() * 5 + mask.float()
    product, (cos, sin) = wave(1, 2, 4 * STEP), (2 * wave(1, 2, STEP), wave(1, 2, STEP).neg())
    heads = product.view(1, 2, 4, STEP).transpose(1, 2).float()
    halves = heads.roll(STEP // 2, -1) * torch.tensor([-1, 1]).repeat_interleave(STEP // 2)
    halved = torch.cat([cos[..., : STEP // 2]] * 2, -1), torch.cat([sin[..., : STEP // 2]] * 2, -1)
    turned = heads * halved[0].float() + halves * halved[1].float()
    rotated = kernels.rotated(product, *halved, 2, 1)
    return (
        near(kernels.product(x, x, weight), (x.float() @ x.float().mT) * weight[:3].float())
        and near(
            kernels.normed(x, weight, 0.25),
            functional.rms_norm(x.float(), [STEP], 1 + weight.float(), 0.25),
        )
        and near(
            kernels.gated(scores, scores), functional.gelu(scores, approximate="tanh") * scores
        )
        and near(caps, (scores / 5).tanh() * 5)
        and near(
            kernels.attended(queries, keys, values, mask, 1.0, 5.0).transpose(1, 2),
            products.softmax(-1) @ shared[1],
        )
        and near(torch.cat(rotated, 1), torch.cat([turned[:, :3], heads[:, 3:]], 1))
    )
