"""What travels through the house, one frozen dataclass a hop, and every check of a parameter.

Knows neither torch nor transformers nor LangChain.

    SamplingParams   how to choose tokens; `None` means "what the checkpoint says"
    Request          prompt ids and resolved parameters, as an engine takes them
    Chunk            a piece of text of one row; the last of a row carries the verdict
    Usage            tokens counted
    Engine           what a backend must offer (a `Protocol`: no base class)
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

from .errors import ParameterError, PromptTooLongError

if TYPE_CHECKING:
    from .stream import TokenStream

FinishReason = Literal["stop", "length", "cancelled"]

MAX_ROWS = 32
"""Rows in one forward; a longer group runs in several."""

Turn = Mapping[str, str]
"""One turn of a conversation, as chat templates take it: `{"role": ..., "content": ...}`."""


def unknown_name(name: str, known: Iterable[str]) -> ParameterError:
    """The error for a parameter that nobody knows, naming the nearest that somebody does."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return ParameterError(f"unknown parameter {name!r}: {hint}")


def _check(name: str, value: Any, kind: type, low: float, high: float, meaning: str) -> None:
    """Refuse a number that is of the wrong kind, not finite, or outside `low..high`."""
    kinds = (int, float) if kind is float else (int,)
    # bool is an int to Python, never to a person who sets top_k.
    right = isinstance(value, kinds) and not isinstance(value, bool)
    if not right or not low <= value <= high:
        raise ParameterError(f"{name}={value!r} is not {meaning}")


_TINY, _MOST = math.ulp(0.0), sys.float_info.max  # infinity is beyond
_RULES: dict[str, tuple[type, float, float, str]] = {
    "max_new_tokens": (int, 1, math.inf, "a whole number of tokens, 1 or more"),
    "temperature": (float, 0, _MOST, "a number from 0 (greedy) up; try 0.7"),
    "top_p": (float, _TINY, 1, "a probability above 0 and at most 1 (1 is off)"),
    "top_k": (int, 0, math.inf, "a whole number from 0 (off) up"),
    "min_p": (float, 0, 1, "a probability from 0 (off) to 1"),
    "repetition_penalty": (float, _TINY, _MOST, "a number above 0 (1 is off); try 1.1"),
    "seed": (int, 0, 2**64 - 1, "a whole number from 0 to 2**64 - 1"),
    "timeout": (float, _TINY, _MOST, "a number of seconds above 0"),
}


def check_seconds(name: str, value: object) -> None:
    """Refuse what is no time to wait. Raises ParameterError."""
    if value is not None:
        _check(name, value, *_RULES["timeout"])


