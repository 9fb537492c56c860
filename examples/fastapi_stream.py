"""Serve answers as server-sent events: each token is one, and a caller who leaves stops the model.

pip install fastapi uvicorn sse-starlette
python examples/fastapi_stream.py                               # the demo, a toy
python examples/fastapi_stream.py LLM-Research/gemma-2-9b-it    # Gemma 2 itself
curl -N http://127.0.0.1:8000/ask -H 'content-type: application/json' -d '{"question": "你是谁"}'
"""

import json
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sse_starlette import EventSourceResponse

from gemma2_stream import ChatGemma2

# Who comes when 64 wait already is told so, instead of waiting too.
chat = ChatGemma2(sys.argv[1] if len(sys.argv) > 1 else "demo", max_waiting=64)
app = FastAPI()


class Ask(BaseModel):
    """What is posted."""

    question: str


@app.post("/ask")
async def ask(asked: Ask) -> EventSourceResponse:
    """Events `token` with text, then one `end`; or, at any point, one `error`."""
    # Not FastAPI's own response for events: when the caller leaves, that one drops a generator that
    # waits to send, and the model would go on until the garbage is collected. This one closes it.
    return EventSourceResponse(events(asked.question))


async def events(question: str) -> AsyncIterator[dict[str, str]]:
    """The answer as it is made. Closed or cancelled, the model makes no further step."""
    try:
        async with aclosing(chat.astream(question)) as chunks:
            async for chunk in chunks:
                if chunk.text:
                    yield event("token", {"text": chunk.text})
                if chunk.usage_metadata is not None:
                    reason = chunk.response_metadata["finish_reason"]
                    yield event("end", {"finish_reason": reason, "usage": chunk.usage_metadata})
    except Exception as error:  # the status was sent long ago, so an event has to say it
        logging.getLogger("uvicorn.error").exception("no whole answer")
        yield event("error", {"error": f"{type(error).__name__}: {error}"})


def event(name: str, data: Any) -> dict[str, str]:
    return {"event": name, "data": json.dumps(data, ensure_ascii=False)}


if __name__ == "__main__":
    print(f"[loaded: {chat.engine.name}]")  # loads now, before the first caller waits for it
    uvicorn.run(app, host="127.0.0.1", port=8000)
