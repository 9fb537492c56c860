"""Each example runs as a user runs it, on the demo, and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import gemma2_stream
from gemma2_stream import Gemma2LLM

ROOT = Path(gemma2_stream.__file__).parent.parent


def run(name: str) -> tuple[str, str]:
    """stdout and stderr of an example, which must succeed."""
    # On a busy machine two threads wait for each other.
    settings = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name],
        env=os.environ | settings,
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
