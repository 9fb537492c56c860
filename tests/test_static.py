"""One place for keys and values, which `generate` compiles for: all that shows without a GPU."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DEMO, Forwards, random_gemma, reference
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, Gemma2ForCausalLM
from waiting import wait

from gemma2_stream import Gemma2Engine, ParameterError, Request, SamplingParams, TokenStream
from gemma2_stream.attention import prefer_grouped
from gemma2_stream.batch import PREFILL_CHUNK

SHORT = "Who are you?"
BEYOND = "word " * 100  # of the random weights' sliding window, 64
CONTEXT = 2_048
CHUNKS = "and so on " * (PREFILL_CHUNK // 2)


@pytest.fixture
def static(engine: Gemma2Engine) -> Iterator[Gemma2Engine]:
    # Every step looks at the whole place; 8,192 columns would take minutes.
    model = copy.deepcopy(engine.model)
    model.config.max_position_embeddings = CONTEXT
    with Gemma2Engine(model, engine.tokenizer, name="static", static_cache=True) as made:
        yield made


def submit(engine: Gemma2Engine, prompt: str, **params: Any) -> TokenStream:
    return engine.submit([Request(tuple(engine.encode(prompt)), SamplingParams(**params))])


def text(stream: TokenStream) -> str:
    return "".join(chunk.text for chunk in stream)


@pytest.mark.parametrize("prompt", [SHORT, BEYOND, CHUNKS])
def test_it_says_what_generate_says(static: Gemma2Engine, prompt: str) -> None:
    expected = reference(static, prompt, 80)
    assert text(submit(static, prompt, max_new_tokens=80)) == expected


def test_one_request_leaves_nothing_to_the_next(static: Gemma2Engine) -> None:
    """Nor takes anything from the one before, which says the same."""
    for prompt in (BEYOND, SHORT, CHUNKS, SHORT, SHORT):
        *_, last = submit(static, prompt, max_new_tokens=20)
        assert last.usage is not None
        assert last.usage.cached_tokens == 0
        expected = reference(static, prompt, 20)
        assert text(submit(static, prompt, max_new_tokens=20)) == expected


def test_its_place_in_memory_stays(static: Gemma2Engine) -> None:
    """Or what was recorded for it would be recorded anew; and its end is the engine's."""
    places = set()
    for prompt in (SHORT, CHUNKS, BEYOND):
        text(submit(static, prompt, max_new_tokens=3))
        static.join()
        assert static._cache is not None
        places.add(tuple(layer.keys.data_ptr() for layer in static._cache.layers))
        assert not any(layer.get_seq_length() for layer in static._cache.layers)
    assert len(places) == 1
    cache = weakref.ref(static._cache.layers[0])
    static.close()
    assert cache() is None


class Counted(Gemma2ForCausalLM):
    """Gemma 2 that counts its answers."""

    calls = 0

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().generate(*args, **kwargs)


