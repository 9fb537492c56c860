"""What a process holds: counted before the faults, and none of it more after them."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator

import psutil
import pytest

from gemma2_stream import Gemma2Engine, Request, SamplingParams

# FastAPI's caches keep the last applications, and logging the last formatter.
KEPT = ("_Endpoints", "_Route", "Gate", "Settings", "Keys", "Metrics", "_Lines")


def census() -> Counter[object]:
    """Threads, file descriptors, and the objects of our classes: rows, streams, caches."""
    gc.collect()
    held: Counter[object] = Counter(threading.enumerate())
    held["file descriptors"] = psutil.Process().num_fds()
    for thing in gc.get_objects():
        kind = type(thing)
        if str(kind.__module__).startswith("gemma2_stream") and kind.__name__ not in KEPT:
            held[f"{kind.__module__}.{kind.__qualname__}"] += 1
    return held


@contextlib.contextmanager
def all_back(*engines: Gemma2Engine) -> Iterator[None]:
    """What the block takes, it gives back; prefixes, which are kept on purpose, are forgotten."""

    def settled() -> Counter[object]:
        for engine in engines:
            engine.join()
            engine.prefixes.clear()
        return census()

    before = settled()
    yield
    end = time.monotonic() + 60
    # A thread may be at its last lines, and hold what it has worked for.
    while (more := settled() - before) and time.monotonic() < end:
        time.sleep(0.05)
    assert not more, f"there is more than before: {more}"


@pytest.fixture
def nothing_left(demo_engine: Gemma2Engine, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The whole test gives back what it takes, its own variables too."""
    # pytest would keep what is logged, and with it errors and all that they have gone through.
    for name in ("gemma2_stream", "langchain_core"):
        caplog.set_level(logging.CRITICAL, name)
    list(demo_engine.submit([Request((2,), SamplingParams(max_new_tokens=1))]))  # starts its thread
    with contextlib.suppress(ImportError):  # uvicorn takes it where it is installed, as by Ray
        importlib.import_module(
            "uvloop"
        ).new_event_loop().close()  # libuv keeps a pipe from then on
    gc.collect()
    gc.freeze()  # what is there already is not looked at, which would take long
    try:
        with all_back(demo_engine):
            yield
    finally:
        gc.unfreeze()
