"""What the package shows, what importing it costs, and which room knows which."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

import gemma2_stream

PACKAGE = Path(gemma2_stream.__file__).parent
HEAVY = ("torch", "transformers", "langchain_core", "modelscope", "huggingface_hub", "jinja2")

# What the pure rooms may import of ours at module level.
PURE = {
    "errors": set(),
    "types": {"errors"},
    "stop": set(),
    "detokenizer": set(),
    "prompt": {"errors", "types"},
    "stream": {"errors", "types"},
}


def imported(room: str) -> tuple[set[str], set[str]]:
    """What is imported together with a room: rooms of ours, and packages of others."""
    names: list[str] = []
    for node in run_at_import(ast.parse(source(room)).body):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), "gemma2_stream")
            names += [f"{module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names]
    ours = {rest[0] for package, *rest in parts if package == "gemma2_stream"}
    others = {package for package, *_ in parts}
    return ours & {*rooms()}, others - {"gemma2_stream"} - sys.stdlib_module_names


def run_at_import(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements that run at import: not those in functions or under TYPE_CHECKING."""
    found: list[ast.stmt] = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        inner = [*getattr(node, "body", []), *getattr(node, "orelse", [])]
        found += [node, *run_at_import(inner)]
    return found


def rooms() -> list[str]:
    return sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))


def source(room: str) -> str:
    return (PACKAGE / f"{room}.py").read_text("utf-8")


def run(code: str) -> dict[str, object]:
    """The JSON that `code` prints in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_all_is_sorted_and_without_repeats() -> None:
    """A list that is easy to read and to merge."""
    assert gemma2_stream.__all__ == sorted({*gemma2_stream.__all__})


def test_all_is_what_can_be_had() -> None:
    """Every name leads to something, `dir` and the table of rooms say the same."""
    for name in gemma2_stream.__all__:
        assert getattr(gemma2_stream, name) is not None
    assert dir(gemma2_stream) == gemma2_stream.__all__ == sorted(gemma2_stream._ROOM_OF)


def test_each_name_lives_where_the_table_says() -> None:
    """A class says that it comes from the room that the table names."""
    for name, room in gemma2_stream._ROOM_OF.items():
        found = getattr(gemma2_stream, name)
        assert found is getattr(importlib.import_module(f"gemma2_stream.{room}"), name)
        assert getattr(found, "__module__", "").startswith(("gemma2_stream", "typing"))


def test_type_checkers_see_the_same_names() -> None:
    """The imports under TYPE_CHECKING are those of the table, room by room."""
    tree = ast.parse(source("__init__"))
    [block] = [n for n in tree.body if isinstance(n, ast.If)]
    seen = {n.module: [alias.name for alias in n.names] for n in block.body}  # type: ignore[attr-defined]
    assert {room: sorted(names) for room, names in seen.items()} == {
        room: sorted(names) for room, names in gemma2_stream._ROOMS.items()
    }


def test_an_unknown_name_is_an_attribute_error() -> None:
    """As of any module, so that hasattr and `from ... import` behave."""
    with pytest.raises(AttributeError, match="'gemma2_stream' has no attribute 'Gemma3LLM'"):
        _ = gemma2_stream.Gemma3LLM
    assert not hasattr(gemma2_stream, "__wrapped__")


def test_star_import_brings_all() -> None:
    """`from gemma2_stream import *` is `__all__`, no more."""
    space: dict[str, object] = {}
    exec("from gemma2_stream import *", space)
    assert sorted(space.keys() - {"__builtins__"}) == gemma2_stream.__all__


def test_importing_costs_nothing() -> None:
    """A fresh interpreter that imports the package, and lists it, has loaded nothing heavy."""
    code = "import sys, json, gemma2_stream; dir(gemma2_stream); print(json.dumps([*sys.modules]))"
    assert not {*HEAVY} & {*run(code)}


@pytest.mark.parametrize(
    ("room", "light"),
    [
        ("types", ("torch", "transformers", "jinja2")),
        ("stream", ("torch", "transformers", "jinja2")),
        ("stop", HEAVY[:2]),
        ("detokenizer", HEAVY),
        ("prompt", ("torch", "transformers", "jinja2")),
        ("loading", ("torch", "transformers")),
        ("remote", ("torch", "transformers", "jinja2", "openai")),
        ("fields", ("torch", "transformers", "openai")),
    ],
)
def test_a_room_loads_only_what_it_needs(room: str, light: tuple[str, ...]) -> None:
    """A room that knows no torch does not load it by way of another."""
    code = f"import sys, json, gemma2_stream.{room}; print(json.dumps([*sys.modules]))"
    assert not {*light} & {*run(code)}


def test_importing_changes_nothing_around_it() -> None:
    """No environment variable, no warning filter, no logger, no thread, no signal handler."""
    code = """
import json, os, warnings, logging, threading, signal
import langchain_core  # which adds its own warning filters
def look():
    handlers = [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    return [dict(os.environ), len(warnings.filters), len(logging.root.handlers), handlers,
            threading.active_count()]
before = look()
import gemma2_stream
from gemma2_stream import errors, stop, detokenizer, hub
print(json.dumps({"same": look() == before}))
"""
    assert run(code)["same"]


@pytest.mark.parametrize("room", sorted(PURE))
def test_a_pure_room_imports_only_what_is_below_it(room: str) -> None:
    """At module level: the standard library and the rooms below; errors also langchain_core's."""
    ours, others = imported(room)
    assert ours <= PURE[room]
    assert others == ({"langchain_core"} if room == "errors" else set())


def test_rooms_import_one_way() -> None:
    """No circle, whichever room one starts from."""
    below = {room: imported(room)[0] for room in rooms()}
    while below:
        ground = {room for room, needs in below.items() if not needs & {*below}}
        assert ground, f"these import each other: {below}"
        below = {room: needs for room, needs in below.items() if room not in ground}


@pytest.mark.parametrize("room", rooms())
def test_every_room_says_what_it_is_for(room: str) -> None:
    """A docstring opens it."""
    docstring = ast.get_docstring(ast.parse(source(room))) or ""
    assert docstring.partition("\n")[0].endswith((".", ";", ","))


def test_types_travel_with_the_package() -> None:
    """Type checkers read our annotations only where py.typed lies beside them."""
    assert (PACKAGE / "py.typed").is_file()
