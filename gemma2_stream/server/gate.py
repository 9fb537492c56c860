"""What every request passes: key, size, time, record. Knows ASGI and no engine."""

from __future__ import annotations

import asyncio
import logging

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics, Record
from .refusals import CLIENT_GONE, Refusal, refusal_of
from .settings import Settings

access = logging.getLogger("gemma2_stream.server.access")

OPEN_PATHS = ("/health",)
"""What a load balancer asks, which has no key."""

MAX_HEADER_BYTES = 16 * 2**10
"""More than any client sends, the address included."""

HEADERS_TOO_LARGE = Refusal(431, f"the headers have more than {MAX_HEADER_BYTES:,} bytes")

_GRACE = 10.0  # seconds for an error in words, before the connection is closed without


class Gate:
    """Refuses who has no key before the body is read, and a body that is too large while it is.

    Headers that are too large are refused first of all.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app = app
        self.settings = settings
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = scope.setdefault("state", {})["record"] = Record(self.metrics)
        passing = _Passing(scope, receive, send, record, self.settings.max_body_bytes)
        try:
            # Whoever reads too slowly holds a connection no longer than whoever reads.
            async with asyncio.timeout(self.settings.max_seconds + _GRACE):
                if refusal := self._refusal(scope):
                    await refusal.response()(scope, receive, passing.send)
                else:
                    await self.app(scope, passing.receive, passing.send)
        except TimeoutError as error:
            record.error = "TimeoutError"
            if not record.status:
                await refusal_of(error).response()(scope, receive, passing.send)
            # else: an answer that never ends is closed by the server below
        except asyncio.CancelledError:
            record.status = record.status or CLIENT_GONE
            raise
        finally:
            record.end()
            client = scope.get("client") or ("", 0)
            # The path of the route, never what was asked for: that may hold anything.
            about = {"method": scope["method"], "path": record.path, "client": client[0]}
            access.info("request", extra={"fields": {**about, **record.log()}})

    def _refusal(self, scope: Scope) -> Refusal | None:
        said = [
            scope["path"],
            scope["query_string"],
            *(part for pair in scope["headers"] for part in pair),
        ]
        if sum(map(len, said)) > MAX_HEADER_BYTES:  # uvicorn only stops those that come in pieces
            return HEADERS_TOO_LARGE
        headers = dict(scope["headers"])
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path not in OPEN_PATHS and not self.settings.keys.admit(
            headers.get(b"authorization", b"")
        ):
            return Refusal(
                401,
                "the key is missing or wrong: send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.settings.max_body_bytes:
            return _too_large(self.settings.max_body_bytes)
        return None


class _Passing:
    """The channels of one request."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, record: Record, most: int
    ) -> None:
        self._receive, self._send = receive, send
        self._record, self._left, self._most = record, most, most

    async def receive(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            said = _too_large(self._most)
            raise HTTPException(said.status, said.message)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
        await self._send(message)


def _too_large(most: int) -> Refusal:
    # The connection stays: who is still writing would not read why it was closed. uvicorn drops
    # the rest, for as long as a request may take to come.
    return Refusal(413, f"the body has more than {most:,} bytes")
