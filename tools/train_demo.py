"""Train the demo checkpoint: a real `Gemma2ForCausalLM`, only tiny, that knows this package.

    python tools/train_demo.py             # train, save to gemma2_stream/demo, examine, report
    python tools/train_demo.py --check     # only examine the checkpoint; fails when it is not good

To see cheaply that it is deterministic, run it twice with `--steps 20 --out FOLDER` and compare.

Why: the package must stream something sensible right after installation, and its tests need a model
with Gemma 2's architecture, tokenizer and chat template that loads in a second.  It is a toy: it
knows the topics of demo_questions.toml and says so about everything else.

How: questions are drawn without end by `demo_text`, the loss is on the model's turns only, AdamW
follows a warm-up and a cosine.  Nothing is chosen by looking at the exam.  Seeds,
thread count and algorithms are fixed, so the same machine and versions give the same bytes.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from demo_text import LANGUAGES, DemoText, Turn
from demo_tokenizer import build_tokenizer
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, GemmaTokenizer, GenerationConfig

TOOLS = Path(__file__).resolve().parent
DEMO, REPORT = TOOLS.parent / "gemma2_stream" / "demo", TOOLS / "demo_report.md"
SEED = 20240627  # the day Gemma 2 came out
THREADS = 1  # such small matrices gain little from a second one, and lose much on a busy machine
BATCH, CHUNK = 32, 100  # conversations a step; steps that are drawn and sorted together
PEAK_RATE, WARM_UP, WEIGHT_DECAY = 2e-3, 100, 0.1
MASKED_SHARE = 0.04  # question pieces replaced by random ones: no single word may decide
CUT_SHARE, CUT_LENGTH = 0.5, 10  # half of the last answers are cut short, see Encoder.answer
EOS, BOS, START, END = 1, 2, 106, 107
IGNORED = -100

Example = tuple[list[int], list[int]]  # the ids, and the labels: IGNORED outside the answers


def demo_config(vocab_size: int) -> Gemma2Config:
    """Gemma 2's architecture at a seven-hundredth of the width, depth and vocabulary together."""
    eager: dict[str, Any] = {"attn_implementation": "eager"}  # the one that knows soft caps
    return Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        query_pre_attn_scalar=48,
        initializer_range=0.05,
        max_position_embeddings=8192,
        sliding_window=4096,
        pad_token_id=0,
        bos_token_id=BOS,
        eos_token_id=[EOS, END],
        **eager,
    )


class Encoder:
    """Turns conversations into ids exactly as the chat template does, and says what to learn."""

    def __init__(self, tokenizer: GemmaTokenizer, rng_seed: int) -> None:
        """The seed fixes which pieces are made noisy and which answers are cut."""
        self.tokenizer = tokenizer
        self.rng = random.Random(rng_seed)

    def plain(self, text: str) -> list[int]:
        """The ids of a text, without <bos>."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def example(self, turns: list[Turn]) -> Example:
        """One conversation; only the answers, each with its <end_of_turn>, are learned."""
        newline = self.plain("\n")
        ids, labels = [BOS], [IGNORED]
        for turn in turns:
            question = self.noisy(self.plain("user\n" + turn.question.strip()))
            asked = [START, *question, END, *newline, START, *self.plain("model\n")]
            answer = self.answer(turn, last=turn is turns[-1])
            ids += asked + answer + newline
            labels += [IGNORED] * len(asked) + answer + [IGNORED] * len(newline)
        return ids, labels

    def answer(self, turn: Turn, last: bool) -> list[int]:
        """The answer and its end; cut at times, as what is hard to learn is how it begins."""
        ids = [*self.plain(turn.answer), END]
        return ids[:CUT_LENGTH] if last and self.rng.random() < CUT_SHARE else ids

    def noisy(self, ids: list[int]) -> list[int]:
        """The question with a few pieces replaced by random ones (its first two are "user\\n")."""
        noisy = list(ids)
        for i in range(2, len(ids)):
            if self.rng.random() < MASKED_SHARE:
                noisy[i] = self.rng.randrange(END + 1, len(self.tokenizer))
        return noisy

    def batches(self, text: DemoText) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches; conversations of like length share one, so padding is rare."""
        while True:
            drawn = [self.example(text.conversation()) for _ in range(BATCH * CHUNK)]
            drawn.sort(key=lambda example: len(example[0]))
            groups = [drawn[i : i + BATCH] for i in range(0, len(drawn), BATCH)]
            text.rng.shuffle(groups)
            yield from (pad_right(group) for group in groups)


