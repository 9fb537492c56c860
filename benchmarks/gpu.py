"""One GPU: how fast each preset answers there, alone and many at once, against stock `generate`.

    python benchmarks/gpu.py                   # 8 minutes, 40 GB of the card, 6 of disk
    python benchmarks/gpu.py --plot gpu.svg
    python benchmarks/gpu.py --device cpu --layers 1 --tokens 8 --rounds 1    # whether it runs

What: on random weights of Gemma-2-2b's shape (stack.py; all 26 layers, bfloat16), greedy:
    one    seconds to the first token of a short and of a long prompt, tokens a second after it,
           seconds to load and of the first answers, and what the card held at most, for
               generate    stock `model.generate`
               static      the same, with `cache_implementation="static"`: compiled by transformers
               exact, speed, memory    the presets; `memory` where bitsandbytes is installed
    many   tokens a second of 1 to 64 requests that are there at once, prefill included, for `exact`
           and `memory`, and for stock `generate` with all of them in one batch
    check  whether `speed` says what `exact` says, in float32, where rounding turns no choice: short
           and long prompts, and one in whose answer the sliding window fills

Why: a step of eager Gemma 2 is some 800 kernels, each of which takes longer to launch than to run;
this shows what each preset makes of that.

How: Each arm is a process of its own that loads once and waits. They load, and compile, at the same
time; after that only one has work at a time. `speed` compiles while it loads, and is loaded again
at the end, when torch's cache on disk knows it; `static` compiles in its first answers. In a round
each gets the same new prompts, in another order each round; ratios are of one round, and intervals
are 95 % bootstraps of their median. Prompts differ from their first token on, so that no cache
helps. Times are those at which a token is the caller's: a chunk of ours, or a `put` into the
streamer of `generate`, which has waited for the card then. All rows but those of words are zero in
the table: nothing ends early, and every token has text.

Prints Markdown; progress goes to stderr, and each part's figures as soon as they are there; the
last line is JSON with every figure.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from arm import Arm
from report import (
    OURS,
    RIVAL,
    Result,
    at_least,
    canvas,
    documented,
    goals,
    heading,
    interval,
    neighbours,
    publish,
    say,
    span,
    table,
    watching,
    write_svg,
)
from stack import random_stack, save, say_only, words
from texts import load_tokenizer
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from gemma2_stream import Gemma2Engine, Request, SamplingParams
from gemma2_stream.loading import LoadSpec, shared_engine

SHORT, LONG = 128, 2_000
MANY = (1, 8, 32, 64)
STOCK = ("generate", "static")

Prompt = Sequence[int]


# An arm's own process ------------------------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """Load, say so, and answer the prompts that come on stdin, all of a line at once."""
    began = time.perf_counter()
    arm = Stock(options) if options.work in STOCK else Ours(options)
    print(json.dumps({"load_s": time.perf_counter() - began}), flush=True)
    for line in sys.stdin:
        times, texts = arm.answer(json.loads(line))
        told = {"times": times, "texts": texts}
        if options.device == "cuda":
            told["gb"] = torch.cuda.max_memory_allocated() / 1e9
        print(json.dumps(told), flush=True)


class Times(BaseStreamer):
    """When each step's tokens were put here; the first is when the prompts were."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Stock:
    def __init__(self, options: argparse.Namespace) -> None:
        folder, dtype = options.folder, getattr(torch, options.dtype)
        self._options: dict[str, Any] = {"max_new_tokens": options.tokens, "do_sample": False}
        if options.work == "static":
            self._options["cache_implementation"] = "static"
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map=options.device
        )

    def answer(self, prompts: list[Prompt]) -> tuple[list[float], list[str]]:
        ids = torch.tensor(prompts, device=self._model.device)
        streamer, start = Times(), time.perf_counter()
        self._model.generate(
            ids, attention_mask=torch.ones_like(ids), streamer=streamer, **self._options
        )
        return [start, *streamer.times[1:]], []


class Ours:
    def __init__(self, options: argparse.Namespace) -> None:
        spec = LoadSpec(
            model=options.folder,
            preset=options.work,
            dtype=options.dtype,
            device_map=options.device,
            max_rows=None if options.work == "speed" and options.device == "cuda" else max(MANY),
        )
        self._engine: Gemma2Engine = shared_engine(spec)
        self._params = SamplingParams(max_new_tokens=options.tokens, temperature=0.0)

    def answer(self, prompts: list[Prompt]) -> tuple[list[float], list[str]]:
        start = time.perf_counter()
        streams = self._engine.submit_each([Request(tuple(ids), self._params) for ids in prompts])
        times: list[list[float]] = [[] for _ in prompts]
        texts = [""] * len(prompts)

        def read(number: int) -> None:
            for chunk in streams[number]:
                times[number].append(time.perf_counter())
                texts[number] += chunk.text

        readers = [threading.Thread(target=read, args=(at,)) for at in range(len(prompts))]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        if len(prompts) == 1:
            return [start, *times[0]], texts
        return [start, max(each[-1] for each in times)], texts