_OPTIONS: dict[str, tuple[type, float, float, str]] = {
    "max_rows": (int, 1, math.inf, "a whole number of requests that decode together, 1 or more"),
    "max_waiting": (int, 1, math.inf, "a whole number of requests that may wait, 1 or more"),
    "max_cached_tokens": (int, 1, math.inf, "a whole number of tokens, 1 or more"),
    "prefix_cache_bytes": (int, 0, math.inf, "a whole number of bytes, 0 (off) or more"),
    "prompt_lookup_num_tokens": (int, 1, math.inf, "a whole number of tokens to guess; try 10"),
}
ENGINE_OPTIONS = tuple(_OPTIONS)
"""What decides how an engine serves, and never what it says; each None or a whole number."""


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse a value that an engine option cannot have; None is what an engine does unasked.

    Raises ParameterError.
    """
    for name, rule in _OPTIONS.items():
        if options.get(name) is not None:
            _check(name, options[name], *rule)


def check_static(options: Mapping[str, Any], assistant: object = None) -> None:
    """Refuse what a static cache leaves no room for: it holds one request, of the whole context.

    Raises ParameterError.
    """
    alone = {"max_rows": 1, "prefix_cache_bytes": 0, "max_waiting": options.get("max_waiting")}
    for name, value in {**options, "assistant": assistant}.items():
        if value is not None and value != alone.get(name):
            raise ParameterError(
                f"{name}={value!r} does not go with a static cache, which is preset='speed' on a "
                "GPU and holds one request at a time: leave out one of the two"
            )


def _stops(stop: object) -> tuple[str, ...]:
    """`stop` as a tuple without repeats; a single string is a list of one."""
    given = [stop] if isinstance(stop, str) else stop
    if not isinstance(given, list | tuple) or not all(isinstance(s, str) and s for s in given):
        raise ParameterError(f"stop={stop!r} is not a list of non-empty strings, such as ['\\n']")
    return tuple(dict.fromkeys(given))


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to end. `None` means what the checkpoint's own config says.

        SamplingParams()                              # greedy for Gemma 2, to the end of the turn
        SamplingParams(temperature=0.7, top_p=0.9)    # sampled
        SamplingParams(temperature=0.7, seed=0)       # sampled, the same every time

    `timeout` is in seconds, from submission to the last chunk. Raises ParameterError for a value
    out of range.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    timeout: float | None = None

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            value = getattr(self, name)
            if value is not None:
                _check(name, value, *rule)
        object.__setattr__(self, "stop", _stops(self.stop))

    def override(self, **values: Any) -> Self:
        """These parameters with `values` in their place; stops add up, they never replace.

        Raises ParameterError for an unknown name.
        """
        for name in values.keys() - SAMPLING_NAMES:
            raise unknown_name(name, SAMPLING_NAMES)
        # None, and a stop of None, are how LangChain says "not given".
        given = {name: value for name, value in values.items() if value is not None}
        given["stop"] = self.stop + _stops(given.get("stop", ()))
        return replace(self, **given)

    def over(self, defaults: SamplingParams) -> Self:
        """These parameters, each `None` filled from `defaults`: what will really be used.

        Raises ParameterError where a value could have no effect.
        """
        filled = {f.name: getattr(self, f.name) for f in fields(self)}
        filled |= {k: getattr(defaults, k) for k, value in filled.items() if value is None}
        resolved = replace(self, **filled)
        if self.temperature is None and not resolved.temperature:
            for name in ("top_p", "top_k", "min_p"):
                if getattr(self, name) is not None:
                    raise ParameterError(
                        f"{name}={getattr(self, name)!r} has no effect without a temperature: "
                        "set one, such as temperature=1.0, or temperature=0 to mean greedy"
                    )
        return resolved


SAMPLING_NAMES = frozenset(f.name for f in fields(SamplingParams))


@dataclass(frozen=True, slots=True)
class Request:
    """One row of work: `prompt_ids`, shape (prompt tokens,), and resolved parameters. With a
    `grammar` (see `grammar.py` for its language) the text of the answer matches it.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    grammar: str | None = None


def check_prompt(length: int, context: int, name: str) -> None:
    """Refuse a prompt of `length` tokens that leaves no room in the `context` of model `name`.

    Raises PromptTooLongError or ParameterError.
    """
    if length >= context:
        raise PromptTooLongError(
            f"the prompt has {length:,} tokens and the context of {name!r} holds {context:,}, "
            "prompt and answer together: shorten the prompt"
        )
    if length == 0:
        raise ParameterError("prompt_ids=() is empty: a prompt needs at least a BOS")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request; `completion_tokens` counts every token the model chose, the one that
    ended the turn included, and `cached_tokens` are those of the prompt that cost no prefill.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next text of row `index`. Only a row's last chunk may be empty, and only it carries
    `finish_reason`, `usage`, and `stop`: the stop string that matched, if one did.
    """

    index: int
    text: str
    finish_reason: FinishReason | None = None
    stop: str | None = None
    usage: Usage | None = None


@runtime_checkable
class Engine(Protocol):
    """What generates. `Gemma2Engine` is ours; a fake in a test is a few lines."""

    @property
    def name(self) -> str:
        """What tells these weights from others, in traces and in cache keys."""

    @property
    def defaults(self) -> SamplingParams:
        """What `None` stands for."""

    def encode(self, prompt: str | Sequence[Turn], *, raw: bool = False) -> list[int]:
        """Prompt ids. A string is one user turn, or with `raw` the whole prompt."""

    def tokenize(self, text: str) -> list[int]:
        """The ids of plain text: no BOS, no turns, no control tokens."""

    def submit(self, requests: Sequence[Request]) -> TokenStream:
        """Queue `requests` as the rows of one stream, and return at once."""

    def submit_each(self, requests: Sequence[Request]) -> list[TokenStream]:
        """The same, with a stream for each request, which raises it where one is refused; they may
        be decoded together.
        """

    def close(self) -> None:
        """Stop the thread, free the weights, end what is in flight. May be called twice."""
