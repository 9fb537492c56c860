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
import re
from collections.abc import Callable
from typing import Any, Protocol

_GEMMA_DECODER = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class Detokenizer(Protocol):
    """Incremental decoding: `feed` each id once, `flush` at the end."""

    def feed(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


def detokenizer_for(tokenizer: Any) -> Callable[[], Detokenizer]:
    """What makes a fresh detokenizer for each request to `tokenizer` (a fast transformers one)."""
    pieces = pieces_of(tokenizer)
    if pieces is None:
        return lambda: WholeDetokenizer(tokenizer)
    return lambda: PieceDetokenizer(pieces)


def pieces_of(tokenizer: Any) -> Pieces | None:
    """What each token of `tokenizer` stands for; None where text is not made of such pieces."""
    decoder = tokenizer.backend_tokenizer.decoder
    steps = json.loads(decoder.__getstate__()).get("decoders") if decoder is not None else None
    return Pieces(tokenizer) if steps == _GEMMA_DECODER else None


class Pieces(dict[int, "str | bytes | None"]):
    """id → its text, its one byte, or None for what `decode` skips;
    filled as ids turn up, shared by all requests."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._spelling = tokenizer.backend_tokenizer.id_to_token
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        # A special token has no text; nor has an id beyond the vocabulary, which a padded
        # embedding can produce.
        self.update({token_id: None for token_id, token in added.items() if token.special})

    def __missing__(self, token_id: int) -> str | bytes | None:
        spelling: str | None = self._spelling(token_id)
        piece: str | bytes | None = None
        if spelling is not None:
            byte = _BYTE.fullmatch(spelling)
            piece = bytes.fromhex(byte[1]) if byte else spelling.replace("▁", " ")
        self[token_id] = piece
        return piece


class PieceDetokenizer:
    """The exact and constant-time way, for tokenizers that decode as Gemma's does."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._run = b""

    def feed(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if isinstance(piece, bytes):
            self._run += piece
            return ""
        if piece is None:  # does not end a run: `decode` drops it before it decodes
            return ""
        return self.flush() + piece if self._run else piece

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
        self._bytes = False

    def _decode(self) -> str:
        # Cleaning up would take back what was given: it joins words once the next is there.
        text: str = self._tokenizer.decode(
            self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def feed(self, token_id: int) -> str:
        self._ids.append(token_id)
        if self._in_bytes(token_id):
            return ""
        # A trailing U+FFFD is a character whose bytes are not all here yet.
        return self._give(self._decode().rstrip("\ufffd"))

    def flush(self) -> str:
        return self._give(self._decode())

    def _in_bytes(self, token_id: int) -> bool:
        """Whether a run of byte tokens, which decodes as a whole, may still go on."""
        spelling = self._tokenizer.backend_tokenizer.id_to_token(token_id)
        if spelling is not None and token_id not in self._tokenizer.all_special_ids:
            self._bytes = _BYTE.fullmatch(spelling) is not None
        return self._bytes

    def _give(self, text: str) -> str:
        if not text.startswith(self._given):
            return ""
        new = text[len(self._given) :]
        self._given = text
        return new
