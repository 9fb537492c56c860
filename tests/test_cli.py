"""The command line: the answer on stdout, the rest on stderr, and the exit status.

Most tests call `main`; a real process runs where signals, pipes, encodings or imports matter.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

import gemma2_stream
from gemma2_stream import Gemma2LLM, GenerationTimeoutError
from gemma2_stream.cli import main
from gemma2_stream.compiled import compilation

ROOT = Path(gemma2_stream.__file__).parent.parent
COMMAND = [sys.executable, "-m", "gemma2_stream"]
CONTEXT = 8192


class Result(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(argument, ..., stdin="")`: one command line in this process."""

    def call(*arguments: str | Path, stdin: io.StringIO | str = "") -> Result:
        text = io.StringIO(stdin) if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", text)
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Result(status, *capsys.readouterr())

    return call


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Gemma 2 that answers everything with "A", until the context is full.

    Its layers add nothing, and the embedding of "A" is the longest, so it is always the likeliest.
    """
    folder = tmp_path_factory.mktemp("endless")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "gemma2_stream" / "demo")
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=CONTEXT,
    )
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.zero_()
        model.model.embed_tokens.weight.fill_(0.5)
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("A")] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def environment(**settings: object) -> dict[str, str]:
    """Ours without the settings of Python, which could change its buffers and encodings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # On a busy machine two threads wait for each other.
    settings = {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, **settings}
    return {**kept, **{name: str(value) for name, value in settings.items()}}


