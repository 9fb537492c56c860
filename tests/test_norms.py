"""Norms computed in place are transformers' own."""

from __future__ import annotations

import pytest
import torch
from tiny import random_gemma
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

from gemma2_stream import Gemma2LLM
from gemma2_stream.compiled import compilation
from gemma2_stream.decoder import CompiledNorm
from gemma2_stream.norms import InPlaceNorm, ease

EASED = InPlaceNorm if compilation().kernels is None else CompiledNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (3, 200, 64), (0, 64)])
def test_it_computes_what_gemmas_norm_computes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """But for the order of a sum; and what it is given stays as it was."""
    norm = Gemma2RMSNorm(64).to(dtype)
    torch.nn.init.normal_(norm.weight, 0.0, 0.3)
    x = (torch.randn(shape) * 5).to(dtype)
    given = x.clone()
    with torch.no_grad():
        expected = norm(x)
        ease(norm)
        found = norm(x)
    assert type(norm) is InPlaceNorm
    assert found.dtype == dtype
    # bfloat16 may be rounded to the one neighbour or the other.
    rtol = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-30)
    assert torch.equal(x, given)


def test_zeros_stay_zeros() -> None:
    norm = Gemma2RMSNorm(64)
    ease(norm)
    with torch.no_grad():
        assert torch.equal(norm(torch.zeros(2, 64)), torch.zeros(2, 64))


@pytest.mark.parametrize(
    ("preset", "kind"),
    [("exact", Gemma2RMSNorm), ("speed", EASED), ("memory", EASED)],
)
def test_who_asks_for_speed_or_memory_gets_them(preset: str, kind: type) -> None:
    """Or what extends them, where it can be compiled."""
    engine = Gemma2LLM("demo", dtype="bfloat16", preset=preset).engine
    norms = {type(module) for module in engine.model.modules() if isinstance(module, Gemma2RMSNorm)}
    engine.close()
    assert norms == {kind}


def test_every_norm_of_a_model_is_eased() -> None:
    model = random_gemma(vocab=320)
    before = sum(type(module) is Gemma2RMSNorm for module in model.modules())
    ease(model)
    assert sum(type(module) is InPlaceNorm for module in model.modules()) == before > 4 * 4
