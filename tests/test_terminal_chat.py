"""`gemma2-stream chat`: the conversation, its commands, Ctrl-C, and what a terminal is shown.

Most tests run in this process on an engine that says what it is told; a real process on a real
terminal runs where keys and signals matter.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_cli
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, convert_to_messages
from serving import serving
from tiny import Forwards
from waiting import press_ctrl_c, wait
from wire import HEAD, WHOLE, Wire, text

from gemma2_stream import (
    Channel,
    ChatGemma2,
    Chunk,
    Gemma2Engine,
    GenerationTimeoutError,
    Request,
    SamplingParams,
    TokenStream,
    Usage,
    markdown,
    terminal_chat,
)
from gemma2_stream.cli import main
from gemma2_stream.markdown import Blocks, MarkdownScreen, printable
from gemma2_stream.server import Keys
from gemma2_stream.terminal_chat import run

endless = test_cli.endless  # a fixture, found by its name
WIDTH, HEIGHT = 60, 12
THERE = ["--base-url", "http://127.0.0.1:9/v1"]
Piece = str | BaseException | Callable[[], object]


class Scripted:
    """An engine with a script: for each question an answer in pieces.

    A piece is text, an error to end with, or something to do before the next. `prompts` has what
    was asked, decoded from the ids of a real tokenizer.
    """

    name, defaults = "scripted", SamplingParams()

    def __init__(self, real: Gemma2Engine, *answers: list[Piece]) -> None:
        self.real = real
        self.answers = [*answers]
        self.prompts: list[str] = []

    def encode(self, prompt: Any, *, raw: bool = False) -> list[int]:
        return self.real.encode(prompt, raw=raw)

    def tokenize(self, text: str) -> list[int]:
        return self.real.tokenize(text)

    def submit(self, requests: list[Request]) -> TokenStream:
        [request] = requests
        self.prompts.append(self.real.tokenizer.decode(request.prompt_ids))
        channel = Channel(requests)
        answer = self.answers.pop(0) if self.answers else ["Yes."]
        threading.Thread(target=self._play, args=(channel, answer), daemon=True).start()
        return TokenStream(channel)

    def _play(self, channel: Channel, answer: list[Piece]) -> None:
        for piece in answer:
            if isinstance(piece, BaseException):
                return channel.fail(piece)
            if isinstance(piece, str):
                channel.put(Chunk(0, piece))
            else:
                piece()
        channel.put(Chunk(0, "", "stop", usage=Usage(1, len(answer))))
        return channel.put(None)

    def submit_each(self, requests: list[Request]) -> list[TokenStream]:
        return [self.submit([request]) for request in requests]

    def close(self) -> None:
        pass


class Terminal(io.StringIO):
    """A terminal of WIDTH by HEIGHT; `seen` gets what it shows at each flush."""

    def __init__(self, text: str = "") -> None:
        super().__init__(text)
        self.seen: list[str] = []
        self.changed = threading.Condition()

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        with self.changed:
            self.seen.append(shown(self.getvalue()))
            self.changed.notify_all()

    def wait_for(self, text: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.seen and text in self.seen[-1], 60), text


def shown(output: str) -> str:
    """What a terminal makes of `output`, its scrollback included.

    The Enter that ends the line of a prompt is not in it, so an answer takes that line.

    Knows what we may send: text, new lines, colours, the cursor up and shown, and lines erased.
    """
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part == "\x1b[1A":
            row -= 1
            assert row >= max(0, len(lines) - HEIGHT), "the cursor left the screen"
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part.startswith("\x1b"):
            assert part.endswith("m") or part in ("\x1b[?25l", "\x1b[?25h"), part
        else:
            assert "\x1b" not in part
            lines[row] = lines[row][:column].ljust(column) + part
            column += len(part)
    return "\n".join(line.rstrip() for line in lines)


class Result(NamedTuple):
    status: int
    out: str
    err: str


Talk = Callable[..., Result]


@pytest.fixture
def scripted(demo_engine: Gemma2Engine) -> Callable[..., Scripted]:
    return lambda *answers: Scripted(demo_engine, *answers)


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capable terminal, whatever the tests run on."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": WIDTH, "LINES": HEIGHT}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(markdown, "SLOW", float("inf"))  # draw every token


@pytest.fixture
def talk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """`talk(engine, line, ...)`: a conversation through a pipe, or `out=Terminal()` on one."""

    def call(
        engine: Any, *lines: str, system: str | None = None, out: io.StringIO | None = None
    ) -> Result:
        typed = "".join(f"{line}\n" for line in lines)
        on_terminal = isinstance(out, Terminal)
        monkeypatch.setattr(sys, "stdin", Terminal(typed) if on_terminal else io.StringIO(typed))
        out = out or io.StringIO()
        capsys.readouterr()
        status = run(ChatGemma2(engine=engine), system=system, out=out)
        return Result(status, out.getvalue(), capsys.readouterr().err)

    return call


# The conversation ------------------------------------------------------------------------------


def test_a_pipe_gets_the_answers_and_nothing_else(
    talk: Talk, scripted: Callable[..., Scripted]
) -> None:
    """A question a line, empty lines none; the text as the model said it, a newline after it."""
    engine = scripted(["**o", "ne**\n", "\n- x"], ["\x1b[31mtwo\n"])
    assert talk(engine, "a", "", "  ", "b") == (0, "**one**\n\n- x\n\x1b[31mtwo\n", "")
    assert len(engine.prompts) == 2


def test_the_history_reaches_the_model(talk: Talk, scripted: Callable[..., Scripted]) -> None:
    engine = scripted(["My name is Gemma."], ["Again."])
    talk(engine, "Who are you?", "And I?", system="Be brief.")
    first, second = engine.prompts
    assert "Be brief." in first
    parts = ["Be brief.", "Who are you?", "My name is Gemma.", "And I?"]
    assert [second.count(part) for part in parts] == [1, 1, 1, 1]
    assert sorted(parts, key=second.index) == parts


def test_clear_forgets_all_but_the_system_prompt(
    talk: Talk, scripted: Callable[..., Scripted]
) -> None:
    engine = scripted(["My name is Gemma."], ["Again."])
    talk(engine, "Who are you?", "/clear", "And I?", system="Be brief.")
    assert "Gemma" not in engine.prompts[1]
    assert "Who" not in engine.prompts[1]
    assert "Be brief." in engine.prompts[1]


def test_what_is_saved_can_be_read_back(
    talk: Talk, scripted: Callable[..., Scripted], tmp_path: Path
) -> None:
    path = tmp_path / "a talk.json"
    result = talk(scripted(["我是 Gemma"]), "你是谁", f"/save {path}", system="Be brief.")
    assert (result.status, result.out) == (0, "我是 Gemma\n")
    saved = json.loads(path.read_text("utf-8"))
    assert saved == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "你是谁"},
        {"role": "assistant", "content": "我是 Gemma"},
    ]
    kinds = [SystemMessage, HumanMessage, AIMessage]
    assert [type(message) for message in convert_to_messages(saved)] == kinds


def test_save_never_overwrites(
    talk: Talk, scripted: Callable[..., Scripted], tmp_path: Path
) -> None:
    path = tmp_path / "taken"
    path.write_text("mine")
    result = talk(scripted(), "hello", f"/save {path}")
    assert result.status == 1
    assert f"{str(path)!r} is there already" in result.err
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/clera", "did you mean /clear?"),
        ("/quit", "there is no '/quit'"),
        ("/SAVE x", "did you mean /"),
        ("/", "did you mean /"),
        ("/usr/bin", "written with two"),
        ("/save", "needs the name of a file"),
        ("/save ./no-such-folder/talk.json", "No such file"),
        ("/save ~no-such-user/x", "cannot be written"),
        ("/clear all", "takes nothing after it"),
        ("/\x1b[31mx", r"'/\x1b[31mx'"),
    ],
)
def test_a_wrong_command_is_one_line_and_no_question(
    talk: Talk, scripted: Callable[..., Scripted], line: str, says: str
) -> None:
    engine = scripted()
    status, out, err = talk(engine, line, "hello")
    assert (status, out) == (1, "Yes.\n")
    assert err.startswith("gemma2-stream: ")
    assert err.count("\n") == 1
    assert says in err
    assert len(engine.prompts) == 1


def test_two_slashes_ask_one(talk: Talk, scripted: Callable[..., Scripted]) -> None:
    engine = scripted()
    assert talk(engine, "//help me").status == 0
    assert "/help me" in engine.prompts[0]
    assert "//help" not in engine.prompts[0]


def test_help_lists_every_command(talk: Talk, scripted: Callable[..., Scripted]) -> None:
    status, out, err = talk(scripted(), "/help")
    assert (status, out) == (0, "")
    for command in ("/clear", "/save FILE", "/help", "/exit", "//", "Ctrl-C", "Ctrl-D"):
        assert command in err


def test_exit_leaves_what_comes_after(talk: Talk, scripted: Callable[..., Scripted]) -> None:
    engine = scripted()
    assert talk(engine, "/exit", "hello") == (0, "", "")
    assert engine.prompts == []


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_terminal", [False, True])
def test_a_conversation_that_no_longer_fits_says_what_to_do(
    talk: Talk, demo_engine: Gemma2Engine, on_terminal: bool
) -> None:
    """The question that does not fit is taken back; after /clear there is room again."""
    long = "word " * demo_engine.context_length
    out = Terminal() if on_terminal else io.StringIO()
    result = talk(demo_engine, "hello", long, "/clear", "hello", out=out)
    assert result.status == (0 if on_terminal else 1)
    [line] = [line for line in result.err.splitlines() if line.startswith("gemma2-stream:")]
    assert "/clear forgets" in line
    output = shown(result.out) if on_terminal else result.out
    assert output.count("Hello!") == 2


def test_a_question_too_long_by_itself_does_not_blame_the_history(
    talk: Talk, demo_engine: Gemma2Engine
) -> None:
    err = talk(demo_engine, "word " * demo_engine.context_length).err
    assert "shorten the prompt" in err
    assert "/clear" not in err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (GenerationTimeoutError("timeout=1.0 ran\nout"), "timeout=1.0 ran out"),
        (RuntimeError("CUDA out of memory"), "RuntimeError: CUDA out of memory"),
        (MemoryError("no memory is left"), "MemoryError: no memory is left"),
    ],
)
def test_an_error_keeps_what_was_said(
    talk: Talk, scripted: Callable[..., Scripted], error: Exception, says: str
) -> None:
    engine = scripted(["ha", "lf", error], ["whole"])
    status, out, err = talk(engine, "first", "second")
    assert (status, out, err) == (1, "half\nwhole\n", f"gemma2-stream: {says}\n")
    assert "half" in engine.prompts[1]


def test_a_question_that_got_not_a_word_is_taken_back(
    talk: Talk, scripted: Callable[..., Scripted]
) -> None:
    engine = scripted([GenerationTimeoutError("too late")], ["whole"])
    assert talk(engine, "first", "second").out == "whole\n"
    assert "first" not in engine.prompts[1]


def test_a_mistake_of_the_program_is_raised(talk: Talk, scripted: Callable[..., Scripted]) -> None:
    with pytest.raises(ZeroDivisionError):
        talk(scripted([ZeroDivisionError("inside")]), "hello")


# Ctrl-C ------------------------------------------------------------------------------------------


# A signal that comes just before a thread begins to wait is seen when the thread wakes: by a chunk.
CTRL_C: list[Piece] = [press_ctrl_c, ""]


class Stderr(io.StringIO):
    """Where the chat says that it has stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped = threading.Event()

    def write(self, text: str) -> int:
        if "Stopped" in text:
            self.stopped.set()
        return super().write(text)


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Stderr:
    return Stderr()


