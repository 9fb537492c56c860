"""What streaming costs and how late it is: ours, bare `generate`, and HuggingFacePipeline.

    python benchmarks/streaming.py                            # everything; 20 minutes, 10 GB
    python benchmarks/streaming.py --quick                    # a and c, few rounds; half a minute
    python benchmarks/streaming.py --parts a --layers 0       # only the demo's milliseconds a token
    python benchmarks/streaming.py --parts b,c --plot streaming.svg
    GEMMA2_TOKENIZER=FOLDER python benchmarks/streaming.py    # with Gemma 2's real tokenizer

What:
    a  milliseconds a token, on a checkpoint and on a random stack of Gemma-2-2b's real shape, for
       bare `model.generate`, `llm.stream`, `llm.astream` and `HuggingFacePipeline.stream`
    b  lag by script: tokens between the one that completes a character and the one at whose step
       the caller receives it
    c  microseconds a token after 100, 1,000 and 4,000 tokens without a newline, no model running
    d  `import gemma2_stream`; load time, and peak memory against the size of the weights

Why: whoever streams pays for it at every token, and what is held back is felt as waiting. So the
cost is measured against `generate` alone, and the delay in tokens, which no machine can blur.

How:
    a  The arms take turns within a round, in another order each round, and each is compared with
       the bare run of its own round: what a neighbour on the machine does to one it does to the
       other. All get the same prompt ids, greedy. The output rows of ids that end a turn are zeroed
       in memory, so that every arm makes exactly as many tokens; each text is checked against
       bare's. A token's time includes its share of the prefill and of the call. `generate` runs in
       the calling thread when bare; both libraries run it on another, and the caller reads. One
       torch thread by default: more would spin on busy cores, and what is ours is Python. CPU time
       is the whole process's. Intervals are a 95 % bootstrap of the median of paired differences.
       Where neighbours drown a difference of microseconds, the account still tells: CPU time that
       the streamer takes within `generate`, and the calling thread in all. It is an upper bound:
       bare `generate` asks stopping criteria too, and the caller runs beside the model.
    b  A model whose logits are forced to the ids of a known text runs through the whole of each
       library, and pauses at every step so that the reader is idle before the next; the smaller of
       two passes counts, since a slow machine can only add lag. A character is complete with the
       token that brings its last byte.
    c  Ids go in and text comes out in one thread, so it is computing alone; best of many runs.
    d  Each in a fresh process. Weights are mapped, not read, when they are loaded, so memory is
       taken after the first token too; it is what comes on top of torch and transformers imported.
       What of it is not a mapped file is given beside it: pages of a file are the kernel's to take
       back, so when weights are converted on the way that is what a machine must have.

Prints Markdown; progress goes to stderr; the last line is JSON with every figure.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from langchain_huggingface import HuggingFacePipeline
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
from stack import random_stack, save
from texts import TEXTS, load_tokenizer
from transformers import Gemma2Config, Gemma2ForCausalLM, TextIteratorStreamer, pipeline

from gemma2_stream import Chunk, Gemma2Engine, Gemma2LLM, Request, SamplingParams, TokenStream, hub
from gemma2_stream.detokenizer import detokenizer_for
from gemma2_stream.stream import Channel
from gemma2_stream.streamer import Row, TokenStreamer

OVERHEAD_GOAL = 100.0  # microseconds a token on bare `generate`, on the demo
RATIO_GOAL = 1.02  # of bare's time, on layers of real size
FLAT_GOAL = 1.25  # of the cost after 100 tokens, after 4,000
IMPORT_GOAL = 0.3  # seconds

QUESTION = "你是谁？"
STACK_PROMPT, STACK_TOKENS = "The quick brown fox", 12
POSITIONS = (100, 1_000, 4_000)
STEP_PAUSE = 0.01  # seconds, in which a reader that has something to read has long read it

# Models --------------------------------------------------------------------------------------


def never_end(engine: Gemma2Engine) -> None:
    """Zero the output rows of what ends a turn, and of ids that the tokenizer has no text for.

    A logit of 0 is never the largest, so every arm makes as many tokens as it is asked for, and no
    arm's configuration differs from what its users have.
    """
    ends = engine.model.generation_config.eos_token_id
    spelt = engine.tokenizer.backend_tokenizer.token_to_id("<end_of_turn>")
    weight = engine.model.get_output_embeddings().weight
    with torch.no_grad():
        for token_id in (ends, spelt, engine.tokenizer.eos_token_id):
            weight[token_id if token_id is not None else []] = 0
        weight[len(engine.tokenizer) :] = 0


# a: milliseconds a token ---------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to generate; `run` gives the text, or the ids from which it is decoded untimed."""

    name: str
    run: Callable[[], str | torch.Tensor]


