"""Tokens a second with many requests at once: ours, stock `generate`, HuggingFacePipeline, vLLM.

    python benchmarks/throughput.py                                      # 8 minutes, 6 GB
    python benchmarks/throughput.py --vllm-python .venv-vllm/bin/python  # 12 minutes, 12 GB
    python benchmarks/throughput.py --plot throughput.svg
    python benchmarks/throughput.py --quick                              # 2 layers; 1 minute

What: on a random stack of Gemma-2-2b's shape (stack.py; 8 layers, bfloat16), prompts of 128 tokens,
48 new tokens each, greedy, prefill included, for 1 to 64 requests that are there at once:
    ours                   `engine.submit_each`, a thread for each stream
    generate, in turn      stock `model.generate`, one request after the other
    generate, one batch    stock `model.generate`, all rows in one padded batch
    HuggingFacePipeline    of langchain-huggingface: `invoke` one by one, and `batch`
    vLLM                   its CPU build, in an environment of its own, on the same saved weights
and requests that arrive while others are answered, counted in forwards.

Why: a server has as many users at once as it can serve, and they come when they like. What one
pays for many is the sum of tokens a second; what each of them feels is the first token and the
pace, so they stand beside it.

How: Each run has the process to itself: an engine of ours is made for it and closed after it, and
what torch does for the others happens in a thread that ends (`aside`). The arms take turns within a
round, in another order each round, and ratios are between arms of the same round. The first round
has every number of requests; the others only the goals', until `--minutes` would be exceeded. Every
arm of a round gets the same token ids; no ids are ever used again, so that nobody's prefix cache
has the answer. Engines are as their users have them, but for the number of rows, which is the
largest that is asked for. Every arm is warmed up, and must make exactly as many tokens as it is
asked for: the rows of other ids than words are zero in the table, so no turn ends. Seconds run from
handing in to the last token at the caller; the first token is the mean over requests of the first's
arrival, where the caller gets one before the end.
    in turn    One request is timed beside each of the goals' numbers: the next would take as long,
               so tokens a second are those of one.
    vLLM       Its own `LLMEngine.step` in one process without another thread (vllm_worker.py),
               eager, with its prefix cache. `ignore_eos` and `min_tokens` are set.
    HF         `batch_size` is set to the number of requests, else `batch` is one by one too.
               Beside the first of the goals' numbers, and in the first round only.
    arrivals   Eight requests of 128 new tokens; each is submitted when the model is about to run
               forward number 0, 8, 16 and so on. Forwards are counted by a hook on the decoder,
               which waits until the newcomer is in the queue. Counts do not depend on the layers,
               so one is enough. In turn is eight times the forwards of one stock `generate`.

`make vllm` makes vLLM's environment, .venv-vllm (3.4 GB).

Prints Markdown; progress goes to stderr; the last line is JSON with every figure.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
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
    at_least,
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
from stack import aside, engine_of, save, speaking_stack, words
from texts import load_tokenizer
from transformers import StoppingCriteriaList, pipeline

from gemma2_stream import Gemma2Engine, Request, SamplingParams

Prompts = list[list[int]]

PROMPT, TOKENS = 128, 48
NUMBERS = (1, 2, 4, 8, 16, 32, 64)
GOALS = {8: 5.0, 32: 8.0}  # requests: times the tokens a second of stock `generate` in turn
VLLM_GOAL = 1.0  # times vLLM's tokens a second, at the same numbers
ARRIVALS, APART, ANSWER = 8, 8, 128  # requests, forwards between them, new tokens of each
FORWARDS_GOAL = 0.35  # of the forwards of serving them in turn

IN_TURN, BATCH = "generate, in turn", "generate, one batch"
HF = HF_ONE, HF_BATCH = "HuggingFacePipeline, one by one", "HuggingFacePipeline, batch"
ONE = (IN_TURN, HF_ONE)  # a request is timed, and stands for any number of them


def prompts(vocabulary: Sequence[int], seed: object, rows: int) -> Prompts:
    """`rows` prompts of PROMPT ids: a BOS and random words."""
    draw = random.Random(str(seed))
    return [[2, *draw.choices(vocabulary, k=PROMPT - 1)] for _ in range(rows)]


# The arms: each takes prompts and a number of tokens, and gives the seconds at which every request
# had its first token and its last at the caller ----------------------------------------------

Times = dict[str, list[float]]
Arm = Callable[[Prompts, int], Times]


def ours(make: Callable[[], Gemma2Engine]) -> Arm:
    def read(stream: Any, began: float, tokens: int) -> tuple[float, float]:
        first = made = 0
        for chunk in stream:
            first = first or time.perf_counter() - began
            made = chunk.usage.completion_tokens if chunk.usage else made
        complete(made, tokens)
        return first, time.perf_counter() - began

    def run(given: Prompts, tokens: int) -> Times:
        params = SamplingParams(max_new_tokens=tokens)
        with make() as engine, ThreadPoolExecutor(len(given)) as pool:
            began = time.perf_counter()
            streams = engine.submit_each([Request(tuple(ids), params) for ids in given])
            both = list(pool.map(lambda stream: read(stream, began, tokens), streams))
            engine.join()
        return {"first": [first for first, _ in both], "last": [last for _, last in both]}

    return run


def complete(made: int, tokens: int) -> None:
    if made != tokens:
        raise RuntimeError(f"{made} tokens were made instead of {tokens}")


def stock(model: Any) -> Arm:
    """One batch, with the moment of its first token from a criterion, as a streamer would."""

    def run(given: Prompts, tokens: int) -> Times:
        ids = torch.tensor(given)  # all of one length: nothing to pad
        steps: list[float] = []

        def watch(*_: object, **__: object) -> torch.Tensor:
            steps.append(time.perf_counter() - began)
            return torch.zeros(len(given), dtype=torch.bool)

        began = time.perf_counter()
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        last = time.perf_counter() - began
        complete(out.shape[1] - ids.shape[1], tokens)
        return {"first": steps[:1] * len(given), "last": [last] * len(given)}

    return run


def rival(model: Any, tokenizer: Any, batched: bool) -> Arm:
    """HuggingFacePipeline takes text and gives it whole: no first token before the last."""
    made = pipeline("text-generation", model=model, tokenizer=tokenizer)

    def run(given: Prompts, tokens: int) -> Times:
        texts = [tokenizer.decode(ids[1:]) for ids in given]
        if tokenizer(texts)["input_ids"] != given:
            raise RuntimeError("the pipeline would not send the ids that the others send")
        made._batch_size = len(given) if batched else 1
        llm = HuggingFacePipeline(pipeline=made, batch_size=len(given) if batched else 1)
        options = {"max_new_tokens": tokens, "do_sample": False, "return_full_text": False}
        began = time.perf_counter()
        if batched:
            answers = llm.batch(texts, pipeline_kwargs=options)
        else:
            answers = [llm.invoke(text, pipeline_kwargs=options) for text in texts]
        seconds = time.perf_counter() - began
        for answer in answers:
            complete(len(tokenizer(answer, add_special_tokens=False)["input_ids"]), tokens)
        return {"first": [], "last": [seconds] * len(given)}

    return run


class Vllm:
    """vLLM in a process of its own (vllm_worker.py), asked by lines of JSON."""

    def __init__(self, python: str, folder: str, rows: int) -> None:
        worker = str(Path(__file__).with_name("vllm_worker.py"))
        self._process = subprocess.Popen(
            [python, worker, folder, str(rows)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._said: list[str] = []  # what it logs, to tell why it failed
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.version: str = self._answer()["version"]

    def _listen(self) -> None:
        for line in self._process.stderr or ():
            self._said = [*self._said[-19:], line]

    def _answer(self) -> Result:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            self._listener.join()
            raise RuntimeError(f"vLLM ended with {self._process.wait()}:\n{''.join(self._said)}")
        answer: Result = json.loads(line)
        return answer

    def __call__(self, given: Prompts, tokens: int) -> Times:
        if self._process.stdin is None:
            raise RuntimeError("no pipe")
        print(
            json.dumps({"prompts": given, "tokens": tokens}), file=self._process.stdin, flush=True
        )
        answer = self._answer()
        for ids in answer.pop("ids"):
            complete(len(ids), tokens)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def vllm(options: argparse.Namespace, model: Any, tokenizer: Any, stack: ExitStack) -> Vllm | None:
    """vLLM on `model`, saved for it; None, having said why, where it can't be had."""
    if options.vllm_python is None:
        say("no vLLM: --vllm-python names no environment that has it")
        return None
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    say("vLLM: saving the weights and starting, a minute or two")
    save(folder, model, tokenizer)
    try:
        made = Vllm(options.vllm_python, folder, max(options.numbers))
    except (OSError, RuntimeError) as error:
        say(f"no vLLM: {error}")
        return None
    stack.callback(made.close)
    return made


