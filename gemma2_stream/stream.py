"""The one thread boundary: chunks cross from the engine's worker to a caller, thread or event loop.

Knows no torch and no LangChain. Two ends share one channel: the worker holds the `Channel`, the
caller holds the `TokenStream`. Only the caller's end is ever garbage: when it goes, by `close()`,
by `del`, or by an exception that unwinds past it, the channel is cancelled and the worker stops.

    with engine.submit([request]) as stream:
        for chunk in stream:          # or `async for`; the same object, one reader
            print(chunk.text, end="")
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from .errors import EngineClosedError, Gemma2StreamError, GenerationTimeoutError
from .types import Chunk, Request, Usage

# Exceptions that iteration and asyncio would take for an end or a cancellation of their own.
_FLOW = (StopIteration, StopAsyncIteration, GeneratorExit, asyncio.CancelledError)


class Channel:
    """The worker's end: where chunks go, and the flag that says nobody wants more.

    `started` says that the worker has claimed it; `finished` is set when the worker has let go of
    everything that the requests needed.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = tuple(requests)
        self.cancelled = False
        self.error: BaseException | None = None
        self.finished = threading.Event()
        self.started = False
        # Reentrant: a garbage collection inside `start` may run the finalizer that calls `cancel`.
        self._lock = threading.RLock()
        self._items: queue.SimpleQueue[Chunk | BaseException | None] = queue.SimpleQueue()
        self._wake: Callable[[], object] | None = None
        self._end: Callable[[], object] | None = None
        _channels.add(self)

    def when_cancelled(self, call: Callable[[], object]) -> None:
        """Have `call` called once nobody wants more, on whichever thread that comes to pass; for a
        worker that cannot look at `cancelled` because it waits for something else.
        """
        with self._lock:
            self._end = call
        if self.cancelled:
            call()

    def start(self) -> bool:
        """Claim this channel for the worker, once or more; False when it was cancelled before."""
        with self._lock:
            self.started = self.started or not self.cancelled
            return self.started

    def cancel(self) -> None:
        """Ask the worker to stop. From any thread, any number of times, never blocks for long."""
        with self._lock:
            self.cancelled, first = True, not self.cancelled
            if first and not self.started:
                # No worker will say it: the requests never left the queue.
                for index, request in enumerate(self.requests):
                    self.put(Chunk(index, "", "cancelled", usage=Usage(len(request.prompt_ids), 0)))
                self.put(None)
        if first and self._end is not None:
            self._end()

    def put(self, item: Chunk | BaseException | None) -> None:
        """Hand over a chunk, the exception that ended the work, or None: nothing more comes."""
        self._items.put(item)
        wake = self._wake
        if wake is not None:
            try:
                wake()
            except RuntimeError:  # the reader's event loop is closed, so the reader is gone
                self.cancelled = True

    def fail(self, error: BaseException) -> None:
        """End the stream with `error` now, whatever the worker is doing, and have it stop."""
        self.error = error
        self.put(error)
        self.put(None)
        self.cancelled = True
        if self._end is not None:
            self._end()

    @property
    def waiting(self) -> int:
        """How many requests wait for the worker: all of them or none."""
        return 0 if self.started or self.cancelled else len(self.requests)

    def unread(self) -> int:
        """How many items the reader has not taken yet."""
        return self._items.qsize()

    def forked(self) -> None:
        """In a child process: end what no thread works on here, so that nobody waits for it."""
        if not self.finished.is_set():
            self._end = None  # it is the parent's
            self.fail(
                EngineClosedError(
                    "this answer was begun before a fork, and threads do not survive one: make the "
                    "model in the child, or start processes with multiprocessing's 'spawn'"
                )
            )
            self.finished.set()


_channels: weakref.WeakSet[Channel] = weakref.WeakSet()


def _after_fork() -> None:
    for channel in list(_channels):
        channel.forked()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork)


