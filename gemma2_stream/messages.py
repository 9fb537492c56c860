"""LangChain messages to turns: what Gemma can read, in the words of `tools.py` where it is a call.

Pure: knows LangChain's messages, no model and no tokenizer. Nothing is dropped silently: what Gemma
cannot read is refused by name; only another model's reasoning is left out, which no provider takes
back either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from .errors import PromptError
from .tools import CLOSE, OPEN, AnswerFormat, call_text, result_text, to_json
from .types import Turn

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "model": "assistant",
}
# Blocks of an AI message that say what `tool_calls` says too.
_CALLS = {"tool_use", "tool_call", "tool_call_chunk", "function_call", "input_json_delta"}
_CALLS |= {"invalid_tool_call"}
_REASONING = {"thinking", "redacted_thinking", "reasoning", "reasoning_content"}


def turns_of(messages: Sequence[BaseMessage], answer: AnswerFormat | None = None) -> list[Turn]:
    """A conversation as turns, with what the model is told about `answer` after the system prompt.

    Raises PromptError, naming the message, for what Gemma cannot read.
    """
    turns: list[Turn] = []
    calls = _calls_by_id(messages)
    several = len({message.name for message in messages if isinstance(message, AIMessage)}) > 1
    for number, message in enumerate(messages):
        try:
            turns.append(_turn(message, calls, several))
        except _Unreadable as error:
            raise PromptError(
                f"messages[{number}] ({type(message).__name__}) {error.args[0]}"
            ) from None
    told = answer.instructions() if answer is not None else None
    if told is not None:
        first = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
        turns.insert(first, {"role": "system", "content": told})
    return turns


class _Unreadable(Exception):
    """Why a message cannot be rendered, as the end of a sentence about it."""


def _turn(message: BaseMessage, calls: Mapping[str | None, _Call], several: bool) -> Turn:
    if isinstance(message, AIMessage):
        text = _named(_text(message), message.name if several else None)
        lines = [text] if text else []
        return {"role": "assistant", "content": "\n".join([*lines, *_written(message)])}
    if isinstance(message, ToolMessage | FunctionMessage):
        return {"role": "user", "content": _result(message, calls)}
    return {"role": _role(message), "content": _named(_text(message), message.name)}


def _role(message: BaseMessage) -> str:
    if isinstance(message, SystemMessage):
        return "system"
    if isinstance(message, HumanMessage):
        return "user"
    role = message.role if isinstance(message, ChatMessage) else message.type
    if role not in _ROLES:
        raise _Unreadable(
            f"has the role {role!r}, which Gemma does not know: use a SystemMessage, HumanMessage, "
            "AIMessage or ToolMessage"
        )
    return _ROLES[role]


def _named(text: str, name: str | None) -> str:
    """Gemma knows no names, so who speaks is part of what is said."""
    return f"{name}: {text}" if name else text


def _text(message: BaseMessage) -> str:
    content = message.content
    blocks = [content] if isinstance(content, str) else content
    return "".join(_block_text(block, isinstance(message, AIMessage)) for block in blocks)


def _block_text(block: str | dict[Any, Any], by_model: bool) -> str:
    if isinstance(block, str):
        return block
    kind = block.get("type")
    if kind in ("text", "text-plain", "refusal", "output_text", "input_text"):
        text = block.get("text", block.get("refusal"))
        if isinstance(text, str):
            return text
        raise _Unreadable(f"has a {kind!r} block without text: {block!r:.100}")
    if by_model and (kind in _CALLS or kind in _REASONING):
        return ""
    raise _Unreadable(
        f"holds a block of type {kind!r}, and Gemma 2 reads text only: send what it says as text, "
        "or remove it"
    )


_Call = tuple[str, Mapping[str, Any] | None]
"""A call's name, and its arguments where only they tell it from another of the same message."""


def _calls_by_id(messages: Sequence[BaseMessage]) -> dict[str | None, _Call]:
    found: dict[str | None, _Call] = {}
    for message in messages:
        made = _calls(message) if isinstance(message, AIMessage) else []
        names = [call["name"] for call in made]
        for call in made:
            twins = names.count(call["name"]) > 1
            found[call["id"]] = (call["name"], call["args"] if twins else None)
    return found


def _calls(message: AIMessage) -> list[dict[str, Any]]:
    """The calls of a message, those that are only among its content blocks included."""
    calls: list[dict[str, Any]] = [dict(call) for call in message.tool_calls]
    known = {call["id"] for call in calls}
    blocks = message.content if isinstance(message.content, list) else []
    for block in blocks:
        if isinstance(block, dict) and block.get("type") in ("tool_use", "tool_call"):
            call = {"name": block.get("name"), "id": block.get("id")}
            call["args"] = block.get("input", block.get("args", {}))
            calls += [call] if call["id"] not in known else []
    return calls


def _written(message: AIMessage) -> Iterator[str]:
    """The calls of a message as the model writes them, bad ones as bad as they were."""
    for call in _calls(message):
        yield call_text(call["name"], call["args"])
    for bad in message.invalid_tool_calls:
        head = f'{{"name": {to_json(bad["name"])}, "arguments": ' if bad["name"] else ""
        yield f"{OPEN}{head}{bad['args'] or ''}{CLOSE}"


def _result(message: ToolMessage | FunctionMessage, calls: Mapping[str | None, _Call]) -> str:
    name, arguments = calls.get(getattr(message, "tool_call_id", None), (None, None))
    failed = getattr(message, "status", "success") == "error"
    return result_text(_text(message), message.name or name, arguments, failed)