# Rounds --------------------------------------------------------------------------------------


def arms_of(
    model: Any, tokenizer: Any, make: Callable[[], Gemma2Engine], other: Vllm | None
) -> dict[str, Arm]:
    alone = {"ours": ours(make)} | ({"vLLM": other} if other else {})
    return alone | {
        IN_TURN: stock(model),
        BATCH: stock(model),
        HF_ONE: rival(model, tokenizer, batched=False),
        HF_BATCH: rival(model, tokenizer, batched=True),
    }


def plan(arms: dict[str, Arm], numbers: Sequence[int], first: bool) -> Iterator[tuple[int, str]]:
    """The numbers of requests of a round, and the arms that get them."""
    goals = [rows for rows in numbers if rows in GOALS]
    for rows in numbers if first else goals:
        for name in arms:
            beside = rows in goals and (name == IN_TURN or first)
            if name in ("ours", "vLLM") or (beside and (rows == goals[0] or name not in HF)):
                yield rows, name


def rounds(options: argparse.Namespace, arms: dict[str, Arm], vocabulary: list[int]) -> Result:
    """For each arm and number of requests, what each round measured."""
    found: dict[str, dict[int, list[Times]]] = {name: {} for name in arms}
    for name, arm in arms.items():
        say(f"warming up: {name}")
        aside(partial(arm, prompts(vocabulary, f"warm {name}", 2), 2))
    began, again = time.perf_counter(), set(plan(arms, options.numbers, first=False))
    for number in range(options.rounds):
        took = 0.0  # by what a further round would do
        work = list(plan(arms, options.numbers, first=number == 0))
        # By number of requests, so that what is compared is close together.
        work.sort(key=lambda one: (one[0], random.Random(f"{number} {one}").random()))
        for rows, name in work:
            start = time.perf_counter()
            given = prompts(vocabulary, f"{number} {rows}", 1 if name in ONE else rows)
            times = aside(partial(arms[name], given, options.tokens))
            found[name].setdefault(rows, []).append(times)
            took += (time.perf_counter() - start) * ((rows, name) in again)
            rate = rate_of(times, options.tokens)
            load = psutil.getloadavg()[0]
            say(f"round {number + 1}, {rows}: {name}: {rate:.1f} tokens/s, load {load:.1f}")
        if time.perf_counter() - began + took > options.minutes * 60:
            say(f"another round would exceed {options.minutes:g} minutes: left out")
            break
    return {
        name: {rows: digest(runs, options.tokens) for rows, runs in by.items()}
        for name, by in found.items()
    }


