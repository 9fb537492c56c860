"""OpenAI's protocol over a real server: by its own client, by LangChain's, and byte by byte."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel
from serving import HELLO, Keeping, Serving, read_until, request, serving
from tiny import Forwards

from gemma2_stream import (
    ChatGemma2,
    Gemma2Engine,
    Gemma2LLM,
    Request,
    SamplingParams,
    TokenStream,
)
from gemma2_stream.testing import FakeEngine

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell the weather.",
        "parameters": {
            "type": "object",
            "properties": {"day": {"type": "integer", "minimum": 1, "maximum": 7}},
            "required": ["day"],
        },
    },
}
CALL = '<tool_call>{"name": "get_weather", "arguments": {"day": 3}}</tool_call>'


@pytest.fixture(scope="module")
def served(demo_engine: Gemma2Engine) -> Iterator[Serving]:
    with serving(demo_engine) as server:
        yield server


@pytest.fixture
def client(served: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def said(demo_engine: Gemma2Engine) -> str:
    """What the model answers without a server."""
    return str(ChatGemma2(engine=demo_engine, max_tokens=30).invoke("Hello").content)


def ask(client: openai.OpenAI, **more: Any) -> Any:
    asked = {"model": "served", "messages": HELLO, "max_tokens": 30, **more}
    return client.chat.completions.create(**asked)


# OpenAI's own client -----------------------------------------------------------------------------


def test_an_answer(client: openai.OpenAI, said: str) -> None:
    answer = ask(client)
    assert answer.choices[0].message.content == said
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream(client: openai.OpenAI, said: str) -> None:
    with ask(client, stream=True, stream_options={"include_usage": True}) as stream:
        first, *chunks, last = stream
    assert first.choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said
    assert [c.choices[0].finish_reason for c in chunks].count(None) == len(chunks) - 1
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert last.choices == []
    again = ask(client)
    assert last.usage.completion_tokens == again.usage.completion_tokens
    # The whole prompt but the token that must be computed anew.
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1


async def test_async(served: Serving, said: str) -> None:
    url = f"{served.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        asked: Any = {"model": "served", "messages": HELLO, "max_tokens": 30}
        answer = await client.chat.completions.create(**asked)
        assert answer.choices[0].message.content == said
        async with await client.chat.completions.create(**asked, stream=True) as stream:
            assert "".join([c.choices[0].delta.content or "" async for c in stream]) == said


def test_a_forced_call(client: openai.OpenAI) -> None:
    answer = ask(client, tools=[TOOL], tool_choice="required", max_tokens=200)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["day"] in range(1, 8)
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None


def test_a_streamed_call_is_the_same(client: openai.OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    asked: dict[str, Any] = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 200}
    (whole,) = ask(client, **asked).choices[0].message.tool_calls
    with ask(client, **asked, stream=True) as stream:
        deltas = [call for c in stream for call in c.choices[0].delta.tool_calls or ()]
    assert deltas[0].id.startswith("call_")
    assert deltas[0].function.name == "get_weather"
    assert "".join(d.function.arguments for d in deltas) == whole.function.arguments
    assert len(deltas) > 1


def test_a_conversation_with_a_call(demo_engine: Gemma2Engine) -> None:
    """What a client sends back is what the model reads: its own call, and the result."""
    engine = FakeEngine([CALL, "Sunny."])
    with (
        serving(engine) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        message = ask(client, tools=[TOOL]).choices[0].message
        result = {
            "role": "tool",
            "tool_call_id": message.tool_calls[0].id,
            "content": "sunny",
        }
        answer = ask(client, messages=[*HELLO, message, result], tools=[TOOL])
    assert answer.choices[0].message.content == "Sunny."
    assert CALL in engine.calls[1].prompt
    assert '"name": "get_weather", "content": "sunny"' in engine.calls[1].prompt


class Point(BaseModel):
    """A point on a small map."""

    x: bool
    y: bool


def test_a_structured_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="served", messages=HELLO, response_format=Point, max_completion_tokens=200
    )
    assert isinstance(answer.choices[0].message.parsed, Point)


def test_json_without_a_schema(client: openai.OpenAI) -> None:
    answer = ask(client, response_format={"type": "json_object"}, max_tokens=200)
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_several_choices(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"n": 3, "temperature": 1.5, "seed": 7, "max_tokens": 12}
    answer = ask(client, **asked)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert [c.message.content for c in ask(client, **asked).choices] == texts
    alone = ask(client, **{**asked, "n": 1})
    assert alone.choices[0].message.content == texts[0]
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
    with ask(client, **asked, stream=True) as stream:
        grown = ["", "", ""]
        for chunk in stream:
            (choice,) = chunk.choices
            grown[choice.index] += choice.delta.content or ""
    assert grown == texts


def test_stop_and_limit(client: openai.OpenAI, said: str) -> None:
    stop = said[2:5]
    stopped = ask(client, stop=stop).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (said[:2], "stop")
    cut = ask(client, max_tokens=2)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == 2


def test_text_completions(client: openai.OpenAI, demo_engine: Gemma2Engine) -> None:
    prompts = ["Once upon", "The"]
    llm = Gemma2LLM(engine=demo_engine, raw=True, max_tokens=16)  # OpenAI's default here
    answer = client.completions.create(model="served", prompt=prompts)
    assert [choice.text for choice in answer.choices] == [llm.invoke(p) for p in prompts]
    assert answer.usage is not None
    tokens = sum(len(demo_engine.encode(prompt, raw=True)) for prompt in prompts)
    assert answer.usage.prompt_tokens == tokens
    with client.completions.create(model="served", prompt=prompts[0], stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_token_ids_are_read_as_they_are(client: openai.OpenAI, demo_engine: Gemma2Engine) -> None:
    """One prompt or several, without a BOS that they do not have."""
    ids = [demo_engine.encode(prompt) for prompt in ("Hello", "你是谁")]
    llm = Gemma2LLM(engine=demo_engine, max_tokens=16)
    answer = client.completions.create(model="served", prompt=ids)
    assert [choice.text for choice in answer.choices] == [*map(llm.invoke, ("Hello", "你是谁"))]
    alone = client.completions.create(model="served", prompt=ids[0][1:])
    assert alone.usage is not None
    assert alone.usage.prompt_tokens == len(ids[0]) - 1


@pytest.mark.parametrize(
    "prompt", [[], [[]], [-1], [2, True], [2.5], [2, "a"], [[2], "a"], [10**9], [[2], [10**9]]]
)
def test_what_are_no_ids_is_refused(client: openai.OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="served", prompt=prompt)
    assert caught.value.param.startswith("prompt")


def test_a_grammar_holds_a_text(client: openai.OpenAI) -> None:
    """In vLLM's words; one that is none is refused, and so is another kind."""

    def ask_with(**how: Any) -> str:
        more = {"structured_outputs": how}
        return (
            client.completions.create(model="served", prompt="Hi", extra_body=more).choices[0].text
        )

    assert ask_with(grammar='start: "a" /[bc]/') in ("ab", "ac")
    for wrong in ({"grammar": "start: ("}, {"regex": "a"}, {}, {"grammar": ""}):
        with pytest.raises(openai.BadRequestError):
            ask_with(**wrong)


