"""What sampling costs: a step of each sampler against a greedy step, ours and transformers' own.

    python benchmarks/sampling.py            # 5 minutes, 3 GB
    python benchmarks/sampling.py --quick    # 1 minute, transformers' steps left out

What:
    step      time from one forward to the next, over that of a greedy step of our engine: for each
              sampler, for one row and for eight, through our engine and through `model.generate`
    choice    CPU microseconds to choose one token from the logits of one row

Why: a sampler looks at 256,000 logits for each token of each row. Beside a model that takes tens of
milliseconds a step, what sorts them is a good part of the time.

How: random weights of Gemma-2-2b's shape with 8 of its 26 layers, bfloat16, as a short run needs,
made as fast as a user gets them, for both sides; a sampler's share of the whole model is a third of
that shown. The last norm has random signs, since
random tied weights would say their last token again with certainty, and is scaled so that about
1,000 tokens hold nine tenths of the probability, more than in most places of a real answer.
    step      The arms take turns within a round, in another order each round, and each is compared
              with our greedy arm of its own round: the median of its steps, prefill left out,
              clocked as the model's forwards begin. As many rounds as `--seconds` allow, two at
              least. Intervals are a 95 % bootstrap of the median ratio.
    choice    One thread, its own CPU time, on logits of the model: the choosing of our engine, and
              transformers' processors with softmax and multinomial, or argmax.

Prints Markdown; progress goes to stderr; the last line is JSON with every figure.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers
from report import (
    Result,
    at_most,
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
)
from stack import as_loaded, random_stack
from texts import load_tokenizer
from transformers import GenerationConfig, LogitsProcessorList

from gemma2_stream import Gemma2Engine, Request, SamplingParams
from gemma2_stream.sampling import Chooser

GOAL = 1.3  # times a greedy step
ROWS = (1, 8)
TOKENS = 5
PROMPT = "The quick brown fox"
OURS, THEIRS = "gemma2_stream", "transformers"

SAMPLERS: dict[str, dict[str, float]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top_k": {"temperature": 0.8, "top_k": 50},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "min_p": {"temperature": 0.8, "min_p": 0.05},
    "top_k, top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "all": {
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
    },
}


def ours(values: dict[str, Any], seed: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=TOKENS, seed=seed, **{"temperature": 0.0, **values})


def theirs(values: dict[str, Any]) -> dict[str, Any]:
    """The same, as `generate` takes it; where it samples without `top_k` it would take 50."""
    return {"do_sample": True, "top_k": 0, **values} if "temperature" in values else values


def uncertain(model: Any) -> None:
    """Give the last norm, which is 1 + weight, random signs and a factor."""
    norm = model.get_decoder().norm.weight
    signs = torch.randint(0, 2, norm.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        norm.copy_(4 * signs - 1)


class Clock:
    """Notes when forwards of a model begin."""

    def __init__(self, model: Any) -> None:
        self._began: list[float] = []
        model.register_forward_pre_hook(lambda *_: self._began.append(time.perf_counter()))

    def steps(self, run: Callable[[], object]) -> list[float]:
        """Seconds of each step of `run`, from a forward to the next, less the prefill's."""
        self._began.clear()
        run()
        return [b - a for a, b in zip(self._began[1:], self._began[2:], strict=False)]


def arms(engine: Gemma2Engine, rows: int) -> dict[str, dict[str, Callable[[], object]]]:
    """By library and sampler, an answer of each of `rows` rows of the same prompt."""
    ids = engine.encode(PROMPT, raw=True)
    batch = torch.tensor([ids] * rows, device=engine.device)
    fixed = {"max_new_tokens": TOKENS, "eos_token_id": None, "pad_token_id": 0}

    def through_ours(values: dict[str, Any]) -> None:
        requests = [Request(tuple(ids), ours(values, row)) for row in range(rows)]
        for _ in engine.submit(requests):
            pass
        engine.join()

    def through_theirs(values: dict[str, Any]) -> None:
        mask = torch.ones_like(batch)
        engine.model.generate(input_ids=batch, attention_mask=mask, **fixed, **theirs(values))

    return {
        library: {name: partial(through, values) for name, values in SAMPLERS.items()}
        for library, through in ((OURS, through_ours), (THEIRS, through_theirs))
    }


def steps(engine: Gemma2Engine, clock: Clock, rows: int, options: argparse.Namespace) -> Result:
    """The ratio of each arm's steps to those of our greedy arm of the same round."""
    found = arms(engine, rows)
    libraries = [OURS] if options.quick else [OURS, THEIRS]
    ratios: dict[str, dict[str, list[float]]] = {
        library: {name: [] for name in SAMPLERS} for library in libraries
    }
    greedy: list[float] = []
    found[OURS]["greedy"]()  # warms up
    limit = options.seconds / len(ROWS)
    began, number = time.perf_counter(), 0
    while number < 2 or (time.perf_counter() - began) * (number + 1) / number < limit:
        order = [(library, name) for library in libraries for name in SAMPLERS]
        random.Random(number).shuffle(order)
        took = {
            (lib, name): statistics.median(clock.steps(found[lib][name])) for lib, name in order
        }
        base = took[OURS, "greedy"]
        greedy.append(base * 1e3)
        for (library, name), seconds in took.items():
            ratios[library][name].append(seconds / base)
        number += 1
        say(f"  {rows} rows, round {number}, {time.perf_counter() - began:.0f} of {limit:.0f} s")
    figures: Result = {"rounds": number, "greedy_ms": rounded(interval(greedy), 1)}
    for library, names in ratios.items():
        figures[library] = {name: rounded(interval(each), 3) for name, each in names.items()}
    return figures