def rate_of(times: Times, tokens: int) -> float:
    return len(times["last"]) * tokens / max(times["last"])


def digest(runs: list[Times], tokens: int) -> Result:
    """Of each round the tokens a second; of all, medians of first token and pace."""
    figures: Result = {"tokens_per_s": rounded([rate_of(times, tokens) for times in runs], 2)}
    if all(times["first"] for times in runs):
        firsts = [statistics.mean(times["first"]) for times in runs]
        lasts = [statistics.mean(times["last"]) for times in runs]
        paces = [(last - first) / (tokens - 1) for first, last in zip(firsts, lasts, strict=True)]
        figures["first_s"] = round(statistics.median(firsts), 3)
        figures["token_ms"] = round(statistics.median(paces) * 1e3, 1)
    return figures


# Arrivals ------------------------------------------------------------------------------------


@contextmanager
def counted(model: Any, before: Callable[[int], None] = lambda number: None) -> Iterator[list[int]]:
    """Count the forwards of `model` in the list's one element; `before` gets each one's number."""
    count = [0]

    def hook(*_: object) -> None:
        before(count[0])
        count[0] += 1

    # The decoder: a prefill in chunks has no use for the logits of all but the last.
    handle = model.get_decoder().register_forward_pre_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


def arrivals(tokenizer: Any, vocabulary: list[int]) -> Result:
    """Forwards to answer requests that come while others are answered, and to first tokens."""
    say("arrivals: counting forwards")
    model = speaking_stack(1, vocabulary)
    params = SamplingParams(max_new_tokens=ANSWER)
    given = prompts(vocabulary, "arrivals", ARRIVALS)
    due = [threading.Event() for _ in given]
    there = [threading.Event() for _ in given]

    def before(number: int) -> None:
        index, rest = divmod(number, APART)
        if rest == 0 and index < ARRIVALS:
            due[index].set()
            there[index].wait(60)

    def arrive(index: int) -> int:
        """Forwards between the arrival of a request and its first token."""
        if index and not due[index].wait(300):
            raise RuntimeError(f"forward number {index * APART} never came")
        came = count[0]
        stream = engine.submit([Request(tuple(given[index]), params)])
        there[index].set()
        next(stream)
        steps = count[0] - came
        for chunk in stream:
            if chunk.usage:
                complete(chunk.usage.completion_tokens, ANSWER)
        return steps

    figures: Result = {"requests": ARRIVALS, "apart": APART, "tokens": ANSWER}
    with watching(figures):
        with counted(model) as count:
            stock(model)(given[:1], ANSWER)
        figures["in_turn"] = count[0] * ARRIVALS
        with (
            engine_of(model, tokenizer) as engine,
            counted(engine.model, before) as count,
            ThreadPoolExecutor(ARRIVALS) as pool,
        ):
            figures["first_token_steps"] = list(pool.map(arrive, range(ARRIVALS)))
            engine.join()
        figures["forwards"] = count[0]
    figures["of_in_turn"] = round(figures["forwards"] / figures["in_turn"], 3)
    return figures


