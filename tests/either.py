"""Either of the two models by the same calls: a prompt in, text out."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

from langchain_core.messages import HumanMessage

from gemma2_stream import ChatGemma2, Gemma2Engine, Gemma2LLM


class Either:
    """`Gemma2LLM` or `ChatGemma2` (`kind` is "llm" or "chat") on `engine`, for tests of both.

    `either(max_new_tokens=3)` is the same with these parameters; `either.model` is the model
    itself, for chains, and every attribute that is not here is the model's own.
    """

    def __init__(self, kind: str, engine: Gemma2Engine, **parameters: Any) -> None:
        self.kind, self.engine = kind, engine
        self.cls = Gemma2LLM if kind == "llm" else ChatGemma2
        self.model: Any = self.cls(engine=engine, **parameters)

    def __call__(self, **parameters: Any) -> Either:
        return Either(self.kind, self.engine, **parameters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def over(self, model: Any) -> Either:
        """The same calls of what was made of the model: bound, configured."""
        other = Either(self.kind, self.engine)
        other.model = model
        return other

    def invoke(self, *args: Any, **kwargs: Any) -> str:
        return text_of(self.model.invoke(*args, **kwargs))

    async def ainvoke(self, *args: Any, **kwargs: Any) -> str:
        return text_of(await self.model.ainvoke(*args, **kwargs))

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        with contextlib.closing(self.model.stream(*args, **kwargs)) as pieces:
            yield from map(text_of, pieces)

    async def astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[str]:
        async with contextlib.aclosing(self.model.astream(*args, **kwargs)) as pieces:
            async for piece in pieces:
                yield text_of(piece)

    def batch(self, *args: Any, **kwargs: Any) -> list[str]:
        return [*map(text_of, self.model.batch(*args, **kwargs))]

    async def abatch(self, *args: Any, **kwargs: Any) -> list[str]:
        return [*map(text_of, await self.model.abatch(*args, **kwargs))]

    def chunks(self, prompt: str, **kwargs: Any) -> list[Any]:
        """What `_stream` yields: LangChain's chunks with their `text` and `generation_info`."""
        return list(self.model._stream(self._asked(prompt), **kwargs))

    def info(self, prompt: str, **kwargs: Any) -> dict[str, Any]:
        """What the answer says of itself: reason, usage, model name."""
        (row,) = self.model.generate([self._asked(prompt)], **kwargs).generations
        info: dict[str, Any] = row[0].generation_info
        return info

    def _asked(self, prompt: str) -> Any:
        return prompt if self.kind == "llm" else [HumanMessage(prompt)]


def text_of(answer: Any) -> Any:
    """The text of a message; anything else, an exception too, as it is."""
    return getattr(answer, "text", answer)
