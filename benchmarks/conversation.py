"""What a long conversation waits for: the first token with and without the prefix cache.

    python benchmarks/conversation.py                           # everything; 6 minutes, 5 GB
    python benchmarks/conversation.py --plot conversation.svg
    python benchmarks/conversation.py --quick                   # 2 layers, few rounds; a minute
    GEMMA2_TOKENIZER=FOLDER python benchmarks/conversation.py   # with Gemma 2's real tokenizer

What: on a random stack of Gemma-2-2b's shape (stack.py; 8 layers, bfloat16)
    second turn  seconds to the first token of turn 2, after 1,500 tokens of history
    no match     a prompt that nothing in the cache begins like: first token, and a short answer
    shared       a system prompt of 1,000 tokens and eight conversations: tokens that went through
                 the model, when they come one after the other, and when all are there at once
    ten turns    seconds to the first token of each turn, as the history grows

Why: without the cache every turn computes the whole history again, so a chat gets slower with
every answer. And a cache that nobody hits must not cost those who have nothing to gain.

How: Engines on the same weights, one with the prefix cache as it is by default, and others with
`prefix_cache_bytes=0`, each made for what it is asked and closed: a user has one engine, and OpenMP
threads of two hinder each other. They take turns, in random order, and ratios are between the two
on the same prompt, one after the other. Intervals are a 95 % bootstrap of the median ratio.
    history      What the user says is random words; what the model says is its own greedy answer,
                 read as text and encoded again, as any caller's history is. The model can only say
                 words (`say_only`), which text keeps, as it keeps what a trained model says. Only
                 the engine with the cache takes the earlier turns; the other needs none of them.
    no match     The cache holds the conversations before it, and stores what it sees. The prompts
                 are words alone: a turn begins with the template, four tokens to be found. One
                 engine, which has its cache or one of 0 bytes: with, without, without, with, or
                 the other way round, and a ratio is that of the two sums, so that what drifts does
                 so for both.
    shared       Counted twice: `cached_tokens` of the usage, and all ids in forwards.
                 Answers have one token, so that all of it is prefill.

Prints Markdown; progress goes to stderr; the last line is JSON with every figure.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from report import (
    INK,
    OURS,
    RIVAL,
    Result,
    at_least,
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
from stack import engine_of, speaking_stack, words
from texts import load_tokenizer

from gemma2_stream import Gemma2Engine, Request, SamplingParams
from gemma2_stream.prefixes import PrefixCache

SOONER_GOAL = 20.0  # times sooner, with 1,500 tokens of history
NO_SLOWER_GOAL = 1.02  # of the time without a cache, when nothing matches
HISTORY, ANSWER, QUESTION = 1_500, 40, 20  # tokens in all, of the answer in it, and asked then
FRESH, FRESH_ANSWER = 100, 4  # tokens of a prompt that nothing begins like, and of its answer
SYSTEM, CONVERSATIONS = 1_000, 8
TURN, TURN_ANSWER = 100, 24  # tokens said by each side in the ten turns

WITH, WITHOUT = "with the cache", "without"


@dataclass(frozen=True)
class Bench:
    """What every part needs: an engine, how one without a cache is made, and words to say."""

    engine: Gemma2Engine
    bare: Callable[[], Gemma2Engine]
    vocabulary: list[int]
    draw: random.Random

    def words(self, count: int) -> str:
        ids = self.draw.choices(self.vocabulary, k=count)
        return str(self.engine.tokenizer.decode(ids))

    def encode(self, text: str) -> list[int]:
        return self.engine.encode(text, raw=True)

    def both(self, text: str, tokens: int = 1) -> dict[str, Result]:
        """What `ask` finds with the cache, and without it for one token by an engine of its own;
        in random order.
        """
        ids, order = self.encode(text), [WITH, WITHOUT]
        self.draw.shuffle(order)
        found = {}
        for name in order:
            if name == WITH:
                found[name] = ask(self.engine, ids, tokens)
            else:
                with self.bare() as bare:
                    found[name] = ask(bare, ids, 1)
        return found


def ask(engine: Gemma2Engine, ids: Sequence[int], tokens: int) -> Result:
    """Seconds to the first token and to the last, the text, and what the cache spared."""
    request = Request(tuple(ids), SamplingParams(max_new_tokens=tokens))
    first, text, usage = 0.0, "", None
    began = time.perf_counter()
    for chunk in engine.submit([request]):
        first = first or time.perf_counter() - began
        text, usage = text + chunk.text, chunk.usage or usage
    last = time.perf_counter() - began
    engine.join()  # what is stored after the last token is not the next one's time
    if usage is None:
        raise RuntimeError("an answer without a usage")
    return {"first": first, "last": last, "text": text, "cached": usage.cached_tokens}


def said(text: str) -> str:
    """The user's turn, and the beginning of the model's."""
    return f"<start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n"


def ratios(pairs: Sequence[dict[str, Result]], what: str, over: str, under: str) -> list[float]:
    return rounded(interval([pair[over][what] / pair[under][what] for pair in pairs]), 3)


def medians(pairs: Sequence[dict[str, Result]], what: str) -> dict[str, float]:
    return {
        name: round(statistics.median(pair[name][what] for pair in pairs), 3) for name in pairs[0]
    }


def second_turn(bench: Bench, options: argparse.Namespace) -> Result:
    pairs, lengths = [], []
    for number in range(options.rounds):
        load = psutil.getloadavg()[0]
        say(f"second turn: round {number + 1} of {options.rounds}, load {load:.1f}")
        first = said(bench.words(HISTORY - ANSWER - 11))  # 11 is the template around it
        answer = ask(bench.engine, bench.encode(first), ANSWER)
        history = f"{first}{answer['text']}<end_of_turn>\n"
        lengths.append(len(bench.encode(history)))
        pairs.append(bench.both(history + said(bench.words(QUESTION))))
    return {
        "history": lengths,
        "cached": [pair[WITH]["cached"] for pair in pairs],
        "first_s": medians(pairs, "first"),
        "times_sooner": ratios(pairs, "first", WITHOUT, WITH),
        "same_token": sum(pair[WITH]["text"] == pair[WITHOUT]["text"] for pair in pairs),
    }


def no_match(bench: Bench, options: argparse.Namespace) -> Result:
    rounds = []
    caches = {WITH: bench.engine.prefixes, WITHOUT: PrefixCache(0)}
    for number in range(options.fresh_rounds):
        say(f"no match: round {number + 1} of {options.fresh_rounds}")
        order = bench.draw.sample(list(caches), 2)
        found: dict[str, list[Result]] = {name: [] for name in caches}
        for names in (order, order[::-1]):
            ids = bench.draw.choices(bench.vocabulary, k=FRESH)
            for name in names:
                bench.engine.prefixes = caches[name]
                found[name].append(ask(bench.engine, ids, FRESH_ANSWER))
        rounds.append({name: means(asked) for name, asked in found.items()})
    bench.engine.prefixes = caches[WITH]
    return {
        "rounds": len(rounds),
        "cached": max(pair[WITH]["cached"] for pair in rounds),
        **{what: medians(rounds, what) for what in ("first", "last")},
        "ratio": {what: ratios(rounds, what, WITH, WITHOUT) for what in ("first", "last")},
    }


def means(asked: Sequence[Result]) -> Result:
    keys = ("first", "last", "cached")
    return {key: statistics.mean(each[key] for each in asked) for key in keys}


@contextmanager
def fed(model: Any) -> Iterator[list[int]]:
    """Count the ids that go through `model`, in the list's one element."""
    count = [0]

    def hook(_: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        count[0] += ids.numel()

    # The decoder: a prefill in chunks has no use for the logits of all but the last.
    handle = model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield count
    finally:
        handle.remove()


def one_by_one(engine: Gemma2Engine, prompts: Sequence[Sequence[int]]) -> list[int]:
    return [ask(engine, ids, 1)["cached"] for ids in prompts]


def at_once(engine: Gemma2Engine, prompts: Sequence[Sequence[int]]) -> list[int]:
    params = SamplingParams(max_new_tokens=1)
    streams = engine.submit_each([Request(tuple(ids), params) for ids in prompts])
    usages = [chunk.usage for stream in streams for chunk in stream if chunk.usage]
    engine.join()
    return [usage.cached_tokens for usage in usages]


def shared(bench: Bench, options: argparse.Namespace) -> Result:
    ways: dict[str, Callable[..., list[int]]] = {"one after the other": one_by_one}
    if not options.quick:
        ways["at once"] = at_once
    engine, figures = bench.engine, {}
    for way, run in ways.items():
        say(f"shared: {CONVERSATIONS} conversations {way}")
        system = bench.words(SYSTEM - 4)  # BOS, and the beginning of a turn
        prompts = [
            bench.encode(said(f"{system}{bench.words(QUESTION)}")) for _ in range(CONVERSATIONS)
        ]
        with fed(engine.model) as count:
            began = time.perf_counter()
            cached = run(engine, prompts)
            seconds = time.perf_counter() - began
        own = sum(len(ids) - SYSTEM for ids in prompts)
        figures[way] = {
            "seconds": round(seconds, 2),
            "prompt_tokens": sum(map(len, prompts)),
            "needed_tokens": SYSTEM + own,
            "fed_tokens": count[0],
            "cached": cached,
        }
    return figures


def ten_turns(bench: Bench, options: argparse.Namespace) -> Result:
    figures: Result = {"history": [], WITH: [], WITHOUT: [], "cached": []}
    history = ""
    for number in range(options.turns):
        say(f"turns: {number + 1} of {options.turns}, load {psutil.getloadavg()[0]:.1f}")
        prompt = history + said(bench.words(TURN))
        found = bench.both(prompt, TURN_ANSWER)
        figures["history"].append(len(bench.encode(prompt)))
        figures["cached"].append(found[WITH]["cached"])
        for name, figure in found.items():
            figures[name].append(round(figure["first"], 3))
        history = f"{prompt}{found[WITH]['text']}<end_of_turn>\n"
    return figures


PARTS: dict[str, Callable[[Bench, argparse.Namespace], Result]] = {
    "second turn": second_turn,
    "no match": no_match,
    "shared": shared,
    "ten turns": ten_turns,
}


def measure(options: argparse.Namespace) -> Result:
    tokenizer = load_tokenizer()
    vocabulary = words(tokenizer)
    say(f"making {options.layers} layers")
    model = speaking_stack(options.layers, vocabulary)
    figures: Result = {"parameters": sum(weight.numel() for weight in model.parameters())}
    with engine_of(model, tokenizer) as cached:
        bare = partial(Gemma2Engine, cached.model, tokenizer, name="bare", prefix_cache_bytes=0)
        bench = Bench(cached, bare, vocabulary, random.Random(0))
        bench.both(said(bench.words(QUESTION)), 4)  # warms up
        with watching(figures):
            figures["parts"] = {name: part(bench, options) for name, part in PARTS.items()}
    return figures


# The report ----------------------------------------------------------------------------------


def verdicts(parts: Result) -> Iterator[list[str]]:
    sooner = parts["second turn"]["times_sooner"]
    goal = f"turn 2 after {HISTORY:,} tokens: first token at least {SOONER_GOAL:.0f} times sooner"
    yield [goal, span(sooner, 1), at_least(sooner, SOONER_GOAL)]
    for what, words_of in (("first", "first token"), ("last", "short answer")):
        ratio = parts["no match"]["ratio"][what]
        goal = f"no slower when nothing matches, {words_of}: at most {NO_SLOWER_GOAL} of without"
        yield [goal, span(ratio, 3), at_most(ratio, NO_SLOWER_GOAL)]
    cached = parts["shared"]["one after the other"]["cached"]
    goal = f"a system prompt of {SYSTEM:,} tokens counts once for {CONVERSATIONS} conversations"
    verdict = "pass" if min(cached[1:]) >= SYSTEM else "fail"
    yield [goal, f"at least {min(cached[1:]):,} cached", verdict]


def report(document: Result) -> str:
    parts = document["parts"]
    second, fresh, turns = parts["second turn"], parts["no match"], parts["ten turns"]
    spent = [
        [way, f["prompt_tokens"], f["needed_tokens"], f["fed_tokens"], f["seconds"]]
        for way, f in parts["shared"].items()
    ]
    seconds = [
        [f"turn 2 after {HISTORY:,} tokens", *(second["first_s"][n] for n in (WITH, WITHOUT))],
        [f"{FRESH} tokens, no match", *(fresh["first"][n] for n in (WITH, WITHOUT))],
        [f"the same and {FRESH_ANSWER} tokens", *(fresh["last"][n] for n in (WITH, WITHOUT))],
    ]
    curve = [
        [key, *(f"{value:,}" if key in ("history", "cached") else value for value in turns[key])]
        for key in ("history", "cached", WITH, WITHOUT)
    ]
    return "\n\n".join(
        [
            f"{heading(document)} {document['layers']} layers, "
            f"{document['parameters'] / 1e6:,.0f} M parameters, bfloat16, "
            f"{document['torch_threads']} torch threads. In brackets are 95 % intervals.",
            *(["**Quick form**: the goals are for 8 layers."] if document["quick"] else []),
            "**Seconds to the first token**",
            table(["", WITH, WITHOUT], seconds),
            f"Tokens of history: {', '.join(map(str, second['history']))}, of the prompt cached: "
            f"{', '.join(map(str, second['cached']))}. The first token was the same in "
            f"{second['same_token']} of {len(second['cached'])}: random layers amplify what "
            "bfloat16 rounds. In float32 the text is the same, which the tests hold to.",
            f"**{CONVERSATIONS} conversations that share a system prompt of {SYSTEM:,} tokens**",
            table(["", "tokens of prompts", "needed", "through the model", "s"], spent),
            "**Turn by turn**: tokens of the prompt, cached ones, seconds to the first token",
            table(["turn", *range(1, len(turns["history"]) + 1)], curve),
            neighbours(document),
            goals(document),
        ]
    )


def plot(parts: Result, path: str) -> None:
    figure, (turns, tokens) = canvas(2)
    found = parts["ten turns"]
    places = range(1, len(found["history"]) + 1)
    for name, color in ((WITH, OURS), (WITHOUT, RIVAL)):
        turns.plot(places, found[name], "o-", color=color, label=name)
    turns.set_ylim(bottom=0)
    turns.set_xticks(places)
    turns.set_xlabel("turn")
    turns.set_title("seconds to the first token")
    turns.legend()
    spent = parts["shared"]["one after the other"]
    tokens.bar([WITH, WITHOUT], [spent["fed_tokens"], spent["prompt_tokens"]], color=[OURS, RIVAL])
    tokens.axhline(spent["needed_tokens"], color=INK, linewidth=0.8, linestyle=":")
    tokens.set_title(f"prompt tokens computed, {CONVERSATIONS} conversations")
    write_svg(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="of 26")
    parser.add_argument("--rounds", type=int, default=3, help="of the second turn")
    parser.add_argument("--fresh-rounds", type=int, default=20, help="of what nothing matches")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--plot", metavar="FILE.svg")
    parser.add_argument(
        "--quick", action="store_true", help="--layers 2 --rounds 1 --fresh-rounds 3 --turns 4"
    )
    options = parser.parse_args()
    if options.quick:
        options.layers, options.rounds, options.fresh_rounds, options.turns = 2, 1, 3, 4
    document = documented(
        quick=options.quick,
        layers=options.layers,
        torch_threads=torch.get_num_threads(),
        **measure(options),
    )
    document["verdicts"] = list(verdicts(document["parts"]))
    if options.plot:
        plot(document["parts"], options.plot)
    publish(document, report(document))


if __name__ == "__main__":
    main()
