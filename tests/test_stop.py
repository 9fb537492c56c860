"""StopFilter against a reference that looks at the whole text at once."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2_stream.stop import StopFilter

FAMILY = "👨\u200d👩\u200d👧"

# Two letters collide all the time; the others are what a stop must not be cut inside of.
texts = st.one_of(
    st.text("ab", max_size=40),
    st.text("a\n👨👩\u200de\u0301", max_size=30),
    st.text(max_size=30),
)
stop_lists = st.lists(
    st.one_of(st.text("ab", min_size=1, max_size=6), st.text("a\n👨\u200de\u0301", min_size=1)),
    max_size=5,
)
several = settings(max_examples=400)


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text up to the stop that completes first, of several the longest; and that stop."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            longest = max(done, key=len)
            return text[: end - len(longest)], longest
    return text, None


def pending(text: str, stops: list[str]) -> str:
    """The longest end of `text` that a stop begins with, without being that stop."""
    ends = [text[start:] for start in range(len(text))]
    return next((end for end in ends if any(s.startswith(end) and s != end for s in stops)), "")


def pieces(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def run(stops: list[str], chunks: list[str]) -> tuple[str, str | None]:
    filter_ = StopFilter(stops)
    text = "".join([filter_.feed(chunk) for chunk in chunks]) + filter_.flush()
    return text, filter_.matched


@several
@given(text=texts, stops=stop_lists, cuts=st.lists(st.integers(0, 100), max_size=8))
def test_any_split_gives_the_text_before_the_first_stop(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    """However the text arrives, empty pieces included, what comes out is the same."""
    assert run(stops, pieces(text, cuts)) == cut(text, stops)


@several
@given(before=texts, stops=stop_lists.filter(len), after=texts, data=st.data())
def test_a_stop_that_is_there_is_found(
    before: str, stops: list[str], after: str, data: st.DataObject
) -> None:
    """A text with a stop in it, one character at a time, ends there."""
    text = before + data.draw(st.sampled_from(stops)) + after
    given_, matched = run(stops, list(text))
    assert (given_, matched) == cut(text, stops)
    assert matched is not None


@several
@given(text=texts, stops=stop_lists)
def test_what_is_held_is_what_could_become_a_stop(text: str, stops: list[str]) -> None:
    """After every character all is given out but the longest beginning of a stop: no less."""
    filter_, seen, out = StopFilter(stops), "", ""
    for char in text:
        seen, out = seen + char, out + filter_.feed(char)
        if filter_.matched is not None:
            assert out == cut(seen, stops)[0]
            return
        assert out + pending(seen, stops) == seen


@several
@given(text=texts, stops=stop_lists, cuts=st.lists(st.integers(0, 100), max_size=8))
def test_what_is_given_is_never_taken_back(text: str, stops: list[str], cuts: list[int]) -> None:
    """At every moment the output is a prefix of the final answer, so no part of a stop leaks."""
    answer, out = cut(text, stops)[0], ""
    filter_ = StopFilter(stops)
    for chunk in pieces(text, cuts):
        out += filter_.feed(chunk)
        assert answer.startswith(out)


@several
@given(text=texts, stops=stop_lists, order=st.randoms())
def test_the_order_of_stops_says_nothing(text: str, stops: list[str], order: random.Random) -> None:
    """Shuffled and repeated stops cut where the originals do."""
    shuffled = stops * 2
    order.shuffle(shuffled)
    assert run(shuffled, list(text)) == run(stops, [text])


@pytest.mark.parametrize(
    ("stops", "text", "answer", "matched"),
    [
        (["aab"], "aaab!", "a", "aab"),
        (["abab"], "aababab", "a", "abab"),
        (["abcabd"], "abcabcabd", "abc", "abcabd"),
        (["aabaaaab"], "aabaaabaaaab", "aaba", "aabaaaab"),
        (["b", "ab"], "xab", "x", "ab"),
        (["ab", "abc"], "xabc", "x", "ab"),
        (["bc", "abcd"], "xabcd", "xa", "bc"),
        (["abcd", "bcd", "cd", "d"], "xabcd", "x", "abcd"),
        (["\nHuman:", "\n\nHuman:"], "Hi\n\nHuman: no", "Hi", "\n\nHuman:"),
        (["\r\n"], "one\rtwo\r\nthree", "one\rtwo", "\r\n"),
        ([FAMILY], f"👨\u200d👩\u200d👦{FAMILY}", "👨\u200d👩\u200d👦", FAMILY),
        (["é"], "e\u0301 é", "e\u0301 ", "é"),
        (["\0"], "a\0b", "a", "\0"),
        (["Stop"], "stop STOP Stop", "stop STOP ", "Stop"),
    ],
)
def test_stops_that_overlap(stops: list[str], text: str, answer: str, matched: str) -> None:
    """Borders inside a stop, stops inside stops, stops that end together: whole and in pieces."""
    assert run(stops, [text]) == run(stops, list(text)) == (answer, matched)


def test_a_very_long_stop() -> None:
    """A near miss of 10,000 characters comes out whole, in time that does not explode."""
    stop = "a" * 9_999 + "b"
    assert run([stop], ["a" * 30_000]) == ("a" * 30_000, None)
    assert run([stop], ["a" * 30_000, "b", "c"]) == ("a" * 20_001, stop)


def test_many_stops() -> None:
    """A thousand stops, of which one is there."""
    stops = [f"<{number}>" for number in range(1_000)]
    assert run(stops, ["<<1000", "><99", "9>", "<1>"]) == ("<<1000>", "<999>")


def test_nothing_comes_after_a_stop() -> None:
    """Neither feed nor flush says a word more, and the match stays the first one."""
    filter_ = StopFilter(["b", "c"])
    assert filter_.feed("abc") == "a"
    assert filter_.feed("c") == filter_.feed("") == filter_.flush() == ""
    assert filter_.matched == "b"


def test_flush_gives_what_was_held() -> None:
    """An answer that ends inside the beginning of a stop keeps it; a second flush is empty."""
    filter_ = StopFilter(["\nHuman:"])
    assert [filter_.feed("Hi\nHu"), filter_.flush(), filter_.flush()] == ["Hi", "\nHu", ""]
    assert filter_.matched is None


def test_without_stops_everything_passes_at_once() -> None:
    """No stop holds nothing."""
    filter_ = StopFilter([])
    assert [filter_.feed("a"), filter_.feed("\n"), filter_.flush()] == ["a", "\n", ""]
