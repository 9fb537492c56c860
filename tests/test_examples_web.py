"""The examples that serve, on loopback: tokens arrive as they are made, and leaving stops them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from drive_gradio import Left
from tiny import Forwards

import gemma2_stream
from gemma2_stream import ChatGemma2, Gemma2Engine

ROOT = Path(gemma2_stream.__file__).parent.parent
QUESTION = "What is a token?"


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of `app` under a real uvicorn."""
    listening = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, *args: Any, **kwargs: Any) -> None:
            await super().startup(*args, **kwargs)
            listening.set()

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        server = Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            assert listening.wait(60)
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def fastapi_stream() -> Iterator[dict[str, Any]]:
    """The example's globals, and its address as `url`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fastapi_stream.py"])
        example = runpy.run_path(str(ROOT / "examples" / "fastapi_stream.py"))
    with served(example["app"]) as url:
        yield example | {"url": url}


@pytest.fixture
def watch(fastapi_stream: dict[str, Any], forwards: Callable[[Gemma2Engine], Forwards]) -> Forwards:
    return forwards(fastapi_stream["chat"].engine)


@contextlib.contextmanager
def asked(example: dict[str, Any], question: str) -> Iterator[Iterator[tuple[str, Any]]]:
    """The events of an answer, name and data, as they come."""

    def events(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
        name = ""
        for line in lines:
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))

    posted = {"question": question}
    with httpx.stream("POST", example["url"] + "/ask", json=posted, timeout=60) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield events(response.iter_lines())


def text_of(events: list[tuple[str, Any]]) -> str:
    return "".join(data["text"] for name, data in events if name == "token")


def test_tokens_are_events_before_the_answer_is_done(
    fastapi_stream: dict[str, Any], watch: Forwards
) -> None:
    """The first ones arrive while the model is held; the last event is the verdict."""
    reached, release = watch.gate(4)
    with asked(fastapi_stream, QUESTION) as events:
        early = [next(events), next(events)]
        assert reached.wait(60)
        release.set()
        rest = [*early, *events]
    whole = ChatGemma2("demo").invoke(QUESTION)
    assert text_of(rest) == whole.text
    assert {name for name, _ in rest[:-1]} == {"token"}
    assert len(rest) > 5
    name, verdict = rest[-1]
    assert (name, verdict["finish_reason"]) == ("end", "stop")
    assert whole.usage_metadata is not None
    assert verdict["usage"]["output_tokens"] == whole.usage_metadata["output_tokens"]


def test_a_caller_who_leaves_stops_the_model(
    fastapi_stream: dict[str, Any], watch: Forwards
) -> None:
    """Gone while the model is inside its sixth forward, it makes no second further."""
    reached, release = watch.gate(6)
    left = Left()
    fastapi_stream["chat"].callbacks = [left]
    with asked(fastapi_stream, QUESTION) as events:
        next(events)
        assert reached.wait(60)
    assert left.event.wait(60)
    release.set()
    fastapi_stream["chat"].engine.join()
    fastapi_stream["chat"].callbacks = None
    assert watch.count <= 7


def test_a_caller_who_leaves_while_a_token_waits_to_be_sent_stops_the_model(
    fastapi_stream: dict[str, Any], watch: Forwards
) -> None:
    """Its connection takes no second token; then it is gone, and no garbage is collected."""
    reached, release = watch.gate(8)
    left = Left()
    fastapi_stream["chat"].callbacks = [left]
    full = asyncio.Event()
    body = {"type": "http.request", "body": json.dumps({"question": QUESTION}).encode()}
    received = iter([body])

    async def receive() -> dict[str, Any]:
        if (message := next(received, None)) is None:
            await full.wait()
            # Long enough for each buffer between the model and the connection to fill.
            await asyncio.to_thread(reached.wait, 60)
            return {"type": "http.disconnect"}
        return message

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            full.set()
            await asyncio.Event().wait()

    async def leave() -> None:
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/ask", "headers": headers}
        await fastapi_stream["app"](scope | {"query_string": b""}, receive, send)
        assert await asyncio.to_thread(left.event.wait, 60)

    gc.disable()
    try:
        asyncio.run(leave())
    finally:
        gc.enable()
        release.set()
        fastapi_stream["chat"].callbacks = None
    fastapi_stream["chat"].engine.join()
    assert watch.count <= 9


def test_an_error_is_an_event_and_the_next_caller_is_answered(
    fastapi_stream: dict[str, Any], watch: Forwards
) -> None:
    watch.fail_at[4] = RuntimeError("the machine broke")
    with asked(fastapi_stream, QUESTION) as events:
        *tokens, last = events
    assert {name for name, _ in tokens} == {"token"}
    assert last == ("error", {"error": "RuntimeError: the machine broke"})
    with asked(fastapi_stream, QUESTION) as events:
        assert text_of([*events]) == ChatGemma2("demo").invoke(QUESTION).text


def test_two_callers_at_once_get_their_own_answers(
    fastapi_stream: dict[str, Any], watch: Forwards
) -> None:
    """The second is let in while the model is held in the answer of the first."""
    reached, release = watch.gate(4)
    with asked(fastapi_stream, QUESTION) as first:
        next_of_first = next(first)
        assert reached.wait(60)
        with asked(fastapi_stream, "你是谁") as second:
            release.set()
            other = [*second]
        mine = [next_of_first, *first]
    assert text_of(mine) == ChatGemma2("demo").invoke(QUESTION).text
    assert text_of(other) == ChatGemma2("demo").invoke("你是谁").text
    assert (mine[-1][0], other[-1][0]) == ("end", "end")


def test_gradio_chat() -> None:
    """In a process of its own, since Gradio leaves event loops open and asks pandas for what is
    deprecated; Gradio's own client asks, and stops.
    """
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "drive_gradio.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])

    first, stopped = seen["first"], seen["stopped"]
    whole = ChatGemma2("demo").invoke("你是谁").text
    assert first[-1] == whole
    assert len(set(first)) >= 3
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(first))
    assert seen["asked"] == [["human", "你是谁"], ["ai", whole], ["human", QUESTION]]
    assert ChatGemma2("demo").invoke(QUESTION).text.startswith(stopped[-1])
    assert seen["forwards"] <= 7
