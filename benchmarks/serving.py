"""What the server costs on top of the engine: CPU a token, the first token, and many clients.

    python benchmarks/serving.py --plot serving.svg    # 6 minutes, 3 GB
    python benchmarks/serving.py --layers 8 --vllm-python .venv-vllm/bin/python  # weights of size
    python benchmarks/serving.py --quick               # fewer rounds, no peers; under a minute

What: streamed answers to the same questions, by an engine in process and over loopback
    alone    what the server costs, whatever the model: an engine that says a word every 5 or 20 ms,
             to 1 and to 16 at once. Milliseconds of the whole process' CPU a token and a request,
             milliseconds from the moment of a word to its reader, and to the first one. The goal
             is 0.3 ms of CPU a token more than the same engine in process
    demo     what a client sees of the demo, or of `--layers`: milliseconds a token and to the first
             of one client, tokens a second of 1 to 64 at once, by the engine in process,
             `gemma2-stream serve`, the same in one replica of Ray Serve where the extra `[ray]` is
             installed, and the peers: `transformers serve` on the same weights, and vLLM's server
             where `--vllm-python` names an environment that has it (`make vllm`)

Why: the engine makes tokens for as many as there are; what is around it should not be felt. A model
of a few megabytes is the hardest case, since its tokens are the quickest to come.

How: All sides are processes of their own with one torch thread. This process is the client of all:
of servers by bare asyncio sockets, connected before the clock starts, so that a client library's
time is not counted; of an engine by a line on a pipe that says when to begin, whose streams are
read by a thread each. Sides take turns in random order; a difference or a ratio is between two of
one round, and its interval a 95 % bootstrap of the median.
    alone    A model's own CPU time differs by a millisecond a token between two runs of the same
             work, which is more than what is looked for: so there is none, and `FakeEngine` says
             the words when the clock shows a multiple of the pace. A request's CPU is that of
             answers of one word, and a token's that of answers of 100 less that of the request.
             What a server does ten times a second when nobody asks is in it: some 0.06 ms of each
             token at 20 ms, and 0.015 at 5.
    demo     Questions are new ones with `--layers`, where the text never ends by itself; those of
             the demo are few, and in everybody's prefix cache.
    peers    `transformers serve` answers one after another, so it is asked by one client, and would
             say as much a second to many; its continuous batching leaves Gemma 2's soft-capping
             out, which makes other text.

Prints Markdown; progress goes to stderr; the last line is JSON with every figure.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from report import (
    INK,
    OURS,
    RIVAL,
    Result,
    at_most,
    canvas,
    documented,
    goals,
    heading,
    interval,
    neighbours,
    publish,
    rounded,
    say,
    span,
    table,
    watching,
    write_svg,
)
from texts import QUESTIONS, load_tokenizer

import gemma2_stream

GOAL_MS = 0.3  # of CPU a token
PACES_MS = (5, 20)
STREAMS = (1, 16)
WORDS = 100  # of a long answer of the paced engine
SHORT = 8  # answers of one word, for each long one
CLIENTS = (1, 4, 16, 64)
TOKENS = 32  # at most, of an answer of the model
ENGINE, SERVER = "engine in process", "gemma2-stream serve"
RAY, TRANSFORMERS, VLLM = "Ray Serve, one replica", "transformers serve", "vLLM"
IN_TURN = {TRANSFORMERS: 1}  # clients at most, of whoever answers one after another
START_S = 300  # within which a server must be up
PACED = {"engine": "paced", "server": "paced server"}


# Sides that are processes of this file -------------------------------------------------------


def work(side: str, model: str) -> None:
    """Answer lines of JSON until stdin ends."""
    pace = Pace()
    engine = paced(pace) if side in PACED.values() else loaded(model)
    print(json.dumps({"port": listen(engine) if side == PACED["server"] else None}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        pace.seconds = asked.get("pace", 0.0)
        found = in_process(engine, **asked["ask"]) if "ask" in asked else {}
        time.sleep(0.02)  # what goes on after the last token ends, too
        print(json.dumps({**found, "cpu": time.process_time()}), flush=True)


class Pace(threading.Event):
    """A gate that opens whenever the clock shows a multiple of `seconds`."""

    seconds = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        time.sleep(self.seconds - time.monotonic() % self.seconds)
        return True


def paced(pace: Pace) -> Any:
    """An engine whose first word comes at once, and the others at `pace`."""
    from gemma2_stream.testing import FakeEngine

    answer = ["token ", *[step for _ in range(WORDS) for step in (pace, "token ")]]
    return FakeEngine([answer] * 20_000, name="served")


def loaded(model: str) -> Any:
    import torch

    from gemma2_stream import Gemma2LLM

    torch.set_num_threads(1)
    return Gemma2LLM(model, max_rows=max(CLIENTS)).engine


def listen(engine: Any) -> int:
    from gemma2_stream.server import Settings, run

    listening = socket.create_server(("127.0.0.1", 0), backlog=256)
    server = run.server(engine, Settings(model="served"), log=io.StringIO())
    threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True).start()
    return int(listening.getsockname()[1])


def in_process(engine: Any, questions: Sequence[str], tokens: int) -> Result:
    from gemma2_stream import Request, SamplingParams

    def read(stream: Any) -> tuple[list[float], int]:
        arrivals, made = [], 0
        for chunk in stream:
            if chunk.text:
                arrivals.append(time.monotonic())
            made = chunk.usage.completion_tokens if chunk.usage else made
        return arrivals, made

    with ThreadPoolExecutor(len(questions)) as pool:
        began = time.monotonic()
        params = SamplingParams(max_new_tokens=tokens)
        rows = [Request(tuple(engine.encode(each)), params) for each in questions]
        return answered(began, list(pool.map(read, engine.submit_each(rows))))


def answered(began: float, found: Sequence[tuple[list[float], int]]) -> Result:
    arrivals, made = zip(*found, strict=True)
    return {"began": began, "arrivals": arrivals, "tokens": made}


class Side:
    """One of those processes, and this one as its client."""

    def __init__(self, side: str, model: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", side, model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = self._told()["port"]

    def _told(self) -> Result:
        assert self.process.stdout is not None
        told: Result = json.loads(self.process.stdout.readline())
        return told

    def _tell(self, **asked: Any) -> Result:
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        return self._told()

    def ask(self, questions: Sequence[str], tokens: int, pace: float = 0.0) -> Result:
        """What these, asked at the same moment, were answered, and the seconds of CPU."""
        before = self._tell(pace=pace)["cpu"]
        if self.port is None:
            found = self._tell(pace=pace, ask={"questions": questions, "tokens": tokens})
        else:
            found = over_http(self.port, questions, tokens) | self._tell(pace=pace)
        return {**found, "cpu": found["cpu"] - before}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()  # its time counts as ours once it has ended


# Sides that are servers ----------------------------------------------------------------------


def over_http(port: int, questions: Sequence[str], tokens: int, model: str = "served") -> Result:
    async def one(channel: Any, question: str) -> tuple[list[float], int]:
        reader, writer = channel
        body = json.dumps(
            {
                "model": model,
                "messages": [{"role": "user", "content": question}],
                "stream": True,
                "stream_options": {"include_usage": True},
                "max_tokens": tokens,
            }
        ).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nConnection: close\r\n"
        head += "Content-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        arrivals, made, said = [], 0, b""
        while line := await reader.readline():
            if b'"content":"' in line and b'"content":""' not in line:
                arrivals.append(time.monotonic())
            if b'"completion_tokens":' in line:
                made = json.loads(line.removeprefix(b"data: "))["usage"]["completion_tokens"]
            said = line.strip() or said
        writer.close()
        if not (arrivals and made):
            raise RuntimeError(f"no answer to {question!r}, but {said!r}")
        return arrivals, made

    async def all_of_them() -> Result:
        channels = [await asyncio.open_connection("127.0.0.1", port) for _ in questions]
        began = time.monotonic()
        return answered(began, await asyncio.gather(*map(one, channels, questions)))

    return asyncio.run(all_of_them())


class Server:
    """A server for OpenAI's protocol that `command` starts at the port it is given."""

    def __init__(
        self,
        command: Callable[[int], list[str]],
        *,
        model: str = "served",
        environment: dict[str, str] | None = None,
    ) -> None:
        self.model = model
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it is read when a start fails
        self.process = subprocess.Popen(
            command(self.port),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (environment or {}),
        )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError):
                self.get("/health")
                return
            time.sleep(0.2)
        self._log.seek(0)
        raise RuntimeError(self._log.read().decode(errors="replace")[-2000:] or "it is not up")

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
            return bytes(answer.read())

    def ask(self, questions: Sequence[str], tokens: int) -> Result:
        return over_http(self.port, questions, tokens, self.model)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def ours(model: str) -> Server:
    rows = str(max(CLIENTS))
    words = [sys.executable, "-m", "gemma2_stream", "serve", model, "--name", "served"]
    return Server(lambda port: [*words, "--max-rows", rows, "--port", str(port)])


