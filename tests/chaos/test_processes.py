"""Processes that fork, exit, are told to end, or are killed, in the middle of answers."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import free_port

from gemma2_stream import ChatGemma2, Gemma2Engine

pytestmark = pytest.mark.chaos

TESTS = Path(__file__).parent.parent
QUESTIONS = ("Hello", "你是谁", "What is a token?", "How do I stream?")
TOKENS = 30
CLIENTS = 8

# Fork and exit -----------------------------------------------------------------------------------

FORK = """
import os, sys, threading, torch
from gemma2_stream import EngineClosedError, Gemma2Engine, Gemma2LLM
torch.set_num_threads(1)
llm = Gemma2LLM("demo", dtype="float32", max_new_tokens=40)
right = llm.invoke("How do I stream?")
begun = llm.stream("How do I stream?")
text = next(begun)
if os.fork() == 0:
    for use in (lambda: list(begun), lambda: llm.invoke("Hello")):
        try:
            use()
        except EngineClosedError as error:
            assert "fork" in str(error), error
        else:
            os._exit(3)
    llm.engine.join()
    mine = Gemma2LLM(engine=Gemma2Engine(llm.engine.model, llm.engine.tokenizer))
    assert mine.bind(max_tokens=40).invoke("How do I stream?") == right
    llm.engine.close()
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
assert text + "".join(begun) == right
assert llm.invoke("How do I stream?") == right
"""

FORK_OF_A_CLIENT = """
import os, sys, threading
sys.path.insert(0, sys.argv[1])
from wire import HEAD, Wire, text
from gemma2_stream import EngineClosedError
waits = threading.Event()
with Wire([HEAD, text("Hel"), waits]) as wire:
    llm = wire.model()
    begun = llm.stream("hi")
    assert next(begun) == "Hel"
    assert waits.wait(60)
    if os.fork() == 0:
        try:
            next(begun)
        except EngineClosedError as error:
            os._exit(0 if "fork" in str(error) else 3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    assert not wire.left.is_set()
    begun.close()
"""

EXIT = """
import threading
from concurrent.futures import ThreadPoolExecutor
from gemma2_stream import Gemma2LLM
llm = Gemma2LLM("demo")
reading = [threading.Event() for _ in range(3)]
def read(event):
    for _ in llm.stream("How do I stream?"):
        event.set()
threading.excepthook = lambda args: None  # the daemon gets EngineClosedError
threading.Thread(target=read, args=reading[:1]).start()
threading.Thread(target=read, args=reading[1:2], daemon=True).start()
pool = ThreadPoolExecutor()
pool.submit(read, reading[2])
for event in reading:
    event.wait()
"""


def run(code: str) -> None:
    """To a clean end, without a word."""
    command = [sys.executable, "-c", code, str(TESTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    lines = done.stderr.replace("\r", "\n").splitlines()
    said = [line for line in lines if line.strip() and "Loading weights" not in line]
    # From 3.12 on, Python itself warns of every fork in a process with threads.
    assert not [line for line in said if "fork" not in line]
    assert done.returncode == 0


def test_a_fork_in_the_middle_of_an_answer() -> None:
    """The parent's goes on; the child is told, also where it reads on, and may make its own."""
    run(FORK)


def test_a_fork_in_the_middle_of_a_servers_answer() -> None:
    """The child is told where it reads on, and the parent's connection stays."""
    run(FORK_OF_A_CLIENT)


def test_the_interpreter_ends_while_other_threads_read() -> None:
    """A thread, a daemon and one of a pool."""
    run(EXIT)


# A server's end ----------------------------------------------------------------------------------

SERVE = """
import sys, threading, torch
from gemma2_stream import Gemma2LLM
from gemma2_stream.server import Settings, run
torch.set_num_threads(1)
engine = Gemma2LLM("demo", dtype="float32").engine
serve, going = threading.Event(), threading.Event()
going.set()
left = 0
def listen():
    global left
    for line in sys.stdin:
        word, number = line.split()
        if word == "serve":
            serve.set()
        elif word == "hold":
            going.clear()
            left = int(number)
        else:
            going.set()
def hold(*_):
    global left
    left -= 1
    if left == 0:
        print("held", file=sys.stderr, flush=True)
        going.wait()
engine.model.get_decoder().register_forward_pre_hook(hold)
threading.Thread(target=listen, daemon=True).start()
serve.wait()
sys.exit(run.serve(engine, Settings(model="served"), port=int(sys.argv[1])))
"""


class Process:
    """A server of the demo that loads at once, serves when told, and can be held at a forward."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(port)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def tell(self, word: str, number: int = 0) -> None:
        assert self.process.stdin is not None
        print(word, number, file=self.process.stdin, flush=True)

    def wait_for(self, said: str) -> None:
        assert self.process.stderr is not None
        assert any(said in line for line in self.process.stderr)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def processes() -> Iterator[tuple[Process, Process]]:
    """Two on one port, of which none listens yet."""
    with free_port() as port:
        both = Process(port), Process(port)
        yield both
        for each in both:
            each.end()


def streamed(port: int, question: str) -> Iterator[str]:
    """Piece by piece. Raises httpx.TransportError where the answer is cut."""
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    body: dict[str, Any] = {"model": "served", "messages": [{"role": "user", "content": question}]}
    body |= {"stream": True, "max_tokens": TOKENS}
    with httpx.stream("POST", url, json=body, timeout=60) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get(
                    "content", ""
                )
        assert line == "" or line.endswith("[DONE]")


def wait_for_requests(port: int, number: int) -> None:
    """Until so many wait or are answered there."""
    counted = re.compile(r"(?m)^gemma2_stream_requests_(?:waiting|answering) (.+)$")
    told: list[str] = []
    while sum(map(float, told)) != number or not told:
        told = counted.findall(httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text)


@pytest.fixture
def right(demo_engine: Gemma2Engine) -> dict[str, str]:
    chat = ChatGemma2(engine=demo_engine, max_new_tokens=TOKENS)
    return {question: chat.invoke(question).text for question in QUESTIONS}


def test_a_restart_under_load(processes: tuple[Process, Process], right: dict[str, str]) -> None:
    """What the old server has accepted it finishes; the new one has the port meanwhile, and serves
    at once; whoever tries again gets the right answer from one of the two.
    """
    old, new = processes
    port = old.port
    again = threading.Event()
    wrong: list[object] = []
    refused = 0

    def client(number: int) -> None:
        nonlocal refused
        for question in (QUESTIONS * 3)[number % 4 :]:
            while True:
                try:
                    if (text := "".join(streamed(port, question))) != right[question]:
                        wrong.append((question, text))
                    break
                except httpx.ConnectError:
                    refused += 1
                except httpx.TransportError as error:
                    wrong.append(error)
                    break
                again.wait()

    old.tell("serve")
    old.wait_for("running on")
    old.tell("hold", 40)
    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    old.wait_for("held")
    wait_for_requests(port, CLIENTS)  # who is just connecting would be cut off
    old.process.send_signal(signal.SIGTERM)
    old.wait_for("Waiting for connections to close")
    new.tell("serve")
    new.wait_for("running on")
    assert "".join(streamed(port, "Hello")) == right["Hello"]
    assert old.process.poll() is None
    again.set()
    old.tell("go")
    for thread in threads:
        thread.join()
    assert not wrong
    assert old.process.wait(60) in (0, -signal.SIGTERM)
    wait_for_requests(port, 0)


def test_a_server_that_is_killed(processes: tuple[Process, Process], right: dict[str, str]) -> None:
    """Its client has an error at once, and never takes half an answer for a whole one."""
    first, second = processes
    first.tell("serve")
    first.wait_for("running on")
    first.tell("hold", 8)
    text = ""
    with pytest.raises(httpx.TransportError):  # noqa: PT012
        for piece in streamed(first.port, "How do I stream?"):
            text += piece
            if text:
                first.process.kill()
    assert right["How do I stream?"].startswith(text)
    second.tell("serve")
    second.wait_for("running on")
    assert "".join(streamed(second.port, "Hello")) == right["Hello"]
