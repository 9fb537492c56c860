"""What a token costs far into a context, against what it costs near its beginning.

    python benchmarks/context.py            # a minute, 6 GB
    python benchmarks/context.py --quick    # two of Gemma-2-2b's layers; seconds

What: seconds of one decoding step after 100, 1,000 and 4,000 tokens, as this package runs a
checkpoint (grouped attention, a cache with room to grow) and as transformers does (eager attention,
`DynamicCache`); and for each how many times the last is the first.

Why: a step reads all keys and values once. Copying them on the way, for every head that shares them
and for every token that is appended, costs more than the reading.

How: forwards of the model itself, since that is all that differs; the caches are filled with random
states and cropped after each step. All six take turns within a round, in another order each round;
a ratio is of one round, and the interval is a 95 % bootstrap of their median.

Prints Markdown; progress goes to stderr; the last line is JSON with every figure.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

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
    span,
    table,
    watching,
)
from stack import as_loaded, random_stack
from transformers import DynamicCache

from gemma2_stream.kv import CACHE_NAME, KVCache

CONTEXTS = (100, 1_000, 4_000)
GOAL = 1.3  # times, of the step at the first


def filled(cache: DynamicCache, layers: int, tokens: int) -> DynamicCache:
    """`tokens` random states in each of `layers`, of Gemma-2-2b's shape."""
    for layer in range(layers):
        keys, values = (torch.randn(1, 4, tokens, 256, dtype=torch.bfloat16) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


def step(model: Any, cache: DynamicCache) -> float:
    """Seconds to feed one token."""
    began = time.perf_counter()
    with torch.no_grad():
        model(input_ids=torch.tensor([[1000]]), use_cache=True, **{CACHE_NAME: cache})
    took = time.perf_counter() - began
    cache.crop(-1)
    return took


def measure(options: argparse.Namespace) -> Result:
    say(f"making {options.layers} layers")
    stock = random_stack(options.layers)
    ours = as_loaded(stock)
    makers = {"ours": (ours, KVCache), "transformers": (stock, DynamicCache)}
    runs = {
        (name, tokens): (model, filled(make(), options.layers, tokens))
        for name, (model, make) in makers.items()
        for tokens in CONTEXTS
    }
    times: dict[tuple[str, int], list[float]] = {run: [] for run in runs}
    figures: Result = {"layers": options.layers, "torch_threads": torch.get_num_threads()}
    with watching(figures):
        for number in range(options.rounds + 1):  # the first warms up
            say(f"round {number} of {options.rounds}")
            order = list(runs)
            random.Random(number).shuffle(order)
            for run in order:
                took = step(*runs[run])
                if number:
                    times[run].append(took)
    for name in makers:
        steps = {tokens: times[name, tokens] for tokens in CONTEXTS}
        ratios = [b / a for a, b in zip(steps[CONTEXTS[0]], steps[CONTEXTS[-1]], strict=True)]
        figures[name] = {
            "ms": {tokens: round(median(taken) * 1e3, 1) for tokens, taken in steps.items()},
            "ratio": interval(ratios),
        }
    return figures


def verdicts(figures: Result) -> Iterator[list[str]]:
    ratio = figures["ours"]["ratio"]
    goal = f"a step after {CONTEXTS[-1]:,} tokens: at most {GOAL} times that after {CONTEXTS[0]}"
    yield [goal, span(ratio, 2), at_most(ratio, GOAL)]


def report(document: Result) -> str:
    figures = document["figures"]
    rows = []
    for name in ("ours", "transformers"):
        rows.append([name, *figures[name]["ms"].values(), span(figures[name]["ratio"], 2)])
    head = ["ms a step after tokens", *[f"{n:,}" for n in CONTEXTS], "last over first"]
    return "\n\n".join(
        [
            f"{heading(document)} In brackets are 95 % intervals.",
            f"**One step, {figures['layers']} layers, bfloat16, "
            f"{figures['torch_threads']} threads**",
            table(head, rows),
            neighbours(figures),
            goals(document),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="of 26")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="--layers 2 --rounds 8")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.rounds = 2, 8
    figures = measure(options)
    document = documented(figures=figures, verdicts=list(verdicts(figures)))
    publish(document, report(document))


if __name__ == "__main__":
    main()