def test_one_after_the_other(
    gemma_tokenizer: Any, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """Whoever comes waits for the end, and does not interrupt: the first step after that would be
    one that is not compiled.
    """
    model = random_gemma(Counted)
    with Gemma2Engine(model, gemma_tokenizer, name="counted", static_cache=True) as engine:
        expected = {prompt: reference(engine, prompt, 10) for prompt in (SHORT, BEYOND)}
        model.calls = 0
        watch = forwards(engine)
        reached, release = watch.gate(3)
        first = submit(engine, SHORT, max_new_tokens=10)
        wait(reached)
        second = submit(engine, BEYOND, max_new_tokens=10)
        release.set()
        assert text(second) == expected[BEYOND]
        assert text(first) == expected[SHORT]
        engine.join()
    assert set(watch.rows) == {1}
    assert model.calls == 2


@pytest.mark.parametrize("at", [1, 5], ids=["prefill", "decode"])
@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_after_one_that_ended_early(
    static: Gemma2Engine, forwards: Callable[[Gemma2Engine], Forwards], at: int, end: str
) -> None:
    expected = reference(static, SHORT, 20)
    watch = forwards(static)
    reached, release = watch.gate(at)
    if end == "failed":
        watch.fail_at[at] = RuntimeError("the forward broke")
    prompt = CHUNKS if at == 1 else SHORT
    stream = submit(static, prompt, max_new_tokens=50)
    wait(reached)
    if end == "cancelled":
        stream.cancel()
        release.set()
        *_, last = stream
        assert last.finish_reason == "cancelled"
    else:
        release.set()
        with pytest.raises(RuntimeError, match="the forward broke"):
            text(stream)
    assert text(submit(static, SHORT, max_new_tokens=20)) == expected


def test_stops_limits_and_seeds(static: Gemma2Engine, engine: Gemma2Engine) -> None:
    """As in an engine where all else is as usual."""
    whole = text(submit(static, SHORT, max_new_tokens=30))
    stop = whole[len(whole) // 2 :][:3]
    for params in ({"stop": (stop,)}, {"max_new_tokens": 7}, {"temperature": 1.0, "seed": 3}):
        ours, usual = (
            [*submit(each, SHORT, **{"max_new_tokens": 30, **params})] for each in (static, engine)
        )
        assert "".join(c.text for c in ours) == "".join(c.text for c in usual)
        assert ours[-1].finish_reason == usual[-1].finish_reason
        assert ours[-1].stop == usual[-1].stop


def test_an_answer_up_to_the_end_of_the_context(gemma_tokenizer: Any) -> None:
    """There is room for each token, and no more."""
    model = random_gemma()
    model.config.max_position_embeddings = 100
    with Gemma2Engine(model, gemma_tokenizer, name="narrow", static_cache=True) as engine:
        expected = reference(engine, SHORT, 100 - len(engine.encode(SHORT)))
        *chunks, last = submit(engine, SHORT)
        assert "".join(chunk.text for chunk in [*chunks, last]) == expected
        assert last.finish_reason == "length"


@pytest.fixture
def compiling() -> Iterator[Gemma2ForCausalLM]:
    """A model for which `generate` may compile on a CPU, by transformers' own switch for tests: all
    of it in one graph.
    """
    model = random_gemma()
    model.config.max_position_embeddings = CONTEXT
    prefer_grouped(model)
    config = CompileConfig(fullgraph=True, mode="default", backend="eager")
    config._compile_all_devices = True  # type: ignore[assignment]  # untyped in transformers
    model.generation_config.compile_config = config
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield model
    torch._dynamo.reset()


def test_all_is_compiled_before_anyone_waits(
    gemma_tokenizer: Any, compiling: Gemma2ForCausalLM
) -> None:
    """No answer compiles: short or long, whichever comes first, across the window and beyond."""
    compiled = torch._dynamo.utils.counters["stats"]
    with Gemma2Engine(compiling, gemma_tokenizer, name="compiled", static_cache=True) as engine:
        graphs = compiled["unique_graphs"]
        assert graphs > 0
        across = text(submit(engine, SHORT, max_new_tokens=80))
        said = text(submit(engine, BEYOND, max_new_tokens=10))
        for prompt in ("Something else?", CHUNKS):
            text(submit(engine, prompt, max_new_tokens=10))
        lone = engine.submit([Request((2,), SamplingParams(max_new_tokens=10))])
        text(lone)
        assert compiled["unique_graphs"] == graphs
        assert text(submit(engine, BEYOND, max_new_tokens=10)) == said
    with Gemma2Engine(compiling, gemma_tokenizer, name="usual") as engine:
        assert text(submit(engine, BEYOND, max_new_tokens=10)) == said
        assert text(submit(engine, SHORT, max_new_tokens=80)) == across


def test_what_cannot_be_compiled_is_refused(
    gemma_tokenizer: Any, compiling: Gemma2ForCausalLM
) -> None:
    """As where there is no C compiler: with the reason and the repair, and no thread is left."""

    def no_compiler(*_: object) -> None:
        raise RuntimeError("no C compiler was found")

    compiling.generation_config.compile_config.backend = no_compiler
    threads = set(threading.enumerate())
    with pytest.raises(ParameterError, match=r"no C compiler was found.*leave it out"):
        Gemma2Engine(compiling, gemma_tokenizer, name="compiled", static_cache=True)
    assert not {t for t in threading.enumerate() if t.name == "gemma2_stream"} - threads


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_rows", 2),
        ("max_cached_tokens", 1000),
        ("prefix_cache_bytes", 1),
        ("prompt_lookup_num_tokens", 10),
        ("assistant", "model"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    demo_engine: Gemma2Engine, option: str, value: Any
) -> None:
    model, tokenizer = demo_engine.model, demo_engine.tokenizer
    options = {option: model if value == "model" else value}
    with pytest.raises(ParameterError, match=rf"{option}=.*leave out one of the two"):
        Gemma2Engine(model, tokenizer, static_cache=True, **options)


def test_what_changes_nothing_is_not(demo_engine: Gemma2Engine) -> None:
    options = {"max_rows": 1, "prefix_cache_bytes": 0, "max_waiting": 3}
    model, tokenizer = demo_engine.model, demo_engine.tokenizer
    with Gemma2Engine(model, tokenizer, static_cache=True, **options) as engine:
        text(submit(engine, SHORT, max_new_tokens=2))


def test_weights_that_do_not_fit_on_the_gpu_are_refused(tmp_path: Path) -> None:
    """`generate` would compile nothing, and not say so."""
    model = AutoModelForCausalLM.from_pretrained(
        DEMO, device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tmp_path
    )
    tokenizer = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
    with pytest.raises(ParameterError, match=r"cpu, disk.*leave out static_cache"):
        Gemma2Engine(model, tokenizer, static_cache=True)
