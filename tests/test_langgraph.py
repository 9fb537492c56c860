"""LangGraph on the chat model: the agent's loop, live tokens, structured answers, memory, stopping.

No tiny weights choose a tool by themselves, so here a real Gemma 2 is told what to say to whatever
it reads last; the engine, `generate`, the grammar and LangGraph are the real ones. The tokenizer is
the demo's, and in some tests the real one too, where GEMMA2_TOKENIZER names it.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing
from typing import Annotated, Any, Literal

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, ToolException, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import AfterValidator, BaseModel
from tiny import DEMO, Forwards, abandoned, random_gemma
from transformers import AutoTokenizer, DynamicCache, Gemma2ForCausalLM
from waiting import wait

from gemma2_stream import ChatGemma2, Gemma2Engine
from gemma2_stream.tools import call_text

Reply = Callable[[str], str]

QUESTION = "What is the weather in Paris?"
CALL = call_text("weather", {"city": "Paris"})
RESULT = '<tool_result>{"name": "weather", "content": "sunny in Paris"}</tool_result>'
ANSWER = "It is sunny in Paris."
LONG = "one two three four five " * 10


class TalkingGemma2(Gemma2ForCausalLM):
    """Gemma 2 that answers with `reply(what the last user turn says)`, and records what it reads.

    All of Gemma 2 runs; only the last position's logits are replaced.
    """

    tokenizer: Any
    header: list[int]  # what opens a turn of the model's
    reply: Reply
    read: list[list[int]]  # all ids of each request: its prompt, and its answer but the last id

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        prompt = self.prompt(self.read[-1])
        if prompt:
            answer = [*self._answer(prompt), self.config.eos_token_id[0]]
            step = min(len(self.read[-1]) - len(prompt), len(answer) - 1)
            output.logits[0, -1] = -30.0
            output.logits[0, -1, answer[step]] = 30.0
        return output

    def note(self, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Before a forward of the decoder, which alone reads all but the end of a long prompt."""
        cache = kwargs["cache"] if "cache" in kwargs else kwargs["past_key_values"]  # before 5.24
        if cache.get_seq_length() == 0:
            self.read.append([])
        self.read[-1] += kwargs["input_ids"][0].tolist()

    def prompt(self, ids: list[int]) -> list[int]:
        """The first part of `ids`, up to where the model's own turn begins."""
        size = len(self.header)
        ends = (n for n in range(len(ids), size - 1, -1) if ids[n - size : n] == self.header)
        return ids[: next(ends, 0)]

    def _answer(self, prompt: list[int]) -> list[int]:
        text = self.tokenizer.decode(prompt)
        turn = text.rpartition("<start_of_turn>user\n")[2].partition("<end_of_turn>")[0]
        return self.tokenizer.encode(self.reply(turn), add_special_tokens=False)


@pytest.fixture(scope="module")
def talker(request: pytest.FixtureRequest) -> Iterator[Gemma2Engine]:
    if getattr(request, "param", "demo") == "demo":
        tokenizer = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
    else:
        tokenizer = request.getfixturevalue("gemma_tokenizer")
    model = random_gemma(TalkingGemma2, vocab=len(tokenizer))
    model.tokenizer = tokenizer
    model.model.register_forward_pre_hook(model.note, with_kwargs=True)
    model.header = tokenizer.encode("<start_of_turn>model\n", add_special_tokens=False)
    # One request at a time, and all of it, so that the model can tell what it reads.
    options = {"max_rows": 1, "prefix_cache_bytes": 0}
    with Gemma2Engine(model, tokenizer, name="talking", **options) as engine:
        yield engine


@pytest.fixture
def chat(talker: Gemma2Engine) -> Iterator[ChatGemma2]:
    """Says "Yes." unless `says` tells it otherwise. Idle before and after each test."""
    talker.join()
    says(chat := ChatGemma2(engine=talker), lambda turn: "Yes.")
    talker.model.read = []
    yield chat
    talker.join()


def says(chat: ChatGemma2, reply: Reply) -> None:
    """From now on, the model's answer to a user turn that says `turn` is `reply(turn)`."""
    chat.engine.model.reply = reply


