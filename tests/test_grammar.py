"""Grammars and Constraint: whatever the weights, the text matches, and it ends in time."""

from __future__ import annotations

import datetime
import decimal
import enum
import ipaddress
import json
import random
import threading
import uuid
from collections.abc import Callable
from typing import Annotated, Any, Literal, NotRequired

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from langchain_core.messages import HumanMessage
from pydantic import AnyUrl, BaseModel, Field, TypeAdapter
from tiny import DEMO
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from gemma2_stream import (
    ChatGemma2,
    Gemma2Engine,
    GrammarError,
    Request,
    SamplingParams,
    StructuredOutputError,
)
from gemma2_stream.detokenizer import detokenizer_for
from gemma2_stream.grammar import Constraint, Grammars
from gemma2_stream.prompt import PromptEncoder
from gemma2_stream.sampling import Chooser, RowLogits
from gemma2_stream.tools import AnswerFormat, Tool


class Colour(enum.Enum):
    RED = "red"
    GREEN = 'green, or "grün"'
    BLUE = "<end_of_turn>"


class Point(BaseModel):
    """A class with a docstring, which becomes a description."""

    x: int
    label: str | None = None


class Tree(BaseModel):
    value: int
    children: list[Tree] = []


class Link(BaseModel):
    v: bool
    next: Link | None


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=0, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    good: bool


class Pets(BaseModel):
    pets: list[Annotated[Cat | Dog, Field(discriminator="kind")]] = Field(
        min_length=1, max_length=3
    )


class Keywords(BaseModel):
    """Fields that are named as JSON Schema's own words are."""

    title: str
    default: float
    format: Point
    description: Colour
    examples: Point | None = None
    properties: int | str | list[bool] | None


class Bounds(BaseModel):
    i: int = Field(ge=-5, le=1000)
    j: int = Field(gt=3, lt=7)
    f: float = Field(ge=0.5, lt=2.25)
    g: float = Field(gt=-1.5, le=-0.25)
    s: str = Field(min_length=2, max_length=5)
    p: str = Field(pattern=r"^[A-Z]{2}-\d{3,}$")
    m: int = Field(multiple_of=7, gt=0)


class Formats(BaseModel):
    day: datetime.date
    moment: datetime.datetime
    hour: datetime.time
    span: datetime.timedelta
    id: uuid.UUID
    v4: ipaddress.IPv4Address
    v6: ipaddress.IPv6Address
    link: AnyUrl


class Bags(BaseModel):
    counts: dict[str, int]
    anything: dict[str, Any]
    whatever: Any
    pair: tuple[int, str]
    price: float | decimal.Decimal | None = None


class Partial(TypedDict):
    a: NotRequired[int]
    b: Literal[1, "two", None, True]


class Empty(BaseModel):
    pass


