"""`Gemma2LLM`: the engine as a LangChain `LLM`. Translates, and nothing else.

Every path is one fold over the same stream: `_stream` and `_astream` yield it, `_call` and `_acall`
join it, `_generate` and `_agenerate` gather its rows.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, ClassVar, Literal, Unpack

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.llms import LLM
from langchain_core.messages import BaseMessage, get_buffer_string
from langchain_core.outputs import Generation, GenerationChunk, LLMResult

from .fields import Gemma2Fields, Parameters
from .types import Chunk


class LLMParameters(Parameters, total=False):
    """Keyword arguments of `Gemma2LLM`."""

    raw: bool


class Gemma2LLM(Gemma2Fields, LLM):
    """A locally running Gemma 2 that streams.

        Gemma2LLM()                                             # the embedded demo, a toy
        Gemma2LLM("LLM-Research/gemma-2-9b-it")                 # a ModelScope id
        Gemma2LLM("google/gemma-2-9b-it", dtype="bfloat16")     # a Hugging Face id
        Gemma2LLM("/models/gemma-2-9b-it", temperature=0.7)     # a folder, sampled
        Gemma2LLM(engine=engine)                                # weights you loaded yourself

    A prompt is one user turn; with `raw=True` it is sent as it is, after exactly one BOS. Calls
    take the sampling parameters too, and theirs win, except that stops add up. Raises
    ParameterError for a wrong or unknown parameter, PromptTooLongError for a prompt that leaves no
    room, and whatever the model itself raises, unchanged.
    """

    raw: bool = False
    _ls_type: ClassVar[Literal["llm"]] = "llm"

    def __init__(
        self, model: str | os.PathLike[str] | None = None, **parameters: Unpack[LLMParameters]
    ) -> None:
        super().__init__(model, **parameters)  # type: ignore[misc]  # `raw` is a field here only

    @property
    def _llm_type(self) -> str:
        return "gemma2_stream"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {**self._parameters, "raw": self.raw}

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """How many prompt ids `messages` become when this model is called with them."""
        if tools is not None:
            raise NotImplementedError("a plain LLM takes no tools")
        return len(self.engine.encode(get_buffer_string(messages), raw=self.raw))

    # One prompt --------------------------------------------------------------------------------

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        called = self._with({**kwargs, "stop": stop})
        with called._submit([prompt], raw=self.raw) as rows:
            for row in rows:
                chunk = called._chunk(row)
                if run_manager is not None:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        called = self._with({**kwargs, "stop": stop})
        with await called._asubmit([prompt], raw=self.raw) as rows:
            async for row in rows:
                chunk = called._chunk(row)
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _call(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> str:
        return "".join(c.text for c in self._stream(prompt, stop, run_manager, **kwargs))

    async def _acall(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> str:
        return "".join([c.text async for c in self._astream(prompt, stop, run_manager, **kwargs)])

    # Many prompts, in shared forwards ----------------------------------------------------------

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        row_managers: Sequence[CallbackManagerForLLMRun] = (),
        **kwargs: Any,
    ) -> LLMResult:
        result = _Rows(len(prompts))
        managers = _by_row(row_managers, run_manager)
        called = self._with({**kwargs, "stop": stop})
        with called._submit(prompts, raw=self.raw) as rows:
            for row in rows:
                chunk = result.add(row.index, called._chunk(row))
                if row.index in managers:
                    managers[row.index].on_llm_new_token(chunk.text, chunk=chunk)
        return result.llm_result(called.model)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        row_managers: Sequence[AsyncCallbackManagerForLLMRun] = (),
        **kwargs: Any,
    ) -> LLMResult:
        result = _Rows(len(prompts))
        managers = _by_row(row_managers, run_manager)
        called = self._with({**kwargs, "stop": stop})
        with await called._asubmit(prompts, raw=self.raw) as rows:
            async for row in rows:
                chunk = result.add(row.index, called._chunk(row))
                if row.index in managers:
                    await managers[row.index].on_llm_new_token(chunk.text, chunk=chunk)
        return result.llm_result(called.model)

    # LangChain makes one run a prompt and hands `_generate` the first alone; each prompt's tokens
    # belong to its own.
    def _generate_helper(
        self, prompts: list[str], stop: Any, run_managers: Any, **kwargs: Any
    ) -> LLMResult:
        return _totalled(
            super()._generate_helper(
                prompts, stop, run_managers, row_managers=run_managers, **kwargs
            )
        )

    async def _agenerate_helper(
        self, prompts: list[str], stop: Any, run_managers: Any, **kwargs: Any
    ) -> LLMResult:
        return _totalled(
            await super()._agenerate_helper(
                prompts, stop, run_managers, row_managers=run_managers, **kwargs
            )
        )

    def generate(self, prompts: list[str], *args: Any, **kwargs: Any) -> LLMResult:
        mine, kwargs = _split(kwargs)
        return super(Gemma2LLM, self._with(mine)).generate(prompts, *args, **kwargs)

    async def agenerate(self, prompts: list[str], *args: Any, **kwargs: Any) -> LLMResult:
        mine, kwargs = _split(kwargs)
        return await super(Gemma2LLM, self._with(mine)).agenerate(prompts, *args, **kwargs)

    def _chunk(self, row: Chunk) -> GenerationChunk:
        return GenerationChunk(text=row.text, generation_info=self._info(row))


class _Rows:
    """The rows of a batch as they grow: each one's text, and the info of its last chunk."""

    def __init__(self, count: int) -> None:
        self._texts: list[list[str]] = [[] for _ in range(count)]
        self._infos: list[dict[str, Any] | None] = [None] * count

    def add(self, index: int, chunk: GenerationChunk) -> GenerationChunk:
        self._texts[index].append(chunk.text)
        self._infos[index] = chunk.generation_info
        return chunk

    def llm_result(self, model: str) -> LLMResult:
        output: dict[str, Any] = {"model_name": model}
        # LangChain attributes a batch's usage to its first run, so only a lone prompt has it here.
        if len(self._infos) == 1 and self._infos[0]:
            output["token_usage"] = self._infos[0]["token_usage"]
        rows = zip(self._texts, self._infos, strict=True)
        return LLMResult(
            generations=[[Generation(text="".join(t), generation_info=i)] for t, i in rows],
            llm_output=output,
        )


