"""uvicorn around the application: addresses, the sockets of the slow, and what the log says."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import sys
import time
from typing import IO, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import ParameterError
from ..types import Engine
from .app import create_app
from .gate import HEADERS_TOO_LARGE, MAX_HEADER_BYTES
from .refusals import TOO_MANY, Refusal
from .settings import Settings

READ_SECONDS = 30.0

NO_HTTP = Refusal(400, "this is no HTTP that the server understands")


def check_address(host: str, settings: Settings, *, public_without_key: bool = False) -> None:
    """Raises ParameterError for an address that others reach, without a key."""
    if not (len(settings.keys) or public_without_key or is_loopback(host)):
        raise ParameterError(
            f"host={host!r} is open to others, and there is no key: give keys with "
            "--api-key-file or $GEMMA2_STREAM_API_KEYS, or say --allow-public-without-key"
        )


def serve(engine: Engine, settings: Settings, **options: Any) -> int:
    """Serve with the options of `server` until a signal; the exit status. Closes the engine."""
    running = server(engine, settings, **options)
    try:
        running.run()
    finally:
        engine.close()
    return 0 if running.started else 1


def server(
    engine: Engine,
    settings: Settings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_connections: int = 256,
    read_seconds: float = READ_SECONDS,
    drain_seconds: int = 60,
    log: IO[str] | None = None,
) -> uvicorn.Server:
    """A server for `engine` that `run()` runs until a signal, and then finishes what it has begun.

    A request must be there `read_seconds` after its first byte, and a connection's first after it
    was made. Whoever takes nothing of what is sent for `max_seconds` is cut off. Answers in the
    making have `drain_seconds` to end. Whoever connects when there are `max_connections` is told to
    come back.
    """
    log_to(log or sys.stderr)
    config = uvicorn.Config(
        create_app(engine, settings),
        host=host,
        port=port,
        http=_guarded(read_seconds, settings.max_seconds, max_connections),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.INFO,  # whatever another server of the process has set
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a client could say that it is another
        timeout_graceful_shutdown=drain_seconds,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )
    return uvicorn.Server(config)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; a name but localhost may be anywhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _guarded(read_seconds: float, send_seconds: float, most: int) -> type[H11Protocol]:
    limits = {"read_seconds": read_seconds, "send_seconds": send_seconds, "most": most}
    return type("Guarded", (_Guarded,), limits)


class _Guarded(H11Protocol):
    """uvicorn's protocol waits without end for a request that does not end, and for what it has
    sent to be taken; this one does not.

    It also says in OpenAI's form that there are too many connections, or what is wrong with a
    request that is none, for which uvicorn has plain text.
    """

    read_seconds: float
    send_seconds: float
    most: int
    _reading: asyncio.TimerHandle | None = None
    _sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self.logger.warning("more connections than max_connections=%d", self.most)
            self.app = TOO_MANY.response()
        transport.set_write_buffer_limits(high=0)  # writing is paused while anything is left
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def send_400_response(self, msg: str) -> None:
        # Called where h11's error is handled, which knows the status.
        too_large = getattr(sys.exc_info()[1], "error_status_hint", 400) == 431
        answer = (HEADERS_TOO_LARGE if too_large else NO_HTTP).response()
        headers = [*answer.raw_headers, (b"connection", b"close")]
        head = h11.Response(status_code=answer.status_code, headers=headers)
        for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        # `close` would wait until all is sent.
        self._sending = self.loop.call_later(self.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._sending = _stopped(self._sending)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._reading, self._sending = _stopped(self._reading), _stopped(self._sending)

    def _watch(self) -> None:
        reading = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if not reading or self.transport.is_closing():
            self._reading = _stopped(self._reading)
        elif self._reading is None:
            self._reading = self.loop.call_later(self.read_seconds, self.transport.close)


def _stopped(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    if timer is not None:
        timer.cancel()
    return None


class _Lines(logging.Formatter):
    """JSON lines; a record's `fields` are members of their own."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage().strip(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False)


def log_to(stream: IO[str]) -> None:
    """Have the server's log on `stream`, as JSON lines, and nowhere else."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Lines())
    for name in ("uvicorn", "gemma2_stream.server"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
