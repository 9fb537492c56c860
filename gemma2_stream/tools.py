"""Tool calls and structured output for a model without tokens for them: prompt, grammar, parser.

Pure: knows JSON and text, no model and no LangChain. A call is a line of the answer,

    <tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>

and what a tool said comes back as <tool_result>{"name": "get_weather", "content": "sunny"}
</tool_result>. The prompt tells the model so, the grammar leaves it no other way to call, and the
parser turns the text back into calls while it arrives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"

# How json.dumps writes, and no white space elsewhere, in which a weak model could lose itself.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# What says something about a value and asks nothing of it (JSON Schema 2020-12, sections 8 and 9,
# and OpenAPI's `discriminator`).
_ANNOTATIONS = {"$comment", "contentEncoding", "contentMediaType", "contentSchema", "default"}
_ANNOTATIONS |= {"deprecated", "description", "discriminator", "example", "examples", "readOnly"}
_ANNOTATIONS |= {"title", "writeOnly"}
# Formats that the grammar knows; the others are annotations too (section 7.2.1).
_FORMATS = {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri"}
_FORMATS |= {"unknown", "uuid"}
# Where a schema holds schemas: one, a list of them, or one for each name.
_ONE = ("additionalProperties", "items", "additionalItems", "contains", "not", "if", "then", "else")
_LISTS = ("anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")


@dataclass(frozen=True, slots=True)
class Tool:
    """What can be called; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """What an answer may be: text, calls of `tools`, JSON that matches `schema`.

    With `required` it is a call, with `name` a call of that tool; with `parallel` there may be more
    than one. `schema` takes the place of free text.
    """

    tools: tuple[Tool, ...] = ()
    required: bool = False
    name: str | None = None
    parallel: bool = True
    schema: Mapping[str, Any] | None = None

    @property
    def callable(self) -> list[Tool]:
        """The tools that may be called."""
        return [tool for tool in self.tools if self.name in (None, tool.name)]

    def instructions(self) -> str | None:
        """What the model is told, as a part of the system prompt; None for free text."""
        parts = []
        if self.tools:
            parts.append(_HOW_TO_CALL.format(OPEN, CLOSE, "\n".join(map(_described, self.tools))))
            parts.append(self._whether_to_call)
        if self.schema is not None:
            parts.append(
                "Give your answer as JSON, without anything else, that matches this JSON schema:\n"
                + to_json(self.schema)
            )
        return "\n\n".join(parts) or None

    @property
    def _whether_to_call(self) -> str:
        if self.name is not None:
            return f"Answer with one call of {self.name}."
        if self.required:
            return "Answer with a call."
        return "Call a tool only if you need it; otherwise answer without one."

    def grammar(self) -> str | None:
        """The Lark grammar (llguidance's dialect) of the answers; None for free text."""
        if not self.tools:
            return None if self.schema is None else f"start: {_json(self.schema)}"
        more = f'("\\n{OPEN}" call)*' if self.parallel else ""
        called = f"call {more}"
        rules = [f"call: {' | '.join(map(_call_rule, self.callable))}"]
        if self.required:
            rules.append(f'start: "{OPEN}" {called}')
        elif self.schema is not None:
            rules += [f"answer: {_json(self.schema)}", f'start: answer | "{OPEN}" {called}']
        else:
            rules += [_FREE_TEXT, f"start: TEXT | before {called}"]
        return "\n".join(rules)


_HOW_TO_CALL = """\
You can call tools. To call one, write a line
{0}{{"name": "the tool's name", "arguments": {{its arguments as a JSON object}}}}{1}
and nothing after it; for several calls, write several such lines. What the tools return comes in \
the next message. The tools, each with the JSON schema of its arguments:
{2}"""

# Text without a call, or text up to the first one. Both are read at once, and a call decides.
_FREE_TEXT = rf"""TEXT: /(?s:.*)/ & ~/(?s:.*{OPEN}.*)/
before[suffix="{OPEN}"]: /(?s:.*)/"""


def _described(tool: Tool) -> str:
    said = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return to_json({name: value for name, value in said.items() if value})


def _call_rule(tool: Tool) -> str:
    head = '{"name": ' + to_json(tool.name) + ', "arguments": '
    return f'{to_json(head)} {_json({"type": "object", **tool.parameters})} "}}{CLOSE}"'


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + to_json({**enforceable(schema), "x-guidance": _SPACING})


def to_json(value: object) -> str:
    """JSON on one line, every script as it is."""
    return json.dumps(value, ensure_ascii=False)


def enforceable(schema: Mapping[str, Any]) -> dict[str, Any]:
    """`schema` as a grammar needs it: without annotations, and closed.

    Properties that an object's schema does not name are left out where it does not ask for them:
    otherwise a model could write them for ever.
    """
    kept = {name: value for name, value in schema.items() if not _is_annotation(name, value)}
    if "discriminator" in schema and "oneOf" in kept:  # its tags exclude each other
        kept["anyOf"] = kept.pop("oneOf")
    if "properties" in kept and "patternProperties" not in kept:
        kept.setdefault("additionalProperties", False)
    for name in kept:
        kept[name] = _subschemas(name, kept[name])
    return kept


def _is_annotation(name: str, value: object) -> bool:
    unknown = name == "format" and value not in _FORMATS
    return unknown or name in _ANNOTATIONS or (name, value) == ("uniqueItems", False)


def _subschemas(name: str, value: Any) -> Any:
    """The value of keyword `name`, with the schemas in it made enforceable."""
    if name in _NAMED:
        return {key: _sub(each) for key, each in value.items()}
    if name == "allOf":  # each adds to the others, so none of them may be closed alone
        return [_opened(_sub(each), each) for each in value]
    if name in _LISTS and isinstance(value, list):
        return [_sub(each) for each in value]
    return _sub(value) if name in _ONE else value


