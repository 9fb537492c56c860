"""The room in which the requests of one batch meet, with real threads and an engine of a few lines.

What is seen of it from outside, in shared forwards, is in test_chat.py.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future

import pytest

from gemma2_stream import Chunk, EngineClosedError, Request, SamplingParams
from gemma2_stream.stream import Channel, TokenStream
from gemma2_stream.together import Place, Together


class Groups:
    """An engine that notes what is submitted together, and keeps the writing ends."""

    name, defaults = "groups", SamplingParams()

    def __init__(self) -> None:
        self.groups: list[list[Request]] = []
        self.channels: list[Channel] = []
        self.closed = False

    def submit(self, requests: Sequence[Request]) -> TokenStream:
        (stream,) = self.submit_each(requests)
        return stream

    def submit_each(self, requests: Sequence[Request]) -> list[TokenStream]:
        if self.closed:
            raise EngineClosedError("closed")
        self.groups.append(list(requests))
        channels = [Channel([request]) for request in requests]
        self.channels += channels
        return [TokenStream(channel) for channel in channels]

    def encode(self, prompt: object, *, raw: bool = False) -> list[int]:
        raise NotImplementedError

    def tokenize(self, text: str) -> list[int]:
        raise NotImplementedError

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engine() -> Groups:
    return Groups()


def _request(number: int) -> Request:
    return Request((2, number), SamplingParams())


def _join(place: Place, engine: Groups, number: int) -> Future[TokenStream]:
    with place:
        return place.join(engine, _request(number))


def test_the_last_to_come_submits_for_all(engine: Groups) -> None:
    """Nothing is submitted before, and everybody gets the stream of their own request."""
    places = Together(3).places
    first, second = (_join(place, engine, n) for n, place in enumerate(places[:2]))
    assert not engine.groups
    assert not first.done()
    last = _join(places[2], engine, 2)
    assert engine.groups == [[_request(0), _request(1), _request(2)]]
    for number, future in enumerate((first, second, last)):
        engine.channels[number].put(Chunk(0, str(number), "stop"))
        assert [chunk.text for chunk in future.result()] == [str(number)]


def test_who_leaves_without_a_request_keeps_nobody_waiting(engine: Groups) -> None:
    """As a caller does whose answer comes from a cache, or whose prompt is wrong, or whose thread
    is the last to be there."""
    places = Together(4).places
    with places[0]:
        pass
    joined = [_join(places[1], engine, 1)]
    with pytest.raises(KeyError), places[2]:
        raise KeyError
    assert not joined[0].done()
    with places[3]:
        joined.append(places[3].join(engine, _request(3)))
    assert engine.groups == [[_request(1), _request(3)]]
    assert all(future.done() for future in joined)


def test_when_all_leave_nothing_is_submitted(engine: Groups) -> None:
    """A batch that is all in the cache asks the engine nothing."""
    for place in Together(2).places:
        with place:
            pass
    assert engine.groups == []


def test_a_place_is_taken_once_and_who_asks_again_is_served_at_once(engine: Groups) -> None:
    """A retry within the call waits for nobody, and counts as nobody."""
    one, other = Together(2).places
    with one:
        first = one.join(engine, _request(0))
        again = one.join(engine, _request(0))
    assert again.done()
    assert not first.done()
    assert engine.groups == [[_request(0)]]
    _join(other, engine, 1)
    assert engine.groups[1:] == [[_request(0), _request(1)]]


def test_threads_that_come_in_any_order_meet(engine: Groups) -> None:
    """Thirty-two real threads, all held until the last of them has come."""
    places = Together(32).places
    streams: dict[int, TokenStream] = {}

    def come(number: int) -> None:
        streams[number] = _join(places[number], engine, number).result(30)

    threads = [threading.Thread(target=come, args=(n,)) for n in range(32)]
    for thread in threads[1:]:
        thread.start()
    assert not engine.groups
    threads[0].start()
    for thread in threads:
        thread.join(30)
    assert [len(group) for group in engine.groups] == [32]
    for number, stream in streams.items():
        assert stream._channel.requests == (_request(number),)


def test_who_is_cancelled_while_waiting_is_left_out(engine: Groups) -> None:
    """A task that has gone costs no row."""
    one, other = Together(2).places
    gone = _join(one, engine, 0)
    assert gone.cancel()
    _join(other, engine, 1)
    assert engine.groups == [[_request(1)]]


def test_when_all_that_joined_have_gone_nothing_is_submitted(engine: Groups) -> None:
    """The last to leave submits for nobody."""
    one, other = Together(2).places
    assert _join(one, engine, 0).cancel()
    with other:
        pass
    assert engine.groups == []


def test_an_engine_that_refuses_all_says_so_to_all(engine: Groups) -> None:
    """Nobody is left waiting for a stream that never comes."""
    engine.close()
    one, other = Together(2).places
    futures = [_join(one, engine, 0), _join(other, engine, 1)]
    for future in futures:
        with pytest.raises(EngineClosedError):
            future.result(0)


def test_a_failure_reaches_who_waits_and_who_comes_later(engine: Groups) -> None:
    """Nothing is submitted any more, however many are missing."""
    group = Together(3)
    waits = _join(group.places[0], engine, 0)
    group.fail(error := KeyError("one of them"))
    later = [_join(place, engine, 1) for place in group.places[1:]]
    assert [future.exception(0) for future in (waits, *later)] == [error] * 3
    assert engine.groups == []


def test_a_failure_reaches_who_reads_and_stops_the_work(engine: Groups) -> None:
    """What was made is read, then the error comes; the worker is told; twice is no harm."""
    group = Together(2)
    streams = [_join(place, engine, n) for n, place in enumerate(group.places)]
    engine.channels[0].put(Chunk(0, "so far"))
    error = KeyError("the other")
    group.fail(error)
    group.fail(error)
    reader = streams[0].result()
    assert next(reader).text == "so far"
    with pytest.raises(KeyError) as caught:
        next(reader)
    assert caught.value is error
    assert list(reader) == []
    assert all(channel.cancelled for channel in engine.channels)


def test_a_group_that_is_served_keeps_no_stream_alive(engine: Groups) -> None:
    """A stream that its caller drops is cancelled, though the others go on."""
    one, other = Together(2).places
    dropped = _join(one, engine, 0)
    kept = _join(other, engine, 1).result()
    del dropped
    assert [channel.cancelled for channel in engine.channels] == [True, False]
    del kept
    assert engine.channels[1].cancelled
