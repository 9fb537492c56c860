"""`gemma2-stream "question"`: one answer."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import IO

from .. import __version__
from .options import LOADING, SAMPLING, Parser, add_model, add_sampling, given
from .status import MISUSED

_USAGE = """gemma2-stream [options] "question"
       gemma2-stream chat [options]
       gemma2-stream ui [options]
       gemma2-stream serve [MODEL] [options]
       gemma2-stream download MODEL [options]
       gemma2-stream info [options]"""

_DESCRIPTION = """\
Ask a Gemma 2 that runs on this machine, and see the answer as it is made.

  gemma2-stream "question"           asks
  ls | gemma2-stream "explain"       asks, with the piped text below the question
  gemma2-stream chat                 talks with you, until Ctrl-D
  gemma2-stream ui                   talks with you in the browser
  gemma2-stream serve MODEL          answers OpenAI's clients
  gemma2-stream download MODEL       fetches a model and prints its folder
  gemma2-stream info                 tells what would be used

`chat`, `ui`, `serve`, `download` and `info` are commands when they come first. To ask
just that word: gemma2-stream -- info"""

_EPILOG = """\
stdout gets the answer and a final newline, nothing else. Exit status: 0, or 1 for
an error, 2 for wrong usage, 130 after Ctrl-C, 141 when the reader of stdout left."""


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="gemma2-stream", usage=_USAGE, description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("question", nargs="?", help="what to ask; quote it")
    parser.add_argument(
        "--raw", action="store_true", help="send the text as it is, without chat template"
    )
    parser.add_argument("--version", action="version", version=f"gemma2-stream {__version__}")
    add_sampling(parser)
    add_model(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace, out: IO[str]) -> int:
    prompt = _prompt(args.question)
    if not prompt:
        parser().print_help(sys.stderr)
        return MISUSED
    from ..llm import Gemma2LLM

    llm = Gemma2LLM(raw=args.raw, **given(args, *LOADING, *SAMPLING))
    end = ""
    try:
        # Closing stops the generation, whatever ends the loop.
        with contextlib.closing(llm.stream(prompt)) as tokens:  # type: ignore[type-var]
            for token in tokens:
                out.write(token)
                out.flush()
                end = token or end
    except BaseException:
        if end and out.isatty():
            print(file=sys.stderr)  # what comes next goes below the half answer
        raise
    if not end.endswith("\n"):
        out.write("\n")
    return 0


def _prompt(question: str | None) -> str:
    """The question, then a blank line and what is piped in; either may be missing."""
    # sys.stdin is None when the caller closed it.
    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
    return "\n\n".join(part for part in (question, piped) if part and part.strip())
