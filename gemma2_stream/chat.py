"""`ChatGemma2`: the engine as a LangChain chat model. Translates, and nothing else.

One primitive, `_stream` and its async twin; everything else folds it.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Literal, Unpack

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import (
    BaseChatModel,
    agenerate_from_stream,
    generate_from_stream,
)
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import (
    Runnable,
    RunnableConfig,
    RunnableMap,
    RunnablePassthrough,
)
from langchain_core.runnables.config import get_config_list, get_executor_for_config
from langchain_core.tools import BaseTool

from .fields import CALL_NAMES, Gemma2Fields, Parameters
from .formats import (
    FORMAT_NAMES,
    Method,
    answer_format,
    openai_tool,
    structured,
    tools_of,
)
from .messages import turns_of
from .together import Place, Together
from .tools import AnswerFormat, CallParser, CallPart
from .types import MAX_ROWS, Chunk, Usage, unknown_name


class ChatParameters(Parameters, total=False):
    """Keyword arguments of `ChatGemma2`."""

    streaming: bool
    disable_streaming: bool | Literal["tool_calling"]
    rate_limiter: Any
    output_version: str | None
    profile: Any


class ChatGemma2(Gemma2Fields, BaseChatModel):
    """A locally running Gemma 2 that chats, calls tools, and answers in the shape you ask for.

        ChatGemma2()                                            # the embedded demo, a toy
        ChatGemma2("LLM-Research/gemma-2-9b-it")                # a ModelScope id
        ChatGemma2("google/gemma-2-9b-it", temperature=0.7)     # a Hugging Face id, sampled
        chat.bind_tools([get_weather], tool_choice="any")       # a call, always well-formed
        chat.with_structured_output(Person)                     # an object, always of that shape

    Parameters and weights are those of `Gemma2LLM`, and shared with it. Calls take the sampling
    parameters, `model`, `tools`, `tool_choice`, `parallel_tool_calls` and `response_format` too.
    Raises ParameterError for a wrong or unknown parameter, PromptError for a message that Gemma
    cannot read, PromptTooLongError for a conversation that leaves no room, GrammarError for a
    schema that cannot be enforced, and whatever the model itself raises, unchanged.
    """

    streaming: bool = False
    _ls_type: ClassVar[Literal["chat"]] = "chat"

    def __init__(
        self, model: str | os.PathLike[str] | None = None, **parameters: Unpack[ChatParameters]
    ) -> None:
        super().__init__(model, **parameters)  # type: ignore[misc]  # some are fields here only

    @property
    def _llm_type(self) -> str:
        return "gemma2_stream_chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return self._parameters

    def _resolve_model_profile(self) -> Any:
        """What the model can do; its context where that is known without loading it."""
        known: dict[str, Any] = {
            "name": self.model,
            "open_weights": True,
            "text_inputs": True,
            "text_outputs": True,
            "image_inputs": False,
            "audio_inputs": False,
            "video_inputs": False,
            "pdf_inputs": False,
            "temperature": True,
            "tool_calling": True,
            "tool_choice": True,
            "tool_call_streaming": True,
            "structured_output": True,
        }
        if context := _context(self.custom_engine, self.model):
            # Prompt and answer share the context, so either alone may have all of it but one.
            known |= {"max_input_tokens": context - 1, "max_output_tokens": context - 1}
        return known

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """How many prompt ids `messages`, and `tools` if given, become in a call of this model."""
        if not messages and not tools:
            return 0
        answer = AnswerFormat(tools=tools_of(tools)) if tools else None
        return len(self.engine.encode(turns_of(messages, answer)))

    # Answers -----------------------------------------------------------------------------------

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = _Call(self, messages, stop, kwargs)
        with call.model._submit([call.turns], grammar=call.grammar) as rows:
            for chunk in filter(None, map(call.chunk, rows)):
                if run_manager is not None:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        call = _Call(self, messages, stop, kwargs)
        with await call.model._asubmit([call.turns], grammar=call.grammar) as rows:
            async for row in rows:
                chunk = call.chunk(row)
                if chunk is None:
                    continue
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        chunks = self._stream(messages, stop, run_manager, **kwargs)
        return _with_output(generate_from_stream(chunks))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        chunks = self._astream(messages, stop, run_manager, **kwargs)
        return _with_output(await agenerate_from_stream(chunks))

    def _combine_llm_outputs(self, llm_outputs: list[dict[str, Any] | None]) -> dict[str, Any]:
        usages = [output["token_usage"] for output in llm_outputs if output]  # None: from a cache
        total = {name: sum(u[name] for u in usages) for name in (usages[0] if usages else ())}
        return {"token_usage": total, "model_name": self.model}

    # Many conversations, in shared forwards ------------------------------------------------------

    def batch(
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Answer `inputs` in shared forwards, up to `max_concurrency` or 32 at a time."""
        answers: list[Any] = []
        for part, configs in _parts(inputs, config):
            group = Together(len(part), or_none=not return_exceptions)

            def one(place: Place, given: Any, config: RunnableConfig, group: Any = group) -> Any:
                with place:
                    try:
                        return self._at(place).invoke(given, config, **kwargs)
                    except Exception as error:
                        if return_exceptions:
                            return error
                        group.fail(error)  # nobody will see the others' answers
                        raise

            with get_executor_for_config(configs[0]) as executor:
                try:
                    answers += executor.map(one, group.places, part, configs)
                except BaseException as error:  # Ctrl-C comes here, and the threads go on
                    group.fail(error)
                    raise
        return answers

    async def abatch(
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Answer `inputs` in shared forwards, up to `max_concurrency` or 32 at a time."""

        async def one(place: Place, given: Any, config: RunnableConfig) -> Any:
            with place:
                return await self._at(place).ainvoke(given, config, **kwargs)

        answers: list[Any] = []
        for part, configs in _parts(inputs, config):
            places = Together(len(part), or_none=not return_exceptions).places
            tasks = [
                asyncio.create_task(one(*each)) for each in zip(places, part, configs, strict=True)
            ]
            try:
                answers += await asyncio.gather(*tasks, return_exceptions=return_exceptions)
            finally:
                for task in tasks:  # when one has failed, nobody will see the others' answers
                    task.cancel()
        return answers

    def _at(self, place: Place) -> ChatGemma2:
        copy = self.model_copy()
        copy._place = place
        return copy

    # Tools and structured output -----------------------------------------------------------------

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """This model with `tools` to call; its calls are held to their schemas.

        `tool_choice` is "auto" (the model decides, as with None), "none", "any" or "required" or
        True (a call), or a tool's name or `{"type": "function", "function": {"name": ...}}` (a call
        of that tool). `parallel_tool_calls` says whether there may be several calls; by default
        where the model decides, and not where a call is forced. Raises ParameterError.
        """
        bound: dict[str, Any] = {"tools": [openai_tool(tool) for tool in tools]}
        if tool_choice is not None:
            bound["tool_choice"] = tool_choice
        if parallel_tool_calls is not None:
            bound["parallel_tool_calls"] = parallel_tool_calls
        answer_format(bound)  # complain here, where the mistake is
        return self.bind(**bound, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """This model with answers that match `schema`: a Pydantic class (v1 or v2), a TypedDict, a
        JSON schema or an OpenAI tool.

        Gives objects of a Pydantic class, else dicts; streamed, they grow. With `include_raw`, a
        dict of `raw`, `parsed` and `parsing_error`. "json_schema" and "json_mode" answer in JSON,
        "function_calling" by a call; all three are always held to the schema, whatever `strict`
        says. An answer that its token limit leaves incomplete raises
        StructuredOutputError. Raises ParameterError and GrammarError.
        """
        del strict
        for name in kwargs:
            raise unknown_name(name, {"method", "include_raw", "strict"})
        asked, parser = structured(schema, method)
        answer = self.bind(**asked)
        if not include_raw:
            return answer | parser
        parsed = RunnablePassthrough.assign(
            parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
        )
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        both = parsed.with_fallbacks([failed], exception_key="parsing_error")
        # Not RunnableMap(raw=answer), which would ask a batch one by one.
        return answer | RunnableMap(raw=RunnablePassthrough()) | both


class _Call:
    """One call: what is asked of the engine, and how its chunks become messages."""

    def __init__(
        self,
        chat: ChatGemma2,
        messages: list[BaseMessage],
        stop: list[str] | None,
        kwargs: dict[str, Any],
    ) -> None:
        ours = {n: value for n, value in kwargs.items() if n not in FORMAT_NAMES and n != "stream"}
        for name in ours.keys() - CALL_NAMES:
            raise unknown_name(name, CALL_NAMES | FORMAT_NAMES)
        answer = answer_format(kwargs)
        self.model = chat._with({**ours, "stop": stop})
        self.turns = turns_of(messages, answer)
        self.grammar = answer.grammar()
        self._calls = CallParser() if answer.tools else None

    def chunk(self, row: Chunk) -> ChatGenerationChunk | None:
        """`row` as LangChain has it; None when its text may yet turn out to be part of a call."""
        last = row.finish_reason is not None
        parts: list[str | CallPart] = [row.text]
        if self._calls is not None:
            parts = self._calls.feed(row.text, last=last)
            if not parts and not last:
                return None
        message = AIMessageChunk(
            content="".join(part for part in parts if isinstance(part, str)),
            tool_call_chunks=[_call_chunk(part) for part in parts if isinstance(part, CallPart)],
            response_metadata={"model_provider": "gemma2_stream"},
            usage_metadata=_usage(row.usage),
            chunk_position="last" if last else None,
        )
        return ChatGenerationChunk(message=message, generation_info=self._verdict(row))

    def _verdict(self, row: Chunk) -> dict[str, Any] | None:
        info = self.model._info(row)
        called = self._calls is not None and self._calls.whole > 0
        if info is not None and called and info["finish_reason"] == "stop":
            info["finish_reason"] = "tool_calls"
        return info


def _call_chunk(part: CallPart) -> Any:
    call_id = f"call_{uuid.uuid4().hex}" if part.first else None
    return tool_call_chunk(name=part.name, args=part.arguments, id=call_id, index=part.index)


def _usage(usage: Usage | None) -> UsageMetadata | None:
    if usage is None:
        return None
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
    )


def _with_output(result: ChatResult) -> ChatResult:
    """`result` with what callbacks look for in `llm_output`."""
    info = result.generations[0].generation_info or {}
    output: dict[str, Any] = {
        name: info[name] for name in ("model_name", "token_usage") if name in info
    }
    return ChatResult(generations=result.generations, llm_output=output)


def _parts(inputs: Sequence[Any], config: Any) -> Iterator[tuple[Sequence[Any], list[Any]]]:
    """`inputs` and their configs in parts that are answered together, with a thread for each."""
    configs = get_config_list(config, len(inputs)) if inputs else []
    size = min(MAX_ROWS, (configs[0].get("max_concurrency") if configs else None) or MAX_ROWS)
    for start in range(0, len(inputs), size):
        part = inputs[start : start + size]
        own = configs[start : start + size]
        yield part, [RunnableConfig({**each, "max_concurrency": len(part)}) for each in own]


def _context(engine: Any, model: str) -> int | None:
    """Positions of the context, prompt and answer together, as far as it is known unloaded."""
    if engine is not None:
        return getattr(engine, "context_length", None)
    folder = Path(__file__).parent / "demo" if model == "demo" else Path(model).expanduser()
    config = folder / "config.json"
    if config.is_file():
        read = json.loads(config.read_text(encoding="utf-8"))
        found = read.get("text_config", read).get("max_position_embeddings")
        return found if isinstance(found, int) else None
    return 8192 if "gemma-2-" in model.lower() else None
