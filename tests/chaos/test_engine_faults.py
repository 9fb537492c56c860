"""A thousand faults on one engine after the other, with requests beside them that must be right.

Seeds fix who asks what and what fails at which step; how the threads meet is new each time. The
name of a failing test has its seed, and what it says the thread and the number of the fault.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from census import all_back, nothing_left  # noqa: F401  # a fixture, found by being imported
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from tiny import greedy, random_gemma

from gemma2_stream import (
    EngineBusyError,
    EngineClosedError,
    Gemma2Engine,
    Gemma2LLM,
    GenerationTimeoutError,
    GrammarError,
    ParameterError,
    PromptTooLongError,
    Request,
    SamplingParams,
    TokenStream,
)

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("nothing_left")]

SEEDS = range(10)
THREADS, EACH = 5, 20  # of those that make trouble, and faults of each: with the seeds, a thousand
WELL = 2  # threads that ask beside them for as long as they do
MOST = 8  # tokens
LAYERS = 2
KINDS: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 7}]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_rows": 3, "prefix_cache_bytes": 200_000},
    {"max_cached_tokens": 1_000, "prefix_cache_bytes": 0},
    {"prompt_lookup_num_tokens": 3},
    {"max_rows": 1},
]
# Nine letters, and then what no answer can be, which is found out there.
ENDLESS = """start: /[a-z]{9}/ json
json: %json {
  "$defs": {"N": {
    "type": "object", "properties": {"n": {"$ref": "#/$defs/N"}}, "required": ["n"],
    "additionalProperties": false
  }},
  "$ref": "#/$defs/N", "x-guidance": {"whitespace_flexible": false}
}"""


class Injected(Exception):
    """What breaks a forward, a callback or a reader."""


ERRORS: list[Callable[[str], Exception]] = [
    Injected,
    RuntimeError,
    MemoryError,
    torch.OutOfMemoryError,
    torch.OutOfMemoryError,
    StopIteration,
    KeyError,
]


class Asked:
    """Prompts, and what an engine says to each that has nothing else to do:
    `texts[prompt, kind][n]` is the text of n tokens.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.spare = copy.deepcopy(model)  # without the hooks
        dice = random.Random(0)
        base = [2, *(dice.randrange(300, 4_000) for _ in range(500))]
        cut = {"prompts": [1, 30, 100, 150], "doomed": [200 + 60 * n for n in range(THREADS)]}
        with Gemma2Engine(model, tokenizer, max_rows=1, prefix_cache_bytes=0) as alone:
            self.words = ["Hello", "What is a token?", "你是谁"]
            self.spoken = [tuple(alone.encode(word)) for word in self.words]
            self.prompts, self.doomed = (
                [(*base[:n], *(dice.randrange(300, 4_000) for _ in range(4))) for n in cuts]
                for cuts in cut.values()
            )
            self.texts: dict[tuple[tuple[int, ...], int], list[str]] = {}
            for prompt in [*self.prompts, *self.doomed, *self.spoken]:
                for number, kind in enumerate(KINDS):
                    ids = chosen(alone, prompt, kind)
                    assert number or ids == greedy(alone, [*prompt], MOST)
                    self.texts[prompt, number] = [
                        tokenizer.decode(ids[:n]) for n in range(MOST + 1)
                    ]


def chosen(engine: Gemma2Engine, prompt: tuple[int, ...], kind: dict[str, Any]) -> list[int]:
    """The first ids of its answer, which the model is fed to make one more."""
    fed: list[int] = []
    table = engine.model.get_input_embeddings()
    handle = table.register_forward_pre_hook(lambda _, args: fed.append(int(args[0][0, -1])))
    said(engine, prompt, kind, MOST + 1)
    handle.remove()
    return fed[-MOST:]


def said(engine: Gemma2Engine, prompt: tuple[int, ...], kind: dict[str, Any], tokens: int) -> str:
    request = Request(prompt, SamplingParams(max_new_tokens=tokens, **kind))
    return "".join(chunk.text for chunk in engine.submit([request]))


