"""The chat in the browser: Chainlit's page, with `ChatGemma2` behind it and a callback between.

A client of the public API only, to be copied: in a file of your own, what is inside `application`
stands at the top level, after `chat = ChatGemma2(...)`, and `chainlit run` serves it.
"""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from typing import Any

import chainlit as cl
from langchain_core.callbacks import AsyncCallbackHandler
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from gemma2_stream import ChatGemma2, Gemma2StreamError

from .texts import texts


class ShowTokens(AsyncCallbackHandler):
    """Shows each token in a message of the page, and keeps the time."""

    def __init__(self, message: cl.Message) -> None:
        self.message = message
        self.first = self.last = 0.0

    async def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        await self.message.stream_token(token)


def application(chat: ChatGemma2) -> None:  # noqa: C901  # small functions, counted as one
    """Make Chainlit's page a conversation with `chat`."""

    @cl.set_starters
    async def starters(user: Any, language: str) -> list[cl.Starter]:
        return [cl.Starter(label=text, message=text) for text in texts(language)["starters"]]

    @cl.on_chat_start
    async def offer_settings() -> None:
        words, params = texts(cl.context.session.language)["settings"], chat.sampling_params
        system = cl.input_widget.TextInput(id="system", label=words["system"], multiline=True)
        temperature = cl.input_widget.Slider(
            id="temperature",
            label=words["temperature"],
            description=words["temperature_0"],
            initial=params.temperature or 0,
            max=2,
            step=0.05,
        )
        length = cl.input_widget.NumberInput(
            id="length",
            label=words["length"],
            description=words["length_0"],
            initial=params.max_new_tokens or 0,
        )
        await cl.ChatSettings([system, temperature, length]).send()

    @cl.on_message
    async def answer(question: cl.Message) -> None:
        words = texts(cl.context.session.language)
        shown = ShowTokens(said := await cl.Message("").send())
        asked: list[BaseMessage] = []
        ended, usage = "cancelled", None
        try:
            settings = cl.user_session.get("chat_settings")
            asked = [*conversation(settings["system"]), HumanMessage(question.content)]
            whole = await chat.ainvoke(
                asked,
                {"callbacks": [shown]},
                temperature=settings["temperature"],
                max_new_tokens=int(settings["length"] or 0) or None,
            )
            ended, usage = whole.response_metadata["finish_reason"], whole.usage_metadata
        except Exception as error:
            ended = "error"
            frame = words["failed"].format(kind=type(error).__name__, error=error)
            await cl.ErrorMessage(frame).send()
            if not isinstance(error, Gemma2StreamError):
                raise  # into Chainlit's log, with its traceback
        finally:
            if said.content:
                said.metadata = {"finish_reason": ended}
                counts = statistics(chat, shown, asked, usage)
                line = [
                    text.format(**counts)
                    for name, text in words["statistics"].items()
                    if name == ended or name in counts
                ]
                props = {"line": " · ".join(line)}
                said.elements = [cl.CustomElement(name="Statistics", props=props)]
                await said.update()
            else:
                await said.remove()

    @cl.on_stop
    async def stopped() -> None:
        for message in cl.chat_context.get():
            if message.content == "Task manually stopped.":  # Chainlit's own, in English only
                await message.remove()

    @cl.on_chat_end
    async def left() -> None:
        task: asyncio.Task[None] | None = cl.context.session.current_task
        if task is not None:
            task.cancel()  # or the model would go on for a page that is closed


def conversation(system: str | None) -> list[BaseMessage]:
    """What the page shows, but for questions that got no answer."""
    messages: list[BaseMessage] = [SystemMessage(system)] if system else []
    for asked, said in pairwise(cl.chat_context.get()):
        if asked.type == "user_message" and "finish_reason" in (said.metadata or {}):
            answer = AIMessage(said.content, response_metadata=said.metadata)
            messages += [HumanMessage(asked.content), answer]
    return messages


def statistics(
    chat: ChatGemma2, shown: ShowTokens, asked: list[BaseMessage], usage: Any
) -> dict[str, float]:
    """Tokens that were made, per second, read, and found in the cache, as far as they are known."""
    if usage:
        output, read = usage["output_tokens"], usage["input_tokens"]
        cached = {"cached": usage["input_token_details"]["cache_read"]}
    else:  # it was cut, and nobody counted
        output, cached = chat.get_num_tokens(shown.message.content), {}
        read = chat.get_num_tokens_from_messages(asked)
    seconds = shown.last - shown.first
    speed = {"speed": (output - 1) / seconds} if seconds else {}
    return {"output": output, **speed, "input": read, **cached}
