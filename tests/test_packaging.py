"""What pip, make and the documents say about this package agrees."""

import os
import re
import subprocess
import tomllib
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import gemma2_stream

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
OPTIONAL = PROJECT["optional-dependencies"]
EXTRAS = [Requirement(line) for lines in OPTIONAL.values() for line in lines]
RUNTIME = [Requirement(line) for line in PROJECT["dependencies"]]
DOCUMENTS = sorted(ROOT.glob("*.md"))


def pins(file: str) -> dict[str, Version]:
    lines = (ROOT / file).read_text("utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): Version(pinned) for name, pinned in pairs}


def test_the_version_is_the_installed_one() -> None:
    assert version("gemma2-stream") == gemma2_stream.__version__


def test_the_package_is_typed() -> None:
    assert files("gemma2_stream").joinpath("py.typed").is_file()


def test_torch_is_the_users_choice() -> None:
    (torch,) = (requirement for requirement in RUNTIME if requirement.name == "torch")
    assert {specifier.operator for specifier in torch.specifier} <= {">="}


@pytest.mark.parametrize("requirement", [*RUNTIME, *EXTRAS], ids=lambda r: r.name)
def test_each_requirement_is_pinned_within_its_bounds(requirement: Requirement) -> None:
    assert pins("constraints.txt")[canonicalize_name(requirement.name)] in requirement.specifier


def test_any_index_serves_the_pins() -> None:
    pinned = pins("constraints.txt")
    assert not [name for name, at in pinned.items() if at.local]
    assert not [name for name in pinned if name.startswith(("cuda", "nvidia", "triton"))]


# What it runs the tests with; `dev` judges the code, and `bench` measures it.
TESTED = [
    Requirement(line)
    for name in ("ray", "remote", "server", "test", "ui")
    for line in OPTIONAL[name]
]


@pytest.mark.parametrize("requirement", [*RUNTIME, *TESTED], ids=lambda r: r.name)
def test_make_lowest_installs_the_lower_bounds(requirement: Requirement) -> None:
    lowest = pins("constraints-lowest.txt")[canonicalize_name(requirement.name)]
    for bound in requirement.specifier:  # none for torch
        assert lowest == Version(bound.version)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_documents_name_make_targets_that_exist(document: Path) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    # In code only, `make test` or a line of a block: "make sure" is prose.
    named = set(re.findall(r"(?:`|^\s*\$? ?)make (\w+)", document.read_text("utf-8"), re.MULTILINE))
    assert named <= targets


def test_make_bench_runs_every_benchmark_in_its_quick_form(tmp_path: Path) -> None:
    """A stand-in for the environment's Python notes what it is asked to run."""
    (tmp_path / ".bench").touch()
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/ran\n")
    python.chmod(0o755)
    bare = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    make = ["make", "bench", f"VENV={tmp_path}", "--old-file", f"{tmp_path}/.bench"]
    subprocess.run(make, cwd=ROOT, env=bare, stdout=subprocess.DEVNULL, check=True)
    scripts = sorted((ROOT / "benchmarks").glob("*.py"))
    quick = [path.name for path in scripts if '"--quick"' in path.read_text("utf-8")]
    ran = (tmp_path / "ran").read_text().splitlines()
    assert sorted(ran) == [f"benchmarks/{name} --quick" for name in quick]


def test_no_benchmark_imports_another() -> None:
    """So that each process has loaded what is measured in it, and nothing of another's."""
    scripts = sorted((ROOT / "benchmarks").glob("*.py"))
    texts = {path.stem: path.read_text("utf-8") for path in scripts}
    benchmarks = [name for name, text in texts.items() if '"--quick"' in text]
    named = re.compile(rf"^\s*(?:from|import) ({'|'.join(benchmarks)})\b", re.MULTILINE)
    assert {name: found for name, text in texts.items() if (found := named.findall(text))} == {}


LAYOUT = [
    *("gemma2_stream", "tests", "examples", "benchmarks/streaming.py", "tools"),
    *("README.md", "README.zh-CN.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
    *("pyproject.toml", "constraints.txt", "Makefile", ".ci/run"),
]


@pytest.mark.parametrize("name", LAYOUT)
def test_the_repository_has_what_a_reader_looks_for(name: str) -> None:
    assert (ROOT / name).exists()


def test_ci_runs_make_test_and_nothing_else() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    *_, last = script.read_text("utf-8").splitlines()
    assert last == "exec make test"


def test_the_licence_is_apache() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n" in (ROOT / "LICENSE").read_text("utf-8")


@pytest.mark.parametrize(
    ("readme", "plainly"),
    [("README.md", "a toy that proves the plumbing"), ("README.zh-CN.md", "玩具")],
)
def test_the_demo_is_called_a_toy(readme: str, plainly: str) -> None:
    """Before anything is said about the real model."""
    text = (ROOT / readme).read_text("utf-8")
    assert plainly in text.partition("\n## ")[0]
