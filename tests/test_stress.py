"""Many callers at once who cancel, stop, fail and come back, in little room: every text is right.

Seeds fix who asks what; how the threads meet is new each time.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny import random_gemma
from transformers import DynamicCache

from gemma2_stream import Gemma2Engine, Request, SamplingParams, TokenStream

MOST = 24
KINDS: list[dict[str, Any]] = [{}, {"repetition_penalty": 1.4}]


class Injected(Exception):
    """What breaks a forward."""


class Asked:
    """Prompts with beginnings in common, and what a bare `generate` says to them:
    `texts[prompt, kind][n]` is the text of n tokens.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        dice = random.Random(0)
        base = [2, *(dice.randrange(5, 490) for _ in range(150))]
        cuts = [1, 5, 60, 70, 120, 140, 151]
        self.prompts = [(*base[:cut], *(dice.randrange(5, 490) for _ in range(4))) for cut in cuts]
        self.texts: dict[tuple[tuple[int, ...], int], list[str]] = {}
        ends: dict[str, Any] = {"eos_token_id": [1, 107], "pad_token_id": 0, "do_sample": False}
        for prompt in self.prompts:
            for number, kind in enumerate(KINDS):
                ids = torch.tensor([prompt])
                mask = torch.ones_like(ids)
                output = model.generate(
                    ids, attention_mask=mask, max_new_tokens=MOST, **ends, **kind
                )
                said = output[0, len(prompt) :].tolist()
                self.texts[prompt, number] = [
                    tokenizer.decode(said[:n], skip_special_tokens=True) for n in range(MOST + 1)
                ]


@pytest.fixture(scope="module")
def model() -> Any:
    return random_gemma(vocab=500)


@pytest.fixture(scope="module")
def asked(model: Any, demo_engine: Gemma2Engine) -> Asked:
    return Asked(model, demo_engine.tokenizer)


def _ask(engine: Gemma2Engine, asked: Asked, dice: random.Random) -> None:
    rows = [
        (dice.choice(asked.prompts), dice.randrange(len(KINDS)), dice.randint(1, MOST))
        for _ in range(dice.choice([1, 1, 3]))
    ]
    stops = [asked.texts[p, kind][-1][2:4] if dice.random() < 0.2 else "" for p, kind, _ in rows]
    requests = [
        Request(p, SamplingParams(max_new_tokens=n, stop=[stop] if stop else [], **KINDS[kind]))
        for (p, kind, n), stop in zip(rows, stops, strict=True)
    ]
    leave_at = dice.choice([None, None, 1, 4, 9])
    texts, reasons = [""] * len(rows), [""] * len(rows)
    used = [0] * len(rows)
    stream: TokenStream = engine.submit(requests)
    try:
        for number, chunk in enumerate(stream, 1):
            assert not reasons[chunk.index]
            texts[chunk.index] += chunk.text
            if chunk.usage is not None:
                reasons[chunk.index] = str(chunk.finish_reason)
                used[chunk.index] = chunk.usage.completion_tokens
            if number == leave_at:
                stream.cancel()
        assert all(reasons)
    except Injected:
        pass
    for (p, kind, n), stop, said, why, count in zip(rows, stops, texts, reasons, used, strict=True):
        whole = asked.texts[p, kind]
        right = whole[count if why == "cancelled" else n]
        right = right.split(stop)[0] if stop else right
        assert said == right if why else right.startswith(said)


@pytest.mark.parametrize(
    "options",
    [
        {"max_rows": 3, "prefix_cache_bytes": 30_000, "prompt_lookup_num_tokens": 3},
        {"max_cached_tokens": 400, "prefix_cache_bytes": 300_000},
        {"max_cached_tokens": 200, "prefix_cache_bytes": 0},
    ],
)
@pytest.mark.parametrize("failing", [0.0, 0.02])
def test_every_text_is_right_whoever_comes_and_goes(
    model: Any,
    asked: Asked,
    demo_engine: Gemma2Engine,
    new_caches: Callable[[], list[DynamicCache]],
    options: dict[str, int],
    failing: float,
) -> None:
    dice = random.Random(1)

    def fail(*_: object) -> None:
        if dice.random() < failing:
            raise Injected

    wrong: list[BaseException] = []

    def caller(seed: int) -> None:
        mine = random.Random(seed)
        try:
            for _ in range(5):
                _ask(engine, asked, mine)
        except BaseException as error:
            wrong.append(error)

    handle = model.get_decoder().register_forward_pre_hook(fail)
    try:
        with Gemma2Engine(model, demo_engine.tokenizer, name="stress", **options) as engine:
            callers = [threading.Thread(target=caller, args=(seed,)) for seed in range(5)]
            for thread in callers:
                thread.start()
            for thread in callers:
                thread.join()
            engine.join()
            assert not wrong
            assert engine.prefixes.bytes <= options["prefix_cache_bytes"]
            assert not new_caches()
    finally:
        handle.remove()


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads that take turns a thousand times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 1000)
    yield
    sys.setswitchinterval(before)


def test_those_who_wait_are_counted_while_others_leave(
    model: Any, demo_engine: Gemma2Engine, hasty: None
) -> None:
    """Nobody is refused, and nobody meets an error."""
    request = Request((2, 5, 6), SamplingParams(max_new_tokens=1))
    with (
        Gemma2Engine(model, demo_engine.tokenizer, name="counting", max_waiting=1000) as engine,
        ThreadPoolExecutor(8) as callers,
    ):
        answers = [*callers.map(lambda _: [*engine.submit([request])], range(1000))]
    assert [len(chunks) for chunks in answers] == [1] * 1000
