"""Products that read less or faster: what they compute, and what of a model stays as it was."""

from __future__ import annotations

import pytest
import torch
from matrices import DTYPES, Calls, error, linear, no_grad  # noqa: F401  # a fixture
from tiny import random_gemma
from torch import nn
from torch.nn import functional
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP

from gemma2_stream.products import (
    BLOCK,
    MANY,
    FusedMLP,
    HeadLinear,
    RowLinear,
    hasten,
)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (1, 1, 64), (3, 64), (2, 5, 64), (0, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hastened_product_is_the_same_product(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Whatever the rows and the shape, which stays."""
    module, x = linear(dtype=dtype), torch.randn(shape, dtype=dtype)
    expected = functional.linear(x.float(), module.weight.float())
    hasten(module)
    found = module(x)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    if found.numel():
        assert error(found, expected) < (1e-6 if dtype == torch.float32 else 5e-3)


def test_a_hastened_product_takes_any_strides() -> None:
    module, wide = linear(), torch.randn(1, 1, 128, dtype=torch.bfloat16)
    hasten(module)
    assert torch.equal(module(wide[..., ::2]), module(wide[..., ::2].contiguous()))


@pytest.mark.parametrize(
    ("rows", "product"), [(1, "mv"), (2, "matmul"), (MANY, "matmul"), (MANY + 1, "linear")]
)
def test_few_rows_are_arranged_instead_of_the_weight(rows: int, product: str) -> None:
    module, x = linear(), torch.randn(1, rows, 64, dtype=torch.bfloat16)
    expected = module(x)
    hasten(module)
    with Calls() as calls:
        found = module(x)
    assert {"mv", "matmul", "linear"} & {*calls.names} == {product}
    assert found.shape == expected.shape
    assert found.is_contiguous()
    assert error(found, expected) < 5e-3


@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 1, 64), (1, MANY + 1, 64), (5, 20, 64)])
def test_a_hastened_mlp_is_the_same_mlp(shape: tuple[int, ...]) -> None:
    """Of few rows and of many, whose activation is not rounded on the way."""
    mlp = random_gemma(vocab=320).model.layers[0].mlp
    x = torch.randn(shape).bfloat16()
    expected = mlp(x.float())
    hasten(mlp.bfloat16())
    found = mlp(x)
    assert type(mlp) is FusedMLP
    assert (found.shape, found.dtype) == (expected.shape, torch.bfloat16)
    assert error(found, expected) < 0.02


def test_an_mlp_of_few_rows_turns_them_once() -> None:
    mlp = random_gemma(vocab=320).bfloat16().model.layers[0].mlp
    hasten(mlp)
    with Calls() as calls:
        mlp(torch.randn(1, 3, 64).bfloat16())
    assert calls.names.count("contiguous") == 1


def test_an_mlp_with_another_activation_is_not_fused() -> None:
    mlp = random_gemma(vocab=320).bfloat16().model.layers[0].mlp
    mlp.config.hidden_activation = "relu"
    hasten(mlp)
    assert type(mlp) is Gemma2MLP
    assert type(mlp.down_proj) is RowLinear


def test_a_row_has_its_logits_side_by_side() -> None:
    model = random_gemma(vocab=320).bfloat16()
    hasten(model)
    assert model(torch.zeros(5, 1, dtype=torch.int64)).logits.is_contiguous()


@pytest.mark.parametrize("rows", [1, 2, MANY, MANY + 1])
def test_a_head_of_many_blocks_is_the_same_head(rows: int) -> None:
    head = linear(outs=2 * BLOCK + 96)
    expected = functional.linear(x := torch.randn(1, rows, 64).bfloat16(), head.weight)
    head.__class__ = HeadLinear
    assert error(head(x), expected) < 5e-3
    assert head(x).is_contiguous()


def test_in_float32_nothing_is_changed() -> None:
    model = random_gemma(vocab=320)
    before = [type(module) for module in model.modules()]
    hasten(model)
    assert [type(module) for module in model.modules()] == before


def test_a_product_with_a_bias_stays() -> None:
    model = nn.Sequential(nn.Linear(64, 96, dtype=torch.bfloat16))
    hasten(model)
    assert type(model[0]) is nn.Linear


def test_a_hastened_gemma_keeps_its_names_and_its_ties() -> None:
    model = random_gemma(vocab=320).bfloat16()
    model.lm_head.weight = model.get_input_embeddings().weight
    before = {name: weight.numel() for name, weight in model.named_parameters()}
    hasten(model)
    assert {name: weight.numel() for name, weight in model.named_parameters()} == before
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert type(model.lm_head) is HeadLinear
    assert sum(type(module) is RowLinear for module in model.modules()) == 4 * 7
    assert sum(type(module) is FusedMLP for module in model.modules()) == 4
