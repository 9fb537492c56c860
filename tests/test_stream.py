"""The thread boundary by itself: no model, a plain thread in the worker's place."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable

import pytest

from gemma2_stream import Chunk, GenerationTimeoutError, Request, SamplingParams, TokenStream, Usage
from gemma2_stream.stream import Channel

LAST = Chunk(0, "", "stop", usage=Usage(1, 2))


def _channel(rows: int = 1, **params: object) -> Channel:
    return Channel([Request((2,), SamplingParams(**params)) for _ in range(rows)])


def _read(stream: TokenStream, how: str) -> list[Chunk]:
    """All chunks, by either end."""

    async def collect() -> list[Chunk]:
        return [chunk async for chunk in stream]

    return list(stream) if how == "sync" else asyncio.run(collect())


both = pytest.mark.parametrize("how", ["sync", "async"])


@both
def test_chunks_cross_in_order(how: str) -> None:
    """Whatever the reader's pace: before it comes, and while it waits."""
    channel = _channel()
    chunks = [Chunk(0, str(n)) for n in range(500)] + [LAST]

    def work() -> None:
        for chunk in chunks:
            channel.put(chunk)
        channel.put(None)

    worker = threading.Thread(target=work)
    worker.start()
    assert _read(TokenStream(channel), how) == chunks
    worker.join()


@both
def test_an_exception_crosses_as_itself(how: str) -> None:
    """After the chunks that came before it; then the stream is over."""
    channel, error = _channel(), KeyError("inside")
    for item in (Chunk(0, "a"), error, None):
        channel.put(item)
    stream = TokenStream(channel)
    assert next(stream).text == "a"
    with pytest.raises(KeyError) as caught:
        _read(stream, how)
    assert caught.value is error
    assert _read(stream, how) == []


@both
@pytest.mark.parametrize(
    "error", [StopIteration(), StopAsyncIteration(), GeneratorExit(), asyncio.CancelledError()]
)
def test_an_exception_that_means_the_end_elsewhere_is_no_end(
    how: str, error: BaseException
) -> None:
    """A StopIteration that escapes the model must not pass for a complete answer."""
    channel = _channel()
    channel.put(error)
    with pytest.raises(RuntimeError, match=type(error).__name__) as caught:
        _read(TokenStream(channel), how)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("leave", ["close", "with", "del", "cancel"])
def test_a_reader_that_leaves_is_seen_by_the_worker(leave: str) -> None:
    """The flag is up at once, on the worker's end."""
    channel = _channel()
    assert channel.start()
    stream = TokenStream(channel)
    if leave == "with":
        with stream:
            pass
    elif leave == "del":
        del stream
        gc.collect()
    else:
        getattr(stream, leave)()
    assert channel.cancelled


def test_a_stream_that_is_over_cancels_nothing() -> None:
    """Closing after the end is a habit, not a request."""
    channel = _channel()
    channel.put(LAST)
    channel.put(None)
    stream = TokenStream(channel)
    assert list(stream) == [LAST]
    stream.close()
    assert not channel.cancelled


@both
def test_cancelling_before_the_start_gives_every_row_its_verdict(how: str) -> None:
    """And the worker is told not to begin."""
    channel = _channel(rows=2)
    stream = TokenStream(channel)
    stream.cancel()
    verdicts = _read(stream, how)
    assert [(c.index, c.finish_reason, c.usage) for c in verdicts] == [
        (0, "cancelled", Usage(1, 0)),
        (1, "cancelled", Usage(1, 0)),
    ]
    assert not channel.start()


@both
def test_a_timeout_is_its_own_error_and_cancels(how: str) -> None:
    """Counted from submission, whatever was read before."""
    channel = _channel(timeout=0.01)
    channel.start()
    channel.put(Chunk(0, "a"))
    stream = TokenStream(channel)
    with pytest.raises(GenerationTimeoutError, match=r"timeout=0\.01"):
        _read(stream, how)
    assert channel.cancelled
    assert _read(stream, how) == []


async def test_a_timeout_that_runs_out_while_nobody_waits_is_found_later() -> None:
    """The timer is the stream's, and rings once."""
    channel = _channel(timeout=0.01)
    stream = TokenStream(channel)
    reader = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)  # it waits, and the timer runs
    channel.put(Chunk(0, "a"))
    assert (await reader).text == "a"
    await asyncio.sleep(0.05)
    with pytest.raises(GenerationTimeoutError):
        await anext(stream)


async def test_a_reader_that_was_cancelled_may_come_back() -> None:
    """What it waited for is not lost with it."""
    channel = _channel()
    stream = TokenStream(channel)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(stream), 0.01)
    channel.put(Chunk(0, "a"))
    assert (await anext(stream)).text == "a"
    await asyncio.sleep(0)  # the ring for it has nobody to wake
    reader = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    channel.put(LAST)
    assert await reader == LAST


def test_a_reader_whose_loop_is_gone_is_gone() -> None:
    """The worker finds out when it next has something to say, and is not hurt."""
    channel = _channel()
    stream = TokenStream(channel)

    async def begin() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.01)

    asyncio.run(begin())
    channel.start()
    channel.put(Chunk(0, "a"))
    assert channel.cancelled


def test_a_waiting_reader_is_woken_by_failure() -> None:
    """`fail` ends a blocked reader from another thread."""
    channel = _channel()
    stream = TokenStream(channel)
    threading.Thread(target=lambda: channel.fail(OSError("closed"))).start()
    with pytest.raises(OSError, match="closed"):
        next(stream)


def test_the_loop_runs_while_a_reader_waits() -> None:
    """Awaiting a chunk holds up nothing else on the loop."""
    channel = _channel()
    order: list[str] = []

    async def read(stream: TokenStream) -> None:
        async for chunk in stream:
            order.append(chunk.text)

    async def main() -> None:
        reader = asyncio.create_task(read(TokenStream(channel)))
        for n in range(3):
            await asyncio.sleep(0)
            order.append(f"tick {n}")
        await asyncio.to_thread(_put, channel.put, [Chunk(0, "a"), None])
        await reader

    asyncio.run(main())
    assert order == ["tick 0", "tick 1", "tick 2", "a"]


def _put(put: Callable[[Chunk | None], None], items: list[Chunk | None]) -> None:
    for item in items:
        put(item)