def ray_serve(model: str) -> Server:
    """The same application behind Ray's proxy, in one replica with one thread."""
    arguments = {"model": model, "name": "served", "allow_public_without_key": True}
    deployment = {"name": "Gemma2", "max_ongoing_requests": max(CLIENTS)}
    application = {"name": "served", "route_prefix": "/", "args": arguments}
    application |= {"import_path": "gemma2_stream.server.ray:app", "deployments": [deployment]}
    arguments["max_rows"] = max(CLIENTS)

    def command(port: int) -> list[str]:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
            listening = {"host": "127.0.0.1", "port": port}
            json.dump({"http_options": listening, "applications": [application]}, file)
        return [str(Path(sys.executable).with_name("serve")), "run", file.name]

    return Server(command, environment={"RAY_USAGE_STATS_ENABLED": "0"})


def transformers_serve(model: str) -> Server:
    words = [str(Path(sys.executable).with_name("transformers")), "serve", model]
    words += ["--device", "cpu", "--host", "127.0.0.1", "--port"]
    return Server(lambda port: [*words, str(port)], model=model)


def vllm(python: str, model: str) -> Server:
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    words += ["--served-model-name", "served", "--dtype", "bfloat16", "--enforce-eager"]
    words += ["--max-model-len", "512", "--max-num-seqs", str(max(CLIENTS))]
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    return Server(
        lambda port: [*words, "--host", "127.0.0.1", "--port", str(port)], environment=environment
    )


