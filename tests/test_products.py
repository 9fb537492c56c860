"""Products that read less or faster: what they compute, and what of a model stays as it was."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from matrices import DTYPES, Calls, error, linear, no_grad  # noqa: F401  # a fixture
from tiny import random_gemma
from torch import nn
from torch.nn import functional
from transformers.models.gemma2.modeling_gemma2 import Gemma2ForCausalLM, Gemma2MLP

from gemma2_stream.pages import enlarge
from gemma2_stream.products import (
    BLOCK,
    MANY,
    FusedMLP,
    HeadLinear,
    JoinedAttention,
    JoinedLinear,
    RowLinear,
    hasten,
    neighbours,
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


@pytest.mark.parametrize("rows", [2, MANY + 1])
def test_nothing_is_rounded_on_the_way_through_an_mlp(rows: int) -> None:
    """What follows the products of gate and up is part of them, turned or not."""
    mlp = random_gemma(vocab=320).bfloat16().model.layers[0].mlp
    x = torch.randn(1, rows, 64).bfloat16()
    true, rounded = copy.deepcopy(mlp).float()(x.float()), mlp(x)
    hasten(mlp)
    with Calls() as calls:
        found = mlp(x)
    assert not {"gelu", "mul", "mul_"} & {*calls.names}
    assert (found - true).abs().mean() < (rounded - true).abs().mean()


def test_an_mlp_with_another_activation_is_not_fused() -> None:
    mlp = random_gemma(vocab=320).bfloat16().model.layers[0].mlp
    mlp.config.hidden_activation = "relu"
    hasten(mlp)
    assert type(mlp) is Gemma2MLP
    assert type(mlp.down_proj) is RowLinear


def test_a_row_has_its_logits_side_by_side() -> None:
    model = random_gemma(vocab=320).bfloat16()
    hasten(model)
    logits = model(torch.zeros(5, 1, dtype=torch.int64)).logits
    assert logits.is_contiguous()
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 2, MANY, MANY + 1])
def test_a_head_of_many_blocks_is_the_same_head(rows: int) -> None:
    head = linear(outs=2 * BLOCK + 96)
    expected = functional.linear(x := torch.randn(1, rows, 64).bfloat16(), head.weight)
    head.__class__ = HeadLinear
    assert error(head(x), expected) < 5e-3
    assert head(x).is_contiguous()
    assert head(x).dtype == torch.float32


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
    kinds = Counter(map(type, model.modules()))
    assert kinds[RowLinear] == 4 * 4
    assert kinds[JoinedLinear] == 4 * 3
    assert kinds[FusedMLP] == kinds[JoinedAttention] == 4


# Queries, keys and values ------------------------------------------------------------------------


def joined_gemma() -> Gemma2ForCausalLM:
    """Its queries, keys and values can be one product."""
    model = random_gemma(vocab=320).bfloat16()
    hasten(model)
    enlarge(model, neighbours(model))
    return model


def logits(model: Gemma2ForCausalLM, rows: int) -> tuple[torch.Tensor, Calls]:
    with Calls() as calls:
        found = model(torch.arange(rows)[None]).logits
    return found, calls


@pytest.mark.parametrize("rows", [1, 2, MANY, MANY + 1])
def test_queries_keys_and_values_are_one_product_of_few_rows(rows: int) -> None:
    """Which is the same as three, to the bit: that of weights that are no neighbours."""
    model = joined_gemma()
    parted = copy.deepcopy(model)
    found, calls = logits(model, rows)
    expected, others = logits(parted, rows)
    assert torch.equal(found, expected)
    spared = 0 if rows > MANY else 2 * 4
    product = "mv" if rows == 1 else "matmul"
    assert others.names.count(product) - calls.names.count(product) == spared


def test_neighbours_lie_behind_one_another_and_nothing_else_does() -> None:
    weights = list(neighbours(joined_gemma()))
    assert [len(three) for three in weights] == [3] * 4
    for three in weights:
        ends = [weight.data_ptr() + weight.nbytes for weight in three]
        assert ends[:-1] == [weight.data_ptr() for weight in three[1:]]


def test_a_joined_weight_can_be_written() -> None:
    """It is no copy."""
    model = joined_gemma()
    before, _ = logits(model, 3)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[:16] = 0
    after, _ = logits(model, 3)
    assert not torch.equal(before, after)
    assert torch.equal(after, logits(copy.deepcopy(model), 3)[0])


def test_what_is_ready_for_another_input_is_not_used() -> None:
    """Of a forward in another thread, say; or of one that an error has ended."""
    projection = joined_gemma().model.layers[0].self_attn.q_proj
    x, other = torch.randn(2, 1, 2, 64).bfloat16()
    expected = projection(x)
    projection.ready = other, torch.zeros_like(expected)
    assert torch.equal(projection(x), expected)
    assert projection.ready is None
