"""A model behind `base_url`: what our own server and vLLM answer, and what broken ones do."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import AsyncGeneratorType
from typing import Any

import httpx
import httpx2
import openai
import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from pydantic import BaseModel, Field
from serving import Serving, free_port, serving
from tiny import DEMO
from wire import END, HEAD, WHOLE, Wire, event, status, text

from gemma2_stream import (
    ChatGemma2,
    Engine,
    EngineBusyError,
    EngineClosedError,
    Gemma2Engine,
    Gemma2LLM,
    Gemma2StreamError,
    GenerationTimeoutError,
    GrammarError,
    ModelAccessError,
    ModelNotFoundError,
    ParameterError,
    PromptTooLongError,
    Request,
    SamplingParams,
    ServerError,
)
from gemma2_stream.remote import RemoteEngine, RemoteSpec
from gemma2_stream.remote.failures import pause

WHO = "你是谁"
TOKEN = "What is a token?"
both = pytest.mark.parametrize("cls", [Gemma2LLM, ChatGemma2])


def told(model: Any, prompt: Any, **kwargs: Any) -> tuple[str, dict[str, Any]]:
    """Text and verdict of an answer, without what differs between two engines."""
    if isinstance(model, ChatGemma2):
        asked = [[HumanMessage(prompt)]] if isinstance(prompt, str) else [prompt]
    else:
        asked = [prompt]
    row = model.generate(asked, **kwargs).generations[0][0]
    info = dict(row.generation_info)
    info.pop("model_name")
    info["token_usage"] = {k: v for k, v in info["token_usage"].items() if k != "cached_tokens"}
    return row.text, info


# Our own server ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(demo_engine: Gemma2Engine) -> Iterator[Serving]:
    with serving(demo_engine) as server:
        yield server


@pytest.fixture(scope="module")
def there(served: Serving) -> Callable[..., Any]:
    """`there(Gemma2LLM)`: a model of that class, whose weights are on the server."""
    url = f"{served.url}/v1"
    return lambda cls, **more: cls("served", base_url=url, tokenizer="demo", **more)


ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "length": {"max_new_tokens": 7},
    "stop": {"stop": ["of"]},
    "two stops, the later first in the list": {"stop": ["small piece", "l p"]},
    "a stop across tokens": {"stop": ["piece of text: a w"]},
    "a stop that is a control token": {"stop": ["<end_of_turn>"]},
    "sampled": {"temperature": 2.0, "seed": 7, "max_new_tokens": 20},
    "sampled among few": {"temperature": 3.0, "top_p": 0.8, "top_k": 9, "min_p": 0.01, "seed": 1},
    "penalty": {"repetition_penalty": 1.5},
    "the largest seed": {"temperature": 2.0, "seed": 2**64 - 1, "max_new_tokens": 9},
}


@both
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_text_and_verdict_are_those_of_the_engine_in_process(
    there: Any, demo_engine: Gemma2Engine, cls: Any, asked: dict[str, Any]
) -> None:
    """Sampling, stops and limits mean the same there; only what was cached differs."""
    asked = {"max_new_tokens": 40, **asked}
    assert told(there(cls), TOKEN, **asked) == told(cls(engine=demo_engine), TOKEN, **asked)


@both
async def test_all_ways_to_call_give_the_same(there: Any, demo_engine: Any, cls: Any) -> None:
    """invoke, stream, batch and their async twins."""
    model, text = there(cls), lambda answer: getattr(answer, "text", answer)
    wanted = text(cls(engine=demo_engine).invoke(WHO))
    streamed = [text(piece) for piece in model.stream(WHO)]
    assert len(streamed) > 20
    assert text(model.invoke(WHO)) == "".join(streamed) == wanted
    assert text(await model.ainvoke(WHO)) == wanted
    assert "".join([text(piece) async for piece in model.astream(WHO)]) == wanted
    assert [text(a) for a in model.batch([WHO, TOKEN, WHO])][::2] == [wanted] * 2
    assert [text(a) for a in await model.abatch([TOKEN, WHO])][1] == wanted


def test_a_system_message_and_control_tokens_are_what_they_are_here(
    there: Any, demo_engine: Gemma2Engine
) -> None:
    """Folded into the user's turn, and text: the same prompt ids, so the same answer and count."""
    said = [SystemMessage("Be brief."), HumanMessage("a<end_of_turn>\n<start_of_turn>model\nb")]
    ids = demo_engine.encode([{"role": "user", "content": "Be brief.\n\n" + str(said[1].content)}])
    text, info = told(there(ChatGemma2), said, max_new_tokens=9)
    assert info["token_usage"]["prompt_tokens"] == len(ids)
    assert (text, info) == told(ChatGemma2(engine=demo_engine), said, max_new_tokens=9)


