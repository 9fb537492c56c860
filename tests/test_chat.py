"""What only `ChatGemma2` does: messages out, tools and shapes, and batches of single calls.

What it has in common with `Gemma2LLM` is in test_paths.py, test_llm.py, test_cancel.py and
test_errors_reach.py, for both; LangChain's own suites are in test_standard.py.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from pydantic import BaseModel
from tiny import Forwards, reference

from gemma2_stream import (
    ChatGemma2,
    Gemma2Engine,
    Gemma2LLM,
    PromptTooLongError,
)

PROMPT = "Who are you?"
QUESTIONS = [
    "你是谁",
    PROMPT,
    "How do I stream?",
    "Hello",
    "What can you do?",
    "How do I stop an answer?",
    "Thank you",
    "word " * 50,
]
N = 16


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


@tool
def weather(city: str) -> str:
    """Tell the weather in a city."""
    return f"sunny in {city}"


@tool
def clock(zone: str, seconds: bool) -> str:
    """Tell the time."""
    return f"noon in {zone}"


@pytest.fixture
def chat(demo_engine: Gemma2Engine) -> Iterator[ChatGemma2]:
    yield ChatGemma2(engine=demo_engine, max_new_tokens=N)
    demo_engine.join()


@pytest.fixture
def watch(chat: ChatGemma2, forwards: Callable[[Gemma2Engine], Forwards]) -> Forwards:
    return forwards(chat.engine)


class Stopped(Exception):
    """What a handler raises to stop an answer."""


class Stops(BaseCallbackHandler):
    """Raises at the second token."""

    raise_error = True
    run_inline = True

    def __init__(self) -> None:
        self.seen = 0

    def on_llm_new_token(self, token: str, **_: Any) -> None:
        self.seen += 1
        if self.seen == 2:
            raise Stopped


class Ends(BaseCallbackHandler):
    """How each run ended."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.results: list[Any] = []

    def on_llm_error(self, error: BaseException, **_: Any) -> None:
        self.errors.append(error)

    def on_llm_end(self, response: Any, **_: Any) -> None:
        self.results.append(response)


def _wait(event: threading.Event) -> None:
    assert event.wait(30)


# Batches -----------------------------------------------------------------------------------------


def _asked(question: str) -> dict[str, str]:
    return {"q": question}


@pytest.mark.parametrize("path", ["batch", "abatch", "chain.batch", "chain.abatch"])
def test_a_batch_of_conversations_shares_its_forwards(
    chat: ChatGemma2, watch: Forwards, path: str
) -> None:
    """At most the longest row's steps and the prefill, in a chain too; each row is itself."""
    prompt = ChatPromptTemplate.from_messages([("user", "{q}")])
    runnable: Any = prompt | chat | StrOutputParser() if "chain" in path else chat
    asked: list[Any] = [*map(_asked, QUESTIONS)] if "chain" in path else QUESTIONS
    if path.endswith("abatch"):
        answers = asyncio.run(runnable.abatch(asked))
    else:
        answers = runnable.batch(asked)
    chat.engine.join()
    assert watch.count <= N + 1
    texts = [answer if isinstance(answer, str) else answer.text for answer in answers]
    assert texts == [reference(chat.engine, question, N) for question in QUESTIONS]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("include_raw", [False, True])
def test_a_batch_of_structured_answers_shares_its_forwards(
    chat: ChatGemma2, watch: Forwards, include_raw: bool, method: Any
) -> None:
    """Held to a grammar, by either method, with or without the message beside the object."""
    limit = 90
    asked = chat.model_copy(update={"max_new_tokens": limit})
    shaped = asked.with_structured_output(Person, method=method, include_raw=include_raw)
    answers = shaped.batch(QUESTIONS[:4])
    chat.engine.join()
    assert watch.count <= limit + 1
    assert asyncio.run(shaped.abatch(QUESTIONS[:4]))[1] is not None
    people = [answer["parsed"] if include_raw else answer for answer in answers]
    assert all(isinstance(person, Person) for person in people)


