"""Gemma 2 with what is compiled: what few tokens come to, and what of a model stays as it was."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import CAP, capped_gemma, causal, in_two, off, off_of_logits
from matrices import Calls, error, no_grad  # noqa: F401  # a fixture
from tiny import random_gemma
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, DynamicCache, StaticCache
from transformers.models.gemma2 import modeling_gemma2

from gemma2_stream.attention import prefer_grouped
from gemma2_stream.compiled import compilation
from gemma2_stream.decoder import (
    CompiledLayer,
    CompiledNorm,
    Gemma2ForCausalLM,
)
from gemma2_stream.kernels import MOST
from gemma2_stream.kv import CACHE_NAME, KVCache
from gemma2_stream.loading import prepare
from gemma2_stream.pages import enlarge
from gemma2_stream.products import MANY, HeadLinear, neighbours

HERE = compilation()
COMPILED = pytest.mark.skipif(
    HERE.kernels is None,
    reason=f"products are {HERE.reason}: needs AVX512-BF16 without AMX, and a C compiler",
)
PRESETS = ("speed", "memory")


def loaded(model: Any, preset: str = "speed", dtype: str = "bfloat16") -> Any:
    """A copy of `model` as the engine runs it."""
    model = copy.deepcopy(model).to(getattr(torch, dtype))
    prepare(model, preset, dtype)
    enlarge(model, neighbours(model))
    prefer_grouped(model)
    return model


def plain(model: Any) -> Any:
    """A copy of the loaded `model`, without what is compiled between its products."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__module__ != "gemma2_stream.decoder":
                module.__class__ = kind
                break
    return model


class Adapted(nn.Linear):
    """What somebody has put in the place of a product."""


def layered(model: Any, *given: Any) -> Any:
    """What the first layer of `model` makes of them."""
    return in_two(model.model.layers[0], model, *given)


def prefilled(model: Any, rows: int = 1, past: int = 40) -> KVCache:
    cache = KVCache()
    model(torch.arange(rows * past).view(rows, past) % 300 + 3, **{CACHE_NAME: cache})
    return cache


def step(model: Any, ids: torch.Tensor, cache: KVCache, **options: Any) -> torch.Tensor:
    """The logits of `ids` behind what `cache` holds, and goes on to hold."""
    logits: torch.Tensor = model(ids, **{CACHE_NAME: cache}, **options).logits
    cache.crop(-ids.shape[1])
    return logits


@pytest.mark.skipif(HERE.kernels is not None, reason="here it can be compiled")
@pytest.mark.parametrize("preset", PRESETS)
def test_where_nothing_is_compiled_all_stays(preset: str) -> None:
    model = loaded(random_gemma(vocab=320), preset)
    assert {type(module).__module__ for module in model.modules()}.isdisjoint(
        {"gemma2_stream.decoder"}
    )


@COMPILED
@pytest.mark.parametrize("softcap", [None, CAP])
@pytest.mark.parametrize(
    ("rows", "new"), [(1, 6), (1, 31), (1, MOST), (1, MOST + 1), (3, 90), (MANY, 1)]
)
def test_a_layer_is_nearer_to_float32_than_eager(
    rows: int, new: int, softcap: float | None
) -> None:
    wide = capped_gemma(softcap)
    states = torch.randn(rows, (past := 100) + new, 64).bfloat16().float()
    mask = causal(rows, past + new)
    true = layered(wide, states, mask, past, KVCache())
    eager = layered(copy.deepcopy(wide).bfloat16(), states, mask, past, KVCache())
    with Calls() as calls:
        found = layered(loaded(wide), states, mask, past, KVCache())
    assert "addcmul_" not in calls.names  # as torch would rotate few tokens
    assert (found.shape, found.dtype) == (true.shape, torch.bfloat16)
    assert off(found, true) < (0.9 if softcap is None else 0.7) * off(eager, true)


@COMPILED
@pytest.mark.parametrize("softcap", [None, CAP])
@pytest.mark.parametrize("kind", [type(None), KVCache, DynamicCache])
def test_a_layer_takes_any_cache(kind: Any, softcap: float | None) -> None:
    """Or none, or no mask."""
    wide = capped_gemma(softcap)
    states, mask = torch.randn(2, 9, 64), torch.zeros(2, 1, 9, 9)
    true = layered(wide, states, mask, 0, None)
    model, cache = loaded(wide), kind()
    masked = layered(model, states, mask, 0, cache)
    assert error(masked, true) < 0.03
    if cache is not None:
        assert cache.layers[0].keys.dtype == torch.bfloat16
    embeddings = model.model.rotary_emb(states.bfloat16(), torch.arange(9)[None])
    found = model.model.layers[0](states.bfloat16(), embeddings)
    assert torch.equal(found, masked)


