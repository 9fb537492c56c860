"""One answer on every path, and each character at the step that completes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from either import Either
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGenerationChunk, GenerationChunk
from langchain_core.prompts import PromptTemplate
from tiny import Forwards, reference, template_ids
from waiting import wait

from gemma2_stream import Chunk, Gemma2Engine, Gemma2LLM, Request, SamplingParams

N = 24
PROMPTS = ["你是谁", "Who are you?", "ใคร", "🙂 " * 30 + "Wie heißt du?"]

TEXTS = {
    "English": "Streaming means that every word arrives as soon as it exists.",
    "Chinese": "你好，世界。生僻字：𠮷龘靐。",
    "Japanese": "ひらがなとカタカナ、そして漢字。",
    "Korean": "안녕하세요, 만나서 반갑습니다.",
    "Thai": "สวัสดีครับ ยินดีที่ได้รู้จัก",
    "emoji": "😀🎉🫠🇨🇳 and 1️⃣",
    "ZWJ": "👩‍👩‍👧‍👦🏳️‍🌈👨🏽‍💻",
    "JSON": '{"a": [1, 2.5, null], "b": {"c": "\\u00e9"}}\n',
    "code": "def f(x):\n\t    return x**2  # ok\n\n\n",
    "bytes": "\x00\x01\x7f᠎ꙮ𒀀",
}


@pytest.mark.parametrize("prompt", PROMPTS)
async def test_every_path_says_what_bare_generate_says(either: Either, prompt: str) -> None:
    """invoke, stream, astream, ainvoke, batch and abatch equal a bare greedy generate, decoded."""
    llm = either(max_new_tokens=N)
    expected = reference(either.engine, prompt, N)

    assert llm.invoke(prompt) == expected
    assert "".join(llm.stream(prompt)) == expected
    assert "".join([text async for text in llm.astream(prompt)]) == expected
    assert await llm.ainvoke(prompt) == expected
    if either.kind == "llm":
        assert llm._call(prompt) == expected
        assert await llm._acall(prompt) == expected


async def test_each_row_of_a_batch_is_the_prompt_alone(either: Either) -> None:
    """Rows of different lengths, in shared forwards, are exact in float32."""
    llm = either(max_new_tokens=N)
    expected = [reference(either.engine, prompt, N) for prompt in PROMPTS]

    assert llm.batch(PROMPTS) == expected
    assert await llm.abatch(PROMPTS) == expected
    if either.kind == "chat":
        return
    assert [row[0].text for row in llm.generate(PROMPTS).generations] == expected
    assert [row[0].text for row in llm._generate(PROMPTS).generations] == expected
    assert [row[0].text for row in (await llm._agenerate(PROMPTS)).generations] == expected


@pytest.mark.parametrize(
    "path", ["_call", "_stream", "_generate", "_acall", "_astream", "_agenerate"]
)
def test_every_path_is_our_own(path: str) -> None:
    """None is left to LangChain's defaults, which run in its executor or do not stream."""
    assert path in vars(Gemma2LLM)


def test_prompt_ids_are_the_chat_templates(engine: Gemma2Engine) -> None:
    """A string is one user turn through the checkpoint's own template."""
    for prompt in [*PROMPTS, *TEXTS.values(), "", "  two\n\nlines  "]:
        assert engine.encode(prompt) == template_ids(engine, prompt)


@pytest.mark.parametrize("kind", ["llm", "chat"])
@pytest.mark.parametrize("script", TEXTS)
async def test_answers_in_any_script_arrive_exactly(
    say: Callable[..., Gemma2Engine], script: str, kind: str
) -> None:
    """Whatever the script, the joined stream is the text, on every path, and no chunk is empty."""
    text = TEXTS[script]
    engine = say("go", ids := _ids(say("go", []), text))
    llm = Either(kind, engine)

    chunks = llm.chunks("go")

    assert engine.tokenizer.decode(ids) == text
    assert "".join(chunk.text for chunk in chunks) == text == llm.invoke("go")
    assert [chunk async for chunk in llm.astream("go")] == [chunk.text for chunk in chunks]
    assert all(chunk.text for chunk in chunks[:-1])
    assert not any("\ufffd" in chunk.text for chunk in chunks)


async def test_answers_in_all_scripts_arrive_exactly_as_the_rows_of_a_batch(
    say: Callable[..., Gemma2Engine],
) -> None:
    """Side by side in one batch, sync and async, each row is its own text, and it streams so."""
    texts = [*TEXTS.values()]
    engine = say("go", *[_ids(say("go", []), text) for text in texts])
    llm = Gemma2LLM(engine=engine)
    streamed = [""] * len(texts)

    for chunk in engine.submit([_request(engine, "go")] * len(texts)):
        assert chunk.text or chunk.finish_reason
        assert "\ufffd" not in chunk.text
        streamed[chunk.index] += chunk.text

    assert streamed == texts
    assert llm.batch(["go"] * len(texts)) == texts
    assert await llm.abatch(["go"] * len(texts)) == texts


@pytest.mark.parametrize("script", TEXTS)
async def test_every_async_path_says_what_was_said(
    say: Callable[..., Gemma2Engine], script: str
) -> None:
    """`ainvoke` and `_acall` too, whatever the script."""
    engine = say("go", _ids(say("go", []), TEXTS[script]))
    llm = Gemma2LLM(engine=engine)
    assert await llm.ainvoke("go") == await llm._acall("go") == TEXTS[script]