def _by_row(row_managers: Sequence[Any], first: Any) -> dict[int, Any]:
    """Each row's own run manager; called without them, `first` is the first row's."""
    return dict(enumerate(row_managers or ([first] if first is not None else [])))


def _totalled(result: LLMResult) -> LLMResult:
    """`result` with the usage of all its rows added up, now that each run has had its own."""
    infos = [row[0].generation_info or {} for row in result.generations]
    usages = [info["token_usage"] for info in infos if "token_usage" in info]
    total = {name: sum(usage[name] for usage in usages) for name in (usages[0] if usages else ())}
    result.llm_output = {**(result.llm_output or {}), "token_usage": total}
    return result


_LANGCHAIN = {"stop", "callbacks", "tags", "metadata", "run_name", "run_id"}


def _split(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Per-call arguments: ours, and those that LangChain's `generate` knows."""
    mine = {name: value for name, value in kwargs.items() if name not in _LANGCHAIN}
    return mine, {name: value for name, value in kwargs.items() if name in _LANGCHAIN}


class Gemma2_LLM(Gemma2LLM):
    """`Gemma2LLM` under the name that a widely read tutorial gives its own class.

    Its last script runs with it unchanged: `llm = Gemma2_LLM(path)`, then `print(llm("你是谁"))`.
    """

    def __init__(self, mode_name_or_path: str | None = None, **parameters: Any) -> None:
        # The tutorial spells its parameter so; LangChain rebuilds models by field name.
        super().__init__(parameters.pop("model", mode_name_or_path), **parameters)

    def __call__(self, prompt: str, stop: list[str] | None = None, **kwargs: Any) -> str:
        warnings.warn(
            "calling the model is deprecated: use llm.invoke(prompt), or llm.stream(prompt) to see "
            "the answer as it is made",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.invoke(prompt, stop=stop, **kwargs)
