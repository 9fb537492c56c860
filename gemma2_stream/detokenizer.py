"""Token ids to text, one id at a time, never half a character. Pure: no thread, no torch.

Gemma's decoder is Replace("▁" → " "), ByteFallback, Fuse, so text is the concatenation of one piece
a token, except that a run of byte tokens decodes as a whole: as UTF-8, or, when it is not valid, as
one U+FFFD a byte. Feeding ids and flushing gives exactly `tokenizer.decode(ids,
skip_special_tokens=True)`, at a cost a token that does not grow with the text.

    detokenizer = detokenizer_for(tokenizer)()
    detokenizer.feed(235285)   # "I"
    detokenizer.feed(217 + 0xF0), ...   # "" until the character is certain
    detokenizer.flush()        # what an unfinished run of bytes decodes to
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol

_GEMMA_DECODER = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]


class Detokenizer(Protocol):
    """Incremental decoding: `feed` each id once, `flush` at the end."""

    def feed(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


def detokenizer_for(tokenizer: Any) -> Callable[[], Detokenizer]:
    """What makes a fresh detokenizer for each request to `tokenizer` (a fast transformers one)."""
    decoder = tokenizer.backend_tokenizer.decoder
    steps = json.loads(decoder.__getstate__()).get("decoders") if decoder is not None else None
    if steps == _GEMMA_DECODER and not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        pieces = _Pieces(tokenizer)
        return lambda: PieceDetokenizer(pieces)
    return lambda: WholeDetokenizer(tokenizer)


class _Pieces(dict[int, "str | bytes"]):
    """id → its text, or its one byte; filled as ids turn up, shared by all requests."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._spelling = tokenizer.backend_tokenizer.id_to_token
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        # A special token has no text; nor has an id beyond the vocabulary, which a padded
        # embedding can produce.
        self.update({token_id: "" for token_id, token in added.items() if token.special})

    def __missing__(self, token_id: int) -> str | bytes:
        spelling = self._spelling(token_id) or ""
        piece: str | bytes = spelling.replace("▁", " ")
        if len(spelling) == 6 and spelling.startswith("<0x") and spelling.endswith(">"):
            piece = bytes.fromhex(spelling[3:5])
        self[token_id] = piece
        return piece


class PieceDetokenizer:
    """The exact and constant-time way, for tokenizers that decode as Gemma's does."""

    def __init__(self, pieces: _Pieces) -> None:
        self._pieces = pieces
        self._run = b""

    def feed(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if isinstance(piece, bytes):
            self._run += piece
            return ""
        # A skipped special token does not end a run: `decode` drops it before it decodes.
        return self.flush() + piece if self._run and piece else piece

    def flush(self) -> str:
        run, self._run = self._run, b""
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)


class WholeDetokenizer:
    """The exact way for any other tokenizer: decode all ids so far, give out what is stable.

    Its cost a token grows with the answer, which is why Gemma has its own.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = ""

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text

    def feed(self, token_id: int) -> str:
        self._ids.append(token_id)
        # A trailing U+FFFD is a character whose bytes are not all here yet.
        return self._give(self._decode().rstrip("\ufffd"))

    def flush(self) -> str:
        return self._give(self._decode())

    def _give(self, text: str) -> str:
        if not text.startswith(self._given):
            return ""
        new = text[len(self._given) :]
        self._given = text
        return new
