"""What the page says, in English and in simplified Chinese; Chainlit has the words for its own."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "translations"


@cache
def read(name: str) -> dict[str, Any]:
    """The texts in `name`.json; `page` is what replaces words of Chainlit's, as it nests them."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def texts(language: str | None) -> dict[str, Any]:
    """The texts for a browser that prefers `language`, such as "zh-CN" or "en"."""
    return read("zh-CN" if (language or "").lower().startswith("zh") else "en-US")
