"""Calls in text, what an answer may be, and what a schema is made enforceable into."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessageChunk
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.tools import tool
from pydantic import BaseModel

from gemma2_stream import GrammarError, ParameterError
from gemma2_stream.formats import answer_format, openai_tool, structured
from gemma2_stream.tools import (
    AnswerFormat,
    CallParser,
    CallPart,
    Tool,
    call_text,
    enforceable,
    to_json,
)

# The parser --------------------------------------------------------------------------------------


def fed(pieces: list[str]) -> list[str | CallPart]:
    parser = CallParser()
    parts = [part for piece in pieces for part in parser.feed(piece)]
    return parts + parser.feed("", last=True)


def joined(parts: list[str | CallPart]) -> tuple[str, list[tuple[str | None, str]]]:
    """The text of an answer, and each call's name and arguments."""
    calls: list[tuple[str | None, str]] = []
    for part in parts:
        if isinstance(part, CallPart):
            assert part.first == (part.index == len(calls))
            if part.first:
                calls.append((part.name, ""))
            name, arguments = calls[part.index]
            calls[part.index] = (name, arguments + part.arguments)
    return "".join(part for part in parts if isinstance(part, str)), calls


def message(parts: list[str | CallPart]) -> AIMessageChunk:
    """The parts as LangChain merges them, each in a chunk of its own."""
    total = AIMessageChunk("")
    for part in parts:
        if isinstance(part, str):
            total += AIMessageChunk(part)
            continue
        chunk = tool_call_chunk(
            name=part.name,
            args=part.arguments,
            id=f"id{part.index}" if part.first else None,
            index=part.index,
        )
        total += AIMessageChunk("", tool_call_chunks=[chunk])
    return total + AIMessageChunk("", chunk_position="last")


