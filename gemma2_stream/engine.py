"""The engine: what callers hold, and the one worker thread that runs every `model.generate`.

Knows transformers and torch; no LangChain. Callers hand in `Request`s from any thread and read a
`TokenStream`; only the worker touches the model, so there is no lock around it. What it does when
is the scheduler's.
"""

from __future__ import annotations

import atexit
import copy
import functools
import queue
import threading
import uuid
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig

from .detokenizer import detokenizer_for
from .errors import (
    EngineBusyError,
    Gemma2StreamError,
    ParameterError,
)
from .generation import defaults_of, end_ids, path_of
from .grammar import Grammars
from .kv import can_join, token_bytes
from .prefixes import PrefixCache
from .prompt import PromptEncoder
from .resident import Resident
from .scheduler import Limits, Scheduler, free_bytes
from .speculation import Assistant, Drafter, Lookup
from .static import compile_ahead, static_cache_for
from .stream import Channel, TokenStream
from .streamer import Row
from .types import (
    MAX_ROWS,
    Request,
    SamplingParams,
    Turn,
    check_options,
    check_prompt,
    check_static,
)

# What of the free memory prefixes may take when nobody says, and the most of it, in bytes.
_PREFIX_SHARE, _PREFIX_MOST = 0.1, 4 * 2**30