class Breakdown:
    """Hooks on the real modules, which raise when a row has become as long as was planned. Prompts
    that are to fail are longer than all others, each thread's by another length.
    """

    def __init__(self, model: Any) -> None:
        self._plans: dict[range, tuple[int, int, BaseException, bool]] = {}
        self._due = threading.local()
        decoder = model.get_decoder()
        self._handles = [decoder.register_forward_pre_hook(self._before, with_kwargs=True)]
        for number, layer in enumerate(decoder.layers):
            hook = lambda *_, number=number: self._within(number)  # noqa: E731
            self._handles.append(layer.register_forward_hook(hook))

    def plan(self, length: int, layer: int, error: BaseException, *, once: bool) -> range:
        """From `length` tokens on, fail behind `layer`, whose keys and values are stored then."""
        lengths = range(length, length + 50)
        self._plans[lengths] = (length, layer, error, once)
        return lengths

    def forget(self, lengths: range) -> None:
        self._plans.pop(lengths, None)

    def _before(self, module: Any, args: Any, kwargs: Any) -> None:
        places = kwargs.get("position_ids")
        if places is None:  # a lone row, whose cache says where it is
            width = kwargs["input_ids"].shape[1]
            cache = kwargs["cache" if "cache" in kwargs else "past_key_values"]  # renamed in 5.24
            lengths = [cache.get_seq_length() + width]
        else:
            lengths = (places[:, -1] + 1).tolist()
        due = (p for p in [*self._plans] if any(length in p for length in lengths))
        self._due.plan = next(due, None)

    def _within(self, layer: int) -> None:
        planned = self._plans.get(self._due.plan)
        if planned is not None and planned[1] == layer:
            if planned[3]:
                self.forget(self._due.plan)
            raise planned[2]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@dataclass
