"""The tool that makes the demo: this one, the same every time, with an exam that is kept apart."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import DEMO

TOOLS = DEMO.parent.parent / "tools"

TWO_STEPS = """
import sys
from pathlib import Path
import torch
from demo_text import DemoText
from train_demo import SEED, THREADS, build
torch.set_num_threads(THREADS)
torch.use_deterministic_algorithms(True)
torch.manual_seed(SEED)
build(Path(sys.argv[1]), DemoText(seed=SEED), steps=2)
"""


def test_the_tool_makes_the_same_checkpoint_every_time(tmp_path: Path) -> None:
    """Two steps twice, whatever Python's hashes, are equal byte by byte; and the tokenizer, which
    needs no training, is the one in the package."""
    made = [tmp_path / "one", tmp_path / "other"]
    for number, folder in enumerate(made, 1):
        settings = {"PYTHONPATH": str(TOOLS), "PYTHONHASHSEED": str(number)}
        command = [sys.executable, "-c", TWO_STEPS, str(folder)]
        done = subprocess.run(
            command, env={**os.environ, **settings}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, other = ({path.name: path.read_bytes() for path in made.iterdir()} for made in made)
    assert one == other
    assert one.keys() == {path.name for path in DEMO.iterdir()}
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert one[name] == (DEMO / name).read_bytes()


def test_no_phrasing_of_the_exam_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question of the whole training, drawn again, with what people say around it."""
    monkeypatch.syspath_prepend(TOOLS)
    from demo_text import DemoText, normalise

    source = (TOOLS / "train_demo.py").read_text(encoding="utf-8")
    number = r"(\d+)"
    ((seed, batch, chunk, steps),) = re.findall(
        rf'SEED = {number}.*BATCH, CHUNK = {number}, {number}.*"--steps", .*default={number}\)',
        source,
        re.DOTALL,
    )
    text = DemoText(seed=int(seed))
    asked: set[str] = set()
    for _ in range(int(steps) // int(chunk)):
        for _ in range(int(batch) * int(chunk)):
            asked |= {normalise(turn.question) for turn in text.conversation()}
        text.rng.shuffle([None] * int(chunk))  # as the batches are, by the same generator
    assert len(asked) > 10_000
    assert not asked & text.held_out