# The report ----------------------------------------------------------------------------------


def ratio(arms: Result, rows: int, other: str) -> list[float] | None:
    """Ours over `other` in tokens a second, paired by round: an interval."""
    mine = arms["ours"].get(rows)
    theirs = arms.get(other, {}).get(rows)
    if not mine or not theirs:
        return None
    pairs = zip(mine["tokens_per_s"], theirs["tokens_per_s"], strict=False)
    return rounded(interval([m / t for m, t in pairs]), 2)


def verdicts(document: Result) -> Iterator[list[str]]:
    arms, came = document["arms"], document["arrivals"]
    for rows, times in GOALS.items():
        for other, goal in (("vLLM", VLLM_GOAL), (IN_TURN, times)):
            found = ratio(arms, rows, other)
            words_of = f"{rows} requests: at least {goal:g} times the tokens/s of {other}"
            if found:
                yield [words_of, span(found, 2), at_least(found, goal)]
            else:
                yield [words_of, "", "not measured"]
    share = came["of_in_turn"]
    goal = f"{ARRIVALS} arrivals: at most {FORWARDS_GOAL} of the forwards in turn"
    yield [goal, f"{share}", "pass" if share <= FORWARDS_GOAL else "fail"]


def rate_table(document: Result) -> str:
    arms = document["arms"]
    head = ["tokens/s in all, requests:", *map(str, document["numbers"])]
    rows = []
    for name, by in arms.items():
        cells = [by.get(n, {}).get("tokens_per_s") for n in document["numbers"]]
        rows.append([name, *(f"{statistics.median(c):.1f}" if c else "" for c in cells)])
    return table(head, rows)


def latency_table(document: Result) -> str:
    head = ["first token s; then ms a token, requests:", *map(str, document["numbers"])]
    rows = []
    for name, by in document["arms"].items():
        cells = [by.get(n, {}) for n in document["numbers"]]
        texts = [
            f"{c['first_s']:.2f}; {c['token_ms']:.0f}" if "first_s" in c else "" for c in cells
        ]
        if any(texts):
            rows.append([name, *texts])
    return table(head, rows)