def arms(engine: Gemma2Engine, prompt: str, tokens: int, runner: asyncio.Runner) -> list[Arm]:
    """Bare first; all on the same weights and the same prompt ids."""
    model, tokenizer = engine.model, engine.tokenizer
    ids = torch.tensor([engine.encode(prompt, raw=True)], device=engine.device)
    mask = torch.ones_like(ids)
    llm = Gemma2LLM(engine=engine, raw=True, max_new_tokens=tokens)
    rival = HuggingFacePipeline(
        pipeline=pipeline("text-generation", model=model, tokenizer=tokenizer)
    )
    greedy = {"max_new_tokens": tokens, "do_sample": False}
    if tokenizer(prompt)["input_ids"] != ids[0].tolist():
        raise RuntimeError("the pipeline would not send the ids that the others send")

    def bare() -> torch.Tensor:
        out: torch.Tensor = model.generate(input_ids=ids, attention_mask=mask, **greedy)
        return out[0, ids.shape[1] :]

    async def collect() -> str:
        return "".join([text async for text in llm.astream(prompt)])

    return [
        Arm("generate", bare),
        Arm("llm.stream", lambda: "".join(llm.stream(prompt))),
        Arm("llm.astream", lambda: runner.run(collect())),
        Arm(
            "HuggingFacePipeline.stream",
            lambda: "".join(rival.stream(prompt, pipeline_kwargs=greedy)),
        ),
    ]


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What `run` gives, and the seconds it took: wall, and CPU of all threads."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def take_turns(contenders: list[Arm], rounds: int, tokens: int, tokenizer: Any) -> Result:
    """Milliseconds a token, wall and CPU, `rounds` of them for each arm."""
    made = {arm.name: arm.run() for arm in contenders}  # untimed, to warm up and to compare
    ids = made["generate"]
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    if len(ids) != tokens or any(text != expected for text in made.values() if text is not ids):
        raise RuntimeError(f"the arms did not make the same {tokens} tokens: {made!r}")
    times: dict[str, dict[str, list[float]]] = {
        arm.name: {"wall": [], "cpu": []} for arm in contenders
    }
    for number in range(rounds):
        turn = number % len(contenders)
        order = contenders[turn:] + contenders[:turn]
        for arm in order if number % 2 else reversed(order):
            result, wall, cpu = timed(arm.run)
            if isinstance(result, str) and result != expected:
                raise RuntimeError(f"{arm.name} changed its answer to {result!r}")
            times[arm.name]["wall"].append(wall / tokens * 1e3)
            times[arm.name]["cpu"].append(cpu / tokens * 1e3)
        say(f"  round {number + 1} of {rounds}, load {psutil.getloadavg()[0]:.1f}")
    return times


