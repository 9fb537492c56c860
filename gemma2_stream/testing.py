"""An engine for tests of your own chains: it says what the test tells it, without any weights.

Knows the `Engine` protocol and no torch. Threads, streams, stops, limits and cancellation are real;
only the model is not.

    FakeEngine(["Hello"])                     # one answer, in one chunk
    FakeEngine([["Hel", "lo"], ["Bye"]])      # two, chunk by chunk, in the order of the requests
    FakeEngine([["Hel", OSError("gone")]])    # breaks in the middle
    FakeEngine([["Hel", gate, "lo"]])         # waits in the middle, until gate.set()
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from .errors import EngineClosedError, ParameterError
from .prompt import alternating
from .stop import StopFilter
from .stream import Channel, TokenStream, each
from .types import Chunk, FinishReason, Request, SamplingParams, Turn, Usage

Step = str | BaseException | threading.Event
"""What an answer is made of: a chunk to say, an exception to raise, a gate to wait at."""

_LOOK = 0.01  # seconds between two looks, at a closed gate, whether anybody still waits


@dataclass(slots=True)
class Call:
    """A request that came, and what became of it.

    `prompt` is its text, `request` its parameters as they were used, `chunks` what was sent so far.
    `finish_reason` is None while it runs, and after an error.
    """

    prompt: str
    request: Request
    chunks: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class FakeEngine:
    """Answers with `answers`, one a request, in order; `calls` says what it was asked.

        engine = FakeEngine([["Hel", "lo"]])
        assert Gemma2LLM(engine=engine).invoke("Hi") == "Hello"
        assert "Hi" in engine.calls[0].prompt

    An answer is a string, or a sequence of steps: strings, exceptions, `threading.Event`s to wait
    for. Each string is one token, and the end of a turn is another one, so `max_new_tokens=2` cuts
    an answer of two; a token of a prompt is a character. Turns are written as Gemma 2's template
    does. Sampling parameters are checked and change nothing, and a grammar is not enforced: what a
    tool call or a structured answer looks like is up to the test.

    Raises ParameterError when there is no answer left.
    """

    def __init__(
        self,
        answers: Iterable[str | Sequence[Step]],
        *,
        name: str = "fake",
        defaults: SamplingParams | None = None,
    ) -> None:
        if isinstance(answers, str):
            raise ParameterError(f"answers={answers!r} is one answer: give a list, [{answers!r}]")
        self.name = name
        self.defaults = defaults or SamplingParams()
        self.calls: list[Call] = []
        self._answers: list[list[Step]] = [[a] if isinstance(a, str) else [*a] for a in answers]
        self._lock = threading.Lock()
        self._channels: list[Channel] = []
        self._closed = False

    def encode(self, prompt: str | Sequence[Turn], *, raw: bool = False) -> list[int]:
        """The characters of the prompt. Raises PromptError for turns that Gemma cannot read."""
        if isinstance(prompt, str) and raw:
            return self.tokenize(prompt)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        written = [
            f"<start_of_turn>{'model' if turn['role'] == 'assistant' else 'user'}\n"
            f"{turn['content'].strip()}<end_of_turn>\n"
            for turn in alternating(turns, system_role=False)
        ]
        return self.tokenize("".join(written) + "<start_of_turn>model\n")

    def tokenize(self, text: str) -> list[int]:
        """The characters of `text`."""
        return [ord(character) for character in text]

    def submit(self, requests: Sequence[Request]) -> TokenStream:
        """Take an answer for each of `requests`, and say them in shared steps.

        Raises ParameterError or EngineClosedError.
        """
        with self._lock:
            if self._closed:
                raise EngineClosedError(f"the engine of {self.name!r} was closed: make another")
            resolved = [replace(r, params=r.params.over(self.defaults)) for r in requests]
            if len(resolved) > len(self._answers):
                raise ParameterError(
                    f"answers has none left for request {len(self.calls) + 1}: give one for each"
                )
            calls = [Call("".join(map(chr, r.prompt_ids)), r) for r in resolved]
            answers = [self._answers.pop(0) for _ in calls]
            self.calls += calls
            channel = Channel(resolved)
            self._channels.append(channel)
        each = zip(calls, answers, strict=True)
        rows = [_Row(channel, index, *row) for index, row in enumerate(each)]
        threading.Thread(target=_work, args=(channel, rows), daemon=True).start()
        return TokenStream(channel)

    def submit_each(self, requests: Sequence[Request]) -> list[TokenStream]:
        """The same, with a stream for each; one that is refused raises it when it is read."""
        return each(self.submit, requests)

    def join(self) -> None:
        """Wait until every request so far is over, such as after one was cancelled."""
        for channel in list(self._channels):
            channel.finished.wait()

    def close(self) -> None:
        """End what is in flight with EngineClosedError. May be called twice."""
        with self._lock:
            self._closed = True
        for channel in self._channels:
            if not channel.finished.is_set():
                channel.fail(EngineClosedError(f"the engine of {self.name!r} was closed"))
        self.join()


class _Row:
    """One answer on its way."""

    def __init__(self, channel: Channel, index: int, call: Call, answer: list[Step]) -> None:
        self._channel = channel
        self._index = index
        self._call = call
        self._answer = answer
        self._stop = StopFilter(call.request.params.stop)
        self._tokens = 0

    def steps(self) -> Iterator[None]:
        """Take a step at each `next`, until the answer is over."""
        for step in self._answer:
            if isinstance(step, threading.Event):
                while not (step.wait(_LOOK) or self._channel.cancelled):
                    pass
            if self._channel.cancelled:
                return self._end("", "cancelled")
            if isinstance(step, BaseException):
                raise step
            if isinstance(step, str) and self._said(step):
                return None
            yield
        self._tokens += 1  # the end of the turn
        return self._end("", "stop")

    def _said(self, token: str) -> bool:
        """Say one token; whether it was the last."""
        self._tokens += 1
        text = self._stop.feed(token)
        if self._stop.matched is not None:
            self._end(text, "stop")
        elif self._tokens == self._call.request.params.max_new_tokens:
            self._end(text, "length")
        elif text:
            self._call.chunks.append(text)
            self._channel.put(Chunk(self._index, text))
        return self._call.finish_reason is not None

    def _end(self, text: str, reason: FinishReason) -> None:
        if self._channel.error is not None:  # that is what the reader gets
            return
        text += self._stop.flush()
        self._call.chunks.append(text)
        self._call.finish_reason = reason
        usage = Usage(len(self._call.request.prompt_ids), self._tokens)
        self._channel.put(Chunk(self._index, text, reason, self._stop.matched, usage))


def _work(channel: Channel, rows: Sequence[_Row]) -> None:
    """Say all rows, a step of each at a time, as the real engine's worker does."""
    try:
        channel.start()
        going = [row.steps() for row in rows]
        while going:
            going = [steps for steps in going if next(steps, channel) is None]
        channel.put(None)
    except BaseException as error:
        channel.fail(error)
    finally:
        channel.finished.set()
