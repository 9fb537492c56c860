"""Clients that leave, crawl, lie or attack: none costs the others anything, and nothing stays."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from serving import HELLO, Clock, Keeping, Serving, read_until, request, serving
from tiny import Forwards
from transformers import DynamicCache

from gemma2_stream import Gemma2Engine
from gemma2_stream.server import create_app
from gemma2_stream.server.refusals import ErrorBody
from gemma2_stream.testing import FakeEngine


@pytest.fixture(scope="module")
def served(demo_engine: Gemma2Engine) -> Iterator[Serving]:
    with serving(demo_engine, max_tokens=20) as server:
        yield server
        # Whatever was tried, the next one is answered, and nothing is left.
        assert server.chat().status_code == 200
        server.over()
        assert server.metric("requests_waiting") == server.metric("requests_answering") == 0
        assert not [line for line in server.said() if line["level"] == "error"]


# Who leaves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at", [1, 5], ids=["before the first token", "in the answer"])
def test_whoever_goes_costs_a_step_at_most(
    demo_engine: Gemma2Engine,
    forwards: Callable[[Gemma2Engine], Forwards],
    new_caches: Callable[[], list[DynamicCache]],
    at: int,
    stream: bool,
) -> None:
    watch = forwards(demo_engine)
    reached, release = watch.gate(at)
    with serving(demo_engine) as server:
        with server.connect() as client:
            client.sendall(request(stream=stream, max_tokens=500))
            assert reached.wait(60)
        server.over()  # it has seen it; the model has not gone on meanwhile
        release.set()
        demo_engine.join()
        assert watch.count <= at + 1
        (line,) = server.said("/v1/chat/completions")
        assert line.get("error") in (None, "ClientDisconnect")  # and the model has not failed
        assert server.chat(max_tokens=2).status_code == 200
    demo_engine.prefixes.clear()
    demo_engine.join()
    assert new_caches() == []


def test_whoever_goes_while_a_token_waits_to_be_sent_costs_a_step_at_most(
    demo_engine: Gemma2Engine, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """Its connection takes no more; then it is gone, and no garbage is collected."""
    watch = forwards(demo_engine)
    reached, release = watch.gate(5)
    app = create_app(demo_engine)
    body = json.dumps({"model": demo_engine.name, "messages": HELLO, "stream": True}).encode()
    received = iter([{"type": "http.request", "body": body}])

    async def receive() -> dict[str, Any]:
        if (message := next(received, None)) is None:
            await asyncio.to_thread(reached.wait, 60)
            return {"type": "http.disconnect"}
        return message

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def leave() -> None:
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions"}
        await app({**scope, "headers": headers, "query_string": b""}, receive, send)
        release.set()
        await asyncio.to_thread(demo_engine.join)

    gc.disable()
    try:
        asyncio.run(leave())
    finally:
        gc.enable()
    assert watch.count <= 6


@pytest.mark.parametrize("stream", [False, True])
def test_the_stream_of_whoever_goes_is_closed(stream: bool) -> None:
    """By the server, which leaves it to no collector of garbage."""
    gate = threading.Event()
    engine = Keeping([["Hel", gate, "lo"]])
    with serving(engine) as server:
        with server.connect() as client:
            client.sendall(request(stream=stream))
            while not server.metric("requests_answering"):
                pass
        server.over()
        gate.set()
        engine.join()
    assert engine.calls[0].finish_reason == "cancelled"


def test_what_was_asked_by_one_who_left_is_logged_as_such() -> None:
    gate = threading.Event()
    engine = FakeEngine([[gate]])
    with serving(engine) as server:
        with server.connect() as client:
            client.sendall(request())
            while not engine.calls:
                server.client.get("/health")
        server.over()
        engine.join()
        assert engine.calls[0].finish_reason == "cancelled"
    (line,) = server.said("/v1/chat/completions")
    assert line["status"] == 499


# Who is slow -------------------------------------------------------------------------------------


def test_a_slow_reader_holds_nobody() -> None:
    """More than all buffers take, for one who does not read; another is answered meanwhile."""
    engine = FakeEngine([["x" * 100_000] * 100, "Hello"])
    with serving(engine) as server, server.connect() as crawling:
        crawling.sendall(request(stream=True))
        begun = read_until(crawling, b"data: ")
        assert server.chat().json()["choices"][0]["message"]["content"] == "Hello"
        rest = read_until(crawling, b"[DONE]")
        assert (begun + rest).count(b"x" * 100_000) == 100


def patient(engine: FakeEngine) -> contextlib.AbstractContextManager[Serving]:
    """A server that waits 900 seconds, of its own clock, for a request."""
    return serving(engine, read_seconds=900, max_seconds=9_000, loop=Clock)


@pytest.mark.parametrize(
    "start",
    [b"", b"POST /v1/chat", request()[:90], request()[:-5], b"GET /health HTTP/1.1\r\nX: "],
    ids=["nothing", "no line", "no headers", "no end", "no end of a header"],
)
def test_whoever_does_not_finish_asking_is_shown_out(start: bytes) -> None:
    with patient(FakeEngine([])) as server, server.connect() as client:
        client.sendall(start)
        server.later(1000)
        assert read_until(client) == b""  # closed, without our doing


@pytest.mark.parametrize("rest", [-60, -120], ids=["body", "headers"])
def test_whoever_asks_byte_by_byte_is_shown_out(rest: int) -> None:
    """A byte now and then buys no time."""
    asked = request()
    with patient(FakeEngine(["Hello"])) as server, server.connect() as client:
        client.sendall(asked[:rest])
        for byte in asked[rest : rest + 2]:
            server.later(400)
            client.sendall(bytes([byte]))
        server.later(400)
        assert read_until(client) == b""


def test_each_request_of_a_connection_has_its_time() -> None:
    """The clock of one that is complete stands, and begins anew with the next."""
    gate = threading.Event()
    with patient(FakeEngine([[gate, "Hello"], "Bye"])) as server, server.connect() as client:
        client.sendall(request())
        server.later(1000)
        gate.set()
        assert b"Hello" in read_until(client, b"}}}")
        client.sendall(request()[:-5])
        server.later(800)
        client.sendall(request()[-5:])
        assert b"Bye" in read_until(client, b"}}}")
        client.sendall(request()[:50])
        server.later(1000)
        assert read_until(client) == b""


# Who lies or attacks -----------------------------------------------------------------------------

BAD_BODIES: dict[str, bytes] = {
    "empty": b"",
    "truncated": b'{"model": "served", "messages": [{"role": "user", "con',
    "not UTF-8": b'{"model": "served", "messages": "\xff\xfe"}',
    "half a character": b'{"model": "served", "prompt": "\\ud800", "messages": []}',
    "deep": b"[" * 100_000,
    "a number": b"1" * 10_000,
    "NaN": b'{"model": "served", "temperature": NaN, "messages": []}',
    "null": b"null",
    "a key of nothing": b'{"": 1}',
    "another's prototype": b'{"__proto__": {"a": 1}, "model": "served"}',
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_bad_body_is_a_400(served: Serving, path: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = served.client.post(path, content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def many(thing: Any) -> list[Any]:
    return [thing] * 10_000


@pytest.mark.parametrize(
    "asked",
    [
        {"messages": many({"role": "user", "content": ""})},
        {"messages": [{"role": "user", "content": many({"type": "text", "text": "a"})}]},
        {"stop": many("a")},
        {"tools": many({"type": "function", "function": {"name": "f"}})},
        {"metadata": {str(number): "" for number in range(10_000)}},
    ],
    ids=["messages", "parts", "stop", "tools", "metadata"],
)
def test_ten_thousand_of_anything(served: Serving, asked: Any) -> None:
    assert served.chat(**asked).status_code in (200, 400, 413)


def test_ten_thousand_prompts(served: Serving) -> None:
    body = {"model": "served", "prompt": many("a")}
    answer = served.client.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert "10,000 prompts" in answer.json()["error"]["message"]


def test_a_body_that_is_too_large() -> None:
    """Refused by what it says it is, and by what it is; whoever goes on writing reads why."""

    def chunks() -> Iterator[bytes]:
        yield from [b" " * 1000] * 5000

    headers = {"Content-Type": "application/json"}
    with serving(FakeEngine(["Hello"]), max_body_bytes=200_000) as server:
        with server.connect() as client:
            client.sendall(request(b" " * 200_001)[:200])
            assert read_until(client, b"}}").startswith(b"HTTP/1.1 413")
        for content in (b" " * 5_000_000, chunks()):
            answer = server.client.post("/v1/completions", content=content, headers=headers)
            assert answer.status_code == 413
            assert answer.json()["error"]["message"] == "the body has more than 200,000 bytes"
        assert server.chat().status_code == 200


@pytest.mark.parametrize(
    "said",
    [
        b"\0" * 100,
        b"GET / HTTPS\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # without a host
        b"GET /health HTTP/1.1\r\nHost: here\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: here\r\n" + b"X: a\r\n" * 200_000 + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: 5\r\n"
        b"Content-Length: 6\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["zeros", "no version", "no host", "huge", "many", "negative", "two lengths", "chunks"],
)
def test_what_is_no_http_is_refused(served: Serving, said: bytes) -> None:
    with served.connect() as client:
        try:
            client.sendall(said)
            got = read_until(client)
        except (ConnectionResetError, BrokenPipeError):  # while we were still talking
            return
    if got:
        assert got.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
        ErrorBody.model_validate_json(got.partition(b"\r\n\r\n")[2])


def test_a_body_that_ends_early_hurts_nobody(served: Serving) -> None:
    with served.connect() as client:
        client.sendall(request()[:-5])
        client.shutdown(socket.SHUT_WR)
        assert not read_until(client).startswith(b"HTTP/1.1 5")


def test_more_connections_than_are_admitted() -> None:
    """As many as are admitted are answered; one more is told when to come back, and let go."""
    gate = threading.Event()
    engine = FakeEngine([["Hel", gate, "lo"]] * 3 + ["Hello"])
    with serving(engine, max_connections=3) as server:
        held = [server.connect() for _ in range(3)]
        for each in held:
            each.sendall(request(stream=True))
            read_until(each, b"Hel")
        refused = server.chat()
        gate.set()
        for each in held:
            assert b"lo" in read_until(each, b"[DONE]")
            each.close()
        while server.chat().status_code != 200:
            pass
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert refused.headers["connection"] == "close"
    assert ErrorBody.model_validate_json(refused.content).error.code == "busy"


@pytest.mark.parametrize("where", ["header", "headers", "query"])
def test_headers_have_a_limit(served: Serving, where: str) -> None:
    def asked(size: int) -> Any:
        more = {f"X-{number}": "a" * (size // 50) for number in range(50)}
        headers = {"header": {"X": "a" * size}, "headers": more}.get(where)
        query = "?" + "a" * size if where == "query" else ""
        return served.client.get(f"/v1/models{query}", headers=headers)

    assert asked(15_000).status_code == 200
    refused = asked(16_500)  # in one piece, which uvicorn takes
    assert refused.status_code == 431
    assert "16,384 bytes" in ErrorBody.model_validate_json(refused.content).error.message


def test_headers_that_come_in_pieces_have_it_too() -> None:
    """The server waits for no end of what is too large already."""
    with serving(FakeEngine([])) as server, server.connect() as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\nX: " + b"a" * 17_000)
        head, _, body = read_until(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert b"\r\nconnection: close" in head
    assert "16,384 bytes" in ErrorBody.model_validate_json(body).error.message


SCHEMA = schemathesis.openapi.from_dict(create_app(FakeEngine([])).openapi())


@SCHEMA.parametrize()
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
def test_whatever_is_made_of_the_schema(case: schemathesis.Case, served: Serving) -> None:
    """What it allows and what it does not: no 500, and each error in the one form."""
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = "served"  # which no schema knows
    answer = case.call(base_url=served.url)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        ErrorBody.model_validate_json(answer.content)
