"""The application: OpenAI's endpoints over anything with an engine's few methods.

Knows nothing of sockets and processes, so that uvicorn, a test and a cluster run the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import pydantic_core
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from .. import __version__
from ..errors import EngineClosedError
from ..stream import TokenStream
from ..types import Chunk, Engine
from .answers import DONE, Answer, ChatAnswer, TextAnswer, event_line
from .gate import Gate
from .metrics import Metrics, Record
from .prompts import Work, chat_work, text_work
from .refusals import ErrorBody, NoSuchModel, refusal_of
from .requests import ChatRequest, Sampled, TextRequest
from .settings import Settings

T = TypeVar("T")

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "What was asked cannot be answered"},
    "5XX": {"model": ErrorBody, "description": "It could not be answered now"},
}


def create_app(engine: Engine, settings: Settings | None = None) -> FastAPI:
    """An ASGI application that answers for `engine`, which stays the caller's to close."""
    settings = settings or Settings()
    metrics = Metrics()
    app = FastAPI(
        title="gemma2_stream",
        version=__version__,
        # The pages would load scripts from another host.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=_ERRORS,
    )
    app.router.route_class = _Route
    app.include_router(_Endpoints(engine, settings, metrics).router())
    app.add_exception_handler(HTTPException, _refuse)
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


class _Request(Request):
    async def json(self) -> Any:
        """Stricter than Python's: no half characters, no NaN, no depth without end."""
        try:
            return pydantic_core.from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(400, f"the body is not JSON: {error}") from None


class _Route(APIRoute):
    """A route whose errors are all in OpenAI's form."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            record: Record = request.state.record
            record.path = self.path_format
            try:
                return await handle(_Request(request.scope, request.receive))
            except Exception as error:
                record.error = type(error).__name__
                return refusal_of(error).response()

        return handler


async def _refuse(request: Request, error: Exception) -> Response:
    return refusal_of(error).response()


_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with stream=true as events, whose last is [DONE]",
        "content": {"text/event-stream": {}},
    }
}


class _Endpoints:
    """What is asked, on its way to the engine and back."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self._engine = engine
        self._settings = settings
        self._metrics = metrics
        self._name = settings.model or engine.name
        self._model = {
            "id": self._name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "gemma2_stream",
            "max_model_len": getattr(engine, "context_length", None),  # as vLLM calls it
        }
        # Tokenizing takes its time, and whoever came first is to be queued first.
        self._turn = asyncio.Lock()

    def router(self) -> APIRouter:
        router = APIRouter(route_class=_Route)
        post, get = router.post, router.get
        post("/v1/chat/completions", responses=_STREAMED)(self.chat_completions)
        post("/v1/completions", responses=_STREAMED)(self.completions)
        get("/v1/models")(self.models)
        get("/v1/models/{model:path}")(self.one_model)
        get("/health")(self.health)
        get("/metrics", response_class=PlainTextResponse)(self.metrics)
        return router

    async def chat_completions(self, request: Request, asked: ChatRequest) -> Response:
        """Answer a conversation."""
        work = partial(chat_work, asked, self._engine, self._settings)
        return await self._answer(request, asked, work, ChatAnswer)

    async def completions(self, request: Request, asked: TextRequest) -> Response:
        """Go on with a text."""
        work = partial(text_work, asked, self._engine, self._settings)
        return await self._answer(request, asked, work, TextAnswer)

    async def models(self) -> dict[str, Any]:
        """The model, as a list."""
        return {"object": "list", "data": [self._model]}

    async def one_model(self, model: str) -> dict[str, Any]:
        """The model, if that is its name."""
        self._check_model(model)
        return self._model

    async def health(self) -> dict[str, str]:
        """Whether requests are taken."""
        if getattr(self._engine, "closed", False):
            raise EngineClosedError
        return {"status": "ok"}

    async def metrics(self) -> Response:
        """Counts, in Prometheus' form."""
        told = generate_latest(self._metrics.registry)
        return Response(told, media_type=CONTENT_TYPE_LATEST)

    async def _answer(
        self,
        request: Request,
        asked: Sampled,
        work: Callable[[], Work],
        kind: type[Answer],
    ) -> Response:
        record: Record = request.state.record
        self._check_model(asked.model)
        record.submitted()
        answer, stream, first = await _while_there(request.receive, self._begin(work, kind))
        record.begun()
        record.finish_reasons = answer.finish_reasons
        chunks = _counted(stream, first, record)
        if asked.stream:
            usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
            return _EventResponse(stream, _events(answer, chunks, record, usage=usage))
        with stream:
            return JSONResponse(await _while_there(request.receive, _whole(answer, chunks)))

    async def _begin(
        self, work: Callable[[], Work], kind: type[Answer]
    ) -> tuple[Answer, TokenStream, Chunk]:
        """The answer and its first chunk: what goes wrong before has a status of its own."""

        def submit() -> tuple[Work, TokenStream]:
            rows = work()
            return rows, self._engine.submit(rows.rows)

        async with self._turn:
            rows, stream = await asyncio.to_thread(submit)
        try:
            return kind(self._name, rows), stream, await anext(stream)
        except BaseException:
            stream.close()
            raise

    def _check_model(self, wanted: str) -> None:
        if wanted != self._name:
            raise NoSuchModel(wanted, self._name)


# Answers -------------------------------------------------------------------------------------


async def _counted(stream: TokenStream, first: Chunk, record: Record) -> AsyncIterator[Chunk]:
    chunk: Chunk | None = first
    while chunk is not None:
        if chunk.usage is not None:
            record.count(chunk.usage)
        yield chunk
        chunk = await anext(stream, None)


async def _whole(answer: Answer, chunks: AsyncIterator[Chunk]) -> dict[str, Any]:
    return answer.whole([delta async for chunk in chunks for delta in answer.deltas(chunk)])


async def _events(
    answer: Answer, chunks: AsyncIterator[Chunk], record: Record, *, usage: bool
) -> AsyncIterator[bytes]:
    more = {"usage": None} if usage else {}
    choices = answer.opening()
    try:
        async for chunk in chunks:
            choices += answer.deltas(chunk)
            # One write for all that came at once: it costs more than everything else here.
            yield b"".join(event_line(answer.event([choice], **more)) for choice in choices)
            choices = []
        last = event_line(answer.event([], usage=answer.usage())) if usage else b""
        yield last + DONE
    except Exception as error:  # too late for a status
        record.error = type(error).__name__
        yield event_line(refusal_of(error).body())


class _EventResponse(StreamingResponse):
    """Events of one stream, which is closed with them, whoever ends them."""

    def __init__(self, stream: TokenStream, events: AsyncIterator[bytes]) -> None:
        # Or a proxy would gather the answer, and send it whole.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stream, suppress(ClientDisconnect):
            await _while_there(receive, self.stream_response(send))


async def _while_there(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes. Raises ClientDisconnect."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
