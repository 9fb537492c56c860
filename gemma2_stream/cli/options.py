"""Options that several commands share, and how a command line is read."""

from __future__ import annotations

import argparse
import os
import re
from functools import partial
from typing import Any, NoReturn

from .status import MISUSED

HUB = ("model", "revision", "source", "cache_dir")
LOADING = (*HUB, "dtype", "device_map", "preset")
SAMPLING = (
    "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed",
    "stop", "timeout",
)  # fmt: skip

MODEL_HELP = (
    "a ModelScope id (LLM-Research/gemma-2-9b-it), a Hugging Face id (google/gemma-2-9b-it), a "
    "folder, or demo, the toy inside this package; default: $GEMMA2_STREAM_MODEL, or demo"
)


class Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)
        super().__init__(formatter_class=layout, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(MISUSED, f"gemma2-stream: {message} (gemma2-stream --help tells more)\n")


def add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the model")
    group.add_argument("--model", metavar="MODEL", default=default_model(), help=MODEL_HELP)
    add_weights(group)


def add_weights(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--dtype", metavar="DTYPE", help="auto, bfloat16, float32 or float16")
    group.add_argument("--device-map", metavar="MAP", help="where to load it: auto, cpu, cuda:0")
    group.add_argument("--preset", metavar="PRESET", help="auto, exact, speed or memory")
    add_hub(group)


def add_hub(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--revision", metavar="REV", help="a branch, tag or commit of it")
    parser.add_argument("--source", metavar="HUB", help="modelscope or huggingface")
    parser.add_argument("--cache-dir", metavar="DIR", help="where downloads are kept")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "the answer", "What is not given is what the model's own configuration says."
    )
    add = group.add_argument
    add("--max-new-tokens", metavar="N", type=int, help="end after so many tokens")
    add("--temperature", metavar="T", type=float, help="0 is greedy; 0.7 is livelier")
    add("--top-p", metavar="P", type=float, help="only the likeliest, up to this mass")
    add("--top-k", metavar="K", type=int, help="only so many of the likeliest")
    add("--min-p", metavar="P", type=float, help="only those this near to the likeliest")
    add("--repetition-penalty", metavar="R", type=float, help="above 1 repeats less")
    add("--seed", metavar="N", type=int, help="sample the same every time")
    add(
        "--stop",
        metavar="TEXT",
        action="append",
        type=_unescaped,
        help=r"end before this text; may be repeated; \n, \t, \r and \\ are understood",
    )
    add("--timeout", metavar="S", type=float, help="give up after so many seconds")


def default_model() -> str:
    return os.environ.get("GEMMA2_STREAM_MODEL") or "demo"


def _unescaped(text: str) -> str:
    """A newline is hard to type in some shells, so `\\n` is one; other backslashes stay."""
    meaning = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda match: meaning[match[1]], text)


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(args, name)) is not None}