def test_ctrl_c_stops_the_model(
    talk: Talk,
    demo_engine: Gemma2Engine,
    forwards: Callable[[Gemma2Engine], Forwards],
    stderr: Stderr,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Held inside a forward while the key is pressed, the model makes no other."""
    monkeypatch.setattr(sys, "stderr", stderr)
    watch = forwards(demo_engine)
    reached, release = watch.gate(6)

    def press() -> None:
        wait(reached)
        press_ctrl_c(seen=stderr.stopped)
        release.set()

    presses = threading.Thread(target=press, daemon=True)
    presses.start()
    out = Terminal()
    assert talk(demo_engine, "Who are you?", out=out).status == 0
    presses.join()
    demo_engine.join()
    assert watch.count <= 7
    assert "Stopped." in stderr.getvalue()


def test_a_stopped_answer_stays_in_the_conversation(
    talk: Talk, scripted: Callable[..., Scripted], tmp_path: Path
) -> None:
    """What was said is shown, sent with the next question, and saved with a mark."""
    out, held, path = Terminal(), threading.Event(), tmp_path / "talk.json"
    engine = scripted(
        ["half an ", "answer", lambda: out.wait_for("half an answer"), *CTRL_C, held.wait]
    )
    result = talk(engine, "first", "second", f"/save {path}", out=out)
    held.set()
    assert result.status == 0
    assert "half an answer" in engine.prompts[1]
    assert "half an answer\nYes." in shown(result.out)
    assert "Stopped." in result.err
    stopped = {"role": "assistant", "content": "half an answer", "finish_reason": "cancelled"}
    saved = json.loads(path.read_text("utf-8"))
    assert (saved[1], saved[3]) == (stopped, {"role": "assistant", "content": "Yes."})
    assert convert_to_messages(saved)[1].content == "half an answer"


def test_a_question_that_is_stopped_before_a_word_is_taken_back(
    talk: Talk, scripted: Callable[..., Scripted]
) -> None:
    held = threading.Event()
    engine = scripted([*CTRL_C, held.wait])
    result = talk(engine, "first", "second", out=Terminal())
    held.set()
    assert "first" not in engine.prompts[1]
    assert "taken back" in result.err


def test_ctrl_c_ends_a_pipe(talk: Talk, scripted: Callable[..., Scripted]) -> None:
    held = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        talk(scripted(["half", *CTRL_C, held.wait]), "hello")
    held.set()


# On a terminal -----------------------------------------------------------------------------------


def test_markdown_is_shown_while_it_is_made(talk: Talk, scripted: Callable[..., Scripted]) -> None:
    """Each piece is on the screen before the next is made, rendered."""
    out = Terminal()
    pieces = [
        "Some **bo",
        "ld** and\n\n- fi",
        "rst\n- second\n\n```py",
        "thon\nx = 1\n",
        "```\nEnd",
    ]
    states = ["Some **bo", "• fi", "• second", "x = 1", "End"]
    steps: list[Piece] = []
    for piece, state in zip(pieces, states, strict=True):
        steps += [piece, lambda state=state: out.wait_for(state)]
    result = talk(scripted(steps), "hello", out=out)
    assert "Some bold and\n\n • first\n • second\n\n" in shown(result.out)
    assert "**" not in shown(result.out)
    assert "```" not in shown(result.out)
    sizes = [len(state.rstrip()) for state in dict.fromkeys(out.seen)]
    assert len(sizes) > 5
    assert shown(result.out).count("Some bold") == 1


def test_an_answer_longer_than_the_screen_loses_nothing(
    talk: Talk, scripted: Callable[..., Scripted]
) -> None:
    """One block or many: every line stands in the scrollback, once and in order."""
    code = "".join(f"line_{n} = {n}\n" for n in range(3 * HEIGHT))
    prose = "".join(f"Paragraph {n}.\n\n" for n in range(3 * HEIGHT))
    text = f"```python\n{code}```\n\n{prose}"
    pieces: list[Piece] = [text[at : at + 7] for at in range(0, len(text), 7)]
    output = shown(talk(scripted(pieces), "hello", out=Terminal()).out)
    found = re.findall(r"line_(\d+) =|Paragraph (\d+)\.", output)
    assert [int(a or b) for a, b in found] == [*range(3 * HEIGHT)] * 2
    assert "…" not in output


@pytest.mark.parametrize(
    "text",
    ["<div>kept</div>", "a <b>kept</b>", "[kept]: http://kept", "![kept](http://kept)", "<kept>"],
)
def test_what_markdown_would_hide_is_shown(
    talk: Talk, scripted: Callable[..., Scripted], text: str
) -> None:
    assert "kept" in shown(talk(scripted([text]), "hello", out=Terminal()).out)


def test_a_link_shows_where_it_leads(talk: Talk, scripted: Callable[..., Scripted]) -> None:
    output = talk(scripted(["[bank](http://evil.example)"]), "hello", out=Terminal()).out
    assert "bank (http://evil.example)" in shown(output)


CONTROLS = ["\x1b[2J", "\x1b]0;title\x07", "\x9b2J", "&#27;[2J", "&#x9b;2J", "&#13;", "\r", "\x08"]


@pytest.mark.parametrize("term", ["xterm", "dumb"])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("around", ["a{}b", "`a{}b`", "```{}\na{}b\n```", "[a{}b](http://{}x)"])
def test_no_control_of_the_model_reaches_the_terminal(
    talk: Talk,
    scripted: Callable[..., Scripted],
    monkeypatch: pytest.MonkeyPatch,
    control: str,
    around: str,
    term: str,
) -> None:
    monkeypatch.setenv("TERM", term)
    out = talk(scripted([*around.replace("{}", control)]), "hello", out=Terminal()).out
    ours = re.sub(r"\x1b\[([0-9;]*m|\?25[lh]|1A|2K)|\r\x1b\[2K", "", out)
    assert printable(ours.replace("\r", "")) == ours.replace("\r", "")


def test_rich_markup_is_text(talk: Talk, scripted: Callable[..., Scripted]) -> None:
    output = talk(scripted(["[red]a[/red] :smile:"]), "hello", out=Terminal()).out
    assert "[red]a[/red] :smile:" in shown(output)


def test_a_dumb_terminal_gets_plain_text(
    talk: Talk, scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert talk(scripted(["**o", "ne**"]), "hello", out=Terminal()).out == "> **one**\n> \n"


def test_an_empty_answer_leaves_no_trace(talk: Talk, scripted: Callable[..., Scripted]) -> None:
    result = talk(scripted(["\n"]), "hello", "again", out=Terminal())
    assert shown(result.out) == "Yes.\n>\n"


BITS = [
    "a",
    " ",
    "\n",
    "\n\n",
    "- ",
    "1. ",
    "# ",
    "> ",
    "```",
    "|",
    "--",
    "    ",
    "*",
    "b\n",
    "=\n",
]


@given(st.lists(st.sampled_from(BITS), max_size=30))
def test_blocks_are_the_text(bits: list[str]) -> None:
    """Joined they are what was fed, whatever it is and however it is cut."""
    blocks = Blocks()
    parts = [part for bit in bits for part in blocks.feed(bit)]
    assert "".join(parts) + blocks.open == "".join(bits)


@given(st.lists(st.sampled_from(BITS), max_size=30))
def test_the_screen_ends_as_if_it_came_at_once(bits: list[str]) -> None:
    """Growing leaves nothing behind."""
    outs = [Terminal(), Terminal()]
    for out, pieces in zip(outs, [bits, ["".join(bits)]], strict=True):
        with MarkdownScreen(out) as screen:
            for piece in pieces:
                screen.write(piece)
    first, second = (shown(out.getvalue()).rstrip() for out in outs)
    assert first == second


# The command line --------------------------------------------------------------------------------


def test_the_options_reach_the_model(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue("endless")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    options = ["--model", str(folder), "--max-new-tokens", "3", "--system", "Be brief."]
    assert main(["chat", *options]) == 0
    assert capsys.readouterr().out == "AAA\n"


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["hello"], 2, "hello"),
        (["--raw"], 2, "--raw"),
        (["--temperature", "-1"], 2, "temperature=-1.0"),
        (["--model", "./no-such-folder"], 1, "./no-such-folder"),
        (["--base-url", "gpu:8000"], 2, "base_url='gpu:8000' is no address"),
        ([*THERE, "--dtype", "float32"], 2, "dtype='float32' says how to run weights here"),
        ([*THERE, "--device-map", "cpu"], 2, "device_map='cpu' says how to run weights here"),
        ([*THERE, "--preset", "memory"], 2, "leave it out, and tell the server"),
        ([*THERE, "--tokenizer", "./no-such-folder"], 1, "./no-such-folder"),
        (["--tokenizer", "demo"], 2, "give its base_url too"),
        ([*THERE, "--api-key", "sk-0"], 2, "--api-key"),
    ],
)
def test_what_is_wrong_from_the_start_ends_it(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    says: str,
) -> None:
    """Before anything is read."""
    monkeypatch.setattr(sys, "stdin", Terminal("never read\n"))
    assert main(["chat", *arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err.splitlines()[-1]


def test_a_reader_that_leaves_ends_a_pipe(request: pytest.FixtureRequest) -> None:
    command = [*test_cli.COMMAND, "chat", "--model", str(request.getfixturevalue("endless"))]
    with subprocess.Popen(
        command,
        env=test_cli.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        assert process.stdout.read(1) == b"A"
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait() == 141
    assert b"Traceback" not in err


# A server ----------------------------------------------------------------------------------------

KEY = "sk-0123456789abcdef"


@pytest.fixture
def chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """`chat(url, option, ..., asked=[...], key="")`: the command line, its questions in a pipe."""

    def call(url: str, *options: str, asked: list[str], key: str | None = None) -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in asked)))
        monkeypatch.delenv("GEMMA2_STREAM_API_KEY", raising=False)
        if key is not None:
            monkeypatch.setenv("GEMMA2_STREAM_API_KEY", key)
        capsys.readouterr()
        status = main(["chat", "--base-url", url, "--tokenizer", "demo", *options])
        return Result(status, *capsys.readouterr())

    return call


def test_a_server_answers_as_the_engine_in_process(
    chat: Talk, talk: Talk, demo_engine: Gemma2Engine
) -> None:
    """The same text, and the server saw each question once."""
    asked = ["Who are you?", "你是谁"]
    with serving(demo_engine, keys=Keys([KEY])) as server:
        there = chat(f"{server.url}/v1", "--model", "served", asked=asked, key=KEY)
    # Its log is whole when it has stopped.
    assert [line["status"] for line in server.said("/v1/completions")] == [200, 200]
    assert there == talk(demo_engine, *asked)
    assert there.out.count("\n") >= 2


@pytest.mark.parametrize("key", [None, "", "another"])
def test_a_server_that_wants_a_key_gets_that_of_its_own_variable(
    chat: Talk, demo_engine: Gemma2Engine, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    """Never OpenAI's, though that would be the right one here."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(demo_engine, keys=Keys([KEY])) as server:
        status, out, err = chat(f"{server.url}/v1", "--model", "served", asked=["a", "b"], key=key)
    assert (status, out) == (1, "")
    lines = err.splitlines()
    assert len(lines) == 2  # a question that fails does not end the conversation
    assert all("refuses the key" in line for line in lines)


def test_without_a_server_the_key_goes_nowhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to a hub, which is asked with `api_key` where there is no server."""
    made: list[ChatGemma2] = []
    monkeypatch.setenv("GEMMA2_STREAM_API_KEY", KEY)
    monkeypatch.setattr(terminal_chat, "run", lambda chat, **_: made.append(chat) or 0)
    assert main(["chat"]) == 0
    assert [chat.api_key for chat in made] == [None]


def test_an_answer_that_breaks_off_is_told_and_kept(chat: Talk, demo_engine: Gemma2Engine) -> None:
    """The next question goes over with it, and with the system prompt and the options."""
    with Wire([HEAD, text("Hel")], WHOLE) as wire:
        options = ["--model", "m", "--seed", "7", "--system", "Be brief."]
        status, out, err = chat(wire.url, *options, asked=["a", "b"])
    said = ["Be brief.\n\na", "Hel", "b"]
    roles = ["user", "assistant", "user"]
    turns = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    assert wire.asked[1]["prompt"] == demo_engine.encode(turns)
    assert [asked["seed"] for asked in wire.asked] == [7, 7]
    assert (status, out) == (1, "Hel\nHello\n")
    assert err.startswith(f"gemma2-stream: the server at {wire.url} ended the answer")
    assert err.count("\n") == 1


def test_a_model_that_the_server_does_not_have_is_told_with_those_that_it_has(chat: Talk) -> None:
    with Wire() as wire:
        status, out, err = chat(wire.url, "--model", "demo", asked=["a"])
    assert (status, out) == (1, "")
    assert "has no model 'demo', but 'm'" in err


def test_ctrl_c_closes_the_connection_and_keeps_the_conversation(
    stderr: Stderr, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(sys, "stdin", Terminal("first\nsecond\n"))

    def press() -> None:
        out.wait_for("Hel")
        press_ctrl_c(seen=stderr.stopped)

    presses = threading.Thread(target=press, daemon=True)
    presses.start()
    with Wire([HEAD, text("Hel"), threading.Event()], WHOLE) as wire:
        assert run(wire.model(ChatGemma2), system=None, out=out) == 0
        wait(wire.left)
    presses.join()
    assert shown(out.getvalue()).split() == ["Hel", "Hello", ">"]
    assert "Stopped." in stderr.getvalue()


class Session:
    """A real process on a real terminal, driven by keys."""

    def __init__(self, *arguments: str) -> None:
        self.shown = b""
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))

        def own_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        environment = test_cli.environment(TERM="xterm-256color")
        for name in ("COLUMNS", "LINES"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [*test_cli.COMMAND, "chat", *arguments],
            env=environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=own_terminal,
        )
        os.close(theirs)

    def type(self, keys: bytes) -> None:
        self.shown = b""
        os.write(self._ours, keys)

    def wait_for(self, text: bytes) -> None:
        """Until `text` is shown after what was typed last."""
        deadline = time.monotonic() + 60
        while text not in self.shown:
            ready, _, _ = select.select([self._ours], [], [], max(0, deadline - time.monotonic()))
            assert ready, self.shown
            self.shown += os.read(self._ours, 4096)

    def interrupt(self, text: bytes) -> None:
        """Ctrl-C at the prompt. One just before readline waits for keys is seen at the next signal,
        such as that of a resized window; another Ctrl-C counts, unless the first is lost for good.
        """
        self.shown = b""
        with contextlib.suppress(OSError):  # how Linux says that nobody writes to it any more
            for second in range(60):
                if second % 20 == 0:
                    os.write(self._ours, b"\x03")
                while text not in self.shown and select.select([self._ours], [], [], 1)[0]:
                    self.shown += os.read(self._ours, 4096)
                if text in self.shown:
                    return
                self.process.send_signal(signal.SIGWINCH)

    def status(self) -> int:
        try:
            while os.read(self._ours, 4096):
                pass
        except OSError:  # how Linux says that nobody writes to it any more
            pass
        return self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    session = Session("--model", str(request.getfixturevalue("endless")))
    yield session
    session.close()


def test_a_real_terminal(session: Session, tmp_path: Path) -> None:
    """Ctrl-C stops an answer that would fill the context, twice; lines can be edited."""
    path = tmp_path / "talk.json"
    session.wait_for(b"> ")
    for question in (b"hellx\x7fo\r", b"again\r"):
        session.type(question)
        session.wait_for(b"AAAA")
        session.type(b"\x03")
        session.wait_for(b"Stopped.")
        session.wait_for(b"> ")
    session.type(f"/save {path}\r".encode())
    session.wait_for(b"Saved")
    session.wait_for(b"> ")
    session.type(b"\x04")
    assert session.status() == 0
    turns = json.loads(path.read_text("utf-8"))
    assert [turn["content"].strip("A") for turn in turns] == ["hello", "", "again", ""]
    assert all(0 < len(turn["content"]) < test_cli.CONTEXT // 2 for turn in turns)
    assert turns[1]["finish_reason"] == "cancelled"


def test_ctrl_c_at_the_prompt_hints_and_twice_leaves(session: Session) -> None:
    session.wait_for(b"> ")
    session.type(b"half a line")
    session.wait_for(b"half a line")
    session.interrupt(b"Ctrl-C once more leaves")
    session.wait_for(b"> ")
    session.type(b"/help\r")  # which begins the count anew
    session.wait_for(b"/save FILE")
    session.wait_for(b"> ")
    session.interrupt(b"Ctrl-C once more leaves")
    session.wait_for(b"> ")
    session.interrupt(b"the end")
    assert session.status() == 130


def test_exit_on_a_terminal(session: Session) -> None:
    session.wait_for(b"> ")
    session.type(b"/exit\r")
    assert session.status() == 0
