"""The kernels compiled for this processor, when a model is loaded.

Knows which processors gain by them, and how to tell whether a compiler was right.
"""

from __future__ import annotations

import functools
import math
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional

from .kernels import MOST, STEP, TYPES, Kernels, Layer
from .libraries import WrongLibraryError, load

SOURCE = Path(__file__).with_name("layer.c")


@dataclass(frozen=True)
class Compilation:
    """What came of it: the kernels, or None, and why in a few words."""

    kernels: Kernels | None
    reason: str


@functools.cache
def compilation() -> Compilation:
    """Of this process. Takes two seconds when it is first asked for, and hundredths of one in later
    processes, if it could be kept.

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
        library, where = load(SOURCE, compiler, lambda library: _are_right(Kernels(library)))
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        return Compilation(None, f"torch's: {compiler[0]!r} failed: {said[0]}")
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        return Compilation(None, f"torch's: those of {compiler[0]!r} can't be loaded: {error}")
    except WrongLibraryError:
        return Compilation(None, f"torch's: those of {compiler[0]!r} are wrong")
    return Compilation(Kernels(library), f"compiled by {compiler[0]!r}, {where}")


def _are_right(kernels: Kernels) -> bool:
    return all(
        right(kernels) for right in (_products_are_right, _others_are_right, _layers_are_right)
    )


def _wave(*shape: int) -> torch.Tensor:
    return torch.arange(float(math.prod(shape))).sin_().view(shape).bfloat16()


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

    def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
        return torch.allclose(found.float(), expected, rtol=0.02, atol=0.02)

    x, weight = _wave(3, STEP), _wave(STEP)
    scores, caps = 9 * x.float(), 9 * x.float()
    kernels.cap(caps, 5)
    queries, keys, values = _wave(1, 6, 2, STEP), _wave(1, 2, 67, STEP), 2 * _wave(1, 2, 67, STEP)
    mask = _wave(1, 1, 2, 67)
    mask[..., :3] = torch.finfo(mask.dtype).min
    shared = [states.repeat_interleave(3, 1).float() for states in (keys, values)]
    products = (queries.float() @ shared[0].mT).div_(5).tanh_() * 5 + mask.float()
    product, (cos, sin) = _wave(1, 2, 4 * STEP), (2 * _wave(1, 2, STEP), _wave(1, 2, STEP).neg())
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


def _layers_are_right(kernels: Kernels) -> bool:
    """As their parts are, one after the other: two layers of two tokens behind one."""
    heads, groups, eps, softcap = 2, 1, 0.25, 5.0
    shapes = ((4, 1), (1, 2), (2, 1), (2, 1), (1, 2))
    weights = [_wave(outs * STEP, ins * STEP) for outs, ins in shapes]
    norms = [_wave(STEP) / (1 + number) for number in range(4)]
    sizes = (STEP, heads, groups, STEP, eps, 1 / softcap, softcap)
    layer = Layer.of([(weight, None) for weight in weights], norms, *sizes)
    states, (cos, sin) = _wave(1, 2, STEP), _wave(2, 1, 2, STEP)
    mask = torch.tensor([[0, 0, -torch.inf], [0, 0, 0]]).bfloat16().view(1, 1, 2, 3)
    rooms = [SimpleNamespace(keys=_wave(1, 1, 4, STEP), values=_wave(1, 1, 4, STEP)) for _ in "12"]
    found = kernels.decoded([layer] * 2, rooms, "aa", {"a": mask}, states, cos, sin, 1)

    def times(rows: torch.Tensor, number: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return kernels.product(rows.view(2, -1), weights[number], dtype=dtype).view(1, 2, -1)

    for room in rooms:
        product = times(kernels.normed(states, norms[0], eps), 0)
        queries, *made = kernels.rotated(product, cos, sin, heads, groups)
        keys, values = (torch.cat([_wave(1, 1, 4, STEP)[:, :, :1], each], 2) for each in made)
        if not torch.equal(
            torch.cat([keys, values]), torch.cat([room.keys, room.values])[:, :, :3]
        ):
            return False
        attended = kernels.attended(queries, keys, values, mask, 1.0, softcap)
        states = kernels.normed(times(attended, 1), norms[1], eps, states)
        normed = kernels.normed(states, norms[2], eps)
        gated = kernels.gated(*(times(normed, number, torch.float32) for number in (2, 3)))
        states = kernels.normed(times(gated, 4), norms[3], eps, states)
    return torch.equal(found, states)
