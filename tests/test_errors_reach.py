"""An exception inside `generate` reaches the caller unchanged, and hurts nobody else."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from either import Either, text_of
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnableLambda
from tiny import Forwards, reference
from transformers import DynamicCache, Gemma2ForCausalLM, LogitsProcessor
from waiting import wait

from gemma2_stream import Gemma2Engine, Gemma2LLM

PROMPT = "Who are you?"


class Broken(RuntimeError):
    """Raised inside the model."""


def _chain(llm: Either) -> Any:
    return RunnableLambda(str) | llm.model | StrOutputParser()


class Errors(BaseCallbackHandler):
    """Counts how runs end."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.ends = 0

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.errors.append(error)

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        self.ends += 1


async def _astream(llm: Any, config: Any) -> str:
    return "".join([text async for text in llm.astream(PROMPT, config)])


PATHS: dict[str, Callable[[Either, Any], Any]] = {
    "invoke": lambda llm, config: llm.invoke(PROMPT, config),
    "stream": lambda llm, config: "".join(llm.stream(PROMPT, config)),
    "batch": lambda llm, config: llm.batch([PROMPT], config)[0],
    "ainvoke": lambda llm, config: asyncio.run(llm.ainvoke(PROMPT, config)),
    "astream": lambda llm, config: asyncio.run(_astream(llm, config)),
    "abatch": lambda llm, config: asyncio.run(llm.abatch([PROMPT], config))[0],
    "chain.invoke": lambda llm, config: _chain(llm).invoke(PROMPT, config),
    "chain.stream": lambda llm, config: "".join(_chain(llm).stream(PROMPT, config)),
    "chain.astream": lambda llm, config: asyncio.run(_astream(_chain(llm), config)),
}
ERRORS = {
    "an error": Broken("in the model"),
    "out of memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "MemoryError": MemoryError(),
}


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize(
    ("path", "error"),
    [
        *((path, "an error") for path in PATHS),
        ("invoke", "out of memory"),
        ("astream", "MemoryError"),
    ],
)
def test_an_exception_reaches_the_caller_unchanged(
    either: Either,
    forwards: Callable[[Gemma2Engine], Forwards],
    new_caches: Callable[[], list[DynamicCache]],
    path: str,
    error: str,
    step: int,
) -> None:
    """At the first forward or in the middle: itself, with the traceback to where it was raised;
    `on_llm_error` fires once, the memory is free though the error is kept, the next is served."""
    engine, llm = either.engine, either(max_new_tokens=6)
    watch, handler = forwards(engine), Errors()
    watch.fail_at[step] = ERRORS[error]

    with pytest.raises(type(ERRORS[error])) as caught:
        PATHS[path](llm, {"callbacks": [handler]})
    engine.join()

    assert caught.value is ERRORS[error]
    frames = {frame.name for frame in traceback.extract_tb(caught.value.__traceback__)}
    assert {"generate", "_before"} <= frames
    assert handler.errors == [ERRORS[error]]
    assert handler.ends == 0
    assert not new_caches()
    assert PATHS[path](llm, None) == reference(engine, PROMPT, 6)