def prompts(chat: ChatGemma2) -> list[list[int]]:
    """The prompt ids of every request so far."""
    chat.engine.join()
    model = chat.engine.model
    return [model.prompt(ids) for ids in model.read]


def texts(chat: ChatGemma2) -> list[str]:
    return [chat.engine.tokenizer.decode(ids) for ids in prompts(chat)]


def template(chat: ChatGemma2, *turns: str) -> list[int]:
    """Prompt ids of user and assistant `turns` in alternation, by transformers' own template."""
    roles = [("user", "assistant")[number % 2] for number in range(len(turns))]
    said = [{"role": r, "content": text} for r, text in zip(roles, turns, strict=True)]
    encoded = chat.engine.tokenizer.apply_chat_template(said, add_generation_prompt=True)
    return list(encoded["input_ids"])


def pieces(chat: ChatGemma2, text: str) -> list[str]:
    """`text` as the tokens in which it streams, and the end of the turn, which has no text."""
    tokenizer = chat.engine.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [*map(tokenizer.decode, ids), ""]


@tool
def weather(city: str) -> str:
    """Tells the weather."""
    return f"sunny in {city}"


def asks_the_tool(turn: str) -> str:
    """Calls `weather` once, then answers with what it said."""
    return ANSWER if "<tool_result>" in turn else CALL


async def run(graph: Any, mode: str, given: Any, config: Any = None) -> dict[str, Any]:
    """The final state of a run, sync (on a thread) or async."""
    if mode == "sync":
        return await asyncio.to_thread(graph.invoke, given, config)
    return await graph.ainvoke(given, config)


def ask(text: str) -> dict[str, Any]:
    return {"messages": [HumanMessage(text)]}


BOTH = pytest.mark.parametrize("talker", ["demo", "gemma"], indirect=True)
BETA = pytest.mark.filterwarnings("ignore:The v3 streaming protocol")
MODES = pytest.mark.parametrize("mode", ["sync", "async"])


# The loop --------------------------------------------------------------------------------------


@BOTH
@MODES
async def test_an_agent_calls_its_tool_and_answers(chat: ChatGemma2, mode: str) -> None:
    """Question, call, result, answer; and the second prompt holds the first three."""
    says(chat, asks_the_tool)
    agent = create_agent(chat, [weather], system_prompt="Be kind.")

    state = await run(agent, mode, ask(QUESTION))

    question, call, result, answer = state["messages"]
    assert call.tool_calls[0] | {"id": ""} == {
        "name": "weather", "args": {"city": "Paris"}, "id": "", "type": "tool_call",
    }  # fmt: skip
    assert result.tool_call_id == call.tool_calls[0]["id"]
    assert (result.content, result.status) == ("sunny in Paris", "success")
    assert answer.content == ANSWER
    reasons = [message.response_metadata["finish_reason"] for message in (call, answer)]
    assert reasons == ["tool_calls", "stop"]

    first, second = prompts(chat)
    opening = texts(chat)[0].partition("user\n")[2].partition("<end_of_turn>")[0]
    assert opening.startswith("Be kind.")
    assert opening.endswith(question.content)
    assert first == template(chat, opening)
    assert second == template(chat, opening, CALL, RESULT)
    assert [m.usage_metadata["input_tokens"] for m in (call, answer)] == [len(first), len(second)]


@MODES
async def test_several_calls_of_one_answer_all_run(chat: ChatGemma2, mode: str) -> None:
    """Each gets its own result, and the model is told which is whose."""
    calls = [call_text("weather", {"city": city}) for city in ("Paris", "Rome")]
    says(chat, lambda turn: ANSWER if "<tool_result>" in turn else "\n".join(calls))

    state = await run(create_agent(chat, [weather]), mode, ask(QUESTION))

    _, call, *results, answer = state["messages"]
    assert [made["args"]["city"] for made in call.tool_calls] == ["Paris", "Rome"]
    assert [r.tool_call_id for r in results] == [made["id"] for made in call.tool_calls]
    assert answer.content == ANSWER
    turn = texts(chat)[1].rpartition("user\n")[2]
    assert '"arguments": {"city": "Paris"}, "content": "sunny in Paris"' in turn
    assert '"arguments": {"city": "Rome"}, "content": "sunny in Rome"' in turn


