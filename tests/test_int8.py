"""Weights in 8 bits: what is computed with them, and what of a model stays as it was."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from matrices import DTYPES, Calls, error, linear, no_grad  # noqa: F401  # a fixture
from tiny import random_gemma
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from gemma2_stream import int8
from gemma2_stream.compiled import compilation
from gemma2_stream.int8 import FEW, WIDE, Int8Embedding, Int8Linear, shrink
from gemma2_stream.kernels import MOST

# More than anything takes that does not widen.
MANY = MOST + 1
ROWS = (1, 2, FEW, FEW + 1, MOST, MANY)


def shrunk(module: nn.Linear, dtype: torch.dtype = torch.bfloat16, packs: bool = True) -> Any:
    """As torch keeps it if not `packs`: beside a table of the same rows, which are no multiple of
    what oneDNN packs.
    """
    parts: list[nn.Module] = [module]
    if not packs:
        assert module.out_features % int8.GROUP[0]
        table = nn.Embedding(1, 1)
        table.weight = module.weight
        parts.append(table)
    shrink(nn.ModuleList(parts), dtype)
    assert module.weight.is_mkldnn == packs
    return module


needs_packing = pytest.mark.skipif(not int8._packs(), reason="needs oneDNN's exact int8")
PACKS = (False, pytest.param(True, marks=needs_packing))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packs", PACKS)
def test_a_shrunk_product_is_that_of_its_int8(rows: int, dtype: torch.dtype, packs: bool) -> None:
    """By each of its ways, the int8 weights times their scales; packed, x has two bytes."""
    module, x = linear(dtype=dtype), torch.randn(1, rows, 64, dtype=dtype)
    narrow, _ = int8._narrowed(module.weight, dtype)
    shrunk(module, dtype, packs)
    assert module.weight.dtype == torch.int8
    expected = functional.linear(x.float(), narrow.float() * module.scale[:, None].float())
    found = module(x)
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    most = 1e-4 if packs else 1e-6
    assert error(found, expected) < (most if dtype == torch.float32 else 8e-3)


@needs_packing
@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 257, 512, 641, 1024])
def test_packed_rows_come_in_pieces_and_in_their_order(rows: int) -> None:
    """A row is the same whatever is beside it, and no two have the same step."""
    module = shrunk(linear(dtype=torch.float32), torch.float32)
    x = torch.randn(rows, 64) * torch.logspace(-20, 20, rows)[:, None]
    found = module(x)
    assert found.shape == (rows, 96)
    assert all(torch.equal(found[n], module(x[n])) for n in range(0, rows, 50))


@needs_packing
@pytest.mark.parametrize("inference", [False, True])
def test_several_products_of_one_tensor_halve_it_once(inference: bool) -> None:
    """As queries, keys and values are; but what was written into since is another. Where torch
    counts no versions, nobody could tell.
    """
    first, second = (shrunk(linear(dtype=torch.float32), torch.float32) for _ in range(2))
    with torch.inference_mode(inference), profile(activities=[ProfilerActivity.CPU]) as profiled:
        x = torch.randn(5, 64)
        found = [first(x), second(x)]
        assert torch.equal(found[0], first(x.clone()))
        x *= 2
        assert torch.equal(first(x), found[0] * 2)
        assert torch.equal(second(x), found[1] * 2)
    halved = [event for event in profiled.events() if event.name == "aten::amax"]
    assert len(halved) == (5 if inference else 3)


@needs_packing
def test_one_large_value_leaves_the_small_ones() -> None:
    """As trained models have them; with one byte for each value these would be gone."""
    module = linear(dtype=torch.float32)
    module.weight[:, 0] = 0
    x = torch.full((3, 64), 0.5)
    x[:, 0] = 100
    true = functional.linear(x, module.weight)
    assert error(shrunk(module, torch.float32)(x), true) < 0.02


@needs_packing
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_visible_and_in_its_row(value: float) -> None:
    module, x = shrunk(linear()), torch.zeros(3, 64, dtype=torch.bfloat16)
    x[1, 5] = value
    found = module(x)
    assert found[1].isnan().all()
    assert not found[[0, 2]].any()


@needs_packing
def test_the_largest_sums_are_exact() -> None:
    module = linear(ins=9216, dtype=torch.float32)
    module.weight[:] = -127
    found = shrunk(module, torch.float32)(torch.full((1, 9216), -127.0))
    assert torch.equal(found, torch.full((1, 96), 127.0**2 * 9216))


@needs_packing
def test_a_packed_weight_is_there_once() -> None:
    """Rows are looked up where oneDNN keeps them, and those of a table alone are not arranged."""
    head, table, alone = linear(128), nn.Embedding(128, 64), nn.Embedding(128, 64)
    true = head.weight.clone()
    table.weight = head.weight
    shrink(nn.ModuleList([head, table, alone]), torch.bfloat16)
    assert head.weight is table.weight
    start = torch.ops.mkldnn.data_ptr(head.weight)
    assert start == table.table.data_ptr()
    assert torch.ops.mkldnn._nbytes(head.weight) <= true.numel() + 16 * len(true)
    assert not alone.weight.is_mkldnn
    ids = torch.randint(128, (2, 70))
    assert error(table(ids), true[ids]) < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_few_rows_read_int8_and_many_are_widened(rows: int, dtype: torch.dtype) -> None:
    """By what is compiled, in bfloat16, where something is."""
    module, x = linear(dtype=dtype), torch.randn(1, rows, 64, dtype=dtype)
    true = functional.linear(x, module.weight)
    shrunk(module, dtype, packs=False)
    with Calls() as calls:
        found = module(x)
    if dtype == torch.bfloat16 and compilation().kernels is not None and rows <= MOST:
        expected = set()
    else:
        expected = {"_weight_int8pack_mm" if rows <= FEW else "linear"}
    assert {"_weight_int8pack_mm", "linear"} & {*calls.names} == expected
    assert (found.shape, found.dtype) == (true.shape, dtype)
    assert error(found, true) < 0.015


def test_many_rows_go_through_blocks() -> None:
    """Of which the last is smaller; all come in their order."""
    module, x = linear(WIDE // 64 + 5, dtype=torch.float32), torch.randn(FEW + 1, 64)
    true = functional.linear(x, module.weight)
    shrunk(module, torch.float32, packs=False)
    assert error(module(x), true) < 0.01
    assert error(module(x[:1]), true[:1]) < 0.01


def test_many_rows_are_multiplied_in_memory_that_was_used_before() -> None:
    """By weights of another shape or dtype too, and in either of torch's modes without gradients;
    what was computed is not overwritten.
    """
    wide, narrow = shrunk(linear(200, 64), packs=False), shrunk(linear(32, 96), packs=False)
    x, y = (torch.randn(MANY, size, dtype=torch.bfloat16) for size in (64, 96))
    with torch.inference_mode():
        first = wide(x)
        place = int8._used.room.data_ptr()
        kept = first.clone()
        narrow(y)
    assert torch.equal(wide(x), kept)
    assert torch.equal(first, kept)
    assert int8._used.room.data_ptr() == place
    assert narrow(y.float()).dtype == torch.float32
    assert torch.equal(wide(x), kept)


def test_threads_do_not_share_that_memory() -> None:
    module = shrunk(linear(520, 64), packs=False)
    rows = [torch.randn(MANY + n, 64, dtype=torch.bfloat16) for n in range(8)]
    alone = [module(x) for x in rows]
    both = threading.Barrier(2)

    def products_of(rows: list[torch.Tensor]) -> tuple[int, list[torch.Tensor]]:
        both.wait()
        with torch.no_grad():
            found = [module(x) for x in rows]
        both.wait()  # or the one might get what the other has given back
        return int8._used.room.data_ptr(), found

    with ThreadPoolExecutor(2) as pool:
        (here, first), (there, second) = pool.map(products_of, (rows[:4], rows[4:]))
    assert here != there
    assert all(map(torch.equal, first + second, alone))


def test_an_int8_weight_is_within_half_a_step() -> None:
    """And a row of zeros is zeros."""
    module = linear(dtype=torch.float32)
    module.weight[3] = 0
    true = module.weight.clone()
    shrunk(module, torch.float32, packs=False)
    steps = true.abs().amax(1, keepdim=True) / 127
    off = (module.weight.float() * module.scale[:, None] - true).abs()
    assert (off <= steps * 0.5001).all()
    assert not module.weight[3].any()
    assert torch.isfinite(module(torch.randn(1, 64))).all()


@pytest.mark.parametrize("width", [8, 33, 72])
def test_a_width_that_torch_cannot_pack_stays(width: int) -> None:
    """It would read beyond the weights."""
    module = linear(ins=width)
    shrink(module, torch.bfloat16)
    assert type(module) is nn.Linear
    assert module.weight.dtype == torch.bfloat16


def test_a_product_with_a_bias_stays() -> None:
    model = nn.Sequential(nn.Linear(64, 96, dtype=torch.bfloat16))
    shrink(model, torch.bfloat16)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shrunk_gemma_answers_nearly_as_before(dtype: torch.dtype, tied: bool) -> None:
    """Through its embedding with its factor, all products, and the head; one token or many."""
    model = random_gemma(vocab=320).to(dtype)
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    names = dict(model.named_parameters()).keys()
    ids = torch.randint(320, (1, 20))
    true = [model(ids).logits, model(ids[:, :1]).logits]
    shrink(model, dtype)
    assert dict(model.named_parameters()).keys() == names
    assert isinstance(model.lm_head, Int8Linear)
    assert isinstance(model.get_input_embeddings(), Int8Embedding)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.dtype == dtype
    assert all(p.dtype == torch.int8 for p in model.parameters() if p.dim() > 1)
    for found, expected in zip([model(ids).logits, model(ids[:, :1]).logits], true, strict=True):
        likeness = functional.cosine_similarity(found.float(), expected.float(), dim=-1)
        assert likeness.min() > 0.99
