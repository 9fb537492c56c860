"""What `Gemma2LLM` and the chat model have in common: their fields, their engine, their requests.

Knows LangChain's conventions and the engine's `Protocol`; imports no torch.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, ClassVar, Literal, Self, TypedDict, Unpack
from weakref import WeakValueDictionary

from langchain_core.language_models import LangSmithParams
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr, model_validator

from . import __version__
from .errors import ParameterError
from .loading import LoadSpec, shared_engine
from .remote import RemoteSpec, remote_engine
from .stream import TokenStream
from .together import Place
from .types import (
    ENGINE_OPTIONS,
    SAMPLING_NAMES,
    Chunk,
    Engine,
    Request,
    SamplingParams,
    Turn,
    unknown_name,
)

CALL_NAMES = SAMPLING_NAMES | {"max_tokens", "model"}
"""What a call may say in place of the model's own parameter."""

_LOADING_NAMES = [name for name in LoadSpec.__slots__ if name != "model"]
_REMOTE_NAMES = [name for name in RemoteSpec.__slots__ if name != "max_retries"]
_ONLY_REMOTE = ("base_url", "tokenizer", "read_timeout")
_NEVER_DECIDE = ("assistant_model", *ENGINE_OPTIONS)  # what is said, only how soon


class Parameters(TypedDict, total=False):
    """Keyword arguments of `Gemma2LLM` and of the chat model, with those of LangChain's own."""

    engine: Engine | None
    max_new_tokens: int | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    timeout: float | None
    revision: str | None
    source: str | None
    cache_dir: str | os.PathLike[str] | None
    base_url: str | None
    tokenizer: str | os.PathLike[str] | None
    read_timeout: float | None
    dtype: str | None
    device_map: str | dict[str, str | int] | None
    attn_implementation: str | None
    preset: str | None
    assistant_model: str | os.PathLike[str] | None
    prompt_lookup_num_tokens: int | None
    max_rows: int | None
    max_waiting: int | None
    max_cached_tokens: int | None
    prefix_cache_bytes: int | None
    api_key: SecretStr | str | None
    max_retries: int | None
    name: str | None
    cache: Any
    verbose: bool
    callbacks: Any
    tags: list[str] | None
    metadata: dict[str, Any] | None
    custom_get_token_ids: Any


