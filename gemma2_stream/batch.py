"""Rows that decode together: their ids, the KV cache they share, and the forwards that feed it.

Knows transformers and torch; nothing of who waits.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache

from .kv import CACHE_NAME, KVCache, States
from .sampling import RowLogits
from .streamer import Row, TokenStreamer

if TYPE_CHECKING:
    from .speculation import Drafter

# Prompt tokens in one forward of the prefill, of all rows together. Half as many take a quarter
# longer, twice as many no less, and others wait for them; a cancel is seen between layers.
PREFILL_CHUNK = 1024


class Cancelled(BaseException):
    """Unwinds a forward of the prefill that nobody wants any more; the batch is then of no use."""


class Batch:
    """`rows`, left-padded to a common width, the last `pending` columns of which are still to feed.

    Forwards of `prefill` and `decode` feed them; only `decode` makes tokens, and leaves one column
    pending.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        make_cache: Callable[[], Cache],
        drafters: Sequence[Drafter] = (),
    ) -> None:
        self.rows: list[Row] = []
        self.pending = 0
        self.cache = make_cache()
        self._make_cache = make_cache
        self._drafters = drafters
        self._model = model
        self._tokenizer = tokenizer

    @property
    def width(self) -> int:
        return max((len(row.ids) for row in self.rows), default=0)

    @property
    def chunk(self) -> int:
        """How many columns one forward of the prefill feeds."""
        return max(1, PREFILL_CHUNK // max(1, len(self.rows)))

    def load(self, rows: Iterable[tuple[Row, Sequence[States]]], pending: int) -> None:
        """Hold these rows instead, each with the states of its first tokens, in pieces; of these,
        all but the `pending` last tokens are used.
        """
        entries = list(rows)
        self.rows, self.pending = [row for row, _ in entries], pending
        if isinstance(self.cache, KVCache):
            pieces = [_first(states, self.cached(row)) for row, states in entries]
            self.cache.load(pieces, self.width - pending)

    def cached(self, row: Row) -> int:
        """How many of the row's first tokens are in the cache."""
        return max(0, len(row.ids) - self.pending)

    def states(self, row: Row) -> States:
        """Those tokens' states, as views."""
        assert isinstance(self.cache, KVCache)
        return self.cache.row(self.rows.index(row), self.cached(row))

    def keep(self, rows: Sequence[Row]) -> None:
        """Let all others go."""
        if not rows:
            self.clear()
        elif len(rows) < len(self.rows):
            self.load([(row, [self.states(row)]) for row in rows], self.pending)

    def join(self, other: Batch) -> None:
        """Take in the rows of `other`, of which as many columns are pending."""
        both = [(row, [batch.states(row)]) for batch in (self, other) for row in batch.rows]
        try:
            self.load(both, other.pending)
        finally:
            other.clear()

    def clear(self) -> None:
        """Free the cache, even where a kept exception still refers to it; empty a static one, whose
        place in memory is what was compiled for.
        """
        self.rows, self.pending = [], 0
        if isinstance(self.cache, StaticCache):
            self.cache.reset()  # type: ignore[no-untyped-call]
        else:
            self.cache.layers.clear()
            self.cache = self._make_cache()  # one for recurrent layers can't make them anew

    def prefill(self) -> None:
        """Feed one chunk, as long as more than one column is pending; makes no token."""
        ids, mask = self._inputs()
        start = self.width - self.pending
        end = min(start + self.chunk, self.width - 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad(), self._interruptible():
            self._model.get_decoder()(
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                use_cache=True,
                **{CACHE_NAME: self.cache},
            )
        self.pending -= end - start

    def decode(self, config: GenerationConfig, step_done: Callable[[], bool]) -> None:
        """Run `model.generate` until a row is done or `step_done` says so; or, for a lone row that
        someone can draft for, what comes to the same in fewer forwards.
        """
        if len(self.rows) == 1 and self._drafters:
            self._speculate(self.rows[0], step_done)
            return
        ids, mask = self._inputs()
        config = copy.deepcopy(config)
        config.max_new_tokens = max(row.left for row in self.rows)
        width = self.width
        logits = RowLogits(
            [row.chooser for row in self.rows],
            [width - len(row.ids) for row in self.rows],
            check_finite=self._check_finite,
            failed=lambda row, error: self.rows[row].fail(error),
        )
        with self._interruptible() as prefilled:

            def step() -> bool:
                prefilled()
                return step_done()

            streamer = TokenStreamer(self._tokenizer, self.rows, step)
            self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                **{CACHE_NAME: self.cache},
                generation_config=config,
                logits_processor=LogitsProcessorList([logits] if logits.needed else []),
                stopping_criteria=StoppingCriteriaList([streamer]),
                streamer=streamer,
            )
        self.pending = 1

    def _speculate(self, row: Row, step_done: Callable[[], bool]) -> None:
        """Feed what may come next together with what is pending, as long as the row chooses it.

        `generate` has this too, but feeds the cached prompt once more, and would ask a sampler and
        a grammar for choices after ids that are then rejected.
        """
        logits_of = RowLogits([row.chooser], [0], check_finite=self._check_finite)
        with self._interruptible() as prefilled:
            while not row.done:
                # Nobody waits for a guess before the first token.
                draft = self._draft(row) if self.pending == 1 else []
                start, known = self.cached(row), len(row.ids)
                ids = torch.tensor(row.ids + draft)
                fed = [*row.ids[start:], *draft]
                logits = feed(self._model, self.cache, fed, len(draft) + 1)
                prefilled()
                ids = ids.to(logits.device)
                for at, guess in enumerate([*draft, None]):
                    choice = logits_of.choose(0, ids[: known + at], logits[at])
                    row.take(choice)
                    if row.done or choice != guess:
                        break
                self.cache.crop(len(row.ids) - 1 - start - len(fed))
                self.pending = 1
                if step_done():
                    break

    def _draft(self, row: Row) -> list[int]:
        """What the first who has an idea says may come next; one more may always come."""
        drafts = (drafter.draft(row.ids, row.left - 1) for drafter in self._drafters)
        return next(filter(None, drafts), [])

    @property
    def _check_finite(self) -> bool:
        return bool(self._model.dtype == torch.float16)

    def _inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, both (rows, width), padded on the left."""
        width, pad_id = self.width, self._tokenizer.pad_token_id or 0
        pads = [width - len(row.ids) for row in self.rows]
        ids = [[pad_id] * pad + row.ids for pad, row in zip(pads, self.rows, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in pads]
        device = self._model.get_input_embeddings().weight.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[Callable[[], None]]:
        """Between layers, look whether anyone still wants this; yields what removes the looking.

        `generate` asks no criterion before the first token, and a prefill can take minutes. After
        it the criterion is asked at every step, and the hooks would only cost time.
        """
        worker = threading.get_ident()
        channels = {row.channel for row in self.rows}

        def look(*_: object) -> None:
            # A caller's own forward on the shared model, from another thread, is none of ours.
            if all(c.cancelled for c in channels) and threading.get_ident() == worker:
                raise Cancelled

        layers = getattr(self._model.get_decoder(), "layers", [self._model])
        # A column or so is fed in the time of a token.
        handles = [h.register_forward_pre_hook(look) for h in layers if self.pending > 1]

        def remove() -> None:
            while handles:
                handles.pop().remove()

        try:
            yield remove
        finally:
            remove()


def feed(model: Any, cache: Cache, ids: Sequence[int], count: int) -> torch.Tensor:
    """Feed `ids` of a lone row behind what `cache` holds. The logits at the last `count` of them,
    of shape (count, vocabulary), in float32.
    """
    options: dict[str, Any] = {CACHE_NAME: cache, "use_cache": True}
    if len(ids) > count and "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = count
    device = model.get_input_embeddings().weight.device
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids], device=device), **options)
    logits: torch.Tensor = output.logits[0, -count:].float()
    return logits


def _first(pieces: Sequence[States], tokens: int) -> list[States]:
    """`pieces`, cut to their first `tokens`, which they must have."""
    cut = []
    for states in pieces:
        length = min(states.tokens, tokens)
        cut.append(states.part(0, length))
        tokens -= length
    return cut