class Gemma2Engine(Resident):
    """Runs a transformers model for many callers.

        with Gemma2Engine(model, tokenizer) as engine:
            ids = engine.encode("你是谁")
            for chunk in engine.submit([Request(tuple(ids), SamplingParams(max_new_tokens=50))]):
                print(chunk.text, end="")

    `model` is any causal LM in eval mode, `tokenizer` its fast tokenizer; both stay usable as
    `engine.model` and `engine.tokenizer`. `name` tells these weights from others in traces and
    cache keys; by default it is the checkpoint's path, or made up when there is none.
    `defaults` is what the checkpoint's generation config says, and `context_length` its positions,
    prompt and answer together (8,192 for Gemma 2). `steps` grows with every forward, so where it
    stands still although something was asked, the worker hangs.

    Requests join those that are being decoded: `max_rows` (32) at once, as long as they hold at
    most `max_cached_tokens` (rows times the longest of them, prompt and answer; a lone one may have
    more). `None` is what fits in half of the memory that is free now. The others wait in order;
    with `max_waiting`, a request that finds as many waiting is refused with EngineBusyError.
    `prefix_cache_bytes` is what keys and values of past prompts and answers may take, so that the
    next turn of a conversation need not compute them; 0 keeps none, and `None` is a tenth of the
    free memory, 4 GiB at most.

    A request that is decoded alone takes fewer forwards for the same text when the next tokens are
    guessed well: `prompt_lookup_num_tokens`, up to so many at once, from what prompt and answer
    said before, and an `assistant`, a smaller causal LM with the same vocabulary, what that would
    say. With both, it is asked when nothing was said before. In
    float32 no token changes; below it a forward of several tokens rounds differently, as one of
    several rows does, which can turn a near tie or a draw.

    With a `static_cache`, keys and values have one place of the whole context length until `close`,
    for which `generate` compiles by itself on CUDA: here and now, a minute or two. Requests are
    decoded one after the other, and nothing is kept between them. Raises ParameterError where
    nothing can be compiled.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str | None = None,
        assistant: Any = None,
        prompt_lookup_num_tokens: int | None = None,
        static_cache: bool = False,
        max_rows: int | None = None,
        max_waiting: int | None = None,
        max_cached_tokens: int | None = None,
        prefix_cache_bytes: int | None = None,
    ) -> None:
        options = {
            "max_rows": max_rows,
            "max_waiting": max_waiting,
            "max_cached_tokens": max_cached_tokens,
            "prefix_cache_bytes": prefix_cache_bytes,
            "prompt_lookup_num_tokens": prompt_lookup_num_tokens,
        }
        check_options(options)
        if static_cache:
            check_static(options, None if assistant is None else path_of(assistant))
            max_rows, prefix_cache_bytes = 1, 0
        _check_fast(tokenizer)
        super().__init__(name or model.config._name_or_path or f"unnamed-{uuid.uuid4().hex}")
        self.model = model
        self.tokenizer = tokenizer
        self._encoder = PromptEncoder(tokenizer)
        self._detokenizer = detokenizer_for(tokenizer)
        self._config = _greedy(model, tokenizer)
        self.vocab_size: int = model.get_input_embeddings().num_embeddings
        self._grammars = Grammars(
            tokenizer, self._encoder.text, self.vocab_size, self._config.eos_token_id
        )
        self.defaults = defaults_of(model.generation_config)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.attn_implementation: str | None = model.config._attn_implementation
        self.context_length: int = model.config.get_text_config().max_position_embeddings
        self.max_waiting = max_waiting
        free, each = free_bytes(self.device), token_bytes(model.config, model.dtype)
        if prefix_cache_bytes is None:
            prefix_cache_bytes = min(int(free * _PREFIX_SHARE), _PREFIX_MOST)
        self.prefixes = PrefixCache(prefix_cache_bytes)
        self._limits = Limits(
            max_rows=max_rows or MAX_ROWS,
            max_cached_tokens=max_cached_tokens or max(free // 2 // each, self.context_length),
            token_bytes=each,
            join=can_join(model.config) and not static_cache,
        )
        self._cache = static_cache_for(model) if static_cache else None
        self.assistant = assistant
        self._drafters = _drafters(model, assistant, prompt_lookup_num_tokens)
        self._jobs: _Jobs = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._channels: set[Channel] = set()
        self.steps = 0
        # The worker refers to its engine only while there is work, so that an engine nobody holds
        # is garbage; this is what ends its thread then.
        weakref.finalize(self, self._jobs.put, None).atexit = False
        _open_engines.add(self)
        self._compiled = self._cache is None
        if not self._compiled:
            self._compile()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"on {self.device}"
        return f"Gemma2Engine({self.name!r}, {state})"

    @property
    def device(self) -> torch.device:
        """Where prompt ids go: the device of the embedding."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def encode(self, prompt: str | Sequence[Turn], *, raw: bool = False) -> list[int]:
        """Prompt ids: a string is one user turn, or with `raw` the whole prompt.

        Raises PromptError.
        """
        return self._encoder.prompt(prompt, raw=raw)

    def tokenize(self, text: str) -> list[int]:
        """The ids of plain text: no BOS, no turns, no control tokens."""
        return self._encoder.text(text)

    def _compile(self) -> None:
        """Wait until the worker has compiled, and nobody will have to. Raises what it raised."""
        try:
            for _ in self.submit([]):
                pass
        except BaseException:
            self.close()
            raise

    def submit(self, requests: Sequence[Request]) -> TokenStream:
        """Queue `requests`, to be decoded together, and return at once. From any thread.

        Raises ParameterError, PromptTooLongError, GrammarError, EngineBusyError or
        EngineClosedError, before any forward.
        """
        channel = Channel([self._checked(request) for request in requests])
        self._queue([channel])
        if channel.error is not None:
            raise channel.error
        return TokenStream(channel)

    def submit_each(self, requests: Sequence[Request]) -> list[TokenStream]:
        """The same, with a stream for each request: each is read, cancelled and over by itself.

        A request that is refused has a stream that raises it. Raises EngineClosedError.
        """
        channels = [self._channel(request) for request in requests]
        self._queue([channel for channel in channels if not channel.cancelled])
        return [TokenStream(channel) for channel in channels]

    def _channel(self, request: Request) -> Channel:
        try:
            return Channel([self._checked(request)])
        except Gemma2StreamError as refusal:
            channel = Channel([request])
            channel.fail(refusal)
            return channel

    def _queue(self, channels: Sequence[Channel]) -> None:
        with self._lock:
            self._check_open()
            self._refuse_beyond_the_queue(channels)
            channels = [channel for channel in channels if channel.error is None]
            if self._worker is None:
                worker = threading.Thread(
                    target=_work, args=(self._jobs,), name="gemma2_stream", daemon=True
                )
                worker.start()
                self._worker = worker
            self._channels.update(channels)
            self._jobs.put((self, channels))

    def _refuse_beyond_the_queue(self, channels: Sequence[Channel]) -> None:
        """Fail those of `channels` that find `max_waiting` requests for which no row is free."""
        if self.max_waiting is None:
            return
        known = list(self._channels)  # at once, since the worker takes out those that are over
        decoding = sum(len(c.requests) for c in known if c.started)
        waiting = sum(c.waiting for c in known)
        waiting -= max(0, self._limits.max_rows - decoding)
        for channel in channels:
            if waiting >= self.max_waiting:
                channel.fail(
                    EngineBusyError(
                        f"{waiting:,} requests wait for {self.name!r} already, and "
                        f"max_waiting={self.max_waiting:,} admits no more: try again later"
                    )
                )
            waiting += channel.waiting

    def join(self) -> None:
        """Wait until everything submitted so far is over and its memory is free."""
        for channel in list(self._channels):
            channel.finished.wait()

    def close(self) -> None:
        """End requests in flight with EngineClosedError, stop the thread, let go of the weights.

        May be called twice. Waits for the forward that is running, if one is.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for channel in list(self._channels):
                channel.fail(self._closed_error())
            self._jobs.put(None)
        if self._worker is not None and self._worker is not threading.current_thread():
            self._worker.join()
        self.model = self.assistant = self._cache = None
        self._drafters.clear()
        self.prefixes.clear()

    def _checked(self, request: Request) -> Request:
        """`request` with every parameter resolved and every refusal made."""
        params = request.params.over(self.defaults)
        self._stop_ids(params)
        check_prompt(len(request.prompt_ids), self.context_length, self.name)
        if request.grammar is not None:
            self._grammars.check(request.grammar)
        return replace(request, params=params)

    def _stop_ids(self, params: SamplingParams) -> dict[int, str | None]:
        """Ids that end the answer: the ends of a turn, and stops that spell a control token."""
        ends: dict[int, str | None] = dict.fromkeys(self._config.eos_token_id)
        return ends | self._encoder.control_stops(params.stop)

    def _serve(self, channels: Sequence[Channel]) -> None:
        """Serve `channels` and whatever comes while they are served, on the worker."""
        if self._cache is not None and not self._compiled:
            try:
                compile_ahead(self.model, self._cache, self._config)
            except Exception as error:
                for channel in channels:
                    channel.fail(error)
                    self._left(channel)
                return
            self._compiled = True
        Scheduler(
            self.model,
            self.tokenizer,
            self._config,
            self.prefixes,
            self._limits,
            cache=self._cache,
            drafters=self._drafters,
            arrivals=functools.partial(self._arrivals, [*channels]),
            arrived=lambda: not self._jobs.empty(),
            left=self._left,
            stepped=self._stepped,
        ).run()

    def _arrivals(self, first: list[Channel]) -> Iterator[Row]:
        """The rows of `first`, which is empty then, and of what has come since."""
        channels, first[:] = [*first], []
        while not self._jobs.empty():
            job = self._jobs.get()
            if job is None:  # what is being served comes first
                self._jobs.put(None)
                break
            channels += job[1]
        for channel in channels:
            if not channel.requests:
                self._left(channel)
            for index, request in enumerate(channel.requests):
                yield self._row(channel, index, request)

    def _row(self, channel: Channel, index: int, request: Request) -> Row:
        room = self.context_length - len(request.prompt_ids)
        limit = min(request.params.max_new_tokens or room, room)
        constraint = None
        if request.grammar is not None:
            constraint = functools.partial(self._grammars.constraint, request.grammar, limit)
        stop_ids = self._stop_ids(request.params)
        return Row(channel, index, self._detokenizer(), stop_ids, limit, constraint)

    def _stepped(self) -> None:
        self.steps += 1

    def _left(self, channel: Channel) -> None:
        channel.put(None)
        channel.finished.set()
        self._channels.discard(channel)


_Jobs = queue.SimpleQueue["tuple[Gemma2Engine, Sequence[Channel]] | None"]
_open_engines: weakref.WeakSet[Gemma2Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A daemon thread inside torch while the interpreter goes down is a crash: end them first."""
    for engine in list(_open_engines):
        engine.close()


