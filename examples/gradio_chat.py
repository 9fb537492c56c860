"""Chat in the browser with Gradio: answers grow as they are made, and Stop stops the model.

pip install gradio
python examples/gradio_chat.py                              # the demo, a toy
python examples/gradio_chat.py LLM-Research/gemma-2-9b-it   # Gemma 2 itself
"""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing leaves the machine

import gradio

from gemma2_stream import ChatGemma2

chat = ChatGemma2(sys.argv[1] if len(sys.argv) > 1 else "demo")


async def answer(question: str, history: list[dict[str, Any]]) -> AsyncIterator[str]:
    """The answer so far, again and again: Gradio shows the last one. Stop closes this."""
    said = [{"role": turn["role"], "content": turn["content"]} for turn in history]
    text = ""
    async with aclosing(chat.astream([*said, {"role": "user", "content": question}])) as chunks:
        async for chunk in chunks:
            text += chunk.text
            yield text


# 32 conversations at once share the model's steps; by itself Gradio would let one wait for another.
page = gradio.ChatInterface(answer, title="Gemma 2", concurrency_limit=32)

if __name__ == "__main__":
    print(f"[loaded: {chat.engine.name}]")  # loads now, before the first question waits for it
    page.launch(server_name="127.0.0.1")