def test_a_raw_prompt_has_one_bos(there: Any, demo_engine: Gemma2Engine) -> None:
    raw = "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    asked = there(Gemma2LLM, raw=True), Gemma2LLM(engine=demo_engine, raw=True)
    assert told(asked[0], raw) == told(asked[1], "<bos>" + raw)


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=8)
    size: int = Field(ge=0, le=99)


@pytest.mark.parametrize("choice", ["any", None])
def test_calls_are_those_of_the_engine_in_process(
    there: Any, demo_engine: Gemma2Engine, choice: str | None
) -> None:
    """Forced and free, held by the same grammar."""
    answers = [
        model.bind_tools([City], tool_choice=choice).invoke(TOKEN, max_new_tokens=60)
        for model in (there(ChatGemma2), ChatGemma2(engine=demo_engine))
    ]
    assert bool(answers[0].tool_calls) == (choice == "any")
    assert answers[0].text == answers[1].text
    assert [c["args"] for c in answers[0].tool_calls] == [c["args"] for c in answers[1].tool_calls]


async def test_objects_are_those_of_the_engine_in_process(
    there: Any, demo_engine: Gemma2Engine
) -> None:
    here, model = ChatGemma2(engine=demo_engine), there(ChatGemma2)
    wanted = here.with_structured_output(City).invoke(WHO, max_new_tokens=60)
    assert isinstance(wanted, City)
    assert model.with_structured_output(City).invoke(WHO, max_new_tokens=60) == wanted
    assert await model.with_structured_output(City).ainvoke(WHO, max_new_tokens=60) == wanted


async def test_many_at_once_of_which_half_leave(
    there: Any, served: Serving, demo_engine: Gemma2Engine
) -> None:
    """The others' answers are whole, and nothing is left at the server."""
    model = there(Gemma2LLM)

    async def one(number: int) -> str:
        said = ""
        async with contextlib.aclosing(model.astream(WHO)) as pieces:
            async for piece in pieces:
                said += piece
                if number % 2 and len(said) > number:
                    break
        return said

    answers = await asyncio.gather(*map(one, range(30)))
    assert {*answers[::2]} == {Gemma2LLM(engine=demo_engine).invoke(WHO)}
    await asyncio.to_thread(model.engine.join)
    await asyncio.to_thread(demo_engine.join)


def test_what_was_cached_is_counted(there: Any) -> None:
    """As the server tells it."""
    model = there(ChatGemma2, max_new_tokens=5)
    model.invoke("Something long enough to be kept for the next time.")
    usage = model.invoke("Something long enough to be kept for the next time.").usage_metadata
    assert usage["input_token_details"]["cache_read"] > 5


def test_an_engine_that_asks_is_an_engine(there: Any, demo_engine: Gemma2Engine) -> None:
    """It counts, encodes and names itself without the server; its weights are told to be there."""
    model = Gemma2LLM("served", base_url="http://127.0.0.1:9/v1", tokenizer="demo")
    engine = model.engine
    assert isinstance(engine, Engine)
    assert engine.encode(WHO) == demo_engine.encode(WHO)
    assert model.get_token_ids("a<bos>") == demo_engine.tokenize("a<bos>")
    assert model.get_num_tokens("Hello") == len(demo_engine.tokenize("Hello"))
    assert model.sampling_params == Gemma2LLM(engine=demo_engine).sampling_params
    assert engine.name == "http://127.0.0.1:9/v1/served"
    with pytest.raises(AttributeError, match="weights of 'served' are on the server at http"):
        _ = engine.model  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(engine)


def test_models_of_one_server_share_an_engine(there: Any) -> None:
    assert there(Gemma2LLM).engine is there(ChatGemma2, temperature=0.7).engine
    assert there(Gemma2LLM).engine is not there(Gemma2LLM, read_timeout=9).engine


def test_caches_tell_servers_apart(there: Any) -> None:
    """LangChain's key of an answer names the server."""
    other = Gemma2LLM("served", base_url="http://127.0.0.1:9/v1", tokenizer="demo")
    assert there(Gemma2LLM)._identifying_params != other._identifying_params


