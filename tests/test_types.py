"""Every parameter at its edges and beyond, and what becomes of `None`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2_stream import Chunk, Engine, ParameterError, Request, SamplingParams, Usage
from gemma2_stream.types import SAMPLING_NAMES, unknown_name

TINY = 5e-324
HUGE = 10**400  # larger than any float
MOST = 1.7976931348623157e308

GOOD: dict[str, list[Any]] = {
    "max_new_tokens": [1, 2, 8192, 2**63],
    "temperature": [0, 0.0, -0.0, 1, TINY, 0.7, 2, MOST],
    "top_p": [1, 1.0, TINY, 0.5],
    "top_k": [0, 1, 256_000, 2**63],
    "min_p": [0, 0.0, TINY, 0.5, 1, 1.0],
    "repetition_penalty": [TINY, 0.5, 1, 1.0, 2, MOST],
    "seed": [0, 1, 2**64 - 1],
    "timeout": [TINY, 1, 0.5, MOST],
}
BAD: dict[str, list[Any]] = {
    "max_new_tokens": [0, -1, 1.0, 1.5],
    "temperature": [-TINY, -1],
    "top_p": [0, 0.0, -0.1, math.nextafter(1, 2), 2],
    "top_k": [-1, 1.0, 0.5],
    "min_p": [-TINY, math.nextafter(1, 2), 2],
    "repetition_penalty": [0, 0.0, -0.0, -1],
    "seed": [-1, 2**64, 1.0],
    "timeout": [0, 0.0, -1],
}
NEVER = [True, False, math.nan, math.inf, -math.inf, "1", "", b"1", [1], (), {}, 1j, object, HUGE]
REPAIR = {
    "max_new_tokens": "1 or more",
    "temperature": r"from 0 \(greedy\) up",
    "top_p": "above 0 and at most 1",
    "top_k": "whole number from 0",
    "min_p": r"from 0 \(off\) to 1",
    "repetition_penalty": r"above 0 \(1 is off\)",
    "seed": r"2\*\*64 - 1",
    "timeout": "seconds above 0",
}


def pairs(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}-{str(value)[:20]}")
        for name, values in table.items()
        for value in values
    ]


@pytest.mark.parametrize(("name", "value"), pairs(GOOD))
def test_edges_are_accepted_and_kept(name: str, value: Any) -> None:
    """A value at the edge of its range stays exactly what it was."""
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"), pairs({name: [*values, *NEVER, -HUGE] for name, values in BAD.items()})
)
def test_beyond_is_refused_with_name_value_and_repair(name: str, value: Any) -> None:
    """Out of range, not finite, of another type, bool: the error says which, what, and the way."""
    if (name, value) in [("max_new_tokens", HUGE), ("top_k", HUGE)]:
        # Whole numbers without an upper edge.
        assert getattr(SamplingParams(**{name: value}), name) == HUGE
        return
    with pytest.raises(ParameterError, match=REPAIR[name]) as raised:
        SamplingParams(**{name: value})
    assert f"{name}={value!r}" in str(raised.value)


@pytest.mark.parametrize("name", sorted(SAMPLING_NAMES - {"stop"}))
def test_none_is_not_a_value(name: str) -> None:
    """Each parameter may be left to the checkpoint, and is by default."""
    assert getattr(SamplingParams(**{name: None}), name) is None
    assert getattr(SamplingParams(), name) is None


@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        ((), ()),
        ([], ()),
        ("ab", ("ab",)),
        (["a", "b", "a"], ("a", "b")),
        (("\n",), ("\n",)),
        (["a"] * 3, ("a",)),
        ([" "], (" ",)),
    ],
    ids=repr,
)
def test_stops_become_a_tuple_without_repeats(stop: Any, kept: tuple[str, ...]) -> None:
    """One string is one stop, and the order stays."""
    assert SamplingParams(stop=stop).stop == kept


@pytest.mark.parametrize(
    "stop", ["", [""], ["a", ""], [1], ["a", None], 1, {"a"}, {"a": 1}, b"a", b"", [b"a"], None]
)
def test_what_is_no_list_of_stops_is_refused(stop: Any) -> None:
    """Empty stops would match everywhere; sets have no order; the error shows the value."""
    with pytest.raises(ParameterError, match="non-empty strings") as raised:
        SamplingParams(stop=stop)
    assert f"stop={stop!r}" in str(raised.value)


def test_override_replaces_and_keeps() -> None:
    """New values stand, None means not given, and 0 is a value."""
    params = SamplingParams(temperature=0.7, seed=5, top_k=3)
    changed = params.override(temperature=0, seed=None, top_p=0.5)
    assert changed == SamplingParams(temperature=0, seed=5, top_k=3, top_p=0.5)
    assert params == SamplingParams(temperature=0.7, seed=5, top_k=3)
    assert params.override() == params


def test_override_adds_stops() -> None:
    """A call's stops join the model's, once each, the model's first."""
    params = SamplingParams(stop=("a", "b"))
    assert params.override(stop=["b", "c"]).stop == ("a", "b", "c")
    assert params.override(stop="cd").stop == ("a", "b", "cd")
    assert params.override(stop=None).stop == params.override(stop=[]).stop == ("a", "b")


