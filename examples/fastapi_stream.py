"""Serve answers as server-sent events: each token is one, and a caller who leaves stops the model.

pip install fastapi uvicorn
python examples/fastapi_stream.py                               # the demo, a toy
python examples/fastapi_stream.py LLM-Research/gemma-2-9b-it    # Gemma 2 itself
curl -N http://127.0.0.1:8000/ask -H 'content-type: application/json' -d '{"question": "你是谁"}'
"""

import logging
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing

import uvicorn
from fastapi import FastAPI
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel

from gemma2_stream import ChatGemma2

# Who comes when 64 wait already is told so, instead of waiting too.
chat = ChatGemma2(sys.argv[1] if len(sys.argv) > 1 else "demo", max_waiting=64)
app = FastAPI()


class Ask(BaseModel):
    """What is posted."""

    question: str


@app.post("/ask", response_class=EventSourceResponse)
async def ask(asked: Ask) -> AsyncIterator[ServerSentEvent]:
    """Events `token` with text, then one `end`; or, at any point, one `error`."""
    try:
        # Cancelled or closed here, when the caller leaves, the model makes no further step.
        async with aclosing(chat.astream(asked.question)) as chunks:
            async for chunk in chunks:
                if chunk.text:
                    yield ServerSentEvent(event="token", data={"text": chunk.text})
                if chunk.usage_metadata is not None:
                    reason = chunk.response_metadata["finish_reason"]
                    end = {"finish_reason": reason, "usage": chunk.usage_metadata}
                    yield ServerSentEvent(event="end", data=end)
    except Exception as error:  # the status was sent long ago, so an event has to say it
        logging.getLogger("uvicorn.error").exception("no whole answer")
        yield ServerSentEvent(event="error", data={"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    print(f"[loaded: {chat.engine.name}]")  # loads now, before the first caller waits for it
    uvicorn.run(app, host="127.0.0.1", port=8000)