def start(*arguments: str | Path, **settings: object) -> subprocess.Popen[bytes]:
    """A real process with its three streams apart; `settings` go to its environment."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env=environment(**settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A test run in the background ignores Ctrl-C, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


# The answer ------------------------------------------------------------------------------------


def test_stdout_is_the_answer_and_a_newline(run: Run, endless: Path) -> None:
    assert run("--model", endless, "--max-new-tokens", "5", "hello")[:2] == (0, "AAAAA\n")


def test_an_answer_that_ends_a_line_gets_no_second_newline(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gemma2LLM, "stream", lambda *_: (text for text in ["one\n", "two\n", ""]))
    assert run("hello").out == "one\ntwo\n"


def test_what_libraries_print_is_not_in_the_answer(
    run: Run, endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(self: Gemma2LLM, prompt: str) -> object:
        sys.stdout.write("a banner\n")
        yield "answer"

    monkeypatch.setattr(Gemma2LLM, "stream", stream)
    result = run("hello")
    assert (result.out, result.err) == ("answer\n", "a banner\n")


@pytest.mark.parametrize(
    ("question", "piped", "prompt"),
    [
        pytest.param(["你是谁"], "", "你是谁", id="question"),
        pytest.param([], "你是谁\n", "你是谁\n", id="pipe"),
        pytest.param(["Explain:"], "a.py\nb.py\n", "Explain:\n\na.py\nb.py\n", id="both"),
        pytest.param(["你是谁"], "\n", "你是谁", id="empty-pipe"),
    ],
)
def test_question_and_pipe(run: Run, question: list[str], piped: str, prompt: str) -> None:
    """The prompt is the question, a blank line, and what was piped in."""
    assert run(*question, stdin=piped).out == Gemma2LLM("demo").invoke(prompt) + "\n"


def test_raw_text_is_sent_as_it_is(run: Run) -> None:
    prompt = "<start_of_turn>user\n你是谁<end_of_turn>\n<start_of_turn>model\n"
    assert run("--raw", stdin=prompt).out == Gemma2LLM("demo").invoke("你是谁") + "\n"


def test_a_real_pipe() -> None:
    """`echo ... | gemma2-stream`, in bytes."""
    done = subprocess.run(
        COMMAND, input="你是谁\n".encode(), env=environment(), capture_output=True, check=False
    )
    assert (done.returncode, done.stdout.decode()) == (
        0,
        Gemma2LLM("demo").invoke("你是谁\n") + "\n",
    )


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ("--temperature 50 --seed 0", {"temperature": 50.0, "seed": 0}),
        ("--temperature 50 --seed 1 --top-k 3", {"temperature": 50.0, "seed": 1, "top_k": 3}),
        ("--temperature 50 --seed 0 --top-p 0.5", {"temperature": 50.0, "seed": 0, "top_p": 0.5}),
        ("--temperature 50 --seed 0 --min-p 0.5", {"temperature": 50.0, "seed": 0, "min_p": 0.5}),
        ("--repetition-penalty 3", {"repetition_penalty": 3.0}),
    ],
)
def test_sampling_options_reach_the_model(
    run: Run, options: str, parameters: dict[str, float]
) -> None:
    """The answer is what the parameters of the same names give, and not the greedy one."""
    llm = Gemma2LLM("demo", max_new_tokens=12)
    out = run(*options.split(), "--max-new-tokens", "12", "Tell me a story").out
    assert out == llm.invoke("Tell me a story", **parameters) + "\n"
    assert out != llm.invoke("Tell me a story") + "\n"


def test_nothing_to_ask_shows_the_help(run: Run) -> None:
    for stdin in (Terminal("never read"), "", "\n"):
        status, out, err = run(stdin=stdin)
        assert (status, out) == (2, "")
        assert err.startswith("usage: gemma2-stream")


def test_stop(run: Run, endless: Path) -> None:
    assert run("--model", endless, "--stop", "no", "--stop", "AAA", "hello")[:2] == (0, "\n")


@pytest.mark.parametrize(
    ("typed", "stop"), [(r"\n\n", "\n\n"), (r"a\tb", "a\tb"), (r"\\n", r"\n"), (r"\d", r"\d")]
)
def test_stop_understands_escapes(run: Run, endless: Path, typed: str, stop: str) -> None:
    assert (
        f"\nstop                {(stop,)}\n" in run("info", "--model", endless, "--stop", typed).out
    )


@pytest.mark.parametrize("word", ["chat", "info", "download"])
def test_the_words_of_commands_can_be_asked(run: Run, endless: Path, word: str) -> None:
    options = ("--model", endless, "--max-new-tokens", "2")
    assert run(*options, "--", word).out == "AA\n"
    status, out, err = run(*options, word)  # neither the first word, nor meant as a question?
    assert (status, out) == (2, "")
    assert f"-- {word}" in err


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--top-k", "many", "hello"], 2, "--top-k"),
        (["--top-q", "1", "hello"], 2, "--top-q"),
        (["--temperature", "-1", "hello"], 2, "temperature=-1.0"),
        (["--dtype", "int3", "hello"], 2, "bfloat16"),
        (["--preset", "fast", "hello"], 2, "memory"),
        (["two", "words"], 2, "words"),
        (["download"], 2, "MODEL"),
        (["--model", "./no-such-folder", "hello"], 1, "./no-such-folder"),
        (["--model", "gemma2-9b", "hello"], 1, "LLM-Research/gemma-2-9b"),
        (["download", "./no-such-folder"], 1, "./no-such-folder"),
        (["--timeout", "1e-9", "你是谁"], 1, "timeout"),
    ],
)
def test_an_error_is_one_line_on_stderr(
    run: Run, arguments: list[str], status: int, says: str
) -> None:
    result = run(*arguments)
    assert (result.status, result.out) == (status, "")
    *_, line = result.err.splitlines()  # a progress bar may come before
    assert line.startswith("gemma2-stream: ")
    assert says in line
    assert "Traceback" not in result.err


def test_an_error_of_several_lines_becomes_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "tokenizer.json").touch()
    result = run("--model", tmp_path, "hello")
    assert (result.status, result.out) == (1, "")
    assert result.err.splitlines()[-1].startswith("gemma2-stream: ")


def test_what_the_model_raises_is_not_dressed_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(self: Gemma2LLM, prompt: str) -> object:
        yield "half"
        raise ZeroDivisionError("inside the model")

    monkeypatch.setattr(Gemma2LLM, "stream", stream)
    with pytest.raises(ZeroDivisionError, match="inside the model"):
        run("hello")


def test_an_error_goes_below_half_an_answer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(self: Gemma2LLM, prompt: str) -> object:
        yield "half"
        raise GenerationTimeoutError("too late")

    monkeypatch.setattr(Gemma2LLM, "stream", stream)
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    result = run("hello")
    assert (result.status, terminal.getvalue()) == (1, "half")
    assert result.err == "\ngemma2-stream: too late\n"


# Real processes ------------------------------------------------------------------------------


def test_ctrl_c_stops_at_once(endless: Path) -> None:
    with start("--model", endless, "hello") as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"A"
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate()
    assert process.returncode == 130
    assert len(rest) < CONTEXT // 2  # the whole answer fills the context
    assert b"Traceback" not in err
    assert b"Exception" not in err


def test_a_reader_that_leaves_is_no_error(endless: Path) -> None:
    """`gemma2-stream ... | head -c1`"""
    with start("--model", endless, "hello") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == b"A"
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait() == 141
    assert b"Traceback" not in err
    assert b"Error" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*COMMAND, "download", "demo"],
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith(b"gemma2-stream: [Errno 28]")
    assert done.stderr.count(b"\n") == 1


def test_utf8_in_a_locale_without_it() -> None:
    with start("你是谁", LC_ALL="C", PYTHONUTF8=0, PYTHONCOERCECLOCALE=0) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err.decode()
    assert not out.isascii()
    assert out.decode("utf-8") == Gemma2LLM("demo").invoke("你是谁") + "\n"


def test_help_loads_neither_torch_nor_langchain() -> None:
    script = (
        "import sys; from gemma2_stream.cli import main; main(['--help']);"
        "sys.exit(str({'torch', 'transformers', 'langchain_core'} & {*sys.modules} or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(),
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, b"\n")  # sys.exit("") prints "" and exits 1


# download and info -------------------------------------------------------------------------------


def test_download_prints_the_folder(run: Run, endless: Path) -> None:
    assert run("download", endless) == (0, f"{endless}\n", "")
    assert run("download", "demo").out == f"{ROOT / 'gemma2_stream' / 'demo'}\n"


def test_info_tells_what_will_be_used(run: Run, endless: Path) -> None:
    options = "--temperature 0.5 --top-p 0.75 --top-k 9 --min-p 0.125 --repetition-penalty 1.5"
    more = "--seed 0 --max-new-tokens 7 --timeout 60 --dtype float32 --device-map cpu"
    result = run("info", "--model", endless, *options.split(), *more.split())
    assert result.status == 0
    facts = dict(line.split(maxsplit=1) for line in result.out.splitlines())
    assert facts["gemma2_stream"] == gemma2_stream.__version__
    assert facts["torch"] == torch.__version__
    assert facts["checkpoint"] == str(endless)
    assert facts["device"].startswith("cpu")
    expected = {
        "dtype": "float32",
        "attention": "grouped",
        "context_length": str(CONTEXT),
        "max_new_tokens": "7",
        "temperature": "0.5",
        "top_p": "0.75",
        "top_k": "9",
        "min_p": "0.125",
        "repetition_penalty": "1.5",
        "seed": "0",
        "stop": "none",
        "timeout": "60.0",
    }
    assert {name: facts[name] for name in expected} == expected


def test_info_says_what_the_engine_says(run: Run) -> None:
    """Told without weights, and yet the same."""
    facts = dict(line.split(maxsplit=1) for line in run("info").out.splitlines())
    llm = Gemma2LLM("demo")
    assert facts["parameters"].startswith(f"{llm.engine.model.num_parameters():,} (")
    assert facts["attention"] == llm.engine.model.config._attn_implementation
    assert facts["dtype"] == str(llm.engine.model.dtype).removeprefix("torch.")
    assert facts["temperature"] == str(llm.sampling_params.temperature)


@pytest.mark.parametrize(
    ("preset", "chosen", "memory"),
    [("speed", "speed", 2), ("memory", "memory", 1), ("auto", "exact", 2)],
)
def test_info_tells_the_preset_and_why(
    run: Run, endless: Path, preset: str, chosen: str, memory: int
) -> None:
    place = ("--dtype", "bfloat16", "--device-map", "cpu")
    result = run("info", "--model", endless, "--preset", preset, *place)
    facts = dict(line.split(maxsplit=1) for line in result.out.splitlines())
    assert facts["preset"].startswith(f"{chosen} (")
    told = facts.get("products")
    assert told == (None if chosen == "exact" else compilation().reason)
    count = int(facts["parameters"].split()[0].replace(",", ""))
    assert f"({memory * count / 1e9:.2f} GB" in facts["parameters"]


def test_info_on_a_model_that_is_not_here(run: Run, tmp_path: Path) -> None:
    """What can be told is told, nothing is downloaded, and the error says how to get it."""
    model = "LLM-Research/gemma-2-9b-it"
    status, out, err = run("info", "--model", model, "--cache-dir", tmp_path)
    assert status == 1
    assert "\ntorch " in out
    assert "checkpoint" not in out
    assert err.startswith("gemma2-stream: ")
    assert "gemma2-stream download" in err


def test_the_default_model_can_come_from_the_environment(
    run: Run, endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA2_STREAM_MODEL", str(endless))
    assert run("--max-new-tokens", "1", "hello").out == "A\n"


def test_version(run: Run) -> None:
    assert run("--version")[:2] == (0, f"gemma2-stream {gemma2_stream.__version__}\n")


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_readme_shows_the_help(run: Run, readme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    help_text = run("--help").out
    assert f"```text\n{help_text}```\n" in (ROOT / readme).read_text(encoding="utf-8")
