"""The requests of one `batch`, which come from many callers and are to be decoded together.

LangChain runs a chat model's batch as so many single calls, each in its own thread or task; here
they meet, and what the last of them completes is submitted as one group. Knows no LangChain.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from .stream import TokenStream
from .types import Engine, Request


class Together:
    """Waits for `count` callers, each of which joins with a request or leaves without one."""

    def __init__(self, count: int) -> None:
        self._missing = count
        self._lock = threading.Lock()
        self._joined: list[tuple[Engine, Request, Future[TokenStream]]] = []
        self._streams: list[TokenStream] = []
        self.places = [Place(self) for _ in range(count)]

    def cancel(self) -> None:
        """Nobody wants any of the answers."""
        for stream in self._streams:
            stream.cancel()

    def _come(self, *joined: tuple[Engine, Request, Future[TokenStream]]) -> None:
        with self._lock:
            self._joined += joined
            self._missing -= 1
            complete = self._missing == 0
        if complete and self._joined:
            self._submit()

    def _submit(self) -> None:
        engine = self._joined[0][0]
        wanted = [one for one in self._joined if one[2].set_running_or_notify_cancel()]
        try:
            streams = engine.submit_each([request for _, request, _ in wanted])
        except Exception:
            # One of them is refused, and only its own caller is to hear of it.
            for _, request, future in wanted:
                try:
                    self._streams.append(engine.submit([request]))
                    future.set_result(self._streams[-1])
                except Exception as error:
                    future.set_exception(error)
            return
        self._streams = streams
        for (_, _, future), stream in zip(wanted, streams, strict=True):
            future.set_result(stream)


class Place:
    """A caller's place in a group, held with `with`: whoever goes without having joined leaves."""

    def __init__(self, group: Together) -> None:
        self._group: Together | None = group

    def join(self, engine: Engine, request: Request) -> Future[TokenStream]:
        """Take part with `request`; the stream of its answer is there when all have come."""
        group, self._group = self._group, None
        future: Future[TokenStream] = Future()
        if group is None:  # it took part already, and tries again
            future.set_result(engine.submit([request]))
        else:
            group._come((engine, request, future))
        return future

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        group, self._group = self._group, None
        if group is not None:
            group._come()