@COMPILED
@pytest.mark.parametrize("kind", [KVCache, DynamicCache, StaticCache])
@pytest.mark.parametrize("rows", [1, 3])
def test_an_equipped_gemma_is_nearer_to_float32_than_eager(kind: Any, rows: int) -> None:
    """Padded or not, below and beyond the sliding window of 64, whatever the cache."""
    found, eager = off_of_logits(loaded, rows, kind)
    assert found < eager


@COMPILED
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("rows", [1, 5, MANY, MANY + 1, MOST, MOST + 1])
def test_it_says_what_it_says_without(rows: int, preset: str) -> None:
    """In int8 as in bfloat16, but for what is rounded less often."""
    model = loaded(random_gemma(vocab=320), preset)
    without, ids = plain(model), torch.randint(3, 320, (rows, 1))
    found, expected = model(ids).logits, without(ids).logits
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert error(found, expected) < 0.05


@COMPILED
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tokens", [1, MOST, MOST + 1])
def test_nothing_between_products_is_torch_s(tokens: int, preset: str) -> None:
    """But the products of many tokens, and what is between those of an MLP."""
    model, cache = loaded(random_gemma(vocab=320), preset), KVCache()
    model(torch.arange(3, 100)[None], **{CACHE_NAME: cache})
    with profile(activities=[ProfilerActivity.CPU]) as spent:
        model(torch.arange(3, 3 + tokens)[None], **{CACHE_NAME: cache})
    others = {"bmm", "tanh", "_softmax", "rsqrt", "linalg_vector_norm"}
    if tokens <= MOST:
        others |= {"mm", "mv", "gelu"}
    assert {f"aten::{name}" for name in others}.isdisjoint(
        event.key for event in spent.key_averages()
    )


@COMPILED
@pytest.mark.parametrize("preset", PRESETS)
def test_queries_keys_and_values_are_one_product(preset: str) -> None:
    """But not of weights that are no neighbours."""
    model = loaded(random_gemma(vocab=320), preset)
    joined, parted = model.model.layers[0], copy.deepcopy(model).model.layers[0]
    states = torch.randn(1, 1, 64).bfloat16()
    embeddings = model.model.rotary_emb(states, torch.zeros(1, 1))
    calls = [Calls(), Calls()]
    with calls[0]:
        found = joined(states, embeddings)
    with calls[1]:
        expected = parted(states, embeddings)
    assert error(found, expected) < 0.02
    assert ["softmax" in each.names for each in calls] == [False, True]


@COMPILED
def test_what_does_not_fit_is_torch_s() -> None:
    """Its error, or its answer, and no read beyond what is there."""
    model = loaded(random_gemma(vocab=320))
    with pytest.raises(RuntimeError):
        model(inputs_embeds=torch.randn(1, 3, 32).bfloat16())
    states, turn = torch.randn(1, 3, 64).bfloat16(), torch.rand(1, 3, 64).bfloat16()
    with Calls() as calls:
        model.model.layers[0](states, (turn, turn))
    assert "softmax" in calls.names


@COMPILED
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("rows", "new"), [(1, 1), (1, 9), (5, 1), (3, 64)])
def test_all_layers_of_few_tokens_are_one_call(rows: int, new: int, preset: str) -> None:
    """What it says is what its layers say one by one, as they do where somebody listens."""
    model, ids = loaded(random_gemma(vocab=320), preset), torch.randint(3, 320, (rows, new))
    caches, heard, said = [prefilled(model, rows) for _ in range(2)], [], []
    calls = [Calls(), Calls()]
    with calls[0]:
        said.append(model(input_ids=ids, **{CACHE_NAME: caches[0]}).logits)
    hook = model.model.layers[2].register_forward_hook(lambda *_: heard.append(1))
    with calls[1]:
        said.append(model(input_ids=ids, **{CACHE_NAME: caches[1]}).logits)
    hook.remove()
    assert heard == [1]
    assert torch.equal(*said)
    assert len(calls[0].names) < len(calls[1].names)
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert one.keys.shape[2] == 40 + new
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


def listening(module: Any, heard: list[Any], *args: Any, **kwargs: Any) -> Any:
    heard.append(1)
    return type(module).forward(module, *args, **kwargs)


