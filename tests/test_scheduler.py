"""Requests that join others and leave them: counted in forwards and rows, exact in their text."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import Forwards, greedy, reference
from transformers import Lfm2Config, Lfm2ForCausalLM
from waiting import wait

from gemma2_stream import (
    EngineBusyError,
    Gemma2Engine,
    ParameterError,
    Request,
    SamplingParams,
    TokenStream,
)


def request(engine: Gemma2Engine, prompt: str, **params: Any) -> Request:
    return Request(tuple(engine.encode(prompt)), SamplingParams(**params))


def text(stream: TokenStream) -> str:
    return "".join(chunk.text for chunk in stream)


@pytest.fixture
def make(random_engine: Gemma2Engine) -> Iterator[Callable[..., Gemma2Engine]]:
    """`make(**options)`: an engine of its own on the random weights, that keeps no prefixes."""
    engines: list[Gemma2Engine] = []

    def made(**options: Any) -> Gemma2Engine:
        options = {"prefix_cache_bytes": 0} | options
        model, tokenizer = random_engine.model, random_engine.tokenizer
        engines.append(Gemma2Engine(model, tokenizer, name="joining", **options))
        return engines[-1]

    yield made
    for engine in engines:
        engine.close()


class Arrivals:
    """Submits requests while the model runs: each at the forward that it is said to arrive at."""

    def __init__(self, engine: Gemma2Engine, watch: Forwards) -> None:
        self.streams: dict[str, TokenStream] = {}
        self.due: dict[int, list[tuple[str, dict[str, Any]]]] = {}
        self._engine = engine
        self._watch = watch
        decoder = engine.model.get_decoder()
        self._handle = decoder.register_forward_pre_hook(self._submit)

    def at(self, forward: int, prompt: str, **params: Any) -> None:
        self.due.setdefault(forward, []).append((prompt, params))

    def _submit(self, *_: object) -> None:
        for prompt, params in self.due.pop(self._watch.count, []):
            self.streams[prompt] = self._engine.submit([request(self._engine, prompt, **params)])

    def remove(self) -> None:
        self._handle.remove()


@pytest.fixture
def arriving(
    forwards: Callable[[Gemma2Engine], Forwards],
) -> Iterator[Callable[[Gemma2Engine], tuple[Forwards, Arrivals]]]:
    made: list[Arrivals] = []

    def watched(engine: Gemma2Engine) -> tuple[Forwards, Arrivals]:
        watch = forwards(engine)
        made.append(Arrivals(engine, watch))
        return watch, made[-1]

    yield watched
    for arrivals in made:
        arrivals.remove()


def test_requests_that_arrive_one_after_another_share_their_forwards(
    make: Callable[..., Gemma2Engine],
    arriving: Callable[[Gemma2Engine], tuple[Forwards, Arrivals]],
) -> None:
    """Eight of 128 tokens, eight steps apart: at most 0.35 of the forwards that they take in turn,
    and each says what it says alone.
    """
    engine = make()
    prompts = [f"number {n}: " + "word " * (11 * n % 50) for n in range(8)]
    expected = {prompt: reference(engine, prompt, 128) for prompt in prompts}
    watch, arrivals = arriving(engine)
    for n, prompt in enumerate(prompts[1:], 1):
        arrivals.at(8 * n, prompt, max_new_tokens=128)
    first = engine.submit([request(engine, prompts[0], max_new_tokens=128)])

    assert text(first) == expected[prompts[0]]
    for prompt in prompts[1:]:
        assert text(arrivals.streams[prompt]) == expected[prompt]
    assert watch.count <= 0.35 * 8 * 128


def test_a_newcomer_waits_for_one_step_and_its_own_prefill(
    make: Callable[..., Gemma2Engine],
    arriving: Callable[[Gemma2Engine], tuple[Forwards, Arrivals]],
) -> None:
    """Three chunks of prefill, one step of the others between them, and then its first token."""
    engine = make()
    watch, arrivals = arriving(engine)
    long = "word " * 2200
    arrivals.at(10, long, max_new_tokens=2)
    text(engine.submit([request(engine, "Who are you?", max_new_tokens=40)]))
    engine.join()

    joined = watch.rows.index(2)
    between = watch.tokens[10:joined]
    chunks = [tokens for tokens in between if tokens > 1]
    assert sum(chunks) == len(engine.encode(long)) - 1
    assert chunks[:-1] == [1024, 1024]
    assert all(a > 1 or b > 1 for a, b in itertools.pairwise(between))
    assert text(arrivals.streams[long]) == reference(engine, long, 2)


def test_a_long_prompt_that_joins_does_not_hold_up_the_others(
    make: Callable[..., Gemma2Engine],
    arriving: Callable[[Gemma2Engine], tuple[Forwards, Arrivals]],
) -> None:
    """The rows that decode get a token between any two chunks of the newcomer's prefill."""
    engine = make()
    watch, arrivals = arriving(engine)
    arrivals.at(5, "word " * 3100, max_new_tokens=1)
    text(engine.submit([request(engine, "x", max_new_tokens=30)]))
    engine.join()
    prefill = [n for n, tokens in enumerate(watch.tokens) if tokens > 1][1:]
    assert len(prefill) == 4
    assert all(after - before == 2 for before, after in itertools.pairwise(prefill))


