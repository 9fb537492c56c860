"""Grouped attention is eager attention, without a copy of keys and values for every head."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DEMO, random_gemma
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from gemma2_stream import Gemma2Engine, Gemma2LLM, ParameterError
from gemma2_stream.attention import SMALL, grouped_attention, prefer_grouped
from gemma2_stream.kv import CACHE_NAME, KVCache, KVLayer, with_room


def logits(model: Any, ids: torch.Tensor, mask: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """Of all columns, fed in `chunks` through a cache of ours."""
    cache, parts, start = KVCache(), [], 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for size in chunks:
        end = start + size
        with torch.no_grad():
            parts.append(
                model(
                    input_ids=ids[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, start:end],
                    use_cache=True,
                    **{CACHE_NAME: cache},
                ).logits
            )
        start = end
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_it_computes_what_eager_computes(dtype: torch.dtype, rows: int) -> None:
    """Padded or not, in chunks and token by token, below and beyond the sliding window of 64."""
    eager = random_gemma(vocab=500).to(dtype)
    for layer in eager.model.layers:
        layer.self_attn.attn_logit_softcapping = 1.0  # these weights come nowhere near 50
    grouped = copy.deepcopy(eager)
    prefer_grouped(grouped)
    assert grouped.config._attn_implementation == "grouped"
    ids = torch.randint(3, 500, (rows, 150), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 30 * row] = 0
    chunks = [100, 40, *[1] * 10]
    ours, theirs = (logits(model, ids, mask, chunks)[mask == 1] for model in (grouped, eager))
    assert torch.allclose(ours, theirs, atol=1e-4 if dtype == torch.float32 else 0.2)

    capped = copy.deepcopy(grouped)
    for layer in capped.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert not torch.allclose(logits(capped, ids, mask, chunks)[mask == 1], theirs, atol=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("new", [1, 3, 70])
def test_a_forward_outside_of_no_grad_is_the_same_forward(dtype: torch.dtype, new: int) -> None:
    """A caller's own, on the weights of the engine."""
    model = random_gemma(vocab=500).to(dtype)
    prefer_grouped(model)
    ids = torch.arange(3, 3 + new)[None]
    with torch.no_grad():
        expected = model(ids).logits
    found = model(ids).logits
    assert found.requires_grad
    assert torch.allclose(found, expected, atol=1e-6 if dtype == torch.float32 else 0.2)


