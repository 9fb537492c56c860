"""What goes wrong with a server, as errors of ours, and when to ask it again."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from json import JSONDecodeError
from typing import TYPE_CHECKING, Any

from ..errors import (
    EngineBusyError,
    Gemma2StreamError,
    GenerationTimeoutError,
    GrammarError,
    ModelAccessError,
    ModelNotFoundError,
    ParameterError,
    PromptTooLongError,
    ServerError,
)
from ..types import Request
from .client import READ_SECONDS
from .spec import RemoteSpec

if TYPE_CHECKING:
    from openai import OpenAIError

_PAUSE, _LONGEST_PAUSE = 0.5, 60.0  # seconds before a second try, and before any

# What a status means, and what is said of it; the codes are what our own server says later on.
_KEY = (ModelAccessError, "refuses the key ({}): give the right one as api_key")
_NONE = (
    ModelNotFoundError,
    "knows no such thing ({}): check model, and base_url, which mostly ends in /v1",
)
_BUSY = (EngineBusyError, "takes no more now ({}): try again later")
_LATE = (GenerationTimeoutError, "gave up ({}): ask for less, or try again later")
_MEANINGS: dict[object, tuple[type[Gemma2StreamError], str]] = {
    401: _KEY,
    403: _KEY,
    404: _NONE,
    408: _LATE,
    429: _BUSY,
    503: _BUSY,
    504: _LATE,
    "busy": _BUSY,
    "closed": _BUSY,
    "timeout": _LATE,
}


@contextmanager
def explained(spec: RemoteSpec, request: Request) -> Iterator[None]:
    """What the client raises, as ours."""
    from openai import OpenAIError

    try:
        yield
    except OpenAIError as error:
        key = spec.api_key.get_secret_value() if spec.api_key is not None else None
        # Some servers repeat the key that they refuse, and a traceback would show it.
        raise _meaning(error, spec, request) from (None if key and key in str(error) else error)
    except (JSONDecodeError, UnicodeDecodeError) as error:
        raise gibberish(spec.base_url) from error


def gibberish(base_url: str) -> ServerError:
    return ServerError(
        f"the server at {base_url} does not answer as OpenAI's does: check base_url, which mostly "
        "ends in /v1"
    )


def _meaning(error: OpenAIError, spec: RemoteSpec, request: Request) -> Gemma2StreamError:
    from openai import APIConnectionError

    place = f"the server at {spec.base_url}"
    if isinstance(error, APIConnectionError):
        return _unconnected(error, spec, place)
    body = getattr(error, "body", None)
    fields: Mapping[str, Any] = body if isinstance(body, Mapping) else {}
    said = " ".join(str(fields.get("message") or body or error).split()).removesuffix(".")
    if spec.api_key is not None:
        said = said.replace(spec.api_key.get_secret_value(), "…")
    code = fields.get("code")
    status = getattr(error, "status_code", code)  # after the first byte there is only the code
    if code == "context_length_exceeded" or "maximum context length" in said:
        return PromptTooLongError(f"{place} refuses the prompt: {said}. Shorten it")
    if (known := _MEANINGS.get(code) or _MEANINGS.get(status)) is not None:
        return known[0](f"{place} {known[1].format(said)}")
    if isinstance(status, int) and 400 <= status < 500:
        if request.grammar is not None and "grammar" in said.lower():
            return GrammarError(f"{place} cannot hold the answer to its grammar: {said}")
        return ParameterError(f"{place} refuses the request: {said}")
    return ServerError(f"{place} failed: {said}{_GUIDANCE if request.grammar is not None else ''}")


_GUIDANCE = (
    ". If it is vLLM, start it with --structured-outputs-config "
    """'{"backend": "guidance"}', which schemas and tools need"""
)


def _unconnected(error: OpenAIError, spec: RemoteSpec, place: str) -> Gemma2StreamError:
    cause = type(error.__cause__).__name__
    if cause in ("ReadTimeout", "WriteTimeout"):
        return GenerationTimeoutError(
            f"{place} was silent for read_timeout={spec.read_timeout or READ_SECONDS} s: the link "
            "may be cut; or raise read_timeout, if it reads long prompts or has a long queue"
        )
    return ServerError(
        f"the connection to {spec.base_url} failed ({cause}): check that a server runs there, and "
        "the network, and ask again"
    )


def pause(error: Gemma2StreamError, again: int) -> float:
    """Seconds before the next try: as the server says, else ever more."""
    response = getattr(error.__cause__, "response", None)
    said = response.headers.get("retry-after", "") if response is not None else ""
    pause = float(said) if said.isdecimal() else _PAUSE * 2**again * random.uniform(0.75, 1.25)
    return min(pause, _LONGEST_PAUSE)