def sides_of(options: argparse.Namespace, model: str, stack: ExitStack) -> dict[str, Any]:
    """Who answers with `model`. A peer that does not start is left out, having said why."""
    begin: dict[str, Callable[[], Any]] = {
        ENGINE: lambda: Side("engine", model),
        SERVER: lambda: ours(model),
    }
    if not options.quick:
        if find_spec("ray") is not None:
            begin[RAY] = lambda: ray_serve(model)
        begin[TRANSFORMERS] = lambda: transformers_serve(model)
    if options.vllm_python:
        begin[VLLM] = lambda: vllm(options.vllm_python, model)
    sides: dict[str, Any] = {}
    for name, make in begin.items():
        say(f"starting: {name}")
        try:
            side = make()
        except (OSError, RuntimeError) as error:
            if name in (ENGINE, SERVER):
                raise
            say(f"no {name}: {error}")
            continue
        stack.callback(side.close)
        sides[name] = side
    return sides


# Rounds --------------------------------------------------------------------------------------


def alone(options: argparse.Namespace) -> Result:
    """For each pace and number of streams, what each side cost in each round."""
    figures: Result = {f"{pace} ms, {n}": {} for pace in options.paces for n in STREAMS}
    draw = random.Random(0)
    with contextlib.ExitStack() as stack:
        sides = {name: Side(side) for name, side in PACED.items()}
        for side in sides.values():
            stack.callback(side.close)
            for _ in range(20):  # what is imported and compiled by the first is nobody's cost
                side.ask(["Hello"], 2, 0.005)
        for number in range(options.rounds):
            for pace in options.paces:
                for streams in STREAMS:
                    say(f"round {number + 1} of {options.rounds}: {pace} ms, {streams} streams")
                    for name in draw.sample([*sides], len(sides)):
                        found = cost(sides[name], pace / 1e3, streams)
                        figures[f"{pace} ms, {streams}"].setdefault(name, []).append(found)
    return figures


def cost(side: Side, pace: float, streams: int) -> Result:
    asked = ["Hello"] * streams
    short = [side.ask(asked, 1, pace) for _ in range(SHORT)]
    long = side.ask(asked, WORDS, pace)
    request = sum(one["cpu"] for one in short) / SHORT / streams
    token = (long["cpu"] / streams - request) / (WORDS - 1)
    firsts = [first for one in short for first in firsts_of(one)]
    late = [at % pace for arrivals in long["arrivals"] for at in arrivals[1:]]
    names = ("cpu_ms", "request_ms", "first_ms", "late_ms")
    values = rounded([1e3 * each for each in (token, request, median(firsts), median(late))], 4)
    return dict(zip(names, values, strict=True))


