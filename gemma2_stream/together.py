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
    """Waits for `count` callers, each of which joins with a request or leaves without one.

    With `or_none`, a request that is refused keeps all the others from being decoded.
    """

    def __init__(self, count: int, *, or_none: bool = False) -> None:
        self._missing = count
        self._or_none = or_none
        self._lock = threading.Lock()
        self._waiting: list[tuple[Engine, Request, Future[TokenStream]]] = []
        self._streams: list[TokenStream] = []
        self._error: BaseException | None = None
        self.places = [Place(self) for _ in range(count)]

    def fail(self, error: BaseException) -> None:
        """Nobody wants the answers any more: all who wait for one, or read it, get `error`."""
        with self._lock:
            self._error = error
            self._settle()
            for stream in self._streams:
                stream.fail(error)

    def _come(self, *joined: tuple[Engine, Request, Future[TokenStream]]) -> None:
        with self._lock:
            self._waiting += joined
            self._missing -= 1
            if self._missing == 0 or self._error is not None:
                self._settle()

    def _settle(self) -> None:
        """Give those who wait their streams, or the error that ends it all."""
        waiting, self._waiting = self._waiting, []
        wanted = [one for one in waiting if one[2].set_running_or_notify_cancel()]
        error = self._error
        if wanted and error is None:
            try:
                self._streams = wanted[0][0].submit_each([request for _, request, _ in wanted])
            except Exception as refusal:
                error = refusal
        if error is not None:
            for _, _, future in wanted:
                future.set_exception(error)
            return
        refusals = [stream.refusal for stream in self._streams if stream.refusal is not None]
        for (_, _, future), stream in zip(wanted, self._streams, strict=True):
            if refusals and self._or_none:
                stream.fail(refusals[0])
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