class Caller:
    """One thread of those that ask. Each fault is a method, and asserts what must come of it."""

    number: int
    dice: random.Random
    engine: Gemma2Engine
    asked: Asked
    breakdown: Breakdown
    abandoned: list[TokenStream] = field(default_factory=list)

    # Those who behave ------------------------------------------------------------------------

    def request(self, prompt: tuple[int, ...] | None = None) -> tuple[Request, list[str]]:
        """One of some length, with what is right for it by tokens."""
        prompt = prompt or self.dice.choice(self.asked.prompts)
        kind, tokens = self.dice.randrange(len(KINDS)), self.dice.randint(2, MOST)
        params = SamplingParams(max_new_tokens=tokens, **KINDS[kind])
        return Request(prompt, params), self.asked.texts[prompt, kind][: tokens + 1]

    def well(self) -> None:
        """A healthy request, by one of many ways."""
        self.dice.choice([self.rows, self.invoke, self.batch, self.astream])()

    def rows(self) -> None:
        asked = [self.request() for _ in range(self.dice.choice([1, 1, 3]))]
        texts = [""] * len(asked)
        with self.engine.submit([request for request, _ in asked]) as stream:
            for chunk in stream:
                texts[chunk.index] += chunk.text
        assert texts == [right[-1] for _, right in asked]

    def llm(self) -> tuple[Gemma2LLM, str, str]:
        """A model, a prompt for it, and what it must say."""
        kind, which = self.dice.randrange(len(KINDS)), self.dice.randrange(len(self.asked.words))
        llm = Gemma2LLM(engine=self.engine, max_new_tokens=MOST, **KINDS[kind])
        return llm, self.asked.words[which], self.asked.texts[self.asked.spoken[which], kind][MOST]

    def invoke(self) -> None:
        llm, word, right = self.llm()
        assert llm.invoke(word) == right

    def batch(self) -> None:
        llm, word, right = self.llm()
        assert llm.batch([word] * 2) == [right] * 2

    def astream(self) -> None:
        llm, word, right = self.llm()

        async def read() -> str:
            return "".join([text async for text in llm.astream(word)])

        assert asyncio.run(read()) == right

    # Forwards that fail ----------------------------------------------------------------------

    def forward_fails(self) -> None:
        """At every try: the row gets the error itself, from whichever layer and step."""
        self._break(once=False)

    def forward_fails_once(self) -> None:
        """Beside others the row is begun anew; alone it gets the error."""
        self._break(once=True)

    def _break(self, *, once: bool) -> None:
        request, right = self.request(self.asked.doomed[self.number])
        length = len(request.prompt_ids) + self.dice.randrange(-30, len(right) - 1)
        error = self.dice.choice(ERRORS)("injected")
        lengths = self.breakdown.plan(length, self.dice.randrange(LAYERS), error, once=once)
        text, failed = "", False
        try:
            for chunk in self.engine.submit([request]):
                text += chunk.text
        except Exception as raised:
            failed = "injected" in repr((raised, raised.__cause__))  # a StopIteration is wrapped
        finally:
            self.breakdown.forget(lengths)
        assert right[-1].startswith(text)
        assert failed or (once and text == right[-1])

    def grammar_fails(self) -> None:
        """In the middle of an answer, one that outgrows what can be computed."""
        request = Request(self.asked.spoken[0], SamplingParams(max_new_tokens=20), ENDLESS)
        with pytest.raises(GrammarError, match="cannot be followed"):
            list(self.engine.submit([request]))

    # Callers that fail -----------------------------------------------------------------------

    def handler_raises(self) -> None:
        llm, word, right = self.llm()
        handler = self._handler(BaseCallbackHandler)
        call = self.dice.choice(
            [lambda c: list(llm.stream(word, c)), lambda c: llm.invoke(word, c)]
        )
        with pytest.raises(Injected):
            call({"callbacks": [handler]})
        assert right.startswith(handler.text)

    def async_handler_raises(self) -> None:
        llm, word, right = self.llm()
        handler = self._handler(AsyncCallbackHandler)
        with pytest.raises(Injected):
            asyncio.run(llm.ainvoke(word, {"callbacks": [handler]}))
        assert right.startswith(handler.text)

    def _handler(self, base: type) -> Any:
        at = self.dice.randint(1, 4)

        class Raising(base):  # type: ignore[misc]
            raise_error = run_inline = True
            text, seen = "", 0

            def take(self, token: str) -> None:
                self.seen += 1
                if self.seen == at:
                    raise Injected
                self.text += token

        def sync(self: Any, token: str, **_: Any) -> None:
            self.take(token)

        async def asynchronous(self: Any, token: str, **_: Any) -> None:
            self.take(token)

        Raising.on_llm_new_token = sync if base is BaseCallbackHandler else asynchronous
        return Raising()

    def reader_raises(self) -> None:
        request, _ = self.request()
        with pytest.raises(Injected), self.engine.submit([request]) as stream:  # noqa: PT012
            next(stream)
            raise Injected

    # Callers that leave ----------------------------------------------------------------------

    def cancelled_before(self) -> None:
        self._cancel(0)

    def cancelled_during(self) -> None:
        self._cancel(self.dice.randint(1, MOST))

    def cancelled_after(self) -> None:
        self._cancel(2 * MOST)

    def _cancel(self, at: int) -> None:
        """Its reader still gets what was made, exactly, and the verdict."""
        request, right = self.request()
        stream = self.engine.submit([request])
        chunks = [*itertools.islice(stream, at)]
        stream.cancel()
        chunks += stream
        stream.cancel()
        *_, last = chunks
        assert last.usage is not None
        assert last.finish_reason in ("cancelled", "length")
        assert "".join(chunk.text for chunk in chunks) == right[last.usage.completion_tokens]

    def dropped(self) -> None:
        """Without a word, in a circle that only the garbage collector finds."""
        stream = self.engine.submit([self.request()[0] for _ in range(2)])
        if self.dice.random() < 0.7:
            next(stream)
        circle: list[Any] = [stream]
        circle.append(circle)

    def never_read(self) -> None:
        """Nobody reads, and nobody lets go, as long as this thread runs."""
        self.abandoned.append(self.engine.submit([self.request()[0]]))

    def slow(self) -> None:
        """Between two chunks, a whole other answer."""
        request, right = self.request()
        text = ""
        for number, chunk in enumerate(self.engine.submit([request])):
            if number < 2:
                self.well()
            text += chunk.text
        assert text == right[-1]

    def task_cancelled(self) -> None:
        llm, word, right = self.llm()
        at, text = self.dice.randint(0, 5), ""

        async def read() -> None:
            nonlocal text
            async for chunk in llm.astream(word):
                text += chunk
                if len(text) > at:
                    reading.set()

        async def main() -> None:
            task = asyncio.create_task(read())
            if at:
                await reading.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        reading = asyncio.Event()
        asyncio.run(main())
        assert right.startswith(text)

    def loop_closed(self) -> None:
        """The event loop is gone, and the model in the middle of answers for it."""

        async def main() -> None:
            streams = [self.engine.submit([self.request()[0]]) for _ in range(2)]
            async for _ in streams[0]:
                break
            self.abandoned += streams

        asyncio.run(main())

    def late(self) -> None:
        request, right = self.request()
        params = request.params.override(timeout=self.dice.choice([1e-6, 1e-3, 5e-3]))
        text = ""
        try:
            for chunk in self.engine.submit([Request(request.prompt_ids, params)]):
                text += chunk.text
        except GenerationTimeoutError:
            assert right[-1].startswith(text)
        else:
            assert text == right[-1]

    # What is refused, and engines that close ---------------------------------------------------

    def refused(self) -> None:
        wrong: list[tuple[type[Exception], Request]] = [
            (PromptTooLongError, Request((2,) * 10_000, SamplingParams())),
            (ParameterError, Request((), SamplingParams())),
            (ParameterError, Request((2,), SamplingParams(stop=("a<end_of_turn>",)))),
            (GrammarError, Request((2,), SamplingParams(), "no grammar")),
        ]
        error, request = self.dice.choice(wrong)
        asked, right = self.request()
        with pytest.raises(error):
            self.engine.submit([asked, request])
        beside, refused = self.engine.submit_each([asked, request])
        assert "".join(chunk.text for chunk in beside) == right[-1]
        with pytest.raises(error):
            list(refused)

    def closed(self) -> None:
        """An engine of its own: what it had begun ends with an error, or was whole before."""
        model = copy.deepcopy(self.asked.spare)
        options = {**self.dice.choice(OPTIONS), "max_waiting": self.dice.choice([None, 1])}
        engine = Gemma2Engine(model, self.engine.tokenizer, name="closing", **options)
        asked = [self.request() for _ in range(4)]
        streams = engine.submit_each([request for request, _ in asked])
        for _ in range(self.dice.randrange(6)):
            next(streams[0], None)
        closing = [threading.Thread(target=engine.close) for _ in range(2)]
        for thread in closing:
            thread.start()
        for stream, (_, right) in zip(streams[1:], asked[1:], strict=True):
            text = ""
            try:
                for chunk in stream:
                    text += chunk.text
            except (EngineClosedError, EngineBusyError):
                assert right[-1].startswith(text)
            else:
                assert text == right[-1]
        for thread in closing:
            thread.join()
        with pytest.raises(EngineClosedError):
            engine.submit([asked[0][0]])