def choices(engine: Gemma2Engine, times: int) -> Result:
    """CPU microseconds of one choice, medians, by library and sampler."""
    ids = torch.tensor([engine.encode(PROMPT, raw=True)], device=engine.device)
    with torch.no_grad():
        logits = engine.model(input_ids=ids, logits_to_keep=1).logits[:, -1].float()

    def own(values: dict[str, Any]) -> Callable[[torch.Tensor], object]:
        chooser = Chooser(Request((0,), ours(values, 0)), None)
        return lambda scores: chooser.choose(ids[0], scores[0])

    def stock(values: dict[str, Any]) -> Callable[[torch.Tensor], object]:
        config = GenerationConfig(**theirs(values), eos_token_id=None, pad_token_id=0)
        processors: LogitsProcessorList = engine.model._get_logits_processor(
            config, input_ids_seq_length=ids.shape[1], device=ids.device
        )

        def choose(scores: torch.Tensor) -> object:
            scores = processors(ids, scores)
            if config.do_sample:
                return torch.multinomial(scores.softmax(-1), 1).item()
            return scores.argmax(-1).item()

        return choose

    def micros(choose: Callable[[torch.Tensor], object]) -> float:
        spent = []
        for _ in range(times):
            scores = logits.clone()
            began = time.thread_time()
            choose(scores)
            spent.append((time.thread_time() - began) * 1e6)
        return round(statistics.median(spent), 1)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: Result = {OURS: {}, THEIRS: {}}
    for name, values in SAMPLERS.items():
        say(f"  choice: {name}")
        found[OURS][name] = micros(own(values))
        found[THEIRS][name] = micros(stock(values))
    torch.set_num_threads(threads)
    return found


# The report ----------------------------------------------------------------------------------


def verdicts(figures: Result) -> Iterator[list[str]]:
    for rows, found in figures["rows"].items():
        for name, ratio in found[OURS].items():
            if name != "greedy":
                goal = f"{name}, {rows} row{'s' * (rows != '1')}: at most {GOAL} times greedy"
                yield [goal, span(ratio, 2), at_most(ratio, GOAL)]


def report(document: Result) -> str:
    figures = document["figures"]
    rows = figures["rows"]
    greedy = "; ".join(
        f"rows: {n}, {span(each['greedy_ms'], 0)} ms, {each['rounds']} rounds"
        for n, each in rows.items()
    )
    columns = [(n, lib) for n, each in rows.items() for lib in (OURS, THEIRS) if lib in each]
    head = ["", *(f"{library}, rows: {n}" for n, library in columns)]
    ratios = [
        [name, *(span(rows[n][library][name], 2) for n, library in columns)] for name in SAMPLERS
    ]
    micros = [
        [name, *(figures["choice_us"][lib][name] for lib in (OURS, THEIRS))] for name in SAMPLERS
    ]
    return "\n\n".join(
        [
            f"{heading(document)} In brackets are 95 % intervals.",
            f"**Time of a step, over our greedy step** ({greedy}), "
            f"{figures['layers']} layers of Gemma-2-2b's shape in bfloat16",
            table(head, ratios),
            neighbours(figures),
            "**CPU µs to choose one token**",
            table(["", OURS, THEIRS], micros),
            goals(document),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="of the 26 that Gemma-2-2b has")
    parser.add_argument("--seconds", type=float, default=280, help="for the steps, about")
    parser.add_argument(
        "--quick", action="store_true", help="60 seconds, transformers' steps left out"
    )
    parser.add_argument("--threads", type=int, help="of torch; by default its own choice")
    options = parser.parse_args()
    if options.quick:
        options.seconds = 60
    transformers.logging.set_verbosity_error()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = random_stack(options.layers, torch.bfloat16)
    uncertain(model)
    model = as_loaded(model)
    figures: Result = {
        "layers": options.layers,
        "torch_threads": torch.get_num_threads(),
        "tokens": TOKENS,
        "rows": {},
    }
    clock = Clock(model)
    with Gemma2Engine(model, load_tokenizer(), name="stack") as engine, watching(figures):
        figures["choice_us"] = choices(engine, 10 if options.quick else 30)
        for rows in ROWS:
            figures["rows"][str(rows)] = steps(engine, clock, rows, options)
    document = documented(figures=figures, verdicts=list(verdicts(figures)))
    publish(document, report(document))


if __name__ == "__main__":
    main()
