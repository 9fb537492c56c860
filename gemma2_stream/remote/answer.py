"""One answer, as the events of a server make it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ServerError
from ..stop import StopFilter
from ..types import Chunk, FinishReason, Request, Usage
from .failures import gibberish


class Answer:
    """One answer, as the server's events make it. Without input or output."""

    def __init__(
        self, index: int, request: Request, control_stops: Mapping[int, str], base_url: str
    ) -> None:
        self.request = request
        self.control_stops = control_stops
        self.text = ""
        self.over = False
        self._index = index
        self._base_url = base_url
        self._stop = StopFilter(())
        self._reason: str | None = None
        self._stopped_by: int | str | None = None
        self._usage: Usage | None = None

    def filter_stops(self, here: bool) -> None:
        """Whether the text is to be cut `here`."""
        self._stop = StopFilter(self.request.params.stop if here else ())

    def feed(self, event: Any) -> Chunk | None:
        """The text of a `Completion`, or None where it brings none. Raises ServerError."""
        try:
            said = self._read(event)
        except (AttributeError, TypeError) as error:  # the client checks no types
            raise gibberish(self._base_url) from error
        self.text += said
        text = self._stop.feed(said)
        return Chunk(self._index, text) if text else None

    def _read(self, event: Any) -> str:
        said = ""
        for choice in event.choices:
            said += choice.text
            if choice.finish_reason is not None:
                self._reason = choice.finish_reason
                self._stopped_by = getattr(choice, "stop_reason", None)
        if (usage := event.usage) is not None:
            cached = usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens
            self._usage = Usage(usage.prompt_tokens, usage.completion_tokens, cached or 0)
        return said

    def verdict(self) -> Chunk:
        """The last chunk. Raises ServerError for an answer that did not end, or ended otherwise."""
        if self._usage is None or self._reason not in ("stop", "length"):
            raise ServerError(
                f"the server at {self._base_url} ended the answer with finish_reason="
                f"{self._reason!r} and {'no' if self._usage is None else 'a'} usage, so that it "
                "may be cut: ask again"
            )
        self.over = True
        rest, stop = self._stop.flush(), self._stop.matched
        if stop is not None:
            return Chunk(self._index, rest, "stop", stop, self._usage)
        by = self._stopped_by
        stop = self.control_stops.get(by) if isinstance(by, int) else by
        reason: FinishReason = "stop" if self._reason == "stop" else "length"
        return Chunk(self._index, rest, reason, stop, self._usage)

    def cancelled(self, ids: Sequence[int]) -> Chunk:
        """The last chunk of an answer that got as far as `ids`, since no server counted them."""
        usage = Usage(len(self.request.prompt_ids), len(ids))
        return Chunk(self._index, self._stop.flush(), "cancelled", usage=usage)