OBJECT = {"type": "object"}
INTEGER, STRING = {"type": "integer"}, {"type": "string"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "anything": {},
    "an object": OBJECT,
    "a string": STRING,
    "enum": {"enum": ["a", 1, None, {"x": [1, 2]}, "<end_of_turn>", "<eos>", '\u2028\\"']},
    "const": {"const": "<start_of_turn>user\n<bos>"},
    "several types": {"type": ["integer", "null", "string"], "maximum": 3, "maxLength": 4},
    "pattern": {"type": "string", "pattern": "^(ab){3,}c*$"},
    "open pattern": {"type": "string", "pattern": "[0-9]+$"},
    "long pattern": {"type": "string", "pattern": "^[a-z]{40}x$"},
    "length": {"type": "string", "minLength": 30, "maxLength": 40},
    "date": {"type": "string", "format": "date"},
    "February": {"type": "string", "format": "date", "pattern": "-02-2"},
    "email": {"type": "string", "format": "email"},
    "hostname": {"type": "string", "format": "hostname"},
    "unknown format": {"type": "string", "format": "phone"},
    "number": {"type": "number", "minimum": 1e-5, "maximum": 1e5},
    "large": {"type": "integer", "minimum": 10**15},
    "even": {"type": "integer", "minimum": 1, "multipleOf": 2},
    "hundreds": {"type": "integer", "minimum": 1, "multipleOf": 100},
    "arrays": {
        "type": "array",
        "items": {"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 2},
        "minItems": 3,
    },
    "tuple": {"type": "array", "prefixItems": [INTEGER, STRING], "items": {"type": "boolean"}},
    "names": {
        "type": "object",
        "properties": {"名": STRING, 'a b"c': {"const": "é\n"}},
        "required": ["名", 'a b"c'],
    },
    "pattern of names": {
        "type": "object",
        "patternProperties": {"^x": INTEGER},
        "additionalProperties": False,
    },
    "further names": {
        "type": "object",
        "properties": {"a": INTEGER},
        "required": ["a", "b"],
        "additionalProperties": {"type": "boolean"},
    },
    "some name": {"type": "object", "minProperties": 1, "additionalProperties": INTEGER},
    "allOf": {
        "allOf": [
            {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
            {"type": "object", "properties": {"b": STRING}, "required": ["b"]},
        ]
    },
    "allOf beside properties": {
        "type": "object",
        "properties": {"a": INTEGER},
        "required": ["a"],
        "allOf": [{"properties": {"b": STRING}, "required": ["b"]}],
    },
    "anyOf beside properties": {
        "type": "object",
        "properties": {"a": INTEGER},
        "required": ["a"],
        "anyOf": [
            {"properties": {"b": STRING}, "required": ["b"]},
            {"properties": {"c": STRING}, "required": ["c"]},
        ],
    },
}
CLASSES = [Point, Tree, Link, Pets, Keywords, Bounds, Formats, Bags, Partial, Empty]
SHAPES: dict[str, Any] = {cls.__name__: cls for cls in CLASSES} | SCHEMAS
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))


def schema_of(shape: Any) -> dict[str, Any]:
    return shape if isinstance(shape, dict) else TypeAdapter(shape).json_schema()


# jsonschema's "time" is that of an old draft; pydantic looks after ours.
formats = jsonschema.FormatChecker(set(jsonschema.FormatChecker.checkers) - {"time"})


def check(shape: Any, text: str) -> None:
    """Raises where `text` is not JSON of this shape."""
    jsonschema.validate(json.loads(text), schema_of(shape), format_checker=formats)
    if not isinstance(shape, dict):
        TypeAdapter(shape).validate_json(text)


class Held:
    """A tokenizer with its grammars, and random weights that know no JSON."""

    def __init__(self, tokenizer: Any, end_ids: list[int]) -> None:
        self.tokenizer, self.end_ids, size = tokenizer, end_ids, len(tokenizer)
        encode = PromptEncoder(tokenizer).text
        self.grammars = Grammars(tokenizer, encode, size, end_ids)
        noise = torch.Generator().manual_seed(0)
        self._noise = [torch.randn(size, generator=noise) for _ in range(8)]
        spelled = tokenizer.convert_ids_to_tokens(range(size))
        lengths = torch.tensor([float(len(token)) for token in spelled])
        closing = torch.tensor([float(not token.isalnum()) for token in spelled])
        closing[end_ids] = 1.0
        # What the weights like: anything, short tokens (and so structure), or never to end.
        self._tastes = {"any": lengths * 0, "short": -3 * lengths, "talkative": -30 * closing}
        self._detokenizer = detokenizer_for(tokenizer)

    def constraint(self, schema: dict[str, Any], limit: int) -> Constraint:
        return self.grammars.constraint(AnswerFormat(schema=schema).grammar() or "", limit)

    def drive(self, constraint: Constraint, limit: int, taste: str, seed: int = 0) -> str:
        """The answer of some random weights, as `generate` would make it."""
        choose, detokenizer, text = random.Random(seed), self._detokenizer(), ""
        chooser = Chooser(Request((0,), SamplingParams()), constraint)
        for _ in range(limit):
            logits = self._tastes[taste] + choose.choice(self._noise)
            token_id = chooser.choose(torch.tensor([0]), logits)
            text += detokenizer.feed(token_id)
            if constraint.done:
                break
        return text + detokenizer.flush()


@pytest.fixture(scope="module")
def demo_held() -> Held:
    return Held(AutoTokenizer.from_pretrained(DEMO, local_files_only=True), [1, 107])


@pytest.fixture(scope="module")
def gemma_held(gemma_tokenizer: PreTrainedTokenizerFast) -> Held:
    return Held(gemma_tokenizer, [1, 107])


