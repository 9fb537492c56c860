"""A grammar that an answer cannot leave: which tokens it allows next, and how to end it in time.

Knows llguidance, a tokenizer and one row of logits; no LangChain, no torch. A grammar is text in
llguidance's Lark dialect (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md), in
which `%json {...}` stands for all that a JSON schema admits.
"""

from __future__ import annotations

import functools
import re
import string
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .detokenizer import Pieces, pieces_of
from .errors import GrammarError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Grammars kept compiled: those of an application's tools and answers, which come again and again.
_KEPT = 64

# What leads out of a JSON value soonest, or is a short one; what fills numbers and strings, first
# what e-mail addresses, URIs, durations and multiples of a hundred turn on; what opens more.
_WAY_OUT, _FILLING, _OPENING = '}]",:ntf', "0a@.:-/1TPD2345678900", "[{"
_FILLING += string.ascii_letters.replace("a", "") + "_~!#$%&'*+=?^`|();<>, "

# What each byte of a bitmask adds to the logits of its eight tokens: nothing, or what forbids them.
# A sum takes a third of the time of a mask, whose branches a processor cannot foresee.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_BARRIERS = np.where(_BITS, np.float32(0), np.float32(-np.inf))

# Up to this part of a bitmask's words it is quicker to gather the logits of what they allow.
_FEW = 1 / 8


class Grammars:
    """Compiles grammars for one tokenizer, whose embedding has `vocab_size` rows.

    `encode` gives the ids of plain text, in which no control token occurs whatever it spells.

    The vocabulary is only read when the first grammar comes (a second for Gemma 2's 256,000).
    """

    def __init__(
        self,
        tokenizer: Any,
        encode: Callable[[str], list[int]],
        vocab_size: int,
        end_ids: Sequence[int],
    ) -> None:
        self._tokenizer = tokenizer
        self._encode = encode
        self._vocab_size = vocab_size
        self._end_ids = list(end_ids)
        self._lock = threading.Lock()
        self._compiled = functools.lru_cache(_KEPT)(self._compile)

    def check(self, grammar: str) -> None:
        """Raises GrammarError for a grammar that cannot be compiled."""
        with self._lock:  # two callers with one new grammar compile it once
            self._compiled(grammar)

    def constraint(self, grammar: str, limit: int) -> Constraint:
        """What holds one answer of at most `limit` tokens to `grammar`."""
        with self._lock:
            matcher = self._compiled(grammar).deep_copy()
        return Constraint(matcher, self._closing_ids, self._end_ids, limit)

    def _compile(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)  # they would quote the whole grammar
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(
                f"what the answer must match cannot be enforced: {_reason(matcher)}. Take that out "
                "of the JSON schema or the grammar, and check for it in the answer instead"
            )
        return matcher

    @functools.cached_property
    def _vocabulary(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper, hf

        pieces = pieces_of(self._tokenizer)
        if pieces is None:
            return hf.from_tokenizer(self._tokenizer, self._vocab_size, self._end_ids)
        # A quarter of the time: the tokenizer need not be written out as JSON and read again.
        return LLTokenizer(
            TokenizerWrapper(_Vocabulary(self._tokenizer, pieces, self._vocab_size, self._encode)),
            eos_token=self._end_ids,
        )

    @functools.cached_property
    def _closing_ids(self) -> _ClosingIds:
        ids = {c: self._vocabulary.tokenize_str(c) for c in _WAY_OUT + _FILLING + _OPENING}
        return _ClosingIds({c: found[0] for c, found in ids.items() if len(found) == 1})


def _reason(matcher: LLMatcher) -> str:
    """What llguidance has to say, on one line, without the part of the grammar that it quotes."""
    said = re.split(r"\n *\d+ \| ", matcher.get_error())[0]
    return " ".join(said.split()).removesuffix(".")


class _Vocabulary:
    """A tokenizer as llguidance asks for it: the bytes of every token, and plain text as ids."""

    def __init__(
        self, tokenizer: Any, pieces: Pieces, size: int, encode: Callable[[str], list[int]]
    ) -> None:
        self._encode = encode
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.tokens: list[bytes] = []
        self.special_token_ids: list[int] = []
        for token_id in range(size):
            piece = pieces[token_id]
            if piece is None:
                self.special_token_ids.append(token_id)
                # No text begins with this byte, so no grammar of text admits the token.
                piece = b"\xff[%d]" % token_id
            self.tokens.append(piece if isinstance(piece, bytes) else piece.encode())

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.decode() if isinstance(text, bytes) else text)