def _even(value: int) -> int:
    if value % 2:
        raise ValueError("is odd")
    return value


@tool
def halve(number: Annotated[int, AfterValidator(_even)]) -> int:
    """Halves an even number."""
    return number // 2


@tool
def closed() -> str:
    """Is closed."""
    raise ToolException("closed today")


closed.handle_tool_error = True


@MODES
@pytest.mark.parametrize(
    ("failing", "call", "why"),
    [
        (closed, call_text("closed", {}), "closed today"),
        (halve, call_text("halve", {"number": 3}), "is odd"),  # what no grammar holds
    ],
)
async def test_a_tool_that_fails_comes_back_to_the_model(
    chat: ChatGemma2, mode: str, failing: BaseTool, call: str, why: str
) -> None:
    """As a result whose status says so, from which the model goes on."""
    says(chat, lambda turn: "A pity." if '"status": "error"' in turn else call)

    state = await run(create_agent(chat, [failing]), mode, ask("Try."))

    _, _, result, answer = state["messages"]
    assert result.status == "error"
    assert why in result.content
    assert answer.content == "A pity."
    assert why in texts(chat)[1].rpartition("user\n")[2]


# Tokens, live ------------------------------------------------------------------------------------


def graph_of(node: Callable[..., Any], **options: Any) -> Any:
    """A graph with one node."""
    return StateGraph(MessagesState).add_node("node", node).add_edge(START, "node").compile(
        **options
    )  # fmt: skip


def sync_node(chat: ChatGemma2) -> Callable[[MessagesState], dict[str, Any]]:
    return lambda state: {"messages": [chat.invoke(state["messages"])]}


def async_node(chat: ChatGemma2) -> Callable[[MessagesState], Any]:
    async def node(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await chat.ainvoke(state["messages"])]}

    return node


async def next_token(stream: Any) -> str:
    """The text of the next message chunk of a graph's stream, sync (on a thread) or async."""
    if hasattr(stream, "__anext__"):
        message, _ = await anext(stream)
    else:
        message, _ = await asyncio.to_thread(next, stream)
    return message.text


NODES = pytest.mark.parametrize(
    ("node", "streaming"),
    [(sync_node, "stream"), (sync_node, "astream"), (async_node, "astream")],
    ids=["sync", "sync-in-async", "async"],
)


@BOTH
@NODES
async def test_a_node_that_only_invokes_streams_its_tokens(
    chat: ChatGemma2,
    forwards: Callable[[Gemma2Engine], Forwards],
    node: Callable[[ChatGemma2], Any],
    streaming: str,
) -> None:
    """Each as it is made: four have arrived while the model is held inside its fifth forward."""
    says(chat, lambda turn: ANSWER)
    watch = forwards(chat.engine)
    reached, release = watch.gate(5)
    stream = getattr(graph_of(node(chat)), streaming)(ask("Hi"), stream_mode="messages")

    early = [await next_token(stream) for _ in range(4)]
    await asyncio.to_thread(wait, reached)
    assert watch.count == 5
    release.set()
    late = [token async for token in rest(stream)]

    assert early + late == pieces(chat, ANSWER)


async def rest(stream: Any) -> Any:
    """What is left of a stream of message chunks, as text."""
    if hasattr(stream, "__anext__"):
        async for message, _ in stream:
            yield message.text
    else:
        for message, _ in await asyncio.to_thread(list, stream):
            yield message.text