@COMPILED
@pytest.mark.parametrize("tokens", [1, 3, MOST + 1])
@pytest.mark.parametrize("preset", PRESETS)
def test_who_listens_to_a_module_hears_it(preset: str, tokens: int) -> None:
    """Its layer is then computed by its modules."""
    model, ids = loaded(random_gemma(vocab=320), preset), torch.randint(3, 320, (1, tokens))
    cache, layer, heard = prefilled(model), model.model.layers[1], []
    expected = step(model, ids, cache)
    listened = [model.model, layer, *layer.self_attn.children(), layer.self_attn]
    listened += [
        *layer.mlp.children(),
        layer.mlp,
        layer.pre_feedforward_layernorm,
        model.model.norm,
        model.lm_head,
    ]
    for module in listened:
        hook = module.register_forward_hook(lambda module, *_: heard.append(module))
        assert error(step(model, ids, cache), expected) < 0.02
        hook.remove()
    assert heard == listened
    with pytest.MonkeyPatch.context() as patched:
        for module in (model.model, layer, layer.mlp, layer.self_attn.q_proj):
            patched.setattr(module, "forward", functools.partial(listening, module, heard))
        step(model, ids, cache)
    assert heard[len(listened) :] == [1] * 4
    heard.clear()
    everyone = register_module_forward_hook(lambda module, *_: heard.append(module))
    step(model, ids, cache)
    everyone.remove()
    assert {model.model, layer, layer.mlp, layer.self_attn} < {*heard}


@COMPILED
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tokens", [1, MOST + 1])
def test_what_is_changed_in_a_layer_counts(preset: str, tokens: int) -> None:
    """Another activation, scaling, cap or epsilon, after it was computed."""
    model, ids = loaded(random_gemma(vocab=320), preset), torch.randint(3, 320, (1, tokens))
    cache, layer = prefilled(model), model.model.layers[1]
    before = step(model, ids, cache)
    for owner, name, value in (
        (layer.mlp, "act_fn", nn.ReLU()),
        (layer.self_attn, "scaling", 9 * layer.self_attn.scaling),
        (layer.self_attn, "attn_logit_softcapping", 0.1),
        *((norm, "eps", 9.0) for norm in layer.children() if isinstance(norm, CompiledNorm)),
    ):
        kept = getattr(owner, name)
        setattr(owner, name, value)
        changed = step(model, ids, cache)
        expected = step(plain(model), ids, cache)
        assert error(changed, expected) < error(changed, before)
        setattr(owner, name, kept)
    assert torch.equal(step(model, ids, cache), before)


@COMPILED
def test_layers_may_come_in_another_order() -> None:
    """Each writes where its own index says."""
    model, ids = loaded(random_gemma(vocab=320)), torch.arange(3, 6)[None]
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    found = step(model, ids, prefilled(model))
    without = plain(model)
    assert error(found, step(without, ids, prefilled(without))) < 0.02


@COMPILED
def test_layers_of_different_lengths_are_an_error() -> None:
    model = loaded(random_gemma(vocab=320))
    cache = prefilled(model)
    cache.layers[2].crop(-7)
    with pytest.raises(RuntimeError):
        step(model, torch.arange(3, 6)[None], cache)


@COMPILED
@pytest.mark.parametrize("mask", [None, "whole", "padded"])
def test_one_call_goes_on_beyond_room_and_window(mask: str | None) -> None:
    """Step by step, by one call and by layers, with room for 64 more and a window of 64."""
    model = loaded(capped_gemma())
    caches, token = [prefilled(model, 2, 50) for _ in range(2)], torch.full((2, 1), 7)
    rooms = {id(caches[0].layers[0].room)}
    for number in range(51, 130):
        seen = None if mask is None else torch.ones(2, number, dtype=torch.int64)
        if mask == "padded":
            seen[1, :30] = 0
        one = model(input_ids=token, attention_mask=seen, **{CACHE_NAME: caches[0]}).logits
        hook = model.model.layers[0].register_forward_pre_hook(lambda *_: None)
        other = model(input_ids=token, attention_mask=seen, **{CACHE_NAME: caches[1]}).logits
        hook.remove()
        assert torch.equal(one, other)
        rooms.add(id(caches[0].layers[0].room))
        token = one[:, -1:].argmax(-1)
    assert len(rooms) > 1
    assert caches[0].get_seq_length() == 129


