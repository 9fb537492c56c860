"""What all benchmarks tell alike: what they ran on, intervals, verdicts, tables and pictures.

    with watching(figures):                # how long it took, and what others kept busy meanwhile
        figures["ratio"] = interval(ratios)
    document = documented(figures=figures, verdicts=list(verdicts(figures)))
    publish(document, "\\n\\n".join([heading(document), ..., goals(document)]))

It knows nothing of models, and must not load torch: what imports it may measure what it loads.
"""

from __future__ import annotations

import json
import os
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

import gemma2_stream

Result = dict[str, Any]

INK, OURS, RIVAL = "#808080", "#2a9d8f", "#e07a3f"  # readable on white and on black


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# What it ran on ------------------------------------------------------------------------------


def script() -> Path:
    """The benchmark that was started."""
    return Path(sys.argv[0])


def typed() -> str:
    """The command line, less the folders of this machine."""
    words = ["python", f"benchmarks/{script().name}", *(Path(word).name for word in sys.argv[1:])]
    return " ".join(["GEMMA2_TOKENIZER=FOLDER"] * ("GEMMA2_TOKENIZER" in os.environ) + words)


def machine() -> Result:
    """What the figures were made on; nothing that names it."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = dict(re.findall(r"^(model name|cpu family)\s*: (.*)$", info.read_text(), re.M))
        cpu = f"{found.get('model name', cpu)}, family {found.get('cpu family', 'unknown')}"
    memory = round(psutil.virtual_memory().total / 1e9, 1)
    return {"cores": os.cpu_count(), "cpu": cpu, "memory_gb": memory, "system": platform.system()}


def versions() -> dict[str, str]:
    """Of what is installed; asked for without loading it."""
    names = ("torch", "transformers", "tokenizers", "langchain-core", "langchain-huggingface")
    found = {name: version(name) for name in names if find_spec(name.replace("-", "_"))}
    ours = {"python": platform.python_version(), "gemma2_stream": gemma2_stream.__version__}
    return {**ours, **found}


@contextmanager
def watching(figures: Result) -> Iterator[None]:
    """Note in `figures` how long a part took, and how busy others kept the machine meanwhile."""
    began, busy, own = time.perf_counter(), _busy(), _own()
    yield
    wall = time.perf_counter() - began
    others = max(0.0, (_busy() - busy) - (_own() - own))
    figures["seconds"] = round(wall, 1)
    figures["cores_used_by_others"] = round(others / wall, 2)
    figures["load_average"] = round(psutil.getloadavg()[0], 2)


def _busy() -> float:
    """CPU seconds that this machine has spent on anything."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))


def _own() -> float:
    """CPU seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


# Figures -------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> list[float]:
    """The median between the ends of its 95 % bootstrap interval: [low, median, high]."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2_000))
    return [medians[50], statistics.median(values), medians[1949]]


def rounded(values: Sequence[float], digits: int) -> list[float]:
    return [round(value, digits) for value in values]


def at_most(values: Sequence[float], goal: float) -> str:
    """Whether an interval is on the right side of `goal`, the wrong one, or on both."""
    return "pass" if values[-1] <= goal else "fail" if values[0] > goal else "undecided"


def at_least(values: Sequence[float], goal: float) -> str:
    return "pass" if values[0] >= goal else "fail" if values[-1] < goal else "undecided"


# What comes out ------------------------------------------------------------------------------


def documented(**figures: Any) -> Result:
    """`figures` after what made them, and on what."""
    return {
        "benchmark": script().stem,
        "command": typed(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        **figures,
    }


def publish(document: Result, text: str) -> None:
    """Print the Markdown that README quotes, and every figure as a last line of JSON."""
    print(text, end="\n\n")
    print(json.dumps(document, ensure_ascii=False, separators=(",", ":")))


def heading(document: Result) -> str:
    host = document["machine"]
    names = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    return (
        f"`{document['command']}` on {document['date']}, {host['cores']} cores ({host['cpu']}), "
        f"{host['memory_gb']} GB, {names}."
    )


def goals(document: Result) -> str:
    return f"**Goals**\n\n{table(['goal', 'measured', 'verdict'], document['verdicts'])}"


def neighbours(figures: Result) -> str:
    return f"Other programs kept {figures['cores_used_by_others']} cores busy meanwhile."


def span(values: Sequence[float], digits: int = 0) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; every column but the first to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def canvas(panels: int) -> tuple[Any, Any]:
    """A figure of `panels` side by side, readable on white and on black, and their axes."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": script().stem, "font.size": 9})
    mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    mpl.rcParams.update({"legend.frameon": False, **dict.fromkeys(inked, INK)})
    return pyplot.subplots(1, panels, figsize=(11 / 3 * panels, 3.2), layout="constrained")


def write_svg(figure: Any, path: str) -> None:
    """On a transparent ground; the same bytes for the same figures on any day."""
    figure.savefig(path, transparent=True, metadata={"Date": None})
