"""A checkpoint that answers, from a hub on loopback through the command line: bars, text, no more.

Real processes, since progress is for a terminal and stdout must hold nothing else.
"""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub
from tiny import DEMO

from gemma2_stream import Gemma2LLM

WEIGHTS = "model.safetensors"
ROOT = DEMO.parent.parent
both = pytest.mark.parametrize(
    "model", ["LLM-Research/gemma-2-2b-it", "google/gemma-2-2b-it"], ids=["modelscope", "hf"]
)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """The demo checkpoint, published under the names of the real one."""
    with Hub({path.name: path.read_bytes() for path in DEMO.iterdir()}) as server:
        yield server


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """Nothing of the user's, and both hubs on loopback."""
    unwanted = ("HF_", "TRANSFORMERS_", "MODELSCOPE_", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    ours = {"HF_ENDPOINT": hub.url, "MODELSCOPE_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT)}
    homes = {"HF_HOME": str(tmp_path / "hf"), "MODELSCOPE_HOME": str(tmp_path / "ms")}
    retries = {"MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0", "OMP_NUM_THREADS": "1"}
    return {**kept, **ours, **homes, **retries}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gemma2_stream", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def run_on_a_terminal(environment: dict[str, str], *arguments: str) -> tuple[str, str]:
    """stdout, and what a terminal of 100 columns was shown on stderr."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "gemma2_stream", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        encoding="utf-8",
    )
    os.close(theirs)
    shown = b""
    with process, open(ours, "rb", buffering=0) as terminal:
        try:
            while block := terminal.read(4096):
                shown += block
        except OSError:  # how Linux says that nobody writes to it any more
            pass
        assert process.stdout is not None
        out = process.stdout.read()
    assert process.returncode == 0, shown
    return out, shown.decode("utf-8", "replace")


@both
def test_the_first_use_fetches_loads_and_answers(
    model: str, hub: Hub, environment: dict[str, str], tmp_path: Path
) -> None:
    """With progress on stderr and the answer alone on stdout; the second use asks no hub."""
    command = ("--model", model, "--cache-dir", str(tmp_path / "cache"), "你是谁")
    first = run(environment, *command)
    assert (first.returncode, first.stdout) == (0, Gemma2LLM("demo").invoke("你是谁") + "\n")
    assert f"gemma2_stream: {model} (0.01 GB) from {hub.url}" in first.stderr
    assert "Loading weights" in first.stderr

    hub.requests.clear()
    second = run(environment, *command)
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert hub.requests == []


@both
def test_a_download_shows_a_bar_for_the_weights(
    model: str, environment: dict[str, str], tmp_path: Path
) -> None:
    """On a terminal; stdout gets the folder, and the folder is what `--model` takes."""
    out, shown = run_on_a_terminal(
        environment, "download", model, "--cache-dir", str(tmp_path / "cache")
    )
    assert f"{WEIGHTS}: " in shown
    assert "100%" in shown
    folder = out.removesuffix("\n")
    assert (Path(folder) / WEIGHTS).read_bytes() == (DEMO / WEIGHTS).read_bytes()
    assert run(environment, "--model", folder, "--max-new-tokens", "1", "hi").returncode == 0


@both
def test_a_download_that_breaks_off_goes_on_at_the_next_call(
    model: str, hub: Hub, environment: dict[str, str], tmp_path: Path
) -> None:
    """One line that says so and status 1; the same command again completes it."""
    hub.cut[WEIGHTS] = 1_000_000
    command = ("download", model, "--cache-dir", str(tmp_path / "cache"))
    broken = run(environment, *command)
    assert (broken.returncode, broken.stdout) == (1, "")
    assert "run the same command again" in broken.stderr.splitlines()[-1]
    assert "Traceback" not in broken.stderr

    hub.down.clear()
    whole = run(environment, *command)
    assert whole.returncode == 0
    assert (Path(whole.stdout[:-1]) / WEIGHTS).read_bytes() == (DEMO / WEIGHTS).read_bytes()
