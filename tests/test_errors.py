"""The exception tree is the one that the module's docstring draws."""

from __future__ import annotations

import builtins
import pickle
import re

import pytest
from langchain_core import exceptions as core

import gemma2_stream
from gemma2_stream import errors

CORE = {
    "Gemma2StreamError": core.ModelError,
    "ParameterError": core.ModelInvalidRequestError,
    "GrammarError": core.ModelInvalidRequestError,
    "StructuredOutputError": core.OutputParserException,
    "PromptError": core.ModelInvalidRequestError,
    "PromptTooLongError": core.ContextOverflowError,
    "ModelNotFoundError": core.ModelNotFoundError,
    "ModelAccessError": core.ModelPermissionDeniedError,
    "DownloadError": core.ModelConnectionError,
    "ChecksumError": core.ModelConnectionError,
    "CheckpointError": core.ModelError,
    "NotFiniteError": core.ModelError,
    "ServerError": core.ModelConnectionError,
    "GenerationTimeoutError": core.ModelTimeoutError,
    "EngineBusyError": core.ModelRateLimitError,
    "EngineClosedError": core.ModelError,
}


def drawn() -> dict[str, tuple[str, str | None]]:
    """name → (the name above it, the builtin in the second column), from the docstring."""
    tree, above = {}, ["", "Gemma2StreamError"]
    for branch, name, rest in re.findall(r"^ {4}([│ ]*[├└]── )(\w+)(.*)$", errors.__doc__, re.M):
        depth = len(branch) // 4
        del above[depth + 1 :]
        builtin = re.match(r" +([A-Z]\w+Error)\b", rest)
        tree[name] = (above[depth], builtin and builtin[1])
        above.append(name)
    return tree


def test_the_drawing_is_complete() -> None:
    """Every class of the module is drawn, and everything drawn is a class of the module."""
    classes = [made for made in vars(errors).values() if isinstance(made, type)]
    made = {cls.__name__ for cls in classes if cls.__module__ == errors.__name__}
    assert made == {*drawn(), "Gemma2StreamError"} == {*CORE}


@pytest.mark.parametrize("name", sorted(drawn()))
def test_each_derives_from_what_stands_above_and_beside_it(name: str) -> None:
    """The branch that it hangs on, and the builtin in the second column."""
    above, builtin = drawn()[name]
    assert issubclass(getattr(errors, name), getattr(errors, above))
    assert above in [base.__name__ for base in getattr(errors, name).__bases__]
    if builtin is not None:
        assert issubclass(getattr(errors, name), getattr(builtins, builtin))
    else:
        assert above != "Gemma2StreamError"


@pytest.mark.parametrize("name", sorted(CORE))
def test_each_derives_from_langchains_own(name: str) -> None:
    """Who catches langchain-core's error of the same meaning catches ours."""
    assert issubclass(getattr(errors, name), CORE[name])


@pytest.mark.parametrize("name", sorted(CORE))
def test_each_is_public_and_tells_what_it_is(name: str) -> None:
    """Exported by the package, with a sentence."""
    assert name in gemma2_stream.__all__
    assert getattr(gemma2_stream, name) is getattr(errors, name)
    assert getattr(errors, name).__doc__.endswith(".")


@pytest.mark.parametrize("name", sorted(CORE))
def test_each_carries_its_message_between_processes(name: str) -> None:
    """The message is what was said, and survives a pickle, OSError's own habits notwithstanding."""
    error = getattr(errors, name)("it broke: repair it")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(error) == str(again) == "it broke: repair it"


def test_only_what_may_pass_is_retried() -> None:
    """LangChain retries what says so: network, clock and queue, never a wrong parameter."""
    retried = {name for name in CORE if getattr(errors, name).is_retryable}
    assert retried == {
        "DownloadError", "ChecksumError", "EngineBusyError", "GenerationTimeoutError", "ServerError"
    }  # fmt: skip
