"""`gemma2-stream`: the answer goes to stdout as it is made, and everything else to stderr.

Knows `Gemma2LLM`, the chat and the hub. Loads torch and LangChain inside functions, so `--help` is
quick.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import IO, TYPE_CHECKING, Any, NoReturn

from . import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from .engine import Gemma2Engine

FAILED, MISUSED, INTERRUPTED, PIPE_CLOSED = 1, 2, 128 + 2, 128 + 13

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

_CHAT_DESCRIPTION = """\
Talk with the model. On a terminal, answers are shown as Markdown while they are made,
Ctrl-C stops one and keeps the conversation, and /help tells the commands. Without a
terminal, each line of stdin is a question, and stdout gets the answers, nothing else."""

_CHAT_EPILOG = """\
Exit status: 0, or 1 for an error, 2 for wrong usage, 130 after Ctrl-C, 141 when the
reader of stdout left. A question that fails does not end the conversation; without a
terminal, the status at the end is then 1."""

_UI_DESCRIPTION = """\
Talk with the model in the browser, in English or Chinese, as the browser prefers. Needs
the extra: pip install 'gemma2-stream[ui]'. Serves this machine only, unless --host says
otherwise; whoever reaches the page can use it. The options of the answer are what its
settings begin with, for each who opens it."""

_SERVE_DESCRIPTION = """\
Answer OpenAI's clients at /v1/chat/completions, /v1/completions and /v1/models, with
/health and /metrics beside them. Needs the extra: pip install 'gemma2-stream[server]'.
Requests are decoded together. stderr gets the log, a JSON object a line, without the
text of prompts and answers."""

_SERVE_EPILOG = """\
Keys come from --api-key-file, one a line, or from $GEMMA2_STREAM_API_KEYS, parted by
commas. Ctrl-C and SIGTERM let answers in the making end; a second one does not. Exit
status: 1 for an error, 2 for wrong usage, 130 after Ctrl-C."""

_UNSET = {"max_new_tokens": "all that the context holds"} | dict.fromkeys(
    ("seed", "stop", "timeout"), "none"
)
_HUB = ("model", "revision", "source", "cache_dir")
_LOADING = (*_HUB, "dtype", "device_map", "preset")
_SAMPLING = (
    "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed",
    "stop", "timeout",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (`sys.argv` without one) and return the exit status."""
    _speak_utf8()
    out = sys.stdout
    try:
        status = _run(sys.argv[1:] if argv is None else argv, out)
        out.flush()
    except KeyboardInterrupt:
        # One more Ctrl-C kills: it must not interrupt the exit, which waits for the last forward.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        return INTERRUPTED
    except BrokenPipeError:
        _abandon(out)
        return PIPE_CLOSED
    except Exception as error:
        return _failed(error, out)
    return status


def _run(argv: Sequence[str], out: IO[str]) -> int:
    try:
        args = _parsed([_unicode(argument) for argument in argv])
    except SystemExit as done:  # how argparse ends --help, --version and wrong usage
        return int(done.code or 0)
    # A library that prints must not print into the answer.
    with contextlib.redirect_stdout(sys.stderr):
        status: int = args.run(args, out)
    return status


def _failed(error: Exception, out: IO[str]) -> int:
    """The status for `error`, told in one line; a mistake of the program's own is raised on."""
    from .errors import Gemma2StreamError, ParameterError

    if not isinstance(error, (Gemma2StreamError, OSError)):
        raise error
    print("gemma2-stream:", *str(error).splitlines(), file=sys.stderr)
    if not isinstance(error, Gemma2StreamError):
        _abandon(out)
    return MISUSED if isinstance(error, ParameterError) else FAILED


def _abandon(out: IO[str]) -> None:
    """What could not be written must not be tried again at exit, with a traceback."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def _speak_utf8() -> None:
    """An answer can contain any character, in the C locale too."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(encoding="utf-8", errors="replace")


