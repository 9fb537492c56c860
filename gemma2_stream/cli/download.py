"""`gemma2-stream download`: a model onto this machine."""

from __future__ import annotations

import argparse
from typing import IO

from .options import HUB, Parser, add_hub, given


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gemma2-stream download",
        description="Fetch what is missing of a model, verify it, and print its folder.",
    )
    parser.add_argument("model", metavar="MODEL", help="an id; see gemma2-stream --help")
    add_hub(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace, out: IO[str]) -> int:
    from .. import hub

    folder = hub.resolve(refresh=True, **given(args, *HUB))
    print(folder.absolute(), file=out)
    return 0