def test_the_stop_that_matched_is_told(client: openai.OpenAI, demo_engine: Gemma2Engine) -> None:
    ids = demo_engine.encode("What is a token?")
    ask_for: Any = client.completions.create
    for stop, reason in (("tok", "tok"), ("<end_of_turn>", "<end_of_turn>"), ("never said", None)):
        asked = {"model": "served", "prompt": ids, "stop": stop, "max_tokens": 60}
        whole, [*_, last] = ask_for(**asked), ask_for(**asked, stream=True)
        assert whole.choices[0].stop_reason == last.choices[0].stop_reason == reason


def test_the_context_is_told(client: openai.OpenAI, demo_engine: Gemma2Engine) -> None:
    [model] = client.models.list()
    assert model.max_model_len == demo_engine.context_length  # type: ignore[attr-defined]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["served"]
    assert client.models.retrieve("served").id == "served"
    with pytest.raises(openai.NotFoundError, match="ask for 'served'"):
        client.models.retrieve("google/gemma-2-9b-it")
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, model="gpt-4")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


# LangChain's client ------------------------------------------------------------------------------


@pytest.fixture
def langchain(served: Serving) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{served.url}/v1",
        api_key="none",
        model="served",
        max_tokens=200,
        max_retries=0,
        stream_usage=True,
        http_client=served.client,  # which is closed with the server
    )


def test_langchain_invokes_and_streams(langchain: ChatOpenAI, demo_engine: Gemma2Engine) -> None:
    ours = ChatGemma2(engine=demo_engine, max_tokens=200).invoke("Hello")
    theirs = langchain.invoke("Hello")
    assert theirs.content == ours.content
    total: Any = None
    for chunk in langchain.stream("Hello"):
        total = chunk if total is None else total + chunk
    assert total.content == ours.content
    assert total.usage_metadata["output_tokens"] == ours.usage_metadata["output_tokens"]
    assert total.response_metadata["finish_reason"] == theirs.response_metadata["finish_reason"]


