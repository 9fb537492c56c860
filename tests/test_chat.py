"""What only `ChatGemma2` does: messages out, tools and shapes, and batches of single calls.

What it has in common with `Gemma2LLM` is in test_paths.py, test_llm.py, test_cancel.py and
test_errors_reach.py, for both; LangChain's own suites are in test_standard.py.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel
from tiny import Forwards, abandoned, reference
from waiting import press_ctrl_c, wait

from gemma2_stream import (
    ChatGemma2,
    Gemma2Engine,
    Gemma2LLM,
    PromptTooLongError,
    Request,
    StructuredOutputError,
    TokenStream,
)
from gemma2_stream.chat import _Call

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
    # The schema that their prompts begin with is read once, for the first; a step later they join.
    assert watch.count <= limit + 2
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
    last = watch.count
    with watch.held(last + 1), pytest.raises(PromptTooLongError):
        _batch(chat, path, asked)
    chat.engine.join()
    assert watch.count <= last + 1


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
    with watch.held(8), pytest.raises(Stopped):
        _batch(cached, path, QUESTIONS[1:4], configs)
    chat.engine.join()
    assert watch.count <= 8
    assert cache._cache == {}
    assert ends.results == []
    if path == "batch":  # langchain-core tells no handler of a cancelled `ainvoke`
        assert [type(error) for error in ends.errors] == [Stopped] * 2
    assert cached.invoke(PROMPT).text == reference(chat.engine, PROMPT, N)


async def test_an_abatch_that_failed_leaves_no_task_at_work(
    chat: ChatGemma2, watch: Forwards
) -> None:
    """On a loop that goes on: the others are cancelled, and the model stops."""
    configs: list[Any] = [{}, {"callbacks": [Stops()]}, {}]
    with watch.held(8):
        with pytest.raises(Stopped):
            await chat.abatch(QUESTIONS[1:4], configs, max_tokens=400, stop=["never said"])
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.to_thread(abandoned, chat.engine)
    await asyncio.to_thread(chat.engine.join)
    assert watch.count <= 8


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
    first, failed, other = _batch(chat, path, QUESTIONS[1:4], configs, return_exceptions=True)
    assert isinstance(failed, Stopped)
    assert [first.text, other.text] == [reference(chat.engine, QUESTIONS[n], N) for n in (1, 3)]
    chat.engine.join()
    last = watch.count
    with watch.held(last + 1), pytest.raises(Stopped):
        _batch(chat, path, QUESTIONS[1:4], configs)
    chat.engine.join()
    assert watch.count <= last + 1


def test_an_interrupt_in_a_batch_stops_the_model(chat: ChatGemma2, watch: Forwards) -> None:
    """Ctrl-C is raised in the main thread, which waits for the others: they are to end too."""
    reached, release = watch.gate(3)

    class LastError(Ends):
        def on_llm_error(self, error: BaseException, **_: Any) -> None:
            super().on_llm_error(error)
            if len(self.errors) == len(QUESTIONS):
                release.set()

    ends = LastError()
    sender = threading.Thread(target=lambda: (wait(reached), press_ctrl_c(seen=release)))
    sender.start()
    with pytest.raises(KeyboardInterrupt):
        chat.batch(QUESTIONS, {"callbacks": [ends]}, max_tokens=400)
    sender.join()
    chat.engine.join()
    assert {type(error) for error in ends.errors} == {KeyboardInterrupt}
    assert watch.count <= 4


async def test_a_cancelled_abatch_stops_the_model(chat: ChatGemma2, watch: Forwards) -> None:
    """Cancelled in the fourth forward, it makes at most one more, and no run ends as if whole."""
    reached, release = watch.gate(4)
    ends = Ends()
    task = asyncio.create_task(chat.abatch(QUESTIONS, {"callbacks": [ends]}))
    await asyncio.to_thread(wait, reached)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(abandoned, chat.engine)
    release.set()
    await asyncio.to_thread(chat.engine.join)
    assert watch.count <= 5
    assert ends.results == []


async def test_a_task_cancelled_before_it_has_its_stream_stops_the_model(
    chat: ChatGemma2, watch: Forwards
) -> None:
    """Though somebody keeps the traceback, and all that is in there."""
    engine, loop = chat.engine, asyncio.get_running_loop()

    class Cancelling:
        """The engine, but for a batch that is cancelled while it is submitted."""

        name, defaults, encode = engine.name, engine.defaults, engine.encode
        tokenize, submit, close = engine.tokenize, engine.submit, engine.close

        def submit_each(self, requests: Sequence[Request]) -> list[TokenStream]:
            streams = engine.submit_each(requests)
            loop.call_soon_threadsafe(task.cancel)
            return streams

    with watch.held(1):
        cancelling = ChatGemma2(engine=Cancelling(), max_new_tokens=N)
        task = asyncio.create_task(cancelling.abatch(QUESTIONS[:3]))
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        await asyncio.to_thread(abandoned, engine)
    await asyncio.to_thread(engine.join)
    assert watch.count <= 1
    assert caught  # until here


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
            # Each is tried again by itself, and fails again.
            watch.fail_at = dict.fromkeys(range(watch.count + 3, watch.count + 30), error)
            answers = _batch(
                runnable, path, QUESTIONS[:3], {"callbacks": [ends]}, return_exceptions=True
            )
            assert answers == [error] * 3
            assert ends.errors == [error] * 3
            watch.fail_at.clear()
    assert chat.invoke(PROMPT).text == reference(chat.engine, PROMPT, N)


# What an answer says ------------------------------------------------------------------------------


def test_a_message_says_what_it_cost_and_why_it_ended(chat: ChatGemma2) -> None:
    """Usage with cached tokens, reason, names and an id; streamed, on the last chunk alone."""
    chat.engine.join()
    chat.engine.prefixes.clear()
    answer = chat.invoke(PROMPT, max_tokens=3)
    asked = len(chat.engine.encode(PROMPT))
    usage = {"input_tokens": asked, "output_tokens": 3, "total_tokens": asked + 3}
    assert answer.usage_metadata == {**usage, "input_token_details": {"cache_read": 0}}
    said = answer.response_metadata
    assert said["finish_reason"] == "length"
    assert said["model_name"] == chat.engine.name
    assert said["model_provider"] == "gemma2_stream"
    assert answer.id is not None
    assert answer.content_blocks == [{"type": "text", "text": answer.text}]

    chunks = list(chat.stream(PROMPT, max_tokens=3))
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert [chunk.chunk_position for chunk in chunks] == [None] * (len(chunks) - 1) + ["last"]
    assert all(chunk.usage_metadata is None for chunk in chunks[:-1])
    assert not any("finish_reason" in chunk.response_metadata for chunk in chunks[:-1])
    total = sum(chunks[1:], chunks[0])
    usage["input_token_details"] = {"cache_read": asked - 1}  # of a prompt that it has just read
    assert (total.text, total.usage_metadata) == (answer.text, usage)
    assert total.response_metadata["finish_reason"] == "length"
    assert total.response_metadata["model_provider"] == "gemma2_stream"


def test_either_output_version_holds_the_same_text(chat: ChatGemma2) -> None:
    """v0 is a string, v1 a text block; invoked and streamed."""
    blocks = chat.model_copy(update={"output_version": "v1"})
    text = chat.invoke(PROMPT).content
    assert isinstance(text, str)
    assert blocks.invoke(PROMPT).content == [{"type": "text", "text": text}]
    first, *others = blocks.stream(PROMPT)
    total = sum(others, first)
    assert [block["text"] for block in total.content_blocks] == [text]


@pytest.mark.filterwarnings("ignore:.*is in beta")
@pytest.mark.parametrize("version", ["v2", "v3"])
async def test_events_hold_the_whole_answer(chat: ChatGemma2, version: Any) -> None:
    """Of a stream on an event loop, in both versions of LangChain's events."""
    expected = reference(chat.engine, PROMPT, N)
    if version == "v3":
        stream = await chat.astream_events(PROMPT, version="v3")
        assert "".join([text async for text in stream.text]) == expected
        assert "".join(chat.stream_events(PROMPT, version="v3").text) == expected
        return
    events = [event async for event in chat.astream_events(PROMPT, version="v2")]
    streamed = [e["data"]["chunk"].text for e in events if e["event"] == "on_chat_model_stream"]
    assert "".join(streamed) == expected
    assert len(streamed) > 3


