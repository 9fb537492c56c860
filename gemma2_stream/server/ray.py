"""The server as replicas on many machines: `create_app` in a Ray Serve deployment, of one tier.

    serve run gemma2_stream.server.ray:app model=google/gemma-2-9b-it api_key_file=/etc/keys.txt

    app = Gemma2.options(num_replicas=2).bind(make)   # for an engine of your own

Knows Ray, and nothing of what is asked and answered. From the extra `[ray]`.
"""

# Without `from __future__ import annotations`: Ray reads the type that `app` takes.
import asyncio
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, model_validator

from ..errors import EngineBusyError, ParameterError
from ..types import MAX_ROWS, Engine, Request, SamplingParams, unknown_name
from .app import create_app
from .run import log_to
from .settings import Keys, Settings, public_name

try:
    from ray import serve
except ModuleNotFoundError as missing:
    raise ParameterError(
        f"replicas need {missing.name}: pip install 'gemma2-stream[ray]'"
    ) from missing

_LIMITS = ("cors_origins", "max_prompt_tokens", "max_tokens", "max_seconds", "max_body_bytes")
_LOADING = {"revision", "source", "cache_dir", "dtype", "device_map", "preset"}
_LOADING |= {"max_rows", "max_waiting"}
_BY_DEFAULT = Settings()
_DRAIN = 20.0  # seconds above `max_seconds`, with which the server itself ends an answer


async def check(engine: Engine, seconds: float = 20.0) -> None:
    """Have `engine` make a token. Raises what keeps it from that.

    A token may have to wait until others are made, and then it is enough that those are: busy is
    not broken. Raises RuntimeError where nothing is made for `seconds`; Ray gives a check 30.
    """
    one = Request(tuple(engine.encode("Hi")), SamplingParams(max_new_tokens=1))
    before = _steps(engine)
    try:
        async with asyncio.timeout(seconds):
            try:
                with engine.submit([one]) as stream:
                    async for _ in stream:
                        pass
            except EngineBusyError:
                while _steps(engine) == before:  # noqa: ASYNC110 - a thread makes them
                    await asyncio.sleep(0.1)
    except TimeoutError:
        if _steps(engine) == before:
            raise RuntimeError(f"{engine.name!r} made no step in {seconds} s") from None


def _steps(engine: Engine) -> int:
    return getattr(engine, "steps", 0)


class Arguments(BaseModel):
    """What `serve run` takes as `name=value`, and a configuration under `args`.

    The options of `gemma2-stream serve`, but for those of sockets, which are Ray's. Files and
    folders are read by each replica, on its own machine.
    """

    model: str = "demo"
    name: str | None = None
    api_key_file: str | None = None
    allow_public_without_key: bool = False
    cors_origins: tuple[str, ...] = ()
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    max_seconds: float = _BY_DEFAULT.max_seconds
    max_body_bytes: int = _BY_DEFAULT.max_body_bytes
    max_rows: int | None = None
    max_waiting: int | None = 128
    revision: str | None = None
    source: str | None = None
    cache_dir: str | None = None
    dtype: str | None = None
    device_map: str | None = None
    preset: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        for name in given:
            if name not in cls.model_fields:
                raise unknown_name(name, set(cls.model_fields))
        return given

    def settings(self) -> Settings:
        """Without keys. Raises ParameterError."""
        limits = {name: getattr(self, name) for name in _LIMITS}
        return Settings(model=self.name or public_name(self.model), **limits)

    def make(self) -> tuple[Engine, Settings]:
        """In a replica: the keys are read, and the weights loaded. Raises ParameterError."""
        keys = Keys.read(self.api_key_file)
        if not (len(keys) or self.allow_public_without_key):
            raise ParameterError(
                "there is no key, and Ray decides who reaches this: give api_key_file=FILE, or "
                "$GEMMA2_STREAM_API_KEYS to each machine, or say allow_public_without_key=true"
            )
        from ..chat import ChatGemma2

        options: dict[str, Any] = {name: getattr(self, name) for name in _LOADING}
        engine = ChatGemma2(self.model, **options).engine
        return engine, dataclasses.replace(self.settings(), keys=keys)


class Replica:
    """A replica: what `make()` gives, an engine and its settings, behind the application.

    It is called in the replica, and travels there pickled. The replica closes the engine.
    """

    def __init__(self, make: Callable[[], tuple[Engine, Settings]]) -> None:
        log_to(sys.stderr)
        self._engine, self._settings = make()

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(self._engine, self._settings)

    async def check_health(self) -> None:
        """Ray replaces a replica for which this raises three times, or takes too long."""
        await check(self._engine)

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()


Gemma2 = serve.deployment(
    serve.ingress()(Replica),
    name="Gemma2",
    # What a replica decodes at once. The others wait where any replica can take them.
    max_ongoing_requests=MAX_ROWS,
    # Requests on their way to an idle replica count too, so that few would be too few.
    max_queued_requests=128,
    backpressure_config={"status_code": 503, "retry_after_s": 1},
    # The next turn of a conversation goes where its prefix is cached.
    request_router_config={
        "request_router_class": (
            "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
        )
    },
    graceful_shutdown_timeout_s=_BY_DEFAULT.max_seconds + _DRAIN,
    # An engine that cannot be made is not made by trying 20 times.
    max_constructor_retry_count=3,
)


def app(arguments: Arguments) -> serve.Application:
    """What `serve run` and `serve deploy` call; raises ParameterError for what is wrong."""
    arguments.settings()  # here, before any replica tries
    return Gemma2.options(
        max_ongoing_requests=arguments.max_rows or MAX_ROWS,
        graceful_shutdown_timeout_s=arguments.max_seconds + _DRAIN,
    ).bind(arguments.make)
