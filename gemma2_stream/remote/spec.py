"""Where a model is that runs elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ..errors import ParameterError
from ..types import check_seconds

if TYPE_CHECKING:
    from pydantic import SecretStr


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteSpec:
    """Where the model is and what it is called there; `tokenizer` is the id or the folder of its
    tokenizer, by default `model`, and the next three are that one's.

    Raises ParameterError for a URL that is none, or that holds a password.
    """

    base_url: str
    model: str
    tokenizer: str | None = None
    revision: str | None = None
    source: str | None = None
    cache_dir: str | None = None
    read_timeout: float | None = None
    max_retries: int = 0
    api_key: SecretStr | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url) if isinstance(self.base_url, str) else None
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ParameterError(
                f"base_url={self.base_url!r} is no address of a server: give one such as "
                "'http://127.0.0.1:8000/v1'"
            )
        if parts.username or parts.password or parts.query:
            raise ParameterError(
                f"base_url holds more than an address, on {parts.hostname!r}: give the key as "
                "api_key, where nothing shows it"
            )
        check_seconds("read_timeout", self.read_timeout)
