"""Matrix products to change, and how far off they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

DTYPES = (torch.float32, torch.bfloat16)


class Calls(TorchFunctionMode):
    """Notes which of torch's functions are called while it is entered."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def linear(outs: int = 96, ins: int = 64, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    return nn.Linear(ins, outs, bias=False, dtype=dtype)


def error(found: torch.Tensor, true: torch.Tensor) -> float:
    """The largest difference, against the largest value."""
    return ((found.float() - true.float()).abs().max() / true.float().abs().max()).item()