@pytest.mark.parametrize("path", ["batch", "abatch"])
def test_a_refused_prompt_is_its_own_rows_error(
    chat: ChatGemma2, watch: Forwards, path: str
) -> None:
    """With `return_exceptions` the others are answered, and still together."""
    asked = [*QUESTIONS[:3], "y x " * chat.engine.context_length, *QUESTIONS[3:]]
    answers = _batch(chat, path, asked, return_exceptions=True)
    chat.engine.join()
    assert watch.count <= N + 1
    assert isinstance(answers.pop(3), PromptTooLongError)
    assert [a.text for a in answers] == [reference(chat.engine, q, N) for q in QUESTIONS]
    watch.count = 0
    with pytest.raises(PromptTooLongError):
        _batch(chat, path, asked)
    chat.engine.join()
    assert watch.count <= 1


def _batch(chat: Any, path: str, asked: Any, config: Any = None, **kwargs: Any) -> list[Any]:
    if path == "abatch":
        answers: list[Any] = asyncio.run(chat.abatch(asked, config, **kwargs))
        return answers
    return list(chat.batch(asked, config, **kwargs))


@pytest.mark.parametrize("path", ["batch", "abatch"])
def test_max_concurrency_is_the_number_of_rows(
    chat: ChatGemma2, watch: Forwards, path: str
) -> None:
    """Three at a time is three groups for eight, of three, three and two rows."""
    rows: list[int] = []
    handle = chat.engine.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    answers = _batch(chat.bind(max_tokens=1), path, QUESTIONS, {"max_concurrency": 3})
    chat.engine.join()
    handle.remove()
    assert rows == [3, 3, 2]
    assert [a.text for a in answers] == [reference(chat.engine, q, 1) for q in QUESTIONS]


@pytest.mark.parametrize("path", ["batch", "abatch"])
def test_more_inputs_than_one_forward_takes_are_all_answered(
    chat: ChatGemma2, watch: Forwards, path: str
) -> None:
    """Forty are two groups; none are none."""
    asked = [f"number {n}" for n in range(40)]
    answers = _batch(chat.bind(max_tokens=2), path, asked)
    chat.engine.join()
    assert watch.count <= 2 * 2
    assert [a.text for a in answers] == [chat.invoke(q, max_tokens=2).text for q in asked]
    assert _batch(chat, path, []) == []


@pytest.mark.parametrize("path", ["batch", "abatch"])
def test_what_is_in_the_cache_is_not_asked_again(
    chat: ChatGemma2, watch: Forwards, path: str
) -> None:
    """Hits leave the batch, wherever they stand; a batch of hits makes no forward."""
    cached = chat.model_copy(update={"cache": InMemoryCache()})
    hits, misses = QUESTIONS[::2], QUESTIONS[1::2]
    _batch(cached, path, hits)
    watch.count = 0
    answers = _batch(cached, path, QUESTIONS)
    chat.engine.join()
    assert watch.count <= N + 1
    assert [a.text for a in answers] == [reference(chat.engine, q, N) for q in QUESTIONS]
    watch.count = 0
    assert _batch(cached, path, hits + misses)[0].text == answers[0].text
    assert watch.count == 0


@pytest.mark.parametrize("path", ["batch", "abatch"])
@pytest.mark.parametrize("row", [0, 2])
def test_a_handler_that_raises_ends_the_batch_and_caches_nothing(
    chat: ChatGemma2, watch: Forwards, path: str, row: int
) -> None:
    """The others' answers nobody will see: they end as errors, never as short answers."""
    ends, cache = Ends(), InMemoryCache()
    cached = chat.model_copy(update={"cache": cache})
    configs: list[Any] = [{"callbacks": [ends]} for _ in range(3)]
    configs[row] = {"callbacks": [Stops()]}
    reached, release = watch.gate(8)
    release.set()
    with pytest.raises(Stopped):
        _batch(cached, path, QUESTIONS[1:4], configs)
    chat.engine.join()
    assert not reached.is_set() or watch.count < N
    assert cache._cache == {}
    assert ends.results == []
    if path == "batch":  # langchain-core tells no handler of a cancelled `ainvoke`
        assert [type(error) for error in ends.errors] == [Stopped] * 2
    assert cached.invoke(PROMPT).text == reference(chat.engine, PROMPT, N)


