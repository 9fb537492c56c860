"""A model of Gemma-2-2b's real shape with fewer layers and random weights, for the benchmarks.

    model = random_stack()                  # 8 of the 26 layers: 1.21 B parameters, 2.4 GB, seconds
    say_only(model, words(tokenizer))       # answers that text keeps: encoded, they are their ids
    save(folder, model, tokenizer)          # a checkpoint that transformers, vLLM and others read

Speed does not depend on what the weights are, as long as they are finite; the text does, and two
things are arranged so that every engine has the same work to do on the same file:

- Greedy answers vary. A tied random table says its last token again and again, for the residual
  stream still holds that token's own row. Here the table is small beside what the layers add, and
  queries and keys are large, so that attention picks single tokens instead of averaging them all.
- Nothing ends a turn. The rows of the ids that do are zero in the tied table, so their logit is 0,
  and among 256,000 others 0 is never the largest. Engines that can are told to ignore them as well.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, initialization

from gemma2_stream import Gemma2Engine
from gemma2_stream.attention import prefer_grouped
from gemma2_stream.loading import prepare
from gemma2_stream.pages import enlarge
from gemma2_stream.presets import LARGE, choose
from gemma2_stream.products import neighbours

T = TypeVar("T")

END_IDS = (0, 1, 107)  # <pad>, <eos>, <end_of_turn>


def random_stack(layers: int = 8, dtype: torch.dtype = torch.bfloat16) -> Gemma2ForCausalLM:
    """Gemma-2-2b with `layers` of its 26 layers, in eval mode; no memory but that of the weights.

    The same weights for the same arguments, on every machine.
    """
    config = Gemma2Config(
        vocab_size=256_000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=[1, 107],
        pad_token_id=0,
    )
    with initialization.no_init_weights():
        model = Gemma2ForCausalLM._from_config(config, dtype=dtype)
    # Drawing a billion numbers takes a minute. A prime number of them, over and over, does as well:
    # no two rows of a matrix begin at the same one, and no two matrices either.
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    # Every half layer adds a vector whose elements have a variance of 1, and embeddings enter times
    # the square root of the width: each is a twentieth of what the layers add. The last norm gives
    # logits a deviation of 5, about that of a trained model.
    depth = math.sqrt(2 * layers)
    scales = {"embed_tokens": 0.05 * depth / math.sqrt(config.hidden_size)}
    scales |= {"q_proj": 0.06, "k_proj": 0.06}
    with torch.no_grad():
        for number, (name, weight) in enumerate(model.named_parameters()):
            if weight.dim() == 1:  # a norm: Gemma's is 1 + weight
                weight.fill_(100 / depth - 1 if name == "model.norm.weight" else 0)
            else:
                scaled = noise * scales.get(name.split(".")[-2], 0.02)
                _fill(weight.view(-1), scaled.to(dtype).roll(7_919 * number))
        model.get_input_embeddings().weight[list(END_IDS)] = 0
    model.tie_weights()
    return model.eval()


def _fill(flat: torch.Tensor, noise: torch.Tensor) -> None:
    for start in range(0, len(flat), len(noise)):
        flat[start : start + len(noise)] = noise[: len(flat) - start]


def speaking_stack(layers: int, ids: Sequence[int]) -> Gemma2ForCausalLM:
    """A `random_stack` of bfloat16 that can `say_only` these ids, made `aside`."""

    def work() -> Gemma2ForCausalLM:
        model = random_stack(layers)
        say_only(model, ids)
        return model

    return aside(work)


def words(tokenizer: Any) -> list[int]:
    """Ids of words with the space before them: the text of any sequence encodes to the sequence."""
    pieces = ((token_id, piece) for piece, token_id in tokenizer.get_vocab().items())
    return sorted(
        token_id
        for token_id, piece in pieces
        if piece.startswith("▁") and piece[1:].isascii() and piece[1:].isalpha()
    )


def say_only(model: Gemma2ForCausalLM, ids: Sequence[int]) -> None:
    """Zero the rows of all other ids in the tied table, so that none of them is ever chosen."""
    table = model.get_input_embeddings().weight
    other = torch.ones(len(table), dtype=torch.bool)
    other[list(ids)] = False
    with torch.no_grad():
        table[other] = 0


def as_loaded(model: Gemma2ForCausalLM) -> Gemma2ForCausalLM:
    """`model` as `Gemma2LLM` runs it when nobody says how: with grouped attention and
    the preset that is chosen for it. `model` itself stays, where its weights are.
    """
    mine = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    prefer_grouped(mine)
    dtype = str(model.dtype)[6:]
    prepare(mine, choose(None, device="cpu", dtype=dtype, size=LARGE).preset, dtype)
    enlarge(mine, neighbours(mine))
    # As stock has them: it would multiply weights without gradients row by row.
    return mine.requires_grad_(True)


def engine_of(model: Gemma2ForCausalLM, tokenizer: Any, **options: Any) -> Gemma2Engine:
    """What a user gets for these weights, with `options`."""
    return Gemma2Engine(aside(lambda: as_loaded(model)), tokenizer, name="stack", **options)


def aside(work: Callable[[], T]) -> T:
    """What `work()` returns, run in a thread that ends with it, as its OpenMP threads do then.

    They are kept for every thread that ever needed some. Once there are more of them than
    processors they sleep between operations instead of spinning, and a step of another thread's
    takes up to a third longer. A user's process has one engine's; so has a benchmark's, like this.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def save(folder: str | Path, model: Gemma2ForCausalLM, tokenizer: Any) -> None:
    """Write `model` and `tokenizer` as an ordinary safetensors checkpoint into `folder`."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
