"""`gemma2-stream`: the answer goes to stdout as it is made, and everything else to stderr.

A file for each command, with its `parser` and its `run`. Knows `Gemma2LLM`, the chat and the hub.
Loads torch and LangChain inside functions, so `--help` is quick.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

from . import ask, chat, download, info, serve, ui
from .status import INTERRUPTED, PIPE_CLOSED, abandon, failed
from .utf8 import decoded, speak_utf8

if TYPE_CHECKING:
    import argparse

_COMMANDS = {
    "chat": chat.parser,
    "ui": ui.parser,
    "serve": serve.parser,
    "download": download.parser,
    "info": info.parser,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (`sys.argv` without one) and return the exit status."""
    speak_utf8()
    out = sys.stdout
    try:
        status = _run(sys.argv[1:] if argv is None else argv, out)
        out.flush()
    except KeyboardInterrupt:
        # One more Ctrl-C kills: it must not interrupt the exit, which waits for the last forward.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        return INTERRUPTED
    except BrokenPipeError:
        abandon(out)
        return PIPE_CLOSED
    except Exception as error:
        return failed(error, out)
    return status


def _run(argv: Sequence[str], out: IO[str]) -> int:
    try:
        args = parsed([decoded(argument) for argument in argv])
    except SystemExit as done:  # how argparse ends --help, --version and wrong usage
        return int(done.code or 0)
    # A library that prints must not print into the answer.
    with contextlib.redirect_stdout(sys.stderr):
        status: int = args.run(args, out)
    return status


def parsed(argv: list[str]) -> argparse.Namespace:
    """Arguments with `run`, the function that does what they ask for."""
    if argv and argv[0] in _COMMANDS:
        return _COMMANDS[argv[0]]().parse_args(argv[1:])
    parser = ask.parser()
    args = parser.parse_args(argv)
    if args.question in _COMMANDS and "--" not in argv:
        word = args.question
        parser.error(f"{word!r} is a command when it comes first; to ask it, write -- {word}")
    return args
