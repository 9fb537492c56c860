"""Products that read less or faster: what they compute, and what of a model stays as it was."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoders import CAP, attended, capped_gemma, causal, off, off_of_logits
from matrices import DTYPES, Calls, error, linear, no_grad  # noqa: F401  # a fixture
from tiny import random_gemma
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, StaticCache
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP

from gemma2_stream.attention import prefer_grouped
from gemma2_stream.compiled import compilation
from gemma2_stream.kv import KVCache
from gemma2_stream.norms import ease
from gemma2_stream.pages import enlarge
from gemma2_stream.products import (
    BLOCK,
    MANY,
    SOME,
    Few,
    FusedMLP,
    HeadLinear,
    JoinedAttention,
    RowLinear,
    TurnedLinear,
    best_here,
    hasten,
    neighbours,
    with_amx,
    with_avx512,
    with_compiler,
    with_neither,
)

WAYS = (with_amx, with_avx512, with_compiler, with_neither)
Way = Callable[[torch.Tensor], Few]

COMPILED = pytest.mark.skipif(
    compilation().kernels is None,
    reason=f"products are {compilation().reason}: needs AVX512-BF16 without AMX, and a C compiler",
)


@pytest.fixture(params=WAYS)
def few(request: pytest.FixtureRequest) -> Way:
    """As if the processor were one or another: all ways run on each, but for what is compiled,
    which takes torch's way where it can't be.
    """
    way: Way = request.param
    return way


@pytest.mark.parametrize("shape", [(64,), (1, 64), (1, 1, 64), (3, 64), (2, 5, 64), (0, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hastened_product_is_the_same_product(
    shape: tuple[int, ...], dtype: torch.dtype, few: Way
) -> None:
    """Whatever the rows and the shape, which stays."""
    module, x = linear(dtype=dtype), torch.randn(shape, dtype=dtype)
    expected = functional.linear(x.float(), module.weight.float())
    hasten(module, few)
    found = module(x)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    if found.numel():
        assert error(found, expected) < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("rows", [1, 2, SOME])
def test_a_hastened_product_takes_any_strides(rows: int, few: Way) -> None:
    module, wide = linear(), torch.randn(1, rows, 128, dtype=torch.bfloat16)
    hasten(module, few)
    assert torch.equal(module(wide[..., ::2]), module(wide[..., ::2].contiguous()))


@pytest.mark.parametrize(
    ("few", "ins", "rows", "product"),
    [
        (with_amx, 64, 1, "mv"),
        (with_amx, 64, 2, "matmul"),
        (with_amx, 64, MANY, "matmul"),
        (with_amx, 64, MANY + 1, "linear"),
        (with_amx, 2048, 2, "matmul"),
        (with_avx512, 64, 1, "linear"),
        (with_avx512, 64, SOME - 1, "linear"),
        (with_avx512, 64, SOME, "matmul"),
        (with_avx512, 64, MANY, "matmul"),
        (with_avx512, 64, MANY + 1, "linear"),
        (with_avx512, 2048, SOME, "linear"),
        (with_neither, 64, 1, "mv"),
        (with_neither, 64, 2, "linear"),
        (with_neither, 64, MANY, "linear"),
        pytest.param(with_compiler, 64, 1, "", marks=COMPILED),
        pytest.param(with_compiler, 64, MANY, "", marks=COMPILED),
        pytest.param(with_compiler, 64, MANY + 1, "linear", marks=COMPILED),
        pytest.param(with_compiler, 2048, MANY, "", marks=COMPILED),
        pytest.param(with_compiler, 80, 1, "linear", marks=COMPILED),
    ],
)
def test_few_rows_are_multiplied_as_is_best_for_the_processor(
    few: Way, ins: int, rows: int, product: str
) -> None:
    """In 2,048 places of the cache lie too many of a weight's rows for reading it as it is; what is
    compiled takes 32 columns at once.
    """
    module, x = linear(ins=ins), torch.randn(1, rows, ins, dtype=torch.bfloat16)
    expected = module(x)
    hasten(module, few)
    with Calls() as calls:
        found = module(x)
    assert "".join({"mv", "matmul", "linear"} & {*calls.names}) == product
    assert found.shape == expected.shape
    assert found.is_contiguous()
    assert error(found, expected) < 5e-3


def test_what_is_best_is_the_processor_s() -> None:
    units = torch.cpu.get_capabilities()
    if units.get("amx_bf16"):
        expected = with_amx
    elif units.get("avx512_bf16"):
        expected = with_compiler if compilation().kernels else with_avx512
    else:
        expected = with_neither
    assert best_here() is expected
    module = linear()
    hasten(module)
    assert module.few == expected(module.weight)


@pytest.mark.parametrize("rows", [1, 2, SOME, MANY, MANY + 1])
def test_a_product_before_a_norm_is_left_turned_for_it(rows: int, few: Way) -> None:
    model = random_gemma(vocab=320).bfloat16()
    hasten(model, few)
    ease(model)
    layer = model.model.layers[0]
    for product, norm in (
        (layer.self_attn.o_proj, layer.post_attention_layernorm),
        (layer.mlp.down_proj, layer.post_feedforward_layernorm),
    ):
        x = torch.randn(1, rows, product.in_features).bfloat16()
        found = product(x)
        assert error(found, functional.linear(x.float(), product.weight.float())) < 5e-3
        turned = few(product.weight).turned_from <= rows <= MANY
        assert found.is_contiguous() is not turned
        assert norm(found).is_contiguous()
        assert torch.equal(norm(found), norm(found.contiguous()))


@pytest.mark.parametrize(
    "shape", [(1, 1, 64), (3, 1, 64), (MANY, 1, 64), (1, MANY + 1, 64), (5, 20, 64)]
)
def test_a_hastened_mlp_is_the_same_mlp(shape: tuple[int, ...], few: Way) -> None:
    """Of few rows and of many, whose activation is not rounded on the way."""
    mlp = random_gemma(vocab=320).model.layers[0].mlp
    x = torch.randn(shape).bfloat16()
    expected = mlp(x.float())
    hasten(mlp.bfloat16(), few)
    found = mlp(x)
    assert type(mlp) is FusedMLP
    assert (found.shape, found.dtype) == (expected.shape, torch.bfloat16)
    assert error(found, expected) < 0.02


@pytest.mark.parametrize(
    ("rows", "few"),
    [
        (2, with_amx),
        (SOME, with_avx512),
        *((MANY + 1, way) for way in WAYS),
    ],
)
def test_nothing_is_rounded_on_the_way_through_an_mlp(rows: int, few: Way) -> None:
    """What follows the products of gate and up is part of them, turned or not."""
    mlp = random_gemma(vocab=320).bfloat16().model.layers[0].mlp
    x = torch.randn(1, rows, 64).bfloat16()
    true, rounded = copy.deepcopy(mlp).float()(x.float()), mlp(x)
    hasten(mlp, few)
    with Calls() as calls:
        found = mlp(x)
    assert not {"gelu", "mul", "mul_"} & {*calls.names}
    assert (found - true).abs().mean() < (rounded - true).abs().mean()


def test_an_mlp_with_another_activation_is_not_fused() -> None:
    mlp = random_gemma(vocab=320).bfloat16().model.layers[0].mlp
    mlp.config.hidden_activation = "relu"
    hasten(mlp)
    assert type(mlp) is Gemma2MLP
    assert type(mlp.gate_proj) is RowLinear


def test_no_weight_is_copied_for_each_row(few: Way) -> None:
    """As torch does with the last tokens of many rows, if the weight has no gradients."""
    model = random_gemma(vocab=320).bfloat16()
    hasten(model, few)
    states = torch.randn(MANY + 1, 3, 64).bfloat16()[:, -1:]
    with profile(activities=[ProfilerActivity.CPU]) as spent:
        found = model.lm_head(states)
    assert error(found, functional.linear(states.float(), model.lm_head.weight.float())) < 5e-3
    assert {"aten::bmm", "aten::expand"} & {event.key for event in spent.key_averages()} == set()


@pytest.mark.parametrize("rows", [1, 5, SOME])
def test_a_row_has_its_logits_side_by_side(rows: int, few: Way) -> None:
    model = random_gemma(vocab=320).bfloat16()
    hasten(model, few)
    logits = model(torch.zeros(rows, 1, dtype=torch.int64)).logits
    assert logits.is_contiguous()
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 2, SOME, MANY, MANY + 1])
def test_a_head_of_many_blocks_is_the_same_head(rows: int, few: Way) -> None:
    head = linear(outs=2 * BLOCK + 96)
    expected = functional.linear(x := torch.randn(1, rows, 64).bfloat16(), head.weight)
    hasten(head, few)
    head.__class__ = HeadLinear
    assert error(head(x), expected) < 5e-3
    assert head(x).is_contiguous()
    assert head(x).dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 3, SOME, MANY + 1])
def test_a_forward_outside_of_no_grad_is_the_same_forward(rows: int, few: Way) -> None:
    """What is loaded for speed has no gradients, and says so by its weights."""
    model = joined_gemma(random_gemma(vocab=320), few)
    ids = torch.arange(rows)[None]
    expected = model(ids).logits
    with torch.enable_grad():
        found = model(ids).logits
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert not any(weight.requires_grad for weight in model.parameters())


def test_in_float32_nothing_is_changed() -> None:
    model = random_gemma(vocab=320)
    before = [type(module) for module in model.modules()]
    hasten(model)
    assert all(weight.requires_grad for weight in model.parameters())
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
    assert kinds[RowLinear] == 4 * 5
    assert kinds[TurnedLinear] == 4 * 2
    assert kinds[FusedMLP] == kinds[JoinedAttention] == 4


# Attention ---------------------------------------------------------------------------------------


def joined_gemma(model: Any, few: Way = with_amx) -> Any:
    """A copy of `model` as the engine runs it: queries, keys and values can be one product."""
    model = copy.deepcopy(model).bfloat16()
    hasten(model, few)
    enlarge(model, neighbours(model))
    prefer_grouped(model)
    return model


@pytest.mark.parametrize("softcap", [None, CAP])
@pytest.mark.parametrize(("rows", "new"), [(1, 6), (1, 31), (1, MANY), (3, 5), (MANY, 1)])
def test_attention_of_few_rows_is_nearer_to_float32_than_eager(
    rows: int, new: int, softcap: float | None, few: Way
) -> None:
    wide = capped_gemma(softcap)
    states = torch.randn(rows, past := 100, 64)
    states = torch.cat([states, torch.randn(rows, new, 64)], 1).bfloat16().float()
    mask = causal(rows, past + new)
    true = attended(wide, states, mask, past, KVCache())
    eager = attended(copy.deepcopy(wide).bfloat16(), states, mask, past, KVCache())
    with Calls() as calls:
        found = attended(joined_gemma(wide, few), states, mask, past, KVCache())
    assert "addcmul_" in calls.names
    assert (found.shape, found.dtype) == (true.shape, torch.bfloat16)
    assert off(found, true) < (1 if softcap is None else 0.8) * off(eager, true)


@pytest.mark.parametrize("softcap", [None, CAP])
@pytest.mark.parametrize("kind", [type(None), KVCache, DynamicCache])
def test_attention_of_few_rows_takes_any_cache(kind: Any, softcap: float | None) -> None:
    """Or none, or no mask, and what is kept in it is bfloat16."""
    wide = capped_gemma(softcap)
    states, mask = torch.randn(2, 9, 64), torch.zeros(2, 1, 9, 9)
    true = attended(wide, states, mask, 0, None)
    joined, cache = joined_gemma(wide), kind()
    masked = attended(joined, states, mask, 0, cache)
    assert error(masked, true) < 0.03
    if cache is not None:
        assert cache.layers[0].keys.dtype == torch.bfloat16
    embeddings = joined.model.rotary_emb(states.bfloat16(), torch.arange(9)[None])
    found, _ = joined.model.layers[0].self_attn(states.bfloat16(), embeddings)
    assert error(found, masked) < 0.01


@pytest.mark.parametrize("kind", [KVCache, DynamicCache, StaticCache])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_hastened_gemma_is_nearer_to_float32_than_eager(kind: Any, rows: int, few: Way) -> None:
    """Padded or not, below and beyond the sliding window of 64, whatever the cache."""
    found, eager = off_of_logits(lambda wide: joined_gemma(wide, few), rows, kind)
    assert found < eager


@pytest.mark.parametrize("rows", [1, 2, SOME, MANY, MANY + 1])
def test_queries_keys_and_values_are_one_product_of_few_rows(rows: int, few: Way) -> None:
    """But not of weights that are no neighbours."""
    ids = torch.arange(1, rows + 1)[None]
    model = joined_gemma(random_gemma(vocab=320), few)
    parted = copy.deepcopy(model)
    with Calls() as calls:
        found = model(ids).logits
    with Calls() as others:
        expected = parted(ids).logits
    assert error(found, expected) < 0.05
    way = few(model.model.layers[0].self_attn.q_proj.weight)
    if rows >= way.turned_from or rows > MANY:
        product = "matmul"
    elif few is with_compiler and compilation().kernels:
        product = "empty"  # the place for what comes out
    else:
        product = "mv" if rows == 1 and few in (with_amx, with_neither) else "linear"
    spared = 0 if rows > MANY else 2 * 4
    assert others.names.count(product) - calls.names.count(product) == spared


def test_a_hastened_gemma_can_be_asked_for_its_attentions() -> None:
    """By who sets transformers' own."""
    model = joined_gemma(random_gemma(vocab=320))
    model.set_attn_implementation("eager")
    attentions = model(torch.arange(5)[None], output_attentions=True).attentions
    assert [each.shape for each in attentions] == [(1, 4, 5, 5)] * 4