@BOTH
@MODES
async def test_an_agents_stream_holds_every_token(chat: ChatGemma2, mode: str) -> None:
    """Of its call in parts, of its answer token by token; the parts add up to the messages."""
    says(chat, asks_the_tool)
    agent = create_agent(chat, [weather])
    streamed: list[tuple[BaseMessage, Any]] = []
    final: dict[str, Any] = {}
    modes = ["messages", "values"]
    if mode == "sync":
        items = await asyncio.to_thread(
            lambda: list(agent.stream(ask(QUESTION), stream_mode=modes))
        )
    else:
        items = [item async for item in agent.astream(ask(QUESTION), stream_mode=modes)]
    for kind, item in items:
        if kind == "messages":
            streamed.append(item)
        else:
            final = item

    by_node = {node: [m for m, about in streamed if about["langgraph_node"] == node]
               for node in ("model", "tools")}  # fmt: skip
    ids = dict.fromkeys(message.id for message in by_node["model"])
    parts = [[m for m in by_node["model"] if m.id == each] for each in ids]
    call, answer = (functools.reduce(lambda a, b: a + b, each) for each in parts)
    assert len([m for m in parts[0] if m.tool_call_chunks]) > 5
    assert [message.text for message in parts[1]] == pieces(chat, ANSWER)
    assert all(isinstance(message, AIMessageChunk) for message in by_node["model"])
    assert [message.content for message in by_node["tools"]] == ["sunny in Paris"]

    _, stored_call, _, stored_answer = final["messages"]
    for whole, stored in ((call, stored_call), (answer, stored_answer)):
        for name in ("id", "content", "tool_calls", "usage_metadata", "response_metadata"):
            assert getattr(whole, name) == getattr(stored, name)


@BETA
@BOTH
@MODES
async def test_the_v3_events_of_an_agent_hold_every_token(chat: ChatGemma2, mode: str) -> None:
    """`stream_events(version="v3")` gives each message as a stream of its own."""
    says(chat, asks_the_tool)
    agent = create_agent(chat, [weather])

    def sync() -> list[tuple[list[str], AIMessage]]:
        stream = agent.stream_events(ask(QUESTION), version="v3")
        return [(list(message.text), message.output) for message in stream.messages]

    if mode == "sync":
        call, answer = await asyncio.to_thread(sync)
    else:
        run = await agent.astream_events(ask(QUESTION), version="v3")
        call, answer = [
            ([text async for text in message.text], await message.output)
            async for message in run.messages
        ]
    assert call[0] == []
    assert call[1].tool_calls[0]["args"] == {"city": "Paris"}
    assert answer[0] == pieces(chat, ANSWER)[:-1]
    assert answer[1].text == ANSWER


# Structured answers ------------------------------------------------------------------------------


class Report(BaseModel):
    """A weather report."""

    city: Literal["Paris", "Rome"]
    sunny: bool


REPORT = '{"city": "Rome", "sunny": true}'


@MODES
@pytest.mark.parametrize("wrap", [lambda schema: schema, ProviderStrategy])
@pytest.mark.parametrize("answer", [REPORT, "I would rather chat."])
async def test_an_agent_answers_in_the_shape_it_is_asked_for(
    chat: ChatGemma2, mode: str, wrap: Callable[[type], Any], answer: str
) -> None:
    """By `response_format`, which a bare schema gets too; also where the weights would not."""
    says(chat, lambda turn: answer)

    state = await run(create_agent(chat, response_format=wrap(Report)), mode, ask(QUESTION))

    report = state["structured_response"]
    assert isinstance(report, Report)
    assert Report.model_validate_json(state["messages"][-1].text) == report
    assert not state["messages"][-1].tool_calls
    assert report == Report(city="Rome", sunny=True) or answer != REPORT


@BOTH
@MODES
@pytest.mark.parametrize("strategy", [ProviderStrategy, ToolStrategy])
async def test_an_agent_calls_tools_before_it_answers_in_shape(
    chat: ChatGemma2, mode: str, strategy: Callable[[type], Any]
) -> None:
    """The loop runs on until the object comes, as an answer or as the call of a tool of its own."""
    shaped = call_text("Report", {"city": "Rome", "sunny": True})
    said = REPORT if strategy is ProviderStrategy else shaped
    says(chat, lambda turn: said if "<tool_result>" in turn else CALL)
    agent = create_agent(chat, [weather], response_format=strategy(Report))

    state = await run(agent, mode, ask(QUESTION))

    assert state["structured_response"] == Report(city="Rome", sunny=True)
    tools = [message.name for message in state["messages"] if message.type == "tool"]
    assert tools == ["weather"] if strategy is ProviderStrategy else ["weather", "Report"]


