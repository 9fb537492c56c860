"""Starts examples/gradio_chat.py on loopback and is its user; the last line says what was seen."""

from __future__ import annotations

import asyncio
import json
import runpy
import sys
import threading
from pathlib import Path
from typing import Any

from langchain_core.callbacks import AsyncCallbackHandler

ROOT = Path(__file__).parent.parent


class Left(AsyncCallbackHandler):
    """`event` is set when an answer was left, and the loop has closed what belonged to it."""

    def __init__(self) -> None:
        self.event = threading.Event()

    async def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        async def soon() -> None:
            for _ in range(20):  # a loop closes async generators a tick or two later
                await asyncio.sleep(0)
            self.event.set()

        self.task = asyncio.get_running_loop().create_task(soon())


def main() -> None:
    from gradio_client import Client
    from tiny import Forwards

    sys.argv = ["gradio_chat.py"]
    example = runpy.run_path(str(ROOT / "examples" / "gradio_chat.py"))
    page, chat = example["page"], example["chat"]
    page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)

    client = Client(page.local_url, verbose=False)
    seen = {"first": [*client.submit("你是谁", api_name="/answer")]}
    seen["second"] = client.predict("What is a token?", api_name="/answer")

    client.reset_session()
    chat.engine.join()
    chat.engine.prefixes.clear()
    watch, left = Forwards(chat.engine.model), Left()
    chat.callbacks = [left]
    reached, release = watch.gate(6)
    job = client.submit("What is a token?", api_name="/answer")
    assert reached.wait(30)
    seen["stopped"] = [next(job)]
    job.cancel()
    assert left.event.wait(30)
    release.set()
    chat.engine.join()
    sys.stdout.write(json.dumps(seen | {"forwards": watch.count}) + "\n")
    client.close()
    page.close()


if __name__ == "__main__":
    main()
