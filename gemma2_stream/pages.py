"""Weights in large pages: who reads gigabytes a step then looks up fewer addresses.

Knows torch and Linux's transparent huge pages (`man 2 madvise`), and nothing of models' layers.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy
import torch
from torch import nn

LARGE_PAGE = 2 * 2**20  # bytes
MADV_COLLAPSE = 25  # of Linux 6.1, and not yet in Python's mmap


def enlarge(model: nn.Module, neighbours: Iterable[Sequence[nn.Parameter]] = ()) -> None:
    """Move the weights of `model`, on a CPU, into memory whose pages are large where it fills one.
    Those of `neighbours`, of one dtype, come to lie behind one another there.

    One weight after the other, so that no more than one is there twice; tied ones stay tied. Small
    ones move too, or the whole file stays mapped. What oneDNN has arranged stays where it is, and
    Linux gathers its pages. Without Linux only neighbours move.
    """
    moved: set[nn.Parameter] = set()
    for weights in neighbours:
        _move(weights)
        moved.update(weights)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        for weight in model.parameters():
            if weight.is_mkldnn:
                _gather(torch.ops.mkldnn.data_ptr(weight), torch.ops.mkldnn._nbytes(weight))
            elif weight not in moved:
                _move([weight])


def _gather(address: int, size: int) -> None:
    """Have the kernel put what is there into large pages; older ones refuse, and it stays."""
    start = address - address % mmap.PAGESIZE
    advise = ctypes.CDLL(None).madvise
    advise(ctypes.c_void_p(start), ctypes.c_size_t(address + size - start), MADV_COLLAPSE)


def _move(weights: Sequence[nn.Parameter]) -> None:
    memory = torch.from_numpy(_memory(sum(weight.nbytes for weight in weights)))
    places = torch.split(memory, [weight.nbytes for weight in weights])
    for weight, place in zip(weights, places, strict=True):
        weight.data = place.view(weight.dtype).view(weight.shape).copy_(weight.data)


def _memory(size: int) -> Any:
    """An array of so many bytes; a mapping of its own, which ends with it, where that pays."""
    if size < LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return numpy.empty(size, numpy.uint8)
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # of a kernel that is built without them
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return numpy.frombuffer(mapping, numpy.uint8)