@COMPILED
def test_what_one_call_can_not_have_is_had_from_layers() -> None:
    """Other caches and inputs, what a config asks for, and layers that are no more."""
    model = loaded(random_gemma(vocab=320))
    ids = torch.arange(3, 8)[None]
    expected = step(model, ids, prefilled(model))
    other = DynamicCache(config=model.config)
    model(torch.arange(40)[None] + 3, **{CACHE_NAME: other})
    assert error(model(ids, **{CACHE_NAME: other}).logits, expected) < 0.02
    embeds = model.get_input_embeddings()(ids)
    cache = prefilled(model)
    assert torch.equal(model(inputs_embeds=embeds, **{CACHE_NAME: cache}).logits, expected)
    asked = model(ids, **{CACHE_NAME: prefilled(model)}, output_hidden_states=True)
    assert len(asked.hidden_states) == 5
    assert error(asked.logits, expected) < 0.02
    model.config.output_hidden_states = True
    assert len(model(ids, **{CACHE_NAME: prefilled(model)}).hidden_states) == 5
    model.config.output_hidden_states = False
    shorter = copy.deepcopy(model)
    for module in shorter.modules():
        module._forward_hooks.clear()  # by which transformers listens from then on
    shorter.config.num_hidden_layers = 3
    cache = prefilled(shorter)
    assert len(cache.layers) == 3
    assert error(step(shorter, ids, cache), expected) > 0.05
    del shorter.model.layers[3:]  # of whose kinds there are four
    assert len(step(shorter, ids, prefilled(shorter))) == 1
    model.set_attn_implementation("eager")
    assert error(step(model, ids, prefilled(model)), expected) < 0.05


@COMPILED
@pytest.mark.parametrize("name", ["q_proj", "o_proj", "gate_proj", "down_proj", "lm_head"])
@pytest.mark.parametrize("preset", PRESETS)
def test_an_adapter_that_comes_later_is_called(name: str, preset: str) -> None:
    model, ids = loaded(random_gemma(vocab=320), preset), torch.arange(3, 6)[None]
    cache = prefilled(model)
    before, layer = model(ids).logits, model.model.layers[1]
    behind = step(model, ids, cache)
    parents = (layer.self_attn, layer.mlp, model)
    [parent] = [module for module in parents if name in dict(module.named_children())]
    product = getattr(parent, name)
    adapter = Adapted(product.in_features, product.out_features, bias=False, dtype=torch.bfloat16)
    setattr(parent, name, adapter)
    assert error(model(ids).logits, before) > 0.05
    assert error(step(model, ids, cache), behind) > 0.05
    setattr(parent, name, product)
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(step(model, ids, cache), behind)


@COMPILED
@pytest.mark.parametrize("preset", PRESETS)
def test_an_equipped_gemma_keeps_its_names_and_its_ties(preset: str, tmp_path: Path) -> None:
    """And is saved under the name that transformers knows."""
    model = random_gemma(vocab=320)
    model.lm_head.weight = model.get_input_embeddings().weight
    before = {name: weight.numel() for name, weight in model.named_parameters()}
    model = loaded(model, preset)
    assert {name: weight.numel() for name, weight in model.named_parameters()} == before
    assert model.lm_head.weight is model.get_input_embeddings().weight
    kinds = Counter(map(type, model.modules()))
    assert kinds[Gemma2ForCausalLM] == 1
    assert kinds[CompiledNorm] == 4 * 4 + 1
    assert kinds[CompiledLayer] == 4
    assert isinstance(model, modeling_gemma2.Gemma2ForCausalLM)
    if preset == "speed":
        model.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).architectures == ["Gemma2ForCausalLM"]


@COMPILED
def test_in_float32_int8_is_as_without() -> None:
    model, ids = loaded(random_gemma(vocab=320), "memory", "float32"), torch.arange(3, 9)[None]
    assert type(model.model.norm) is CompiledNorm
    found, expected = model(ids).logits, plain(model)(ids).logits
    assert error(found, expected) < 1e-5


@COMPILED
def test_what_is_not_gemma_s_own_stays() -> None:
    """Another activation, an adapter in the place of a product, no cap, another attention."""
    model = random_gemma(vocab=320, final_logit_softcapping=None)
    first, second, third, _ = model.model.layers
    first.self_attn.k_proj = Adapted(64, 64, bias=False)
    second.mlp.config = copy.copy(model.config)
    second.mlp.config.hidden_activation = "relu"
    third.mlp.down_proj = Adapted(128, 64, bias=False)
    model = loaded(model)
    kinds = Counter(map(type, model.modules()))
    assert kinds[modeling_gemma2.Gemma2ForCausalLM] == 1
    assert (kinds[modeling_gemma2.Gemma2DecoderLayer], kinds[CompiledLayer]) == (3, 1)
    model.set_attn_implementation("eager")
    attentions = model(torch.arange(5)[None], output_attentions=True).attentions
    assert [each.shape for each in attentions] == [(1, 4, 5, 5)] * 4


