"""The engine by itself: batches, many callers, seeds, limits, closing, forking, leaving."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterable, Callable

import pytest
import torch
from either import Either
from langchain_core.runnables import RunnableLambda
from tiny import Forwards, greedy, reference
from waiting import wait

from gemma2_stream import (
    Engine,
    EngineClosedError,
    Gemma2Engine,
    Gemma2LLM,
    GenerationTimeoutError,
    ParameterError,
    PromptTooLongError,
    Request,
    SamplingParams,
)

PROMPTS = ["你是谁", "Who are you?", "a " * 90, "🙂", "How do I stream?", "x"]


def _request(engine: Gemma2Engine, prompt: str, **params: object) -> Request:
    return Request(tuple(engine.encode(prompt)), SamplingParams(**params))


def test_the_engine_is_an_engine(engine: Gemma2Engine) -> None:
    """Ours satisfies the Protocol that others must."""
    assert isinstance(engine, Engine)


@pytest.mark.parametrize("path", ["batch", "abatch", "chain.batch", "chain.abatch"])
def test_a_batch_shares_its_forwards(
    random_engine: Gemma2Engine, forwards: Callable[[Gemma2Engine], Forwards], path: str
) -> None:
    """At most the longest row's steps, the prefill, and that of the one prompt that is far longer
    than the others; never the sum of the rows.
    """
    watch = forwards(random_engine)
    llm = Gemma2LLM(engine=random_engine, max_new_tokens=16)
    runnable = RunnableLambda(str) | llm if path.startswith("chain") else llm

    if path.endswith("abatch"):
        texts = asyncio.run(runnable.abatch(PROMPTS))
    else:
        texts = runnable.batch(PROMPTS)

    assert watch.count <= 16 + 2
    assert texts == [reference(random_engine, prompt, 16) for prompt in PROMPTS]


def test_rows_end_by_themselves(
    random_engine: Gemma2Engine, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """Each row has its own limit and stop, and the batch ends with its last row."""
    whole = reference(random_engine, PROMPTS[1], 12)
    watch = forwards(random_engine)
    rows = [
        _request(random_engine, PROMPTS[0], max_new_tokens=3),
        _request(random_engine, PROMPTS[1], max_new_tokens=12, stop=[whole[10:14]]),
        _request(random_engine, PROMPTS[2], max_new_tokens=9),
    ]
    texts, reasons = ["", "", ""], {}
    for chunk in random_engine.submit(rows):
        texts[chunk.index] += chunk.text
        if chunk.finish_reason:
            reasons[chunk.index] = chunk.finish_reason

    assert watch.tokens[0] == len(rows[2].prompt_ids)
    assert reasons == {0: "length", 1: "stop", 2: "length"}
    assert texts[0] == reference(random_engine, PROMPTS[0], 3)
    assert texts[1] == whole[: whole.index(whole[10:14])]
    assert texts[2] == reference(random_engine, PROMPTS[2], 9)


def test_more_rows_than_one_forward_takes_are_all_served(random_engine: Gemma2Engine) -> None:
    """The last of a batch of 40 come in as the first leave; no row is lost or mixed up."""
    prompts = [f"number {n}" for n in range(40)]
    llm = Gemma2LLM(engine=random_engine, max_new_tokens=3)
    assert llm.batch(prompts) == [llm.invoke(prompt) for prompt in prompts]


def test_a_prompt_longer_than_a_prefill_chunk_is_answered_right(
    random_engine: Gemma2Engine, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """Prefilled in chunks, across the sliding window and beside a short row: the same tokens."""
    long = "word and word " * 400
    llm = Gemma2LLM(engine=random_engine, max_new_tokens=6)
    expected = reference(random_engine, long, 6), reference(random_engine, "x", 6)
    watch = forwards(random_engine)

    assert llm.invoke(long) == expected[0]
    assert watch.tokens[:2] == [1024, len(random_engine.encode(long)) - 1024]
    assert tuple(llm.batch([long, "x"])) == expected


def test_threads_and_tasks_are_all_served_in_order_and_without_cross_talk(
    random_engine: Gemma2Engine,
) -> None:
    """Twelve threads and twelve tasks at once: each gets its own answer."""
    llm = Gemma2LLM(engine=random_engine, max_new_tokens=8)
    expected = {prompt: reference(random_engine, prompt, 8) for prompt in PROMPTS}
    answers: list[tuple[str, str]] = []

    async def tasks() -> list[str]:
        return list(await asyncio.gather(*[llm.ainvoke(prompt) for prompt in PROMPTS * 2]))

    threads = [
        threading.Thread(target=lambda p=prompt: answers.append((p, "".join(llm.stream(p)))))
        for prompt in PROMPTS * 2
    ]
    for thread in threads:
        thread.start()
    assert asyncio.run(tasks()) == [expected[prompt] for prompt in PROMPTS * 2]
    for thread in threads:
        thread.join()
    assert sorted(answers) == sorted([*expected.items()] * 2)


async def test_tasks_are_served_in_the_order_they_came(
    one_by_one: Gemma2Engine, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """A prompt that takes long to tokenize is not overtaken by a short one."""
    llm = Gemma2LLM(engine=one_by_one, max_new_tokens=1)
    watch = forwards(one_by_one)
    words = [400, 1, 200, 2, 3]
    await asyncio.gather(*[llm.ainvoke("word " * n) for n in words])
    assert watch.tokens == [len(one_by_one.encode("word " * n)) for n in words]


def test_waiting_for_ones_turn_keeps_no_event_loop_alive(random_engine: Gemma2Engine) -> None:
    """A program that calls `asyncio.run` again and again leaves no loops behind."""
    llm = Gemma2LLM(engine=random_engine, max_new_tokens=1)
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def ask() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        await asyncio.gather(*[llm.ainvoke("x") for _ in range(3)])

    for _ in range(2):
        asyncio.run(ask())
    random_engine.join()  # the worker may be about to ring
    gc.collect()
    assert [loop() for loop in loops] == [None, None]


def test_requests_are_served_in_the_order_they_came(
    one_by_one: Gemma2Engine, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """First come, first served, by the prompt lengths that the model sees."""
    watch = forwards(one_by_one)
    requests = [_request(one_by_one, p, max_new_tokens=1) for p in ["a", "a b c", "a b"]]
    streams = [one_by_one.submit([request]) for request in requests]
    for stream in streams:
        list(stream)
    assert watch.tokens == [len(request.prompt_ids) for request in requests]


def test_one_thread_runs_everything(random_engine: Gemma2Engine) -> None:
    """However many ask, the model runs on one thread, which is a daemon."""
    seen = set()
    handle = random_engine.model.register_forward_pre_hook(
        lambda *_: seen.add(threading.current_thread())
    )
    llm = Gemma2LLM(engine=random_engine, max_new_tokens=2)
    llm.batch(["a", "b"])
    asyncio.run(llm.ainvoke("c"))
    list(llm.stream("d"))
    handle.remove()
    (worker,) = seen
    assert worker.daemon
    assert worker is not threading.main_thread()


def test_a_thread_that_could_not_be_started_is_started_later(
    random_engine: Gemma2Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request that found the process full is refused, and those after it are served."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    model, tokenizer = random_engine.model, random_engine.tokenizer
    with Gemma2Engine(model, tokenizer, name="full") as engine:
        request = _request(engine, "x", max_new_tokens=2, timeout=60)
        with monkeypatch.context() as full:
            full.setattr(threading.Thread, "start", start)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                engine.submit([request])
        answer = "".join(chunk.text for chunk in engine.submit([request]))
        assert answer == reference(engine, "x", 2)


# Seeds -----------------------------------------------------------------------------------------


def test_a_seed_means_the_same_tokens_alone_in_a_batch_and_beside_others(
    either: Either,
) -> None:
    """Seed 0 counts; another seed differs; without one, two calls differ."""
    llm = either(max_new_tokens=12, temperature=2.0)
    alone = llm.invoke("x", seed=0)

    assert llm.invoke("x", seed=0) == alone
    assert llm.batch(["Who are you?", "x", "你是谁"], seed=0)[1] == alone
    assert llm.batch(["x", "x"], seed=0) == [alone, alone]
    assert llm.invoke("x", seed=1) != alone
    assert len({llm.invoke("x") for _ in range(4)}) > 1


def test_a_seed_holds_while_others_sample(random_engine: Gemma2Engine) -> None:
    """Strangers sampling at the same time, and the global generators, change nothing."""
    llm = Gemma2LLM(engine=random_engine, max_new_tokens=12, temperature=2.0)
    alone = llm.invoke("x", seed=7)
    state = torch.get_rng_state()
    noise = [threading.Thread(target=lambda: llm.invoke("y")) for _ in range(4)]
    for thread in noise:
        thread.start()
    assert llm.invoke("x", seed=7) == alone
    for thread in noise:
        thread.join()
    assert torch.get_rng_state().equal(state)


def test_rows_sample_each_by_their_own_parameters(random_engine: Gemma2Engine) -> None:
    """A greedy row beside a sampled one, and a penalised one, is what it is alone."""
    rows = [
        _request(random_engine, "x", max_new_tokens=8),
        _request(random_engine, "a b c d e", max_new_tokens=8, temperature=1.5, seed=3),
        _request(random_engine, "y", max_new_tokens=8, repetition_penalty=1.8),
    ]

    def texts(requests: list[Request]) -> list[str]:
        parts = [""] * len(requests)
        for chunk in random_engine.submit(requests):
            parts[chunk.index] += chunk.text
        return parts

    assert texts(rows) == [texts([row])[0] for row in rows]


# Limits ----------------------------------------------------------------------------------------


def test_a_prompt_that_leaves_no_room_is_refused_with_both_lengths(
    engine: Gemma2Engine, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """Before any forward, on every path; the longest that fits is answered."""
    watch = forwards(engine)
    context = engine.context_length
    llm = Gemma2LLM(engine=engine)

    with pytest.raises(PromptTooLongError, match=rf"8,192 tokens.*{context:,}"):
        engine.submit([Request((2,) * context, SamplingParams())])
    with pytest.raises(PromptTooLongError):
        llm.invoke("y x " * context)
    with pytest.raises(PromptTooLongError):
        llm.batch(["short", "y x " * context])
    with pytest.raises(PromptTooLongError):
        asyncio.run(llm.ainvoke("y x " * context))
    with pytest.raises(ParameterError, match="empty"):
        engine.submit([Request((), SamplingParams())])
    assert watch.count == 0


def test_an_answer_ends_where_the_context_does(random_engine: Gemma2Engine) -> None:
    """max_new_tokens beyond the room is cut to the room: finish_reason says "length"."""
    model = copy.deepcopy(random_engine.model)
    model.config.max_position_embeddings = 32
    with Gemma2Engine(model, random_engine.tokenizer) as engine:
        request = _request(engine, "word", max_new_tokens=99)
        *_, last = engine.submit([request])
    assert last.finish_reason == "length"
    assert last.usage is not None
    assert last.usage.completion_tokens == 32 - len(request.prompt_ids)
    assert last.usage.total_tokens == 32


def test_no_prompts_are_no_work(engine: Gemma2Engine) -> None:
    """An empty submission is a stream that ends at once."""
    assert list(engine.submit([])) == []
    assert Gemma2LLM(engine=engine).batch([]) == []


def test_a_timeout_ends_the_request_with_its_own_error(
    either: Either, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """Sync and async; the model stops, and the next request is served."""
    watch = forwards(either.engine)
    gates = [watch.gate(2)]
    llm = either(max_new_tokens=400, timeout=0.05)

    with pytest.raises(GenerationTimeoutError, match=r"timeout=0\.05"):
        llm.invoke("x")
    gates[0][1].set()
    either.engine.join()
    assert watch.count <= 3
    _, release = watch.gate(watch.count + 2)
    with pytest.raises(GenerationTimeoutError):
        asyncio.run(llm.ainvoke("x"))
    release.set()
    assert llm.invoke("x", timeout=60, max_new_tokens=3) == reference(either.engine, "x", 3)


# Stops that the engine resolves ------------------------------------------------------------------


def test_a_control_token_as_a_stop_ends_the_answer(say: Callable[..., Gemma2Engine]) -> None:
    """Its text is never part of the answer, and the verdict names it."""
    engine = say("go", [651, 4320, 106, 651])
    llm = Gemma2LLM(engine=engine)

    result = llm.generate(["go"], stop=["<start_of_turn>"]).generations[0][0]

    assert result.text == engine.tokenizer.decode([651, 4320])
    assert result.generation_info is not None
    assert result.generation_info["matched_stop"] == "<start_of_turn>"
    assert result.generation_info["finish_reason"] == "stop"


def test_a_control_token_inside_a_longer_stop_is_refused(engine: Gemma2Engine) -> None:
    """It could never match the text: said at once, with the repair."""
    with pytest.raises(ParameterError, match="give '<end_of_turn>' alone"):
        Gemma2LLM(engine=engine).invoke("x", stop=["<end_of_turn>\n"])


def test_the_checkpoints_own_sampling_is_what_none_means(random_engine: Gemma2Engine) -> None:
    """A generation config that samples is honoured, read back, and can be overridden to greedy."""
    model = copy.deepcopy(random_engine.model)
    config = model.generation_config
    config.do_sample, config.temperature, config.top_k, config.max_new_tokens = True, 1.7, 40, 5
    with Gemma2Engine(model, random_engine.tokenizer) as engine:
        llm = Gemma2LLM(engine=engine)
        assert llm.sampling_params.temperature == 1.7
        assert llm.sampling_params.top_k == 40
        assert llm.sampling_params.max_new_tokens == 5
        assert len({llm.invoke("x") for _ in range(5)}) > 1
        assert llm.invoke("x", temperature=0) == reference(random_engine, "x", 5)


# Closing -----------------------------------------------------------------------------------------


def test_closing_ends_requests_in_flight_and_refuses_new_ones(
    random_engine: Gemma2Engine,
) -> None:
    """The running one and the waiting one get EngineClosedError; the thread is gone."""
    engine = Gemma2Engine(random_engine.model, random_engine.tokenizer, name="closing")
    watch = Forwards(engine.model)
    reached, release = watch.gate(3)
    running = engine.submit([_request(engine, "x", max_new_tokens=400)])
    waiting = engine.submit([_request(engine, "y")])
    wait(reached)
    worker = engine._worker
    closer = threading.Thread(target=engine.close)
    closer.start()

    with pytest.raises(EngineClosedError):
        list(running)
    with pytest.raises(EngineClosedError):
        list(waiting)
    release.set()
    closer.join()
    watch.remove()
    engine.close()
    assert worker is not None
    assert not worker.is_alive()
    assert watch.count <= 4
    with pytest.raises(EngineClosedError, match="closing"):
        engine.submit([_request(random_engine, "x")])


async def test_closing_ends_tasks_that_read_and_that_wait(random_engine: Gemma2Engine) -> None:
    """On an event loop, in a stream and before its first token: EngineClosedError, at once."""
    engine = Gemma2Engine(random_engine.model, random_engine.tokenizer, name="closing")
    watch = Forwards(engine.model)
    reached, release = watch.gate(3)
    llm = Gemma2LLM(engine=engine)

    async def read(stream: AsyncIterable[object]) -> list[object]:
        return [text async for text in stream]

    running = asyncio.create_task(read(llm.astream("x")))
    await asyncio.to_thread(wait, reached)
    waiting = [read(engine.submit([_request(engine, prompt)])) for prompt in ("y", "z")]
    closer = asyncio.create_task(asyncio.to_thread(engine.close))
    ends = await asyncio.gather(running, *waiting, return_exceptions=True)
    release.set()
    await closer
    watch.remove()
    assert [type(end) for end in ends] == [EngineClosedError] * 3


def test_an_engine_that_nobody_holds_lets_its_thread_end(random_engine: Gemma2Engine) -> None:
    """Forgetting to close leaks neither the thread nor the weights."""
    engine = Gemma2Engine(random_engine.model, random_engine.tokenizer)
    list(engine.submit([_request(engine, "x", max_new_tokens=2)]))
    engine.join()
    worker = engine._worker
    del engine
    assert worker is not None
    worker.join(60)
    assert not worker.is_alive()


def test_a_request_outlives_the_last_reference_to_its_engine(random_engine: Gemma2Engine) -> None:
    """What was accepted is answered."""
    engine = Gemma2Engine(random_engine.model, random_engine.tokenizer)
    stream = engine.submit([_request(engine, "x", max_new_tokens=4)])
    del engine
    assert "".join(chunk.text for chunk in stream) == reference(random_engine, "x", 4)


def test_an_engine_is_shared_by_copies_and_not_pickled(engine: Gemma2Engine) -> None:
    """deepcopy keeps the one copy of the weights; pickle says why not and what to do."""
    assert copy.deepcopy(engine) is engine
    assert copy.deepcopy(Gemma2LLM(engine=engine)).engine is engine
    with pytest.raises(TypeError, match="pickle Gemma2LLM"):
        pickle.dumps(engine)


def test_an_engine_from_before_a_fork_says_so(tmp_path: object) -> None:
    """In the child there is no worker thread: an error, never a hang."""
    code = """