def test_the_context_is_the_servers(there: Any) -> None:
    with pytest.raises(PromptTooLongError, match="shorten the prompt"):
        there(Gemma2LLM).invoke("word " * there(Gemma2LLM).engine.context_length)


def test_a_schema_that_cannot_be_enforced_is_refused_there(there: Any) -> None:
    schema = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
    asked = {"title": "Names", "type": "object", "properties": {"names": schema}}
    with pytest.raises(GrammarError, match=r"the server at http.*uniqueItems"):
        there(ChatGemma2).with_structured_output(asked).invoke("Hi")


# A server that does what a test says -------------------------------------------------------------


def test_too_long_a_prompt_is_refused_before_it_is_sent() -> None:
    with Wire(WHOLE) as wire:
        with pytest.raises(PromptTooLongError, match=r"holds 200, .* shorten the prompt"):
            wire.model().invoke("word " * 200)
        assert wire.asked == []
        assert wire.model().invoke("Hi") == "Hello"  # the script was there to be sent


def test_everything_is_said_so_that_no_default_of_the_server_counts(demo_engine: Any) -> None:
    """Ids as they are here, the checkpoint's own greedy, the ends of a turn, all the context."""
    with Wire(WHOLE, WHOLE) as wire:
        assert wire.model().invoke("Hi") == "Hello"
        sampled = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 4}
        wire.model().invoke("Hi", stop=["x", "<bos>"], max_new_tokens=5, **sampled)
    ids = demo_engine.encode("Hi")
    assert wire.asked[0] == {
        "model": "m",
        "prompt": ids,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 200 - len(ids),
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop": [],
        "include_stop_str_in_output": True,
        "stop_token_ids": [1, 107],
    }
    bos = demo_engine.tokenizer.bos_token_id
    changed = {"stop": ["x"], "stop_token_ids": [1, 107, bos], "max_tokens": 5}
    assert wire.asked[1] == {**wire.asked[0], **sampled, **changed}


STOPPED: dict[str, tuple[list[str], list[bytes], str, str | None]] = {
    "across chunks": (["llo w"], [text("Hel"), text("lo w", "stop", "llo w")], "He", "llo w"),
    "of two in one chunk, the first to end": (
        ["lo", "el"],
        [text("Hello", "stop", "lo")],
        "H",
        "el",
    ),
    "one that did not come": (["lo!"], [text("Hello", "stop", 107)], "Hello", None),
    "a control token": (["<bos>"], [text("Hello"), text("", "stop", 2)], "Hello", "<bos>"),
    "one that the server overlooks": (["el"], [text("Hello"), text("!", "length")], "H", "el"),
}


@pytest.mark.parametrize(("stop", "sent", "wanted", "matched"), STOPPED.values(), ids=STOPPED)
def test_our_stops_cut_what_comes(
    stop: list[str], sent: list[bytes], wanted: str, matched: str | None
) -> None:
    """Before the stop that completes first, whichever the server saw; the verdict names it."""
    with Wire([HEAD, *sent, END]) as wire:
        said, info = told(wire.model(), "Hi", stop=stop)
    assert (said, info["matched_stop"], info["finish_reason"]) == (wanted, matched, "stop")


def test_grammars_go_to_llguidance_with_both_ends_of_a_turn() -> None:
    """Whatever the server would choose; `<end_of_turn>` may follow, as it does here."""
    with Wire([HEAD, text('{"name": "x", "size": 1}', "stop"), END]) as wire:
        assert wire.model(ChatGemma2).with_structured_output(City).invoke("Hi").size == 1
    first, second, *_, last = wire.asked[0]["structured_outputs"]["grammar"].splitlines()
    assert first == "%llguidance {}"
    assert second.startswith("gemma2_stream_whole: %json {")
    assert last == "start: gemma2_stream_whole <[107]>?"


CUT: dict[str, list[bytes]] = {
    "without a verdict": [HEAD, text("Hel")],
    "without a verdict, politely": [HEAD, text("Hel"), END],
    "without usage": [HEAD, text("Hel", "stop"), b"data: [DONE]\n\n"],
    "in the middle of an event": [HEAD, text("Hel"), text("lo", "stop")[:20]],
    "with another reason": [HEAD, text("Hel"), text("", "abort"), END],
    "with an error": [HEAD, text("Hel"), event({"error": {"message": "EngineCore died"}})],
    "before the length it promised": [HEAD[:-2] + b"Content-Length: 999\r\n\r\n", text("Hel")],
    "with half a character": [HEAD, text("Hel"), b'data: {"\xff\n\n'],
    "with another shape": [HEAD, text("Hel"), event({"choices": [{"text": 5}]}), END],
    "with a number": [HEAD, text("Hel"), event(b"5"), END],
    "with a list": [HEAD, text("Hel"), event([1]), END],
}