def test_langchain_calls_tools(langchain: ChatOpenAI) -> None:
    (call,) = langchain.bind_tools([TOOL], tool_choice="get_weather").invoke("Hello").tool_calls
    assert call["name"] == "get_weather"
    assert call["args"]["day"] in range(1, 8)


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_langchain_structures(langchain: ChatOpenAI, method: Any) -> None:
    shaped = langchain.with_structured_output(Point, method=method)
    if method == "json_mode":  # holds to JSON alone, and a toy does not know which
        shaped = langchain.with_structured_output(None, method=method)
        assert isinstance(shaped.invoke("Hello in JSON"), dict)
    else:
        assert isinstance(shaped.invoke("Hello"), Point)


def test_langchain_knows_a_prompt_that_is_too_long(langchain: ChatOpenAI) -> None:
    with pytest.raises(ContextOverflowError):
        langchain.invoke("word " * 9000)


# Byte by byte ------------------------------------------------------------------------------------


def events(text: str) -> list[Any]:
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    *said, done = (line.removeprefix("data: ") for line in lines)
    assert done == "[DONE]"
    return [json.loads(line) for line in said]


def is_exactly(kind: type[BaseModel], said: Any) -> None:
    """`said` is what `kind` describes, with nothing beside it."""
    made = kind.model_validate(said, strict=True)
    told = made.model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert told == said


