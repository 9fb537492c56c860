"""Guessing ahead: fewer forwards, and not one token that is another."""

from __future__ import annotations

import copy
import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.output_parsers import StrOutputParser
from tiny import DEMO, Forwards, greedy, random_gemma
from transformers import Gemma2ForCausalLM, MambaConfig, MambaForCausalLM
from waiting import wait

from gemma2_stream import (
    ChatGemma2,
    Chunk,
    Gemma2Engine,
    Gemma2LLM,
    ModelNotFoundError,
    ParameterError,
    Request,
    SamplingParams,
    TokenStream,
)
from gemma2_stream.speculation import Assistant, Lookup
from gemma2_stream.tools import AnswerFormat

VOCABULARY = 4096
CYCLE = range(2712, 2724)  # "cri", "dom", "face": words of the demo vocabulary


class CyclicGemma2(Gemma2ForCausalLM):
    """Gemma 2 that says the ids of CYCLE around and around, whatever it is fed, and however many
    columns at once.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        seen = output.logits.shape[1]
        for row, ids in enumerate(kwargs["input_ids"][:, -seen:].tolist()):
            for column, token_id in enumerate(ids):
                output.logits[row, column] = -30.0
                output.logits[row, column, _following(token_id)] = 30.0
        return output


def _following(token_id: int) -> int:
    return CYCLE[(token_id + 1) % len(CYCLE)]


def _altered(model: Any, much: float) -> Any:
    """Another model, the weights of which are `much` away from those of `model`."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(much * weight.std() * torch.randn_like(weight))
    return other


@pytest.fixture(scope="module")
def model() -> Any:
    """Random weights, the answers of which are varied, and which are sure of them."""
    model = random_gemma(vocab=VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def engines(model: Any, demo_engine: Gemma2Engine) -> Iterator[dict[str, Gemma2Engine]]:
    """Engines of the same weights, by who guesses in them."""
    near, far = _altered(model, 0.02), _altered(model, 3.0)
    who: dict[str, dict[str, Any]] = {
        "nobody": {"prefix_cache_bytes": 0},
        "lookup": {"prompt_lookup_num_tokens": 6},
        "itself": {"assistant": model},
        "near": {"assistant": near},
        "far": {"assistant": far},
        "both": {"assistant": near, "prompt_lookup_num_tokens": 3},
    }
    made = {
        name: Gemma2Engine(model, demo_engine.tokenizer, name=name, **options)
        for name, options in who.items()
    }
    yield made
    for engine in made.values():
        engine.close()


@pytest.fixture(scope="module")
def cyclic(demo_engine: Gemma2Engine) -> Iterator[Gemma2Engine]:
    model = random_gemma(CyclicGemma2, vocab=VOCABULARY)
    with Gemma2Engine(
        model, demo_engine.tokenizer, name="cyclic", prompt_lookup_num_tokens=8
    ) as engine:
        yield engine


class Shapes:
    """Rows and columns of each forward."""

    def __init__(self, model: Any) -> None:
        self.seen: list[tuple[int, int]] = []
        self._handle = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, args: Any, kwargs: Any) -> None:
        self.seen.append(tuple(kwargs["input_ids"].shape))

    def __enter__(self) -> Shapes:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._handle.remove()


def _answer(engine: Gemma2Engine, *requests: Request) -> list[tuple[str, str, int]]:
    """Text, reason and number of tokens of each row of one stream."""
    with engine.submit(requests) as stream:
        return _read(stream, len(requests))


def _read(stream: TokenStream, rows: int = 1) -> list[tuple[str, str, int]]:
    texts, ends = [""] * rows, [Chunk(0, "")] * rows
    for chunk in stream:
        texts[chunk.index] += chunk.text
        ends[chunk.index] = chunk
    assert all(end.usage for end in ends)
    return [
        (text, str(end.finish_reason), end.usage.completion_tokens)  # type: ignore[union-attr]
        for text, end in zip(texts, ends, strict=True)
    ]


def _request(ids: Sequence[int], **params: Any) -> Request:
    return Request(tuple(ids), SamplingParams(**params))


