"""A server on loopback that says to OpenAI's clients what a test tells it, byte by byte."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import Any

from gemma2_stream import Gemma2LLM

MODELS = {"data": [{"id": "m", "object": "model", "owned_by": "vllm", "max_model_len": 200}]}
USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def event(said: Any) -> bytes:
    return b"data: " + (said if isinstance(said, bytes) else json.dumps(said).encode()) + b"\n\n"


def text(said: str, reason: str | None = None, stop: int | str | None = None) -> bytes:
    choice = {"index": 0, "text": said, "finish_reason": reason, "stop_reason": stop}
    return event({"choices": [choice], "usage": None})


END = event({"choices": [], "usage": USAGE}) + b"data: [DONE]\n\n"


def status(code: int, body: Any = None, headers: str = "") -> bytes:
    said = json.dumps(body if body is not None else {"error": {"message": "no"}}).encode()
    head = f"HTTP/1.1 {code} X\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Connection: close\r\nContent-Length: {len(said)}\r\n\r\n".encode() + said


def _more(client: socket.socket) -> bytes:
    """What comes next. Raises ConnectionError where nothing does, because the client has left."""
    if not (more := client.recv(65536)):
        raise ConnectionResetError("the client has left")
    return more


class Wire:
    """Answers each POST with the next script: bytes to send, events to wait for; then it closes.

    `asked` has the bodies, `heads` the headers; `left` is set when a client has closed a connection
    at which the script waits. A client may leave at any point, and its script ends there.
    """

    def __init__(self, *scripts: list[bytes | threading.Event], models: Any = MODELS) -> None:
        self.scripts = list(scripts)
        self.models = models if isinstance(models, bytes) else status(200, models)
        self.asked: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.left = threading.Event()

    def __enter__(self) -> Wire:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/v1"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(100)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._serve, args=(client,)))
            self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        # A client that leaves while bytes are on their way resets the connection.
        with client, contextlib.suppress(ConnectionError):
            client.settimeout(100)
            got = b""
            while b"\r\n\r\n" not in got:
                got += _more(client)
            head, _, body = got.partition(b"\r\n\r\n")
            self.heads.append(head.decode())
            if head.startswith(b"GET"):
                client.sendall(self.models)
                return
            length = int(head.lower().partition(b"content-length: ")[2].split()[0])
            while len(body) < length:
                body += _more(client)
            self.asked.append(json.loads(body))
            for step in self.scripts.pop(0):
                if isinstance(step, threading.Event):
                    step.set()
                    try:
                        _more(client)
                    except ConnectionError:
                        self.left.set()
                    return
                client.sendall(step)

    def model(self, cls: Any = Gemma2LLM, **more: Any) -> Any:
        return cls("m", base_url=self.url, tokenizer="demo", **more)


WHOLE = [HEAD, text("Hel"), text("lo"), text("", "stop", 107), END]
