"""A real server on loopback, in a thread, for a test: uvicorn, sockets and all."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from gemma2_stream import Engine, Request, TokenStream
from gemma2_stream.server import Settings, run
from gemma2_stream.testing import FakeEngine

HELLO = [{"role": "user", "content": "Hello"}]


def request(
    body: bytes | None = None, *, path: str = "/v1/chat/completions", **asked: Any
) -> bytes:
    """A request as it goes over the wire; `body`, or a conversation with what is `asked`."""
    if body is None:
        body = json.dumps({"model": "served", "messages": HELLO, **asked}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def read_until(client: socket.socket, wanted: bytes = b"\0never\0") -> bytes:
    """What comes up to `wanted`, or until the server closes."""
    got = b""
    # A server that closes before it has read all that was sent resets the connection.
    with contextlib.suppress(ConnectionResetError):
        while wanted not in got and (more := client.recv(65536)):
            got += more
    return got


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """One at which nobody listens, and which nobody is given, but whoever asks for it by number."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


class Keeping(FakeEngine):
    """Holds its streams, so that none ends because nobody does."""

    def __init__(self, answers: Any) -> None:
        super().__init__(answers)
        self.streams: list[TokenStream] = []

    def submit(self, requests: Sequence[Request]) -> TokenStream:
        self.streams.append(super().submit(requests))
        return self.streams[-1]


class Clock(asyncio.SelectorEventLoop):
    """An event loop for `serving(..., loop=Clock)`, whose time goes on when a test says so."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


@dataclass
class Serving:
    """One that runs: its `address`, `url`, an HTTP client for it, and what it has logged.

    What it does once a client has its answer, or has left, it does a little later: `over` waits.
    """

    server: uvicorn.Server
    address: tuple[str, int]
    client: httpx.Client
    log: io.StringIO
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}"

    def chat(self, **asked: Any) -> httpx.Response:
        body = {"model": "served", "messages": HELLO, **asked}
        return self.client.post("/v1/chat/completions", json=body)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=60)

    def over(self) -> None:
        """Wait until each request so far is over: its stream closed, counted, and logged."""

        async def wait() -> None:
            await _all_read()
            while tasks := [*self.server.server_state.tasks]:
                await asyncio.wait(tasks)

        self._run(wait())

    def later(self, seconds: float) -> None:
        """Let time pass on its `Clock`, once it has read what was sent so far."""

        async def go_on() -> None:
            await _all_read()
            assert isinstance(self.loop, Clock)
            self.loop.ahead += seconds
            await _all_read()

        self._run(go_on())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def said(self, path: str | None = None) -> list[dict[str, Any]]:
        """The log so far, line by line, or what it says of requests for `path`."""
        lines = [json.loads(line) for line in self.log.getvalue().splitlines()]
        return [line for line in lines if path in (None, line.get("path"))]

    def metric(self, name: str, **labels: str) -> float:
        """The value of one of `/metrics`; 0 where it has none yet."""
        inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
        wanted = f"gemma2_stream_{name}" + (f"{{{inside}}}" if inside else "")
        for line in self.client.get("/metrics").text.splitlines():
            if line.rpartition(" ")[0] == wanted:
                return float(line.rpartition(" ")[2])
        return 0.0


async def _all_read() -> None:
    """Have the loop go round often enough to accept a connection and to read what came by it."""
    for _ in range(20):
        await asyncio.sleep(0)


@contextlib.contextmanager
def serving(
    engine: Engine,
    *,
    loop: Callable[[], asyncio.AbstractEventLoop] | None = None,
    **options: Any,
) -> Iterator[Serving]:
    """`serving(engine, max_tokens=5, read_seconds=1)`: settings and the server's own options.

    It runs on the event loop that uvicorn takes, or on one that `loop` makes.
    """
    ours = {name: options.pop(name) for name in [*options] if name in Settings.__slots__}
    log = io.StringIO()
    settings = Settings(**{"model": "served", **ours})
    server = run.server(engine, settings, log=log, **options)
    runner = asyncio.Runner(loop_factory=loop or server.config.get_loop_factory())

    # Listening from here on, so that nobody has to wait until it is up.
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with runner:
                runner.run(server.serve(sockets=[listening]))

        running = runner.get_loop()
        thread = threading.Thread(target=serve)
        thread.start()
        address = listening.getsockname()
        with httpx.Client(base_url=f"http://127.0.0.1:{address[1]}", timeout=60) as client:
            try:
                yield Serving(server, address, client, log, running)
            finally:
                client.close()
                server.should_exit = True
                thread.join(60)
                assert not thread.is_alive()