def _sub(schema: Any) -> Any:
    return enforceable(schema) if isinstance(schema, Mapping) else schema


def _opened(closed: Any, original: Any) -> Any:
    if isinstance(closed, dict) and "additionalProperties" not in original:
        closed.pop("additionalProperties", None)
    return closed


# Conversations ---------------------------------------------------------------------------------


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as the model writes it."""
    return f"{OPEN}{to_json({'name': name, 'arguments': arguments})}{CLOSE}"


def result_text(
    content: str, name: str | None, arguments: Mapping[str, Any] | None, error: bool
) -> str:
    """What a tool returned, as the model reads it. `arguments` tell it from its twins."""
    parts = {"name": name, "arguments": arguments, "status": "error" if error else None}
    said = [f"{to_json(key)}: {to_json(part)}" for key, part in parts.items() if part is not None]
    said.append(f'"content": {content if _is_json(content) else to_json(content)}')
    return f"<tool_result>{{{', '.join(said)}}}</tool_result>"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


# Answers ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CallPart:
    """The next piece of call `index`; `arguments` is JSON in parts, and `first` says that the call
    begins here. A call without a `name` in its first part is not well-formed.
    """

    index: int
    arguments: str
    name: str | None = None
    first: bool = False


_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


class CallParser:
    """Tells the text of an answer from its calls, as it arrives.

        parser.feed('Wait. <tool_')                          # ["Wait. "]
        parser.feed('call>{"name": "f", "arguments": {"a')   # [CallPart(0, '{"a', "f", True)]
        parser.feed('": 1}}</tool_call>', last=True)         # [CallPart(0, '": 1}')]

    A call that is not well-formed, or that the answer's end cuts, gets arguments that no JSON
    parser takes for whole, however lenient, so that it is never run.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._buffer = ""
        self._inside = False
        self._arguments: _Object | None = None

    def feed(self, text: str, *, last: bool = False) -> list[str | CallPart]:
        """What is certain now: text, and parts of calls, in order; `last` says that no more comes.

        A call has at most one part in it, since LangChain does not merge within a message.
        """
        self._buffer += text
        parts: list[str | CallPart] = []
        for part in self._parts(last):
            before = parts[-1] if parts else None
            if isinstance(before, CallPart) and isinstance(part, CallPart) and not part.first:
                parts[-1] = replace(before, arguments=before.arguments + part.arguments)
            elif part:
                parts.append(part)
        return parts

    def _parts(self, last: bool) -> Iterator[str | CallPart]:
        while (part := self._next()) is not None:
            yield part
        if last:
            yield self._rest()

    def _rest(self) -> str | CallPart:
        """The end of an answer that is over."""
        rest, self._buffer = self._buffer, ""
        if self._arguments is not None:
            cut = not self._arguments.whole
            return CallPart(self.calls - 1, self._arguments.spoiler()) if cut else ""
        if self._inside:
            return self._invalid(rest)
        return rest if rest.strip() or not self.calls else ""

    def _next(self) -> str | CallPart | None:
        """The next part of the buffer; "" where there may be more, None where there is none."""
        if self._arguments is not None:
            return self._in_arguments(self._arguments)
        return self._in_head() if self._inside else self._in_text()

    def _in_text(self) -> str | None:
        text, tag, rest = self._buffer.partition(OPEN)
        if tag:
            self._buffer, self._inside = rest, True
        else:
            held = _held(self._buffer, OPEN)
            text, self._buffer = self._buffer[: len(self._buffer) - held], text[len(text) - held :]
            if not text:
                return None
        # The line break between two calls is no text.
        return "" if self.calls and not text.strip() else text

    def _in_head(self) -> str | CallPart | None:
        match = _HEAD.match(self._buffer)
        if match and _is_json(match[1]):
            self._buffer = self._buffer[match.end() :]
            self._arguments = _Object()
            return self._begin("", json.loads(match[1]))
        raw, tag, rest = self._buffer.partition(CLOSE)
        if not tag:
            return None
        self._buffer, self._inside = rest, False
        return self._invalid(raw)

    def _in_arguments(self, arguments: _Object) -> str | CallPart | None:
        text, self._buffer = arguments.feed(self._buffer)
        if text:
            return CallPart(self.calls - 1, text)
        if not arguments.whole:
            return None
        _, tag, rest = self._buffer.partition(CLOSE)
        if not tag:
            return None
        self._buffer, self._inside, self._arguments = rest, False, None
        return ""

    def _invalid(self, raw: str) -> CallPart:
        scanned = _Object()
        scanned.feed(raw)
        return self._begin(raw + scanned.spoiler(), None)

    def _begin(self, arguments: str, name: str | None) -> CallPart:
        self.calls += 1
        return CallPart(self.calls - 1, arguments, name, first=True)


class _Object:
    """Finds the end of a JSON object that arrives in pieces."""

    def __init__(self) -> None:
        self.whole = False
        self._open: list[str] = []
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> tuple[str, str]:
        """`text` as what belongs to the object, and what comes after it."""
        if self.whole:
            return "", text
        for position, char in enumerate(text, 1):
            if self._in_string:
                self._in_string = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._open.append("}" if char == "{" else "]")
            elif char in "}]" and self._open:
                self._open.pop()
                if not self._open:
                    self.whole = True
                    return text[:position], text[position:]
        return text, ""

    def spoiler(self) -> str:
        """What makes all that came so far no JSON, also to a parser that closes what is open."""
        end = ('\\"' if self._escaped else '"') if self._in_string else ""
        return end + ("]" if self._open[-1:] == ["}"] else "}")


def _held(text: str, tag: str) -> int:
    """How many characters at the end of `text` could still become `tag`."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