def _unicode(argument: str) -> str:
    """`argument`; in a locale such as C, where Python could not decode it, read as UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return os.fsencode(argument).decode("utf-8", "replace")
    return argument


# What was asked ------------------------------------------------------------------------------


def _parsed(argv: list[str]) -> argparse.Namespace:
    """Arguments with `run`, the function that does what they ask for."""
    commands = {
        "chat": _chat_parser,
        "ui": _ui_parser,
        "serve": _serve_parser,
        "download": _download_parser,
        "info": _info_parser,
    }
    if argv and argv[0] in commands:
        return commands[argv[0]]().parse_args(argv[1:])
    parser = _ask_parser()
    args = parser.parse_args(argv)
    if args.question in commands and "--" not in argv:
        word = args.question
        parser.error(f"{word!r} is a command when it comes first; to ask it, write -- {word}")
    return args


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)
        super().__init__(formatter_class=layout, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(MISUSED, f"gemma2-stream: {message} (gemma2-stream --help tells more)\n")


def _ask_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gemma2-stream", usage=_USAGE, description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("question", nargs="?", help="what to ask; quote it")
    parser.add_argument(
        "--raw", action="store_true", help="send the text as it is, without chat template"
    )
    parser.add_argument("--version", action="version", version=f"gemma2-stream {__version__}")
    _add_sampling(parser)
    _add_loading(_add_model(parser))
    parser.set_defaults(run=_ask)
    return parser


def _chat_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gemma2-stream chat",
        description=_CHAT_DESCRIPTION,
        epilog=_CHAT_EPILOG,
    )
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before you speak")
    _add_sampling(parser)
    _add_loading(_add_model(parser))
    parser.set_defaults(run=_chat)
    return parser


def _ui_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gemma2-stream ui",
        description=_UI_DESCRIPTION,
        epilog="Exit status: 1 for an error, 2 for wrong usage, 130 after Ctrl-C.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; default: %(default)s")
    parser.add_argument(
        "--port", type=_port, default=8000, help="0 takes a free one; default: %(default)s"
    )
    parser.add_argument("--no-browser", action="store_true", help="only tell the address")
    _add_sampling(parser)
    _add_loading(_add_model(parser))
    parser.set_defaults(run=_ui)
    return parser


def _serve_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gemma2-stream serve", description=_SERVE_DESCRIPTION, epilog=_SERVE_EPILOG
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", default=_default_model(), help=_MODEL_HELP
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
    _add_loading(_add_weights(parser.add_argument_group("the model")))
    parser.set_defaults(run=_serve)
    return parser


def _info_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gemma2-stream info",
        description="Tell versions, device and checkpoint, and what a question with the same "
        "options would use. Downloads nothing and loads no weights.",
    )
    _add_sampling(parser)
    _add_loading(_add_model(parser))
    parser.set_defaults(run=_info)
    return parser


def _download_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gemma2-stream download",
        description="Fetch what is missing of a model, verify it, and print its folder.",
    )
    parser.add_argument("model", metavar="MODEL", help="an id; see gemma2-stream --help")
    _add_loading(parser)
    parser.set_defaults(run=_download)
    return parser


_MODEL_HELP = (
    "a ModelScope id (LLM-Research/gemma-2-9b-it), a Hugging Face id (google/gemma-2-9b-it), a "
    "folder, or demo, the toy inside this package; default: $GEMMA2_STREAM_MODEL, or demo"
)


def _default_model() -> str:
    return os.environ.get("GEMMA2_STREAM_MODEL") or "demo"


def _add_model(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("the model")
    group.add_argument("--model", metavar="MODEL", default=_default_model(), help=_MODEL_HELP)
    return _add_weights(group)


def _add_weights(group: argparse._ArgumentGroup) -> argparse._ArgumentGroup:
    group.add_argument("--dtype", metavar="DTYPE", help="auto, bfloat16, float32 or float16")
    group.add_argument("--device-map", metavar="MAP", help="where to load it: auto, cpu, cuda:0")
    group.add_argument("--preset", metavar="PRESET", help="auto, exact, speed or memory")
    return group


def _add_loading(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--revision", metavar="REV", help="a branch, tag or commit of it")
    parser.add_argument("--source", metavar="HUB", help="modelscope or huggingface")
    parser.add_argument("--cache-dir", metavar="DIR", help="where downloads are kept")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
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


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, from 0 to 65535")
    return int(text)


def _unescaped(text: str) -> str:
    """A newline is hard to type in some shells, so `\\n` is one; other backslashes stay."""
    meaning = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda match: meaning[match[1]], text)


def _prompt(question: str | None) -> str:
    """The question, then a blank line and what is piped in; either may be missing."""
    # sys.stdin is None when the caller closed it.
    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
    return "\n\n".join(part for part in (question, piped) if part and part.strip())


# What is done --------------------------------------------------------------------------------


def _ask(args: argparse.Namespace, out: IO[str]) -> int:
    prompt = _prompt(args.question)
    if not prompt:
        _ask_parser().print_help(sys.stderr)
        return MISUSED
    from .llm import Gemma2LLM

    llm = Gemma2LLM(raw=args.raw, **_given(args, *_LOADING, *_SAMPLING))
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


def _chat(args: argparse.Namespace, out: IO[str]) -> int:
    from . import terminal_chat
    from .chat import ChatGemma2

    chat = ChatGemma2(**_given(args, *_LOADING, *_SAMPLING))
    return terminal_chat.run(chat, system=args.system, out=out)


def _ui(args: argparse.Namespace, out: IO[str]) -> int:
    from .chat import ChatGemma2
    from .ui import server

    chat = ChatGemma2(**_given(args, *_LOADING, *_SAMPLING))
    server.serve(chat, host=args.host, port=args.port, browser=not args.no_browser)
    return 0


def _serve(args: argparse.Namespace, out: IO[str]) -> int:
    from .chat import ChatGemma2
    from .server import Keys, Settings, run
    from .server.settings import public_name

    settings = Settings(
        model=args.name or public_name(args.model),
        keys=Keys.read(args.api_key_file),
        cors_origins=tuple(args.cors_origin or ()),
        **_given(args, "max_prompt_tokens", "max_tokens", "max_seconds", "max_body_bytes"),
    )
    run.check_address(args.host, settings, public_without_key=args.allow_public_without_key)
    engine = ChatGemma2(**_given(args, *_LOADING, "max_rows", "max_waiting")).engine
    return run.serve(
        engine,
        settings,
        host=args.host,
        port=args.port,
        max_connections=args.max_connections,
        drain_seconds=args.drain_seconds,
    )


def _download(args: argparse.Namespace, out: IO[str]) -> int:
    from . import hub

    folder = hub.resolve(refresh=True, **_given(args, *_HUB))
    print(folder.absolute(), file=out)
    return 0


def _info(args: argparse.Namespace, out: IO[str]) -> int:
    for name, value in _facts(args):
        print(f"{name:<20}{value}", file=out, flush=True)
    return 0


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _facts(args: argparse.Namespace) -> Iterator[tuple[str, object]]:
    """What `info` prints, line by line; where the checkpoint is missing, up to there."""
    import dataclasses
    import platform
    from importlib import metadata

    yield "gemma2_stream", __version__
    yield "python", platform.python_version()
    for package in ("torch", "transformers", "langchain-core"):
        yield package, metadata.version(package)

    from . import hub
    from .llm import Gemma2LLM
    from .loading import device_kind, pick_device_map, pick_dtype, pick_preset
    from .presets import bytes_each

    llm = Gemma2LLM(**_given(args, *_LOADING, *_SAMPLING))
    device_map = llm.device_map or pick_device_map()
    dtype = pick_dtype(llm.dtype, device_map)
    yield "device", _device(device_map)
    yield "dtype", dtype
    yield "model", llm.model
    folder = hub.resolve(local_files_only=True, **_given(args, *_HUB))
    yield "checkpoint", folder.absolute()
    choice = pick_preset(llm.preset, folder, dtype, device_map)
    yield "preset", f"{choice.preset} ({choice.reason})"
    with _without_weights(folder) as engine:
        count = engine.model.num_parameters()
        each = bytes_each(choice, device=device_kind(device_map), dtype=dtype)
        yield "parameters", f"{count:,} ({count * each / 1e9:.2f} GB in memory)"
        yield "attention", engine.model.config._attn_implementation
        yield "context_length", engine.context_length
        asked = Gemma2LLM(engine=engine, **_given(args, *_SAMPLING))
        for name, value in dataclasses.asdict(asked.sampling_params).items():
            yield name, _UNSET[name] if value in (None, ()) else value


def _device(device_map: str) -> str:
    import torch

    if device_map == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    if device_map != "auto":
        return device_map
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"auto ({', '.join(names) or 'no GPU'})"


def _without_weights(folder: Path) -> Gemma2Engine:
    """An engine that can tell everything about the checkpoint but run it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from .attention import prefer_grouped
    from .engine import Gemma2Engine
    from .errors import CheckpointError

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        prefer_grouped(model)
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{str(folder)!r} holds no model that can run: {error}") from error
    return Gemma2Engine(model, tokenizer, name=str(folder))