def pad_right(examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Stack examples; the padding comes last, where causal attention never looks at it."""
    longest = max(len(ids) for ids, _ in examples)
    ids = [ids + [0] * (longest - len(ids)) for ids, _ in examples]
    labels = [labels + [IGNORED] * (longest - len(labels)) for _, labels in examples]
    return torch.tensor(ids), torch.tensor(labels)


def answer_loss(model: Gemma2ForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the answers; logits are computed only where there is something to learn."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    learned = targets != IGNORED
    cap = float(model.config.final_logit_softcapping or 0)
    logits = cap * torch.tanh(model.lm_head(hidden[learned]) / cap)
    return F.cross_entropy(logits, targets[learned])


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    progress = max(0, step - WARM_UP) / max(1, steps - WARM_UP)
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: Gemma2ForCausalLM) -> torch.optim.AdamW:
    """AdamW; norms are not decayed, they have no direction to overfit."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


def train(model: Gemma2ForCausalLM, encoder: Encoder, text: DemoText, steps: int) -> None:
    """Train in place, saying how it goes every hundred steps."""
    optimizer, started = make_optimizer(model), time.perf_counter()
    model.train()
    for step, (ids, labels) in zip(range(steps), encoder.batches(text), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = answer_loss(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.perf_counter() - started
            print(f"step {step:5d}/{steps}  loss {loss.item():.4f}  {seconds:5.0f} s", flush=True)


def build(out: Path, text: DemoText, steps: int) -> float:
    """Make the tokenizer, train the model, save both; returns the seconds it took."""
    started = time.perf_counter()
    tokenizer = build_tokenizer(text.corpus())
    model = Gemma2ForCausalLM(demo_config(len(tokenizer)))
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {len(tokenizer)} pieces, {len(text.topics)} topics", flush=True)
    train(model, Encoder(tokenizer, SEED), text, steps)
    save(model, tokenizer, out)
    return time.perf_counter() - started


def save(model: Gemma2ForCausalLM, tokenizer: GemmaTokenizer, out: Path) -> None:
    """Write the checkpoint as transformers does, the weights rounded to bfloat16."""
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=[EOS, END], pad_token_id=0, do_sample=False
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # it is written for its owner only


@dataclass(frozen=True)
class Marked:
    """A turn of the exam, what the model said, and whether it ended by itself."""

    turn: Turn
    answer: str
    ended: bool

    @property
    def right(self) -> bool:
        """Right is the expected answer, the whole of it and nothing else."""
        return self.answer.strip() == self.turn.answer


class Exam:
    """Asks a saved checkpoint the held-out phrasings, greedily, in batches."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        """Load the checkpoint in the given precision."""
        self.tokenizer = GemmaTokenizer.from_pretrained(folder)
        self.model = Gemma2ForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        ).eval()

    def mark(self, turns: list[Turn], before: list[Turn] | None = None) -> list[Marked]:
        """Answer every question; `before` are the turns of the conversation that came earlier."""
        marked: list[Marked] = []
        for i in range(0, len(turns), 128):
            asked = turns[i : i + 128]
            prompts = [self.prompt(turn, before or []) for turn in asked]
            marked += map(self.marked, asked, self.generate(prompts))
        return marked

    def prompt(self, turn: Turn, before: list[Turn]) -> str:
        """The rendered conversation up to the point where the model must answer."""
        messages = []
        for earlier in before:
            messages.append({"role": "user", "content": earlier.question})
            messages.append({"role": "assistant", "content": earlier.answer})
        messages.append({"role": "user", "content": turn.question})
        rendered: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return rendered

    def generate(self, prompts: list[str]) -> list[list[int]]:
        """The new ids of each prompt, without the padding behind an ended answer."""
        inputs = self.tokenizer(
            prompts, add_special_tokens=False, padding=True, return_tensors="pt"
        )
        with torch.inference_mode():
            output = self.model.generate(**inputs, do_sample=False, max_new_tokens=128)
        rows: list[list[int]] = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [[token for token in row if token != 0] for row in rows]

    def marked(self, turn: Turn, ids: list[int]) -> Marked:
        """Compare one answer."""
        answer = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Marked(turn, answer, ids[-1:] == [END])


def score(marked: list[Marked]) -> str:
    """For example "450 of 505 (89.1 %)"."""
    right = sum(m.right for m in marked)
    return f"{right} of {len(marked)} ({right / len(marked):.1%})"


def examine(folder: Path, text: DemoText) -> dict[str, list[Marked]]:
    """All exams: held-out phrasings in both dtypes, framed ones, and as a second turn."""
    single, half = Exam(folder, torch.float32), Exam(folder, torch.bfloat16)
    turns, first = text.exam(), text.exam()[:1]
    return {
        "held-out phrasings, float32": single.mark(turns),
        "held-out phrasings, bfloat16": half.mark(turns),
        "held-out phrasings in an unseen frame, float32": single.mark(text.framed_exam()),
        "held-out phrasings as a second turn, float32": single.mark(turns, first),
    }


def totals(exams: dict[str, list[Marked]]) -> list[str]:
    """A table: per exam how many are right, per language, and how many ended by themselves."""
    lines = ["| exam | right | English | Chinese | ended |", "|---|---|---|---|---|"]
    for name, marked in exams.items():
        cells = [[m for m in marked if m.turn.language == language] for language in LANGUAGES]
        ended = sum(m.ended for m in marked)
        columns = [score(marked), *map(score, cells), f"{ended} of {len(marked)}"]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return lines


def good(exams: dict[str, list[Marked]]) -> bool:
    """What is demanded of each exam: 80 % right, and every answer ended by itself."""
    return all(
        sum(m.right for m in marked) >= 0.8 * len(marked) and all(m.ended for m in marked)
        for marked in exams.values()
    )


def circumstances(seconds: float | None, steps: int) -> list[str]:
    """What the figures were measured with."""
    built = "not in this run" if seconds is None else f"{seconds / 60:.1f} minutes, {steps} steps"
    return [
        f"- Trained: {built}; {THREADS} thread on a machine with {os.cpu_count()} cores"
        f" ({platform.machine()}), float32, stored as bfloat16.",
        f"- Python {platform.python_version()}, torch {torch.__version__}, transformers"
        f" {transformers.__version__}, tokenizers {tokenizers.__version__}.",
    ]


def report(exams: dict[str, list[Marked]], seconds: float | None, steps: int) -> str:
    """The whole report as Markdown."""
    main = next(iter(exams.values()))
    rows = ["| topic | question | answer | right | ended |", "|---|---|---|---|---|"]
    rows += [row(m) for m in main]
    parts = [
        "# What the demo model answers",
        "Written by `tools/train_demo.py`. The questions are the `test` phrasings of"
        " `tools/demo_questions.toml`: none of them was trained on. An answer is right when it"
        " equals the expected answer of its topic, character for character after stripping"
        " white space; it has ended when its last token is `<end_of_turn>`.",
        "\n".join(circumstances(seconds, steps)),
        "\n".join(totals(exams)),
        "## Every held-out phrasing (float32)",
        "\n".join(rows),
    ]
    return "\n\n".join(parts) + "\n"


def row(marked: Marked) -> str:
    """One line of the long table."""
    cells = (marked.turn.topic, marked.turn.question, marked.answer)
    shown = " | ".join(cell.replace("|", "\\|").replace("\n", " ⏎ ") for cell in cells)
    verdicts = ("yes" if fine else "**no**" for fine in (marked.right, marked.ended))
    return f"| {shown} | {' | '.join(verdicts)} |"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train and examine the demo checkpoint.")
    parser.add_argument("--out", type=Path, default=DEMO, help="folder of the checkpoint")
    parser.add_argument("--report", type=Path, help=f"Markdown file, after training {REPORT.name}")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--check", action="store_true", help="examine only, train nothing")
    arguments = parser.parse_args()
    if arguments.report is None and arguments.out == DEMO and not arguments.check:
        arguments.report = REPORT
    return arguments


def main() -> None:
    """Train unless only a check is wanted, examine, report."""
    arguments = parse_arguments()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    text = DemoText(seed=SEED)
    seconds = None if arguments.check else build(arguments.out, text, arguments.steps)
    exams = examine(arguments.out, text)
    print("\n".join(totals(exams)))
    if arguments.report:
        arguments.report.write_text(report(exams, seconds, arguments.steps), encoding="utf-8")
    if arguments.check and not good(exams):
        raise SystemExit("not good: below 80 %, or answers without an end")


if __name__ == "__main__":
    main()
