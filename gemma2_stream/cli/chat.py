"""`gemma2-stream chat`: a conversation."""

from __future__ import annotations

import argparse
import os
from typing import IO

from .options import LOADING, SAMPLING, Parser, add_model, add_sampling, given

_DESCRIPTION = """\
Talk with the model. On a terminal, answers are shown as Markdown while they are made,
Ctrl-C stops one and keeps the conversation, and /help tells the commands. Without a
terminal, each line of stdin is a question, and stdout gets the answers, nothing else."""

_SERVER_DESCRIPTION = """\
It runs --model, by the name that it has there; only the tokenizer is loaded here. Its
key, if it wants one, comes from $GEMMA2_STREAM_API_KEY. Needs the extra:
pip install 'gemma2-stream[remote]'."""

_EPILOG = """\
Exit status: 0, or 1 for an error, 2 for wrong usage, 130 after Ctrl-C, 141 when the
reader of stdout left. A question that fails does not end the conversation; without a
terminal, the status at the end is then 1."""


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="gemma2-stream chat", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before you speak")
    add_sampling(parser)
    add_model(parser)
    _add_server(parser)
    parser.set_defaults(run=run)
    return parser


def _add_server(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("a server", _SERVER_DESCRIPTION).add_argument
    add("--base-url", metavar="URL", help="vLLM's or gemma2-stream serve's: http://gpu:8000/v1")
    add("--tokenizer", metavar="NAME", help="an id or a folder; default: that of --model")


def run(args: argparse.Namespace, out: IO[str]) -> int:
    from .. import terminal_chat
    from ..chat import ChatGemma2

    # Without a server it would go to the hub, as its token.
    key = None if args.base_url is None else os.environ.get("GEMMA2_STREAM_API_KEY") or None
    asked = given(args, *LOADING, *SAMPLING, "base_url", "tokenizer")
    return terminal_chat.run(ChatGemma2(api_key=key, **asked), system=args.system, out=out)