@COMPILED
def test_its_output_is_that_of_transformers() -> None:
    model = loaded(random_gemma(vocab=320))
    without, ids = plain(model), torch.arange(3, 12)[None]
    keep = torch.tensor([2, 7])
    for asked in (
        {},
        {"logits_to_keep": 3},
        {"logits_to_keep": keep},
        {"labels": ids},
        {"output_hidden_states": True},
        {"use_cache": False},
        {"return_dict": False},
    ):
        found, expected = model(ids, **asked), without(ids, **asked)
        assert type(found) is type(expected)
        if not isinstance(found, tuple):
            assert [*found] == [*expected]
            assert found.logits.shape == expected.logits.shape
            found, expected = found.to_tuple(), expected.to_tuple()
        for one, other in zip(found, expected, strict=True):
            if isinstance(one, torch.Tensor):
                assert error(one, other) < 0.05
            else:
                assert type(one) is type(other)
                if isinstance(one, tuple):
                    assert len(one) == len(other) == 5
    with_mask = model(ids, torch.ones_like(ids))
    assert error(with_mask.logits, model(ids).logits) < 0.05
    model.config.return_dict = False
    assert type(model(ids)) is tuple


@COMPILED
@pytest.mark.parametrize("preset", PRESETS)
def test_a_layer_takes_states_of_any_strides(preset: str) -> None:
    layer = loaded(random_gemma(vocab=320), preset).model.layers[0]
    wide = torch.randn(3, 2, 128).bfloat16()
    turn = torch.rand(1, 1, 16).repeat(1, 1, 2).bfloat16()
    for states in (wide[:, -1:, ::2], wide[:, -1:, 64:]):
        assert not states.is_contiguous()
        found = layer(states, (turn, turn))
        assert torch.equal(
            found, layer(states.clone(memory_format=torch.contiguous_format), (turn, turn))
        )


class Float32Cache(KVCache):
    """Gives back what it is given in float32."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(states.float() for states in super().update(*args, **kwargs))


@COMPILED
def test_a_cache_may_have_a_dtype_of_its_own() -> None:
    model, states = loaded(random_gemma(vocab=320)), torch.randn(2, 9, 64)
    mask = causal(2, 9)
    expected = layered(model, states, mask, 4, KVCache())
    assert torch.equal(layered(model, states, mask, 4, Float32Cache()), expected)


@COMPILED
def test_a_norm_that_somebody_has_put_in_is_called() -> None:
    model = random_gemma(vocab=320)
    calls: list[int] = []

    class Own(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return x

    model.model.layers[0].pre_feedforward_layernorm = Own()
    loaded(model)(torch.arange(3, 6)[None])
    assert calls == [1]


@COMPILED
def test_gradients_come_back_to_who_wants_them() -> None:
    """From embeddings, say; what is loaded for speed has none of its own."""
    model = loaded(random_gemma(vocab=320))
    embeds = model.get_input_embeddings()(torch.arange(3, 6)[None]).clone().requires_grad_()
    for module in (
        model.model.layers[0].mlp,
        model.lm_head,
        model.model.layers[0].mlp.up_proj,
    ):
        with torch.enable_grad():
            [gradient] = torch.autograd.grad(module(embeds).float().sum(), embeds)
        assert gradient.abs().sum() > 0


@COMPILED
def test_an_equipped_gemma_can_be_copied() -> None:
    model, ids = loaded(random_gemma(vocab=320)), torch.arange(3, 6)[None]
    assert error(copy.deepcopy(model)(ids).logits, model(ids).logits) < 0.05


@COMPILED
def test_a_head_that_is_not_tied_is_capped_in_place() -> None:
    model, ids = loaded(random_gemma(vocab=320)), torch.randint(3, 320, (1, MANY + 5))
    assert type(model.lm_head) is HeadLinear
    with Calls() as calls:
        many = model(ids).logits
    assert "tanh" not in [name for name in calls.names if name != "tanh_"]
    assert (many.abs() < model.config.final_logit_softcapping).all()
    assert error(many, plain(model)(ids).logits) < 0.05