# The same text --------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["lookup", "itself", "near", "far", "both"])
def test_the_text_is_the_same_whoever_guesses(engines: dict[str, Gemma2Engine], who: str) -> None:
    """Prompts below, across and far beyond the sliding window of 64, half of them going on where
    an earlier one ended; greedy, with a penalty, and sampled.
    """
    dice = random.Random(who)
    past: list[list[int]] = []
    for number in range(16):
        ids = [2, *dice.choices(range(200, VOCABULARY), k=dice.choice([1, 5, 40, 60, 70, 150]))]
        if past and number % 2:
            ids = [*dice.choice(past), *ids[1:6]]
        ids += ids[-dice.randrange(1, 9) :] * dice.randrange(3)
        params = {"max_new_tokens": dice.randrange(1, 60)}
        params |= dice.choice([{}, {"repetition_penalty": 1.3}, {"temperature": 1.0, "seed": 5}])
        request = _request(ids, **params)
        expected = _answer(engines["nobody"], request)
        assert _answer(engines[who], request) == expected, (number, len(ids), params)
        past.append([*ids, *engines[who].tokenize(expected[0][0])])


@pytest.mark.parametrize("who", ["lookup", "itself", "near", "far"])
def test_what_is_kept_is_what_was_said(engines: dict[str, Gemma2Engine], who: str) -> None:
    """No state of a rejected guess is left in the cache, and none of what was taken is missing."""
    for count in range(1, 12):
        ids = [2, *range(400, 400 + count), *range(400, 400 + count)]
        request, kept = _request(ids, max_new_tokens=count * 7), []
        for name in ("itself" if who != "itself" else "near", who):
            engine = engines[name]
            engine.join()
            engine.prefixes.clear()
            said = _answer(engine, request)
            engine.join()
            (node,) = engine.prefixes._root.children.values()
            kept.append((said, node.ids, node.states))
        (said, known, states), other = kept
        assert (said, known) == other[:2]
        assert len(known) == len(ids) + said[0][2] - 1
        for mine, theirs in zip(states.pairs, other[2].pairs, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_grammar_and_sampled_rows_alone_and_beside(
    demo_engine: Gemma2Engine,
) -> None:
    """A choice that depends on those before is only ever asked for after tokens that were taken."""
    grammar = AnswerFormat(
        schema={"type": "array", "items": {"enum": ["north", "south"]}, "maxItems": 6}
    ).grammar()
    ids = tuple(demo_engine.encode("你是谁"))
    requests = [
        Request(ids, SamplingParams(max_new_tokens=40, temperature=1.5, seed=4), grammar),
        Request(ids, SamplingParams(max_new_tokens=40), grammar),
        Request(ids, SamplingParams(max_new_tokens=40, temperature=1.0, top_p=0.9, seed=1)),
        Request(ids, SamplingParams(max_new_tokens=60)),
    ]
    expected = [_answer(demo_engine, request)[0] for request in requests]
    model = demo_engine.model
    with Gemma2Engine(
        model, demo_engine.tokenizer, assistant=model, prompt_lookup_num_tokens=4
    ) as engine:
        assert [_answer(engine, request)[0] for request in requests] == expected
        assert _answer(engine, *requests) == expected


# Fewer forwards --------------------------------------------------------------------------------


def test_what_was_said_before_costs_a_fraction_of_the_forwards(
    demo_engine: Gemma2Engine,
) -> None:
    """Asked the same again, the demo answers the same; its tokens come one to a chunk, as ever."""
    turns = [{"role": "user", "content": "How do I stream?"}]
    said = "".join(chunk.text for chunk in demo_engine.submit([_of(demo_engine, turns)]))
    turns += [{"role": "assistant", "content": said}, turns[0]]
    request = _of(demo_engine, turns)
    plain = list(demo_engine.submit([request]))
    with (
        Gemma2Engine(
            demo_engine.model, demo_engine.tokenizer, prompt_lookup_num_tokens=10
        ) as engine,
        Shapes(engine.model) as shapes,
    ):
        chunks = list(engine.submit([request]))
    assert chunks[-1].usage is not None
    assert [chunk.text for chunk in chunks] == [chunk.text for chunk in plain]
    assert len(shapes.seen) < chunks[-1].usage.completion_tokens / 2


def _of(engine: Gemma2Engine, turns: list[dict[str, str]]) -> Request:
    return _request(engine.encode(turns), max_new_tokens=60)


def test_what_is_asked_again_is_guessed_for_again() -> None:
    """The same ids as last time, less of them, others: each by what was said before its own end."""
    lookup = Lookup(3)
    ids = [1, 2, 3, 4, 1, 2, 3]
    assert lookup.draft([*ids, 4], 3) == [1, 2, 3]
    assert lookup.draft(ids, 3) == [4, 1, 2]
    assert lookup.draft(ids, 3) == [4, 1, 2]
    assert lookup.draft(ids[:3], 3) == []
    assert lookup.draft([7, 8, 9, 7, 8], 2) == [9, 7]


def test_an_assistant_that_is_right_makes_nine_tokens_a_forward(
    engines: dict[str, Gemma2Engine],
) -> None:
    """It would say the same: all guesses are taken, as far as it is sure of them."""
    tokens: dict[str, int] = {}
    for who in ("itself", "far"):
        request = _request([2, *range(500, 540)], max_new_tokens=46)
        with Shapes(engines["nobody"].model) as shapes:
            ((_, _, count),) = _answer(engines[who], request)
        assert count == 46
        # Its own forwards, of the same weights, are those of one column.
        tokens[who] = sum(columns > 1 for _, columns in shapes.seen[1:])
    assert tokens["itself"] >= 5


def test_an_assistant_does_not_delay_the_first_token(demo_engine: Gemma2Engine) -> None:
    """It reads a long prompt by and by, and guesses when it has."""
    assistant = _altered(demo_engine.model, 0.0)
    order: list[tuple[str, int]] = []

    def note(who: str) -> Any:
        return lambda module, args, kwargs: order.append((who, kwargs["input_ids"].shape[1]))

    handles = [
        model.register_forward_pre_hook(note(who), with_kwargs=True)
        for who, model in (("model", demo_engine.model), ("assistant", assistant))
    ]
    ids = demo_engine.encode("word and word " * 800)
    assert len(ids) > 2048
    with Gemma2Engine(demo_engine.model, demo_engine.tokenizer, assistant=assistant) as engine:
        _answer(engine, _request(ids, max_new_tokens=6))
    for handle in handles:
        handle.remove()
    chunks = [columns for who, columns in order if who == "assistant"]
    assert order[0][0] == "model"
    assert order[1:4] == [("assistant", 1024), ("model", 1), ("assistant", 1024)]
    assert max(chunks) == 1024


def test_an_assistant_goes_back_with_the_row(demo_engine: Gemma2Engine) -> None:
    """After what it guessed wrong, and after another row, it guesses as one that is new."""
    begin, other = (demo_engine.encode(prompt) for prompt in ("How do I stream?", "你是谁"))
    said = greedy(demo_engine, begin, 12)
    used, guesses = Assistant(demo_engine.model), []
    for ids in (begin, [*begin, 300], [*begin, *said[:4]], other, [*begin, *said[:2]], begin):
        guesses.append(used.draft(ids, 8))
        assert guesses[-1] == Assistant(demo_engine.model).draft(ids, 8)
    assert guesses[-1] == said[:8]


# Bursts ----------------------------------------------------------------------------------------

ASKED = [2, *CYCLE, *CYCLE[:2]]


def _pieces(engine: Gemma2Engine, count: int) -> list[str]:
    """The texts of what the cyclic engine says to ASKED."""
    ids = [CYCLE[(2 + at) % len(CYCLE)] for at in range(count)]
    pieces = [engine.tokenizer.decode([token_id]) for token_id in ids]
    assert all(piece.isprintable() and piece for piece in pieces)
    return pieces


def test_the_cycle_comes_in_bursts(
    cyclic: Gemma2Engine, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """What the tests below are about: nine tokens a forward, each a chunk of its own."""
    watch = forwards(cyclic)
    with cyclic.submit([_request(ASKED, max_new_tokens=44)]) as stream:
        chunks = [chunk.text for chunk in stream]
    assert chunks == _pieces(cyclic, 44)
    assert watch.tokens == [len(ASKED), 9, 9, 9, 9, 7]


@pytest.mark.parametrize("limit", range(1, 22))
def test_a_limit_within_a_burst_is_exact(cyclic: Gemma2Engine, limit: int) -> None:
    (answer,) = _answer(cyclic, _request(ASKED, max_new_tokens=limit))
    assert answer == ("".join(_pieces(cyclic, limit)), "length", limit)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("at", range(11))
def test_a_stop_within_a_burst_is_exact(cyclic: Gemma2Engine, at: int, whole: bool) -> None:
    """At every place of it, a token or the seam of two: nothing of it leaks, nothing is lost, and
    the next request goes on from the right states.
    """
    pieces = _pieces(cyclic, 12)
    stop = pieces[at] if whole else pieces[at][-1] + pieces[at + 1][0]
    text = "".join(pieces)[: "".join(pieces).index(stop)]
    ends, count = 0, 0
    while ends < len(text) + len(stop):
        ends, count = ends + len(pieces[count]), count + 1
    for _ in range(2):
        (answer,) = _answer(cyclic, _request(ASKED, max_new_tokens=40, stop=(stop,)))
        assert answer == (text, "stop", count)
    (after,) = _answer(cyclic, _request(ASKED, max_new_tokens=20))
    assert after[0] == "".join(_pieces(cyclic, 20))


def test_an_end_of_turn_within_a_burst_ends_it(
    cyclic: Gemma2Engine,
) -> None:
    """A stop that is a token of its own; of what would have come after it, nothing is kept."""
    end = CYCLE[6]
    cyclic.join()
    cyclic.prefixes.clear()
    cyclic._config.eos_token_id.append(end)
    try:
        (answer,) = _answer(cyclic, _request(ASKED, max_new_tokens=40))
    finally:
        cyclic._config.eos_token_id.remove(end)
    assert answer == ("".join(_pieces(cyclic, 4)), "stop", 5)
    cyclic.join()
    assert cyclic.prefixes.find([*ASKED, *CYCLE[2:]])[0] == len(ASKED) + 4


def test_a_cancel_within_a_burst_ends_it(
    cyclic: Gemma2Engine, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """Cancelled while the second burst is computed: none of it comes, and no forward follows."""
    watch = forwards(cyclic)
    reached, release = watch.gate(3)
    stream = cyclic.submit([_request(ASKED, max_new_tokens=46)])
    wait(reached)
    stream.cancel()
    release.set()
    ((text, reason, count),) = _read(stream)
    cyclic.join()
    assert (text, reason, count) == ("".join(_pieces(cyclic, 10)), "cancelled", 10)
    assert watch.count == 3
    (after,) = _answer(cyclic, _request(ASKED, max_new_tokens=20))
    assert after[0] == "".join(_pieces(cyclic, 20))


def test_an_error_of_a_guess_ends_the_row_and_nothing_else(
    demo_engine: Gemma2Engine,
) -> None:
    """The assistant fails in the middle of its layers: the next request is answered right."""
    assistant = _altered(demo_engine.model, 0.0)
    request = _request(demo_engine.encode("你是谁"), max_new_tokens=20)
    expected = _answer(demo_engine, request)
    passed: list[object] = []

    def fail_at_the_fourth(layer: object, *_: object) -> None:
        passed.append(layer)
        if len(passed) == 4:
            raise MemoryError("no room for guesses")

    assistant.model.layers[2].register_forward_pre_hook(fail_at_the_fourth)
    with Gemma2Engine(demo_engine.model, demo_engine.tokenizer, assistant=assistant) as engine:
        with pytest.raises(MemoryError, match="no room for guesses"):
            _answer(engine, request)
        assert _answer(engine, request) == expected


# Others ----------------------------------------------------------------------------------------


def test_a_row_guesses_while_it_is_alone(
    cyclic: Gemma2Engine, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """A newcomer joins in the middle of an answer, and leaves: bursts, single tokens, bursts."""
    watch = forwards(cyclic)
    reached, release = watch.gate(2)
    with Shapes(cyclic.model) as shapes:
        first = cyclic.submit([_request(ASKED, max_new_tokens=60)])
        wait(reached)
        second = cyclic.submit([_request([2, CYCLE[1]], max_new_tokens=5)])
        release.set()
        answers = _read(first), _read(second)
    assert answers[0] == [("".join(_pieces(cyclic, 60)), "length", 60)]
    assert answers[1] == [("".join(_pieces(cyclic, 5)), "length", 5)]
    together = [number for number, (rows, _) in enumerate(shapes.seen) if rows == 2]
    assert together == list(range(together[0], together[0] + 5))
    assert all(shapes.seen[number] == (2, 1) for number in together)
    bursts = [number for number, shape in enumerate(shapes.seen) if shape == (1, 9)]
    assert bursts[0] < together[0] < together[-1] < bursts[-1]


@pytest.mark.parametrize("who", ["lookup", "near", "both"])
def test_rows_that_come_and_go_are_right(
    engines: dict[str, Gemma2Engine], forwards: Callable[[Gemma2Engine], Forwards], who: str
) -> None:
    """Real weights, across the sliding window: each says what it says alone."""
    dice = random.Random(1)
    requests = [
        _request([2, *dice.choices(range(200, VOCABULARY), k=length)] * 2, max_new_tokens=new)
        for length, new in [(20, 70), (70, 8), (3, 5), (40, 30)]
    ]
    expected = [_answer(engines["nobody"], request)[0] for request in requests]
    engine = engines[who]
    watch = forwards(engine)
    streams = []
    release = threading.Event()
    for request in requests:
        reached, following = watch.gate(watch.count + 3)  # it is held now, or has nothing to do
        streams.append(engine.submit([request]))
        release.set()
        wait(reached)
        release = following
    release.set()
    answers = [_read(stream)[0] for stream in streams]
    assert answers == expected


# What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, -1, 1.5, True, "8"])
def test_a_number_of_tokens_that_is_none_is_refused(demo_engine: Gemma2Engine, tokens: Any) -> None:
    for make in (
        lambda: Gemma2LLM(prompt_lookup_num_tokens=tokens),
        lambda: ChatGemma2(prompt_lookup_num_tokens=tokens),
        lambda: Gemma2Engine(
            demo_engine.model, demo_engine.tokenizer, prompt_lookup_num_tokens=tokens
        ),
    ):
        with pytest.raises(ParameterError, match=f"prompt_lookup_num_tokens={tokens!r}"):
            make()


def test_an_assistant_of_another_vocabulary_is_refused(demo_engine: Gemma2Engine) -> None:
    with pytest.raises(ParameterError, match="a vocabulary of 100 tokens and the model one of 4,0"):
        Gemma2Engine(demo_engine.model, demo_engine.tokenizer, assistant=random_gemma(vocab=100))


def test_a_model_that_can_not_go_back_is_refused(demo_engine: Gemma2Engine) -> None:
    """Recurrent states know no earlier token."""
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1)
    with pytest.raises(ParameterError, match="can't take back"):
        Gemma2Engine(
            demo_engine.model, demo_engine.tokenizer, assistant=MambaForCausalLM(config).eval()
        )


# Loading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Gemma2LLM, ChatGemma2])
def test_models_take_both(cls: Any) -> None:
    """An engine of its own, with the weights of the one that guesses nothing."""
    plain, guessing = (
        cls(max_new_tokens=12),
        cls(max_new_tokens=12, assistant_model="demo", prompt_lookup_num_tokens=4),
    )
    assert plain.engine is not guessing.engine
    assert guessing.engine.model is plain.engine.model is guessing.engine.assistant
    texts = [(each | StrOutputParser()).invoke("你是谁") for each in (plain, guessing)]
    assert texts[0] == texts[1] != ""
    assert guessing.engine is cls(assistant_model=DEMO, prompt_lookup_num_tokens=4).engine


def test_an_engine_of_ones_own_has_its_own_assistant(demo_engine: Gemma2Engine) -> None:
    with pytest.raises(ParameterError, match="assistant_model says how to load weights"):
        Gemma2LLM(engine=demo_engine, assistant_model="demo")


def test_an_assistant_with_other_words_is_refused(tmp_path: Path) -> None:
    """As many tokens, another tokenizer: its guesses would mean something else."""
    folder = Path(shutil.copytree(DEMO, tmp_path / "other"))
    written = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    words = written["model"]["vocab"]
    words["▁the"], words["▁a"] = words["▁a"], words["▁the"]
    (folder / "tokenizer.json").write_text(json.dumps(written), "utf-8")
    with pytest.raises(ParameterError, match="has another vocabulary"):
        _ = Gemma2LLM(assistant_model=folder).engine


def test_an_assistant_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        _ = Gemma2LLM(assistant_model=tmp_path / "nowhere").engine
