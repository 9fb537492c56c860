"""The `openai` client, and the thread whose event loop its connections live on."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any

from ..errors import ParameterError
from .spec import RemoteSpec

if TYPE_CHECKING:
    from openai import AsyncOpenAI

CONNECT_SECONDS = 10.0
READ_SECONDS = 120.0
"""How long a server may be silent when nobody says: a long prompt is read, a queue waited for."""


def connected(spec: RemoteSpec) -> AsyncOpenAI:
    try:
        from openai import AsyncOpenAI, Timeout
    except ModuleNotFoundError as missing:
        raise ParameterError(
            f"base_url={spec.base_url!r} needs {missing.name}: pip install 'gemma2-stream[remote]'"
        ) from missing

    read = spec.read_timeout or READ_SECONDS
    return AsyncOpenAI(
        base_url=spec.base_url,
        api_key=spec.api_key.get_secret_value() if spec.api_key is not None else "none",
        timeout=Timeout(None, connect=CONNECT_SECONDS, read=read, write=read),
        max_retries=0,  # ours also covers a connection that breaks before the first token
    )


def headers(spec: RemoteSpec) -> dict[str, Any]:
    """What keeps the environment's OPENAI_API_KEY and the like from going to this server."""
    from openai import Omit

    names = ["OpenAI-Organization", "OpenAI-Project"]
    return dict.fromkeys(names + ["Authorization"] * (spec.api_key is None), Omit())


def run_loop(loop: asyncio.AbstractEventLoop, client: AsyncOpenAI, stop: asyncio.Event) -> None:
    """The thread: everything on `loop` until `stop`, and then its end."""

    async def until_stopped() -> None:
        async with client:
            await stop.wait()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(until_stopped())


def end_loop(
    loop: asyncio.AbstractEventLoop, stop: asyncio.Event, thread: threading.Thread, pid: int
) -> None:
    if pid != os.getpid():  # a child has the loop, but no thread that would run it
        return
    loop.call_soon_threadsafe(stop.set)
    if thread is not threading.current_thread():
        thread.join()
