"""Who decodes when: requests join the rows that are decoding, and leave them as soon as they end.

Between two calls of `model.generate`, newcomers are prefilled chunk by chunk, rows that have ended
go, and what they leave is kept for the next turn of their conversation. A call ends only when there
is something to do: a lone request is one call.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from .batch import PREFILL_CHUNK, Batch, Cancelled
from .kv import KVCache, States, SteppedCache
from .prefixes import PrefixCache, common_length
from .speculation import Drafter
from .stream import Channel
from .streamer import Row

logger = logging.getLogger(__name__)

# A reader this many chunks behind has stopped reading: the model waits, unless others wait for it.
MAX_UNREAD = 256

# A newcomer whose prompt begins with this many tokens of another's waits until those are cached.
_WORTH_WAITING = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """`max_rows` decode together, and hold at most `max_cached_tokens` (rows times the longest of
    them), each of `token_bytes` bytes; a lone row may have more. Rows can `join` others, or each
    runs alone.
    """

    max_rows: int
    max_cached_tokens: int
    token_bytes: int
    join: bool


class Scheduler:
    """Serves rows until there are none left; on the worker alone.

    `arrivals` gives the rows that have come since it was last called, and `arrived` says whether
    any have; `left` is called with a channel when the last of its rows is gone, and their memory;
    `stepped` at least once between two forwards.
    A `cache` that outlives the scheduler takes one row at a time, and is empty between them.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: GenerationConfig,
        prefixes: PrefixCache,
        limits: Limits,
        *,
        cache: Cache | None = None,
        drafters: Sequence[Drafter] = (),
        arrivals: Callable[[], Iterable[Row]],
        arrived: Callable[[], bool],
        left: Callable[[Channel], object],
        stepped: Callable[[], object],
    ) -> None:
        self._config = config
        self._prefixes = prefixes
        self._limits = limits
        self._arrivals = arrivals
        self._arrived = arrived
        self._left = left
        self._stepped = stepped
        self._waiting: deque[Row] = deque()
        self._rows_left: Counter[Channel] = Counter()
        # Whether waiting rows may be admitted one step from now, with no row gone.
        self._held_back = False
        self._device = model.get_input_embeddings().weight.device

        def make_cache() -> Cache:
            if cache is not None:
                return cache
            return KVCache() if limits.join else SteppedCache(config=model.config)

        self._joining = Batch(model, tokenizer, make_cache, drafters)
        self._decoding = Batch(model, tokenizer, make_cache, drafters)

    def run(self) -> None:
        """Serve everything that arrives, until nothing is left. Whatever happens, streams end."""
        try:
            while self._admitted():
                self._prefill()
                self._decode()
                self._stepped()
        except BaseException as error:
            for batch in (self._joining, self._decoding):
                self._waiting.extend(batch.rows)
                batch.clear()
            _clear_frames(error)
            for row in self._waiting:
                row.fail(error)
                self._leave(row)

    # Admission ------------------------------------------------------------------------------

    def _admitted(self) -> bool:
        """Let newcomers in, if there is room; whether there is anything to do."""
        for row in self._arrivals():
            self._waiting.append(row)
            self._rows_left[row.channel] += 1
        if not self._joining.rows:
            self._guarded(self._joining, self._admit)
        return bool(self._joining.rows or self._decoding.rows or self._waiting)

    def _admit(self) -> None:
        """Begin with the rows that have waited longest; none overtakes another."""
        self._held_back = False
        for row in [row for row in self._waiting if row.channel.cancelled and not _wanted(row)]:
            self._waiting.remove(row)
            self._leave(row)
        joining = self._joining
        states: list[list[States]] = []
        rests: list[int] = []
        while self._waiting:
            row = self._waiting[0]
            if not _wanted(row):
                self._leave(self._waiting.popleft())
                continue
            if not self._fits([*self._decoding.rows, *joining.rows, row]):
                break
            known, pieces = self._known(row)
            if self._better_later(row, known, rests):
                self._held_back = True
                break
            joining.rows.append(self._waiting.popleft())
            states.append(pieces)
            rests.append(len(row.ids) - known)
        if states:
            joining.load(list(zip(joining.rows, states, strict=True)), max(rests))
            for row in joining.rows:
                if row.cached_tokens is None:
                    row.cached_tokens = joining.cached(row)

    def _fits(self, rows: Sequence[Row]) -> bool:
        """Whether the last of `rows` may join the others."""
        if len(rows) == 1:
            return True
        together = self._limits.join and not any(row.alone for row in rows)
        if not together or len(rows) > self._limits.max_rows:
            return False
        # One more for each, so that it is not taken out again at the first step.
        more = self._tokens(rows) + len(rows)
        grown = (more - self._tokens(self._decoding.rows)) * self._limits.token_bytes
        return more <= self._limits.max_cached_tokens and grown <= free_bytes(self._device)

    def _tokens(self, rows: Sequence[Row]) -> int:
        return len(rows) * max((len(row.ids) for row in rows), default=0)

    def _known(self, row: Row) -> tuple[int, list[States]]:
        """How many of the row's tokens need no prefill, and their states. One must be fed."""
        ids = row.ids[:-1]
        if not self._limits.join:
            return 0, []
        known, pieces = self._prefixes.find(ids)
        for other in self._decoding.rows:
            if common_length(ids, other.ids[:-1]) >= known + _WORTH_WAITING:
                self._remember(other)
                known, pieces = self._prefixes.find(ids)
        return known, pieces

    def _better_later(self, row: Row, known: int, rests: Sequence[int]) -> bool:
        """Whether `row` is prefilled sooner after those that join now, of which `rests` are fed."""
        if self._prefixes.limit and any(
            common_length(row.ids[:-1], other.ids) >= known + _WORTH_WAITING
            for other in self._joining.rows
        ):
            return True
        fed = [*rests, len(row.ids) - known]  # of each, as many columns as of the longest
        return max(fed) * len(fed) > max(PREFILL_CHUNK, 2 * sum(fed))

    # The two kinds of forwards --------------------------------------------------------------

    def _prefill(self) -> None:
        """Feed newcomers one chunk, or let them join the others."""
        joining, decoding = self._joining, self._decoding
        if not joining.rows:
            return
        # The last column is fed together with the others'; alone, `generate` feeds the last chunk.
        enough = 1 if decoding.rows else joining.chunk
        if joining.pending > enough:
            self._guarded(joining, joining.prefill)
        if not joining.rows or joining.pending > enough:
            return
        if decoding.rows:
            self._guarded(decoding, lambda: decoding.join(joining))
        else:
            self._joining, self._decoding = decoding, joining

    def _decode(self) -> None:
        """Let rows go on decoding until there is something else to do; drop those that are done."""
        decoding = self._decoding
        if not decoding.rows:
            return
        self._guarded(decoding, lambda: decoding.decode(self._config, self._step_done))
        self._drop([row for row in decoding.rows if row.done])
        while self._crowded():
            youngest = decoding.rows[-1]
            self._drop([youngest])
            self._waiting.appendleft(youngest)

    def _step_done(self) -> bool:
        """Whether, after a step in which no row ended, there is something to do but to decode."""
        self._stepped()
        if self._joining.rows or self._held_back or self._crowded():
            return True
        if self._limits.join and self._arrived():  # those that can't join wait for the end
            return True
        if any(row.channel.cancelled for row in self._waiting):
            return True
        # Do not compute for readers that have stopped reading, as long as nobody else is kept.
        rows = self._decoding.rows
        while not self._waiting and not self._arrived() and all(map(_unread, rows)):
            time.sleep(0.02)
        return False

    def _crowded(self) -> bool:
        rows = self._decoding.rows
        return len(rows) > 1 and self._tokens(rows) > self._limits.max_cached_tokens

    def _drop(self, rows: Sequence[Row]) -> None:
        """Take `rows` out of those decoding, and keep what they know."""
        if not rows:
            return
        for row in rows:
            if row.channel.error is None:
                self._remember(row)
        others = [row for row in self._decoding.rows if row not in rows]
        self._guarded(self._decoding, lambda: self._decoding.keep(others))
        for row in rows:
            if row.done:
                self._leave(row)

    def _remember(self, row: Row) -> None:
        if not self._limits.join or not self._prefixes.limit:
            return
        known = self._decoding.cached(row)
        try:
            self._prefixes.keep(row.ids[:known], self._decoding.states(row))
        except Exception as error:  # no memory for it: nobody needs it
            self._prefixes.clear()
            _clear_frames(error)
            logger.warning("prefixes are forgotten: %r", error)

    def _leave(self, row: Row) -> None:
        self._rows_left[row.channel] -= 1
        if not self._rows_left[row.channel]:
            del self._rows_left[row.channel]
            self._left(row.channel)

    def _guarded(self, batch: Batch, work: Callable[[], object]) -> None:
        """Do `work` for `batch`. An error ends a lone row; several are begun anew, each alone, so
        that whichever of them caused it hurts only itself.
        """
        before = len(batch.rows)
        try:
            work()
        except (Cancelled, Exception) as error:
            rows = batch.rows
            batch.clear()
            _clear_frames(error)
            live = [row for row in rows if not row.done]
            if isinstance(error, Cancelled):
                for row in live:
                    row.cancel()
            elif max(before, len(rows)) == 1:
                for row in live:
                    row.fail(error)
            again = [row for row in rows if not row.done]
            for row in reversed(again):
                row.alone = True
                self._waiting.appendleft(row)
            for row in rows:
                if row.done:
                    self._leave(row)
            if again:  # last, since a handler may raise
                logger.warning("%d requests are begun anew, each alone: %r", len(again), error)


def _wanted(row: Row) -> bool:
    """Whether a row that waited is still to be served; if not, its reader knows."""
    if not row.channel.start():
        row.done = True
    elif row.channel.cancelled:
        row.cancel()
    return not row.done


def _unread(row: Row) -> bool:
    """Whether the reader of `row` has stopped reading, and still may go on."""
    return row.channel.unread() >= MAX_UNREAD and not row.channel.cancelled


def free_bytes(device: torch.device) -> int:
    """Memory that more keys and values may take on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)


def _clear_frames(error: BaseException | None) -> None:
    """Let go of the locals of every frame that `error` and its causes went through: they would keep
    the KV cache alive for as long as someone keeps the error.
    """
    seen: set[int] = set()  # causes may be set by hand, in a circle too
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
