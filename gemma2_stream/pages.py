"""Weights in large pages: who reads gigabytes a step then looks up fewer addresses.

Knows torch and Linux's transparent huge pages (`man 2 madvise`), and nothing of models' layers.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import Any

import numpy
import torch
from torch import nn

LARGE_PAGE = 2 * 2**20  # bytes
MADV_COLLAPSE = 25  # of Linux 6.1, and not yet in Python's mmap


def enlarge(model: nn.Module) -> None:
    """Move the weights of `model`, on a CPU, into memory whose pages are large where it fills one.

    One weight after the other, so that no more than one is there twice; tied ones stay tied. Small
    ones move too, or the whole file stays mapped. What oneDNN has arranged stays where it is, and
    Linux gathers its pages. Without Linux nothing moves.
    """
    if hasattr(mmap, "MADV_HUGEPAGE"):
        for weight in model.parameters():
            if weight.is_mkldnn:
                _gather(torch.ops.mkldnn.data_ptr(weight), torch.ops.mkldnn._nbytes(weight))
            else:
                weight.data = _moved(weight.data)


def _gather(address: int, size: int) -> None:
    """Have the kernel put what is there into large pages; older ones refuse, and it stays."""
    start = address - address % mmap.PAGESIZE
    advise = ctypes.CDLL(None).madvise
    advise(ctypes.c_void_p(start), ctypes.c_size_t(address + size - start), MADV_COLLAPSE)


def _moved(weight: torch.Tensor) -> torch.Tensor:
    memory = torch.from_numpy(_memory(weight.nbytes))
    return memory.view(weight.dtype).view(weight.shape).copy_(weight)


def _memory(size: int) -> Any:
    """An array of so many bytes; a mapping of its own, which ends with it, where that pays."""
    if size < LARGE_PAGE:
        return numpy.empty(size, numpy.uint8)
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # of a kernel that is built without them
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return numpy.frombuffer(mapping, numpy.uint8)