@contextmanager
def clocked(spent: list[float]) -> Iterator[None]:
    """Add to `spent[0]` the CPU seconds that `generate` is in our streamer."""
    originals = {name: getattr(TokenStreamer, name) for name in ("__call__", "put")}

    def clock(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                spent[0] += time.thread_time() - began

        return call

    for name, original in originals.items():
        setattr(TokenStreamer, name, clock(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(TokenStreamer, name, original)


def account(arm: Arm, tokens: int, rounds: int) -> Result:
    """CPU microseconds a token: in our streamer, and in the calling thread; medians of `rounds`."""
    worker, caller = [], []
    for _ in range(rounds):
        spent = [0.0]
        with clocked(spent):
            began = time.thread_time()
            arm.run()
            caller.append((time.thread_time() - began) / tokens * 1e6)
        worker.append(spent[0] / tokens * 1e6)
    parts = {"streamer": statistics.median(worker), "caller": statistics.median(caller)}
    both = interval([sum(pair) for pair in zip(worker, caller, strict=True)])
    return {**{name: round(us, 1) for name, us in parts.items()}, "both": rounded(both, 1)}


def compare(times: dict[str, dict[str, list[float]]]) -> Result:
    """Each arm's times, and its differences from, and ratios to, bare of the same round."""
    figures: Result = {}
    for name, clocks in times.items():
        row: Result = {}
        for clock, values in clocks.items():
            bare = times["generate"][clock]
            pairs = list(zip(values, bare, strict=True))
            row[clock] = {
                "ms_min": round(min(values), 4),
                "ms_median": round(statistics.median(values), 4),
                "overhead_us": rounded(interval([(v - b) * 1e3 for v, b in pairs]), 1),
                "overhead_us_of_minima": round((min(values) - min(bare)) * 1e3, 1),
                "ratio": rounded(interval([v / b for v, b in pairs]), 4),
            }
        figures[name] = row
    return figures


def cost(engine: Gemma2Engine, prompt: str, tokens: int, rounds: int) -> Result:
    """Part a on one engine."""
    storages = {w.untyped_storage().data_ptr(): w.numel() for w in engine.model.parameters()}
    figures: Result = {
        "parameters": sum(storages.values()),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "device": str(engine.device),
        "torch_threads": torch.get_num_threads(),
        "tokens": tokens,
        "rounds": rounds,
    }
    never_end(engine)
    with watching(figures), asyncio.Runner() as runner:
        contenders = arms(engine, prompt, tokens, runner)
        figures["arms"] = compare(take_turns(contenders, rounds, tokens, engine.tokenizer))
        figures["account_us"] = {
            arm.name: account(arm, tokens, max(3, rounds // 3))
            for arm in contenders
            if arm.name.startswith("llm.")  # ours
        }
    return figures


def chat_prompt(tokenizer: Any) -> str:
    """A question as the chat template writes it, less the BOS that every arm adds by itself."""
    turns = [{"role": "user", "content": QUESTION}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token)


def part_a(options: argparse.Namespace) -> Result:
    figures: Result = {}
    say(f"a: {options.rounds} rounds of {options.tokens} tokens on the checkpoint")
    engine = Gemma2LLM(options.model).engine
    if not isinstance(engine, Gemma2Engine):
        raise TypeError(engine)
    prompt = chat_prompt(engine.tokenizer)
    figures["checkpoint"] = cost(engine, prompt, options.tokens, options.rounds)
    engine.close()
    if options.layers:
        rounds = max(2, options.rounds // 5)
        say(f"a: {rounds} rounds of {STACK_TOKENS} tokens on {options.layers} real-size layers")
        model = random_stack(options.layers, torch.float32)
        with Gemma2Engine(model, load_tokenizer(), name="stack") as stack:
            del model
            figures["stack"] = cost(stack, STACK_PROMPT, STACK_TOKENS, rounds)
    gc.collect()
    return figures


# b: lag --------------------------------------------------------------------------------------


class Script:
    """Makes a model say given ids, a token a step, whatever it is asked."""

    def __init__(self, model: Any) -> None:
        self._ids: list[int] = []
        self.made = 0
        model.register_forward_pre_hook(self._pause)
        model.register_forward_hook(self._choose)

    def play(self, ids: list[int]) -> None:
        self._ids, self.made = ids, 0

    def _pause(self, *_: object) -> None:
        time.sleep(STEP_PAUSE)

    def _choose(self, model: Any, args: Any, output: Any) -> None:
        output.logits.zero_()[..., self._ids[self.made]] = 1.0
        self.made += 1


def small_model(tokenizer: Any) -> Gemma2ForCausalLM:
    """The smallest that has a logit for every id."""
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        eos_token_id=[1, 107],
    )
    return Gemma2ForCausalLM(config).eval()


def completed(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """For each character of the text, the index of the token that brings its last byte."""
    owner: list[int] = []  # of each byte, the token that brings it
    for index, spelling in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        is_byte = len(spelling) == 6 and spelling.startswith("<0x")
        owner += [index] * (1 if is_byte else len(spelling.replace("▁", " ").encode()))
    end, last = 0, []
    for char in tokenizer.decode(ids):
        end += len(char.encode())
        last.append(owner[end - 1])
    return last


def received(chunks: Iterator[str], script: Script) -> tuple[str, list[int], int]:
    """The text, for each of its characters the token at whose step it came, and the chunks."""
    text, arrived, count = "", [], 0
    for chunk in chunks:
        text += chunk
        arrived += [script.made - 1] * len(chunk)
        count += bool(chunk)
    return text, arrived, count


def lag_of(run: Callable[[], Iterator[str]], script: Script, tokenizer: Any, text: str) -> Result:
    """Lag of `run` on the ids of `text`, in tokens; the better of two passes, char by char."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    passes = []
    for _ in range(2):
        script.play([*ids, tokenizer.eos_token_id])
        came, arrived, chunks = received(run(), script)
        if came != text:
            raise RuntimeError(f"{came!r} came out for {text!r}")
        passes.append(arrived)
    ready = completed(tokenizer, ids)
    lags = [min(both) - done for *both, done in zip(*passes, ready, strict=True)]
    return {
        "tokens": len(ids),
        "chunks": chunks,
        "mean": round(statistics.mean(lags), 2),
        "max": max(lags),
        "passes_agree": passes[0] == passes[1],
    }


def part_b() -> Result:
    tokenizer = load_tokenizer()
    model = small_model(tokenizer)
    script = Script(model)
    greedy = {"max_new_tokens": 1_000, "do_sample": False}
    rival = HuggingFacePipeline(
        pipeline=pipeline("text-generation", model=model, tokenizer=tokenizer)
    )
    figures: Result = {"vocabulary": len(tokenizer), "scripts": {}}
    with watching(figures), Gemma2Engine(model, tokenizer, name="script") as engine:
        llm = Gemma2LLM(engine=engine, raw=True, max_new_tokens=1_000)
        ways: dict[str, Callable[[], Iterator[str]]] = {
            "ours": lambda: llm.stream("Go"),
            "HF": lambda: rival.stream("Go", pipeline_kwargs=greedy),
        }
        for name, text in TEXTS.items():
            say(f"b: {name}")
            figures["scripts"][name] = {
                way: lag_of(run, script, tokenizer, text) for way, run in ways.items()
            }
    return figures


# c: cost after many tokens -------------------------------------------------------------------

WINDOW = 50  # tokens timed, up to each position


def best_windows(run: Callable[[Callable[[int], None]], None], times: int) -> list[float]:
    """The least microseconds a token in the window before each position, over `times` runs.

    `run` calls what it is given with the number of tokens that it is through with.
    """
    edges = {edge for position in POSITIONS for edge in (position - WINDOW, position)}
    best = [float("inf")] * len(POSITIONS)
    for _ in range(times):
        clock: dict[int, float] = {}

        def tick(count: int, clock: dict[int, float] = clock) -> None:
            if count in edges:
                clock[count] = time.perf_counter()

        gc.collect()
        run(tick)
        spans = [(clock[p] - clock[p - WINDOW]) / WINDOW * 1e6 for p in POSITIONS]
        best = [min(pair) for pair in zip(best, spans, strict=True)]
    return best


def core_cost(tokenizer: Any, ids: list[int], stops: tuple[str, ...]) -> list[float]:
    """Ours from `generate`'s call to the caller's chunk: TokenStreamer and TokenStream."""
    request = Request((2,), SamplingParams(max_new_tokens=len(ids) + 1, stop=stops))
    detokenizer = detokenizer_for(tokenizer)
    columns = torch.tensor([[2, *ids]])

    def run(tick: Callable[[int], None]) -> None:
        channel = Channel([request])
        channel.start()
        row = Row(channel, 0, detokenizer(), {1: None, 107: None}, len(ids) + 1)
        streamer = TokenStreamer(tokenizer, [row], lambda: False)
        stream = TokenStream(channel)
        streamer.put(columns[:, :1])
        for count in range(1, len(ids) + 1):
            streamer(columns[:, : count + 1], None)
            while channel.unread():
                next(stream)
            tick(count)
        streamer.end()

    return best_windows(run, 30)


class Replay:
    """An engine that has already generated: what is left is the caller's side and LangChain's."""

    name = "replay"
    defaults = SamplingParams()

    def __init__(self, texts: Sequence[str]) -> None:
        self._chunks = [Chunk(0, text) for text in texts]

    def encode(self, prompt: Any, *, raw: bool = False) -> list[int]:
        return [2]

    def tokenize(self, text: str) -> list[int]:
        return [2]

    def submit(self, requests: Sequence[Request]) -> TokenStream:
        channel = Channel(requests)
        channel.start()
        for chunk in self._chunks:
            channel.put(chunk)
        channel.put(None)
        return TokenStream(channel)

    def submit_each(self, requests: Sequence[Request]) -> list[TokenStream]:
        return [self.submit([request]) for request in requests]

    def close(self) -> None: ...


def langchain_cost(tokenizer: Any, ids: list[int]) -> list[float]:
    """What `llm.stream` adds on the caller's side, LangChain's own bookkeeping included."""
    llm = Gemma2LLM(engine=Replay([tokenizer.decode([token_id]) for token_id in ids]))

    def run(tick: Callable[[int], None]) -> None:
        for count, _ in enumerate(llm.stream("Go"), 1):
            tick(count)

    return best_windows(run, 15)


def text_streamer_cost(tokenizer: Any, ids: list[int]) -> list[float]:
    """transformers' TextIteratorStreamer, put and read; all but the windows in one put."""

    def run(tick: Callable[[int], None]) -> None:
        for position in POSITIONS:
            streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
            streamer.put(torch.tensor(ids[: position - WINDOW]))
            next(streamer)
            tick(position - WINDOW)
            for count in range(position - WINDOW + 1, position + 1):
                streamer.put(torch.tensor(ids[count - 1 : count]))
                next(streamer)
                tick(count)

    return best_windows(run, 5)


def part_c() -> Result:
    tokenizer = load_tokenizer()
    words = " ".join([TEXTS["English"], TEXTS["JSON"], TEXTS["Chinese"]] * 40)
    ids = tokenizer(words, add_special_tokens=False)["input_ids"][: POSITIONS[-1]]
    say(f"c: {len(ids)} ids without a newline")
    figures: Result = {"positions": POSITIONS}
    with watching(figures):
        costs = {
            "TokenStreamer and TokenStream": core_cost(tokenizer, ids, ()),
            "the same with four stops": core_cost(
                tokenizer, ids, ("\nHuman:", "\nObservation", "```\n", "wait, no")
            ),
            "llm.stream's reading side": langchain_cost(tokenizer, ids),
            "TextIteratorStreamer": text_streamer_cost(tokenizer, ids),
        }
    figures["us"] = {name: rounded(values, 1) for name, values in costs.items()}
    return figures


# d: import, load time, memory ----------------------------------------------------------------

IMPORT = """
import sys, time
began = time.perf_counter()
import gemma2_stream
seconds = time.perf_counter() - began
print(seconds, int("torch" in sys.modules or "transformers" in sys.modules))
"""

LOAD = """
import json, sys, threading, time
import psutil, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2ForCausalLM
from gemma2_stream import Gemma2LLM

folder, dtype, what = sys.argv[1:]
me = psutil.Process()
def high():  # not getrusage: under Linux a child inherits its parent's ru_maxrss
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

def own():  # pages of a mapped file are the kernel's to take back; these are not
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
def sample():
    while True:
        seen.append(own())
        time.sleep(0.01)

figures, before, began = {}, me.memory_info().rss, time.perf_counter()
own_before, seen = own(), []
threading.Thread(target=sample, daemon=True).start()
def note(name):
    figures[name] = {"seconds": time.perf_counter() - began, "peak": high() - before,
                     "own": max(seen) - own_before}

if what == "tokenizer":
    kept = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    note("loaded")
else:
    llm = Gemma2LLM(folder, dtype=dtype, raw=True, max_new_tokens=2)
    llm.engine
    note("loaded")
    for text in llm.stream("The"):
        break
    note("first_token")
    weights = llm.engine.model.parameters()
    figures["weights"] = sum(weight.numel() * weight.element_size() for weight in weights)
print(json.dumps(figures))
"""


def child(code: str, *arguments: str) -> str:
    """The last line that a fresh interpreter running `code` prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )
    return done.stdout.splitlines()[-1]


def import_figures() -> Result:
    runs = [child(IMPORT).split() for _ in range(5)]
    seconds = [float(run[0]) for run in runs]
    return {
        "seconds_best": round(min(seconds), 3),
        "seconds_median": round(statistics.median(seconds), 3),
        "loads_torch": any(run[1] == "1" for run in runs),
    }


def load_figures(folder: Path, dtype: str) -> Result:
    """Load time, and peak memory in megabytes and against the weights; medians of three."""
    file_mb = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    runs = [json.loads(child(LOAD, str(folder), dtype, "engine")) for _ in range(3)]
    tokenizer = json.loads(child(LOAD, str(folder), dtype, "tokenizer"))["loaded"]
    figures: Result = {
        "dtype": dtype,
        "file_mb": round(file_mb, 1),
        "weights_mb": round(runs[0]["weights"] / 1e6, 1),
        "tokenizer_mb": round(tokenizer["peak"] / 1e6, 1),
        "tokenizer_seconds": round(tokenizer["seconds"], 2),
    }
    for name in ("loaded", "first_token"):
        peak = statistics.median(run[name]["peak"] for run in runs) / 1e6
        figures[name] = {
            "seconds_best": round(min(run[name]["seconds"] for run in runs), 2),
            "seconds_median": round(statistics.median(run[name]["seconds"] for run in runs), 2),
            "peak_mb": round(peak, 1),
            "peak_of_weights": round(peak * 1e6 / runs[0]["weights"], 2),
            "own_mb": round(statistics.median(run[name]["own"] for run in runs) / 1e6, 1),
        }
    return figures


def part_d(options: argparse.Namespace) -> Result:
    figures: Result = {"loads": {}}
    with watching(figures), tempfile.TemporaryDirectory() as name:
        say("d: import")
        figures["import"] = import_figures()
        say("d: load the checkpoint")
        figures["loads"]["checkpoint"] = load_figures(hub.resolve(options.model), "float32")
        if options.layers:
            say("d: write and load real-size layers")
            save(name, random_stack(options.layers), load_tokenizer())
            gc.collect()
            for dtype in ("bfloat16", "float32"):
                figures["loads"][f"stack, {dtype}"] = load_figures(Path(name), dtype)
    return figures


# What comes out ------------------------------------------------------------------------------


def verdicts(parts: Result) -> Iterator[tuple[str, str, str]]:
    """Each goal, what was measured, and whether it was met."""
    for arm in ("llm.stream", "llm.astream"):
        if "a" in parts:
            figures = parts["a"]["checkpoint"]
            goal = f"`{arm}`: at most {OVERHEAD_GOAL:.0f} µs a token over bare `generate`"
            for clock in ("cpu", "wall"):
                us = figures["arms"][arm][clock]["overhead_us"]
                yield f"{goal}, {clock}", span(us), at_most(us, OVERHEAD_GOAL)
        if "stack" in parts.get("a", {}):
            for clock in ("cpu", "wall"):
                ratio = parts["a"]["stack"]["arms"][arm][clock]["ratio"]
                goal = f"`{arm}`: at most {RATIO_GOAL} of bare on real-size layers, {clock}"
                yield goal, span(ratio, 3), at_most(ratio, RATIO_GOAL)
    for name, costs in parts.get("c", {}).get("us", {}).items():
        if name != "TextIteratorStreamer":
            ratio = costs[-1] / costs[0]
            goal = f"{name}: after 4,000 tokens at most {FLAT_GOAL} of the cost after 100"
            yield goal, f"{ratio:.2f}", at_most([ratio], FLAT_GOAL)
    if "d" in parts:
        found = parts["d"]["import"]
        best, torch_too = found["seconds_best"], found["loads_torch"]
        goal = f"`import gemma2_stream` under {IMPORT_GOAL} s"
        yield goal, f"{best} s", at_most([best], IMPORT_GOAL)
        yield "and without torch", "yes" if not torch_too else "no", "fail" if torch_too else "pass"


def cost_table(figures: Result) -> str:
    rows = []
    for name, row in figures["arms"].items():
        cpu, wall = row["cpu"], row["wall"]
        times = [f"{t:.3f}" for t in (cpu["ms_min"], cpu["ms_median"], wall["ms_median"])]
        over = [span(cpu["overhead_us"]), span(wall["overhead_us"]), span(cpu["ratio"], 3)]
        spent = figures["account_us"].get(name)
        sums = f"{spent['streamer']:.0f} + {spent['caller']:.0f}" if spent else ""
        rows.append([f"`{name}`", *times, *(over if name != "generate" else [""] * 3), sums])
    head = ["ms a token", "CPU, least", "CPU, median", "wall, median", "over bare, CPU µs"]
    head += ["over bare, wall µs", "CPU ratio", "account, CPU µs"]
    note = (
        f"{figures['parameters'] / 1e6:,.1f} M parameters, {figures['dtype']}, "
        f"{figures['device']}, torch threads: {figures['torch_threads']}; {figures['rounds']} "
        f"rounds of {figures['tokens']} tokens. {neighbours(figures)}"
    )
    return f"{table(head, rows)}\n\n{note}"


def lag_table(figures: Result) -> str:
    rows = [
        [name, ways["ours"]["tokens"]]
        + [way[key] for way in ways.values() for key in ("chunks", "mean", "max")]
        for name, ways in figures["scripts"].items()
    ]
    keys = ("chunks", "mean lag", "longest lag")
    head = ["", "tokens", *(f"{who}: {key}" for who in ("ours", "HF") for key in keys)]
    return f"{table(head, rows)}\n\nTokenizer with {figures['vocabulary']:,} tokens."


def growth_table(figures: Result) -> str:
    head = ["µs a token", *(f"after {position:,}" for position in figures["positions"])]
    rows = [[name, *costs] for name, costs in figures["us"].items()]
    return f"{table(head, rows)}\n\n{neighbours(figures)}"


def start_table(figures: Result) -> str:
    keys = ("seconds_best", "seconds_median", "peak_mb", "peak_of_weights", "own_mb")
    found = figures["import"]
    times = [found["seconds_best"], found["seconds_median"]]
    rows = [["`import gemma2_stream`", *[""] * 3, *times, "", "", ""]]
    for name, load in figures["loads"].items():
        sizes = [load["file_mb"], load["weights_mb"], load["tokenizer_mb"]]
        for step, words in (("loaded", "load"), ("first_token", "load and first token")):
            rows.append([f"{words}: {name}", *sizes, *(load[step][key] for key in keys)])
    head = ["", "file MB", "weights MB", "tokenizer alone, peak MB", "s, best", "s, median"]
    head += ["peak MB", "peak / weights", "peak MB without mapped files"]
    return f"{table(head, rows)}\n\n{neighbours(figures)}"


def measured(parts: Result) -> list[Result]:
    """What was watched: a part, or each model of part a."""
    return [*parts.get("a", {}).values(), *(part for name, part in parts.items() if name != "a")]


def report(document: Result) -> str:
    parts = document["parts"]
    before, after = document["load_average"]
    lines = [
        f"{heading(document)} Load average {before} before and {after} after. "
        "In brackets are 95 % intervals.",
    ]
    others = [part["cores_used_by_others"] for part in measured(parts)]
    if max(others) > 0.2:
        cores = document["machine"]["cores"]
        lines.append(
            f"The machine was shared: other programs kept {min(others)} to {max(others)} of its "
            f"{cores} cores busy. That lengthens every time, and what wakes a second "
            "thread most; compare within a table, not with another machine's."
        )
    if "a" in parts:
        lines += ["**a. Milliseconds a token, checkpoint**", cost_table(parts["a"]["checkpoint"])]
    if "stack" in parts.get("a", {}):
        title = "**a. Milliseconds a token, layers of Gemma-2-2b's size**"
        lines += [title, cost_table(parts["a"]["stack"])]
    if "b" in parts:
        lines += ["**b. Lag in tokens**", lag_table(parts["b"])]
    if "c" in parts:
        lines += ["**c. Cost after many tokens**", growth_table(parts["c"])]
    if "d" in parts:
        lines += ["**d. Start**", start_table(parts["d"])]
    return "\n\n".join([*lines, goals(document)])


def plot(parts: Result, path: str) -> None:
    """Parts a, b and c as one picture on a transparent ground."""
    figure, axes = canvas(3)
    if "a" in parts:
        draw_cost(axes[0], parts["a"]["checkpoint"])
    if "b" in parts:
        draw_lag(axes[1], parts["b"]["scripts"])
    if "c" in parts:
        draw_growth(axes[2], parts["c"]["us"])
    write_svg(figure, path)


def draw_cost(axes: Any, figures: Result) -> None:
    rows = {name: row["cpu"]["overhead_us"] for name, row in figures["arms"].items()}
    del rows["generate"]
    lows, middles, highs = zip(*rows.values(), strict=True)
    below = [middle - low for low, middle in zip(lows, middles, strict=True)]
    above = [high - middle for high, middle in zip(highs, middles, strict=True)]
    labels = [name.replace("Pipeline.", "\nPipeline.") for name in rows]
    colors = [OURS, OURS, RIVAL]
    axes.bar(labels, middles, yerr=[below, above], color=colors, ecolor=INK, capsize=3)
    axes.axhline(OVERHEAD_GOAL, color=INK, linewidth=0.8, linestyle=":")
    axes.set_title("CPU µs a token over bare generate")


def draw_lag(axes: Any, scripts: Result) -> None:
    sides = (("ours", -0.2, OURS, "gemma2_stream"), ("HF", 0.2, RIVAL, "HuggingFacePipeline"))
    for way, shift, color, label in sides:
        places = [place + shift for place in range(len(scripts))]
        axes.bar(places, [w[way]["mean"] for w in scripts.values()], 0.4, color=color, label=label)
    axes.set_xticks(range(len(scripts)), scripts, rotation=45, ha="right")
    axes.set_title("mean lag of a character, in tokens")
    axes.legend()


def draw_growth(axes: Any, costs: Result) -> None:
    names = {"TokenStreamer and TokenStream": OURS, "TextIteratorStreamer": RIVAL}
    for name, color in names.items():
        axes.loglog(POSITIONS, costs[name], "o-", color=color, label=name)
    axes.set_xticks(POSITIONS, [f"{position:,}" for position in POSITIONS])
    axes.minorticks_off()
    axes.set_title("µs a token after so many")
    axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="'demo', a folder, or an id")
    parser.add_argument("--parts", default="a,b,c,d", help="which, between commas")
    parser.add_argument("--tokens", type=int, default=100, help="of an answer on the checkpoint")
    parser.add_argument(
        "--rounds", type=int, default=60, help="on the checkpoint; a fifth on the real-size layers"
    )
    parser.add_argument("--layers", type=int, default=8, help="of real size; 0 leaves them out")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--plot", metavar="FILE.svg", help="draw parts a, b and c")
    parser.add_argument(
        "--quick", action="store_true", help="--parts a,c --layers 0 --rounds 6: wide intervals"
    )
    options = parser.parse_args()
    if options.quick:
        options.parts, options.layers, options.rounds = "a,c", 0, 6
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    run = {
        "a": lambda: part_a(options),
        "b": part_b,
        "c": part_c,
        "d": lambda: part_d(options),
    }
    before = psutil.getloadavg()[0]
    parts: Result = {name: run[name]() for name in options.parts.split(",")}
    document = documented(
        load_average=rounded([before, psutil.getloadavg()[0]], 2),
        parts=parts,
        verdicts=list(verdicts(parts)),
    )
    if options.plot:
        plot(parts, options.plot)
    publish(document, report(document))


if __name__ == "__main__":
    main()