@pytest.fixture(scope="module", params=["demo", "gemma"])
def held(request: pytest.FixtureRequest) -> Held:
    held: Held = request.getfixturevalue(f"{request.param}_held")
    return held


tastes = st.sampled_from(["any", "short", "talkative"])
several = settings(max_examples=12)


@shapes
@several
@given(taste=tastes, seed=st.integers(0, 10**6), room=st.sampled_from([0, 1, 5, 30, 150]))
def test_whatever_the_weights_the_text_matches(
    demo_held: Held, shape: Any, taste: str, seed: int, room: int
) -> None:
    """An answer of random weights is whole and matches, however little room it had."""
    limit = 220 + room
    constraint = demo_held.constraint(schema_of(shape), limit)
    check(shape, demo_held.drive(constraint, limit, taste, seed))


@shapes
def test_the_real_vocabulary_matches_too(gemma_held: Held, shape: Any) -> None:
    """The same of 256,000 tokens, each of which may span several of JSON's own."""
    for seed, taste in enumerate(["any", "short", "talkative"]):
        constraint = gemma_held.constraint(schema_of(shape), 220)
        check(shape, gemma_held.drive(constraint, 220, taste, seed))


@pytest.mark.parametrize("name", ["Point", "Link", "Pets", "Bounds", "date", "email"])
def test_a_limit_is_kept_from_the_shortest_on(demo_held: Held, name: str) -> None:
    """Weights that never end are made to, at every limit that one answer fits; below, none is."""
    whole, cut = [], []
    for limit in range(1, 110):
        constraint = demo_held.constraint(schema_of(SHAPES[name]), limit)
        text = demo_held.drive(constraint, limit, "talkative", limit)
        cut.append(constraint.cut)
        try:
            check(SHAPES[name], text)
        except ValueError:  # no JSON; JSON that does not match is another error
            whole.append(False)
        else:
            whole.append(True)
    first = whole.index(True)
    assert whole == [False] * first + [True] * (len(whole) - first)
    assert not any(cut[:first])  # what is not whole has not been ended


def test_what_the_weights_end_is_not_cut(demo_held: Held) -> None:
    """`cut` is of the limit alone: a number that ends by itself leaves it False."""
    schema = {"enum": ["one", "two"]}
    roomy, tight = demo_held.constraint(schema, 50), demo_held.constraint(STRING, 20)
    demo_held.drive(roomy, 50, "any")
    demo_held.drive(tight, 20, "talkative")
    assert (roomy.done, roomy.cut) == (True, False)
    assert (tight.done, tight.cut) == (True, True)


def test_no_limit_is_near_inside_a_roomy_answer(demo_held: Held) -> None:
    """Far from the limit every choice that the grammar admits is the model's own."""
    constraint = demo_held.constraint(STRING, 1000)
    for token_id in PromptEncoder(demo_held.tokenizer).text('"some words that go on and on'):
        assert constraint.take(token_id) == token_id
    assert not constraint.cut


def test_a_repetition_that_hides_the_end_runs_free(demo_held: Held) -> None:
    """Where no way out is found the answer stays within the grammar, and ends by its length."""
    constraint = demo_held.constraint({"type": "string", "pattern": "^}+x$"}, 30)
    text = demo_held.drive(constraint, 30, "talkative")
    assert (constraint.done, constraint.cut) == (True, False) or set(text) <= {'"', "}"}


def test_what_is_not_allowed_is_not_among_much_that_is(held: Held) -> None:
    """Inside a string nearly all tokens may come, each with its own logit; a raw line break and an
    end of turn may not, however likely.
    """
    constraint = held.constraint(STRING, 1000)
    quote, letter, newline = held.tokenizer.convert_tokens_to_ids(['"', "x", "\n"])
    constraint.take(quote)
    logits = np.arange(len(held.tokenizer), dtype=np.float32)
    never = [newline, *held.end_ids, held.tokenizer.bos_token_id]
    ids, left = constraint.among(logits.copy())
    assert ids is None
    assert left[letter] == logits[letter]
    assert np.isneginf(left[never]).all()
    chooser = Chooser(Request((5,), SamplingParams(temperature=1.0, seed=0)), constraint)
    logits[never] = 1e9
    assert chooser.choose(torch.tensor([5]), torch.from_numpy(logits)) not in never