def report(document: Result) -> str:
    came = document["arrivals"]
    steps = ", ".join(map(str, came["first_token_steps"]))
    return "\n\n".join(
        [
            f"{heading(document)} In brackets are 95 % intervals.",
            *(
                [f"**Quick form**: {document['layers']} layers; the goals are for 8."]
                * document["quick"]
            ),
            f"**Requests that are there at once**: {document['parameters'] / 1e6:,.0f} M "
            f"parameters, bfloat16, {document['torch_threads']} torch threads; prompts of {PROMPT} "
            f"tokens, {document['tokens']} new tokens each, greedy, prefill included; medians.",
            rate_table(document),
            f"`{IN_TURN}` and `{HF_ONE}` are one request measured. Below: the mean first token, "
            "and the pace after it.",
            latency_table(document),
            neighbours(document),
            f"**Requests that arrive {APART} forwards apart**: {ARRIVALS} of {ANSWER} new tokens "
            f"took {came['forwards']} forwards, and {came['in_turn']} in turn. Forwards from "
            f"arrival to the first token: {steps}.",
            goals(document),
        ]
    )


def plot(document: Result, path: str) -> None:
    figure, (rates, firsts) = canvas(2)
    styles = {
        "ours": (OURS, "o-"),
        "vLLM": (RIVAL, "s-"),
        BATCH: (INK, "^--"),
        IN_TURN: (INK, ":"),
        HF_ONE: (RIVAL, ":"),
        HF_BATCH: (RIVAL, "^--"),
    }
    numbers = document["numbers"]
    for name, by in document["arms"].items():
        color, style = styles[name]
        if not by:
            continue
        one = [rate for figures in by.values() for rate in figures["tokens_per_s"]]
        places = numbers if name in ONE else list(by)
        medians = [statistics.median(one if name in ONE else by[n]["tokens_per_s"]) for n in places]
        rates.loglog(places, medians, style, color=color, label=name)
        if name in ("ours", "vLLM"):
            firsts.loglog(
                places, [by[n]["first_s"] for n in places], style, color=color, label=name
            )
    rates.set_title("tokens a second in all")
    firsts.set_title("seconds to the first token, mean")
    for axes in (rates, firsts):
        axes.set_xticks(numbers, [str(n) for n in numbers])
        low, high = axes.get_ylim()
        scale = [m * 10**power for power in range(-2, 4) for m in (1, 2, 5)]
        marks = [mark for mark in scale if low <= mark <= high]
        axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
        axes.minorticks_off()
        axes.set_xlabel("requests at once")
    figure.legend(*rates.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    write_svg(figure, path)


def measure(options: argparse.Namespace) -> Result:
    tokenizer = load_tokenizer()
    vocabulary = words(tokenizer)
    figures: Result = {"arrivals": aside(partial(arrivals, tokenizer, vocabulary))}
    say(f"making {options.layers} layers")
    model = speaking_stack(options.layers, vocabulary)
    figures["parameters"] = sum(weight.numel() for weight in model.parameters())
    with watching(figures), ExitStack() as stack:
        other = vllm(options, model, tokenizer, stack)
        make = partial(engine_of, model, tokenizer, max_rows=max(options.numbers))
        arms = arms_of(model, tokenizer, make, other)
        figures["arms"] = rounds(options, arms, vocabulary)
        figures["vllm"] = other.version if other else None
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="of 26")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="new ones of each request")
    parser.add_argument("--requests", default=",".join(map(str, NUMBERS)), help="between commas")
    parser.add_argument("--rounds", type=int, default=3, help="the later ones for the goals only")
    parser.add_argument(
        "--minutes", type=float, default=10, help="begin no round that exceeds them"
    )
    parser.add_argument("--vllm-python", metavar="FILE", help="the Python of vLLM's environment")
    parser.add_argument("--plot", metavar="FILE.svg")
    parser.add_argument(
        "--quick", action="store_true", help="--layers 2 --tokens 24 --requests 1,8 --rounds 1"
    )
    options = parser.parse_args()
    if options.quick:
        options.layers, options.tokens, options.requests, options.rounds = 2, 24, "1,8", 1
    options.numbers = [int(number) for number in options.requests.split(",")]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    document = documented(
        quick=options.quick,
        layers=options.layers,
        tokens=options.tokens,
        numbers=options.numbers,
        torch_threads=torch.get_num_threads(),
        **measure(options),
    )
    document["versions"] |= {"vLLM": document["vllm"]} if document["vllm"] else {}
    document["verdicts"] = list(verdicts(document))
    if options.plot:
        plot(document, options.plot)
    publish(document, report(document))


if __name__ == "__main__":
    main()