async def test_a_model_that_is_invoked_in_a_node_streams_to_events(chat: ChatGemma2) -> None:
    """Also after `configurable_fields`, for which LangChain makes the model anew."""
    configurable = chat.configurable_fields(max_new_tokens=ConfigurableField(id="length"))
    for model in (chat, configurable.with_config(configurable={"length": N + 1})):

        async def node(question: str, model: Any = model) -> str:
            return (await model.ainvoke(question)).text

        events = [e async for e in RunnableLambda(node).astream_events(PROMPT, version="v2")]
        streamed = [e for e in events if e["event"] == "on_chat_model_stream"]
        assert len(streamed) > 3


def test_disabled_streaming_is_one_chunk(chat: ChatGemma2) -> None:
    """Always, or only where tools are given."""
    off = chat.model_copy(update={"disable_streaming": True})
    with_tools = chat.model_copy(update={"disable_streaming": "tool_calling"})
    assert len([c for c in off.stream(PROMPT) if c.text]) == 1
    assert len([*with_tools.stream(PROMPT)]) > 3
    assert len([c for c in with_tools.bind_tools([weather]).stream(PROMPT) if c.text]) <= 1


def test_the_profile_says_what_the_model_can_do(chat: ChatGemma2) -> None:
    """Its context too, where it is known unloaded."""
    for model in (chat, ChatGemma2("google/gemma-2-9b-it"), ChatGemma2("demo")):
        assert model.profile is not None
        assert model.profile["max_input_tokens"] == 8191
        assert model.profile["structured_output"]
        assert not model.profile["image_inputs"]
    assert "max_input_tokens" not in (ChatGemma2("me/mine").profile or {})