FAULTS: list[Callable[[Caller], None]] = [
    Caller.forward_fails,
    Caller.forward_fails,
    Caller.forward_fails_once,
    Caller.forward_fails_once,
    Caller.grammar_fails,
    Caller.handler_raises,
    Caller.async_handler_raises,
    Caller.reader_raises,
    Caller.cancelled_before,
    Caller.cancelled_during,
    Caller.cancelled_during,
    Caller.cancelled_after,
    Caller.dropped,
    Caller.never_read,
    Caller.slow,
    Caller.task_cancelled,
    Caller.loop_closed,
    Caller.late,
    Caller.refused,
    Caller.closed,
]


@pytest.fixture(scope="module")
def model() -> Any:
    return random_gemma(vocab=4_096, num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def asked(model: Any, demo_engine: Gemma2Engine) -> Asked:
    return Asked(model, demo_engine.tokenizer)


@pytest.fixture
def breakdown(model: Any) -> Iterator[Breakdown]:
    breakdown = Breakdown(model)
    yield breakdown
    breakdown.remove()


class Round:
    """Callers in threads of their own, and what went wrong."""

    def __init__(self, callers: Sequence[Caller]) -> None:
        self.wrong: list[str] = []
        self._over = threading.Event()
        self._trouble = [self._thread(self._make_trouble, c) for c in callers[:THREADS]]
        self._well = [self._thread(self._behave, c) for c in callers[THREADS:]]

    def _thread(self, work: Callable[[Caller], None], caller: Caller) -> threading.Thread:
        return threading.Thread(target=work, args=(caller,))

    def run(self) -> None:
        for thread in (*self._trouble, *self._well):
            thread.start()
        for thread in self._trouble:
            thread.join()
        self._over.set()
        for thread in self._well:
            thread.join()

    def _make_trouble(self, caller: Caller) -> None:
        for number in range(EACH):
            self._attempt(caller, f"fault {number}", caller.dice.choice(FAULTS))
        caller.abandoned.clear()

    def _behave(self, caller: Caller) -> None:
        while not self._over.is_set():
            self._attempt(caller, "healthy", Caller.well)

    def _attempt(self, caller: Caller, name: str, what: Callable[[Caller], None]) -> None:
        try:
            what(caller)
        except BaseException as error:
            self.wrong.append(f"thread {caller.number}, {name}, {what.__name__}: {error!r}")


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_fails_all_others_are_right(
    seed: int, model: Any, asked: Asked, breakdown: Breakdown, demo_engine: Gemma2Engine
) -> None:
    name, options = f"seed {seed}", OPTIONS[seed % len(OPTIONS)]
    with Gemma2Engine(model, demo_engine.tokenizer, name=name, **options) as engine:
        callers = [
            Caller(number, random.Random(1_000 * seed + number), engine, asked, breakdown)
            for number in range(THREADS + WELL)
        ]
        callers[0].grammar_fails()  # what an engine makes for the first, it keeps
        with all_back(engine):
            faults = Round(callers)
            faults.run()
        assert not faults.wrong, "\n".join(faults.wrong)
        callers[0].rows()