import os, sys
from gemma2_stream import EngineClosedError, Gemma2LLM
llm = Gemma2LLM("demo", max_new_tokens=2)
llm.invoke("hi")
if os.fork() == 0:
    try:
        llm.invoke("hi")
    except EngineClosedError as error:
        os._exit(0 if "fork" in str(error) else 3)
    os._exit(4)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


ASYNC = """
import asyncio
del stream, waiting
async def leave():
    tasks = [asyncio.create_task(llm.ainvoke("How do I stream?")) for _ in range(3)]
    async for _ in llm.astream("Hello"):
        break
    {}
asyncio.run(leave())
"""


@pytest.mark.parametrize(
    "ending",
    [
        "pass",
        "raise SystemExit(0)",
        "del stream, llm",
        "llm.engine.close()",
        ASYNC.format("return"),
        ASYNC.format("raise SystemExit(0)"),
    ],
)
def test_the_interpreter_leaves_cleanly_with_requests_in_flight(ending: str) -> None:
    """One runs, others wait: no hang, no crash, nothing on stderr."""
    code = f"""
from gemma2_stream import Gemma2LLM, Request, SamplingParams
llm = Gemma2LLM("demo")
stream = llm.stream("How do I stream?")
next(stream)
request = Request(tuple(llm.engine.encode("Hello")), SamplingParams())
long = Request((2, *[300] * 5000), SamplingParams())
waiting = [llm.engine.submit([r]) for r in (request, long, request)]
{ending}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert (done.returncode, _own(done.stderr)) == (0, "")


def _own(stderr: bytes) -> str:
    """What is left of stderr without the bar that transformers draws while it loads."""
    lines = stderr.decode().replace("\r", "\n").splitlines()
    return "\n".join(line for line in lines if line.strip() and "Loading weights" not in line)


def test_the_loops_ticking_is_never_held_up(
    random_engine: Gemma2Engine, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """Eight astreams wait on a model that is held in a forward, and the loop goes on ticking."""
    watch = forwards(random_engine)
    reached, release = watch.gate(2)
    llm = Gemma2LLM(engine=random_engine, max_new_tokens=5)

    async def collect() -> str:
        return "".join([text async for text in llm.astream("x")])

    async def main() -> tuple[list[str], int]:
        ticks = 0
        streams = [asyncio.create_task(collect()) for _ in range(8)]
        await asyncio.to_thread(wait, reached)
        for _ in range(1000):  # the model cannot move meanwhile
            await asyncio.sleep(0)
            ticks += 1
        assert not any(stream.done() for stream in streams)
        release.set()
        return list(await asyncio.gather(*streams)), ticks

    texts, ticks = asyncio.run(main())
    assert ticks == 1000
    assert texts == [reference(random_engine, "x", 5)] * 8


def test_greedy_ids_are_bare_generates(random_engine: Gemma2Engine) -> None:
    """Token by token, raw prompts too."""
    ids = random_engine.encode("Once upon a time", raw=True)
    assert ids[0] == 2
    llm = Gemma2LLM(engine=random_engine, raw=True, max_new_tokens=20)
    expected = random_engine.tokenizer.decode(
        greedy(random_engine, ids, 20), skip_special_tokens=True
    )
    assert llm.invoke("Once upon a time") == expected == llm.invoke("<bos>Once upon a time")
