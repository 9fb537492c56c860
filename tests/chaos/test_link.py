"""A link that is cut and says nothing: both ends are up, and no byte passes any more."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from census import nothing_left  # noqa: F401  # a fixture, found by being imported
from serving import Clock, Serving, read_until, request, serving
from tiny import random_gemma

from gemma2_stream import Gemma2Engine, Request, SamplingParams
from gemma2_stream.testing import FakeEngine

pytestmark = pytest.mark.chaos


class Link:
    """Forwards one connection both ways until it is `cut`. The server's side holds little."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._server = socket.socket()
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        self._server.connect(address)
        ours, self.client = socket.socketpair()
        self.client.settimeout(60)
        self._ends = [ours, self._server]
        self._whole = threading.Event()
        self._whole.set()
        self._threads = [
            threading.Thread(target=self._forward, args=ends)
            for ends in ((ours, self._server), (self._server, ours))
        ]
        for thread in self._threads:
            thread.start()

    def _forward(self, here: socket.socket, there: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while self._whole.is_set() and (data := here.recv(1_024)):
                there.sendall(data)

    def cut(self) -> None:
        self._whole.clear()

    def close(self) -> None:
        for end in (*self._ends, self.client):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in (*self._ends, self.client):
            end.close()


@contextlib.contextmanager
def linked(server: Serving) -> Iterator[Link]:
    link = Link(server.address)
    try:
        yield link
    finally:
        link.close()


def wait_for_the_begin(server: Serving) -> None:
    while not server.server.server_state.connections:
        time.sleep(0.01)  # a spinning thread would hold up the server's


def wait_for_the_end(server: Serving) -> None:
    """Let time pass until it holds no connection any more; what it has sent may never arrive."""
    while server.server.server_state.connections:
        time.sleep(0.01)
        server.later(61)
    server.over()


@pytest.fixture(scope="module")
def talkative(demo_engine: Gemma2Engine) -> Iterator[Gemma2Engine]:
    """One whose answers have no end, and are more than what lies between two processes."""
    model = random_gemma(vocab=4_096, num_hidden_layers=2)
    with Gemma2Engine(
        model, demo_engine.tokenizer, name="talkative", prefix_cache_bytes=0
    ) as engine:
        list(engine.submit([Request((2,), SamplingParams(max_new_tokens=1))]))  # starts its thread
        yield engine


@pytest.mark.usefixtures("nothing_left")
def test_an_answer_that_nobody_takes_ends(talkative: Gemma2Engine) -> None:
    """After `max_seconds` its rows are free."""
    with serving(talkative, max_seconds=60, loop=Clock) as server, linked(server) as link:
        link.client.sendall(request(stream=True, n=16, max_tokens=8_000))
        read_until(link.client, b'"content":"')
        link.cut()
        wait_for_the_end(server)
        talkative.join()
        (line,) = server.said("/v1/chat/completions")
        assert "length" not in line["finish_reasons"]
        assert server.chat(max_tokens=2).status_code == 200
        assert server.metric("requests_answering") == 0


def test_what_nobody_takes_does_not_hold_the_connection() -> None:
    """More than the kernel's buffers hold: the rest would be the server's to keep, for ever."""
    engine = FakeEngine([["x" * 100_000] * 200, "Hello"])
    with serving(engine, max_seconds=60, loop=Clock) as server, linked(server) as link:
        link.client.sendall(request(stream=True))
        read_until(link.client, b"xxx")
        link.cut()
        wait_for_the_end(server)
        assert server.chat().status_code == 200


@pytest.mark.usefixtures("nothing_left")
def test_a_question_that_does_not_arrive_is_given_up(demo_engine: Gemma2Engine) -> None:
    with serving(demo_engine, read_seconds=60, loop=Clock) as server, linked(server) as link:
        link.client.sendall(request()[:-5])
        wait_for_the_begin(server)
        link.cut()
        wait_for_the_end(server)
        assert server.chat(max_tokens=2).status_code == 200
