"""The exit status, and the one line on stderr that explains it."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import IO

FAILED, MISUSED, INTERRUPTED, PIPE_CLOSED = 1, 2, 128 + 2, 128 + 13


def failed(error: Exception, out: IO[str]) -> int:
    """The status for `error`, told in one line; a mistake of the program's own is raised on."""
    from ..errors import Gemma2StreamError, ParameterError

    if not isinstance(error, (Gemma2StreamError, OSError)):
        raise error
    print("gemma2-stream:", *str(error).splitlines(), file=sys.stderr)
    if not isinstance(error, Gemma2StreamError):
        abandon(out)
    return MISUSED if isinstance(error, ParameterError) else FAILED


def abandon(out: IO[str]) -> None:
    """What could not be written must not be tried again at exit, with a traceback."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