def test_the_environment_names_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the constructor does not."""
    monkeypatch.setenv("GEMMA2_STREAM_MODEL", "me/mine")
    assert ChatGemma2().model == Gemma2LLM().model == "me/mine"
    assert ChatGemma2("demo").model == "demo"


def test_a_call_may_name_another_model(chat: ChatGemma2) -> None:
    """Its weights answer, it is what the answer and the traces are labelled with."""
    answer = chat.invoke(PROMPT, model="demo", max_tokens=3)
    assert answer.response_metadata["model_name"] == "demo"
    assert chat._get_ls_params(model="demo")["ls_model_name"] == "demo"
    assert chat.model == chat.engine.name


def test_a_rate_limiter_is_asked_once_a_call(chat: ChatGemma2) -> None:
    """In a batch as well, and it holds nobody up for ever."""

    class Counting(InMemoryRateLimiter):
        asked = 0

        def acquire(self, *, blocking: bool = True) -> bool:
            self.asked += 1
            return True

    limiter = Counting()
    limited = chat.model_copy(update={"rate_limiter": limiter})
    limited.invoke(PROMPT, max_tokens=1)
    limited.batch(QUESTIONS, max_tokens=1)
    assert limiter.asked == 1 + len(QUESTIONS)


@pytest.mark.parametrize(
    "change",
    [
        {"tools": [weather]},
        {"tools": [weather, clock]},
        {"tools": [weather], "tool_choice": "any"},
        {"tools": [weather], "parallel_tool_calls": False},
        {"response_format": {"type": "json_object"}},
        {"model": "demo"},
    ],
    ids=lambda change: "-".join(change),
)
def test_what_a_call_asks_for_is_in_the_cache_key(chat: ChatGemma2, change: Any) -> None:
    """Tools, how to call them, and the shape of the answer: each its own entry, found again."""
    cache = InMemoryCache()
    cached = chat.model_copy(update={"cache": cache, "max_new_tokens": 4})
    tools = change.get("tools", ())
    asked = cached.bind(**{**change, "tools": [convert_to_openai_tool(t) for t in tools]})
    cached.invoke(PROMPT)
    first = asked.invoke(PROMPT)
    assert len(cache._cache) == 2
    assert asked.invoke(PROMPT).content == first.content
    assert len(cache._cache) == 2


# Rows that a grammar holds ------------------------------------------------------------------------

SHAPE: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "Person", "schema": {}}}
SHAPE["json_schema"]["schema"] = Person.model_json_schema()
FORCED = {"tools": [convert_to_openai_tool(clock)], "tool_choice": "any"}


@pytest.mark.parametrize("asked", [{"response_format": SHAPE}, FORCED], ids=["shape", "call"])
def test_a_seed_means_the_same_constrained_answer_alone_and_in_a_batch(
    chat: ChatGemma2, asked: dict[str, Any]
) -> None:
    """Another seed, another answer; each whole within its limit."""
    hot = chat.bind(**asked, temperature=2.0, max_tokens=80, seed=0)

    def said(answer: Any) -> Any:
        return [c["args"] for c in answer.tool_calls] or json.loads(answer.text)

    alone = said(hot.invoke(PROMPT))
    assert said(hot.invoke(PROMPT)) == alone
    assert said(hot.batch([QUESTIONS[2], PROMPT, "x"])[1]) == alone
    assert said(asyncio.run(hot.abatch([PROMPT, "x"]))[0]) == alone
    assert said(hot.bind(seed=1).invoke(PROMPT)) != alone


def test_a_constrained_row_beside_free_ones_changes_neither(chat: ChatGemma2) -> None:
    """In one group of forwards, each row is what it is alone."""
    shaped = chat._with({"max_tokens": 60})
    call = _Call(shaped, [HumanMessage(PROMPT)], None, {"response_format": SHAPE})
    (held,) = call.model._requests([call.turns], raw=False, grammar=call.grammar)
    (free,) = chat._requests([QUESTIONS[2]], raw=False, grammar=None)
    streams = chat.engine.submit_each([free, held, free])
    texts = ["".join(chunk.text for chunk in stream) for stream in streams]
    assert texts[0] == texts[2] == reference(chat.engine, QUESTIONS[2], N)
    assert texts[1] == shaped.invoke(PROMPT, response_format=SHAPE).text
    assert Person.model_validate_json(texts[1])


@pytest.mark.parametrize("how", ["close", "task"])
async def test_a_constrained_answer_is_cancelled_as_any_other(
    chat: ChatGemma2, watch: Forwards, how: str
) -> None:
    """At most one further forward."""
    shaped = chat.bind(response_format=SHAPE, max_tokens=300)
    reached, release = watch.gate(5)
    if how == "close":
        stream = shaped.stream(PROMPT)
        next(stream)
        wait(reached)
        stream.close()  # type: ignore[attr-defined]  # it is a generator
    else:
        task = asyncio.create_task(shaped.ainvoke(PROMPT))
        await asyncio.to_thread(wait, reached)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await asyncio.to_thread(abandoned, chat.engine)
    release.set()
    await asyncio.to_thread(chat.engine.join)
    assert watch.count <= 6
    assert chat.invoke(PROMPT).text == reference(chat.engine, PROMPT, N)


@pytest.mark.parametrize("include_raw", [False, True])
def test_a_stop_inside_a_structured_answer_ends_it_and_the_parser_says_so(
    chat: ChatGemma2, include_raw: bool
) -> None:
    """The stop is named, with what came before it; raised, or handed over beside the message."""
    stopping = chat.model_copy(update={"stop": ["age"], "max_new_tokens": 60})
    shaped = stopping.with_structured_output(Person, include_raw=include_raw)
    if include_raw:
        answer = shaped.invoke(PROMPT)
        assert answer["raw"].response_metadata["matched_stop"] == "age"
        assert answer["parsed"] is None
        error = answer["parsing_error"]
    else:
        with pytest.raises(StructuredOutputError) as caught:
            shaped.invoke(PROMPT)
        error = caught.value
    assert "stop='age'" in str(error)


class Link(BaseModel):
    """A link of a chain."""

    next: Link | None


def test_a_tool_whose_arguments_recur_keeps_its_schema(chat: ChatGemma2) -> None:
    """LangChain would put "anything" where a type refers to itself."""
    bound: Any = chat.bind_tools([Link], tool_choice="any")
    parameters = bound.kwargs["tools"][0]["function"]["parameters"]
    assert "$ref" in str(parameters["$defs"]["Link"])
    longer = chat.model_copy(update={"max_new_tokens": 60})
    answer = longer.bind_tools([Link], tool_choice="any").invoke(PROMPT)
    assert Link(**answer.tool_calls[0]["args"])


def test_a_call_that_a_stop_cuts_is_not_called_one(chat: ChatGemma2) -> None:
    """It is invalid, streamed or not, and the reason is the stop's, not "tool_calls"."""
    forced = chat.model_copy(update={"max_new_tokens": 60}).bind_tools([Person], tool_choice="any")
    first, *others = forced.stream(PROMPT, stop=["age"])
    for answer in (forced.invoke(PROMPT, stop=["age"]), first + others):
        assert (len(answer.tool_calls), len(answer.invalid_tool_calls)) == (0, 1)
        assert answer.response_metadata["finish_reason"] == "stop"
        assert answer.response_metadata["matched_stop"] == "age"


def test_a_structured_answer_streams_beside_its_raw_message(chat: ChatGemma2) -> None:
    """With `include_raw` the message grows chunk by chunk, and the object comes with its end."""
    longer = chat.model_copy(update={"max_new_tokens": 60})
    parts = list(longer.with_structured_output(Person, include_raw=True).stream(PROMPT))
    raw = [part["raw"] for part in parts if "raw" in part]
    parsed = [part["parsed"] for part in parts if part.get("parsed") is not None]
    assert json.loads(sum(raw[1:], raw[0]).text) == parsed[-1].model_dump()
