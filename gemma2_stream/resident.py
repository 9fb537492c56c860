"""What lives in one process, as an engine does with its thread: closed, but not copied or sent.

Knows no model and no server.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import NoReturn, Self

from .errors import EngineClosedError


class Resident:
    """An engine as long as it is open, in the process that made it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._closed = False
        self._pid = os.getpid()
        _residents.add(self)

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __deepcopy__(self, memo: object) -> Self:
        return self  # one process, one thread and one copy of what it works on

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an engine holds a thread and cannot be pickled: pickle Gemma2LLM(model=...), which "
            "gets its engine again where it is unpickled"
        )

    def _check_open(self) -> None:
        """Raises EngineClosedError. To be called with the lock held, so that it stays so."""
        if self._closed:
            raise self._closed_error()
        if self._pid != os.getpid():
            raise EngineClosedError(
                f"{self!r} was made before a fork, and threads do not survive one: make it in the "
                "child, or start processes with multiprocessing's 'spawn'"
            )

    def _closed_error(self) -> EngineClosedError:
        return EngineClosedError(f"the engine of {self.name!r} was closed: load the model again")


_residents: weakref.WeakSet[Resident] = weakref.WeakSet()


def _after_fork() -> None:
    """In the child, where channels end by themselves."""
    for resident in list(_residents):
        resident._lock = threading.Lock()  # another thread may have held it


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork)
