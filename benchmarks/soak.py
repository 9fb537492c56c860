"""Ten minutes of mixed load on one server: does memory, a thread, a socket or a millisecond stay?

    python benchmarks/soak.py                     # 10 minutes, 2 GB
    python benchmarks/soak.py --plot soak.svg
    python benchmarks/soak.py --quick             # 20 seconds, which show that it runs, no more

What: over time, of the process that serves the demo
    memory in use  MiB that it has asked for and not given back, by `mallinfo2` of glibc 2.33 or
                  later, without which this does not run; how much more an hour, by least squares
    memory held   MiB that the system counts as its own (RSS)
    threads, descriptors   of files and sockets
    first token   milliseconds from the request to the first text at the client
    token         milliseconds between two pieces of text

Why: what leaks a little with each request, or gets slower with each, shows in no test.

What leaks is in use, and that is judged. More is held, and still more after an hour: gaps between
what is kept, from which glibc gives to the next request and little back to the system.

How: The server is a process of its own, uvicorn and all, with one torch thread and a prefix cache
of 16 MiB, which is soon full. Clients in this process ask again as soon as they are answered: of
ten requests about six are streams that are read to the end, one is an answer in one piece, two are
streams that the client leaves somewhere, and one is bad. Questions that come back must get the
same answer each time. The first fifth of the time warms up: caches fill, and allocators find their
size. Of what is left, the last quarter is compared with the first. Latencies are those of a client
that shares the machine with the server and with the other clients.

Prints Markdown; progress goes to stderr; the last line is JSON with every figure.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import random
import subprocess
import sys
import time
from collections import Counter
from statistics import linear_regression, median
from typing import Any

import psutil
from report import (
    INK,
    OURS,
    Result,
    canvas,
    documented,
    goals,
    heading,
    neighbours,
    publish,
    say,
    table,
    watching,
    write_svg,
)
from texts import QUESTIONS

CLIENTS = 4
PREFIX_BYTES = 16 * 2**20
KINDS = ("stream",) * 6 + ("whole", "leave", "leave", "bad")
POINTS = 60  # of each curve
WARM = 0.2  # of the time
GROWTH_GOAL, SLOWER_GOAL = 1.02, 1.10
TELLING, CALM = (
    300,
    0.2,
)  # seconds from which memory tells, and cores of others below which time does
IN_USE = "in_use_mib"
HELD = {"rss_mib": "memory held, MiB", "threads": "threads", "descriptors": "file descriptors"}
FIGURES = {IN_USE: "memory in use, MiB", **HELD}
TIMES = {"first_ms": "first token, ms", "token_ms": "token, ms"}


# The server, in a process of its own -----------------------------------------------------------


def work() -> None:
    """Serve until a signal; says its port, and from then on what memory is in use."""
    import io
    import socket
    from threading import Thread

    import torch

    from gemma2_stream import Gemma2LLM
    from gemma2_stream.server import Settings, run

    torch.set_num_threads(1)
    engine: Any = Gemma2LLM("demo", prefix_cache_bytes=PREFIX_BYTES, max_rows=CLIENTS).engine
    listening = socket.create_server(("127.0.0.1", 0))
    server = run.server(engine, Settings(model="demo"), log=_Nowhere(io.StringIO()))
    print(listening.getsockname()[1], flush=True)
    Thread(target=_tell, daemon=True).start()
    server.run(sockets=[listening])


def _tell() -> None:
    """A line a second: when, by a clock that all processes share, and bytes in use."""

    class MallInfo2(ctypes.Structure):
        names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo2
    while True:
        found = mallinfo2()
        # What is large has a mapping of its own, and is not in the sum of the others.
        print(time.perf_counter(), found.uordblks + found.hblkhd, flush=True)
        time.sleep(1)


class _Nowhere:
    """A log that is written and not kept."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        self._stream.seek(0)
        self._stream.write(text)

    def flush(self) -> None:
        self._stream.truncate(0)


# Its clients -----------------------------------------------------------------------------------