words = st.text(max_size=6) | st.sampled_from(
    ["</tool_call>", "<tool_call>", '"', "\\", '\\"', "{", "}", "]", "\n", "<", "é", "\\u0041"]
)
texts = st.lists(words, max_size=3).map("".join)
values = st.recursive(
    texts | st.integers() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
made = st.tuples(texts, st.dictionaries(texts, values, max_size=3))
plain = st.lists(
    st.text(max_size=6) | st.sampled_from(["<tool_", "<", "</tool_call>", "tool_call>", "{}"]),
    max_size=3,
).map(lambda parts: "".join(parts).replace("<tool_call>", ""))
answers = st.lists(plain | made.map(lambda call: call_text(*call)), max_size=4).map("".join)
anything = st.lists(answers | words, max_size=4).map("".join)


@settings(max_examples=60)
@given(text=anything)
@example(text=call_text("f", {}) + "one two")
@example(text=call_text("</tool_call>", {}))
@example(text=call_text('a\\"</tool_call>', {"b": 1}))
@example(text='a<tool_call>{"name": "f", "arguments": {"a": "\\"}"}}</tool_call>b')
@example(text='<tool_call>{"name": "f", "arguments": {"a": 1}')
def test_how_an_answer_is_cut_into_pieces_changes_nothing(text: str) -> None:
    """Character by character, in two at every place, and whole: the same text, the same calls."""
    whole = joined(fed([text]))
    assert joined(fed(list(text))) == whole
    for place in range(min(len(text), 150)):
        assert joined(fed([text[:place], text[place:]])) == whole


@settings(max_examples=80)
@given(before=plain, calls=st.lists(made, min_size=1, max_size=3))
def test_what_was_written_is_read(before: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    """Text before, and every call with its name and its arguments, whatever strings they hold."""
    written = before + "\n".join(call_text(*call) for call in calls)
    answer = message(fed(list(written)))
    text = before if before.strip() else ""
    assert str(answer.content).strip() == text.strip()
    assert answer.invalid_tool_calls == []
    # LangChain has no call without a name.
    named = [(c["name"], c["args"]) for c in answer.tool_calls]
    assert named == [(name, args) for name, args in calls]


@settings(max_examples=60)
@given(call=made)
@example(call=("f", {"a": [1, {"b": "c\\"}], "d": 'e"}'}))
@example(call=("f", {}))
def test_a_cut_call_is_never_run(call: tuple[str, dict[str, Any]]) -> None:
    """At whatever character the answer ends, there is no valid call before the arguments are whole:
    LangChain's lenient parser is not allowed to complete what was never said."""
    written = call_text(*call)
    whole = len(written) - len("}</tool_call>")
    for end in range(len("<tool_call>"), whole):
        answer = message(fed([written[:end]]))
        assert answer.tool_calls == []
        assert len(answer.invalid_tool_calls) == 1


@pytest.mark.parametrize(
    "inside",
    [
        "",
        "what",
        "{}",
        '{"name": "f"}',
        '{"name": "f", "arguments": 1}',
        '{"name": "f", "arguments": [1]}',
        '{"arguments": {}, "name": "f"}',
        '{"name": 1, "arguments": {}}',
        '{"name": "\\x", "arguments": {}}',
        '{"name": "f", "arguments": {a: 1}}',
        '{"name": "f", "arguments": {"a": nope}}',
        '{"name": "f", "arguments": {"a": [1}}',
        '{"name": "f", "arguments": {"a": "b}}',
        '["name", "f"]',
    ],
)
def test_a_malformed_call_is_an_invalid_one(inside: str) -> None:
    """It is kept for the model to see, never valid, and what comes after it is still read."""
    good = call_text("g", {"x": 1})
    answer = message(fed([f"<tool_call>{inside}</tool_call>"]))
    assert answer.tool_calls == []
    assert len(answer.invalid_tool_calls) == 1
    if '"b}}' not in inside and "[1}" not in inside:  # those two run into what follows
        both = message(fed([f"<tool_call>{inside}</tool_call>\n{good}"]))
        assert [call["name"] for call in both.tool_calls] == ["g"]


def test_what_may_become_a_call_is_held_back() -> None:
    """No more than that: a prefix of the tag waits for the next piece, and comes if it is none."""
    parser = CallParser()
    assert parser.feed("Hi <tool") == ["Hi "]
    assert parser.feed("s> <") == ["<tools> "]
    assert parser.feed("tool_call>") == []
    assert parser.feed('{"name": "f", "arguments": {"a"') == [CallPart(0, '{"a"', "f", True)]
    assert parser.feed(": 1") == [CallPart(0, ": 1")]
    assert parser.feed("}}</tool_call>", last=True) == [CallPart(0, "}")]
    assert CallParser().feed("a <tool_call", last=True) == ["a ", "<tool_call"]


def test_text_after_and_between_calls() -> None:
    """Line breaks between calls are nobody's; words are text."""
    one, two = call_text("f", {}), call_text("g", {})
    assert joined(fed([f"a\n{one}\n{two}\n"])) == ("a\n", [("f", "{}"), ("g", "{}")])
    assert joined(fed([f"{one} and {two}."])) == ("and .", [("f", "{}"), ("g", "{}")])


# What an answer may be ---------------------------------------------------------------------------


class Weather(BaseModel):
    """Weather of a city."""

    city: str


@tool
def add(a: int, b: int) -> int:
    """Add."""
    return a + b


TOOLS = [Weather, add]


def test_free_text_asks_for_nothing() -> None:
    """No tools and no schema: neither instructions nor a grammar."""
    assert AnswerFormat().instructions() is None
    assert AnswerFormat().grammar() is None


def test_instructions_say_what_there_is() -> None:
    """Each tool as JSON on a line of its own, then whether to call; a schema word for word."""
    told = answer_format({"tools": TOOLS}).instructions() or ""
    described = [json.loads(line) for line in told.splitlines() if line.startswith('{"name": "W')]
    assert described[0]["parameters"]["properties"] == {"city": {"type": "string"}}
    assert "Call a tool only if you need it" in told
    forced = answer_format({"tools": TOOLS, "tool_choice": "add"}).instructions() or ""
    assert forced.endswith("Answer with one call of add.")
    schema = {"type": "object", "title": "名"}
    assert to_json(schema) in (AnswerFormat(schema=schema).instructions() or "")


@pytest.mark.parametrize(
    ("choice", "required", "name", "count"),
    [
        (None, False, None, 2),
        ("auto", False, None, 2),
        (False, False, None, 2),
        ("none", False, None, 0),
        ("any", True, None, 2),
        ("required", True, None, 2),
        (True, True, None, 2),
        ("add", True, "add", 2),
        ({"type": "function", "function": {"name": "add"}}, True, "add", 2),
        ({"type": "tool", "name": "add"}, True, "add", 2),
    ],
    ids=str,
)
def test_tool_choice_in_every_spelling(
    choice: Any, required: bool, name: str | None, count: int
) -> None:
    """OpenAI's, Anthropic's and LangChain's."""
    answer = answer_format({"tools": TOOLS, "tool_choice": choice})
    assert (answer.required, answer.name, len(answer.tools)) == (required, name, count)
    assert answer.parallel is not required


@pytest.mark.parametrize("choice", ["sub", 2, ["add"], {"name": "sub"}, {"function": {}}, "", {}])
def test_an_unknown_tool_choice_is_refused(choice: Any) -> None:
    """With the value and what would do, the tools' names among it."""
    with pytest.raises(ParameterError, match=r"'any'.*'Weather', 'add'") as raised:
        answer_format({"tools": TOOLS, "tool_choice": choice})
    assert f"tool_choice={choice!r}" in str(raised.value)


@pytest.mark.parametrize("choice", ["any", "add", True])
def test_a_choice_without_tools_is_refused(choice: Any) -> None:
    """The error says where tools come from."""
    with pytest.raises(ParameterError, match="there are no tools: give some with bind_tools"):
        answer_format({"tool_choice": choice})


@pytest.mark.parametrize("flag", ["strict", "parallel_tool_calls"])
def test_flags_are_flags(flag: str) -> None:
    """Neither 1 nor a word passes for True."""
    for value in (1, "yes"):
        with pytest.raises(ParameterError, match=f"{flag}={value!r} is not True, False or None"):
            answer_format({flag: value})


def test_one_tool_twice_is_one_and_two_of_a_name_are_refused() -> None:
    """What differs only in annotations is the same."""
    same = {"name": "Weather", "description": "d", "parameters": {
        "properties": {"city": {"type": "string", "title": "City"}}, "required": ["city"],
        "type": "object",
    }}  # fmt: skip
    assert len(answer_format({"tools": [Weather, Weather, same]}).tools) == 1
    with pytest.raises(ParameterError, match="two different tools are named 'Weather': rename one"):
        answer_format({"tools": [Weather, {**same, "parameters": {"type": "object"}}]})


@pytest.mark.parametrize(
    "wrong",
    [
        "json",
        {"type": "xml"},
        {"type": "json_schema"},
        {},
        1,
        {"type": "json_schema", "json_schema": {"schema": 1}},
    ],
)
def test_an_unknown_response_format_is_refused(wrong: Any) -> None:
    """With the value, and the three that there are; {} asks for nothing."""
    if wrong == {}:
        assert answer_format({"response_format": wrong}).schema is None
        return
    with pytest.raises(ParameterError, match=r"'json_object'.*'json_schema'") as raised:
        answer_format({"response_format": wrong})
    assert repr(wrong) in str(raised.value)


def test_an_unknown_method_is_refused() -> None:
    """With those that there are."""
    with pytest.raises(ParameterError, match="method='xml' is none of 'json_schema'"):
        structured(Weather, "xml")


# Schemas -----------------------------------------------------------------------------------------


class Node(BaseModel):
    """A node."""

    next: Node | None


@pytest.mark.parametrize(
    "schema",
    [Node, {**Node.model_json_schema(), "title": "Node"}],
    ids=["class", "schema"],
)
def test_recursion_stays_in_the_schema(schema: Any) -> None:
    """LangChain would have "anything" there."""
    said = openai_tool(schema)["function"]
    assert said["name"] == "Node"
    assert said["parameters"]["$ref"] == "#/$defs/Node"
    asked, _ = structured(schema, "json_schema")
    assert asked["response_format"]["json_schema"]["schema"]["$ref"] == "#/$defs/Node"


STRING, CLOSED = {"type": "string"}, {"additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "made"),
    [
        ({**STRING, "title": "T", "description": "d", "default": "x", "examples": ["x"]}, STRING),
        ({**STRING, "format": "phone", "contentEncoding": "base64", "readOnly": True}, STRING),
        ({**STRING, "format": "uuid"}, {**STRING, "format": "uuid"}),
        ({"type": "array", "uniqueItems": False}, {"type": "array"}),
        ({"properties": {}}, {"properties": {}, **CLOSED}),
        (
            {"properties": {"title": {**STRING, "title": "x"}, "default": STRING, "format": {}}},
            {"properties": {"title": STRING, "default": STRING, "format": {}}, **CLOSED},
        ),
        (
            {"properties": {}, "additionalProperties": {**STRING, "title": "x"}},
            {"properties": {}, "additionalProperties": STRING},
        ),
        (
            {"properties": {}, "patternProperties": {"a": {**STRING, "title": "x"}}},
            {"properties": {}, "patternProperties": {"a": STRING}},
        ),
        ({"items": {"properties": {}}}, {"items": {"properties": {}, **CLOSED}}),
        ({"prefixItems": [{"properties": {}}]}, {"prefixItems": [{"properties": {}, **CLOSED}]}),
        (
            {"$defs": {"title": {"properties": {}}}},
            {"$defs": {"title": {"properties": {}, **CLOSED}}},
        ),
        ({"anyOf": [{"properties": {}}, True]}, {"anyOf": [{"properties": {}, **CLOSED}, True]}),
        ({"allOf": [{"properties": {}}]}, {"allOf": [{"properties": {}}]}),
        ({"allOf": [{"properties": {}, **CLOSED}]}, {"allOf": [{"properties": {}, **CLOSED}]}),
        (
            {"properties": {}, "anyOf": [{"properties": {}}]},
            {"properties": {}, "anyOf": [{"properties": {}}]},
        ),
        ({"oneOf": [STRING], "discriminator": {"propertyName": "k"}}, {"anyOf": [STRING]}),
        ({"oneOf": [STRING]}, {"oneOf": [STRING]}),
        (
            {"enum": [{"title": "kept"}], "const": {"default": 1}},
            {"enum": [{"title": "kept"}], "const": {"default": 1}},
        ),
    ],
    ids=str,
)
def test_what_a_schema_is_made_into(schema: dict[str, Any], made: dict[str, Any]) -> None:
    """Annotations go, properties of those names stay, objects are closed where nothing adds to
    them, and what is given is left as it was."""
    before = json.dumps(schema)
    assert enforceable(schema) == made
    assert json.dumps(schema) == before


def test_more_properties_than_are_named_are_refused() -> None:
    """Two names that a model makes up may be the same."""
    with pytest.raises(GrammarError, match="minProperties=2"):
        AnswerFormat(schema={"type": "object", "minProperties": 2}).grammar()
    named = {"type": "object", "properties": {"a": {}}, "required": ["a"], "minProperties": 2}
    assert AnswerFormat(schema={**named, "additionalProperties": True}).grammar()


def test_names_of_tools_are_quoted_in_the_grammar() -> None:
    """A name with quotes, backslashes or line breaks breaks nothing out."""
    answer = AnswerFormat(tools=(Tool('a"b\\c\n<tool_call>', "", {}),), required=True)
    assert json.dumps(json.dumps('a"b\\c\n<tool_call>'))[1:-1] in (answer.grammar() or "")
