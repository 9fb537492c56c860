"""Everything that gemma2_stream raises on its own account.

    Gemma2StreamError
    ├── ParameterError          ValueError       a parameter is unknown, or its value is wrong
    ├── GrammarError            ValueError       an answer cannot be held to what it must match
    ├── StructuredOutputError   ValueError       an answer ended before it was whole
    ├── PromptError             ValueError       a prompt cannot be expressed to the model
    │   └── PromptTooLongError                   it leaves no room for an answer in the context
    ├── ModelNotFoundError      ValueError       no such model, revision or folder
    ├── ModelAccessError        PermissionError  the hub or a server wants another token or key
    ├── DownloadError           OSError          the hub cannot be reached, or the transfer broke
    │   └── ChecksumError                        what arrived is not what the hub published
    ├── CheckpointError         ValueError       a folder holds no checkpoint that can be run
    ├── NotFiniteError          ArithmeticError  the model computed NaN instead of logits
    ├── ServerError             ConnectionError  a server cannot be reached, failed, or broke off
    ├── GenerationTimeoutError  TimeoutError     the caller's own `timeout` ran out, or a server's
    ├── EngineBusyError         RuntimeError     as many requests wait as `max_waiting` admits
    └── EngineClosedError       RuntimeError     the engine was closed, or is a parent process's

Each also derives from the langchain-core error of the same meaning, so a caller that catches
`ModelError` (or the builtin in the second column) catches ours. An exception out of the model
itself is none of these: it reaches the caller unchanged.
"""

from __future__ import annotations

from langchain_core import exceptions as core


class Gemma2StreamError(core.ModelError):
    """Base of every error that this package raises on its own account."""


class ParameterError(Gemma2StreamError, core.ModelInvalidRequestError, ValueError):
    """A parameter is unknown, of the wrong type or out of range."""


class GrammarError(Gemma2StreamError, core.ModelInvalidRequestError, ValueError):
    """An answer cannot be held to the JSON schema or the grammar that it must match."""


class StructuredOutputError(Gemma2StreamError, core.OutputParserException):
    """An answer that had to match a JSON schema ended before it was whole; `llm_output` is it."""

    def __init__(self, message: str, llm_output: str | None = None) -> None:
        super().__init__(message, llm_output=llm_output)
        self.args = (message,)  # LangChain adds a link of its own


class PromptError(Gemma2StreamError, core.ModelInvalidRequestError, ValueError):
    """A prompt cannot be expressed to the model."""


class PromptTooLongError(PromptError, core.ContextOverflowError):
    """The prompt leaves no room for an answer in the model's context."""


class ModelNotFoundError(Gemma2StreamError, core.ModelNotFoundError, ValueError):
    """There is no such model, revision or folder, or a server knows none of that name."""


class ModelAccessError(Gemma2StreamError, core.ModelPermissionDeniedError, PermissionError):
    """The hub wants a licence accepted or a token, or a server another key."""


class DownloadError(Gemma2StreamError, core.ModelConnectionError, OSError):
    """The hub cannot be reached, or the transfer broke; what arrived is kept for the next try."""


class ChecksumError(DownloadError):
    """What arrived is not what the hub published."""


class CheckpointError(Gemma2StreamError, ValueError):
    """A folder holds no checkpoint that can be run."""


class NotFiniteError(Gemma2StreamError, ArithmeticError):
    """The model computed NaN instead of logits."""


class ServerError(Gemma2StreamError, core.ModelConnectionError, ConnectionError):
    """The server behind `base_url` cannot be reached, failed, or ended an answer too early."""


class GenerationTimeoutError(Gemma2StreamError, core.ModelTimeoutError, TimeoutError):
    """The `timeout` that the caller set ran out, or a server fell silent."""


class EngineBusyError(Gemma2StreamError, core.ModelRateLimitError, RuntimeError):
    """As many requests wait as `max_waiting` admits."""


class EngineClosedError(Gemma2StreamError, RuntimeError):
    """The engine was closed, or was made in a parent process before a fork."""
