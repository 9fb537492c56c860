"""Errors as OpenAI's clients read them: a status, and `{"error": {...}}`."""

from __future__ import annotations

import logging
import re
from typing import Any, NamedTuple

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from langchain_core.exceptions import ModelInvalidRequestError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..errors import (
    EngineBusyError,
    EngineClosedError,
    GenerationTimeoutError,
    PromptTooLongError,
)
from ..types import unknown_name
from .requests import ChatRequest, TextRequest

logger = logging.getLogger("gemma2_stream.server")

CLIENT_GONE = 499
"""What the log says of a request whose client did not wait; nobody gets it."""


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """What every error is."""

    error: ErrorDetail


class Refusal(NamedTuple):
    """A status and what is said with it."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] | None = None

    def body(self) -> dict[str, Any]:
        said = ("message", "type", "param", "code")
        return {"error": {name: getattr(self, name) for name in said}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


class NoSuchModel(HTTPException):
    """The model that was asked for is not the one that is here."""

    def __init__(self, wanted: str, name: str) -> None:
        super().__init__(404, f"model={wanted!r:.200} is not served here: ask for {name!r}")


RETRY_AFTER = {"Retry-After": "1"}
TOO_MANY = Refusal(
    503,
    "as many are connected as are admitted: try again later",
    "server_error",
    code="busy",
    headers={**RETRY_AFTER, "Connection": "close"},
)


def refusal_of(error: Exception) -> Refusal:
    """What a client is told of `error`; the log gets the traceback of what is nobody's fault."""
    match error:
        case RequestValidationError():
            return _invalid(error)
        case NoSuchModel():
            return Refusal(404, str(error.detail), param="model", code="model_not_found")
        case HTTPException():
            return Refusal(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        case ClientDisconnect():
            return Refusal(CLIENT_GONE, "the client has gone")
        case PromptTooLongError():
            return Refusal(400, str(error), code="context_length_exceeded")
        case ModelInvalidRequestError():
            return Refusal(400, str(error), param=_param(str(error)), code="invalid_value")
        case EngineBusyError():
            told = "as many requests wait as are admitted: try again later"
            return Refusal(503, told, "server_error", code="busy", headers=RETRY_AFTER)
        case EngineClosedError():
            told = "the engine was closed"
            return Refusal(503, told, "server_error", code="closed", headers=RETRY_AFTER)
        case GenerationTimeoutError() | TimeoutError():
            told = str(error) or "the request took too long"
            return Refusal(504, told, "server_error", code="timeout")
    logger.error("failed", exc_info=error)
    return Refusal(500, f"the model failed with {type(error).__name__}", "server_error")


def _param(message: str) -> str | None:
    """The parameter that an error of ours is about, as clients call it."""
    named = re.match(r"messages\[\d+\]|\w+(?==)", message)
    found = named and named[0]
    return "max_tokens" if found == "max_new_tokens" else found


def _invalid(error: RequestValidationError) -> Refusal:
    # Of the kinds that a field may be, the one that was most likely meant.
    first = max(error.errors(), key=lambda each: len(each["loc"]))
    place, message = _place(first["loc"]), str(first["msg"])
    match first["type"]:
        case "extra_forbidden":
            return Refusal(400, _unknown(place), param=place, code="unknown_parameter")
        case "missing":
            message = f"{place or 'the body'} is missing"
            return Refusal(400, message, param=place, code="missing_required_parameter")
        case "value_error":  # ours, which begins with the name of what is wrong
            message = message.removeprefix("Value error, ")
            where = f"{place}." if place else ""
            place, message = where + message.split()[0], where + message
        case _ if place is None:
            message = "the body is no JSON object, or Content-Type is not application/json"
        case _:
            given = first.get("input")
            shown = f"={given!r:.100}" if isinstance(given, str | int | float | None) else ""
            message = f"{place}{shown} is not right: {message[0].lower()}{message[1:]}"
    return Refusal(400, message, param=place, code="invalid_value")


def _place(loc: tuple[int | str, ...]) -> str | None:
    """`messages[0].content`; the names of types, which pydantic has in between, are left out."""
    parts = [part for part in loc[1:] if isinstance(part, int) or _is_field(part)]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return path.removeprefix(".") or None


def _is_field(part: str) -> bool:
    return part.isidentifier() and part.islower() and part != "str"


def _unknown(place: str | None) -> str:
    if place is None or not place.isidentifier():
        return f"{place} is unknown"
    return str(unknown_name(place, {*ChatRequest.model_fields, *TextRequest.model_fields}))
