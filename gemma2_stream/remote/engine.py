"""The engine that asks a server, from a thread of its own."""

from __future__ import annotations

import asyncio
import re
import threading
import traceback
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from ..errors import Gemma2StreamError, ModelNotFoundError, ParameterError
from ..generation import defaults_of, end_ids
from ..prompt import PromptEncoder
from ..resident import Resident
from ..stream import Channel, TokenStream, each
from ..types import Chunk, Request, Turn, check_prompt
from .answer import Answer
from .client import connected, end_loop, headers, run_loop
from .failures import explained, pause
from .spec import RemoteSpec
from .tokenizer import loaded

_INT64 = 2**63
_OURS = "gemma2_stream"  # what our own server says that it is

_engines: dict[RemoteSpec, RemoteEngine] = {}
_lock = threading.Lock()


def remote_engine(spec: RemoteSpec) -> RemoteEngine:
    """The process's engine for `spec`, whose tokenizer is loaded the first time, and downloaded if
    need be, without weights. The server is asked when the first prompt is sent. A closed engine is
    made anew.

    Raises ModelNotFoundError, ModelAccessError, DownloadError, CheckpointError or ParameterError.
    """
    with _lock:
        engine = _engines.get(spec)
        if engine is None or engine.closed:
            engine = _engines[spec] = RemoteEngine(spec)
        return engine


