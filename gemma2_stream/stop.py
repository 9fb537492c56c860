"""Stop strings on streamed text. Pure: knows text, not tokens.

stop = StopFilter(["\\nHuman:"])
stop.feed("Hi\\nHu")     # "Hi"       "\\nHu" could still become the stop, so it is held
stop.feed("man: ")      # ""         stop.matched == "\\nHuman:", the rest is dropped
stop.flush()            # ""         or what was held, when the answer ended another way
"""

from __future__ import annotations

from collections.abc import Sequence


class _Matcher:
    """Knuth, Morris and Pratt's automaton for one stop: how much of it the text now ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.state = 0
        # fallback[n]: the longest proper border of stop[:n], where to go on after a mismatch.
        self.fallback = [0, 0]
        for char in stop[1:]:
            self.fallback.append(self._next(self.fallback[-1], char))

    def _next(self, state: int, char: str) -> int:
        while state and self.stop[state] != char:
            state = self.fallback[state]
        return state + 1 if self.stop[state] == char else 0

    def step(self, char: str) -> bool:
        """Read one character; True when the stop is complete."""
        self.state = self._next(self.state, char)
        return self.state == len(self.stop)


class StopFilter:
    """Cuts text before the stop that completes first (of two that complete together, the longer).

    It reads one character at a time, so where the text is cut does not depend on how it was split
    into chunks, and it holds back only what could still become a stop.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        # Longest first: of two that end on the same character the longer began earlier.
        self._matchers = [_Matcher(stop) for stop in sorted(stops, key=len, reverse=True)]
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Take the next text, return what is certain to stay. Nothing after a match."""
        if self.matched is not None:
            return ""
        if not self._matchers:
            return text
        buffer = self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            for matcher in self._matchers:
                if matcher.step(char):
                    self.matched = matcher.stop
                    self._held = ""
                    return buffer[: end - len(matcher.stop)]
        keep = len(buffer) - max(matcher.state for matcher in self._matchers)
        self._held = buffer[keep:]
        return buffer[:keep]

    def flush(self) -> str:
        """The text ended: what was held is text after all."""
        held, self._held = self._held, ""
        return held