def test_a_done_constraint_is_inert(demo_held: Held) -> None:
    """What the other rows' steps bring to a row that is over is neither masked nor counted."""
    constraint = demo_held.constraint(INTEGER, 10)
    constraint.done = True
    rows = RowLogits(
        [Chooser(Request((5,), SamplingParams()), constraint)], [0], check_finite=False
    )
    logits = torch.zeros(1, len(demo_held.tokenizer))
    logits[0, 300] = 1.0
    for _ in range(20):
        assert int(rows(torch.tensor([[5]]), logits.clone()).argmax()) == 300
    constraint.done = False
    assert int(rows(torch.tensor([[5]]), logits.clone()).argmax()) != 300


def test_a_grammar_that_fails_ends_its_row_alone(demo_held: Held) -> None:
    """Its error is told with the row's index, once, and the row beside it is held as before."""
    failing, sound = demo_held.constraint(INTEGER, 0), demo_held.constraint(INTEGER, 10)
    with pytest.raises(GrammarError, match="cannot be followed"):
        failing.take(demo_held.tokenizer.convert_tokens_to_ids("x"))
    errors: list[tuple[int, type[BaseException]]] = []
    rows = RowLogits(
        [Chooser(Request((5,), SamplingParams()), constraint) for constraint in (failing, sound)],
        [0, 0],
        check_finite=False,
        failed=lambda row, error: errors.append((row, type(error))),
    )
    for _ in range(2):
        chosen = rows(torch.tensor([[5], [5]]), torch.zeros(2, len(demo_held.tokenizer))).argmax(-1)
        assert demo_held.tokenizer.decode(chosen[1]).strip("-0123456789") == ""
    assert errors == [(0, GrammarError)]


# Refusals ------------------------------------------------------------------------------------

REFUSED: dict[str, dict[str, Any]] = {
    "uniqueItems": {"type": "array", "items": INTEGER, "uniqueItems": True},
    "contains": {"type": "array", "contains": INTEGER},
    "not": {"not": INTEGER},
    "if": {"if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "oneOf": {"oneOf": [INTEGER, {"type": "number"}]},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 3}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "minProperties=2": {"type": "object", "minProperties": 2, "additionalProperties": INTEGER},
    "look-around": {"type": "string", "pattern": "^(?!a)b"},
    "http://x/y": {"$ref": "http://x/y"},
}


@pytest.mark.parametrize("word", REFUSED)
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
def test_what_cannot_be_held_is_refused_by_name(
    demo_engine: Gemma2Engine, word: str, nested: bool
) -> None:
    """Before any forward, with the keyword and what to do about it; no schema is quoted whole."""
    schema = REFUSED[word]
    if nested:
        schema = {"type": "object", "properties": {"a": {"type": "array", "items": schema}}}
    chat = ChatGemma2(engine=demo_engine)
    asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    with pytest.raises(GrammarError, match=word) as raised:
        chat.invoke("hi", response_format=asked)
    assert "ake" in str(raised.value)  # "Take that out"
    assert "x-guidance" not in str(raised.value)
    tool = {"title": "f", "description": "d", "type": "object", "properties": {"p": schema}}
    with pytest.raises(GrammarError, match=word):
        chat.bind_tools([tool]).invoke("hi")


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": []},
        {**INTEGER, "minimum": 5, "maximum": 3},
        {**STRING, "pattern": "^a$", "const": 1},
    ],
    ids=str,
)
def test_what_nothing_matches_is_refused(demo_engine: Gemma2Engine, schema: dict[str, Any]) -> None:
    """Rather than that the model is asked for it."""
    with pytest.raises(GrammarError, match="cannot be enforced"):
        ask(ChatGemma2(engine=demo_engine), schema)


def test_a_grammar_that_is_none_is_refused(demo_held: Held) -> None:
    """The error says what is wrong with it, on one line."""
    with pytest.raises(GrammarError, match="cannot be enforced") as raised:
        demo_held.grammars.check("start: (((")
    assert "\n" not in str(raised.value)


# Through the engine ----------------------------------------------------------------------------


def endless(**properties: Any) -> dict[str, Any]:
    """A schema that requires itself, so that no answer is ever whole."""
    own = {**properties, "n": {"$ref": "#/$defs/N"}}
    definition = {"type": "object", "properties": own, "required": list(own)}
    return {"title": "N", "description": "d", "$defs": {"N": definition}, "$ref": "#/$defs/N"}


