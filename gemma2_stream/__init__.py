"""Gemma 2 on your own machine behind LangChain, streamed token by token.

    from gemma2_stream import Gemma2LLM

    for token in Gemma2LLM("LLM-Research/gemma-2-9b-it").stream("你是谁"):
        print(token, end="", flush=True)

Importing this package loads neither torch nor transformers nor LangChain; using a name of it does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat import ChatGemma2
    from .engine import Gemma2Engine
    from .errors import (
        CheckpointError,
        ChecksumError,
        DownloadError,
        EngineBusyError,
        EngineClosedError,
        Gemma2StreamError,
        GenerationTimeoutError,
        GrammarError,
        ModelAccessError,
        ModelNotFoundError,
        NotFiniteError,
        ParameterError,
        PromptError,
        PromptTooLongError,
        ServerError,
        StructuredOutputError,
    )
    from .llm import Gemma2_LLM, Gemma2LLM
    from .stream import Channel, TokenStream
    from .types import Chunk, Engine, FinishReason, Request, SamplingParams, Usage

__version__ = "0.1.0"

_ROOMS = {
    "chat": ["ChatGemma2"],
    "engine": ["Gemma2Engine"],
    "errors": [
        "CheckpointError",
        "ChecksumError",
        "DownloadError",
        "EngineBusyError",
        "EngineClosedError",
        "Gemma2StreamError",
        "GenerationTimeoutError",
        "GrammarError",
        "ModelAccessError",
        "ModelNotFoundError",
        "NotFiniteError",
        "ParameterError",
        "PromptError",
        "PromptTooLongError",
        "ServerError",
        "StructuredOutputError",
    ],
    "llm": ["Gemma2LLM", "Gemma2_LLM"],
    "stream": ["Channel", "TokenStream"],
    "types": ["Chunk", "Engine", "FinishReason", "Request", "SamplingParams", "Usage"],
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "Channel",
    "ChatGemma2",
    "CheckpointError",
    "ChecksumError",
    "Chunk",
    "DownloadError",
    "Engine",
    "EngineBusyError",
    "EngineClosedError",
    "FinishReason",
    "Gemma2Engine",
    "Gemma2LLM",
    "Gemma2StreamError",
    "Gemma2_LLM",
    "GenerationTimeoutError",
    "GrammarError",
    "ModelAccessError",
    "ModelNotFoundError",
    "NotFiniteError",
    "ParameterError",
    "PromptError",
    "PromptTooLongError",
    "Request",
    "SamplingParams",
    "ServerError",
    "StructuredOutputError",
    "TokenStream",
    "Usage",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_ROOM_OF[name]}", __name__), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
