"""Which way of running is taken, and why: decided before anything is loaded.

Knows names and sizes only; loading.py does what is decided here.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from .errors import ParameterError

PRESETS = ("auto", "exact", "speed", "memory")

# Bytes of weights from which the time of a token is that of its products.
LARGE = 200_000_000


@dataclass(frozen=True, slots=True)
class Choice:
    """The preset that runs, "exact", "speed" or "memory", and the reason in a few words."""

    preset: str
    reason: str


def choose(
    asked: str | None, *, device: str, dtype: str, size: int, quantized: bool = False
) -> Choice:
    """What `asked` comes to for `size` bytes of weights on `device`.

    `device` is "cpu", "cuda", or anything else that weights can be on; `quantized` says that the
    checkpoint already is. Raises ParameterError for what cannot be had.
    """
    if asked == "exact":
        return Choice("exact", "as asked")
    if asked == "memory":
        return _memory(device, quantized)
    if device != "cpu":
        if asked == "speed":
            return _speed(device, quantized)
        if device == "cuda":
            return Choice(
                "exact", "many requests at once; 'speed' takes one at a time, and is faster"
            )
        return Choice("exact", f"nothing faster was measured by us for {device!r}")
    if quantized:
        return Choice("exact", "quantized weights come with products of their own")
    if dtype != "bfloat16":
        return Choice("exact", f"in {dtype} nothing faster was measured by us")
    if asked != "speed" and size < LARGE:
        return Choice("exact", "too small for another way to be faster")
    return Choice("speed", "bfloat16 products that read nearer to the speed of memory")


def _speed(device: str, quantized: bool) -> Choice:
    """Elsewhere than on the CPU."""
    if device != "cuda":
        raise ParameterError(
            f"preset='speed' needs all weights on the CPU or on GPUs of CUDA, and these go to "
            f"{device!r}: leave it out, or set device_map"
        )
    if quantized:
        return Choice("exact", "not all quantized weights can be compiled for")
    if find_spec("triton") is None:
        raise ParameterError("preset='speed' needs triton for weights on a GPU: pip install triton")
    return Choice(
        "speed", "a static cache and CUDA graphs by transformers, for one request at a time"
    )


def _memory(device: str, quantized: bool) -> Choice:
    if quantized:
        raise ParameterError(
            "preset='memory' would quantize weights that are quantized already: leave it out"
        )
    if device == "cpu":
        return Choice("memory", "weights in 8 bits, with a scale for each row")
    if device != "cuda":
        raise ParameterError(
            f"preset='memory' needs all weights on the CPU or on GPUs of CUDA, and these go to "
            f"{device!r}: leave it out, or set device_map"
        )
    if find_spec("bitsandbytes") is None:
        raise ParameterError(
            "preset='memory' needs bitsandbytes for weights on a GPU: pip install bitsandbytes"
        )
    return Choice("memory", "weights in 4 bits (NF4) by bitsandbytes")


def bytes_each(choice: Choice, *, device: str, dtype: str) -> float:
    """About what a parameter takes in memory."""
    if choice.preset == "memory":
        return 1.0 if device == "cpu" else 0.5
    return 4.0 if dtype == "float32" else 2.0
