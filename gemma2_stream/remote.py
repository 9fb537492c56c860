"""An engine on another machine: vLLM, or `gemma2-stream serve`, asked by OpenAI's protocol.

Knows the `openai` client, a tokenizer and a checkpoint's configuration; no weights, no LangChain. A
prompt goes over as token ids, so that the template, the one BOS and forged control tokens are our
affair; the text that comes back is read by our own stops, and an answer counts only with a verdict.

    engine = remote_engine(RemoteSpec(base_url="http://gpu:8000/v1", model="google/gemma-2-27b-it"))
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from json import JSONDecodeError
from typing import TYPE_CHECKING, Any, NoReturn, Self
from urllib.parse import urlsplit

from . import hub
from .errors import (
    CheckpointError,
    EngineBusyError,
    EngineClosedError,
    Gemma2StreamError,
    GenerationTimeoutError,
    GrammarError,
    ModelAccessError,
    ModelNotFoundError,
    ParameterError,
    PromptTooLongError,
    ServerError,
)
from .generation import defaults_of, end_ids
from .prompt import PromptEncoder
from .stop import StopFilter
from .stream import Channel, TokenStream, each
from .types import (
    Chunk,
    FinishReason,
    Request,
    Turn,
    Usage,
    check_prompt,
    check_seconds,
)

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAIError
    from pydantic import SecretStr

CONNECT_SECONDS = 10.0
READ_SECONDS = 120.0
"""How long a server may be silent when nobody says: a long prompt is read, a queue waited for."""

_PAUSE, _LONGEST_PAUSE = 0.5, 60.0  # seconds before a second try, and before any
_INT64 = 2**63
_OURS = "gemma2_stream"  # what our own server says that it is


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteSpec:
    """Where the model is and what it is called there; `tokenizer` is the id or the folder of its
    tokenizer, by default `model`, and the next three are that one's.

    Raises ParameterError for a URL that is none, or that holds a password.
    """

    base_url: str
    model: str
    tokenizer: str | None = None
    revision: str | None = None
    source: str | None = None
    cache_dir: str | None = None
    read_timeout: float | None = None
    max_retries: int = 0
    api_key: SecretStr | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url) if isinstance(self.base_url, str) else None
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ParameterError(
                f"base_url={self.base_url!r} is no address of a server: give one such as "
                "'http://127.0.0.1:8000/v1'"
            )
        if parts.username or parts.password or parts.query:
            raise ParameterError(
                f"base_url holds more than an address, on {parts.hostname!r}: give the key as "
                "api_key, where nothing shows it"
            )
        check_seconds("read_timeout", self.read_timeout)


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


class RemoteEngine:
    """Has a server generate, for many callers; each prompt is a request of its own.

    `tokenizer` is the transformers object, `context_length` what the checkpoint says, or the server
    once it was asked. There is no `model` here.
    """

    def __init__(self, spec: RemoteSpec) -> None:
        self._client = _client(spec)
        self._spec = spec
        self._place = f"the server at {spec.base_url}"
        self.name = f"{spec.base_url.rstrip('/')}/{spec.model}"
        self.tokenizer, config, generation = _loaded(spec)
        self._encoder = PromptEncoder(self.tokenizer)
        self._ends = end_ids(generation, self.tokenizer)
        self.defaults = defaults_of(generation)
        self.context_length: int = config.get_text_config().max_position_embeddings
        self._is_ours: bool | None = None  # None until it was asked
        self._lock = threading.Lock()
        self._closed = False
        self._channels: set[Channel] = set()
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_loop: Callable[[], object] = lambda: None

    def __repr__(self) -> str:
        return f"RemoteEngine({self.name!r}{', closed' if self._closed else ''})"

    @property
    def closed(self) -> bool:
        return self._closed

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __deepcopy__(self, memo: object) -> Self:
        return self  # it holds connections

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an engine holds a thread and connections and cannot be pickled: pickle "
            "Gemma2LLM(model=..., base_url=...), which connects again where it is unpickled"
        )

    def _closed_error(self) -> EngineClosedError:
        return EngineClosedError(f"the engine of {self.name!r} was closed: make the model again")

    def _checked(self, request: Request) -> Request:
        params = request.params.over(self.defaults)
        self._encoder.control_stops(params.stop)
        check_prompt(len(request.prompt_ids), self.context_length, self.name)
        return replace(request, params=params)

    # On the loop's thread ------------------------------------------------------------------------

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """The loop of this engine, on a thread that does not keep it alive."""
        if self._closed:
            raise self._closed_error()
        if self._pid != os.getpid():
            raise EngineClosedError(
                f"{self!r} was made before a fork, and threads do not survive one: make it in the "
                "child, or start processes with multiprocessing's 'spawn'"
            )
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            stop = asyncio.Event()
            thread = threading.Thread(
                target=_run,
                args=(self._loop, self._client, stop),
                name="gemma2_stream",
                daemon=True,
            )
            thread.start()
            # At exit too: a daemon thread must not write into what the interpreter takes down.
            self._stop_loop = weakref.finalize(self, _end, self._loop, stop, thread, self._pid)
        return self._loop

    def _begin(self, channel: Channel, loop: asyncio.AbstractEventLoop) -> None:
        """Answer the rows of `channel` until nobody wants them."""
        rows = [
            _Row(
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

    def _over(self, channel: Channel, rows: Sequence[_Row], task: asyncio.Task[None]) -> None:
        channel.when_cancelled(int)  # there is nothing left to end
        if not task.cancelled() and (error := task.exception()) is not None:
            channel.fail(error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error)
        elif channel.error is None:
            for row in rows:
                if not row.over:
                    channel.put(row.cancelled(self._encoder.text(row.text)))
            channel.put(None)
        channel.finished.set()
        self._channels.discard(channel)

    async def _answer(self, channel: Channel, rows: Sequence[_Row]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for row in rows:
                tasks.create_task(self._answer_row(channel, row))

    async def _answer_row(self, channel: Channel, row: _Row) -> None:
        """One answer; as long as nothing of it came, it is asked for `max_retries` times more."""
        for again in range(self._spec.max_retries + 1):
            try:
                async for chunk in self._chunks(row):
                    channel.put(chunk)
                return
            except Gemma2StreamError as error:
                if row.text or again == self._spec.max_retries or not error.is_retryable:
                    raise
                await asyncio.sleep(_pause(error, again))

    async def _chunks(self, row: _Row) -> AsyncIterator[Chunk]:
        with _explained(self._spec, row.request):
            if self._is_ours is None:
                await self._ask_server()
            limit = row.request.params.max_new_tokens
            check_prompt(len(row.request.prompt_ids), self.context_length, self.name)
            room = self.context_length - len(row.request.prompt_ids)
            body = self._body(row, min(limit or room, room))
            row.filter_stops(not self._is_ours)
            async with await self._client.completions.create(
                model=self._spec.model,
                prompt=row.request.prompt_ids,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=body,
                extra_headers=_headers(self._spec),
            ) as events:
                async for event in events:
                    if (chunk := row.feed(event)) is not None:
                        yield chunk
            yield row.verdict()

    async def _ask_server(self) -> None:
        """Whether it serves the model, what it is, and how long a context it has."""
        listed = await self._client.models.list(extra_headers=_headers(self._spec))
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

    def _body(self, row: _Row, limit: int) -> dict[str, Any]:
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


class _Row:
    """One answer, as the server's events make it. Without input or output."""

    def __init__(
        self, index: int, request: Request, control_stops: Mapping[int, str], base_url: str
    ) -> None:
        self.request = request
        self.control_stops = control_stops
        self.text = ""
        self.over = False
        self._index = index
        self._base_url = base_url
        self._stop = StopFilter(())
        self._reason: str | None = None
        self._stopped_by: int | str | None = None
        self._usage: Usage | None = None

    def filter_stops(self, here: bool) -> None:
        """Whether the text is to be cut `here`."""
        self._stop = StopFilter(self.request.params.stop if here else ())

    def feed(self, event: Any) -> Chunk | None:
        """The text of a `Completion`, or None where it brings none. Raises ServerError."""
        try:
            said = self._read(event)
        except (AttributeError, TypeError) as error:  # the client checks no types
            raise _gibberish(self._base_url) from error
        self.text += said
        text = self._stop.feed(said)
        return Chunk(self._index, text) if text else None

    def _read(self, event: Any) -> str:
        said = ""
        for choice in event.choices:
            said += choice.text
            if choice.finish_reason is not None:
                self._reason = choice.finish_reason
                self._stopped_by = getattr(choice, "stop_reason", None)
        if (usage := event.usage) is not None:
            cached = usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens
            self._usage = Usage(usage.prompt_tokens, usage.completion_tokens, cached or 0)
        return said

    def verdict(self) -> Chunk:
        """The last chunk. Raises ServerError for an answer that did not end, or ended otherwise."""
        if self._usage is None or self._reason not in ("stop", "length"):
            raise ServerError(
                f"the server at {self._base_url} ended the answer with finish_reason="
                f"{self._reason!r} and {'no' if self._usage is None else 'a'} usage, so that it "
                "may be cut: ask again"
            )
        self.over = True
        rest, stop = self._stop.flush(), self._stop.matched
        if stop is not None:
            return Chunk(self._index, rest, "stop", stop, self._usage)
        by = self._stopped_by
        stop = self.control_stops.get(by) if isinstance(by, int) else by
        reason: FinishReason = "stop" if self._reason == "stop" else "length"
        return Chunk(self._index, rest, reason, stop, self._usage)

    def cancelled(self, ids: Sequence[int]) -> Chunk:
        """The last chunk of an answer that got as far as `ids`, since no server counted them."""
        usage = Usage(len(self.request.prompt_ids), len(ids))
        return Chunk(self._index, self._stop.flush(), "cancelled", usage=usage)


