"""What a caller of the chat model asks of its answer, in LangChain's and OpenAI's words: tools,
`tool_choice`, `response_format`, and the parsers of structured output. Runs no model.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Literal

from langchain_core.messages import AIMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import (
    JsonOutputKeyToolsParser,
    PydanticToolsParser,
)
from langchain_core.runnables import Runnable, RunnableGenerator
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

from .errors import ParameterError, StructuredOutputError
from .tools import AnswerFormat, Tool, enforceable

FORMAT_NAMES = {"tools", "tool_choice", "parallel_tool_calls", "response_format", "strict"}
"""What `answer_format` reads of a call."""

Method = Literal["json_schema", "function_calling", "json_mode"]


def answer_format(kwargs: Mapping[str, Any]) -> AnswerFormat:
    """`tools`, `tool_choice` and the like of a call. Raises ParameterError."""
    for flag in ("strict", "parallel_tool_calls"):
        if not isinstance(kwargs.get(flag), bool | None):
            raise ParameterError(f"{flag}={kwargs[flag]!r} is not True, False or None")
    tools = tools_of(kwargs.get("tools") or ())
    required, name = _tool_choice(kwargs.get("tool_choice"), [tool.name for tool in tools])
    parallel = kwargs.get("parallel_tool_calls")
    return AnswerFormat(
        tools=() if required is None else tools,
        required=bool(required),
        name=name,
        parallel=not required if parallel is None else parallel,
        schema=_response_schema(kwargs.get("response_format")),
    )


def tools_of(tools: Sequence[Any]) -> tuple[Tool, ...]:
    """`tools` of any of LangChain's kinds. Raises ParameterError for two of one name."""
    found: dict[str, Tool] = {}
    for tool in tools:
        said = convert_to_openai_tool(tool)["function"]
        new = Tool(said["name"], said.get("description", ""), said.get("parameters") or {})
        old = found.setdefault(new.name, new)
        if enforceable(old.parameters) != enforceable(new.parameters):
            raise ParameterError(f"two different tools are named {new.name!r}: rename one")
    return tuple(found.values())


def _tool_choice(choice: Any, names: Sequence[str]) -> tuple[bool | None, str | None]:
    """Whether a call is required (None: forbidden), and of which tool."""
    if choice in (None, False, "auto"):
        return False, None
    if choice == "none":
        return None, None
    name = choice
    if isinstance(choice, Mapping):
        name = (choice.get("function") or choice).get("name")
    if name in names:
        return True, name
    if choice in (True, "any", "required") and names:
        return True, None
    known = ["auto", "none", "any", "required", *names]
    raise ParameterError(
        f"tool_choice={choice!r} is none of {', '.join(map(repr, known))}"
        + ("" if names else "; and there are no tools: give some with bind_tools")
    )


def _response_schema(response_format: Any) -> Mapping[str, Any] | None:
    """The JSON schema of an OpenAI-style `response_format`; None for text."""
    kind = response_format.get("type") if isinstance(response_format, Mapping) else response_format
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema":
        schema = (response_format.get("json_schema") or {}).get("schema")
        if isinstance(schema, Mapping):
            return schema
    raise ParameterError(
        f"response_format={response_format!r} is none of {{'type': 'text'}}, {{'type': "
        "'json_object'}} and {'type': 'json_schema', 'json_schema': {'name': ..., 'schema': ...}}"
    )


# Structured output ---------------------------------------------------------------------------


def structured(schema: Any, method: str) -> tuple[dict[str, Any], Runnable[Any, Any]]:
    """What to bind to the model for answers that match `schema`, and what parses them.

    Raises ParameterError.
    """
    known = ("json_schema", "function_calling", "json_mode")
    if method not in known:
        raise ParameterError(f"method={method!r} is none of {', '.join(map(repr, known))}")
    tool = convert_to_openai_tool(schema)
    name = tool["function"]["name"]
    traced = {"kwargs": {"method": method}, "schema": schema}
    is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
    asked: dict[str, Any]
    parser: Runnable[Any, Any]
    if method == "function_calling":
        asked = {"tools": [tool], "tool_choice": name}
        if is_class:
            parser = PydanticToolsParser(tools=[schema], first_tool_only=True)
        else:
            parser = JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
    else:
        shape = {"name": name, "schema": convert_to_json_schema(schema)}
        asked = {"response_format": {"type": "json_schema", "json_schema": shape}}
        parser = PydanticOutputParser(pydantic_object=schema) if is_class else JsonOutputParser()
    whole: Runnable[Any, Any] = RunnableGenerator(_whole, _awhole)
    return {**asked, "ls_structured_output_format": traced}, whole | parser


def _whole(messages: Iterator[AIMessage]) -> Iterator[AIMessage]:
    """Pass an answer on, and raise StructuredOutputError at its end if it is not whole."""
    total: Any = None
    for message in messages:
        total = message if total is None else total + message
        yield message
    _check_whole(total)


async def _awhole(messages: AsyncIterator[AIMessage]) -> AsyncIterator[AIMessage]:
    total: Any = None
    async for message in messages:
        total = message if total is None else total + message
        yield message
    _check_whole(total)


def _check_whole(answer: AIMessage) -> None:
    if answer.tool_calls and not answer.invalid_tool_calls:
        return
    try:
        if not answer.invalid_tool_calls:
            json.loads(answer.text)
            return
    except ValueError:
        pass
    metadata = answer.response_metadata
    reason = "is cut"
    if metadata.get("finish_reason") == "length":
        reason = "did not fit its token limit: raise max_new_tokens"
    elif metadata.get("matched_stop"):
        reason = f"was ended by stop={metadata['matched_stop']!r}: leave that out"
    raise StructuredOutputError(
        f"the structured answer {reason}. It got as far as {answer.text[:200]!r}",
        llm_output=answer.text,
    )
