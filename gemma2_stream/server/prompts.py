"""A request of a client as rows for the engine. Pure, but for the engine's tokenizer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.output_parsers.openai_tools import make_invalid_tool_call, parse_tool_call

from ..errors import GrammarError, ParameterError, PromptTooLongError
from ..formats import answer_format
from ..messages import turns_of
from ..tools import AnswerFormat
from ..types import Engine, Request, SamplingParams
from .requests import ChatRequest, Message, Sampled, TextRequest
from .settings import Settings

_TEXT_TOKENS = 16  # OpenAI's default of the older endpoint


@dataclass(frozen=True, slots=True)
class Work:
    """`rows` for the engine, `choices` of them for each prompt, and what the answers may be."""

    rows: tuple[Request, ...]
    choices: int
    answer: AnswerFormat


def chat_work(asked: ChatRequest, engine: Engine, settings: Settings) -> Work:
    """Raises ParameterError, PromptError, PromptTooLongError or GrammarError."""
    answer = _answer_format(asked)
    try:
        turns = turns_of([_message(message) for message in asked.messages], answer)
        grammar = answer.grammar()
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise GrammarError(f"tools or response_format hold no JSON schema: {error}") from error
    limit = asked.max_completion_tokens or asked.max_tokens
    return Work(
        tuple(_rows([turns], asked, limit, engine, settings, engine.encode, grammar=grammar)),
        asked.n or 1,
        answer,
    )


def text_work(asked: TextRequest, engine: Engine, settings: Settings) -> Work:
    """Raises ParameterError, PromptError or PromptTooLongError."""
    given: Any = asked.prompt
    prompts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    limit = asked.max_tokens or min(_TEXT_TOKENS, settings.max_tokens or _TEXT_TOKENS)
    grammar = asked.structured_outputs.grammar if asked.structured_outputs else None
    encode = partial(_text_ids, engine)
    rows = _rows(prompts, asked, limit, engine, settings, encode, grammar=grammar)
    return Work(tuple(rows), asked.n or 1, AnswerFormat())


def _text_ids(engine: Engine, prompt: str | list[int]) -> list[int]:
    """Token ids as they are. Raises ParameterError for one that the model has not."""
    if isinstance(prompt, str):
        return engine.encode(prompt, raw=True)
    size = getattr(engine, "vocab_size", None)
    if size is not None and max(prompt) >= size:
        raise ParameterError(
            f"prompt=[{max(prompt)}] is no id of this model, whose are below {size:,}: make them "
            "with its own tokenizer"
        )
    return prompt


def _rows(
    prompts: Sequence[Any],
    asked: Sampled,
    limit: int | None,
    engine: Engine,
    settings: Settings,
    encode: Callable[[Any], list[int]],
    *,
    grammar: str | None = None,
) -> Iterator[Request]:
    each = asked.n or 1
    if len(prompts) * each > settings.max_choices:
        raise ParameterError(
            f"n={each} answers to {len(prompts):,} prompts are more than the "
            f"{settings.max_choices} that this server gives at once: ask for fewer"
        )
    if settings.max_tokens is not None:
        if limit is not None and limit > settings.max_tokens:
            raise ParameterError(
                f"max_tokens={limit} is more than this server gives: ask for at most "
                f"{settings.max_tokens}"
            )
        limit = limit or settings.max_tokens
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
    params = SamplingParams(
        **asked.sampling, stop=stop, max_new_tokens=limit, timeout=settings.max_seconds
    )
    # The engine would refuse it too, by a name that clients do not know.
    most = min(
        settings.max_prompt_tokens or sys.maxsize,
        getattr(engine, "context_length", sys.maxsize) - 1,
    )
    for prompt in prompts:
        ids = tuple(encode(prompt))
        if len(ids) > most:
            raise PromptTooLongError(
                f"the prompt is too long: it has {len(ids):,} tokens, and at most {most:,} leave "
                "room for an answer here"
            )
        for choice in range(each):
            yield Request(ids, _seeded(params, choice), grammar)


def _seeded(params: SamplingParams, choice: int) -> SamplingParams:
    """One seed would say the same in each choice."""
    if params.seed is None or choice == 0:
        return params
    return params.override(seed=(params.seed + choice) % 2**64)


def _answer_format(asked: ChatRequest) -> AnswerFormat:
    said: dict[str, Any] = asked.model_dump(
        include={"tools", "tool_choice", "parallel_tool_calls", "response_format"},
        exclude_none=True,
        by_alias=True,
    )
    shape = said.get("response_format", {}).get("json_schema", {})
    if "description" in shape:  # where the model reads it
        shape["schema"] = {"description": shape["description"], **shape["schema"]}
    return answer_format(said)


def _message(message: Message) -> BaseMessage:
    content: Any = message.content or ""
    if isinstance(content, list):
        content = [part.model_dump() for part in content]
    if message.role == "assistant":
        return _assistant(message, content)
    if message.role == "tool":
        return ToolMessage(content, tool_call_id=message.tool_call_id, name=message.name)
    kind = HumanMessage if message.role == "user" else SystemMessage
    return kind(content, name=message.name)


def _assistant(message: Message, content: Any) -> AIMessage:
    calls, bad = [], []
    for call in message.tool_calls or ():
        said = call.model_dump()
        try:
            calls.append(parse_tool_call(said, strict=True, return_id=True))
        except OutputParserException:
            bad.append(make_invalid_tool_call(said, None))
    return AIMessage(content, name=message.name, tool_calls=calls, invalid_tool_calls=bad)