class Load:
    """Clients that ask until `end`; what they saw, with the second at which they saw it."""

    def __init__(self, port: int, end: float) -> None:
        self.began = time.perf_counter()
        self.seen: dict[str, list[tuple[float, float]]] = {name: [] for name in TIMES}
        self.counts: Counter[str] = Counter()
        self._answers: dict[str, str] = {}
        self._port, self._end = port, end

    @property
    def now(self) -> float:
        return time.perf_counter() - self.began

    async def client(self, seed: int) -> None:
        dice = random.Random(seed)
        while self.now < self._end:
            kind = dice.choice(KINDS)
            known = dice.random() < 0.5
            question = dice.choice(QUESTIONS) + ("" if known else f" {dice.randrange(10**9)}")
            text = await self._ask(kind, question, leave_after=dice.randint(1, 10))
            self.counts[kind] += 1
            if text is not None and self._answers.setdefault(question, text) != text:
                self.counts["another answer"] += 1
            if not known:
                self._answers.pop(question, None)

    async def _ask(self, kind: str, question: str, leave_after: int) -> str | None:
        """The answer, where it is read to the end."""
        asked: Result = {"model": "demo", "messages": [{"role": "user", "content": question}]}
        asked |= {"max_tokens": 60, "stream": kind != "whole"}
        if kind == "bad":
            asked["temperature"] = "warm"
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        body = json.dumps(asked).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        asked_at = time.perf_counter()
        writer.write(head.encode() + body)
        try:
            status = int((await reader.readline()).split()[1])
            if status != (400 if kind == "bad" else 200):
                self.counts[f"status {status}"] += 1
            if kind == "bad" or not asked["stream"]:
                return await self._whole(reader, kind)
            return await self._streamed(reader, asked_at, leave_after if kind == "leave" else None)
        finally:
            writer.close()

    async def _whole(self, reader: asyncio.StreamReader, kind: str) -> str | None:
        said = (await reader.read()).partition(b"\r\n\r\n")[2]
        return json.loads(said)["choices"][0]["message"]["content"] if kind == "whole" else None

    async def _streamed(
        self, reader: asyncio.StreamReader, asked_at: float, leave_after: int | None
    ) -> str | None:
        text, pieces, first = "", 0, 0.0
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            (choice,) = json.loads(line.removeprefix(b"data: "))["choices"]
            if choice["delta"].get("content"):
                text, pieces = text + choice["delta"]["content"], pieces + 1
                if not first:
                    first = time.perf_counter()
                    self.seen["first_ms"].append((self.now, (first - asked_at) * 1e3))
                if pieces == leave_after:
                    return None
            if choice["finish_reason"] is not None:
                if pieces > 1:
                    each = (time.perf_counter() - first) / (pieces - 1) * 1e3
                    self.seen["token_ms"].append((self.now, each))
                return text
        self.counts["cut"] += leave_after is None
        return None


async def soak(port: int, process: psutil.Process, seconds: float) -> tuple[Load, Result]:
    load = Load(port, seconds)
    held: Result = {name: [] for name in HELD}

    def look() -> None:
        with process.oneshot():
            found = (process.memory_info().rss / 2**20, process.num_threads(), process.num_fds())
        for name, value in zip(HELD, found, strict=True):
            held[name].append((load.now, round(value, 1)))

    async def watch() -> None:
        while load.now < seconds:
            look()
            if len(held["rss_mib"]) % 60 == 0:
                say(f"{load.now:.0f} of {seconds:.0f} s, {held['rss_mib'][-1][1]:.0f} MiB")
            await asyncio.sleep(seconds / POINTS / 5)

    await load._ask("stream", QUESTIONS[0], 0)  # with which it opens what it keeps
    look()
    await asyncio.gather(watch(), *(load.client(seed) for seed in range(CLIENTS)))
    await asyncio.sleep(1)  # in which it closes what we have closed
    look()
    return load, held


