"""Which preset runs, and why: a matter of names and sizes."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from gemma2_stream import ParameterError
from gemma2_stream.presets import LARGE, PRESETS, choose

CPU: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "size": LARGE}


@pytest.mark.parametrize(
    ("asked", "case", "chosen", "because"),
    [
        ("exact", {}, "exact", "asked"),
        ("speed", {}, "speed", "nearer"),
        ("memory", {}, "memory", "8 bits"),
        ("auto", {}, "speed", "nearer"),
        ("auto", {"size": LARGE - 1}, "exact", "small"),
        ("speed", {"size": 0}, "speed", "nearer"),
        ("auto", {"dtype": "float32"}, "exact", "float32"),
        ("speed", {"dtype": "float32"}, "exact", "float32"),
        ("auto", {"quantized": True}, "exact", "quantized"),
        ("auto", {"device": "cuda"}, "exact", "at a time"),
        ("exact", {"device": "cuda"}, "exact", "asked"),
        ("speed", {"device": "cuda", "quantized": True}, "exact", "quantized"),
        ("auto", {"device": "mps"}, "exact", "mps"),
    ],
)
def test_what_is_chosen_and_why(
    asked: str, case: dict[str, Any], chosen: str, because: str
) -> None:
    choice = choose(asked, **{**CPU, **case})
    assert choice.preset == chosen
    assert because in choice.reason


@pytest.mark.parametrize(
    "case", [{}, {"size": 0}, {"dtype": "float16"}, {"device": "cuda"}, {"quantized": True}]
)
def test_nobody_says_is_auto(case: dict[str, Any]) -> None:
    assert choose(None, **{**CPU, **case}) == choose("auto", **{**CPU, **case})


@pytest.mark.parametrize(
    ("asked", "case", "says"),
    [
        ("speed", {"device": "mps"}, "'mps'"),
        ("memory", {"device": "mps"}, "'mps'"),
        ("memory", {"quantized": True}, "already"),
        ("memory", {"device": "cuda", "quantized": True}, "already"),
    ],
)
def test_what_cannot_be_had_is_refused(asked: str, case: dict[str, Any], says: str) -> None:
    """With the value, the reason and the repair."""
    with pytest.raises(ParameterError) as raised:
        choose(asked, **{**CPU, **case})
    assert f"preset={asked!r}" in str(raised.value)
    assert says in str(raised.value)
    assert "leave it out" in str(raised.value)


needs = pytest.mark.parametrize(
    ("preset", "package", "because"),
    [("memory", "bitsandbytes", "4 bits"), ("speed", "triton", "CUDA graphs")],
)


@needs
def test_what_a_gpu_needs_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, preset: str, package: str, because: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ParameterError, match=f"pip install {package}"):
        choose(preset, **{**CPU, "device": "cuda"})


@needs
def test_what_a_gpu_needs_is_taken_where_it_is(
    monkeypatch: pytest.MonkeyPatch, preset: str, package: str, because: str
) -> None:
    """And nobody gets it unasked: one takes no two requests at once, the other changes answers."""
    there = ModuleType(package)
    there.__spec__ = type(sys.__spec__)(package, None)
    monkeypatch.setitem(sys.modules, package, there)
    choice = choose(preset, **{**CPU, "device": "cuda"})
    assert choice.preset == preset
    assert because in choice.reason
    assert choose("auto", **{**CPU, "device": "cuda"}).preset == "exact"


def test_every_preset_is_decided() -> None:
    """On the CPU each comes to one that loading knows, and never back to auto."""
    assert {choose(preset, **CPU).preset for preset in PRESETS} == {"exact", "speed", "memory"}
