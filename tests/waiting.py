"""Waiting for what another thread does; the limits only make failures of hangs."""

from __future__ import annotations

import signal
import threading


def wait(event: threading.Event) -> None:
    """Until `event` is set."""
    assert event.wait(60), "nobody set the event"


def press_ctrl_c(seen: threading.Event | None = None) -> None:
    """In the main thread; with `seen`, until that is set.

    A signal that comes just before a thread begins to wait is seen when the thread wakes, such as
    by the next one; as long as the first may still be seen, there must be no other.
    """
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)
    while seen is not None and not seen.wait(20):
        signal.pthread_kill(main, signal.SIGINT)
