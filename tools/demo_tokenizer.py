"""The demo model's tokenizer: Gemma's structure, three thousand pieces of our own.

What is Gemma's: byte pair encoding with byte fallback, spaces written as `▁`, no space put in
front, and the special tokens at Gemma's ids.  What is ours: the pieces.  Merges are learned inside
English words only; a Chinese character is a piece of its own, because on so little text longer
pieces would be whole phrases, and who reads whole phrases cannot understand a new one.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import GemmaTokenizer

VOCAB_SIZE = 4096
RUN_LENGTHS = (2, 3, 4, 8)  # runs of newlines and spaces (code is indented) that are one piece

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
    {{- raise_exception('System role not supported') -}}
{%- endif -%}
{%- set order = 'user/assistant/user/assistant/...' -%}
{%- set expected = namespace(role='user') -%}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (expected.role == 'user') -%}
        {{- raise_exception('Conversation roles must alternate ' ~ order) -}}
    {%- endif -%}
    {%- set expected.role = 'other' if expected.role == 'user' else 'user' -%}
    {%- set name = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{- '<start_of_turn>' ~ name ~ '\\n' ~ message['content'] | trim ~ '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""


def fixed_pieces() -> list[str]:
    """The pieces at fixed ids: specials, unused ones up to 105, turn marks, runs and all bytes."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    specials += [f"<unused{i}>" for i in range(101)] + ["<start_of_turn>", "<end_of_turn>"]
    runs = [char * length for char in "\n▁" for length in (1, *RUN_LENGTHS)]
    return specials + runs + [f"<0x{byte:02X}>" for byte in range(256)]


def run_merges() -> list[tuple[str, str]]:
    """The merges that build the runs; first in rank, so that no word takes a part of an indent."""
    halves = ((1, 1), (2, 2), (4, 4), (2, 1))
    return [(char * a, char * b) for char in "\n▁" for a, b in halves]


def learn_merges(corpus: list[str]) -> list[tuple[str, str]]:
    """Learn byte pair merges inside English words, with the space in front as part of the word."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    words = Regex("▁?[A-Za-z]+|[^A-Za-z]")
    learner.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
    trainer = trainers.BpeTrainer(vocab_size=8192, min_frequency=2, show_progress=False)
    # Once with a space in front too: most words stand inside a sentence when they are used.
    learner.train_from_iterator([text for line in corpus for text in (line, " " + line)], trainer)
    return [(a, b) for a, b in json.loads(learner.to_str())["model"]["merges"]]


def vocabulary(corpus: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Fixed pieces, then every character of the corpus, then merges until VOCAB_SIZE is full."""
    characters = sorted(set("".join(corpus).replace(" ", "▁")) | {chr(c) for c in range(33, 127)})
    pieces = dict.fromkeys([*fixed_pieces(), *characters])
    merges = run_merges()
    for left, right in learn_merges(corpus):
        if len(pieces) < VOCAB_SIZE:
            merges.append((left, right))
            pieces[left + right] = None
    return {piece: i for i, piece in enumerate(pieces)}, merges


def build_tokenizer(corpus: list[str]) -> GemmaTokenizer:
    """Hand the vocabulary to transformers' own Gemma class, which makes the rest."""
    vocab, merges = vocabulary(corpus)
    learned: dict[str, Any] = {"vocab": vocab, "merges": merges}
    tokenizer = GemmaTokenizer(
        **learned,
        model_max_length=8192,
        add_bos_token=True,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
    )
    tokenizer.add_tokens([AddedToken(f"<unused{i}>", normalized=False) for i in range(101)])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
