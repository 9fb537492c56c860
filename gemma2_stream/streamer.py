"""What `model.generate` writes into: the streamer that is the stopping criterion too.

`generate` shows a stopping criterion each new token before it puts it into the streamer, so one
object in both places sees each id once, at the step that made it, and can end a row in that step.
Knows the channel's writing end, and nothing of who reads it.
"""

from __future__ import annotations

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

    `stop_ids` maps the ids that end the row to the stop each spells, or None for an end of turn;
    a `constraint` ends it too, when its grammar is complete.
    """

    def __init__(
        self,
        channel: Channel,
        index: int,
        detokenizer: Detokenizer,
        stop_ids: dict[int, str | None],
        limit: int,
        constraint: Constraint | None = None,
    ) -> None:
        self.done = False
        self.channel = channel
        self.request = request = channel.requests[index]
        self.limit = limit
        self.constraint = constraint
        self.chooser = Chooser(request, constraint)
        self._index = index
        self._detokenizer = detokenizer
        self._stop_ids = stop_ids
        self._stop = StopFilter([s for s in request.params.stop if s not in stop_ids.values()])
        self._prompt_tokens = len(request.prompt_ids)
        self._completion_tokens = 0

    def feed(self, token_id: int) -> None:
        """Take the next id, and send what text it completes, or the verdict it brings."""
        self._completion_tokens += 1
        if token_id in self._stop_ids:
            self.finish(self._whole, stop=self._stop_ids[token_id])
            return
        text = self._stop.feed(self._detokenizer.feed(token_id))
        if self._stop.matched is not None:
            self._verdict(text, "stop", self._stop.matched)
        elif self.constraint is not None and self.constraint.done:
            self.finish(self._whole, text)
        elif self._completion_tokens >= self.limit:
            self.finish("length", text)
        elif text:
            self.channel.put(Chunk(self._index, text))

    @property
    def _whole(self) -> FinishReason:
        """Why an answer ends that is whole; one that its limit made so has ended by that."""
        return "length" if self.constraint is not None and self.constraint.cut else "stop"

    def finish(self, reason: FinishReason, text: str = "", stop: str | None = None) -> None:
        """Nothing more comes: send what was held back, and the verdict."""
        text += self._stop.feed(self._detokenizer.flush())
        if self._stop.matched is not None:
            self._verdict(text, "stop", self._stop.matched)
        else:
            self._verdict(text + self._stop.flush(), reason, stop)

    def _verdict(self, text: str, reason: FinishReason, stop: str | None) -> None:
        self.done = True
        if self.constraint is not None:
            self.constraint.done = True  # what the other rows' steps bring here counts no more
        usage = Usage(self._prompt_tokens, self._completion_tokens)
        self.channel.put(Chunk(self._index, text, reason, stop, usage))


class TokenStreamer(TextIteratorStreamer, StoppingCriteria):
    """Streams every row of one `model.generate`, whatever its batch size, to the row's channel.

    The stock streamer holds text back to the last space, takes one row, and decodes the line anew
    for each token; here the text of a token goes to its row's channel at the token's own step.
    `prefilled` is called when the first token is there, `step_done` at each step.
    """

    def __init__(
        self,
        tokenizer: Any,
        rows: Sequence[Row],
        prefilled: Callable[[], object],
        step_done: Callable[[Sequence[Row]], object],
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self._rows = rows
        self._prefilled = prefilled
        self._step_done = step_done
        self._seen = 0
        self._done: list[bool] = []
        self._done_tensor: torch.Tensor

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Take the new columns of `input_ids` (rows, tokens); True for each row that is done."""
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            self._prefilled()
        columns = input_ids[:, self._seen :].tolist()
        self._seen = input_ids.shape[1]
        for row, ids in zip(self._rows, columns, strict=True):
            if row.channel.cancelled and not row.done:
                row.finish("cancelled")
            for token_id in ids:
                if not row.done:
                    row.feed(token_id)
        self._step_done(self._rows)
        return self._flags(input_ids.device)

    def _flags(self, device: torch.device) -> torch.Tensor:
        """Which rows are done, shape (rows,); made anew only when a row has ended."""
        done = [row.done for row in self._rows]
        if done != self._done:
            self._done, self._done_tensor = done, torch.tensor(done, device=device)
        return self._done_tensor

    def put(self, value: torch.Tensor) -> None:
        """`generate` puts the prompt first; every later token was taken by the criterion."""
        if self._seen == 0:
            self._seen = value.shape[-1]

    def end(self) -> None:
        """`generate` is over, or nobody reads: rows without a verdict get theirs."""
        for row in self._rows:
            if not row.done:
                row.finish("cancelled" if row.channel.cancelled else "length")