def test_an_exception_whose_causes_go_in_a_circle_reaches_the_caller(
    random_engine: Gemma2Engine, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """A library may set `__cause__` as it likes; the worker does not go round for ever."""
    watch = forwards(random_engine)
    watch.fail_at[1] = first = Broken("first")
    first.__cause__ = Broken("second")
    first.__cause__.__cause__ = first
    llm = Gemma2LLM(engine=random_engine, max_new_tokens=3, timeout=60)

    with pytest.raises(Broken, match="first"):
        llm.invoke(PROMPT)
    assert llm.invoke(PROMPT) == reference(random_engine, PROMPT, 3)


class Exploding(LogitsProcessor):
    """A logits processor that fails at its third step."""

    steps = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        if self.steps == 3:
            raise Broken("in a logits processor")
        return scores


class ExplodingGemma2(Gemma2ForCausalLM):
    """Gemma 2 whose own generation has an exploding logits processor in it."""

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        processors = super()._get_logits_processor(*args, **kwargs)
        processors.append(Exploding())
        return processors


def test_an_exception_in_a_logits_processor_reaches_the_caller(
    random_engine: Gemma2Engine,
) -> None:
    """What was made before it is streamed, then it is raised."""
    model = ExplodingGemma2(random_engine.model.config).eval()
    model.load_state_dict(random_engine.model.state_dict())
    with Gemma2Engine(model, random_engine.tokenizer) as engine:
        got: list[str] = []
        with pytest.raises(Broken, match="logits processor"):
            got.extend(Gemma2LLM(engine=engine, max_new_tokens=9).stream(PROMPT))
    assert "".join(got) == reference(random_engine, PROMPT, 2)


def test_requests_that_wait_behind_a_failing_one_are_served(
    either: Either, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """The failure is the failing request's alone."""
    watch = forwards(either.engine)
    reached, release = watch.gate(2)
    watch.fail_at[2] = Broken("mid")
    llm = either(max_new_tokens=5)
    expected = []

    failing = llm.stream(PROMPT)
    next(failing)
    wait(reached)
    waiting = [threading.Thread(target=lambda: expected.append(llm.invoke(PROMPT))) for _ in "abc"]
    for thread in waiting:
        thread.start()
    release.set()
    with pytest.raises(Broken):
        list(failing)
    for thread in waiting:
        thread.join()
    assert expected == [reference(either.engine, PROMPT, 5)] * 3


async def test_tasks_that_wait_behind_a_failing_one_are_served(
    either: Either, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """On the event loop too; a batch that waits is a batch that is answered."""
    watch = forwards(either.engine)
    reached, release = watch.gate(2)
    watch.fail_at[2] = error = Broken("mid")
    llm = either(max_new_tokens=5)

    failing = asyncio.create_task(llm.ainvoke(PROMPT))
    await asyncio.to_thread(wait, reached)
    waiting = [asyncio.create_task(llm.abatch([PROMPT, PROMPT])) for _ in range(2)]
    release.set()
    assert await asyncio.gather(failing, return_exceptions=True) == [error]
    answers = await asyncio.gather(*waiting)
    assert answers == [[reference(either.engine, PROMPT, 5)] * 2] * 2


def test_a_batch_that_fails_returns_its_exceptions(
    either: Either, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """`return_exceptions=True` gives the exception for each row, and every run says it once."""
    watch, handler = forwards(either.engine), Errors()
    error = Broken("mid")
    watch.fail_at = dict.fromkeys(range(2, 20), error)  # each is tried again by itself
    llm = either(max_new_tokens=5)

    config = {"callbacks": [handler]}
    assert llm.batch([PROMPT, "b"], config, return_exceptions=True) == [error, error]
    assert handler.errors == [error, error]


def test_retry_and_fallbacks_see_the_real_exception(
    either: Either, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """`with_retry` and `with_fallbacks` select by type, so the type must be the real one."""
    watch = forwards(either.engine)
    llm = either(max_new_tokens=5)
    expected = reference(either.engine, PROMPT, 5)
    at = watch.count

    watch.fail_at[at + 1] = Broken("once")
    retried = llm.with_retry(
        retry_if_exception_type=(Broken,), stop_after_attempt=2, wait_exponential_jitter=False
    )
    assert text_of(retried.invoke(PROMPT)) == expected
    watch.fail_at[watch.count + 1] = Broken("again")
    fallen = llm.with_fallbacks([llm.model], exceptions_to_handle=(Broken,))
    assert text_of(fallen.invoke(PROMPT)) == expected


def test_float16_that_overflows_is_refused_by_name(random_engine: Gemma2Engine) -> None:
    """NaN logits raise NotFiniteError with the repair; they never become text."""
    from gemma2_stream import NotFiniteError

    model = Gemma2ForCausalLM(random_engine.model.config).eval().half()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with (
        Gemma2Engine(model, random_engine.tokenizer) as engine,
        pytest.raises(NotFiniteError, match="bfloat16"),
    ):
        Gemma2LLM(engine=engine, max_new_tokens=5).invoke(PROMPT)