class Gemma2Fields(BaseModel):
    """Fields for sampling and loading, checked when the object is made, and the engine behind them.

    `None` means what the checkpoint's generation config says; `sampling_params` tells what will be
    used. Nothing is loaded before `engine` is first needed.
    """

    model_config = ConfigDict(
        populate_by_name=True, extra="forbid", arbitrary_types_allowed=True, protected_namespaces=()
    )

    model: str = "demo"
    custom_engine: Engine | None = Field(default=None, alias="engine", exclude=True, repr=False)
    max_new_tokens: int | None = Field(default=None, alias="max_tokens")
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    timeout: float | None = None
    revision: str | None = None
    source: str | None = None
    cache_dir: str | None = None
    base_url: str | None = None
    tokenizer: str | None = None
    read_timeout: float | None = None
    dtype: str | None = None
    device_map: str | None = None
    attn_implementation: str | None = None
    preset: str | None = None
    assistant_model: str | None = None
    prompt_lookup_num_tokens: int | None = None
    max_rows: int | None = None
    max_waiting: int | None = None
    max_cached_tokens: int | None = None
    prefix_cache_bytes: int | None = None
    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)
    max_retries: int | None = None
    custom_get_token_ids: Callable[[str], list[int]] | None = Field(default=None, exclude=True)
    _place: Place | None = PrivateAttr(default=None)
    _ls_type: ClassVar[Literal["llm", "chat"]]

    def __init__(
        self, model: str | os.PathLike[str] | None = None, **parameters: Unpack[Parameters]
    ) -> None:
        super().__init__(**_checked(type(self), model, dict(parameters)))

    @model_validator(mode="after")
    def _set_gemma2_stream_version(self) -> Self:
        self._add_version("gemma2-stream", __version__)  # type: ignore[attr-defined]
        return self

    @property
    def engine(self) -> Engine:
        """The engine: the one given, or the process's own for these weights, loaded on first use;
        with a `base_url`, the one that asks the server there.

        Raises ModelNotFoundError, ModelAccessError, DownloadError or CheckpointError.
        """
        if self.custom_engine is not None:
            return self.custom_engine
        spec = self._spec
        if isinstance(spec, RemoteSpec):
            return remote_engine(spec)
        return shared_engine(
            spec,
            token=self.api_key.get_secret_value() if self.api_key is not None else None,
            max_retries=self.max_retries or 0,
        )

    @property
    def sampling_params(self) -> SamplingParams:
        """Every parameter as it will be used, with the checkpoint's own where none was given."""
        return self._given.over(self.engine.defaults)

    @property
    def _given(self) -> SamplingParams:
        given = {name: getattr(self, name) for name in SAMPLING_NAMES}
        return SamplingParams(**{**given, "stop": self.stop or ()})

    @property
    def _loading(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _LOADING_NAMES}

    @property
    def _spec(self) -> LoadSpec | RemoteSpec:
        """Where the model comes from."""
        if self.base_url is None:
            return LoadSpec(model=self.model, **self._loading)
        return RemoteSpec(
            **{name: getattr(self, name) for name in _REMOTE_NAMES},
            max_retries=self.max_retries or 0,
        )

    @property
    def _parameters(self) -> dict[str, Any]:
        """All that decides an answer, in plain JSON types: LangChain's cache key is made of it."""
        sampling = {name: getattr(self, name) for name in sorted(SAMPLING_NAMES)}
        loading = {k: v for k, v in self._loading.items() if k not in _NEVER_DECIDE}
        # Two engines of one checkpoint share a name, and a relative folder is another elsewhere.
        for name in ("dtype", "attn_implementation"):
            loading[name] = getattr(self.custom_engine, name, loading[name])
        if self.base_url is not None:  # there may be other weights of that name
            there = {"base_url": self.base_url, "tokenizer": self.tokenizer}
            return {"model": self.model, **there, **loading, **sampling}
        model = os.path.abspath(self.model) if os.path.isdir(self.model) else self.model
        return {"model": model, **loading, **sampling}

    def _with(self, overrides: dict[str, Any]) -> Self:
        """This model with per-call `overrides`, `model` among them, as its own parameters.

        LangChain leaves per-call arguments out of its cache key; as fields they are in it. Raises
        ParameterError.
        """
        values = _renamed(dict(overrides))
        model = values.pop("model", None)
        params = self._given.override(**values)
        update = {name: getattr(params, name) for name in SAMPLING_NAMES}
        update["stop"] = list(params.stop) or None
        if model not in (None, self.model):
            update |= {"model": os.fspath(model), "custom_engine": None}
        if all(getattr(self, name) == value for name, value in update.items()):
            return self
        copy = self.model_copy(update=update)
        # A cached_property of LangChain's that would describe the original.
        copy.__dict__.pop("_serialized", None)
        return copy

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        """What LangSmith shows of a call."""
        ours = {name: value for name, value in kwargs.items() if name in CALL_NAMES}
        called = self._with({**ours, "stop": stop})
        known = LangSmithParams(
            ls_provider="gemma2_stream", ls_model_name=called.model, ls_model_type=self._ls_type
        )
        if called.temperature is not None:
            known["ls_temperature"] = called.temperature
        if called.max_new_tokens is not None:
            known["ls_max_tokens"] = called.max_new_tokens
        if called.stop:
            known["ls_stop"] = called.stop
        return known

    def get_token_ids(self, text: str) -> list[int]:
        """Ids of plain text by Gemma's own tokenizer: no BOS, no turns."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self.engine.tokenize(text)

    def _requests(
        self, prompts: Sequence[str | Sequence[Turn]], *, raw: bool, grammar: str | None
    ) -> list[Request]:
        ids = [self.engine.encode(prompt, raw=raw) for prompt in prompts]
        return [Request(tuple(row), self._given, grammar) for row in ids]

    def _submit(
        self,
        prompts: Sequence[str | Sequence[Turn]],
        *,
        raw: bool = False,
        grammar: str | None = None,
    ) -> TokenStream:
        """One request a prompt, queued; the rows of one stream. Raises before any forward."""
        requests = self._requests(prompts, raw=raw, grammar=grammar)
        if self._place is not None:
            return self._place.join(self.engine, *requests).result()
        return self.engine.submit(requests)

    async def _asubmit(
        self,
        prompts: Sequence[str | Sequence[Turn]],
        *,
        raw: bool = False,
        grammar: str | None = None,
    ) -> TokenStream:
        """`_submit`, with the loop free meanwhile, for callers in the order in which they came.

        The first use may load the weights, and tokenizing a long prompt takes its time. A task that
        is cancelled here drops the stream, and a dropped stream is a cancelled one.
        """
        place = self._place

        def queue() -> TokenStream | Future[TokenStream]:
            requests = self._requests(prompts, raw=raw, grammar=grammar)
            if place is not None:
                return place.join(self.engine, *requests)
            return self.engine.submit(requests)

        async with _turnstile(self.custom_engine or self._spec):
            queued = await asyncio.to_thread(queue)
        if not isinstance(queued, Future):
            return queued
        try:
            # Outside, since others may have to come before it is there.
            return await asyncio.wrap_future(queued)
        except asyncio.CancelledError:
            queued.add_done_callback(_cancel)  # a traceback that is kept would keep the stream
            raise

    def _info(self, chunk: Chunk) -> dict[str, Any] | None:
        """What a row's last chunk says, as LangChain carries it; None for the others.

        LangChain adds up the info of merged chunks, so only one chunk may have any.
        """
        if chunk.usage is None:
            return None
        return {
            "finish_reason": chunk.finish_reason,
            "matched_stop": chunk.stop,
            "model_name": self.model,
            "token_usage": {
                "prompt_tokens": chunk.usage.prompt_tokens,
                "completion_tokens": chunk.usage.completion_tokens,
                "total_tokens": chunk.usage.total_tokens,
                "cached_tokens": chunk.usage.cached_tokens,
            },
        }


def _cancel(queued: Future[TokenStream]) -> None:
    if not queued.cancelled() and queued.exception() is None:
        queued.result().cancel()


# Weak, since a lock refers to its loop: each lives as long as somebody stands at it.
_turnstiles: WeakValueDictionary[tuple[int, object], asyncio.Lock] = WeakValueDictionary()


def _turnstile(model: LoadSpec | RemoteSpec | Engine) -> asyncio.Lock:
    """One lock for each model on each loop; asyncio's locks let through first who came first.

    Threads of an executor do not: without it, a short prompt would overtake a long one.
    """
    key = model if isinstance(model, LoadSpec | RemoteSpec) else id(model)
    return _turnstiles.setdefault((id(asyncio.get_running_loop()), key), asyncio.Lock())


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with `max_tokens` under its own name."""
    if "max_tokens" not in values:
        return values
    values = dict(values)
    short = values.pop("max_tokens")
    if short is not None and values.get("max_new_tokens") not in (None, short):
        raise ParameterError(
            f"max_tokens={short!r} and max_new_tokens={values['max_new_tokens']!r} are two names "
            "of one parameter: give one"
        )
    return {"max_new_tokens": short, **values} if short is not None else values


