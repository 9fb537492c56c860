"""`gemma2-stream serve`: OpenAI's protocol."""

from __future__ import annotations

import argparse
from typing import IO, Any

from .options import LOADING, MODEL_HELP, Parser, add_weights, default_model, given

_DESCRIPTION = """\
Answer OpenAI's clients at /v1/chat/completions, /v1/completions and /v1/models, with
/health and /metrics beside them. Needs the extra: pip install 'gemma2-stream[server]'.
Requests are decoded together. stderr gets the log, a JSON object a line, without the
text of prompts and answers."""

_EPILOG = """\
Keys come from --api-key-file, one a line, or from $GEMMA2_STREAM_API_KEYS, parted by
commas. Ctrl-C and SIGTERM let answers in the making end; a second one does not. Exit
status: 1 for an error, 2 for wrong usage, 130 after Ctrl-C."""


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="gemma2-stream serve", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", default=default_model(), help=MODEL_HELP
    )
    add = parser.add_argument
    add("--name", metavar="NAME", help="what clients call it; default: MODEL, or a folder's name")
    add("--host", default="127.0.0.1", help="where to listen; default: %(default)s")
    add("--port", type=int, default=8000, help="default: %(default)s")
    add("--api-key-file", metavar="FILE", help="the keys that are let in, one a line")
    add("--allow-public-without-key", action="store_true", help="let everybody in")
    add("--cors-origin", metavar="URL", action="append", help="a page that may ask; repeatable")
    limits = parser.add_argument_group("limits")
    add = limits.add_argument
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    add("--max-prompt-tokens", **number, help="default: what the context holds")
    add("--max-tokens", **number, help="of one answer; default: what the context holds")
    add("--max-seconds", type=float, default=600.0, metavar="S", help="default: %(default)s")
    add("--max-body-bytes", **number, default=4 * 2**20, help="default: %(default)s")
    add("--max-connections", **number, default=256, help="default: %(default)s")
    add("--max-rows", **number, help="answers made at once; default: 32, as memory allows")
    add("--max-waiting", **number, default=128, help="more get 503; default: %(default)s")
    add(
        "--drain-seconds", **number, default=60, help="for answers at the end; default: %(default)s"
    )
    add_weights(parser.add_argument_group("the model"))
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace, out: IO[str]) -> int:
    from ..chat import ChatGemma2
    from ..server import Keys, Settings
    from ..server import run as server
    from ..server.settings import public_name

    settings = Settings(
        model=args.name or public_name(args.model),
        keys=Keys.read(args.api_key_file),
        cors_origins=tuple(args.cors_origin or ()),
        **given(args, "max_prompt_tokens", "max_tokens", "max_seconds", "max_body_bytes"),
    )
    server.check_address(args.host, settings, public_without_key=args.allow_public_without_key)
    engine = ChatGemma2(**given(args, *LOADING, "max_rows", "max_waiting")).engine
    return server.serve(
        engine,
        settings,
        host=args.host,
        port=args.port,
        max_connections=args.max_connections,
        drain_seconds=args.drain_seconds,
    )