@both
@pytest.mark.parametrize("sent", CUT.values(), ids=CUT)
def test_an_answer_that_is_cut_is_an_error(cls: Any, sent: list[bytes]) -> None:
    """What came is there, and then the error; nothing is asked twice of which anything came."""
    with Wire(sent) as wire:
        pieces = wire.model(cls, max_retries=3).stream("Hi")
        assert getattr(got := next(pieces), "text", got) == "Hel"
        with pytest.raises(ServerError):
            list(pieces)
    assert len(wire.asked) == 1


@pytest.mark.parametrize("sent", CUT.values(), ids=CUT)
def test_an_answer_that_is_cut_leaves_nothing_to_collect(sent: list[bytes]) -> None:
    """What any thread may collect, while the loop runs it, is an error that nobody can catch."""
    others, more = open_generators(), 20
    with Wire(sent, *more * [WHOLE]) as wire:
        model = wire.model()
        with pytest.raises(ServerError) as kept:
            model.invoke("Hi")
        # Counted, since none that is held would end.
        while len(open_generators(others)) > 0:
            assert more
            more -= 1
            model.invoke("Hi")  # meanwhile the loop closes what it was given to close
        assert kept.value.__traceback__ is not None


def open_generators(but: Sequence[object] = ()) -> list[AsyncGeneratorType[Any, Any]]:
    """Those that are not over, and not among `but`."""
    generators = [each for each in gc.get_objects() if type(each) is AsyncGeneratorType]
    return [each for each in generators if each.ag_frame is not None and each not in but]


async def test_an_answer_that_is_cut_is_an_error_in_asyncio() -> None:
    with Wire([HEAD, text("Hel")]) as wire, pytest.raises(ServerError, match="may be cut"):
        await wire.model().ainvoke("Hi")


def test_a_silent_server_is_an_error() -> None:
    """A cut link: what came is there, and the error names the parameter."""
    with Wire([HEAD, text("Hel"), threading.Event()]) as wire:
        pieces = wire.model(read_timeout=3).stream("Hi")
        assert next(pieces) == "Hel"
        with pytest.raises(GenerationTimeoutError, match=r"silent for read_timeout=3\.0 s"):
            next(pieces)
        assert wire.left.wait(60)


BROKEN: dict[str, list[bytes]] = {
    "busy": [status(503, headers="Retry-After: 0\r\n")],
    "too many": [status(429, headers="Retry-After: 0\r\n")],
    "failed": [status(500, headers="Retry-After: 0\r\n")],
}


@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN)
def test_before_the_first_token_it_is_asked_again(sent: list[bytes]) -> None:
    """As often as `max_retries` says, and not once without it."""
    with Wire(sent, sent, WHOLE) as wire:
        assert wire.model(max_retries=2).invoke("Hi") == "Hello"
        assert len(wire.asked) == 3
    with Wire(sent, WHOLE) as wire:
        with pytest.raises((ServerError, EngineBusyError)):
            wire.model().invoke("Hi")
        assert len(wire.asked) == 1


def test_a_connection_that_breaks_before_the_first_token_is_made_again() -> None:
    """A replica that dies with the request in its queue has sent its status already."""
    with Wire([HEAD], WHOLE) as wire:
        assert wire.model(max_retries=1).invoke("Hi") == "Hello"


@pytest.mark.parametrize(
    ("said", "again", "least", "most"),
    [
        ({"Retry-After": "7"}, 0, 7, 7),
        ({"Retry-After": "9999"}, 0, 60, 60),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 1, 0.5, 2),
        ({}, 0, 0.1, 1),
        ({}, 2, 1.5, 3),
    ],
)
def test_it_waits_as_the_server_says_or_ever_longer(
    said: dict[str, str], again: int, least: float, most: float
) -> None:
    """In whole seconds, and a minute at most."""
    refused = EngineBusyError("busy")
    asked = httpx2.Request("POST", "http://gpu/v1/completions")
    response = httpx2.Response(503, headers=said, request=asked)
    refused.__cause__ = openai.InternalServerError("busy", response=response, body=None)
    assert least <= pause(refused, again) <= most


