"""Each example runs as a user runs it, on the demo, and prints what it promises."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

import gemma2_stream
from gemma2_stream import ChatGemma2, Gemma2LLM

ROOT = Path(gemma2_stream.__file__).parent.parent


def run(name: str, typed: str = "") -> tuple[str, str]:
    """stdout and stderr of an example, which reads `typed` and must succeed."""
    # On a busy machine two threads wait for each other.
    settings = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name],
        env=os.environ | settings,
        input=typed,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def says(question: str) -> str:
    return Gemma2LLM("demo").invoke(question)


def test_stream() -> None:
    out, _ = run("stream.py")
    assert "gemma2_stream 的演示模型" in out
    english = "What is a token?"
    assert out == f"> 你是谁\n{says('你是谁')}\n\n> {english}\n{says(english)}\n\n"


def test_callbacks() -> None:
    out, _ = run("callbacks.py")
    whole = says("What is Gemma 2?")
    first, _, rest = out.partition("\n")
    assert first.startswith("[loaded: ")
    assert rest.startswith(f"{whole}\n[stop: ")
    tokens = Gemma2LLM("demo").get_num_tokens(whole)
    # The end of the turn is a token too.
    assert re.search(rf"^\[stop: {tokens + 1} tokens, [\d.]+ a second\]$", out, re.MULTILINE)
    assert f"\n[{len(whole)} characters returned]\n" in out
    assert re.search(r"\n\[length: 5 tokens, [\d.]+ a second\]\n$", out)


def test_async_chain() -> None:
    out, _ = run("async_chain.py")
    *lines, last = out.splitlines()
    for name, question in (("甲", "你是谁?"), ("B", "What is LangChain?")):
        answer = [line.removeprefix(f"{name}: ") for line in lines if line.startswith(f"{name}: ")]
        assert answer == says(question).split("\n")
    match = re.fullmatch(r"cancelled: True, after '(.+)'", last)
    assert match
    assert says("What is Gemma 2?").startswith(match[1])


def test_from_the_tutorial() -> None:
    out, err = run("from_the_tutorial.py")
    answer = says("你是谁")
    cut = says("What is a token?").partition(":")[0]
    assert out == f"{answer}\n{answer}\n{cut}\n"
    assert "DeprecationWarning" in err
    assert "invoke" in err


def test_chat() -> None:
    out, _ = run("chat.py", typed="Hello\n你是谁\n")
    first, second = out.removeprefix("> ").removesuffix("> ").split("\n> ")
    system = SystemMessage("You are a helpful assistant.")
    said: list[BaseMessage] = [system, HumanMessage("Hello")]
    assert first == ChatGemma2("demo").invoke(said).text
    # The second answer is given in the light of the first.
    said += [AIMessage(first), HumanMessage("你是谁")]
    assert second == ChatGemma2("demo").invoke(said).text + "\n"


def test_tools() -> None:
    out, _ = run("tools.py")
    call, result, answer = out.split("\n", 2)
    arguments = json.loads(call.removeprefix("count_letter"))
    assert {name: type(value) for name, value in arguments.items()} == {"word": str, "letter": str}
    assert result == f"[count_letter returns {arguments['word'].count(arguments['letter'])}]"
    assert answer.strip()


def test_structured() -> None:
    out, _ = run("structured.py")
    *parts, last = out.splitlines()
    grown = [ast.literal_eval(part) for part in parts]
    assert grown[0] == {}
    assert len(grown) > 5
    for part, longer in itertools.pairwise(grown):
        assert part.keys() <= longer.keys()
    assert set(grown[-1]) == {"title", "mood", "stars"}
    assert re.fullmatch(r"Review\(title=.*, mood='(good|mixed|bad)', stars=[1-5]\)", last)


def test_agent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["agent.py"])
    example = runpy.run_path(str(ROOT / "examples" / "agent.py"))
    streamed = capsys.readouterr().out
    # The toy calls no tool here, so all that streams is its answer.
    *_, last = example["agent"].invoke(example["question"])["messages"]
    assert last.text
    assert streamed == f"{last.text}\n"