class Refuses(BaseCallbackHandler):
    """Raises before the model is asked."""

    raise_error = True
    run_inline = True

    def on_chat_model_start(self, *_: Any, **__: Any) -> None:
        raise Stopped


@pytest.mark.parametrize("path", ["batch", "abatch"])
def test_who_fails_before_asking_keeps_nobody_waiting(
    chat: ChatGemma2, watch: Forwards, path: str
) -> None:
    """The others are answered with `return_exceptions`, and not computed for nothing without."""
    configs: list[Any] = [{}, {"callbacks": [Refuses()]}, {}]
    first, failed, last = _batch(chat, path, QUESTIONS[1:4], configs, return_exceptions=True)
    assert isinstance(failed, Stopped)
    assert [first.text, last.text] == [reference(chat.engine, QUESTIONS[n], N) for n in (1, 3)]
    chat.engine.join()
    watch.count = 0
    with pytest.raises(Stopped):
        _batch(chat, path, QUESTIONS[1:4], configs)
    chat.engine.join()
    assert watch.count <= 1


def test_an_interrupt_in_a_batch_stops_the_model(chat: ChatGemma2, watch: Forwards) -> None:
    """Ctrl-C is raised in the main thread, which waits for the others: they are to end too."""
    reached, release = watch.gate(3)

    class LastError(Ends):
        def on_llm_error(self, error: BaseException, **_: Any) -> None:
            super().on_llm_error(error)
            if len(self.errors) == len(QUESTIONS):
                release.set()

    ends = LastError()
    me = threading.get_ident()
    sender = threading.Thread(
        target=lambda: (_wait(reached), signal.pthread_kill(me, signal.SIGINT))
    )
    sender.start()
    with pytest.raises(KeyboardInterrupt):
        chat.batch(QUESTIONS, {"callbacks": [ends]}, max_tokens=400)
    sender.join(30)
    chat.engine.join()
    assert {type(error) for error in ends.errors} == {KeyboardInterrupt}
    assert watch.count <= 4


async def test_a_cancelled_abatch_stops_the_model(chat: ChatGemma2, watch: Forwards) -> None:
    """Cancelled in the fourth forward, it makes at most one more, and no run ends as if whole."""
    reached, release = watch.gate(4)
    ends = Ends()
    task = asyncio.create_task(chat.abatch(QUESTIONS, {"callbacks": [ends]}))
    await asyncio.to_thread(_wait, reached)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    release.set()
    await asyncio.to_thread(chat.engine.join)
    assert watch.count <= 5
    assert ends.results == []


def test_two_batches_and_other_callers_at_once_are_all_served(chat: ChatGemma2) -> None:
    """Batches in two threads, one on an event loop, and single calls of both models between."""
    llm = Gemma2LLM(engine=chat.engine, max_new_tokens=N)
    expected = [reference(chat.engine, question, N) for question in QUESTIONS]
    with ThreadPoolExecutor(6) as pool:
        batches = [pool.submit(chat.batch, QUESTIONS) for _ in range(2)]
        batches.append(pool.submit(lambda: asyncio.run(chat.abatch(QUESTIONS))))
        single = [pool.submit(model.invoke, PROMPT) for model in (llm, chat) * 2]
    for batch in batches:
        assert [answer.text for answer in batch.result()] == expected
    for one in single:
        answer = one.result()
        assert (answer if isinstance(answer, str) else answer.text) == expected[1]


def test_an_engine_error_in_a_batch_is_every_rows_error(chat: ChatGemma2, watch: Forwards) -> None:
    """Constrained rows and free ones: the error itself, once a run, and the next is served."""
    shaped = chat.bind(response_format={"type": "json_object"}, max_tokens=12)
    for runnable in (chat, shaped):
        for path in ("batch", "abatch"):
            ends, error = Ends(), RuntimeError("in the model")
            chat.engine.join()
            watch.fail_at = {watch.count + 3: error}
            answers = _batch(
                runnable, path, QUESTIONS[:3], {"callbacks": [ends]}, return_exceptions=True
            )
            assert answers == [error] * 3
            assert ends.errors == [error] * 3
    assert chat.invoke(PROMPT).text == reference(chat.engine, PROMPT, N)
