"""Each example runs as a user runs it, on the demo, and prints what it promises."""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from nbclient import NotebookClient

import gemma2_stream
from gemma2_stream import ChatGemma2, Gemma2LLM

ROOT = Path(gemma2_stream.__file__).parent.parent


# On a busy machine two threads wait for each other.
SETTINGS = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}


def run(name: str, *arguments: str, typed: str = "") -> tuple[str, str]:
    """stdout and stderr of an example, which reads `typed` and must succeed."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *arguments],
        env=os.environ | SETTINGS,
        input=typed,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def rag() -> dict[str, Any]:
    """The globals of rag.py after it ran in this process, and what it `printed`."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["rag.py"])
        example = runpy.run_path(str(ROOT / "examples" / "rag.py"))
    return example | {"printed": out.getvalue()}


class Asked(BaseCallbackHandler):
    """Keeps the last prompt of a chat model."""

    def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        self.prompt = messages[0][-1].text


def batch_file() -> dict[str, Any]:
    """The globals of batch_file.py, without running it."""
    return runpy.run_path(str(ROOT / "examples" / "batch_file.py"))


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


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ("How do I cancel an answer?", "the model stops too"),
        ("Which messages does Gemma 2 know?", "SystemMessage"),
        ("什么是前缀缓存？", "前缀缓存"),
        ("怎么在国内下载权重？", "中国大陆"),
    ],
)
def test_rag_finds_what_is_told(rag: dict[str, Any], question: str, told: str) -> None:
    """In one of the three sections that it finds, and few have it; the answer comes in pieces."""
    sections = [section.page_content for section in rag["sections"]]
    assert 1 <= sum(told in section for section in sections) < len(sections) / 10

    seen = Asked()
    config = {"callbacks": [seen]}
    asked, found, *answer = rag["chain"].stream({"question": question}, config)
    assert asked == {"question": question}
    assert len(found["found"]) == 3
    assert any(told in section.page_content for section in found["found"])
    assert sum(bool(part["answer"]) for part in answer) >= 3

    # What the toy makes of it is nothing, but it was asked the question with what was found.
    assert seen.prompt.endswith(f"Question: {question}")
    assert all(section.page_content in seen.prompt for section in found["found"])


def test_rag_prints_its_sources(rag: dict[str, Any]) -> None:
    first, second, rest = rag["printed"].split("\n\n")
    assert rest == ""
    for printed, question in ((first, "How do I cancel an answer?"), (second, "什么是前缀缓存？")):
        found = rag["store"].as_retriever(search_kwargs={"k": 3}).invoke(question)
        assert printed.startswith(f"> {question}\n")
        sources = [f"[{section.metadata['source']}]" for section in found]
        assert printed.splitlines()[-3:] == sources
        for section in found:
            document, _, heading = section.metadata["source"].partition(", ")
            assert section.page_content in (ROOT / document).read_text(encoding="utf-8")
            assert section.page_content.startswith(f"{heading}\n")


PROMPTS = ["你是谁", "What is a token?", "What is LangChain?", "你会说什么语言？"] * 12
TOO_LONG = "word " * 9000


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A file of prompts, one of which cannot be answered, and the name of the answers'."""
    prompts = [*PROMPTS[:40], TOO_LONG, *PROMPTS[40:]]
    source = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts]
    source.write_text("".join(lines), encoding="utf-8")
    return source, tmp_path / "answers.jsonl"


