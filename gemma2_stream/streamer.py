"""What `model.generate` writes into: the streamer that is the stopping criterion too.

`generate` shows a stopping criterion each new token before it puts it into the streamer, so one
object in both places sees each id once, at the step that made it, and can end a row in that step.
Knows the channel's writing end, and nothing of who reads it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, TextIteratorStreamer

from .detokenizer import Detokenizer
from .grammar import Constraint
from .sampling import Chooser
from .stop import StopFilter
from .stream import Channel
from .types import Chunk, FinishReason, Usage


class Row:
    """One request on its way from ids to chunks: detokenizer, then stop filter, then channel.

    `ids` are the prompt's and those chosen since; `stop_ids` maps the ids that end the row to the
    stop each spells, or None for an end of turn; a `constraint` ends it too, when its grammar is
    complete. `cached_tokens` of the prompt cost no prefill. It may go through several `generate`s.
    """

    def __init__(
        self,
        channel: Channel,
        index: int,
        detokenizer: Detokenizer,
        stop_ids: dict[int, str | None],
        limit: int,
        constraint: Callable[[], Constraint] | None = None,
    ) -> None:
        self.done = False
        self.alone = False  # an error beside others: what it did not do to them must not hurt it
        self.channel = channel
        self.request = request = channel.requests[index]
        self.ids = [*request.prompt_ids]
        self.cached_tokens: int | None = None
        self._limit = limit
        self._make_constraint = constraint
        self._index = index
        self._detokenizer = detokenizer
        self._stop_ids = stop_ids
        self._stop = StopFilter([s for s in request.params.stop if s not in stop_ids.values()])

    @functools.cached_property
    def chooser(self) -> Chooser:
        return Chooser(self.request, self._constraint)

    @functools.cached_property
    def _constraint(self) -> Constraint | None:
        """Made when the row's turn comes: that takes a while."""
        return self._make_constraint and self._make_constraint()

    @property
    def left(self) -> int:
        """How many tokens may still come."""
        return self._limit - self._completion_tokens

    @property
    def _completion_tokens(self) -> int:
        return len(self.ids) - len(self.request.prompt_ids)

    def take(self, token_id: int) -> None:
        """Take the next id, unless nobody wants it any more; an error ends the row."""
        if self.channel.cancelled and not self.done:
            self.cancel()
        if self.done:
            self.ids.append(token_id)  # the cache counts it all the same
            return
        try:
            self.feed(token_id)
        except Exception as error:
            self.fail(error)

    def feed(self, token_id: int) -> None:
        """Take the next id, and send what text it completes, or the verdict it brings."""
        self.ids.append(token_id)
        if token_id in self._stop_ids:
            self.finish(self._whole, stop=self._stop_ids[token_id])
            return
        text = self._stop.feed(self._detokenizer.feed(token_id))
        if self._stop.matched is not None:
            self._verdict(text, "stop", self._stop.matched)
        elif self._constraint is not None and self._constraint.done:
            self.finish(self._whole, text)
        elif self.left <= 0:
            self.finish("length", text)
        elif text:
            self.channel.put(Chunk(self._index, text))

    @property
    def _whole(self) -> FinishReason:
        """Why an answer ends that is whole; one that its limit made so has ended by that."""
        return "length" if self._constraint is not None and self._constraint.cut else "stop"

    def finish(self, reason: FinishReason, text: str = "", stop: str | None = None) -> None:
        """Nothing more comes: send what was held back, and the verdict."""
        text += self._stop.feed(self._detokenizer.flush())
        if self._stop.matched is not None:
            self._verdict(text, "stop", self._stop.matched)
        else:
            self._verdict(text + self._stop.flush(), reason, stop)

    def cancel(self) -> None:
        """Nobody wants more."""
        try:
            self.finish("cancelled")
        except Exception as error:  # the tokenizer's, of what was held back
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Nothing more comes: the stream raises `error`."""
        self.done = True
        self.channel.fail(error)

    def _verdict(self, text: str, reason: FinishReason, stop: str | None) -> None:
        self.done = True
        prompt_tokens = len(self.request.prompt_ids)
        usage = Usage(prompt_tokens, self._completion_tokens, self.cached_tokens or 0)
        self.channel.put(Chunk(self._index, text, reason, stop, usage))


class TokenStreamer(TextIteratorStreamer, StoppingCriteria):
    """Streams every row of one `model.generate`, whatever its batch size, to the row's channel.

    The stock streamer holds text back to the last space, takes one row, and decodes the line anew
    for each token; here the text of a token goes to its row's channel at the token's own step.
    `generate` ends when a row is done, or when `step_done`, called at each step, returns True.
    """

    def __init__(self, tokenizer: Any, rows: Sequence[Row], step_done: Callable[[], bool]) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self._rows = rows
        self._step_done = step_done
        self._seen = 0
        self._going: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Take the new columns of `input_ids` (rows, tokens); whether this is all, (rows,)."""
        columns = input_ids[:, self._seen :].tolist()
        self._seen = input_ids.shape[1]
        for row, ids in zip(self._rows, columns, strict=True):
            for token_id in ids:
                row.take(token_id)
        if self._step_done() or any(row.done for row in self._rows):
            return torch.ones(len(self._rows), dtype=torch.bool, device=input_ids.device)
        if self._going is None:
            self._going = torch.zeros(len(self._rows), dtype=torch.bool, device=input_ids.device)
        return self._going

    def put(self, value: torch.Tensor) -> None:
        """`generate` puts the prompt first; every later token was taken by the criterion."""
        if self._seen == 0:
            self._seen = value.shape[-1]

    def end(self) -> None:
        """`generate` is over; a row that is not done goes on in another."""
