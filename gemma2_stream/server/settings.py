"""What a server lets in: its keys and its limits. Knows no web framework."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..errors import ParameterError
from ..types import MAX_ROWS


class Keys:
    """Bearer keys, of which only digests are kept, so that nothing can print them.

    Without any, everybody is let in. Raises ParameterError for a key that no header can carry.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        keys = tuple(keys)
        for number, key in enumerate(keys, 1):
            if not key.isascii() or not key.isprintable() or not key or " " in key:
                raise ParameterError(
                    f"key {number} of {len(keys)} is empty, or holds white space or characters "
                    "beyond ASCII, which no Authorization header carries: make another"
                )
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def read(cls, file: str | None = None) -> Keys:
        """Those in `file`, one a line, or in $GEMMA2_STREAM_API_KEYS, parted by commas."""
        if file is None:
            given = os.environ.get("GEMMA2_STREAM_API_KEYS", "").split(",")
        else:
            with open(file, encoding="utf-8") as lines:
                given = lines.read().splitlines()
        return cls(key.strip() for key in given if key.strip())

    def __len__(self) -> int:
        return len(self._digests)

    def __repr__(self) -> str:
        return f"<{len(self)} keys>"

    def admit(self, authorization: bytes) -> bool:
        """Whether the value of an Authorization header is good, in the same time for each."""
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # All of them, so that the time does not tell which.
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return not found or (any(found) and scheme.lower() == b"bearer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is let in. `None` is no limit but the model's own.

    `model` is what clients call the model; by default it is the engine's name. `max_prompt_tokens`
    and `max_tokens` are those of one answer, `max_choices` the answers of one request,
    `max_seconds` the time that one may take, waiting included, `max_body_bytes` its size.
    """

    model: str | None = None
    keys: Keys = field(default_factory=Keys)
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    max_choices: int = MAX_ROWS
    max_seconds: float = 600.0

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_prompt_tokens", "max_tokens", "max_choices"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ParameterError(f"{name}={value!r} is not a whole number, 1 or more")
        if not 0 < self.max_seconds < math.inf:
            raise ParameterError(f"max_seconds={self.max_seconds!r} is not a number above 0")


def public_name(model: str) -> str:
    """What clients call `model`: where a folder is concerns nobody."""
    path = os.path.expanduser(model)
    return os.path.basename(os.path.abspath(path)) if os.path.isdir(path) else model