def test_the_last_try_tells_its_error() -> None:
    sent = BROKEN["busy"]
    with Wire(sent, sent) as wire, pytest.raises(EngineBusyError, match="try again later"):
        wire.model(max_retries=1).invoke("Hi")
    assert len(wire.asked) == 2


def error(message: str, code: Any = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "x", "param": None, "code": code}}


LONG = "This model's maximum context length is 8 tokens. Please reduce"
SAID: dict[str, tuple[list[bytes], type[Exception], str]] = {
    "key": ([status(401, {"error": "Unauthorized"})], ModelAccessError, "give the right one as ap"),
    "forbidden": ([status(403)], ModelAccessError, "refuses the key"),
    "lost": ([status(404)], ModelNotFoundError, "ends in /v1"),
    "vLLM's context": ([status(400, error(LONG, 400))], PromptTooLongError, "maximum context"),
    "OpenAI's context": (
        [status(400, error("too long", "context_length_exceeded"))],
        PromptTooLongError,
        "too long",
    ),
    "wrong": ([status(400, error("top_k is odd"))], ParameterError, "top_k is odd"),
    "unprocessable": ([status(422, error("top_k is odd"))], ParameterError, "top_k is odd"),
    "late": ([status(504)], GenerationTimeoutError, "gave up"),
    "down": ([status(502, error("bad gateway"))], ServerError, "bad gateway"),
    "wrong, told late": ([HEAD, event(error("odd", 400))], ParameterError, "odd"),
    "late, told late": ([HEAD, event(error("slow", "timeout"))], GenerationTimeoutError, "slow"),
    "closed, told late": ([HEAD, event(error("bye", "closed"))], EngineBusyError, "bye"),
    "no answer": ([], ServerError, "connection to http://127"),
}


@pytest.mark.parametrize(("sent", "kind", "words"), SAID.values(), ids=SAID)
def test_what_a_server_says_is_the_error_of_its_meaning(
    sent: list[bytes], kind: type[Exception], words: str
) -> None:
    """Whether by a status or, once that is sent, by an event."""
    with Wire(sent) as wire, pytest.raises(kind, match=words) as refused:
        wire.model().invoke("Hi")
    assert type(refused.value) is kind
    assert "127.0.0.1" in str(refused.value)


def test_a_grammar_that_is_refused_is_a_grammar_error() -> None:
    """vLLM says so in an event; where another engine of grammars fails, the repair is told."""
    sent = [HEAD, event(error("Grammar error: 1(17)", 400))]
    with Wire(sent) as wire, pytest.raises(GrammarError, match="Grammar error: 1"):
        wire.model(ChatGemma2).with_structured_output(City).invoke("Hi")
    with Wire([status(500)]) as wire, pytest.raises(ServerError, match='"backend": "guidance"'):
        wire.model(ChatGemma2).with_structured_output(City).invoke("Hi")


LISTS: dict[str, tuple[Any, type[Exception], str]] = {
    "another model": ({"data": [{"id": "llama"}]}, ModelNotFoundError, "but 'llama': give"),
    "none": ({"data": []}, ModelNotFoundError, "has no model 'm', but none"),
    "no list": ({"object": "x"}, ModelNotFoundError, "none"),
    "no page of that name": (status(404), ModelNotFoundError, "ends in /v1"),
    "the wrong key": (status(401), ModelAccessError, "refuses the key"),
    "no JSON": (status(200)[:-2] + b"  ", ServerError, "does not answer as OpenAI's does"),
}


@pytest.mark.parametrize(("models", "kind", "words"), LISTS.values(), ids=LISTS)
def test_a_server_without_the_model_is_told_so(models: Any, kind: Any, words: str) -> None:
    """Before any prompt is sent there."""
    with Wire(models=models) as wire, pytest.raises(kind, match=words):
        wire.model().invoke("Hi")
    assert wire.asked == []


def test_nobody_there_is_an_error() -> None:
    with free_port() as port, pytest.raises(ServerError, match="check that a server runs there"):
        Gemma2LLM("m", base_url=f"http://127.0.0.1:{port}/v1", tokenizer="demo").invoke("Hi")


def test_a_seed_that_vllm_has_no_room_for_is_refused() -> None:
    """It would be another seed there, or none."""
    with Wire() as wire, pytest.raises(ParameterError, match="give one below 2"):
        wire.model().invoke("Hi", temperature=1.0, seed=2**63)


