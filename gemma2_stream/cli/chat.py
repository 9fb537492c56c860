"""`gemma2-stream chat`: a conversation."""

from __future__ import annotations

import argparse
from typing import IO

from .options import LOADING, SAMPLING, Parser, add_model, add_sampling, given

_DESCRIPTION = """\
Talk with the model. On a terminal, answers are shown as Markdown while they are made,
Ctrl-C stops one and keeps the conversation, and /help tells the commands. Without a
terminal, each line of stdin is a question, and stdout gets the answers, nothing else."""

_EPILOG = """\
Exit status: 0, or 1 for an error, 2 for wrong usage, 130 after Ctrl-C, 141 when the
reader of stdout left. A question that fails does not end the conversation; without a
terminal, the status at the end is then 1."""


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gemma2-stream chat",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before you speak")
    add_sampling(parser)
    add_model(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace, out: IO[str]) -> int:
    from .. import terminal_chat
    from ..chat import ChatGemma2

    chat = ChatGemma2(**given(args, *LOADING, *SAMPLING))
    return terminal_chat.run(chat, system=args.system, out=out)
