"""`FakeEngine` keeps the promises of an engine, so that a chain tested with it meets no others."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from pydantic import BaseModel

from gemma2_stream import (
    ChatGemma2,
    Engine,
    EngineClosedError,
    Gemma2Engine,
    Gemma2LLM,
    GenerationTimeoutError,
    ParameterError,
    Request,
    SamplingParams,
)
from gemma2_stream.testing import FakeEngine


def asked(engine: Engine, prompt: str = "Hi", **params: Any) -> Request:
    return Request(tuple(engine.encode(prompt)), SamplingParams(**params))


def test_it_is_an_engine_and_needs_no_torch() -> None:
    assert isinstance(FakeEngine([]), Engine)
    code = "import sys, gemma2_stream.testing; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_each_chunk_comes_as_it_was_told_and_the_last_carries_the_verdict() -> None:
    engine = FakeEngine([["Hel", "lo"]])
    chunks = list(engine.submit([asked(engine)]))
    assert [chunk.text for chunk in chunks] == ["Hel", "lo", ""]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "stop"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3  # the end of the turn is one


def test_answers_are_given_in_the_order_of_the_requests() -> None:
    engine = FakeEngine(["one", "two", "three"])
    llm = Gemma2LLM(engine=engine)
    assert [llm.invoke("a"), *llm.batch(["b", "c"])] == ["one", "two", "three"]
    assert ["a" in engine.calls[0].prompt, "c" in engine.calls[2].prompt] == [True, True]


def test_a_request_without_an_answer_is_refused() -> None:
    llm = Gemma2LLM(engine=FakeEngine(["one"]))
    llm.invoke("a")
    with pytest.raises(ParameterError, match="none left for request 2"):
        llm.invoke("b")


def test_one_string_is_not_taken_for_a_list_of_letters() -> None:
    with pytest.raises(ParameterError, match=r"\['Hello'\]"):
        FakeEngine("Hello")


@pytest.mark.parametrize(
    ("params", "text", "reason", "stop"),
    [
        ({"stop": ("lo w",)}, "Hel", "stop", "lo w"),
        ({"max_new_tokens": 2}, "Hello ", "length", None),
        ({"max_new_tokens": 3}, "Hello world", "length", None),
        ({"max_new_tokens": 4}, "Hello world", "stop", None),
        ({"stop": ("world!",)}, "Hello world", "stop", None),
    ],
)
def test_stops_and_limits_are_obeyed(
    params: dict[str, Any], text: str, reason: str, stop: str | None
) -> None:
    engine = FakeEngine([["Hel", "lo ", "world"]])
    chunks = list(engine.submit([asked(engine, **params)]))
    assert "".join(chunk.text for chunk in chunks) == text
    assert (chunks[-1].finish_reason, chunks[-1].stop) == (reason, stop)
    assert "".join(engine.calls[0].chunks) == text


def test_leaving_a_stream_cancels_the_request() -> None:
    gate = threading.Event()  # never set: only the cancellation ends the wait
    engine = FakeEngine([["Hel", gate, "lo"]])
    for token in Gemma2LLM(engine=engine).stream("Hi"):
        assert token == "Hel"
        break
    engine.join()
    (call,) = engine.calls
    assert call.finish_reason == "cancelled"
    assert "".join(call.chunks) == "Hel"


async def test_a_cancelled_task_cancels_the_request() -> None:
    said, gate = asyncio.Event(), threading.Event()
    engine = FakeEngine([["Hel", gate, "lo"]])

    async def read() -> None:
        async for _ in Gemma2LLM(engine=engine).astream("Hi"):
            said.set()

    task = asyncio.create_task(read())
    await said.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(engine.join)
    assert engine.calls[0].finish_reason == "cancelled"


def test_an_error_reaches_the_caller_itself_and_the_next_request_works() -> None:
    broken = OSError("gone")
    engine = FakeEngine([["Hel", broken], "Bye"])
    llm = Gemma2LLM(engine=engine)
    stream = llm.stream("Hi")
    assert next(stream) == "Hel"
    with pytest.raises(OSError, match="gone") as raised:
        next(stream)
    assert raised.value is broken
    assert engine.calls[0].finish_reason is None
    assert llm.invoke("Hi") == "Bye"


def test_a_timeout_ends_an_answer_that_waits() -> None:
    engine = FakeEngine([[threading.Event()]])
    with pytest.raises(GenerationTimeoutError):
        Gemma2LLM(engine=engine, timeout=0.001).invoke("Hi")
    engine.join()
    assert engine.calls[0].finish_reason == "cancelled"


def test_closing_ends_what_is_in_flight() -> None:
    engine = FakeEngine([["Hel", threading.Event()], "Bye"])
    stream = engine.submit([asked(engine)])
    assert next(stream).text == "Hel"
    engine.close()
    engine.close()
    with pytest.raises(EngineClosedError):
        next(stream)
    with pytest.raises(EngineClosedError):
        engine.submit([asked(engine)])
    assert engine.calls[0].finish_reason is None


def test_parameters_are_resolved_and_checked() -> None:
    engine = FakeEngine(["a"], defaults=SamplingParams(max_new_tokens=9))
    llm = Gemma2LLM(engine=engine, seed=1)
    with pytest.raises(ParameterError, match="temperature"):
        llm.invoke("Hi", top_p=0.5)
    llm.invoke("Hi", temperature=0.5)
    params = engine.calls[0].request.params
    assert (params.max_new_tokens, params.seed, params.temperature) == (9, 1, 0.5)


def test_a_refusal_in_a_batch_is_that_requests_own() -> None:
    engine = FakeEngine(["one"])
    good, bad = asked(engine), asked(engine, top_k=3)
    first, second = engine.submit_each([bad, good])
    with pytest.raises(ParameterError, match="top_k"):
        next(first)
    assert next(second).text == "one"


def test_rows_of_one_stream_are_said_in_shared_steps() -> None:
    engine = FakeEngine([["a", "b"], ["x", "y"]])
    chunks = engine.submit([asked(engine), asked(engine)])
    assert [chunk.text for chunk in chunks] == ["a", "x", "b", "y", "", ""]


def test_callbacks_get_each_token() -> None:
    class Heard(BaseCallbackHandler):
        def __init__(self) -> None:
            self.tokens: list[str] = []

        def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
            self.tokens.append(token)

    heard = Heard()
    chain = PromptTemplate.from_template("{q}") | Gemma2LLM(engine=FakeEngine([["Hel", "lo"]]))
    assert (chain | StrOutputParser()).invoke({"q": "Hi"}, {"callbacks": [heard]}) == "Hello"
    assert heard.tokens == ["Hel", "lo", ""]


def test_tool_calls_and_structured_answers_are_what_the_test_writes() -> None:
    class Person(BaseModel):
        name: str

    call = '<tool_call>{"name": "look_up", "arguments": {"name": "Ada"}}</tool_call>'
    engine = FakeEngine([call, '{"name": "Ada"}'])
    chat = ChatGemma2(engine=engine)

    def look_up(name: str) -> str:
        """Look somebody up."""
        return name

    (made,) = chat.bind_tools([look_up]).invoke("Who?").tool_calls
    assert (made["name"], made["args"]) == ("look_up", {"name": "Ada"})
    assert chat.with_structured_output(Person).invoke("Who?") == Person(name="Ada")


def test_prompts_read_as_the_real_template_writes_them(demo_engine: Gemma2Engine) -> None:
    engine = FakeEngine([])
    turns = [("system", "Be brief."), ("user", " Hi "), ("assistant", "Yes?"), ("user", "Bye")]
    spoken = [{"role": role, "content": content} for role, content in turns]
    ours = "".join(map(chr, engine.encode(spoken)))
    theirs = demo_engine.tokenizer.decode(demo_engine.encode(spoken))
    assert f"<bos>{ours}" == theirs


@pytest.mark.parametrize("limit", [1, 3, 100])
@pytest.mark.parametrize("stop", [None, "e", "zzz"])
def test_it_ends_an_answer_as_the_real_engine_does(
    demo_engine: Gemma2Engine, limit: int, stop: str | None
) -> None:
    """The demo's own tokens, told to the fake, give the same chunks and the same counts."""
    params = {"max_new_tokens": limit, "stop": (stop,) if stop else ()}
    whole = list(demo_engine.submit([asked(demo_engine, "What is a token?", max_new_tokens=100)]))
    answer = [chunk.text for chunk in whole if chunk.finish_reason is None]
    real = list(demo_engine.submit([asked(demo_engine, "What is a token?", **params)]))
    fake_engine = FakeEngine([answer])
    fake = list(fake_engine.submit([asked(fake_engine, "What is a token?", **params)]))
    assert [(c.text, c.finish_reason, c.stop) for c in real] == [
        (c.text, c.finish_reason, c.stop) for c in fake
    ]
    counted = [end.usage and end.usage.completion_tokens for end in (real[-1], fake[-1])]
    assert counted[0] == counted[1] is not None