ASKED = [
    {},
    {"n": 2},
    {"tools": [TOOL]},
    {"tools": [TOOL], "tool_choice": "required", "max_tokens": 200},
    {"stop": ["e"]},
]


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: "+".join(asked) or "plain")
def test_the_format_is_openais(served: Serving, asked: dict[str, Any]) -> None:
    asked = {"max_tokens": 10, **asked}
    is_exactly(ChatCompletion, served.chat(**asked).json())
    answer = served.chat(**asked, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    for event in events(answer.text):
        is_exactly(ChatCompletionChunk, event)
        assert "usage" not in event
    *others, last = events(
        served.chat(**asked, stream=True, stream_options={"include_usage": True}).text
    )
    is_exactly(ChatCompletionChunk, last)
    assert last["choices"] == []
    assert {event["usage"] for event in others} == {None}
    assert len({event["id"] for event in [*others, last]}) == 1


def test_the_format_of_text_is_openais(served: Serving) -> None:
    body = {"model": "served", "prompt": "Once", "n": 2}
    is_exactly(Completion, served.client.post("/v1/completions", json=body).json())
    streamed = served.client.post("/v1/completions", json={**body, "stream": True})
    for event in events(streamed.text):
        for choice in event["choices"]:  # which OpenAI's type has for whole answers alone
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        is_exactly(Completion, event)


def test_the_calls_of_an_answer_with_text_before_them() -> None:
    with serving(FakeEngine([["One moment.\n", CALL, "\n", CALL]] * 2)) as server:
        whole = server.chat(tools=[TOOL]).json()["choices"][0]
        streamed = events(server.chat(tools=[TOOL], stream=True).text)
    assert whole["message"]["content"] == "One moment.\n"
    assert len({call["id"] for call in whole["message"]["tool_calls"]}) == 2
    deltas = [event["choices"][0]["delta"] for event in streamed]
    indexes = [c["index"] for delta in deltas for c in delta.get("tool_calls", ())]
    assert sorted(set(indexes)) == [0, 1]
    assert streamed[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_that_is_cut_is_no_call() -> None:
    with serving(FakeEngine([["<tool_call>", '{"name": "get_w', "eather"]])) as server:
        choice = server.chat(tools=[TOOL], max_tokens=2).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    (call,) = choice["message"]["tool_calls"]
    with pytest.raises(ValueError, match="delimiter"):
        json.loads(call["function"]["arguments"])


def test_text_of_every_script_in_any_pieces() -> None:
    text = "你好 👋🏽\u2028\u0000\n\ndata: [DONE]\r\n\\"
    with serving(FakeEngine([[*text]] * 2)) as server:
        assert server.chat().json()["choices"][0]["message"]["content"] == text
        grown = events(server.chat(stream=True).text)
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in grown) == text


def test_what_comes_at_once_is_written_at_once() -> None:
    """The role with the first token, and the usage with the end: a write is what costs."""
    with serving(FakeEngine(["Hello"])) as server, server.connect() as client:
        client.sendall(request(stream=True, stream_options={"include_usage": True}))
        _, _, body = read_until(client, b"\r\n0\r\n\r\n").partition(b"\r\n\r\n")
    writes = re.split(rb"(?:^|\r\n)[0-9a-f]+\r\n", body)[1:-1]  # each is a chunk of HTTP's
    assert [write.count(b"data: ") for write in writes] == [2, 1, 2]


# What is refused ---------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logit_bias": {"50256": -100}}, "logit_bias"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"presence_penalty": -1}, "presence_penalty"),
    ({"audio": {"voice": "alloy", "format": "mp3"}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities[1]"),
    ({"store": True}, "store"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"functions": []}, "functions"),
    ({"max_token": 3}, "max_token"),
    ({"n": 0}, "n"),
    ({"n": 33}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "3"}, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0.9}, "top_p"),
    ({"seed": -1}, "seed"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": ["<end_of_turn>\n"]}, "stop"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "some"}, "tool_choice"),
    ({"tools": [{**TOOL, "type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"messages": []}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "alien", "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages[0].tool_call_id"),
    ({"messages": [{**HELLO[0], "tool_call_id": "x"}]}, "messages[0].tool_call_id"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
    ),
]


@pytest.mark.parametrize(("asked", "param"), REFUSED, ids=[param for _, param in REFUSED])
def test_what_is_not_honoured_is_refused_by_name(
    served: Serving, asked: dict[str, Any], param: str
) -> None:
    answer = served.chat(**asked)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert param.partition("[")[0].split(".")[0] in error["message"]
    assert error["type"] == "invalid_request_error"


def test_what_changes_nothing_is_taken(served: Serving) -> None:
    plain = served.chat(max_tokens=5).json()["choices"]
    nothing = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "logprobs": False,
        "logit_bias": {},
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "modalities": ["text"],
        "service_tier": "auto",
        "stop": None,
        "stream": False,
        "safety_identifier": "x",
    }
    assert served.chat(max_tokens=5, **nothing).json()["choices"] == plain


def test_a_schema_that_is_none_is_the_clients_mistake(served: Serving) -> None:
    for parameters in ({"properties": 5}, {"required": 5, "minProperties": 2}, {"type": "nope"}):
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        answer = served.chat(tools=[tool], tool_choice="required", max_tokens=5)
        assert answer.status_code == 400, (parameters, answer.text)


def test_a_prompt_that_is_too_long(served: Serving, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"too long: it has 9,0\d\d tokens") as caught:
        ask(client, messages=[{"role": "user", "content": "word " * 9000}])
    assert caught.value.code == "context_length_exceeded"
    assert "/" not in str(caught.value.body)  # where the weights are concerns nobody


# What goes wrong ---------------------------------------------------------------------------------


def test_an_error_before_the_first_token_has_a_status() -> None:
    with serving(FakeEngine([[OSError("secret")]] * 2)) as server:
        for stream in (False, True):
            answer = server.chat(stream=stream)
            assert answer.status_code == 500
            assert answer.json()["error"]["message"] == "the model failed with OSError"
        (failed, *_) = [line for line in server.said() if line["event"] == "failed"]
        assert "OSError: secret" in failed["traceback"]


def test_an_error_in_the_middle_is_an_event_and_the_end() -> None:
    with serving(FakeEngine([["Hel", OSError("secret")], "fine"])) as server:
        answer = server.chat(stream=True)
        assert answer.status_code == 200
        *_, said, failed = [json.loads(e[6:]) for e in answer.text.split("\n\n") if e]
        assert said["choices"][0]["delta"] == {"content": "Hel"}
        assert failed["error"]["message"] == "the model failed with OSError"
        assert "[DONE]" not in answer.text
        assert server.chat().json()["choices"][0]["message"]["content"] == "fine"


def test_openais_client_raises_what_comes_in_the_middle() -> None:
    with (
        serving(FakeEngine([["Hel", OSError()]])) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        ask(client, stream=True) as stream,
        pytest.raises(openai.APIError, match="the model failed with OSError"),
    ):
        list(stream)


def test_a_full_queue_is_busy(
    demo_engine: Gemma2Engine, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    watch = forwards(demo_engine)
    reached, release = watch.gate(1)
    model, tokenizer = demo_engine.model, demo_engine.tokenizer
    with (
        Gemma2Engine(model, tokenizer, name="busy", max_rows=1, max_waiting=1) as engine,
        serving(engine) as server,
        ThreadPoolExecutor() as pool,
    ):
        first = pool.submit(server.chat, max_tokens=2)
        assert reached.wait(60)
        waits = Request(tuple(engine.encode("Hi")), SamplingParams(max_new_tokens=2))
        with engine.submit([waits]):  # from beside the server
            refused = server.chat()
        release.set()
        assert first.result().status_code == 200
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "busy"


def test_an_answer_that_somebody_cancels_is_no_whole_one() -> None:
    """From beside the server, such as when its process ends."""
    gate = threading.Event()
    engine = Keeping([["Hel", gate]] * 2)
    with serving(engine) as server, ThreadPoolExecutor() as pool:
        for stream in (True, False):
            asked = pool.submit(server.chat, stream=stream)
            while not server.metric("requests_answering"):
                pass
            engine.streams[-1].cancel()
            answer = asked.result()
            assert answer.status_code == (200 if stream else 503)
            assert '"code":"closed"' in answer.text
            assert "[DONE]" not in answer.text
            server.over()


def test_time_runs_out() -> None:
    gate = threading.Event()  # which nobody opens
    with serving(FakeEngine([[gate], ["Hel", gate]]), max_seconds=0.2) as server:
        answer = server.chat()
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "timeout"
        assert '"code":"timeout"' in server.chat(stream=True).text


def test_a_closed_engine_is_unhealthy(demo_engine: Gemma2Engine) -> None:
    engine = Gemma2Engine(demo_engine.model, demo_engine.tokenizer, name="closing")
    with serving(engine) as server:
        assert server.client.get("/health").json() == {"status": "ok"}
        engine.close()
        for answer in (server.client.get("/health"), server.chat()):
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "closed"


# Together ----------------------------------------------------------------------------------------


class Counting(Gemma2Engine):
    """`taken` counts what was submitted."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.taken = threading.Semaphore(0)

    def submit(self, requests: Sequence[Request]) -> TokenStream:
        stream = super().submit(requests)
        self.taken.release()
        return stream


def test_clients_share_steps(
    demo_engine: Gemma2Engine, forwards: Callable[[Gemma2Engine], Forwards], served: Serving
) -> None:
    """The model is held at its first step until all have asked."""
    alone = [served.chat(messages=message(i), max_tokens=20).json() for i in range(4)]
    watch = forwards(demo_engine)
    _, release = watch.gate(1)
    with (
        Counting(demo_engine.model, demo_engine.tokenizer, name="counting") as engine,
        serving(engine) as server,
        ThreadPoolExecutor() as pool,
    ):
        asked = [pool.submit(server.chat, messages=message(i), max_tokens=20) for i in range(4)]
        for _ in asked:
            assert engine.taken.acquire(timeout=60)
        release.set()
        together = [each.result().json() for each in asked]
    assert [a["choices"] for a in together] == [a["choices"] for a in alone]
    assert max(watch.rows) > 1


def message(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Tell me of {number}"}]


def test_metrics_count(demo_engine: Gemma2Engine) -> None:
    demo_engine.prefixes.clear()
    with serving(demo_engine) as server:
        usages = [server.chat(max_tokens=4).json()["usage"] for _ in range(2)]
        server.chat(logprobs=True)
        chat = {"path": "/v1/chat/completions"}
        assert server.metric("requests_total", **chat, status="200") == 2
        assert server.metric("requests_total", **chat, status="400") == 1
        assert server.metric("prompt_tokens_total") == 2 * usages[0]["prompt_tokens"]
        assert server.metric("completion_tokens_total") == 8
        cached = usages[1]["prompt_tokens_details"]["cached_tokens"]
        assert cached > 0
        assert server.metric("cached_tokens_total") == cached
        assert server.metric("time_to_first_token_seconds_count") == 2
        assert server.metric("request_seconds_count") == 2
        assert server.metric("requests_waiting") == server.metric("requests_answering") == 0


def test_metrics_tell_who_waits_and_who_is_answered() -> None:
    waits, goes_on = threading.Event(), threading.Event()
    engine = FakeEngine([[waits, "Hel", goes_on, "lo"]])
    with serving(engine) as server, server.connect() as client:
        client.sendall(request(stream=True))
        while not engine.calls:
            server.client.get("/health")
        assert server.metric("requests_waiting") == 1
        waits.set()
        read_until(client, b"Hel")
        assert server.metric("requests_waiting") == 0
        assert server.metric("requests_answering") == 1
        goes_on.set()
        read_until(client, b"[DONE]")
        server.over()
        assert server.metric("requests_answering") == 0