def measure(options: argparse.Namespace) -> Result:
    figures: Result = {"seconds_of_load": round(options.minutes * 60), "clients": CLIENTS}
    server = subprocess.Popen(
        [sys.executable, __file__, "--work"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        with watching(figures):
            process = psutil.Process(server.pid)
            load, held = asyncio.run(soak(port, process, options.minutes * 60))
            server.terminate()
            told = server.stdout.read()
            server.wait()  # its time counts as ours once it has ended
    finally:
        server.kill()
    lines = [line.split() for line in told.splitlines()]
    held[IN_USE] = [
        (float(at) - load.began, round(int(size) / 2**20, 1))
        for at, size in lines
        if load.began <= float(at) <= load.began + load.now
    ]
    figures["requests"] = dict(load.counts)
    figures["curves"] = {name: binned(held[name], load.now) for name in FIGURES}
    figures["curves"] |= {name: binned(load.seen[name], load.now) for name in TIMES}
    seconds = figures["seconds_of_load"]
    figures["ends"] = {
        name: ends(points, seconds) for name, points in {**held, **load.seen}.items()
    }
    warm = [(at, mib) for at, mib in held[IN_USE] if at >= WARM * seconds]
    figures["mib_an_hour"] = round(linear_regression(*zip(*warm, strict=True)).slope * 3600, 1)
    figures["at_rest"] = {name: [held[name][0][1], held[name][-1][1]] for name in FIGURES}
    return figures


def binned(points: list[tuple[float, float]], end: float) -> list[float | None]:
    """The median in each of `POINTS` parts of the time."""
    bins: list[list[float]] = [[] for _ in range(POINTS)]
    for at, value in points:
        bins[min(POINTS - 1, int(at / end * POINTS))].append(value)
    return [round(median(each), 2) if each else None for each in bins]


def ends(points: list[tuple[float, float]], seconds: float) -> list[float]:
    """The medians of the first and the last quarter of the time after the warm-up."""
    quarter = (1 - WARM) / 4 * seconds
    first = [value for at, value in points if 0 <= at - WARM * seconds < quarter]
    last = [value for at, value in points if 0 <= seconds - at < quarter]
    return [round(median(first), 2), round(median(last), 2)]


# Report ----------------------------------------------------------------------------------------


def verdicts(figures: Result) -> list[list[object]]:
    long = figures["seconds_of_load"] >= TELLING
    calm = figures["cores_used_by_others"] <= CALM

    def judged(goal: str, value: object, passed: bool, tells: bool = True) -> list[object]:
        return [goal, value, ("pass" if passed else "fail") if tells else "undecided"]

    wrong = {k: n for k, n in figures["requests"].items() if k not in KINDS and n}
    grown = figures["ends"][IN_USE][1] / figures["ends"][IN_USE][0]
    lines = [
        judged("every answer is right, no status is another", wrong or "all", not wrong),
        judged(
            f"memory in use: at most {GROWTH_GOAL} times",
            f"{grown:.3f}",
            grown <= GROWTH_GOAL,
            long,
        ),
    ]
    for name in TIMES:
        first, last = figures["ends"][name]
        goal = f"{TIMES[name]}: at most {SLOWER_GOAL} times"
        passed = last <= SLOWER_GOAL * first
        lines.append(judged(goal, f"{last / first:.2f}", passed, long and calm))
    before, after = figures["at_rest"]["descriptors"]
    return [*lines, judged("no more file descriptors than before", after - before, after <= before)]


def report(document: Result) -> str:
    figures = document["figures"]
    asked = ", ".join(f"{count:,} {name}" for name, count in sorted(figures["requests"].items()))
    rows = [[said, *figures["ends"][name]] for name, said in {**FIGURES, **TIMES}.items()]
    return "\n\n".join(
        [
            heading(document),
            f"**{figures['seconds_of_load']:,} seconds, {CLIENTS} clients**: {asked}.",
            table(["medians of the quarters after the warm-up", "first", "last"], rows),
            f"By least squares after the warm-up {figures['mib_an_hour']:+} MiB in use an hour. "
            f"{neighbours(figures)}",
            goals(document),
        ]
    )


def plot(figures: Result, path: str) -> None:
    figure, panels = canvas(4)
    step = figures["seconds_of_load"] / 60 / POINTS
    minutes = [step * (number + 0.5) for number in range(POINTS)]
    shown = {IN_USE: FIGURES[IN_USE], "rss_mib": HELD["rss_mib"], **TIMES}
    for axes, (name, said) in zip(panels, shown.items(), strict=True):
        curve = [float("nan") if y is None else y for y in figures["curves"][name]]
        axes.plot(minutes, curve, color=OURS)
        axes.axvline(WARM * POINTS * step, color=INK, linewidth=0.8, linestyle=":")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("minutes")
        axes.set_title(said)
    write_svg(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--plot", metavar="FILE.svg")
    parser.add_argument("--quick", action="store_true", help="20 seconds")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return
    if options.quick:
        options.minutes = 1 / 3
    figures = measure(options)
    document = documented(quick=options.quick, figures=figures, verdicts=verdicts(figures))
    if options.plot:
        plot(figures, options.plot)
    publish(document, report(document))


if __name__ == "__main__":
    main()
