"""What READMEs and docs/ show runs: Python on the demo, command lines through the real parsers."""

from __future__ import annotations

import re
import shlex
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from langchain_core.language_models import BaseChatModel
from serving import Serving, serving

import gemma2_stream
from gemma2_stream import ChatGemma2, Gemma2LLM
from gemma2_stream.cli import parsed
from gemma2_stream.formats import FORMAT_NAMES

ROOT = Path(gemma2_stream.__file__).parent.parent
READMES = ("README.md", "README.zh-CN.md")
CHINESE = sorted(path.name for path in (ROOT / "docs").glob("*.zh-CN.md"))
# English, Chinese
PAIRS = (READMES, *((f"docs/{name[:-9]}.md", f"docs/{name}") for name in CHINESE))
DOCUMENTS = [document for pair in PAIRS for document in pair]
ENGLISH_ALONE = {"docs/api.md"}  # our docstrings

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
OURS = {f"{name}[{extra}]" for name in (".", "gemma2-stream") for extra in EXTRAS}
INSTALLABLE = {".", "langchain", "langchain-openai", "bitsandbytes", *OURS}

# The changes that are made to the code: every name of the real Gemma 2 becomes "demo", and the
# address of a server that of the one that runs here.
REAL_MODEL = re.compile(r'"[\w/.-]*(?:LLM-Research|google)/gemma-2-\w+-it"')
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with serving(Gemma2LLM("demo").engine, model="demo", max_tokens=200) as server:
        yield server


def here(code: str, served: Serving) -> str:
    return REAL_MODEL.sub('"demo"', code).replace(ADDRESS, served.url)


class Block(NamedTuple):
    language: str
    line: int
    text: str


def blocks(readme: str, *languages: str) -> list[Block]:
    """The fenced blocks of a README, in order."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    all_blocks = [Block(m[1], text.count("\n", 0, m.start()) + 2, m[2]) for m in found]
    return [block for block in all_blocks if not languages or block.language in languages]


def without_comments(text: str) -> str:
    return re.sub(r"\s*#.*", "", text)


def headings(readme: str) -> list[str]:
    prose = re.sub(
        r"^```.*?^```$", "", (ROOT / readme).read_text(encoding="utf-8"), flags=re.M | re.S
    )
    return re.findall(r"^#+(?= )", prose, re.MULTILINE)


def table_names(document: str) -> list[list[str]]:
    """Of every table row, what it names in code in its first column, in any order."""
    text = (ROOT / document).read_text(encoding="utf-8")
    rows = [row.split("|")[1] for row in text.splitlines() if row.startswith("|")]
    return [sorted(re.findall(r"`([^`]+)`", row)) for row in rows]


@pytest.mark.parametrize("readme", DOCUMENTS)
def test_python_blocks_run(
    readme: str, capsys: pytest.CaptureFixture[str], served: Serving
) -> None:
    """One after the other, as a reader would paste them into one session."""
    session: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for block in blocks(readme, "python"):
        code = here(block.text, served)
        # Padded, so that a traceback names the README's own line.
        program = compile("\n" * (block.line - 1) + code, readme, "exec")
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            before = set(session)
            exec(program, session)
            for name in session.keys() - before:
                if name.startswith("test_"):  # what a reader's pytest would call
                    session[name]()
        # Only the tutorial's way of calling may warn, and it does.
        expected = [DeprecationWarning] if "print(llm(" in code else []
        assert [w.category for w in warned] == expected, block.text
        printed.append(capsys.readouterr().out)
        assert bool(printed[-1]) == ("print" in without_comments(code)), block.text
    if readme in READMES:
        assert printed[0] == Gemma2LLM("demo").invoke("你是谁")


@pytest.mark.parametrize("readme", DOCUMENTS)
def test_command_lines_are_right(readme: str, served: Serving) -> None:
    """`gemma2-stream` lines parse; `make` targets, extras and files are there; what curl asks for
    is answered.
    """
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for block in blocks(readme, "sh"):
        for command in re.split(r"\n|\|", without_comments(block.text)):
            command = re.sub(r"^(\w+=\S+ )+", "", command)  # environment variables
            match shlex.split(command.partition(">")[0]):
                case ["gemma2-stream", *arguments]:
                    assert callable(parsed(arguments).run)
                case ["curl", url, "-H", header, "-d", body]:
                    headers = [header.split(": ")]
                    asked = here(body, served)
                    answer = served.client.post(here(url, served), headers=headers, content=asked)
                    assert answer.json()["choices"][0]["message"]["content"]
                case ["curl", url, "-H", str()]:
                    assert served.client.get(re.sub(r"^http://[\d.:]+", "", url)).is_success
                case ["make", target]:
                    assert re.search(rf"^{target}:", makefile, re.MULTILINE), command
                case ["python", script, *_]:
                    assert (ROOT / script).exists()
                case ["pip", "install", *wanted]:
                    assert set(wanted) <= INSTALLABLE
                case (
                    []
                    | ["ray" | "serve", *_]  # tests/test_ray.py reads them
                    | ["chmod" | "export" | "scp", *_]
                    | ["git", "diff"]
                    | ["openssl", "rand", *_]
                    | ["hf", "auth", "login"]
                    | ["pytest", _]
                    | ["vllm", "serve", *_]
                    | ["serve", "run", _]
                ):
                    pass
                case _:
                    pytest.fail(f"nothing checks {command!r}")


@pytest.mark.parametrize("readme", DOCUMENTS)
def test_links_lead_somewhere(readme: str) -> None:
    for target in re.findall(r"\]\((?!https:)([^)#]+)", (ROOT / readme).read_text("utf-8")):
        assert ((ROOT / readme).parent / target).exists(), target


def test_docs_holds_nothing_untested() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert found == set(DOCUMENTS) - set(READMES) | ENGLISH_ALONE


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_the_languages_keep_in_step(english: str, chinese: str) -> None:
    """The same headings by level, the same tables by rows, and the same code but for comments."""
    assert table_names(english) == table_names(chinese)
    assert headings(english) == headings(chinese)
    for ours, theirs in zip(blocks(english), blocks(chinese), strict=True):
        assert ours.language == theirs.language
        assert without_comments(ours.text) == without_comments(theirs.text)


@pytest.mark.parametrize("readme", READMES)
def test_every_parameter_and_error_is_in_its_table(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    rows = " ".join(row.split("|")[1] for row in text.splitlines() if row.startswith("| `"))
    told = set(re.findall(r"`(\w+)`", rows))
    fields = Gemma2LLM.model_fields | ChatGemma2.model_fields
    ours = {field.alias or name for name, field in fields.items()}
    langchain = set(BaseChatModel.model_fields)  # described there
    errors = {name for name in gemma2_stream.__all__ if name.endswith("Error")}
    assert told >= (ours - langchain) | FORMAT_NAMES | errors - {"Gemma2StreamError"}