def _with_ends(grammar: str, ends: set[int]) -> str:
    """`grammar` for vLLM, whose llguidance knows one end of a turn, and Gemma says another.

    The directive has a server that would read the grammar more loosely, by xgrammar, refuse it.
    """
    whole = re.sub(r"(?m)^start\s*:", "gemma2_stream_whole:", grammar)
    end = f" <[{','.join(map(str, sorted(ends)))}]>?" if ends else ""
    return f"%llguidance {{}}\n{whole}\nstart: gemma2_stream_whole{end}"


# The client --------------------------------------------------------------------------------------


def _client(spec: RemoteSpec) -> AsyncOpenAI:
    try:
        from openai import AsyncOpenAI, Timeout
    except ModuleNotFoundError as missing:
        raise ParameterError(
            f"base_url={spec.base_url!r} needs {missing.name}: pip install 'gemma2-stream[remote]'"
        ) from missing

    read = spec.read_timeout or READ_SECONDS
    return AsyncOpenAI(
        base_url=spec.base_url,
        api_key=spec.api_key.get_secret_value() if spec.api_key is not None else "none",
        timeout=Timeout(None, connect=CONNECT_SECONDS, read=read, write=read),
        max_retries=0,  # ours also covers a connection that breaks before the first token
    )


def _headers(spec: RemoteSpec) -> dict[str, Any]:
    """What keeps the environment's OPENAI_API_KEY and the like from going to this server."""
    from openai import Omit

    names = ["OpenAI-Organization", "OpenAI-Project"]
    return dict.fromkeys(names + ["Authorization"] * (spec.api_key is None), Omit())