def attended(attention: Any, *states: torch.Tensor | None) -> torch.Tensor:
    """Of queries, keys and values, of which two heads share one, and a mask."""
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    found: torch.Tensor = attention(module, *states, scaling=0.25, softcap=5.0)[0]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_many_scores_are_computed_head_by_head(dtype: torch.dtype, rows: int) -> None:
    """And each of them comes to its own place."""
    new, tokens = 200, SMALL // 4 // 200 + 1
    shapes = [(rows, 4, new, 16), (rows, 2, tokens, 16), (rows, 2, tokens, 16)]
    query, key, value = (torch.randn(shape, dtype=dtype) for shape in shapes)
    mask = torch.zeros(rows, 1, new, tokens, dtype=dtype)
    mask[..., tokens // 2 :] = torch.finfo(dtype).min
    theirs = attended(eager_attention_forward, query, key, value, mask)
    ours = attended(grouped_attention, query, key, value, mask)
    assert ours.shape == (rows, new, 4, 16)
    assert torch.allclose(ours, theirs, atol=1e-6 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("new", [1, 40])
def test_the_room_behind_the_tokens_is_read_and_weighs_nothing(new: int) -> None:
    """A cache shows states with gaps between the heads, which torch would copy to multiply."""
    layer = KVLayer()
    states = torch.randn(2, 3, 2, 100, 16, dtype=torch.bfloat16)
    layer.update(*states[..., :99, :])
    key, value = layer.update(*states[..., 99:, :])
    for shown in (key, value):
        room = with_room(shown)
        assert room.is_contiguous()
        assert room.shape[2] > shown.shape[2] == 100
        assert torch.equal(room[:, :, :100], shown)
        assert not room[:, :, 100:].any()
        room[:, :, 100:] = 1000.0  # of a row that was longer, and had it been seen
    query = torch.randn(3, 4, new, 16, dtype=torch.bfloat16)
    mask = torch.zeros(1, 1, new, 100, dtype=torch.bfloat16)
    theirs = attended(eager_attention_forward, query, *states, mask)
    ours = attended(grouped_attention, query, key, value, mask)
    assert torch.allclose(ours, theirs, atol=0.02)


@pytest.mark.parametrize("masked", [False, True])
def test_few_tokens_many_scores_are_computed_head_by_head(masked: bool) -> None:
    """Behind a long context, of several rows, with room behind it."""
    rows, new = 2, 30
    tokens = SMALL // (rows * 4 * new) + 1
    states = torch.randn(2, rows, 2, tokens, 16).bfloat16()
    layer = KVLayer()
    key, value = layer.update(*states)
    assert with_room(key).shape[2] > tokens
    query = torch.randn(rows, 4, new, 16).bfloat16()
    mask = torch.zeros(rows, 1, new, tokens, dtype=torch.bfloat16) if masked else None
    if mask is not None:
        mask[1, ..., : tokens // 2] = torch.finfo(mask.dtype).min
    theirs = attended(eager_attention_forward, query, *states, mask)
    ours = attended(grouped_attention, query, key, value, mask)
    assert torch.allclose(ours, theirs, atol=0.01)


@pytest.mark.parametrize("masked", [False, True])
def test_few_tokens_scores_are_rounded_less_often_than_eager_s(masked: bool) -> None:
    states = torch.randn(3, 2, 4, 300, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    query, (key, value) = states[0, :, :, :2], states[1:, :, :2]
    mask = torch.zeros(2, 1, 2, 300, dtype=torch.bfloat16) if masked else None
    if mask is not None:
        mask[1, ..., :100] = torch.finfo(torch.bfloat16).min
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    options = {"scaling": 0.125, "softcap": 5.0}

    def wide(tensor: torch.Tensor | None) -> Any:
        return None if tensor is None else tensor.float()

    true, _ = eager_attention_forward(module, *map(wide, (query, key, value, mask)), **options)
    theirs, _ = eager_attention_forward(module, query, key, value, mask, **options)
    ours, _ = grouped_attention(module, query, key, value, mask, **options)
    assert ours.dtype == torch.bfloat16
    assert (ours - true).abs().mean() < 0.9 * (theirs - true).abs().mean()


def test_every_bfloat16_has_the_same_tanh() -> None:
    """Computed in float32 and rounded, as the scores are."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    theirs, ours = every.tanh(), every.float().tanh().to(torch.bfloat16)
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_room_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or zero times what is there would be no number. New memory is NaN here."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        loaded, grown = KVLayer(), KVLayer()
        loaded.load([[(torch.ones(2, n, 16), torch.ones(2, n, 16))] for n in (50, 60)], 60)
        for tokens in (10, 80):
            grown.update(*torch.ones(2, 2, 2, tokens, 16))
    finally:
        torch.use_deterministic_algorithms(False)
    for layer, tokens in ((loaded, 60), (grown, 90)):
        for shown in (layer.keys, layer.values):
            assert shown.shape[2] == tokens
            assert with_room(shown).isfinite().all()
            assert not with_room(shown)[:, :, tokens:].any()


def test_gemma_2_takes_it_unless_told_otherwise() -> None:
    assert Gemma2LLM("demo").engine.attn_implementation == "grouped"
    eager = Gemma2LLM("demo", attn_implementation="eager")
    assert eager.engine.attn_implementation == "eager"
    assert eager.invoke("你是谁") == Gemma2LLM("demo").invoke("你是谁")
    asked = Gemma2LLM("demo", attn_implementation="grouped").engine
    assert asked is Gemma2LLM("demo").engine


def test_another_model_is_refused_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=1200, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(DEMO, local_files_only=True).save_pretrained(tmp_path)
    with pytest.raises(ParameterError, match="attn_implementation='grouped'"):
        _ = Gemma2LLM(tmp_path, attn_implementation="grouped").engine


# The engine's options --------------------------------------------------------------------------


def test_options_of_the_engine_share_the_weights() -> None:
    """Two models that serve differently are two engines, and one copy of the weights."""
    plain = Gemma2LLM("demo").engine
    assert isinstance(plain, Gemma2Engine)
    other = Gemma2LLM("demo", prefix_cache_bytes=0, max_rows=2).engine
    assert isinstance(other, Gemma2Engine)
    assert other is not plain
    assert other.model is plain.model
    assert other.prefixes.limit == 0 < plain.prefixes.limit
    assert Gemma2LLM("demo", max_rows=2, prefix_cache_bytes=0).engine is other


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_rows", 0),
        ("max_waiting", 1.5),
        ("max_cached_tokens", -1),
        ("prefix_cache_bytes", "1 GB"),
        ("prompt_lookup_num_tokens", True),
    ],
)
def test_an_option_that_cannot_be_is_refused_when_it_is_set(name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=f"{name}={value!r} is not a whole number"):
        Gemma2LLM("demo", **{name: value})


def test_an_option_does_not_decide_what_is_said() -> None:
    """So LangChain's cache knows one answer for both."""
    one, other = Gemma2LLM("demo"), Gemma2LLM("demo", max_rows=2, prompt_lookup_num_tokens=4)
    assert one._llm_type == other._llm_type
    assert one._identifying_params == other._identifying_params
