"""Tiny real Gemma 2 models for tests, a watch on their forwards, and what bare `generate` says."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM
from waiting import wait

import gemma2_stream
from gemma2_stream import Gemma2Engine

DEMO = Path(gemma2_stream.__file__).parent / "demo"

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 64,  # short, so that ordinary prompts cross it
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": [1, 107],
    "bos_token_id": 2,
}


def random_gemma(
    cls: type[Gemma2ForCausalLM] = Gemma2ForCausalLM, vocab: int = 256_000, **config: Any
) -> Any:
    """Random Gemma 2 weights in float32 whose greedy answers are varied and do not end soon."""
    torch.manual_seed(0)
    model = cls(Gemma2Config(vocab_size=vocab, **{**TINY, **config})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(10)
    return model


class ScriptedGemma2(Gemma2ForCausalLM):
    """Gemma 2 that says what it is told: row r's step s is the id `script[r][s]`.

    All of Gemma 2 runs; only the last position's logits are replaced, so that a test can choose
    the ids that a real `generate` makes.
    """

    script: list[list[int]]
    width: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        cache = output.cache if "cache" in output else output.past_key_values  # renamed in 5.24
        step = cache.get_seq_length() - self.width
        if step >= 0:
            # Rows that have said everything have left.
            for row, ids in enumerate(ids for ids in self.script if len(ids) >= step):
                wanted = ids[step] if step < len(ids) else self.config.eos_token_id[0]
                output.logits[row, -1] = -30.0
                output.logits[row, -1, wanted] = 30.0
        return output


class Forwards:
    """Counts the forwards of a model; can hold one back at a gate, or make one fail.

    A real forward hook, on whichever thread runs the model.
    """

    def __init__(self, model: Any) -> None:
        self.count = 0
        self.tokens: list[int] = []
        self.rows: list[int] = []
        self.fail_at: dict[int, BaseException] = {}
        self._gates: dict[int, tuple[threading.Event, threading.Event]] = {}
        # On the decoder: a prefill that makes no token has no need of the output layer.
        self._handle = model.get_decoder().register_forward_pre_hook(self._before, with_kwargs=True)

    def gate(self, number: int) -> tuple[threading.Event, threading.Event]:
        """Two events for forward `number` (from 1): `reached` it, and `release` it."""
        self._gates[number] = (threading.Event(), threading.Event())
        return self._gates[number]

    @contextlib.contextmanager
    def held(self, number: int) -> Iterator[threading.Event]:
        """Inside, the model makes no forward from `number` on; gives the event that it is there."""
        reached, release = self.gate(number)
        try:
            yield reached
        finally:
            release.set()

    def _before(self, module: Any, args: Any, kwargs: Any) -> None:
        self.count += 1
        ids = kwargs.get("input_ids")
        self.tokens.append(ids.shape[1] if ids is not None else 0)
        self.rows.append(ids.shape[0] if ids is not None else 0)
        if self.count in self._gates:
            reached, release = self._gates[self.count]
            reached.set()
            assert release.wait(120), "nobody opened the gate"  # longer than any test's own wait
        if self.count in self.fail_at:
            raise self.fail_at[self.count]

    def remove(self) -> None:
        for _, release in self._gates.values():
            release.set()
        self._handle.remove()


def abandoned(engine: Gemma2Engine) -> None:
    """Wait until nobody wants what `engine` was asked for."""
    for channel in list(engine._channels):
        gone = threading.Event()
        channel.when_cancelled(gone.set)
        wait(gone)


def live_caches() -> list[DynamicCache]:
    """KV caches that still hold states, anywhere in the process."""
    gc.collect()
    return [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), DynamicCache) and thing.layers
    ]


def greedy(engine: Gemma2Engine, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
    """The new ids of a bare greedy `model.generate`: what every path must say."""
    engine.join()
    output = engine.model.generate(
        input_ids=torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=[1, 107],
        pad_token_id=0,
    )
    return output[0, len(prompt_ids) :].tolist()


def template_ids(engine: Gemma2Engine, prompt: str) -> list[int]:
    """`prompt` as one user turn, by transformers' own chat template call."""
    turns = [{"role": "user", "content": prompt}]
    encoded = engine.tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    return list(encoded["input_ids"])


def reference(engine: Gemma2Engine, prompt: str, max_new_tokens: int) -> str:
    """What a bare greedy `generate` answers to `prompt`, decoded whole."""
    ids = greedy(engine, template_ids(engine, prompt), max_new_tokens)
    return engine.tokenizer.decode(ids, skip_special_tokens=True)
