"""An engine's chunks as what OpenAI's clients read. Pure.

One primitive, the choices of a chunk as deltas; a whole answer folds them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import pydantic_core

from ..errors import EngineClosedError
from ..tools import CallParser, CallPart
from ..types import Chunk, Usage
from .prompts import Work

Json = dict[str, Any]


class Answer:
    """One answer in the making, of one or more choices; `usage` counts what came so far."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, model: str, work: Work) -> None:
        self.work = work
        self.finish_reasons: list[str | None] = [None] * len(work.rows)
        self._usages: list[Usage] = []
        self._prompts: dict[int, Usage] = {}
        self._head = {
            "id": f"{self.prefix}{uuid.uuid4().hex}",
            "object": self.kind,
            "created": int(time.time()),
            "model": model,
        }

    def opening(self) -> list[Json]:
        """Deltas before the first of a row."""
        return []

    def deltas(self, chunk: Chunk) -> list[Json]:
        """What `chunk` adds, as the choices of events."""
        if chunk.usage is not None:
            self._usages.append(chunk.usage)
            self._prompts.setdefault(chunk.index // self.work.choices, chunk.usage)
        if chunk.finish_reason == "cancelled":
            raise EngineClosedError("the answer was cancelled: ask again")
        return self._deltas(chunk)

    def whole(self, deltas: Sequence[Json]) -> Json:
        """The answer that `deltas` add up to."""
        choices = [self._empty(index) for index in range(len(self.work.rows))]
        for delta in deltas:
            self._add(choices[delta["index"]], delta)
        return {**self._head, "choices": choices, "usage": self.usage()}

    def event(self, choices: list[Json], **more: Any) -> Json:
        """One event of a stream."""
        return {**self._head, "object": self.chunk_kind, "choices": choices, **more}

    def usage(self) -> Json:
        """Tokens; a prompt counts once, however many choices it has."""
        prompt = sum(usage.prompt_tokens for usage in self._prompts.values())
        completion = sum(usage.completion_tokens for usage in self._usages)
        cached = sum(usage.cached_tokens for usage in self._prompts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _deltas(self, chunk: Chunk) -> list[Json]:
        raise NotImplementedError

    def _empty(self, index: int) -> Json:
        raise NotImplementedError

    def _add(self, choice: Json, delta: Json) -> None:
        raise NotImplementedError


class TextAnswer(Answer):
    """Of `/v1/completions`."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl-"

    def _deltas(self, chunk: Chunk) -> list[Json]:
        self.finish_reasons[chunk.index] = chunk.finish_reason
        choice = {"index": chunk.index, "text": chunk.text, "logprobs": None}
        # As vLLM tells it: the stop string that matched.
        return [{**choice, "finish_reason": chunk.finish_reason, "stop_reason": chunk.stop}]

    def _empty(self, index: int) -> Json:
        end = {"finish_reason": None, "stop_reason": None}
        return {"index": index, "text": "", "logprobs": None, **end}

    def _add(self, choice: Json, delta: Json) -> None:
        choice["text"] += delta["text"]
        choice |= {name: delta[name] for name in ("finish_reason", "stop_reason")}


class ChatAnswer(Answer):
    """Of `/v1/chat/completions`."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl-"

    def __init__(self, model: str, work: Work) -> None:
        super().__init__(model, work)
        self._parsers = [CallParser() if work.answer.tools else None for _ in work.rows]

    def opening(self) -> list[Json]:
        start = {"role": "assistant", "content": "", "refusal": None}
        return [_choice(index, dict(start)) for index in range(len(self.work.rows))]

    def _deltas(self, chunk: Chunk) -> list[Json]:
        last, parser = chunk.finish_reason is not None, self._parsers[chunk.index]
        parts: list[str | CallPart] = [chunk.text]
        if parser is not None:
            parts = parser.feed(chunk.text, last=last)
        deltas = [_choice(chunk.index, _delta(part)) for part in parts if part]
        if last:
            called = parser is not None and parser.whole > 0 and chunk.finish_reason == "stop"
            reason = "tool_calls" if called else chunk.finish_reason
            self.finish_reasons[chunk.index] = reason
            deltas.append(_choice(chunk.index, {}, reason))
        return deltas

    def _empty(self, index: int) -> Json:
        message = {"role": "assistant", "content": None, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": None}

    def _add(self, choice: Json, delta: Json) -> None:
        said, message = delta["delta"], choice["message"]
        choice["finish_reason"] = delta["finish_reason"]
        if "content" in said:
            message["content"] = (message["content"] or "") + said["content"]
        for call in said.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if "id" in call:
                calls.append({name: value for name, value in call.items() if name != "index"})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        if delta["finish_reason"] is not None and "tool_calls" not in message:
            message["content"] = message["content"] or ""


def _choice(index: int, delta: Json, reason: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _delta(part: str | CallPart) -> Json:
    if isinstance(part, str):
        return {"content": part}
    call: Json = {"index": part.index}
    function = {"arguments": part.arguments}
    if part.first:  # a call that was cut in its name has none
        call |= {"id": f"call_{uuid.uuid4().hex}", "type": "function"}
        function = {"name": part.name or "", **function}
    return {"tool_calls": [{**call, "function": function}]}


def event_line(event: Json) -> bytes:
    """`event` as a server-sent one."""
    return b"data: " + pydantic_core.to_json(event) + b"\n\n"


DONE = b"data: [DONE]\n\n"