@pytest.mark.parametrize("answer", [call_text("Report", {"city": "Rome", "sunny": True}), "No."])
def test_a_tool_strategy_forces_one_call(chat: ChatGemma2, answer: str) -> None:
    """Whatever the weights would say, one object comes, of that shape."""
    says(chat, lambda turn: answer)
    state = create_agent(chat, response_format=ToolStrategy(Report)).invoke(ask(QUESTION))
    assert isinstance(state["structured_response"], Report)
    assert [call["name"] for call in state["messages"][1].tool_calls] == ["Report"]


class Even(BaseModel):
    """An even number."""

    number: Annotated[int, AfterValidator(_even)]


def test_an_object_that_fails_its_own_check_is_asked_for_again(chat: ChatGemma2) -> None:
    """ToolStrategy sends back what no grammar holds, and the model repairs it."""
    says(chat, lambda turn: call_text("Even", {"number": 4 if "is odd" in turn else 3}))
    state = create_agent(chat, response_format=ToolStrategy(Even)).invoke(ask("A number?"))
    assert state["structured_response"] == Even(number=4)
    assert len(prompts(chat)) == 2


# Memory ------------------------------------------------------------------------------------------


@BOTH
@MODES
async def test_a_thread_remembers_and_others_do_not_know(chat: ChatGemma2, mode: str) -> None:
    """The second prompt's ids are the whole conversation's, those of another thread its own."""
    says(chat, lambda turn: f"You said: {turn}")
    agent = create_agent(chat, checkpointer=InMemorySaver())
    mine: RunnableConfig = {"configurable": {"thread_id": "mine"}}
    other: RunnableConfig = {"configurable": {"thread_id": "other"}}

    await run(agent, mode, ask("I am Ann."), mine)
    await run(agent, mode, ask("I am Bob."), other)
    state = await run(agent, mode, ask("Who am I?"), mine)

    assert [message.content for message in state["messages"]] == [
        "I am Ann.", "You said: I am Ann.", "Who am I?", "You said: Who am I?",
    ]  # fmt: skip
    assert prompts(chat) == [
        template(chat, "I am Ann."),
        template(chat, "I am Bob."),
        template(chat, "I am Ann.", "You said: I am Ann.", "Who am I?"),
    ]


@MODES
async def test_two_threads_of_one_agent_at_once_do_not_mix(chat: ChatGemma2, mode: str) -> None:
    """Both are inside their tools before either goes on; each hears its own result."""
    cities = {"mine": "Paris", "other": "Rome"}
    both = threading.Barrier(2, timeout=60)

    @tool
    def weather(city: str) -> str:
        """Tells the weather, when both have asked."""
        both.wait()
        return f"sunny in {city}"

    def reply(turn: str) -> str:
        (city,) = (city for city in cities.values() if city in turn)
        answered = "<tool_result>" in turn
        return f"It is sunny in {city}." if answered else call_text("weather", {"city": city})

    says(chat, reply)
    agent = create_agent(chat, [weather], checkpointer=InMemorySaver())

    async def one(thread: str, city: str) -> list[str]:
        config = {"configurable": {"thread_id": thread}}
        state = await run(agent, mode, ask(f"And in {city}?"), config)
        return [message.content for message in state["messages"]]

    for _ in range(2):
        ends = await asyncio.gather(*[one(*each) for each in cities.items()])
    for city, contents in zip(cities.values(), ends, strict=True):
        assert contents == [
            f"And in {city}?", "", f"sunny in {city}", f"It is sunny in {city}.",
        ] * 2  # fmt: skip