class _ClosingIds:
    """Single characters as ids, in the orders in which an end is looked for."""

    def __init__(self, ids: dict[str, int]) -> None:
        self.letter, self.quote = ids["z"], [ids['"']]
        self.way_out = [ids[c] for c in _WAY_OUT if c in ids]
        self.filling = [ids[c] for c in _FILLING if c in ids]
        self.opening = [ids[c] for c in _OPENING if c in ids]

    def candidates(self, in_text: bool, turn: int) -> Iterator[tuple[int, int]]:
        """What may end a value soonest, best first, each with the turn that the filling has then.

        It takes turns, so that a repetition in a regular expression ends and multiples are met.
        """
        yield from ((i, 0) for i in (self.quote if in_text else self.way_out))
        for place in range(turn, turn + len(self.filling)):
            place %= len(self.filling)
            yield self.filling[place], place + 1
        yield from ((i, turn) for i in self.opening)


class Constraint:
    """One answer on its way through a grammar. Used by the worker alone.

    `limit` is the most tokens that the answer may have. As long as one way to the end is known that
    fits, no choice is accepted that leaves none: so an answer is whole when its limit comes, and
    `cut` tells that the limit decided how it ends. Where no end is found (`limit` is too small, or
    a regular expression hides it) the answer runs free within the grammar.
    """

    def __init__(
        self, matcher: LLMatcher, closing: _ClosingIds, end_ids: Sequence[int], limit: int
    ) -> None:
        self._matcher = matcher
        self._closing = closing
        self._end_ids = end_ids
        self._left = limit
        self._plan = self._way_to_end(matcher.deep_copy())
        self.cut = False
        self.done = False

    def among(self, logits: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        """What the grammar can take next: ids and their logits, of `logits`, shape (vocabulary,);
        where they are many, None and all logits, in which the others are forbidden; in place.
        """
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()  # in an error it allows an end of turn, as if all were well
        lit = words.nonzero()[0]
        if len(lit) > _FEW * len(words):
            barriers = _BARRIERS.take(words.view(np.uint8), axis=0, mode="clip")
            logits += barriers.reshape(-1)[: len(logits)]
            return None, logits
        bits = np.unpackbits(words[lit].view(np.uint8), bitorder="little").nonzero()[0]
        ids = lit[bits // 32] * 32 + bits % 32
        return ids, logits[ids]

    def take(self, token_id: int) -> int:
        """The model chose `token_id`, which is among them; the answer goes on with what is
        returned, which is the same unless that would leave no room to end.

        Raises GrammarError when the grammar has outgrown what can be computed.
        """
        if self._plan is not None and not self._still_ends(token_id, self._plan):
            token_id, *self._plan = self._plan
            self.cut = True
        self._left -= 1
        if token_id in self._end_ids:
            self.done = True
        else:
            self._matcher.consume_token(token_id)
            self._check()
            self.done = self._matcher.is_stopped()
        return token_id

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(
                f"the answer's grammar cannot be followed: {_reason(self._matcher)}. Simplify the "
                "JSON schema or the grammar"
            )

    def _still_ends(self, token_id: int, plan: list[int]) -> bool:
        """Whether the answer can end in time after `token_id`; keeps the plan for it if so."""
        if token_id in self._end_ids:
            return True
        if token_id == plan[0]:
            self._plan = plan[1:]
            return True
        # Mostly (inside a string, say) what ended the answer before still does.
        same = [token_id, *plan]
        if len(plan) <= self._left and self._matcher.validate_tokens(same) == len(same):
            return True
        after = self._matcher.deep_copy()
        found = self._way_to_end(after, 1, plan) if after.consume_token(token_id) else None
        self._plan = found or plan
        return found is not None

    def _way_to_end(
        self, matcher: LLMatcher, ahead: int = 0, known: Sequence[int] = ()
    ) -> list[int] | None:
        """Ids that end the grammar of `matcher`, which is `ahead` tokens further on, or None where
        the tokens left do not suffice. The last is an end of turn, for which no room is needed.

        What is forced is taken, else the first character that closes something or begins a short
        value; where the way that was `known` before goes on from there, that is the rest.
        """
        plan: list[int] = []
        turn = 0
        while not matcher.is_accepting():
            rest = _continued(matcher, known)
            if rest is not None and len(plan) + len(rest) <= self._left - ahead + 1:
                return plan + rest
            step = matcher.compute_ff_tokens()
            if not step:
                in_text = matcher.validate_tokens([self._closing.letter]) == 1
                ways = self._closing.candidates(in_text, turn)
                way = next((way for way in ways if matcher.validate_tokens([way[0]])), None)
                if way is None:
                    return None
                step, turn = [way[0]], way[1]
            plan += step
            if len(plan) > self._left - ahead or not matcher.consume_tokens(step):
                return None
        return [*plan, self._end_ids[0]]


def _continued(matcher: LLMatcher, known: Sequence[int]) -> list[int] | None:
    """What of the way `known` leads `matcher` to its end, less what it may have done of it."""
    for done in range(min(3, len(known))):
        rest = list(known[done:])
        if matcher.validate_tokens(rest) == len(rest):
            return rest
    return None
