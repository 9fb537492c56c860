"""`gemma2-stream ui`: the chat in the browser."""

from __future__ import annotations

import argparse
from typing import IO

from .options import LOADING, SAMPLING, Parser, add_model, add_sampling, given

_DESCRIPTION = """\
Talk with the model in the browser, in English or Chinese, as the browser prefers. Needs
the extra: pip install 'gemma2-stream[ui]'. Serves this machine only, unless --host says
otherwise; whoever reaches the page can use it. The options of the answer are what its
settings begin with, for each who opens it."""


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gemma2-stream ui",
        description=_DESCRIPTION,
        epilog="Exit status: 1 for an error, 2 for wrong usage, 130 after Ctrl-C.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; default: %(default)s")
    parser.add_argument(
        "--port", type=_port, default=8000, help="0 takes a free one; default: %(default)s"
    )
    parser.add_argument("--no-browser", action="store_true", help="only tell the address")
    add_sampling(parser)
    add_model(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace, out: IO[str]) -> int:
    from ..chat import ChatGemma2
    from ..ui import server

    chat = ChatGemma2(**given(args, *LOADING, *SAMPLING))
    server.serve(chat, host=args.host, port=args.port, browser=not args.no_browser)
    return 0


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, from 0 to 65535")
    return int(text)