def firsts_of(found: Result) -> list[float]:
    return [arrivals[0] - found["began"] for arrivals in found["arrivals"]]


def together(options: argparse.Namespace, model: str, questions: Iterator[list[str]]) -> Result:
    """For each side, what its clients saw in each round."""
    draw = random.Random(0)
    with ExitStack() as stack:
        sides = sides_of(options, model, stack)
        figures: Result = {name: {"tokens_per_s": {}} for name in sides}
        for name, side in sides.items():
            say(f"warming up: {name}")
            for question in next(questions):
                side.ask([question], TOKENS)
        for number in range(options.rounds):
            for clients in options.clients:
                say(f"round {number + 1} of {options.rounds}: {clients} clients")
                pool = next(questions)
                asked = [draw.choice(pool) for _ in range(clients)] if clients > 1 else pool
                for name in draw.sample([*sides], len(sides)):
                    if clients > IN_TURN.get(name, clients):
                        continue
                    if clients > 1:
                        found = [sides[name].ask(asked, TOKENS)]
                    else:
                        found = [sides[name].ask([question], TOKENS) for question in asked]
                        seen(figures[name], found)
                    seconds = sum(map(seconds_of, found))
                    rate = sum(sum(one["tokens"]) for one in found) / seconds
                    rates = figures[name]["tokens_per_s"].setdefault(str(clients), [])
                    rates.append(round(rate, 2))
        if VLLM in sides:
            figures[VLLM]["version"] = json.loads(sides[VLLM].get("/version"))["version"]
    return figures


def seconds_of(found: Result) -> float:
    return max(arrivals[-1] for arrivals in found["arrivals"]) - float(found["began"])


def seen(figures: Result, found: Sequence[Result]) -> None:
    """Note what one client at a time saw: the median over its questions."""
    paces = [
        (one["arrivals"][0][-1] - one["arrivals"][0][0]) / max(1, one["tokens"][0] - 1)
        for one in found
    ]
    firsts = [firsts_of(one)[0] for one in found]
    for name, values in (("first_ms", firsts), ("token_ms", paces)):
        figures.setdefault(name, []).append(round(median(values) * 1e3, 3))


def asked_of_the_demo() -> Iterator[list[str]]:
    while True:
        yield [*QUESTIONS]


def never_asked(tokenizer: Any, vocabulary: Sequence[int]) -> Iterator[list[str]]:
    draw = random.Random(0)
    while True:
        yield [tokenizer.decode(draw.choices(vocabulary, k=40)).strip() for _ in range(64)][
            : max(CLIENTS)
        ]


def measure(options: argparse.Namespace) -> Result:
    figures: Result = {}
    with watching(figures):
        figures["alone"] = alone(options)
        if not options.layers:
            demo = Path(gemma2_stream.__file__).with_name("demo")
            figures["sides"] = together(options, str(demo), asked_of_the_demo())
        else:
            from stack import save, speaking_stack, words

            tokenizer = load_tokenizer()
            vocabulary = words(tokenizer)
            with tempfile.TemporaryDirectory() as folder:
                say(f"making {options.layers} layers")
                save(folder, speaking_stack(options.layers, vocabulary), tokenizer)
                figures["sides"] = together(options, folder, never_asked(tokenizer, vocabulary))
    return figures


# The report ----------------------------------------------------------------------------------


def more(figures: Result, what: str) -> list[float]:
    """How much more the server has of it than the engine: an interval."""
    pairs = zip(figures["server"], figures["engine"], strict=True)
    return rounded(interval([served[what] - bare[what] for served, bare in pairs]), 3)


def compared(sides: Result, name: str, clients: int) -> list[float] | None:
    """The tokens a second of `gemma2-stream serve` over those of `name`: an interval."""
    mine, theirs = (sides.get(n, {}).get("tokens_per_s", {}) for n in (SERVER, name))
    if str(clients) not in mine or str(clients) not in theirs:
        return None
    pairs = zip(mine[str(clients)], theirs[str(clients)], strict=True)
    return rounded(interval([m / t for m, t in pairs]), 2)