SUMMARY = "They spoke of Paris."


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "default"])
@MODES
async def test_a_long_conversation_is_summarized_by_the_profile(
    chat: ChatGemma2, mode: str, exact: bool
) -> None:
    """At a fraction of the context, counted in our tokens or by LangChain's estimate."""

    def reply(turn: str) -> str:
        return SUMMARY if "<messages>" in turn else "Yes."

    says(chat, reply)
    assert chat.profile is not None
    assert chat.profile["max_input_tokens"] == chat.engine.context_length - 1
    history: list[Any] = [HumanMessage("Paris? " * 300), AIMessage("Yes."), HumanMessage("And?")]
    counter: dict[str, Any] = {}
    share = 0.05
    if exact:
        counter["token_counter"] = chat.get_num_tokens_from_messages
        # Just what it counts: one token less would be too few.
        share = (chat.get_num_tokens_from_messages(history) + 0.5) / (
            chat.profile["max_input_tokens"]
        )
    middleware = SummarizationMiddleware(
        chat, trigger=("fraction", share), keep=("messages", 1), **counter
    )
    agent = create_agent(chat, middleware=[middleware])

    short = await run(agent, mode, {"messages": history[1:]})
    long = await run(agent, mode, {"messages": history})

    assert len(short["messages"]) == 3
    summary, kept, answer = long["messages"]
    assert SUMMARY in summary.content
    assert (kept.content, answer.content) == ("And?", "Yes.")
    assert prompts(chat)[-1] == template(chat, f"{summary.content}\n\nAnd?")


# Stopping ----------------------------------------------------------------------------------------


@pytest.fixture
def watch(
    chat: ChatGemma2,
    forwards: Callable[[Gemma2Engine], Forwards],
    new_caches: Callable[[], list[DynamicCache]],
) -> Iterator[Forwards]:
    """Answers go on for long; afterwards the engine is idle, and right about the next question."""
    says(chat, lambda turn: LONG)
    watching = forwards(chat.engine)
    yield watching
    assert watching.count <= 7
    assert not new_caches()
    says(chat, lambda turn: ANSWER)
    assert chat.invoke("Again?").content == ANSWER


async def end(chat: ChatGemma2, release: threading.Event) -> None:
    """Let the held forward go, and wait until the engine is idle."""
    await asyncio.to_thread(abandoned, chat.engine)
    release.set()
    await asyncio.to_thread(chat.engine.join)


def agent_of(chat: ChatGemma2) -> Any:
    return create_agent(chat, [weather], checkpointer=InMemorySaver())


GRAPHS = pytest.mark.parametrize("graph", [agent_of, lambda chat: graph_of(async_node(chat))],
                                 ids=["agent", "node"])  # fmt: skip
THREAD: RunnableConfig = {"configurable": {"thread_id": "1"}}


@BOTH
@GRAPHS
@pytest.mark.parametrize("path", ["ainvoke", "messages", "updates", "astream_events"])
async def test_a_cancelled_run_stops_the_model(
    chat: ChatGemma2, watch: Forwards, graph: Callable[[ChatGemma2], Any], path: str
) -> None:
    """Cancelled while the model is inside its sixth forward, it makes no second further."""
    reached, release = watch.gate(6)

    async def work() -> None:
        if path == "ainvoke":
            await graph(chat).ainvoke(ask(QUESTION), THREAD)
        elif path == "astream_events":
            async for _ in graph(chat).astream_events(ask(QUESTION), THREAD, version="v2"):
                pass
        else:
            async for _ in graph(chat).astream(ask(QUESTION), THREAD, stream_mode=path):
                pass

    task = asyncio.create_task(work())
    await asyncio.to_thread(wait, reached)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await end(chat, release)


@GRAPHS
@pytest.mark.parametrize("how", ["aclose", "break"])
async def test_leaving_an_async_stream_stops_the_model(
    chat: ChatGemma2, watch: Forwards, graph: Callable[[ChatGemma2], Any], how: str
) -> None:
    """By closing it, or by dropping it half way."""
    reached, release = watch.gate(6)
    stream = graph(chat).astream(ask(QUESTION), THREAD, stream_mode="messages")
    if how == "aclose":
        async with aclosing(stream):
            async for _ in stream:
                await asyncio.to_thread(wait, reached)
                break
    else:
        async for _ in stream:
            await asyncio.to_thread(wait, reached)
            break
        del stream
    await end(chat, release)