def _work(jobs: _Jobs) -> None:
    """The worker thread: one group after the other, until None."""
    while (job := jobs.get()) is not None:
        engine, channels = job
        engine._serve(channels)
        # While we wait for the next, nothing of this one may be held, the engine included.
        del engine, channels, job


def _drafters(model: Any, assistant: Any, tokens: int | None) -> list[Drafter]:
    """What guesses tokens ahead. Raises ParameterError."""
    drafters: list[Drafter] = [Lookup(tokens)] if tokens is not None else []
    if assistant is not None:
        ours, theirs = (each.get_input_embeddings().num_embeddings for each in (model, assistant))
        if ours != theirs:
            raise ParameterError(
                f"assistant={path_of(assistant)!r} has a vocabulary of {theirs:,} tokens and the "
                f"model one of {ours:,}, and one must be able to read the other: give a smaller "
                "model of the same family"
            )
        drafters.append(Assistant(assistant))
    for each in (model, assistant) if drafters else ():
        if each is not None and not can_join(each.config):
            raise ParameterError(
                f"{path_of(each)!r} has layers that can't take back what they have read, as "
                "speculation must: leave out assistant and prompt_lookup_num_tokens"
            )
    return drafters


def _check_fast(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ParameterError(
            f"tokenizer={type(tokenizer).__name__} is not a fast tokenizer: load it with "
            "AutoTokenizer from a folder that has tokenizer.json"
        )


def _greedy(model: Any, tokenizer: Any) -> GenerationConfig:
    """The checkpoint's generation config, for one choice a step: ours to make, see sampling.py."""
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    # Explicit and neutral (50 is what transformers takes for no top_k), since `generate` fills what
    # is None from the checkpoint.
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None}
    neutral |= {"repetition_penalty": 1.0, "num_beams": 1, "num_return_sequences": 1}
    ours: dict[str, object] = {"do_sample": False, "use_cache": True, "cache_implementation": None}
    ours |= {"max_length": None, "prefill_chunk_size": None}
    for name, value in (neutral | ours).items():
        setattr(config, name, value)
    config.eos_token_id = end_ids(model.generation_config, tokenizer)
    config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return config