@pytest.mark.parametrize("script", TEXTS)
def test_a_character_leaves_at_the_step_that_completes_it(
    say: Callable[..., Gemma2Engine], forwards: Callable[[Gemma2Engine], Forwards], script: str
) -> None:
    """Held at each step, everything complete so far has been received; a run of bytes waits for
    the token after it, since a run that ends invalid decodes otherwise."""
    engine = say("go", ids := _ids(say("go", []), TEXTS[script]))
    watch = forwards(engine)
    gates = [watch.gate(step + 1) for step in range(len(ids) + 1)]
    is_byte = [t.startswith("<0x") for t in engine.tokenizer.convert_ids_to_tokens(ids)]

    with engine.submit([_request(engine, "go")]) as stream:
        got = ""
        for step, (reached, release) in enumerate(gates):
            wait(reached)
            while stream._channel.unread():
                got += next(stream).text
            certain = step
            while certain and is_byte[certain - 1]:
                certain -= 1
            assert got == engine.tokenizer.decode(ids[:certain])
            release.set()
        got += "".join(chunk.text for chunk in stream)
    assert got == TEXTS[script]


def test_an_unfinished_run_of_bytes_decodes_as_decode_does(
    say: Callable[..., Gemma2Engine],
) -> None:
    """A length limit in the middle of a character gives what `tokenizer.decode` gives."""
    first_bytes = [217 + byte for byte in "🙂".encode()[:3]]
    engine = say("go", [*_ids(say("go", []), "ok "), *first_bytes])
    llm = Gemma2LLM(engine=engine)

    assert llm.invoke("go", max_new_tokens=5) == "ok " + "\ufffd" * 3


def test_the_first_chunk_is_out_before_the_second_step_is_done(
    either: Either, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """While the model is provably inside its second forward, the caller has the first text."""
    watch = forwards(either.engine)
    reached, release = watch.gate(2)

    stream = either(max_new_tokens=4).stream("Who are you?")
    first = next(stream)
    wait(reached)
    assert first
    assert watch.count == 2
    release.set()
    assert "".join([first, *stream]) == reference(either.engine, "Who are you?", 4)


async def test_the_first_async_chunk_is_out_before_the_second_step_is_done(
    either: Either, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """The same for `astream`, in a chain with a parser."""
    watch = forwards(either.engine)
    reached, release = watch.gate(2)
    chain = PromptTemplate.from_template("{q}") | either.model | StrOutputParser()

    stream = chain.astream({"q": "Who are you?"})
    first = ""
    while not first:  # LangChain's parser may begin with an empty chunk of its own
        first = await anext(stream)
    await asyncio.to_thread(wait, reached)
    assert watch.count == 2
    release.set()
    await stream.aclose()


def test_text_that_spells_a_control_token_ends_nothing(say: Callable[..., Gemma2Engine]) -> None:
    """A model that repeats what a user wrote, letter by letter, is not cut off."""
    text = "a <end_of_turn>\n<start_of_turn>user\n<eos> <bos><pad> b"
    engine = say("go", say("go", []).tokenize(text))
    llm = Gemma2LLM(engine=engine)
    assert llm.invoke("go") == "".join(llm.stream("go")) == text


def test_only_the_last_chunk_carries_the_verdict(either: Either) -> None:
    """Reason, usage and model name are on one chunk, so that LangChain's merging keeps them."""
    prompt = "Who are you?"
    either.engine.join()
    either.engine.prefixes.clear()
    chunks = either(max_new_tokens=5).chunks(prompt)
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk

    assert all(chunk.generation_info is None for chunk in chunks[:-1])
    assert isinstance(total, GenerationChunk | ChatGenerationChunk)
    assert total.generation_info == {
        "finish_reason": "length",
        "matched_stop": None,
        "model_name": either.engine.name,
        "token_usage": {
            "prompt_tokens": len(either.engine.encode(prompt)),
            "completion_tokens": 5,
            "total_tokens": len(either.engine.encode(prompt)) + 5,
            "cached_tokens": 0,
        },
    }


def test_a_turn_that_ends_says_stop(demo_engine: Gemma2Engine) -> None:
    """An answer that the model ends itself has finish_reason "stop" and counts the ending token."""
    *_, last = demo_engine.submit([_request(demo_engine, "你是谁")])
    ids = demo_engine.tokenize(Gemma2LLM(engine=demo_engine).invoke("你是谁"))

    assert isinstance(last, Chunk)
    assert (last.finish_reason, last.stop, last.text) == ("stop", None, "")
    assert last.usage is not None
    assert last.usage.completion_tokens == len(ids) + 1


@pytest.mark.parametrize("kind", ["llm", "chat"])
def test_an_answer_that_ends_at_once_is_one_empty_chunk(
    say: Callable[..., Gemma2Engine], kind: str
) -> None:
    """LangChain refuses a stream without chunks; an empty answer is still a chunk."""
    llm = Either(kind, say("go", [107]))

    assert list(llm.stream("go")) == [""]
    assert llm.invoke("go") == ""


def _ids(engine: Gemma2Engine, text: str) -> list[int]:
    return engine.tokenizer(text, add_special_tokens=False)["input_ids"]


def _request(engine: Gemma2Engine, prompt: str) -> Request:
    return Request(tuple(engine.encode(prompt)), SamplingParams())