def _checked(
    cls: type[Gemma2Fields], model: str | os.PathLike[str] | None, given: dict[str, Any]
) -> dict[str, Any]:
    """Constructor arguments as fields. Raises ParameterError, before pydantic could hide it."""
    values = _renamed(given)
    if "custom_engine" in values:  # how LangChain rebuilds a configurable model: by field names
        values["engine"] = values.pop("custom_engine")
    known = {*cls.model_fields, "max_tokens", "engine"} - {"custom_engine"}
    for name in values.keys() - known:
        raise unknown_name(name, known)
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    SamplingParams(**{k: v for k in SAMPLING_NAMES if (v := values.get(k)) is not None})
    if not isinstance(values.get("api_key"), str | SecretStr | None):
        raise ParameterError("api_key is not a string: give the hub's token or the key as one")
    retries = values.get("max_retries") or 0
    if not isinstance(retries, int) or retries < 0:
        raise ParameterError(f"max_retries={retries!r} is not a whole number of tries, 0 or more")
    if isinstance(values.get("device_map"), dict):
        values["device_map"] = json.dumps(values["device_map"], sort_keys=True)
    for name in ("cache_dir", "assistant_model", "tokenizer"):
        if values.get(name) is not None:
            values[name] = os.fspath(values[name])
    loading = {name: values.get(name) for name in _LOADING_NAMES}
    LoadSpec(**loading)  # type: ignore[arg-type]  # it checks what it is given
    remote = {name: values.get(name) for name in _ONLY_REMOTE}
    name = _model_name(model, values.get("engine"), loading | remote)
    _check_remote(name, loading, remote)
    return {**values, "model": name}


def _check_remote(model: str, loading: Mapping[str, Any], remote: Mapping[str, Any]) -> None:
    """Refuse what says how to run weights here beside a server, and how to ask one without it."""
    if remote["base_url"] is not None:
        RemoteSpec(model=model, **remote)
        for name in loading.keys() - set(_REMOTE_NAMES):
            if loading[name] is not None:
                raise ParameterError(
                    f"{name}={loading[name]!r} says how to run weights here, and with base_url "
                    "they run on a server: leave it out, and tell the server"
                )
        return
    for name, value in remote.items():
        if value is not None:
            raise ParameterError(
                f"{name}={value!r} is about a server, and there is none: give its base_url too"
            )


def _model_name(model: str | os.PathLike[str] | None, engine: Any, loading: dict[str, Any]) -> str:
    """What to call the model; with an engine of the caller's own, what that calls itself."""
    if engine is None:
        return os.fspath(model or os.environ.get("GEMMA2_STREAM_MODEL") or "demo")
    if not isinstance(engine, Engine):
        raise ParameterError(
            f"engine={engine!r} is no engine: it needs name, defaults, encode, tokenize, submit, "
            "submit_each and close (see gemma2_stream.Engine)"
        )
    idle = [name for name, value in {"model": model, **loading}.items() if value is not None]
    if idle and (idle != ["model"] or model != engine.name):
        raise ParameterError(
            f"{idle[0]} says how to load weights, and engine={engine!r} has its own: give one or "
            "the other"
        )
    return engine.name