def ask(chat: ChatGemma2, schema: dict[str, Any], **parameters: Any) -> Any:
    asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return chat.invoke("hi", response_format=asked, **parameters)


def test_what_never_ends_ends_by_its_length(engine: Gemma2Engine) -> None:
    """No answer can be whole, so the limit is what ends it, and the parser says so."""
    chat = ChatGemma2(engine=engine, max_new_tokens=20)
    answer = ask(chat, endless(v=INTEGER))
    assert answer.response_metadata["finish_reason"] == "length"
    nested = {"title": "O", "description": "d", **OBJECT, "properties": {"a": endless(v=INTEGER)}}
    nested |= {"$defs": nested["properties"]["a"].pop("$defs"), "required": ["a"]}
    with pytest.raises(StructuredOutputError, match="max_new_tokens"):
        chat.with_structured_output(nested).invoke("hi")


def test_an_error_in_mid_answer_reaches_the_caller(engine: Gemma2Engine) -> None:
    """A grammar that outgrows what can be computed is an error, not an end; the next one works."""
    chat = ChatGemma2(engine=engine, max_new_tokens=20)
    with pytest.raises(GrammarError, match="cannot be followed"):
        ask(chat, endless())
    assert json.loads(ask(chat, INTEGER).text) is not None


def test_one_token_too_few_is_an_error_that_says_so(engine: Gemma2Engine) -> None:
    """The least limit that an answer fits gives one, and so does each larger; one less does not."""
    outcomes = []
    for room in range(5, 16):
        chat = ChatGemma2(engine=engine, max_new_tokens=room).with_structured_output(
            Point, include_raw=True
        )
        found = chat.invoke("hi")
        outcomes.append(type(found["parsed"]))
        if found["parsed"] is None:
            assert "raise max_new_tokens" in str(found["parsing_error"])
    first = outcomes.index(Point)
    assert outcomes == [type(None)] * first + [Point] * (len(outcomes) - first)
    assert first > 0


@pytest.mark.parametrize("text", ["<end_of_turn>", "a<eos>b", "<start_of_turn>user\n<bos>"])
def test_control_tokens_in_a_schema_come_out_as_text(engine: Gemma2Engine, text: str) -> None:
    """An enum that spells one neither ends the answer nor vanishes from it."""
    chat = ChatGemma2(engine=engine, max_new_tokens=40)
    assert json.loads(ask(chat, {"const": text}).text) == text
    assert json.loads(ask(chat, {"enum": [text, text + "!"]}).text) in (text, text + "!")


@pytest.mark.parametrize("cls", [Tree, Link, Pets, Keywords, Bounds, Formats, Empty])
def test_objects_come_out_of_a_real_model(demo_engine: Gemma2Engine, cls: type[BaseModel]) -> None:
    """Classes of every kind, nested and recursive ones too, greedy and sampled, JSON and call."""
    room = 230 if cls in (Keywords, Formats) else 130
    chat = ChatGemma2(engine=demo_engine, max_new_tokens=room, temperature=1.5, seed=1)
    assert isinstance(chat.with_structured_output(cls).invoke("你是谁"), cls)
    if cls in (Link, Pets):
        greedy = ChatGemma2(engine=demo_engine, max_new_tokens=room)
        called = greedy.with_structured_output(cls, method="function_calling")
        assert isinstance(called.invoke("你是谁"), cls)


def test_objects_come_out_of_random_weights(random_engine: Gemma2Engine) -> None:
    """The same with the real tokenizer."""
    chat = ChatGemma2(engine=random_engine, max_new_tokens=60)
    for cls in (Tree, Link, Pets):
        assert isinstance(chat.with_structured_output(cls).invoke("你是谁"), cls)


def test_rows_of_different_grammars_share_a_forward(demo_engine: Gemma2Engine) -> None:
    """A row's answer is the same beside others, free and held, that are over sooner or later."""
    grammars = [AnswerFormat(schema=schema_of(shape)).grammar() for shape in (Point, Bounds, Empty)]
    ids = tuple(demo_engine.encode("你是谁"))
    params = SamplingParams(max_new_tokens=75)
    requests = [Request(ids, params, grammar) for grammar in [*grammars, None]]

    def texts(requests: list[Request]) -> list[str]:
        said = [""] * len(requests)
        with demo_engine.submit(requests) as chunks:
            for chunk in chunks:
                said[chunk.index] += chunk.text
        return said

    assert texts(requests) == [text for request in requests for text in texts([request])]


