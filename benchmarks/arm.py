"""One of several that a benchmark compares, each in a process of its own.

    arm = Arm("exact", [sys.executable, __file__, "--work", "exact"])  # waits until it has loaded
    arm.run(prompt)                                                  # what it tells of a prompt
    arm.close()

The process prints lines of JSON: `load_s`, and then an object for every line of JSON on its stdin.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from report import Result, say


class Arm:
    """A process that waits for prompts."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.runs: list[Result] = []
        say(f"{name}: loading")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True
        )
        self.load_s = self._told()["load_s"]

    def _told(self) -> Result:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self._process.wait()}")
        return dict(json.loads(line))

    def run(self, prompt: Any) -> Result:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(prompt) + "\n")
        self._process.stdin.flush()
        return self._told()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