class Doubled(nn.Module):
    """Like an adapter, which shows the weight that it changes the product of."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> nn.Parameter:
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.base(x)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_a_product_that_was_changed_is_asked(name: str) -> None:
    changed, doubled = joined_gemma(model := random_gemma(vocab=320)), copy.deepcopy(model)
    attention = changed.model.layers[0].self_attn
    setattr(attention, name, Doubled(getattr(attention, name)))
    getattr(doubled.model.layers[0].self_attn, name).weight.mul_(2)
    states, mask = torch.randn(1, 5, 64).bfloat16().float(), causal(1, 5)
    found, true = (attended(each, states, mask, 0, None) for each in (changed, doubled))
    assert error(found, true) < 0.03


def test_neighbours_lie_behind_one_another_and_nothing_else_does() -> None:
    weights = list(neighbours(joined_gemma(random_gemma(vocab=320))))
    assert [len(three) for three in weights] == [3] * 4
    for three in weights:
        ends = [weight.data_ptr() + weight.nbytes for weight in three]
        assert ends[:-1] == [weight.data_ptr() for weight in three[1:]]


def test_a_joined_weight_can_be_written() -> None:
    """It is no copy."""
    model, ids = joined_gemma(random_gemma(vocab=320)), torch.arange(3)[None]
    before = model(ids).logits
    model.model.layers[0].self_attn.v_proj.weight[:16] = 0
    after = model(ids).logits
    assert error(before, after) > 0.1
    assert error(copy.deepcopy(model)(ids).logits, after) < 0.05