def test_threads_compile_at_once(gemma_tokenizer: PreTrainedTokenizerFast) -> None:
    """The vocabulary and one grammar, asked for by several threads first, are there for all."""
    grammars = Grammars(gemma_tokenizer, PromptEncoder(gemma_tokenizer).text, 256_000, [1, 107])
    answers: list[int] = []
    start = threading.Barrier(4)

    def compile_(number: int) -> None:
        start.wait(30)
        for schema in (schema_of(Keywords), {"const": number % 2}):
            constraint = grammars.constraint(AnswerFormat(schema=schema).grammar() or "", 100)
        ids, logits = constraint.among(np.zeros(256_000, np.float32))
        answers.append(int(logits.argmax() if ids is None else ids[0]))

    threads = [threading.Thread(target=compile_, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    zero, one = (gemma_tokenizer.convert_tokens_to_ids(digit) for digit in "01")
    assert sorted(answers) == sorted([zero, one] * 2)


@pytest.fixture(scope="module")
def byte_held() -> Held:
    """A tokenizer that is not of Gemma's kind: byte-level BPE, as GPT-2 has it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    backend.train_from_iterator(['{"value": 1, "children": []}', "你好 hello world"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    return Held(tokenizer, [tokenizer.eos_token_id])


@pytest.mark.parametrize("name", ["Tree", "Pets", "Keywords", "Formats", "names", "const"])
def test_another_tokenizer_is_held_too(byte_held: Held, name: str) -> None:
    """Tokens that are parts of characters, and no byte tokens: the text matches all the same."""
    for seed, taste in enumerate(["any", "short", "talkative"] * 2):
        constraint = byte_held.constraint(schema_of(SHAPES[name]), 250)
        text = byte_held.drive(constraint, 250, taste, seed)
        assert constraint.done
        check(SHAPES[name], text)


# Tools -----------------------------------------------------------------------------------------

TOOLS = (
    Tool("get_weather", "d", {"type": "object", "properties": {"city": STRING}}),
    Tool("add", "", {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}),
)
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
OTHER = '<tool_call>{"name": "get_weather", "arguments": {"city": "<tool_call>"}}</tool_call>'


def admits(held: Held, answer: AnswerFormat, text: str) -> bool:
    """Whether weights that want to say exactly `text` are let to."""
    constraint = held.grammars.constraint(answer.grammar() or "", 1000)
    ids = [*PromptEncoder(held.tokenizer).text(text), held.end_ids[0]]
    for place, token_id in enumerate(ids):
        next_ids, logits = constraint.among(np.zeros(len(held.tokenizer), np.float32))
        allowed = logits[token_id] == 0 if next_ids is None else token_id in next_ids
        if not allowed:
            return False
        assert constraint.take(token_id) == token_id
        if constraint.done:  # the end of the turn need not be said
            return place >= len(ids) - 2
    return False


AUTO, ONE = AnswerFormat(TOOLS), AnswerFormat(TOOLS, parallel=False)
MUST, ADD = AnswerFormat(TOOLS, required=True), AnswerFormat(TOOLS, True, "add", parallel=False)
OR_JSON = AnswerFormat(TOOLS, schema=schema_of(Point))


@pytest.mark.parametrize(
    ("answer", "text", "admitted"),
    [
        (AUTO, "Hello!", True),
        (AUTO, "", True),
        (AUTO, 'Some < text with {"name": 1} and <tool_ and </tool_call>', True),
        (AUTO, CALL, True),
        (AUTO, "Let me see.\n" + CALL, True),
        (AUTO, f"{CALL}\n{OTHER}\n{CALL}", True),
        (AUTO, "<tool_call>what", False),
        (AUTO, CALL + " and more", False),
        (AUTO, '<tool_call>{"name": "sub", "arguments": {}}</tool_call>', False),
        (AUTO, '<tool_call>{"name": "add", "arguments": {}}</tool_call>', False),
        (ONE, CALL, True),
        (ONE, f"{CALL}\n{CALL}", False),
        (MUST, f"{OTHER}\n{CALL}", True),
        (MUST, "Hello!", False),
        (ADD, CALL, True),
        (ADD, OTHER, False),
        (OR_JSON, '{"x": 1}', True),
        (OR_JSON, CALL, True),
        (OR_JSON, "Hello!", False),
    ],
)
def test_what_the_choice_of_tools_admits(
    held: Held, answer: AnswerFormat, text: str, admitted: bool
) -> None:
    """Text, a call, text and then calls; what must be a call is one; nothing else passes."""
    assert admits(held, answer, text) is admitted


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), taste=tastes, forced=st.booleans(), limit=st.integers(170, 250))
@example(seed=0, taste="talkative", forced=True, limit=170)
def test_calls_of_random_weights_are_well_formed(
    demo_held: Held, seed: int, taste: str, forced: bool, limit: int
) -> None:
    """A forced call has a known name, its arguments match, and it is closed in time."""
    answer = AnswerFormat(TOOLS, required=True, name="add" if forced else None)
    constraint = demo_held.grammars.constraint(answer.grammar() or "", limit)
    text = demo_held.drive(constraint, limit, taste, seed)
    known = {tool.name: tool.parameters for tool in answer.callable}
    for line in text.split("\n"):
        assert line.startswith("<tool_call>")
        call = json.loads(line.removeprefix("<tool_call>").removesuffix("</tool_call>"))
        jsonschema.validate(call["arguments"], known[call["name"]])


OFFERED = [
    {"type": "function", "function": {"name": tool.name, "parameters": tool.parameters}}
    for tool in TOOLS
]


@pytest.fixture
def told(scripted_engine: Gemma2Engine) -> Callable[..., Any]:
    """`told(text)`: what a chat that may call makes of a model that wants to say `text`."""

    def tell(text: str, **bound: Any) -> Any:
        scripted_engine.join()
        chat = ChatGemma2(engine=scripted_engine, max_new_tokens=90)
        hello = [HumanMessage("hi")]
        scripted_engine.model.script = [scripted_engine.tokenize(text)]
        scripted_engine.model.width = chat.get_num_tokens_from_messages(hello, tools=OFFERED)
        return chat.bind_tools(OFFERED, **bound).invoke(hello)

    return tell


def test_a_model_that_may_call_can_talk(told: Callable[..., Any]) -> None:
    """Free text arrives as it is, what resembles a call's beginning included."""
    text = 'Hello <tool_ {"name": "add"} </tool_call> < 你好'
    answer = told(text)
    assert (answer.text, answer.tool_calls, answer.invalid_tool_calls) == (text, [], [])
    assert answer.response_metadata["finish_reason"] == "stop"


def test_text_and_then_a_call(told: Callable[..., Any]) -> None:
    """The text is the message's, the call is a call."""
    answer = told("Let me see.\n" + CALL)
    assert answer.text == "Let me see.\n"
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("add", {"a": 1})]
    assert answer.response_metadata["finish_reason"] == "tool_calls"


def test_parallel_calls(told: Callable[..., Any]) -> None:
    """Each call has its own id and its own arguments; parallel_tool_calls=False admits one."""
    text = f"{CALL}\n{OTHER}\n{CALL}"
    calls = told(text).tool_calls
    assert [call["name"] for call in calls] == ["add", "get_weather", "add"]
    assert [call["args"] for call in calls] == [{"a": 1}, {"city": "<tool_call>"}, {"a": 1}]
    assert len({call["id"] for call in calls}) == 3
    assert len(told(text, parallel_tool_calls=False).tool_calls) == 1


def test_a_call_that_wants_to_go_wrong_cannot(told: Callable[..., Any]) -> None:
    """An unknown tool, a missing argument, and JSON that is none come out as calls that match."""
    for wrong in ('"sub", "arguments": {}}', '"add", "arguments": {}}', '"add", "arguments": nope'):
        answer = told(f'<tool_call>{{"name": {wrong}</tool_call>')
        assert answer.invalid_tool_calls == []
        for call in answer.tool_calls:
            tool = next(tool for tool in TOOLS if tool.name == call["name"])
            jsonschema.validate(call["args"], tool.parameters)
        assert answer.tool_calls
