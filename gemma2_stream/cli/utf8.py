"""UTF-8 on the command line, whatever the locale says."""

from __future__ import annotations

import os
import sys


def speak_utf8() -> None:
    """An answer can contain any character, in the C locale too."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(encoding="utf-8", errors="replace")


def decoded(argument: str) -> str:
    """`argument`; in a locale such as C, where Python could not decode it, read as UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return os.fsencode(argument).decode("utf-8", "replace")
    return argument