def _run(loop: asyncio.AbstractEventLoop, client: AsyncOpenAI, stop: asyncio.Event) -> None:
    """The thread: everything on `loop` until `stop`, and then its end."""

    async def until_stopped() -> None:
        async with client:
            await stop.wait()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(until_stopped())


def _end(
    loop: asyncio.AbstractEventLoop, stop: asyncio.Event, thread: threading.Thread, pid: int
) -> None:
    if pid != os.getpid():  # a child has the loop, but no thread that would run it
        return
    loop.call_soon_threadsafe(stop.set)
    if thread is not threading.current_thread():
        thread.join()


def _loaded(spec: RemoteSpec) -> tuple[Any, Any, Any]:
    """The tokenizer, the config and the generation config."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = hub.resolve(
        spec.tokenizer or spec.model,
        revision=spec.revision,
        source=spec.source,
        cache_dir=spec.cache_dir,
        max_retries=spec.max_retries,
        weights=False,
    )
    local: dict[str, Any] = {"local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **local)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **local)
        if (folder / "generation_config.json").is_file():
            return tokenizer, config, GenerationConfig.from_pretrained(folder, **local)
        return tokenizer, config, GenerationConfig.from_model_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{str(folder)!r} holds no tokenizer to read: {error}") from error


# What goes wrong ---------------------------------------------------------------------------------


# What a status means, and what is said of it; the codes are what our own server says later on.
_KEY = (ModelAccessError, "refuses the key ({}): give the right one as api_key")
_NONE = (
    ModelNotFoundError,
    "knows no such thing ({}): check model, and base_url, which mostly ends in /v1",
)
_BUSY = (EngineBusyError, "takes no more now ({}): try again later")
_LATE = (GenerationTimeoutError, "gave up ({}): ask for less, or try again later")
_MEANINGS: dict[object, tuple[type[Gemma2StreamError], str]] = {
    401: _KEY,
    403: _KEY,
    404: _NONE,
    408: _LATE,
    429: _BUSY,
    503: _BUSY,
    504: _LATE,
    "busy": _BUSY,
    "closed": _BUSY,
    "timeout": _LATE,
}


@contextmanager
def _explained(spec: RemoteSpec, request: Request) -> Iterator[None]:
    """What the client raises, as ours."""
    from openai import OpenAIError

    try:
        yield
    except OpenAIError as error:
        key = spec.api_key.get_secret_value() if spec.api_key is not None else None
        # Some servers repeat the key that they refuse, and a traceback would show it.
        raise _meaning(error, spec, request) from (None if key and key in str(error) else error)
    except (JSONDecodeError, UnicodeDecodeError) as error:
        raise _gibberish(spec.base_url) from error


def _gibberish(base_url: str) -> ServerError:
    return ServerError(
        f"the server at {base_url} does not answer as OpenAI's does: check base_url, which mostly "
        "ends in /v1"
    )


def _meaning(error: OpenAIError, spec: RemoteSpec, request: Request) -> Gemma2StreamError:
    from openai import APIConnectionError

    place = f"the server at {spec.base_url}"
    if isinstance(error, APIConnectionError):
        return _unconnected(error, spec, place)
    body = getattr(error, "body", None)
    fields: Mapping[str, Any] = body if isinstance(body, Mapping) else {}
    said = " ".join(str(fields.get("message") or body or error).split()).removesuffix(".")
    if spec.api_key is not None:
        said = said.replace(spec.api_key.get_secret_value(), "…")
    code = fields.get("code")
    status = getattr(error, "status_code", code)  # after the first byte there is only the code
    if code == "context_length_exceeded" or "maximum context length" in said:
        return PromptTooLongError(f"{place} refuses the prompt: {said}. Shorten it")
    if (known := _MEANINGS.get(code) or _MEANINGS.get(status)) is not None:
        return known[0](f"{place} {known[1].format(said)}")
    if isinstance(status, int) and 400 <= status < 500:
        if request.grammar is not None and "grammar" in said.lower():
            return GrammarError(f"{place} cannot hold the answer to its grammar: {said}")
        return ParameterError(f"{place} refuses the request: {said}")
    return ServerError(f"{place} failed: {said}{_GUIDANCE if request.grammar is not None else ''}")


_GUIDANCE = (
    ". If it is vLLM, start it with --structured-outputs-config "
    """'{"backend": "guidance"}', which schemas and tools need"""
)


def _unconnected(error: OpenAIError, spec: RemoteSpec, place: str) -> Gemma2StreamError:
    cause = type(error.__cause__).__name__
    if cause in ("ReadTimeout", "WriteTimeout"):
        return GenerationTimeoutError(
            f"{place} was silent for read_timeout={spec.read_timeout or READ_SECONDS} s: the link "
            "may be cut; or raise read_timeout, if it reads long prompts or has a long queue"
        )
    return ServerError(
        f"the connection to {spec.base_url} failed ({cause}): check that a server runs there, and "
        "the network, and ask again"
    )


def _pause(error: Gemma2StreamError, again: int) -> float:
    """Seconds before the next try: as the server says, else ever more."""
    response = getattr(error.__cause__, "response", None)
    said = response.headers.get("retry-after", "") if response is not None else ""
    pause = float(said) if said.isdecimal() else _PAUSE * 2**again * random.uniform(0.75, 1.25)
    return min(pause, _LONGEST_PAUSE)
