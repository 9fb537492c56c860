"""What holding an answer to a schema costs in this package, and which schemas it can hold.

    python benchmarks/structured.py                           # everything; 5 minutes, 1 GB
    python benchmarks/structured.py --suite FOLDER            # with no download
    python benchmarks/structured.py --quick                   # cost and compile, 3 rounds; a minute
    GEMMA2_TOKENIZER=FOLDER python benchmarks/structured.py   # with Gemma 2's real tokenizer

What:
    cost      microseconds a token on top of free decoding, for a row alone and for eight rows that
              share their forwards: JSON of a schema, a forced call, and text that may become a call
    compile   the vocabulary, once an engine; then a grammar for the first and for the second time
    coverage  the JSON Schema Test Suite, draft 2020-12: what is refused by name, what is held, and
              what is accepted without being held (which should be nothing)

Why: the grammar is asked at every token which of 256,000 may come next, so its cost is paid as
often as the model's. grammars.py compares the libraries that could do it.

How:
    cost      The arms take turns within a round, in another order each round, and each is compared
              with the free arm of its own round. All of the engine runs, its thread, its queue and
              `generate` included, on the smallest model that still has a logit for every token: a
              width of 16 under 256,000 output rows. What is measured is a difference, and a larger
              model would only add its own noise to both sides. A free answer of the same number of
              tokens is subtracted, greedy, with the output rows of ids that end a turn zeroed, so
              that it has no end. Answers differ between rounds, as the prompts do. One torch
              thread: more would spin on a busy core. CPU time is the whole process's; intervals are
              a 95 % bootstrap of the median difference.
    coverage  A schema counts as refused when GrammarError is raised for it, an instance as accepted
              when it is admitted in any order of its keys, since the grammar fixes that order.
              Instances that a schema of open objects admits and ours does not are counted apart:
              an object that names its properties has no others here, unless it asks for them.

Prints Markdown; progress goes to stderr; the last line is JSON with every figure.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from report import (
    Result,
    at_most,
    documented,
    goals,
    heading,
    interval,
    neighbours,
    publish,
    say,
    table,
    watching,
)
from schemas import MEASURED, SCHEMAS, fetch_suite, read_suite, spellings
from texts import load_tokenizer
from transformers import Gemma2Config, Gemma2ForCausalLM

from gemma2_stream import Gemma2Engine, GrammarError, Request, SamplingParams
from gemma2_stream.grammar import Grammars
from gemma2_stream.tools import AnswerFormat, Tool

GOAL = 1_000.0  # microseconds a token on top of free decoding
TOKENS = 150
ROWS = (1, 8)

TOOL = Tool("place_order", "Place an order.", SCHEMAS[MEASURED])
FORMATS = {
    "free": AnswerFormat(),
    "JSON of a schema": AnswerFormat(schema=SCHEMAS[MEASURED]),
    "a forced call": AnswerFormat(tools=(TOOL,), required=True, parallel=False),
    "text or calls": AnswerFormat(tools=(TOOL,)),
}


def small_engine() -> Gemma2Engine:
    """One tiny layer of random weights under the whole vocabulary, that never ends a turn."""
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=False,
        eos_token_id=[1, 107],
    )
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(10)
        model.lm_head.weight[[1, 107]] = 0.0
    return Gemma2Engine(model, tokenizer, name="small")


def run(engine: Gemma2Engine, answer: AnswerFormat, prompts: range) -> tuple[float, float, int]:
    """Wall and CPU seconds of one group of answers, and the tokens of all of them."""
    params = SamplingParams(max_new_tokens=TOKENS)
    asked = [engine.encode(f"Order number {number}") for number in prompts]
    requests = [Request(tuple(ids), params, answer.grammar()) for ids in asked]
    engine.join()
    wall, cpu = time.perf_counter(), time.process_time()
    usages = [chunk.usage for chunk in engine.submit(requests) if chunk.usage is not None]
    engine.join()
    took = time.perf_counter() - wall, time.process_time() - cpu
    return *took, sum(usage.completion_tokens for usage in usages)


def cost(options: argparse.Namespace) -> Result:
    figures: Result = {"tokens": TOKENS, "rows": {}}
    with small_engine() as engine, watching(figures):
        figures["vocabulary"] = len(engine.tokenizer)
        for rows in ROWS:
            times: dict[str, list[list[float]]] = {name: [] for name in FORMATS}
            rounds = options.rounds if rows == 1 else max(2, options.rounds // 3)
            for number in range(rounds + 1):  # the first warms up
                say(f"cost: {rows} rows, round {number} of {rounds}")
                order = list(FORMATS)
                random.Random(number).shuffle(order)
                for name in order:
                    wall, cpu, tokens = run(
                        engine, FORMATS[name], range(number * rows, (number + 1) * rows)
                    )
                    if number:
                        times[name].append([wall / tokens * 1e6, cpu / tokens * 1e6])
            figures["rows"][str(rows)] = {
                name: {
                    clock: interval(
                        [
                            mine[i] - free[i]
                            for mine, free in zip(times[name], times["free"], strict=True)
                        ]
                    )
                    for i, clock in enumerate(("wall_us", "cpu_us"))
                }
                for name in FORMATS
                if name != "free"
            }
            free = sorted(each[0] for each in times["free"])
            figures["rows"][str(rows)]["free"] = {"wall_us": round(free[len(free) // 2], 1)}
    return figures


def grammars_of(engine: Gemma2Engine) -> Grammars:
    """A compiler of its own, in which nothing is compiled yet."""
    ends = engine.model.config.eos_token_id
    return Grammars(engine.tokenizer, engine.tokenize, engine.model.config.vocab_size, ends)


def milliseconds(grammars: Grammars, grammar: str) -> float:
    began = time.perf_counter()
    grammars.check(grammar)
    return round((time.perf_counter() - began) * 1e3, 3)


def compilation(options: argparse.Namespace) -> Result:
    figures: Result = {"schemas": {}}
    with small_engine() as engine, watching(figures):
        say("compile: vocabulary and schemas")
        grammars = grammars_of(engine)
        figures["vocabulary_ms"] = milliseconds(grammars, 'start: "a"')
        for name, schema in SCHEMAS.items():
            grammar = AnswerFormat(schema=schema).grammar() or ""
            both = [milliseconds(grammars, grammar) for _ in range(2)]
            figures["schemas"][name] = dict(zip(("first_ms", "again_ms"), both, strict=True))
    return figures


def admitted(grammars: Grammars, grammar: str, ids: list[int]) -> bool:
    constraint = grammars.constraint(grammar, len(ids) + 1)
    matcher = constraint._matcher
    return matcher.validate_tokens(ids) == len(ids) and bool(
        matcher.consume_tokens(ids) and matcher.is_accepting() and not matcher.is_error()
    )


def judge(engine: Gemma2Engine, grammars: Grammars, group: Result, tally: Counter[str]) -> str:
    """Count one schema of the suite and its instances; what it was refused for, if it was."""
    schema = group["schema"]
    tally["schemas"] += 1
    try:
        if not isinstance(schema, dict):
            raise GrammarError("a schema that is true or false")
        grammar = AnswerFormat(schema=schema).grammar() or ""
        grammars.constraint(grammar, 1)
    except GrammarError as error:
        tally["refused"] += 1
        return str(error)
    for test in group["tests"]:
        ways = spellings(test["data"], (", ", ": "))
        texts = [way.decode("utf-8", "surrogatepass") for way in ways]
        kind = "valid" if test["valid"] else "invalid"
        tally[kind] += 1
        try:
            found = any(admitted(grammars, grammar, engine.tokenize(text)) for text in texts)
        except ValueError:  # a lone surrogate, which no text of ours can hold
            found = False
        tally[f"{kind} accepted"] += found
    return ""


def coverage(options: argparse.Namespace) -> Result:
    figures: Result = {"parts": {}}
    with small_engine() as engine, watching(figures), tempfile.TemporaryDirectory() as name:
        suite = read_suite(Path(options.suite) if options.suite else fetch_suite(Path(name)))
        grammars = grammars_of(engine)
        for part, files in suite.items():
            say(f"coverage: {part}")
            total: Counter[str] = Counter()
            unheld: dict[str, int] = {}
            for keyword, groups in files.items():
                tally: Counter[str] = Counter()
                for group in groups:
                    judge(engine, grammars, group, tally)
                total += tally
                if tally["invalid accepted"]:
                    unheld[keyword] = tally["invalid accepted"]
            figures["parts"][part] = {**total, "accepted without being held": unheld}
    return figures


# The report ----------------------------------------------------------------------------------


def verdicts(parts: Result) -> Iterator[list[str]]:
    for rows, arms in parts.get("cost", {}).get("rows", {}).items():
        for name, arm in arms.items():
            if name == "free":
                continue
            low, middle, high = arm["wall_us"]
            goal = f"{name}, {rows} row{'s' * (rows != '1')}: at most {GOAL:,.0f} µs a token on top"
            span = f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"
            yield [goal, span, at_most(arm["wall_us"], GOAL)]


def cost_rows(figures: Result) -> Iterator[list[object]]:
    for rows, arms in figures["rows"].items():
        for name, arm in arms.items():
            if name != "free":
                spans = [f"{m:,.0f} ({a:,.0f} to {b:,.0f})" for a, m, b in arm.values()]
                yield [f"{name}, rows: {rows}", *spans]


def report(document: Result) -> str:
    parts = document["parts"]
    lines = [f"{heading(document)} In brackets are 95 % intervals."]
    if "cost" in parts:
        head = ["µs a token on top of free decoding", "wall", "CPU"]
        lines += [
            f"**Cost with a vocabulary of {parts['cost']['vocabulary']:,} tokens**",
            table(head, cost_rows(parts["cost"])),
            neighbours(parts["cost"]),
        ]
    if "compile" in parts:
        found = parts["compile"]
        rows = [[name, *times.values()] for name, times in found["schemas"].items()]
        lines += [
            f"**Compilation.** The vocabulary, once an engine: {found['vocabulary_ms']:,.0f} ms.",
            table(["ms", "first", "again"], rows),
        ]
    if "coverage" in parts:
        counts = ("schemas", "refused", "valid", "valid accepted", "invalid", "invalid accepted")
        found = parts["coverage"]["parts"]
        rows = [[count, *(part.get(count, 0) for part in found.values())] for count in counts]
        lines += ["**JSON Schema Test Suite, draft 2020-12**", table(["", *found], rows)]
    return "\n\n".join([*lines, goals(document)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default="cost,compile,coverage", help="which, between commas")
    parser.add_argument(
        "--suite", metavar="FOLDER", help="of the JSON Schema Test Suite; else pip fetches it"
    )
    parser.add_argument(
        "--rounds", type=int, default=40, help="of the cost with one row; a third of it with eight"
    )
    parser.add_argument(
        "--quick", action="store_true", help="--parts cost,compile --rounds 3: wide intervals"
    )
    options = parser.parse_args()
    if options.quick:
        options.parts, options.rounds = "cost,compile", 3
    torch.set_num_threads(1)  # more would spin on a busy core; what is measured is one row's work
    run_part = {"cost": cost, "compile": compilation, "coverage": coverage}
    parts = {name: run_part[name](options) for name in options.parts.split(",")}
    document = documented(parts=parts, verdicts=list(verdicts(parts)))
    publish(document, report(document))


if __name__ == "__main__":
    main()