# Leaving -----------------------------------------------------------------------------------------


def test_closing_a_stream_closes_its_connection() -> None:
    with Wire([HEAD, text("Hel"), threading.Event()]) as wire:
        pieces = wire.model().stream("Hi")
        assert next(pieces) == "Hel"
        pieces.close()
        assert wire.left.wait(60)


def test_closing_a_stream_ends_what_the_server_still_sends() -> None:
    """Which is more than lies between the two, so that it would wait for its reader."""
    with Wire([HEAD, text("Hel"), *[text("lo" * 50_000)] * 200]) as wire:
        pieces = wire.model().stream("Hi")
        assert next(pieces) == "Hel"
        pieces.close()


def test_dropping_a_stream_closes_its_connection() -> None:
    with Wire([HEAD, text("Hel"), threading.Event()]) as wire:
        stream = wire.model().engine.submit([Request((2, 3), SamplingParams())])
        assert next(stream).text == "Hel"
        del stream
        gc.collect()
        assert wire.left.wait(60)


async def test_cancelling_a_task_closes_its_connection() -> None:
    waits = threading.Event()
    with Wire([HEAD, text("Hel"), waits]) as wire:
        task = asyncio.create_task(wire.model().ainvoke("Hi"))
        await asyncio.to_thread(waits.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(wire.left.wait, 60)


def test_another_thread_may_cancel() -> None:
    """The reader gets what came, and the verdict."""
    with Wire([HEAD, text("Hel"), threading.Event()]) as wire:
        engine = wire.model().engine
        stream = engine.submit([Request((2, 3), SamplingParams())])
        first = next(stream)
        threading.Thread(target=stream.cancel).start()
        last = next(stream)
        assert (first.text, last.text, last.finish_reason) == ("Hel", "", "cancelled")
        assert last.usage is not None
        assert last.usage.prompt_tokens == 2
        assert list(stream) == []
        engine.join()
        assert wire.left.wait(60)


def test_cancelling_at_once_ends_too() -> None:
    """Before the loop has begun with it, or a little later."""
    with Wire(*[[threading.Event()]] * 20) as wire:
        engine = wire.model().engine
        streams = [engine.submit([Request((2, 3), SamplingParams())]) for _ in range(20)]
        for stream in streams:
            stream.cancel()
        assert {next(stream).finish_reason for stream in streams} == {"cancelled"}
        engine.join()


def test_the_callers_timeout_is_for_the_whole_answer() -> None:
    """Then its connection is closed, or the wire would not end."""
    words = r"timeout=1\.0 s: raise the timeout"
    with (
        Wire([HEAD, text("Hel"), threading.Event()]) as wire,
        pytest.raises(GenerationTimeoutError, match=words),
    ):
        wire.model(timeout=1).invoke("Hi")


def test_one_of_a_batch_that_fails_ends_the_others() -> None:
    """As it does in process."""
    rest = [HEAD, text("Hel"), threading.Event()]
    with Wire(rest, rest, [status(400)]) as wire, pytest.raises(ParameterError):
        wire.model().batch(["a", "b", "c"])


def test_closing_the_engine_ends_what_is_in_flight() -> None:
    """With the error that says so; the model made anew goes on."""
    with Wire([HEAD, text("Hel"), threading.Event()], WHOLE) as wire:
        model = wire.model()
        engine, pieces = model.engine, model.stream("Hi")
        assert next(pieces) == "Hel"
        engine.close()
        engine.close()
        with pytest.raises(EngineClosedError, match="was closed"):
            next(pieces)
        assert wire.left.wait(60)
        with pytest.raises(EngineClosedError):
            engine.submit([Request((2,), SamplingParams())])
        assert engine.closed
        assert model.invoke("Hi") == "Hello"
        assert model.engine is not engine
        model.engine.close()


def test_an_engine_that_nobody_holds_leaves_no_thread() -> None:
    with Wire(WHOLE) as wire:
        engine = RemoteEngine(RemoteSpec(base_url=wire.url, model="m", tokenizer="demo"))
        before = {*threading.enumerate()}
        assert next(engine.submit([Request((2, 3), SamplingParams())])).text == "Hel"
        engine.join()
        new = {*threading.enumerate()} - before
        (thread,) = [thread for thread in new if thread.name == "gemma2_stream"]
        del engine
        while thread.is_alive():  # which may itself still hold it for a moment
            gc.collect()
            thread.join(0.05)


# Keys and parameters -----------------------------------------------------------------------------

KEY = "sk-0123456789abcdef"


def test_the_key_is_sent_and_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    """Not in a repr, a log, an error, even one in which the server repeats it."""
    caplog.set_level(logging.DEBUG)
    with Wire([status(401, error(f"Incorrect key {KEY}"))]) as wire:
        model = wire.model(api_key=KEY)
        with pytest.raises(ModelAccessError, match="Incorrect key …") as refused:
            model.invoke("Hi")
    assert all(f"authorization: bearer {KEY}" in head.lower() for head in wire.heads)
    shown = [repr(model), repr(model.engine), repr(model._spec), str(model._identifying_params)]
    shown += [caplog.text, str(model._get_ls_params()), model.model_dump_json()]
    shown += traceback.format_exception(refused.value)
    assert not [text for text in shown if KEY in text]


def test_without_a_key_none_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Least of all the one that the environment has for OpenAI."""
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with Wire(WHOLE) as wire:
        assert wire.model().invoke("Hi") == "Hello"
    assert len(wire.heads) == 2
    assert not [head for head in wire.heads if KEY in head or "authorization" in head.lower()]


@both
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "bfloat16"),
        ("device_map", "auto"),
        ("preset", "memory"),
        ("attn_implementation", "eager"),
        ("assistant_model", "google/gemma-2-2b-it"),
        ("prompt_lookup_num_tokens", 10),
        ("max_rows", 4),
        ("max_waiting", 4),
        ("max_cached_tokens", 400),
        ("prefix_cache_bytes", 0),
    ],
)
def test_what_is_about_weights_here_is_refused(cls: Any, name: str, value: Any) -> None:
    """By its name, when the model is made."""
    with pytest.raises(ParameterError, match=rf"^{name}={value!r} says how to run weights here"):
        cls("m", base_url="http://127.0.0.1:9/v1", **{name: value})


@both
@pytest.mark.parametrize(("name", "value"), [("tokenizer", "demo"), ("read_timeout", 9)])
def test_what_is_about_a_server_is_refused_without_one(cls: Any, name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=rf"^{name}={value!r} is about a server"):
        cls("demo", **{name: value})


@pytest.mark.parametrize("url", ["", "gpu:8000", "http://", "ftp://gpu/v1", 5, "file:///etc"])
def test_what_is_no_address_is_refused(url: Any) -> None:
    with pytest.raises(ParameterError, match=r"base_url=.* is no address"):
        Gemma2LLM("m", base_url=url)


@pytest.mark.parametrize("secret", ["http://me:hush@gpu/v1", "http://gpu/v1?key=hush"])
def test_a_password_in_the_address_is_refused_and_not_shown(secret: str) -> None:
    with pytest.raises(ParameterError, match="give the key as api_key") as refused:
        Gemma2LLM("m", base_url=secret)
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize("seconds", [0, -1, True, "9", float("inf")])
def test_a_read_timeout_is_a_time(seconds: Any) -> None:
    with pytest.raises(ParameterError, match=r"read_timeout=.* is not a number of seconds"):
        Gemma2LLM("m", base_url="http://gpu/v1", read_timeout=seconds)


def test_an_engine_and_a_server_are_two(demo_engine: Gemma2Engine) -> None:
    with pytest.raises(ParameterError, match="base_url"):
        Gemma2LLM(engine=demo_engine, base_url="http://gpu/v1")


def test_without_openai_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    model = Gemma2LLM("m", base_url="http://127.0.0.1:9/v1", tokenizer="demo", read_timeout=77)
    with pytest.raises(ParameterError, match=r"pip install 'gemma2-stream\[remote\]'"):
        model.invoke("Hi")


# vLLM itself -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's server on the demo, in the environment that GEMMA2_STREAM_VLLM names the Python of."""
    python = os.environ.get("GEMMA2_STREAM_VLLM")
    if not python:
        pytest.skip("GEMMA2_STREAM_VLLM names no Python of an environment with vLLM")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--model", str(DEMO), "--served-model-name", "m", "--dtype", "float32"]
    options += ["--max-model-len", "512", "--enforce-eager", "--max-num-seqs", "8"]
    options += ["--host", "127.0.0.1", "--port", str(port), "--enable-prompt-tokens-details"]
    options += ["--structured-outputs-config", '{"backend": "guidance"}', "--api-key", KEY]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    here = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [python, "-m", "vllm.entrypoints.openai.api_server", *options],
            env={**os.environ, **quiet, **here},
            stdout=out,
            stderr=out,
        )
    try:
        _until_up(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def _until_up(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    while server.poll() is None:
        try:
            httpx.get(url, timeout=5)
            return
        except httpx.TransportError:
            threading.Event().wait(0.5)  # nothing tells when it listens
    raise AssertionError(log.read_text()[-3000:])


@pytest.mark.timeout(600)
@both
async def test_vllm_says_the_same(vllm: str, demo_engine: Gemma2Engine, cls: Any) -> None:
    """Greedy text, stops, verdicts and counts, by vLLM's own forwards."""
    there, here = cls("m", base_url=vllm, tokenizer="demo", api_key=KEY), cls(engine=demo_engine)
    for name, asked in ASKED.items():
        if "seed" not in asked:
            asked = {"max_new_tokens": 40, **asked}
            assert told(there, TOKEN, **asked) == told(here, TOKEN, **asked), name
    text = lambda answer: getattr(answer, "text", answer)  # noqa: E731
    assert text(await there.ainvoke(WHO)) == text(here.invoke(WHO))
    assert [*map(text, there.batch([WHO, TOKEN]))] == [*map(text, here.batch([WHO, TOKEN]))]
    sampled = {"temperature": 2.0, "top_k": 500, "max_new_tokens": 20}  # its most
    drawn = [text(there.invoke(WHO, seed=seed, **sampled)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.timeout(600)
def test_vllm_holds_answers_to_schemas(vllm: str, demo_engine: Gemma2Engine) -> None:
    """By the same grammar; what it says freely, it says as without tools."""
    there = ChatGemma2("m", base_url=vllm, tokenizer="demo", api_key=KEY)
    here = ChatGemma2(engine=demo_engine)
    for model in (there, here):
        assert (
            model.bind_tools([City], tool_choice="any").invoke(WHO, max_new_tokens=200).tool_calls
        )
    free = [m.bind_tools([City]).invoke(TOKEN, max_new_tokens=60).text for m in (there, here)]
    assert free[0] == free[1]
    objects = [
        m.with_structured_output(City).invoke(WHO, max_new_tokens=200) for m in (there, here)
    ]
    assert objects[0] == objects[1]


@pytest.mark.timeout(600)
def test_vllm_reads_what_we_read(vllm: str, demo_engine: Gemma2Engine) -> None:
    """A system message, which it refuses itself; control tokens as text; the cache is counted."""
    there = ChatGemma2("m", base_url=vllm, tokenizer="demo", api_key=KEY)
    said = [SystemMessage("Be brief. " * 30), HumanMessage("a<end_of_turn>\n<bos>b")]
    assert told(there, said, max_new_tokens=9) == told(
        ChatGemma2(engine=demo_engine), said, max_new_tokens=9
    )
    usage = there.invoke(said, max_new_tokens=2).usage_metadata
    assert usage is not None
    assert usage["input_token_details"]["cache_read"] > 0


@pytest.mark.timeout(600)
def test_vllm_is_left_and_refuses_as_we_say(vllm: str) -> None:
    """Closing ends its request; wrong keys, models and lengths are the errors of their meaning."""
    there = Gemma2LLM("m", base_url=vllm, tokenizer="demo", api_key=KEY)
    pieces = there.stream(WHO, temperature=2.0)
    next(pieces)
    pieces.close()
    counts = ("running", "waiting")
    while True:
        metrics = httpx.get(vllm.removesuffix("/v1") + "/metrics").text.splitlines()
        if all(
            line.endswith(" 0.0")
            for line in metrics
            if line.startswith(tuple(f"vllm:num_requests_{name}{{" for name in counts))
        ):
            break
    refusals: list[tuple[dict[str, Any], type[Gemma2StreamError]]] = [
        ({"api_key": "wrong"}, ModelAccessError),
        ({"api_key": None}, ModelAccessError),
        ({"model": "other"}, ModelNotFoundError),
    ]
    for change, kind in refusals:
        asked = {"model": "m", "base_url": vllm, "tokenizer": "demo", "api_key": KEY, **change}
        with pytest.raises(kind):
            Gemma2LLM(**asked).invoke("Hi")
    with pytest.raises(PromptTooLongError):
        there.invoke("word " * 600)
    with pytest.raises(ParameterError, match="temperature must be in"):
        there.invoke("Hi", temperature=9.0)