def alone_table(figures: Result) -> str:
    head = ["a word every, streams", *(f"{name}, CPU a token" for name in PACED), "more"]
    head += ["more a request", "later to the reader", "later to the first"]
    rows = []
    for name, sides in figures.items():
        cells = [f"{median(run['cpu_ms'] for run in sides[side]):.3f}" for side in PACED]
        names = ("cpu_ms", "request_ms", "late_ms", "first_ms")
        rows.append([name, *cells, *(span(more(sides, what), 2) for what in names)])
    return table(head, rows)


def sides_table(document: Result) -> str:
    sides, clients = document["figures"]["sides"], document["clients"]
    head = ["", "ms to the first token", "ms a token", *(f"{n} clients" for n in clients)]
    rows = []
    for name, one in sides.items():
        rates = [one["tokens_per_s"].get(str(n)) for n in clients]
        cells = [f"{median(rate):,.0f}" if rate else "" for rate in rates]
        rows.append([name, f"{median(one['first_ms']):.1f}", f"{median(one['token_ms']):.2f}"])
        rows[-1] += cells
    for name in sides:
        if name != SERVER:
            found = [compared(sides, name, n) for n in clients]
            cells = [span(each, 2) if each else "" for each in found]
            rows.append([f"serve / {name}", "", "", *cells])
    return table(head, rows)


def verdicts(figures: Result) -> Iterator[list[str]]:
    for name, sides in figures["alone"].items():
        found = more(sides, "cpu_ms")
        goal = f"{name}: at most {GOAL_MS} ms of CPU a token more"
        yield [goal, span(found, 3), at_most(found, GOAL_MS)]


def report(document: Result) -> str:
    figures = document["figures"]
    model = (
        f"{document['layers']} layers of Gemma-2-2b's size" if document["layers"] else "the demo"
    )
    return "\n\n".join(
        [
            f"{heading(document)} In brackets are 95 % intervals.",
            "**The server alone**, with an engine that only says words: milliseconds",
            alone_table(figures["alone"]),
            f"**Clients of {model}**, one torch thread: one client's milliseconds, and tokens a "
            "second in all",
            sides_table(document),
            neighbours(figures),
            goals(document),
        ]
    )


def plot(document: Result, path: str) -> None:
    figures = document["figures"]
    figure, (costs, rates) = canvas(2)
    places = [*figures["alone"]]
    for offset, (name, color) in enumerate(zip(PACED, (INK, OURS), strict=True)):
        heights = [median(run["cpu_ms"] for run in figures["alone"][each][name]) for each in places]
        at = [place + 0.38 * (offset - 0.5) for place in range(len(places))]
        costs.bar(at, heights, 0.36, color=color, label=(ENGINE, SERVER)[offset])
    costs.axhline(GOAL_MS, color=RIVAL, linestyle=":")
    costs.set_xticks(range(len(places)), places)
    costs.set_xlabel("a word every, streams; dotted: the goal of the difference")
    costs.set_title("ms of CPU a token, no model")
    styles = {
        ENGINE: (INK, "o--"),
        SERVER: (OURS, "o-"),
        RAY: (OURS, "s--"),
        TRANSFORMERS: (RIVAL, "^--"),
        VLLM: (RIVAL, "s-"),
    }
    for name, one in figures["sides"].items():
        color, style = styles[name]
        by = one["tokens_per_s"]
        rates.loglog([*map(int, by)], [*map(median, by.values())], style, color=color, label=name)
    rates.set_xticks(document["clients"], [str(n) for n in document["clients"]])
    rates.minorticks_off()
    rates.set_xlabel("clients at once")
    rates.set_title("tokens a second in all")
    figure.legend(*rates.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    write_svg(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--layers", type=int, default=0, help="of Gemma-2-2b's size; 0: the demo")
    parser.add_argument("--vllm-python", metavar="FILE", help="the Python of vLLM's environment")
    parser.add_argument("--plot", metavar="FILE.svg")
    parser.add_argument("--quick", action="store_true", help="--rounds 2, at 5 ms only, no peers")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work)
        return
    options.paces, options.clients = PACES_MS, CLIENTS
    if options.quick:
        options.rounds, options.paces = 2, PACES_MS[:1]
    figures = measure(options)
    document = documented(
        quick=options.quick,
        layers=options.layers,
        clients=options.clients,
        figures=figures,
        verdicts=list(verdicts(figures)),
    )
    if VLLM in figures["sides"]:
        document["versions"][VLLM] = figures["sides"][VLLM]["version"]
    if options.plot:
        plot(document, options.plot)
    publish(document, report(document))


if __name__ == "__main__":
    main()