def test_override_checks_what_it_is_given() -> None:
    """A per-call value is refused like any other."""
    with pytest.raises(ParameterError, match="top_k=True"):
        SamplingParams().override(top_k=True)
    with pytest.raises(ParameterError, match="stop="):
        SamplingParams().override(stop=[""])


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("temprature", "temperature"),
        ("top-p", "top_p"),
        ("max_tokens_new", "max_new_tokens"),
        ("stops", "stop"),
        ("Seed", "seed"),
        ("repetition_penality", "repetition_penalty"),
    ],
)
def test_an_unknown_name_names_the_nearest(wrong: str, right: str) -> None:
    """Even with None, a name that nobody knows is a slip."""
    with pytest.raises(ParameterError, match=f"{wrong!r}.*{right!r}"):
        SamplingParams().override(**{wrong: None})


def test_a_name_like_no_other_lists_all() -> None:
    """Where nothing is near, the error says what there is."""
    message = str(unknown_name("xyzzy", SAMPLING_NAMES))
    assert all(name in message for name in SAMPLING_NAMES)


def test_over_fills_only_what_is_missing() -> None:
    """0 and an empty stop are values; everything else that is None comes from the defaults."""
    defaults = SamplingParams(temperature=0.9, top_p=0.8, top_k=7, max_new_tokens=5)
    resolved = SamplingParams(temperature=0.5, top_k=0, stop=("x",)).over(defaults)
    assert resolved == SamplingParams(
        temperature=0.5, top_p=0.8, top_k=0, max_new_tokens=5, stop=("x",)
    )
    assert SamplingParams().over(defaults) == defaults
    assert defaults.over(SamplingParams()) == defaults


@pytest.mark.parametrize("name", ["top_p", "top_k", "min_p"])
@pytest.mark.parametrize("cold", [None, 0, 0.0])
def test_a_value_without_effect_is_refused(name: str, cold: float | None) -> None:
    """Cutting the tail of a greedy choice does nothing, unless greedy was asked for by name."""
    params, defaults = SamplingParams(**{name: 1}), SamplingParams(temperature=cold)
    with pytest.raises(ParameterError, match=f"{name}=1 has no effect.*temperature"):
        params.over(defaults)
    assert getattr(params.override(temperature=0).over(defaults), name) == 1
    assert getattr(params.over(SamplingParams(temperature=1)), name) == 1


def test_a_checkpoint_may_say_what_has_no_effect() -> None:
    """Only the caller's own values are questioned: Gemma's config has top_k beside greedy."""
    defaults = SamplingParams(temperature=0, top_k=50, top_p=1.0)
    assert SamplingParams(seed=3).over(defaults) == defaults.override(seed=3)


@settings(max_examples=200)
@given(st.sampled_from(sorted(GOOD)), st.one_of(st.integers(), st.floats(), st.booleans()))
def test_a_number_is_taken_exactly_or_refused(name: str, value: float) -> None:
    """No rounding, no clipping, no other exception."""
    try:
        params = SamplingParams(**{name: value})
    except ParameterError:
        return
    assert getattr(params, name) is value


@pytest.mark.parametrize(
    "made",
    [SamplingParams(), Request((1,), SamplingParams()), Usage(1, 2), Chunk(0, "a")],
    ids=lambda made: type(made).__name__,
)
def test_what_travels_is_frozen(made: Any) -> None:
    """No field changes, and equal values are one key."""
    for field in dataclasses.fields(made):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, getattr(made, field.name))
    assert hash(made) == hash(dataclasses.replace(made))


def test_parameters_are_named() -> None:
    """Numbers in a row would say nothing."""
    with pytest.raises(TypeError):
        SamplingParams(5)  # type: ignore[misc]


def test_usage_adds_up() -> None:
    """The total is prompt and answer; what was cached is part of the prompt."""
    assert Usage(3, 4).total_tokens == Usage(3, 4, cached_tokens=2).total_tokens == 7


def test_an_engine_is_what_behaves_like_one() -> None:
    """The protocol is checked by what is there, without a base class."""

    class Fake:
        name = "fake"
        defaults = SamplingParams()

        def encode(self, prompt: Any, *, raw: bool = False) -> list[int]: ...
        def tokenize(self, text: str) -> list[int]: ...
        def submit(self, requests: Any) -> Any: ...
        def submit_each(self, requests: Any) -> Any: ...
        def close(self) -> None: ...

    assert isinstance(Fake(), Engine)
    assert not isinstance(object(), Engine)