# Held for good at the first forward that finds two answers in the file.
HELD = """
import os, runpy, sys, threading
import transformers
from gemma2_stream import Gemma2LLM

def hold(*_):
    if os.path.exists(sys.argv[2]) and open(sys.argv[2], "rb").read().count(b"\\n") >= 2:
        print("held", flush=True)
        threading.Event().wait()

Gemma2LLM("demo").engine.model.get_decoder().register_forward_pre_hook(hold)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_batch_file_goes_on_where_it_was_killed(files: tuple[Path, Path]) -> None:
    """Nothing is lost, done twice or left in halves, and the answers are those of one run."""
    source, target = files
    script = str(ROOT / "examples" / "batch_file.py")
    start = f"import sys; sys.argv = {[script, str(source), str(target)]!r}"
    with subprocess.Popen(
        [sys.executable, "-c", start + HELD],
        env=os.environ | SETTINGS,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == b"held\n"
        killed.kill()
    before = target.read_bytes()
    done = {record["line"] for record in lines_of(target)}
    assert 2 <= len(done) < len(PROMPTS)
    # And it was killed while it wrote.
    target.write_bytes(before + '{"line": 17, "prompt": "你'.encode()[:-1])

    out, progress = run("batch_file.py", str(source), str(target))
    assert out == ""
    assert f"{len(done)}/49" in progress
    assert "49/49" in progress

    assert target.read_bytes().startswith(before)
    records = {record["line"]: record for record in lines_of(target)}
    assert len(lines_of(target)) == len(records) == 49
    assert records[41]["error"].startswith("PromptTooLongError: ")
    del records[41]
    once = dict(zip(PROMPTS, Gemma2LLM("demo").batch(PROMPTS[:4]), strict=False))
    prompts = [records[line]["prompt"] for line in sorted(records)]
    assert prompts == PROMPTS
    assert all(record["answer"] == once[record["prompt"]] for record in records.values())

    # Once more, there is nothing to do.
    after = target.read_bytes()
    batch_file()["main"](str(source), str(target))
    assert target.read_bytes() == after


def test_a_batch_file_does_not_mix_with_another(files: tuple[Path, Path]) -> None:
    source, target = files
    target.write_text('{"line": 1, "prompt": "What else?", "answer": "No."}\n', encoding="utf-8")
    with pytest.raises(SystemExit, match="answers to other prompts"):
        batch_file()["main"](str(source), str(target))
    assert len(lines_of(target)) == 1


@pytest.mark.timeout(400)  # it starts a kernel, and waits for no cell by the clock
def test_notebook() -> None:
    """Each cell shows what it promises; it is kept without outputs."""
    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert all(not cell.outputs and cell.execution_count is None for cell in code.values())

    NotebookClient(notebook, timeout=None, startup_timeout=100).execute()

    def printed(cell: str) -> list[str]:
        return [out.text for out in code[cell].outputs if out.get("name") == "stdout"]

    def data(cell: str, kind: str = "text/plain") -> str:
        return next(out.data[kind] for out in code[cell].outputs if kind in out.get("data", {}))

    assert "demo" in data("load")
    assert "".join(printed("stream")) == says("你是谁")
    assert len(printed("stream")) > 3
    assert data("callback", "text/markdown") == says("What can you do?")
    assert "output_tokens" in data("callback")
    first, second = "".join(printed("chat")).removesuffix("\n\n").split("\n\n")
    assert first == f"> 你是谁\n{says('你是谁')}"
    said = [HumanMessage("你是谁"), AIMessage(says("你是谁")), HumanMessage("你会说什么语言？")]
    assert second == f"> 你会说什么语言？\n{ChatGemma2('demo').invoke(said).text}"
    assert re.fullmatch(r"Review\(title=.*, mood='(good|mixed|bad)'\)", data("structured"))


def test_langgraph_memory() -> None:
    out, _ = run("langgraph_memory.py")
    turns = re.findall(r"^(甲|B) > (.*)\n([^[]*)\n\[(\d+) of (\d+) tokens.*\]$", out, re.MULTILINE)
    (_, asked, answer, _, length), (_, other, of_b, _, _), (_, again, last, cached, longer) = turns
    assert (answer, of_b) == (says(asked), says(other))
    said = [HumanMessage(asked), AIMessage(answer), HumanMessage(again)]
    assert last == ChatGemma2("demo").invoke(said).text
    # All of the first turn was read before, and some of its answer.
    assert int(length) < int(cached) < int(longer)