def test_rows_leave_when_they_are_done(
    make: Callable[..., Gemma2Engine], forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """A row that has ended is computed no further."""
    engine = make()
    watch = forwards(engine)
    limits = {"a": 3, "b": 9, "c": 6}
    streams = engine.submit_each([request(engine, p, max_new_tokens=n) for p, n in limits.items()])
    engine.join()
    assert watch.rows == [3] * 3 + [2] * 3 + [1] * 3
    for (prompt, limit), stream in zip(limits.items(), streams, strict=True):
        assert text(stream) == reference(engine, prompt, limit)


def test_a_cancelled_row_leaves_at_the_next_step(
    make: Callable[..., Gemma2Engine], forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    engine = make()
    watch = forwards(engine)
    reached, release = watch.gate(5)
    one, other = engine.submit_each([request(engine, p, max_new_tokens=20) for p in "ab"])
    wait(reached)
    one.cancel()
    release.set()
    engine.join()
    assert watch.rows == [2] * 5 + [1] * 15
    assert text(other) == reference(engine, "b", 20)
    assert reference(engine, "a", 4).startswith(text(one))


def test_a_row_that_breaks_the_forward_hurts_only_itself(
    make: Callable[..., Gemma2Engine],
) -> None:
    """Those beside it are begun anew and say what they say alone; it gets its own exception."""
    engine = make()
    [poison] = engine.tokenize("☠")

    def refuse(_: object, args: object, kwargs: dict[str, Any]) -> None:
        if (kwargs["input_ids"] == poison).any():
            raise OSError("the poisoned prompt")

    expected = [reference(engine, prompt, 8) for prompt in ("a", "c")]
    handle = engine.model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        streams = engine.submit_each(
            [request(engine, prompt, max_new_tokens=8) for prompt in ("a", "b ☠", "c")]
        )
        with pytest.raises(OSError, match="the poisoned prompt"):
            text(streams[1])
        assert [text(streams[0]), text(streams[2])] == expected
    finally:
        engine.join()
        handle.remove()


def test_a_newcomer_that_breaks_its_prefill_leaves_the_others_alone(
    make: Callable[..., Gemma2Engine],
    arriving: Callable[[Gemma2Engine], tuple[Forwards, Arrivals]],
) -> None:
    engine = make()
    long = "word " * 1100
    expected = reference(engine, "x", 20)
    _watch, arrivals = arriving(engine)
    arrivals.at(5, long, max_new_tokens=4)

    def refuse(_: object, args: object, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] == 1024:
            raise OSError("no room")

    handle = engine.model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        assert text(engine.submit([request(engine, "x", max_new_tokens=20)])) == expected
        with pytest.raises(OSError, match="no room"):
            text(arrivals.streams[long])
    finally:
        engine.join()
        handle.remove()


def test_sampled_and_penalised_rows_go_on_as_they_were_when_others_come_and_go(
    make: Callable[..., Gemma2Engine],
    arriving: Callable[[Gemma2Engine], tuple[Forwards, Arrivals]],
) -> None:
    """Random state and penalty are the row's, not the call's."""
    engine = make()
    params = {"temperature": 1.0, "seed": 7, "repetition_penalty": 1.3, "max_new_tokens": 30}
    alone = text(engine.submit([request(engine, "tell me", **params)]))
    watch, arrivals = arriving(engine)
    for n in range(1, 20, 2):
        arrivals.at(n, f"newcomer {n} " * n, max_new_tokens=1 + n % 4, temperature=2.0)
    assert text(engine.submit([request(engine, "tell me", **params)])) == alone
    assert max(watch.rows) > 2


def test_a_full_queue_refuses_by_name(
    make: Callable[..., Gemma2Engine], forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """`max_waiting` counts those that no row is free for; a refusal changes nothing for them."""
    engine = make(max_rows=1, max_waiting=2)
    watch = forwards(engine)
    reached, release = watch.gate(1)
    running = engine.submit([request(engine, "a", max_new_tokens=2)])
    wait(reached)
    waiting = [engine.submit([request(engine, p, max_new_tokens=2)]) for p in "bc"]
    with pytest.raises(EngineBusyError, match="max_waiting=2"):
        engine.submit([request(engine, "d", max_new_tokens=2)])
    [refused] = engine.submit_each([request(engine, "d", max_new_tokens=2)])
    with pytest.raises(EngineBusyError, match="2 requests wait"):
        text(refused)
    waiting[0].cancel()
    late = engine.submit([request(engine, "e", max_new_tokens=2)])
    release.set()
    for stream, prompt in zip([running, waiting[1], late], "ace", strict=True):
        assert text(stream) == reference(engine, prompt, 2)


def test_a_batch_may_fill_the_rows_and_the_queue(make: Callable[..., Gemma2Engine]) -> None:
    """Rows that are free take what would wait otherwise, though all come at once."""
    engine = make(max_rows=3, max_waiting=2)
    streams = engine.submit_each([request(engine, p, max_new_tokens=2) for p in "abcdefg"])
    for prompt, stream in zip("abcde", streams[:5], strict=True):
        assert text(stream) == reference(engine, prompt, 2)
    for stream in streams[5:]:
        with pytest.raises(EngineBusyError, match="2 requests wait"):
            text(stream)


def test_the_cache_is_held_to_its_tokens(
    make: Callable[..., Gemma2Engine], forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """Rows wait that would not fit, and rows that outgrow the cache go back and finish later."""
    engine = make(max_cached_tokens=120)
    watch = forwards(engine)
    prompts = [f"number {n}" for n in range(5)]
    streams = engine.submit_each([request(engine, p, max_new_tokens=40) for p in prompts])
    engine.join()
    rows, length = list(watch.rows), len(engine.encode(prompts[0]))
    most = [min(5, 120 // (length + step)) for step in range(40)]
    assert rows[:40] == most
    assert most[0] == 5
    assert most[-1] == 2
    for prompt, stream in zip(prompts, streams, strict=True):
        assert text(stream) == reference(engine, prompt, 40)


def test_a_row_larger_than_the_cache_is_served_alone(make: Callable[..., Gemma2Engine]) -> None:
    engine = make(max_cached_tokens=10)
    streams = engine.submit_each([request(engine, p * 30, max_new_tokens=5) for p in "ab"])
    for prompt, stream in zip("ab", streams, strict=True):
        assert text(stream) == reference(engine, prompt * 30, 5)


def test_nobody_is_overtaken(
    make: Callable[..., Gemma2Engine], forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """A large request that waits for room is not starved by small ones that would fit."""
    engine = make(max_cached_tokens=200)
    watch = forwards(engine)
    reached, release = watch.gate(1)
    first = request(engine, "a", max_new_tokens=30)
    large = request(engine, "word " * 150, max_new_tokens=3)
    small = [request(engine, p, max_new_tokens=3) for p in "bcd"]
    streams = [engine.submit([first])]
    wait(reached)
    streams += [engine.submit([large]), *engine.submit_each(small)]
    release.set()
    engine.join()
    read = [tokens for tokens in watch.tokens if tokens > 1]
    assert read == [len(each.prompt_ids) for each in (first, large, small[0])]
    assert all(map(text, streams))


def test_a_prompt_far_longer_than_the_rest_is_not_padded_for(
    make: Callable[..., Gemma2Engine], forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """Short prompts beside a long one do not pay for its columns."""
    engine = make()
    watch = forwards(engine)
    prompts = ["a", "b", "c", "word " * 900]
    streams = engine.submit_each([request(engine, p, max_new_tokens=12) for p in prompts])
    engine.join()
    fed = sum(rows * tokens for rows, tokens in zip(watch.rows, watch.tokens, strict=True))
    assert fed < 1.2 * sum(len(engine.encode(p)) for p in prompts) + 4 * 12
    for prompt, stream in zip(prompts, streams, strict=True):
        assert text(stream) == reference(engine, prompt, 12)


@pytest.mark.parametrize("options", [{"max_rows": 0}, {"max_waiting": 0}, {"max_cached_tokens": 0}])
def test_limits_that_admit_nothing_are_refused(
    make: Callable[..., Gemma2Engine], options: dict[str, int]
) -> None:
    [(name, value)] = options.items()
    with pytest.raises(ParameterError, match=f"{name}={value}"):
        make(**options)


def test_greedy_rows_are_bare_generates(make: Callable[..., Gemma2Engine]) -> None:
    """The ids themselves, from a batch whose rows come and go."""
    engine = make(max_rows=3)
    prompts = [f"{'word ' * (n * 13 % 40)}{n}" for n in range(7)]
    streams = engine.submit_each(
        [request(engine, p, max_new_tokens=5 + n) for n, p in enumerate(prompts)]
    )
    for n, (prompt, stream) in enumerate(zip(prompts, streams, strict=True)):
        ids = greedy(engine, engine.encode(prompt), 5 + n)
        assert text(stream) == engine.tokenizer.decode(ids, skip_special_tokens=True)


def test_recurrent_layers_are_served_one_row_after_another(demo_engine: Gemma2Engine) -> None:
    """What they remember cannot be joined; each row begins with nothing of those before it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    layers = {"layer_types": ["conv", "full_attention"], "vocab_size": 4096}
    model = Lfm2ForCausalLM(Lfm2Config(**sizes, **heads, **layers, eos_token_id=1)).eval()
    with Gemma2Engine(model, demo_engine.tokenizer, name="recurrent") as engine:
        prompts = ["a", "b" * 600, "c", "d"]
        expected = [reference(engine, prompt, 4) for prompt in prompts]
        streams = engine.submit_each([request(engine, p, max_new_tokens=4) for p in prompts])
        assert [text(stream) for stream in streams] == expected


@pytest.mark.parametrize("options", [{"max_rows": 3}, {"max_cached_tokens": 90}])
def test_no_memory_to_move_rows_together_ends_none_of_them(
    make: Callable[..., Gemma2Engine], monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
) -> None:
    """When one is done or goes back to wait, the others are copied: the first time, that fails."""
    engine = make(**options)
    limits = {"a": 6, "b": 12, "c": 9, "d": 10}
    expected = {prompt: reference(engine, prompt, limit) for prompt, limit in limits.items()}
    real, left, rows = torch.Tensor.new_empty, [OSError("no memory")], [0]

    def new_empty(tensor: torch.Tensor, *shape: Any, **kwargs: Any) -> torch.Tensor:
        if len(shape) == 4:  # keys or values
            if left and shape[0] < rows[-1]:
                raise left.pop()
            rows.append(shape[0])
        return real(tensor, *shape, **kwargs)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    requests = [request(engine, p, max_new_tokens=limit) for p, limit in limits.items()]
    streams = engine.submit_each(requests)
    assert [text(stream) for stream in streams] == [*expected.values()]
    engine.join()
    assert not left


def test_a_row_cancelled_while_it_waits_for_room_leaves_at_once(
    make: Callable[..., Gemma2Engine], forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """One that went back to wait has begun, and its reader wants the verdict."""
    engine = make(max_cached_tokens=60)
    watch = forwards(engine)
    reached, release = watch.gate(40)
    ahead, back = engine.submit_each([request(engine, p, max_new_tokens=60) for p in "ab"])
    wait(reached)
    assert watch.rows[-1] == 1
    held, end = watch.gate(42)
    back.cancel()
    release.set()
    wait(held)
    back.fail(OSError("no verdict"))  # what is read instead, if it was not there before
    assert list(back)[-1].finish_reason == "cancelled"
    end.set()
    assert text(ahead) == reference(engine, "a", 60)


def test_a_log_handler_that_raises_ends_the_streams(
    make: Callable[..., Gemma2Engine], forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    class Raises(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise ValueError("the disk is full")

    engine = make()
    watch = forwards(engine)
    watch.fail_at[3] = OSError("gone")
    handler = Raises()
    log = logging.getLogger("gemma2_stream.scheduler")
    log.addHandler(handler)
    try:
        requests = [request(engine, p, max_new_tokens=6, timeout=60) for p in "abc"]
        for stream in engine.submit_each(requests):
            with pytest.raises(ValueError, match="the disk is full"):
                text(stream)
        engine.join()
    finally:
        log.removeHandler(handler)