class TokenStream:
    """The caller's end: an iterator and an async iterator of `Chunk`, in the order of production.

    Every row ends with the chunk that carries its verdict, and the last of these ends the stream.
    An exception in the engine is raised here, itself, with its traceback. `close` (or leaving
    `with`, or dropping the object) cancels what is still being generated and never waits; `cancel`
    does the same from another thread and lets the reader see the verdict `cancelled`, and `fail`
    lets it see an error. With a timeout, GenerationTimeoutError is raised when it runs out, and the
    work is cancelled.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._items = channel._items
        self._open = True
        self._rows_left = len(channel.requests)
        # Waking the loop from the worker must not keep this object alive, hence a weak finalizer
        # on the channel and never a reference from the channel to here.
        self._finalizer = weakref.finalize(self, channel.cancel)
        self._finalizer.atexit = False
        self._bell: _Bell | None = None
        limits = [r.params.timeout for r in channel.requests if r.params.timeout is not None]
        self._timeout = min(limits, default=None)
        self._deadline = None if self._timeout is None else time.monotonic() + self._timeout

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        if not self._open:
            raise StopIteration
        try:
            item = self._items.get(timeout=self._remaining())
        except queue.Empty:
            raise self._timed_out() from None
        if (chunk := self._taken(item)) is None:
            raise StopIteration
        return chunk

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        if not self._open:
            raise StopAsyncIteration
        while self._items.empty():
            await self._arrival()
        if (chunk := self._taken(self._items.get_nowait())) is None:
            raise StopAsyncIteration
        return chunk

    def cancel(self) -> None:
        """Stop generating; the reader still gets what was made, and the verdict `cancelled`."""
        self._finalizer()

    @property
    def refusal(self) -> BaseException | None:
        """Why nothing is generated, where that was clear from the start."""
        return self._channel.error

    def fail(self, error: BaseException) -> None:
        """Stop generating; the reader still gets what was made, and then `error` is raised."""
        self._channel.fail(error)

    def close(self) -> None:
        """Stop generating and read no more. May be called twice."""
        self._silence()
        self.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _taken(self, item: Chunk | BaseException | None) -> Chunk | None:
        if isinstance(item, Chunk):
            self._rows_left -= item.finish_reason is not None
            if self._rows_left == 0:  # other streams of the same forwards may go on for long
                self._end()
            return item
        self._end()
        if isinstance(item, _FLOW):
            raise RuntimeError(f"the model raised {type(item).__name__}") from item
        if item is not None:
            raise item
        return None

    def _end(self) -> None:
        self._silence()
        self._finalizer.detach()  # the worker is done with it: nothing is left to cancel

    def _silence(self) -> None:
        self._open = False
        self._channel._wake = None  # the worker may hold the channel a little longer than the loop
        if self._bell is not None:
            self._bell.stop()

    async def _arrival(self) -> None:
        """Wait until the worker has put something since we last found the queue empty."""
        if self._bell is None:
            self._bell = _Bell(self._remaining())
            self._channel._wake = self._bell.ring
        rung = self._bell.listen()
        if not self._items.empty():  # it came between the look and `listen`
            return
        if self._bell.late:
            raise self._timed_out()
        await rung

    def _remaining(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _timed_out(self) -> GenerationTimeoutError:
        self.close()
        return GenerationTimeoutError(
            f"the answer was not complete after timeout={self._timeout} s: raise the timeout, or "
            "ask for less with max_new_tokens"
        )


class _Bell:
    """Wakes whoever waits on this event loop: at `ring`, from any thread, and once after `seconds`.

    One timer for a whole stream: one for each of its chunks would cost as much as sending it.
    Neither the loop nor the worker may keep the stream alive, so this is an object of its own.
    """

    def __init__(self, seconds: float | None) -> None:
        self.late = False
        self._loop = asyncio.get_running_loop()
        self._rung = self._loop.create_future()
        self._timer = None if seconds is None else self._loop.call_later(seconds, self._is_late)

    def listen(self) -> asyncio.Future[None]:
        """What is done at the next ring."""
        if self._rung.done():
            self._rung = self._loop.create_future()
        return self._rung

    def ring(self) -> None:
        """Raises RuntimeError when the loop is closed."""
        self._loop.call_soon_threadsafe(self._ring)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _ring(self) -> None:
        if not self._rung.done():  # or it was cancelled, with whoever waited
            self._rung.set_result(None)

    def _is_late(self) -> None:
        self.late = True
        self._ring()


def each(
    submit: Callable[[Sequence[Request]], TokenStream], requests: Sequence[Request]
) -> list[TokenStream]:
    """What `submit` gives for each of `requests` by itself; one that is refused has a stream that
    raises it. Raises EngineClosedError.
    """

    def submitted(request: Request) -> TokenStream:
        try:
            return submit([request])
        except EngineClosedError:
            raise
        except Gemma2StreamError as refusal:
            channel = Channel([request])
            channel.fail(refusal)
            return TokenStream(channel)

    return [submitted(request) for request in requests]
