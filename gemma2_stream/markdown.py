"""Markdown on a terminal while it is being written: finished blocks stand, the open one grows.

Knows rich and markdown-it; no model, no conversation, and no file but the terminal it is given.
"""

from __future__ import annotations

import functools
import itertools
import re
import time
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token
    from rich.console import Console, ConsoleRenderable
    from rich.segment import Segment

# C0 without \t and \n, DEL, and C1: what a terminal obeys instead of showing.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
SLOW = 0.02
"""Seconds of drawing from which on not every token is drawn at once."""


def printable(text: str) -> str:
    """`text` without the characters that a terminal obeys; newlines and tabs stay."""
    return _CONTROLS.sub("", text)


def animated(out: IO[str]) -> bool:
    """Whether what is shown on `out` can be replaced: a terminal, and not a dumb one."""
    console = _console(out)
    return out.isatty() and console.is_terminal and not console.is_dumb_terminal


class Blocks:
    """Text in pieces to whole blocks of Markdown: a paragraph, a list, a table, a piece of code.

    A block is finished when the next one has begun. `open` is the source of the one that has not.
    """

    def __init__(self) -> None:
        self.open = ""

    def feed(self, text: str) -> list[str]:
        """The blocks that `text` finishes."""
        self.open += text
        if "\n" not in text:
            return []
        # What half a line will be, nobody knows: "*" may begin a list, "**" something bold.
        end = self.open.rindex("\n") + 1
        *finished, last = _split(self.open[:end])
        self.open = last + self.open[end:]
        return finished

    def flush(self) -> list[str]:
        """What is left, at the end of the text."""
        last, self.open = self.open, ""
        return _split(last)


class MarkdownScreen:
    """A context in which `write` shows Markdown as it grows; leaving it completes what is shown.

    Of an open block that is higher than the terminal, the end is shown; once it is finished, all of
    it stands in the scrollback.
    """

    def __init__(self, out: IO[str]) -> None:
        from rich.live import Live
        from rich.text import Text

        self._blocks = Blocks()
        self._printed = False
        self._drawn = self._took = 0.0
        self._live = Live(
            Text("…", style="dim"),
            console=_console(out),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="visible",  # it never does: see `write`
        )

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._draw(self._blocks.flush())
        finally:
            self._live.stop()

    def write(self, text: str) -> None:
        """Show `text`, which goes on where the last one ended."""
        finished = self._blocks.feed(printable(text))
        began = time.monotonic()
        # Drawing that takes long must not hold up the tokens: it gets half of the time at most.
        if finished or self._took < SLOW or began - self._drawn > self._took:
            self._draw(finished)
            self._drawn = time.monotonic()
            self._took = self._drawn - began

    def _draw(self, finished: list[str]) -> None:
        from rich.segment import SegmentLines

        console = self._live.console
        with console:  # in one write, so nothing is seen twice
            if lines := self._lines(finished):
                console.print(SegmentLines(lines, new_lines=True))
                self._printed = True
            if self._printed or self._blocks.open.strip():
                room = max(1, console.height - 1)
                lines = self._lines(_split(_shortened(self._blocks.open, room)))
                last = lines[-room:] or [[]]  # Live cannot go back over nothing
                self._live.update(SegmentLines(last, new_lines=True), refresh=True)

    def _lines(self, blocks: list[str]) -> list[list[Segment]]:
        """The lines of `blocks`, and an empty one before each but the first of the answer."""
        found: list[list[Segment]] = []
        for block in blocks:
            lines = self._live.console.render_lines(_renderable(block), pad=False)
            shown = [number for number, line in enumerate(lines) if not _blank(line)]
            if shown:
                found += [[]] if found or self._printed else []
                found += lines[shown[0] : shown[-1] + 1]
        return found


def _blank(line: list[Segment]) -> bool:
    """Whether `line` shows nothing: no text, and no background such as that of code."""
    return not any(s.text.strip() or (s.style and s.style.bgcolor) for s in line)


def _console(out: IO[str]) -> Console:
    from rich.console import Console

    return Console(file=out, highlight=False, markup=False, emoji=False)


def _split(source: str) -> list[str]:
    """The source of each block; joined, they are `source`."""
    starts = [t.map[0] for t in _parsed(source) if t.map and not t.level and t.nesting >= 0]
    lines = re.findall(r"[^\n]*\n|[^\n]+", source)  # as Markdown counts them
    borders = [0, *starts[1:], len(lines)]
    return ["".join(lines[start:end]) for start, end in itertools.pairwise(borders)]


def _shortened(source: str, room: int) -> str:
    """`source`, but of long code only what can be seen: to colour all of it takes long."""
    first, *rest = re.findall(r"[^\n]*\n|[^\n]+", source) or [""]
    if len(rest) > room and first.startswith(("```", "~~~")):
        rest = rest[-room - 1 :]  # of which the last may close it, and not be shown
    return "".join([first, *rest])


def _renderable(source: str) -> ConsoleRenderable:
    from rich.markdown import Markdown

    # An address that is not seen could lead anywhere, so links show theirs.
    shown = Markdown(source, hyperlinks=False)
    shown.parsed = _parsed(source)
    return shown


@functools.cache
def _parser() -> MarkdownIt:
    """CommonMark and tables, without what rich would leave out: that stays text."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    return parser.disable(["reference", "image", "autolink"])


def _parsed(source: str) -> list[Token]:
    tokens = _parser().parse(source)
    for child in (child for token in tokens for child in token.children or ()):
        if child.type == "softbreak":
            child.type = "hardbreak"  # a model that ends a line means it
    return tokens
