"""What the server costs on top of the engine: CPU a token, the first token, and many clients.

    python benchmarks/serving.py             # 3 minutes, 2 GB
    python benchmarks/serving.py --quick     # fewer rounds; a minute

What: the demo's streamed answers to the same questions, by the engine in process and by
`gemma2-stream serve` over loopback
    CPU          milliseconds of the serving process a token: JSON, events and sockets are the
                 difference. The goal is 0.3
    first token  milliseconds from the request to the first text at the client
    clients      tokens a second in all, for 1 to 64 clients that ask at the same moment

Why: the engine makes tokens for as many as there are; what is around it should not be felt.

How: Each side is a process of its own with its own engine, one torch thread, and a prefix cache
that has seen the same. This process is the client of both: of the server by a bare asyncio socket,
so that a client library's time is not counted, of the engine by a line on a pipe that says when to
begin, whose streams are read by a thread each. They take turns in random order; a difference is
between the two of one round, and its interval a 95 % bootstrap of the median. CPU time is that of
the whole serving process, the model included, divided by the tokens that it made.

Prints Markdown; progress goes to stderr; the last line is JSON with every figure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from statistics import median
from typing import Any

from grammars import typed
from streaming import interval, machine, neighbours, rounded, say, span, table, versions, watching

Result = dict[str, Any]

GOAL_MS = 0.3  # of CPU a token
CLIENTS = (1, 4, 16, 64)
QUESTIONS = ("你是谁", "What is a token?", "What is Gemma 2?", "How do I stream?", "Hello")
ENGINE, SERVER = "engine", "server"


# The two sides, each in a process ------------------------------------------------------------


def work(side: str) -> None:
    """Answer lines of JSON until stdin ends."""
    import psutil
    import torch

    from gemma2_stream import Gemma2LLM

    torch.set_num_threads(1)
    engine: Any = Gemma2LLM("demo", max_rows=max(CLIENTS)).engine
    me = psutil.Process()
    print(json.dumps({"port": _listen(engine) if side == SERVER else None}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        found = _in_process(engine, asked) if asked else {}
        print(json.dumps({**found, "cpu": sum(me.cpu_times()[:2])}), flush=True)


def _listen(engine: Any) -> int:
    import io
    import socket

    from gemma2_stream.server import Settings, run

    listening = socket.create_server(("127.0.0.1", 0), backlog=256)
    server = run.server(engine, Settings(model="demo"), log=io.StringIO())
    threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True).start()
    return int(listening.getsockname()[1])


def _in_process(engine: Any, questions: Sequence[str]) -> Result:
    from gemma2_stream import Request, SamplingParams

    def read(stream: Any) -> tuple[float, int]:
        first, tokens = 0.0, 0
        for chunk in stream:
            first = first or time.perf_counter() - began
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        return first, tokens

    with ThreadPoolExecutor(len(questions)) as pool:
        began = time.perf_counter()
        rows = [Request(tuple(engine.encode(each)), SamplingParams()) for each in questions]
        found = list(pool.map(read, engine.submit_each(rows)))
        seconds = time.perf_counter() - began
    firsts, tokens = zip(*found, strict=True)
    return {"firsts": firsts, "tokens": sum(tokens), "seconds": seconds}


class Side:
    """A side's process, and this one as its client."""

    def __init__(self, side: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = self._told()["port"]

    def _told(self) -> Result:
        assert self.process.stdout is not None
        told: Result = json.loads(self.process.stdout.readline())
        return told

    def _tell(self, questions: Sequence[str]) -> Result:
        print(json.dumps(questions), file=self.process.stdin, flush=True)
        return self._told()

    def ask(self, questions: Sequence[str]) -> Result:
        """What these cost, asked at the same moment: tokens, seconds, first tokens, CPU."""
        before = self._tell([])["cpu"]
        if self.port is None:
            found = self._tell(questions)
        else:
            found = asyncio.run(_over_http(self.port, questions)) | self._tell([])
        return {**found, "cpu": found["cpu"] - before}


async def _over_http(port: int, questions: Sequence[str]) -> Result:
    async def one(question: str) -> tuple[float, int]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps(
            {
                "model": "demo",
                "messages": [{"role": "user", "content": question}],
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nConnection: close\r\n"
        head += "Content-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        first, tokens = 0.0, 0
        while line := await reader.readline():
            if not first and b'"content":"' in line and b'"content":""' not in line:
                first = time.perf_counter() - began
            if b'"completion_tokens"' in line:
                tokens = json.loads(line.removeprefix(b"data: "))["usage"]["completion_tokens"]
        writer.close()
        if not (first and tokens):
            raise RuntimeError(f"no answer to {question!r}")
        return first, tokens

    began = time.perf_counter()
    found = await asyncio.gather(*map(one, questions))
    seconds = time.perf_counter() - began
    firsts, tokens = zip(*found, strict=True)
    return {"firsts": firsts, "tokens": sum(tokens), "seconds": seconds}


# Rounds --------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> Result:
    sides = {name: Side(name) for name in (ENGINE, SERVER)}
    figures: Result = {"alone": {ENGINE: [], SERVER: []}, "clients": {ENGINE: {}, SERVER: {}}}
    draw = random.Random(0)
    for side in sides.values():  # warms up, and fills both prefix caches
        for question in QUESTIONS:
            side.ask([question])
    with watching(figures):
        for number in range(options.rounds):
            say(f"round {number + 1} of {options.rounds}")
            for name in draw.sample([*sides], len(sides)):
                found = [sides[name].ask([question]) for question in QUESTIONS]
                tokens = sum(one["tokens"] for one in found)
                cpu = sum(one["cpu"] for one in found) / tokens * 1e3
                first = median(one["firsts"][0] for one in found) * 1e3
                figures["alone"][name].append({"cpu_ms": cpu, "first_ms": first})
            for clients in CLIENTS if number < options.rounds // 2 else ():
                asked = [draw.choice(QUESTIONS) for _ in range(clients)]
                for name in draw.sample([*sides], len(sides)):
                    one = sides[name].ask(asked)
                    rate = one["tokens"] / one["seconds"]
                    figures["clients"][name].setdefault(str(clients), []).append(rate)
        for side in sides.values():  # their time counts as ours once they have ended
            side.process.kill()
            side.process.wait()
    return figures


def differences(figures: Result, what: str) -> list[float]:
    pairs = zip(figures["alone"][SERVER], figures["alone"][ENGINE], strict=True)
    return rounded(interval([served[what] - bare[what] for served, bare in pairs]), 3)


def report(document: Result) -> str:
    """The Markdown that README quotes."""
    host, figures = document["machine"], document["figures"]
    names = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    alone = [
        [name, *(f"{median(one[what] for one in runs):.2f}" for what in ("cpu_ms", "first_ms"))]
        for name, runs in figures["alone"].items()
    ]
    more = [span(document[what], 2) for what in ("cpu_ms", "first_ms")]
    rates = [
        [name, *(f"{median(runs[str(clients)]):,.0f}" for clients in CLIENTS)]
        for name, runs in figures["clients"].items()
    ]
    return "\n\n".join(
        [
            f"`{document['command']}` on {document['date']}, {host['cores']} cores "
            f"({host['cpu']}), {host['memory_gb']} GB, {names}. In brackets are 95 % intervals.",
            "**One client**, the demo, one torch thread",
            table(["", "ms of CPU a token", "ms to the first token"], [*alone, ["more", *more]]),
            "**Tokens a second in all**, by clients at once",
            table(["", *CLIENTS], rates),
            neighbours(figures),
            "**Goals**",
            table(["goal", "measured", "verdict"], document["verdicts"]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="--rounds 6")
    parser.add_argument("--work", choices=(ENGINE, SERVER), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work)
        return
    if options.quick:
        options.rounds = 6
    figures = measure(options)
    cpu = differences(figures, "cpu_ms")
    verdict = "pass" if cpu[-1] <= GOAL_MS else "fail" if cpu[0] > GOAL_MS else "undecided"
    document = {
        "benchmark": "serving",
        "command": typed("serving.py"),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "figures": figures,
        "cpu_ms": cpu,
        "first_ms": differences(figures, "first_ms"),
        "verdicts": [
            [f"at most {GOAL_MS} ms of CPU a token more than the engine", span(cpu, 3), verdict]
        ],
    }
    print(report(document), end="\n\n")
    print(json.dumps(document, ensure_ascii=False, separators=(",", ":")))


if __name__ == "__main__":
    main()
