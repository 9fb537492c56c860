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
    """`event` is set when an answer was left, and the loop has closed what belonged to it; `asked`
    is the last conversation, by type and text.
    """

    def __init__(self) -> None:
        self.event = threading.Event()
        self.asked: list[tuple[str, str]] = []

    async def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        self.asked = [(message.type, message.text) for message in messages[0]]

    async def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        if isinstance(error, Exception):
            return  # the model's own, such as a gate that nobody opened

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

    left = Left()
    chat.callbacks = [left]
    client = Client(page.local_url, verbose=False)
    seen: dict[str, Any] = {"first": [*client.submit("你是谁", api_name="/answer")]}
    client.predict("What is a token?", api_name="/answer")
    seen["asked"] = left.asked

    client.reset_session()
    chat.engine.join()
    chat.engine.prefixes.clear()
    watch = Forwards(chat.engine.model)
    reached, release = watch.gate(6)
    job = client.submit("What is a token?", api_name="/answer")
    assert reached.wait(60)
    seen["stopped"] = [next(job)]
    job.cancel()
    assert left.event.wait(60)
    release.set()
    chat.engine.join()
    client.close()
    page.close()  # says so
    sys.stdout.write(json.dumps(seen | {"forwards": watch.count}) + "\n")


if __name__ == "__main__":
    main()
