"""Weights in large pages: who reads gigabytes a step then looks up fewer addresses.

Knows torch and Linux's transparent huge pages (`man 2 madvise`), and nothing of models' layers.
"""

from __future__ import annotations

import mmap

import numpy
import torch
from torch import nn

LARGE_PAGE = 2 * 2**20  # bytes


def enlarge(model: nn.Module) -> None:
    """Move the weights of `model`, on a CPU, into memory whose pages are large.

    One weight after the other, so that no more than one is there twice; tied ones stay tied. Where
    the system has no such pages to ask for, weights stay where they are.
    """
    for weight in model.parameters():
        if weight.nbytes >= LARGE_PAGE and weight.is_contiguous():
            weight.data = _in_large_pages(weight.data)


def _in_large_pages(weight: torch.Tensor) -> torch.Tensor:
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return weight
    memory = mmap.mmap(-1, weight.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(advice)
    except OSError:  # a kernel that is built without them
        return weight
    # By numpy: torch would use OpenMP, which then keeps threads for the thread that loads, and
    # those of the worker slow down.
    memory_bytes = numpy.frombuffer(memory, dtype=numpy.uint8)
    memory_bytes[:] = weight.view(-1).view(torch.uint8).numpy()
    # The tensor keeps the mapping, and the mapping ends with it.
    return torch.frombuffer(memory, dtype=weight.dtype).view_as(weight)
