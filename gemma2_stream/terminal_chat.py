"""`gemma2-stream chat`: a conversation at the terminal, or line by line through a pipe.

A client of `ChatGemma2` like any other: knows no engine, no thread and no option of the command
line. stdout gets the answers, stderr everything that is said about them.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self, TypeVar

from .errors import Gemma2StreamError, PromptTooLongError
from .markdown import MarkdownScreen, animated, printable

if TYPE_CHECKING:
    from .chat import ChatGemma2

T = TypeVar("T")

PROMPT = "> "
FAILED, INTERRUPTED = 1, 128 + 2

_HELP = """\
/clear      forget the conversation; the system prompt stays
/save FILE  write it as a JSON list of messages with role and content; never overwrites
/help       tell the commands
/exit       leave, as Ctrl-D does
//...       ask something that begins with a slash
Ctrl-C      stop an answer and keep the conversation"""


def run(chat: ChatGemma2, *, system: str | None, out: IO[str]) -> int:
    """Talk until the questions end, and return the exit status."""
    chat.engine  # noqa: B018  # loads, or says what is wrong, before anything is asked
    conversation = Conversation(chat, system=system)
    if sys.stdin is not None and sys.stdin.isatty() and out.isatty():
        return _Terminal(conversation, out).run()
    return _Pipe(conversation, out).run()


class Conversation:
    """Messages as OpenAI spells them, which LangChain reads too, and who answers them."""

    def __init__(self, chat: ChatGemma2, *, system: str | None = None) -> None:
        self._chat = chat
        self._system = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        return [*self._system, *self.turns]

    def ask(self, question: str) -> Generator[str]:
        """The answer, token by token.

        However that ends, what was said is kept; one that was cut is marked with a `finish_reason`
        of "cancelled". A question that got not a word is taken back.
        """
        asked = {"role": "user", "content": question}
        answer = {"role": "assistant", "content": "", "finish_reason": "cancelled"}
        try:
            with contextlib.closing(self._chat.stream([*self.messages, asked])) as chunks:  # type: ignore[type-var]
                for chunk in chunks:
                    answer["content"] += chunk.text
                    yield chunk.text
            del answer["finish_reason"]
        finally:
            if answer["content"] or "finish_reason" not in answer:
                self.turns += [asked, answer]

    def clear(self) -> None:
        self.turns.clear()

    def save(self, path: Path) -> None:
        """Write the messages as JSON. Raises FileExistsError rather than overwrite."""
        text = json.dumps(self.messages, ensure_ascii=False, indent=2)
        with path.open("x", encoding="utf-8") as file:
            file.write(text + "\n")


class _Session:
    """What a terminal and a pipe have in common: questions, commands, and lines on stderr."""

    def __init__(self, conversation: Conversation, out: IO[str]) -> None:
        self.conversation = conversation
        self.out = out
        self.failed = False
        self.ended = False

    def do(self, line: str) -> None:
        """Answer the question or obey the command in `line`."""
        line = line.strip()
        try:
            if line.startswith("/") and not line.startswith("//"):
                self.obey(line)
            elif line:
                self.answer(line[1:] if line.startswith("//") else line)
        except PromptTooLongError as error:
            turns = self.conversation.turns
            self.complain(f"{error}{'; /clear forgets the conversation' if turns else ''}")
        except Gemma2StreamError as error:
            self.complain(str(error))
        except (RuntimeError, MemoryError) as error:  # such as what a long conversation ran out of
            self.complain(f"{type(error).__name__}: {error}")

    def answer(self, question: str) -> None:
        raise NotImplementedError

    def obey(self, line: str) -> None:
        name, rest = [*line.split(maxsplit=1), ""][:2]
        commands: dict[str, Callable[[str], None]] = {
            "/clear": self._clear,
            "/save": self._save,
            "/help": self._help,
            "/exit": self._exit,
        }
        if name not in commands:
            [nearest] = difflib.get_close_matches(name, commands, n=1, cutoff=0)
            self.complain(
                f"there is no {name!r}: did you mean {nearest}? A question that begins with a "
                "slash is written with two"
            )
        elif rest and name != "/save":
            self.complain(f"{name} takes nothing after it, and got {rest!r}")
        else:
            commands[name](rest)

    def _clear(self, _: str) -> None:
        self.conversation.clear()
        self.say("The conversation is forgotten.")

    def _save(self, name: str) -> None:
        if not name:
            return self.complain("/save needs the name of a file: /save talk.json")
        try:
            self.conversation.save(Path(name).expanduser())
        except FileExistsError:
            return self.complain(f"{name!r} is there already: give another name")
        except (OSError, RuntimeError, ValueError) as error:  # an unknown ~user, a NUL
            return self.complain(f"{name!r} cannot be written: {error}")
        return self.say(f"Saved in {name!r}.")

    def _help(self, _: str) -> None:
        self.say(_HELP)

    def _exit(self, _: str) -> None:
        self.ended = True

    def complain(self, text: str) -> None:
        self.failed = True
        self.say(f"gemma2-stream: {' '.join(text.splitlines())}")

    def say(self, text: str) -> None:
        print(printable(text), file=sys.stderr, flush=True)


class _Pipe(_Session):
    """A question a line from stdin; nothing but answers on stdout. Ctrl-C ends it."""

    def run(self) -> int:
        while not self.ended and (line := self._line()):
            self.do(line)
        return FAILED if self.failed else 0

    def _line(self) -> str:
        if sys.stdin is None:  # the caller closed it
            return ""
        if sys.stdin.isatty():  # only the answers are piped on
            print(PROMPT, end="", file=sys.stderr, flush=True)
        return sys.stdin.readline()

    def answer(self, question: str) -> None:
        with (
            _Plain(self.out) as screen,
            contextlib.closing(self.conversation.ask(question)) as tokens,
        ):
            for token in tokens:
                screen.write(token)


class _Terminal(_Session):
    """A prompt with editing, Markdown that grows, and Ctrl-C for the answer alone."""

    def run(self) -> int:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives `input` editing and a history
        self.say("Ask away. /help tells the commands; Ctrl-D leaves.")
        hinted = False
        with _CtrlC() as self.ctrl_c:
            while not self.ended:
                try:
                    line = self.ctrl_c.during(self._line)
                except EOFError:
                    self.out.write("\n")
                    break
                except KeyboardInterrupt:
                    self.out.write("\n")
                    self.out.flush()
                    if hinted:
                        return INTERRUPTED
                    hinted = True
                    self.say("Ctrl-C once more leaves; so does Ctrl-D.")
                    continue
                hinted = False
                self.do(line)
        return 0

    def _line(self) -> str:
        # `input` edits lines only where sys.stdout is the terminal itself.
        with contextlib.redirect_stdout(self.out):
            return input(PROMPT)

    def answer(self, question: str) -> None:
        screen = MarkdownScreen(self.out) if animated(self.out) else _Plain(self.out)
        before = len(self.conversation.turns)
        try:
            with screen, contextlib.closing(self.conversation.ask(question)) as tokens:
                while (token := self.ctrl_c.during(lambda: next(tokens, None))) is not None:
                    screen.write(token)
        except KeyboardInterrupt:
            kept = len(self.conversation.turns) > before
            self.say("Stopped." if kept else "Stopped; the question is taken back.")


class _Plain:
    """A context in which `write` shows text as it is; leaving it ends the line."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._clean: Callable[[str], str] = printable if out.isatty() else str
        self._end = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, BrokenPipeError):
            return
        if not self._end.endswith("\n") and (self._end or error is None):
            self._out.write("\n")
            self._out.flush()

    def write(self, text: str) -> None:
        self._end = text or self._end
        self._out.write(self._clean(text))
        self._out.flush()


class _CtrlC:
    """A context in which Ctrl-C raises KeyboardInterrupt during a wait, and else at the next one.

    So it never cuts a control sequence for the terminal, or the keeping of an answer, in two.
    """

    def __init__(self) -> None:
        self._pressed = self._waiting = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def during(self, wait: Callable[[], T]) -> T:
        self._waiting = True
        try:
            if self._pressed:
                self._pressed = False
                raise KeyboardInterrupt
            return wait()
        finally:
            self._waiting = False

    def _press(self, number: int, frame: Any) -> None:
        if self._waiting:
            self._waiting = False  # a second one must not cut the closing of the answer
            raise KeyboardInterrupt
        self._pressed = True