# Parts ---------------------------------------------------------------------------------------


class Prompts:
    """New ones each time, none of which begins like another."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = ids
        self._draw = random.Random(0)

    def __call__(self, count: int, length: int) -> list[Prompt]:
        return [self._draw.choices(self._ids, k=length) for _ in range(count)]


def one(arms: Sequence[Arm], prompts: Prompts, options: argparse.Namespace) -> Result:
    figures: Result = {"lengths": [SHORT, LONG], "tokens": options.tokens}
    figures["rounds"] = options.rounds
    found: dict[str, Result] = {arm.name: {"load_s": round(arm.load_s, 1)} for arm in arms}
    with watching(figures):
        asked = [prompts(1, length) for length in (SHORT, LONG, SHORT, LONG)]

        def warm(arm: Arm) -> None:
            began = time.perf_counter()
            for prompt in asked:
                arm.run(prompt)
            found[arm.name]["first_answers_s"] = round(time.perf_counter() - began, 1)

        say("the first answers")
        list(ThreadPoolExecutor().map(warm, arms))
        for number in range(options.rounds):
            say(f"one: round {number + 1} of {options.rounds}")
            for length in (SHORT, LONG):
                prompt = prompts(1, length)
                for arm in random.Random(number).sample(arms, len(arms)):
                    told = arm.run(prompt)
                    start, first, *rest = told["times"]
                    mine = found[arm.name]
                    mine.setdefault(f"first_s_{length}", []).append(first - start)
                    pace = (options.tokens - 1) / (rest[-1] - first)
                    mine.setdefault(f"decode_{length}", []).append(pace)
                    mine["gb"] = round(told.get("gb", 0.0), 2)
    figures["arms"] = found
    say(json.dumps(figures))
    return figures


def many(arms: Sequence[Arm], prompts: Prompts, options: argparse.Namespace) -> Result:
    figures: Result = {"requests": MANY, "prompt": SHORT, "tokens": options.tokens}
    rates: dict[str, dict[int, list[float]]] = {arm.name: {} for arm in arms}
    with watching(figures):
        for number in range(options.rounds + 1):  # the first warms up
            say(f"many: round {number} of {options.rounds}")
            for count in MANY:
                batch = prompts(count, SHORT)
                for arm in random.Random(number).sample(arms, len(arms)):
                    times = arm.run(batch)["times"]
                    if number:
                        rate = count * options.tokens / (times[-1] - times[0])
                        rates[arm.name].setdefault(count, []).append(rate)
    figures["arms"] = rates
    say(json.dumps(figures))
    return figures


def check(folder: str, prompts: Prompts, options: argparse.Namespace) -> Result:
    """Texts of both in float32."""
    figures: Result = {}
    filled = 4_096 - options.tokens // 2  # the window, half way through the answer
    asked = [prompts(1, length) for length in (16, LONG, filled, SHORT)]
    with watching(figures):
        arms = started(["exact", "speed"], folder, options, "float32")
        texts = [[arm.run(prompt)["texts"][0] for prompt in asked] for arm in arms]
        for arm in arms:
            arm.close()
    figures["answers"] = len(asked)
    figures["same"] = sum(a == b for a, b in zip(*texts, strict=True))
    return figures


def started(
    names: Sequence[str], folder: str, options: argparse.Namespace, dtype: str = "bfloat16"
) -> list[Arm]:
    """All at the same time."""

    def start(name: str) -> Arm:
        own = ["--work", name, "--folder", folder, "--dtype", dtype]
        own += ["--tokens", str(options.tokens), "--device", options.device]
        return Arm(name, [sys.executable, __file__, *own])

    return list(ThreadPoolExecutor().map(start, names))


def measured(options: argparse.Namespace) -> Result:
    parts: Result = {}
    names = ["generate", "static", "exact", "speed", "memory"]
    if options.device == "cuda" and find_spec("bitsandbytes") is None:
        say("bitsandbytes is not installed: preset `memory` is left out")
        names.remove("memory")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer()
        prompts = Prompts(write_weights(Path(folder), options.layers, tokenizer))
        if {"one", "many"} & {*options.parts}:
            arms = started(names, folder, options)
            try:
                if "one" in options.parts:
                    parts["one"] = one(arms, prompts, options)
                if "many" in options.parts:
                    able = [arm for arm in arms if arm.name not in ("static", "speed")]
                    parts["many"] = many(able, prompts, options)
            finally:
                for arm in arms:
                    arm.close()
        if "one" in options.parts:
            (again,) = started(["speed"], folder, options)
            again.close()
            parts["one"]["arms"]["speed"]["load_again_s"] = round(again.load_s, 1)
        if "check" in options.parts:
            parts["check"] = check(folder, prompts, options)
    return parts


def write_weights(folder: Path, layers: int, tokenizer: Any) -> list[int]:
    """The checkpoint into `folder`; the ids that it says, and is asked with."""
    say("making the weights")
    model, ids = random_stack(layers), words(tokenizer)
    say_only(model, ids)
    save(folder, model, tokenizer)
    return ids


# Report --------------------------------------------------------------------------------------

GOALS = (
    ("exact", "decode", SHORT, "generate", 0.95),
    ("speed", "decode", SHORT, "generate", 1.0),
    ("speed", "decode", SHORT, "static", 0.95),
    ("speed", "decode", LONG, "static", 0.95),
)


def verdicts(parts: Result) -> Iterator[list[object]]:
    arms = parts.get("one", {}).get("arms", {})
    for ours, what, length, theirs, least in GOALS:
        if {ours, theirs} <= {*arms}:
            pairs = zip(*(arms[name][f"{what}_{length}"] for name in (ours, theirs)), strict=True)
            ratio = interval([mine / other for mine, other in pairs])
            goal = f"{what} of `{ours}` after {length:,} tokens: at least {least} times {theirs}'s"
            yield [goal, span(ratio, 2), at_least(ratio, least)]
    if "many" in parts:
        rates = parts["many"]["arms"]
        for count in MANY:
            pairs = zip(rates["exact"][count], rates["generate"][count], strict=True)
            ratio = interval([mine / other for mine, other in pairs])
            goal = f"{count} requests: at least 0.9 times one batch of generate"
            yield [goal, span(ratio, 2), at_least(ratio, 0.9)]
    if "check" in parts:
        found = parts["check"]
        same = found["same"] == found["answers"]
        told = f"{found['same']} of {found['answers']}"
        yield ["`speed` says what `exact` says, in float32", told, "pass" if same else "fail"]


def report(document: Result) -> str:
    parts = document["parts"]
    lines = [f"{heading(document)} On {document['card']}. In brackets are 95 % intervals."]
    if "one" in parts:
        found = parts["one"]
        lengths = found["lengths"]
        head = ["one request", *(f"ms to the first token after {n:,}" for n in lengths)]
        head += [f"tokens a second after {n:,}" for n in lengths]
        head += ["GB", "s to load", "again", "s of the first four answers"]
        rows = [
            [name, *(f"{1e3 * median(arm[f'first_s_{n}']):.1f}" for n in lengths),
             *(f"{median(arm[f'decode_{n}']):.0f}" for n in lengths),
             arm["gb"], arm["load_s"], arm.get("load_again_s", ""), arm["first_answers_s"]]
            for name, arm in found["arms"].items()
        ]  # fmt: skip
        lines += [table(head, rows), neighbours(found)]
    if "many" in parts:
        found = parts["many"]
        head = ["tokens a second of requests at once", *map(str, found["requests"])]
        rows = [
            [name, *(f"{median(rates[count]):,.0f}" for count in found["requests"])]
            for name, rates in found["arms"].items()
        ]
        lines += [table(head, rows)]
    return "\n\n".join([*lines, goals(document)])


def plot(parts: Result, path: str) -> None:
    figure, panels = canvas(2)
    arms = parts["one"]["arms"]
    rates = {name: median(arm[f"decode_{SHORT}"]) for name, arm in arms.items()}
    colors = [RIVAL if name in STOCK else OURS for name in rates]
    panels[0].bar_label(panels[0].barh(list(rates), list(rates.values()), color=colors), fmt="%.0f")
    panels[0].invert_yaxis()
    panels[0].set_title("one request, tokens a second")
    for name, found in parts["many"]["arms"].items():
        color = RIVAL if name in STOCK else OURS
        style = "--" if name == "memory" else "-"
        panels[1].plot(MANY, [median(found[n]) for n in MANY], style, color=color, label=name)
    panels[1].set_title("requests at once, tokens a second")
    panels[1].set_xscale("log", base=2)
    panels[1].set_xticks(MANY, [str(count) for count in MANY])
    panels[1].legend()
    write_svg(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default="one,many,check", help="which, between commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=26, help="of Gemma-2-2b's 26")
    parser.add_argument("--tokens", type=int, default=64, help="that each request makes")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to see whether it runs")
    parser.add_argument("--plot", metavar="FILE.svg")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    if options.work:
        work(options)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here: --device cpu shows whether it runs")
    parts = measured(options)
    card = torch.cuda.get_device_name() if options.device == "cuda" else "the CPU"
    document = documented(card=card, parts=parts, verdicts=list(verdicts(parts)))
    if options.plot and {"one", "many"} <= parts.keys():
        plot(parts, options.plot)
    publish(document, report(document))


if __name__ == "__main__":
    main()