class RemoteEngine(Resident):
    """Has a server generate, for many callers; each prompt is a request of its own.

    `tokenizer` is the transformers object, `context_length` what the checkpoint says, or the server
    once it was asked. There is no `model` here.
    """

    def __init__(self, spec: RemoteSpec) -> None:
        super().__init__(f"{spec.base_url.rstrip('/')}/{spec.model}")
        self._client = connected(spec)
        self._spec = spec
        self._place = f"the server at {spec.base_url}"
        self.tokenizer, config, generation = loaded(spec)
        self._encoder = PromptEncoder(self.tokenizer)
        self._ends = end_ids(generation, self.tokenizer)
        self.defaults = defaults_of(generation)
        self.context_length: int = config.get_text_config().max_position_embeddings
        self._is_ours: bool | None = None  # None until it was asked
        self._channels: set[Channel] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_loop: Callable[[], object] = lambda: None

    def __repr__(self) -> str:
        return f"RemoteEngine({self.name!r}{', closed' if self._closed else ''})"

    @property
    def model(self) -> NoReturn:
        raise AttributeError(f"the weights of {self._spec.model!r} are on {self._place}, not here")

    def encode(self, prompt: str | Sequence[Turn], *, raw: bool = False) -> list[int]:
        """Prompt ids: a string is one user turn, or with `raw` the whole prompt.

        Raises PromptError.
        """
        return self._encoder.prompt(prompt, raw=raw)

    def tokenize(self, text: str) -> list[int]:
        """The ids of plain text: no BOS, no turns, no control tokens."""
        return self._encoder.text(text)

    def submit(self, requests: Sequence[Request]) -> TokenStream:
        """Send `requests`, each by itself, and return at once. From any thread.

        Raises ParameterError, PromptTooLongError or EngineClosedError; what the server has to say
        is raised by the stream.
        """
        channel = Channel([self._checked(request) for request in requests])
        channel.start()
        with self._lock:
            loop = self._running_loop()
            self._channels.add(channel)
            loop.call_soon_threadsafe(self._begin, channel, loop)
        return TokenStream(channel)

    def submit_each(self, requests: Sequence[Request]) -> list[TokenStream]:
        """The same, with a stream for each request, which raises it where one is refused.

        Raises EngineClosedError.
        """
        return each(self.submit, requests)

    def join(self) -> None:
        """Wait until everything submitted so far is over and its connections are closed."""
        for channel in list(self._channels):
            channel.finished.wait()

    def close(self) -> None:
        """End requests in flight with EngineClosedError, and close all connections. May be called
        twice.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for channel in list(self._channels):
                channel.fail(self._closed_error())
        self._stop_loop()

    def _checked(self, request: Request) -> Request:
        params = request.params.over(self.defaults)
        self._encoder.control_stops(params.stop)
        check_prompt(len(request.prompt_ids), self.context_length, self.name)
        return replace(request, params=params)

    # On the loop's thread ------------------------------------------------------------------------

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """The loop of this engine, on a thread that does not keep it alive."""
        self._check_open()
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            stop = asyncio.Event()
            thread = threading.Thread(
                target=run_loop,
                args=(self._loop, self._client, stop),
                name="gemma2_stream",
                daemon=True,
            )
            thread.start()
            # At exit too: a daemon thread must not write into what the interpreter takes down.
            self._stop_loop = weakref.finalize(self, end_loop, self._loop, stop, thread, self._pid)
        return self._loop

    def _begin(self, channel: Channel, loop: asyncio.AbstractEventLoop) -> None:
        """Answer the rows of `channel` until nobody wants them."""
        rows = [
            Answer(
                index,
                request,
                self._encoder.control_stops(request.params.stop),
                self._spec.base_url,
            )
            for index, request in enumerate(channel.requests)
        ]
        task = loop.create_task(self._answer(channel, rows))
        # A callback, since a task that is cancelled before its first step runs nothing of itself.
        task.add_done_callback(partial(self._over, channel, rows))
        channel.when_cancelled(partial(loop.call_soon_threadsafe, task.cancel))

    def _over(self, channel: Channel, rows: Sequence[Answer], task: asyncio.Task[None]) -> None:
        channel.when_cancelled(int)  # there is nothing left to end
        if not task.cancelled() and (error := task.exception()) is not None:
            _let_go(error)
            channel.fail(error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error)
        elif channel.error is None:
            for row in rows:
                if not row.over:
                    channel.put(row.cancelled(self._encoder.text(row.text)))
            channel.put(None)
        channel.finished.set()
        self._channels.discard(channel)

    async def _answer(self, channel: Channel, rows: Sequence[Answer]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for row in rows:
                tasks.create_task(self._answer_row(channel, row))

    async def _answer_row(self, channel: Channel, row: Answer) -> None:
        """One answer; as long as nothing of it came, it is asked for `max_retries` times more."""
        for again in range(self._spec.max_retries + 1):
            try:
                async for chunk in self._chunks(row):
                    channel.put(chunk)
                return
            except Gemma2StreamError as error:
                if row.text or again == self._spec.max_retries or not error.is_retryable:
                    raise
                await asyncio.sleep(pause(error, again))

    async def _chunks(self, row: Answer) -> AsyncIterator[Chunk]:
        with explained(self._spec, row.request):
            if self._is_ours is None:
                await self._ask_server()
            limit = row.request.params.max_new_tokens
            check_prompt(len(row.request.prompt_ids), self.context_length, self.name)
            room = self.context_length - len(row.request.prompt_ids)
            body = self._body(row, min(limit or room, room))
            row.filter_stops(not self._is_ours)
            stream = await self._client.completions.create(
                model=self._spec.model,
                prompt=row.request.prompt_ids,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=body,
                extra_headers=headers(self._spec),
            )
            # The client closes the connection, and leaves its generators to whoever collects them.
            events: AsyncGenerator[Any] = stream._iterator  # type: ignore[assignment]
            async with stream, aclosing(events):
                async for event in events:
                    if (chunk := row.feed(event)) is not None:
                        yield chunk
            yield row.verdict()

    async def _ask_server(self) -> None:
        """Whether it serves the model, what it is, and how long a context it has."""
        listed = await self._client.models.list(extra_headers=headers(self._spec))
        served = {model.id: model for model in getattr(listed, "data", None) or ()}
        if self._spec.model not in served:
            raise ModelNotFoundError(
                f"{self._place} has no model {self._spec.model!r}, but "
                f"{', '.join(map(repr, served)) or 'none'}: give one of these as model, and as "
                "tokenizer the id or the folder that its tokenizer comes from"
            )
        here = served[self._spec.model]
        if (length := getattr(here, "max_model_len", None)) is not None:
            self.context_length = min(self.context_length, length)
        self._is_ours = here.owned_by == _OURS

    def _body(self, row: Answer, limit: int) -> dict[str, Any]:
        """What is asked for, every parameter said, so that no default of the server's counts."""
        params, grammar = row.request.params, row.request.grammar
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        body = {name: getattr(params, name) for name in names} | {"max_tokens": limit}
        if self._is_ours:
            body["stop"] = list(params.stop)
        else:
            if params.seed is not None and params.seed >= _INT64:
                raise ParameterError(
                    f"seed={params.seed} is more than {self._place} takes: give one below 2**63"
                )
            # Otherwise it holds back as much text as the longest stop has, whatever that says; ours
            # holds back what can still become one.
            body["stop"] = [stop for stop in params.stop if stop not in row.control_stops.values()]
            body["include_stop_str_in_output"] = True
            body["stop_token_ids"] = [*self._ends, *row.control_stops]
            if grammar is not None:
                grammar = _with_ends(grammar, set(self._ends) - {self.tokenizer.eos_token_id})
        if grammar is not None:
            body["structured_outputs"] = {"grammar": grammar}
        return {name: value for name, value in body.items() if value is not None}


def _let_go(error: BaseException) -> None:
    """Clear the frames of `error`, and of all that led to it: generators of the client that are
    held there are then closed by the loop, and not by the thread that forgets the error, while the
    loop may run them.
    """
    errors, known = [error], set()
    while errors:
        error = errors.pop()
        known.add(error)
        traceback.clear_frames(error.__traceback__)
        inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
        related = (error.__cause__, error.__context__, *inner)
        errors += [each for each in related if each is not None and each not in known]


def _with_ends(grammar: str, ends: set[int]) -> str:
    """`grammar` for vLLM, whose llguidance knows one end of a turn, and Gemma says another.

    The directive has a server that would read the grammar more loosely, by xgrammar, refuse it.
    """
    whole = re.sub(r"(?m)^start\s*:", "gemma2_stream_whole:", grammar)
    end = f" <[{','.join(map(str, sorted(ends)))}]>?" if ends else ""
    return f"%llguidance {{}}\n{whole}\nstart: gemma2_stream_whole{end}"