@BETA
@GRAPHS
async def test_aborting_a_v3_run_stops_the_model(
    chat: ChatGemma2, watch: Forwards, graph: Callable[[ChatGemma2], Any]
) -> None:
    """Half way through its first message."""
    reached, release = watch.gate(6)
    run = await graph(chat).astream_events(ask(QUESTION), THREAD, version="v3")
    async for message in run.messages:
        async for _ in message.text:
            await asyncio.to_thread(wait, reached)
            break
        break
    await run.abort()
    await end(chat, release)


@GRAPHS
async def test_a_step_that_takes_too_long_stops_the_model(
    chat: ChatGemma2, watch: Forwards, graph: Callable[[ChatGemma2], Any]
) -> None:
    """LangGraph's own time limit on a step cancels the node, and so the model."""
    _, release = watch.gate(6)
    limited = graph(chat)
    limited.step_timeout = 0.5
    with pytest.raises(TimeoutError):
        await limited.ainvoke(ask(QUESTION), THREAD)
    await end(chat, release)


class Enough(Exception):
    """What a handler raises to stop a run."""


class StopAfter(BaseCallbackHandler):
    """Raises at the second token, when `ready` says so."""

    raise_error = True

    def __init__(self, ready: Callable[[], object]) -> None:
        self.ready = ready
        self.seen = 0

    def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
        self.seen += 1
        if self.seen == 2:
            self.ready()
            raise Enough


@MODES
async def test_a_handler_that_raises_stops_a_run(
    chat: ChatGemma2, watch: Forwards, mode: str
) -> None:
    """The way to stop a sync run from outside; its exception reaches the caller."""
    reached, release = watch.gate(6)
    config = THREAD | {"callbacks": [StopAfter(lambda: wait(reached))]}
    with pytest.raises(Enough):
        await run(agent_of(chat), mode, ask(QUESTION), config)
    await end(chat, release)


@pytest.mark.xfail(
    reason="LangGraph runs the nodes of a sync stream on threads, and closing it waits for them "
    "(BackgroundExecutor.__exit__); no node is told. Use astream, or a handler that raises",
    raises=AssertionError,
)
def test_leaving_a_sync_stream_stops_the_model(
    chat: ChatGemma2, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """As it does for a stream of the model itself."""
    says(chat, lambda turn: LONG)
    watch = forwards(chat.engine)
    reached, release = watch.gate(6)
    with closing(agent_of(chat).stream(ask(QUESTION), THREAD, stream_mode="messages")) as stream:
        next(stream)
        wait(reached)
        release.set()
    chat.engine.join()
    assert watch.count <= 7


@pytest.mark.xfail(
    reason="LangGraph runs a sync node of an async run on a thread, which no cancelling reaches; "
    "an async node, as create_agent's own is, is cancelled",
    raises=AssertionError,
)
async def test_cancelling_an_async_run_of_a_sync_node_stops_the_model(
    chat: ChatGemma2, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """As it does where the node awaits."""
    says(chat, lambda turn: LONG)
    watch = forwards(chat.engine)
    reached, release = watch.gate(6)
    task = asyncio.create_task(graph_of(sync_node(chat)).ainvoke(ask(QUESTION)))
    await asyncio.to_thread(wait, reached)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    release.set()
    await asyncio.to_thread(chat.engine.join)
    assert watch.count <= 7


async def test_a_run_goes_on_after_it_was_cancelled(chat: ChatGemma2, watch: Forwards) -> None:
    """The thread holds what was asked, and asked again it is answered."""
    reached, release = watch.gate(6)
    agent = agent_of(chat)
    task = asyncio.create_task(agent.ainvoke(ask(QUESTION), THREAD))
    await asyncio.to_thread(wait, reached)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await end(chat, release)

    assert watch.count <= 7
    watch.count = -1000  # what follows is wanted
    says(chat, asks_the_tool)
    state = await agent.ainvoke(None, THREAD)
    assert [message.content for message in state["messages"]] == [
        QUESTION, "", "sunny in Paris", ANSWER,
    ]  # fmt: skip
