"""Products of few rows by products.c, compiled for this processor when a model is loaded.

Knows a C compiler and what that file wants; nothing of models, and of who multiplies what.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("products.c")

# Rows up to which it gains, and what the columns of a weight must be a multiple of.
MOST, STEP = 24, 32

OPTIONS = ("-O3", "-march=native", "-fPIC")
TYPES = {torch.bfloat16: "bfloat16", torch.int8: "int8"}
SECONDS = 60


class CompiledProducts:
    """Calls into a library made of products.c."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {}
        for dtype, name in TYPES.items():
            function = getattr(library, name)
            function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 3 + [ctypes.c_int]
            function.restype = None
            self._functions[dtype] = function

    def takes(self, rows: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether this is a product, and one that the library has. It reads memory by addresses, so
        whatever else comes is torch's, and its error.
        """
        return (
            0 < len(rows) <= MOST
            and rows.dtype == torch.bfloat16
            and weight.dtype in TYPES
            and rows.shape[1] == weight.shape[1]
            and weight.shape[1] % STEP == 0
            and weight.is_contiguous()
            and rows.is_cpu
            and weight.is_cpu
        )

    def __call__(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The product of `rows` (n, in) with `weight` (out, in): (n, out) in float32. What it does
        not take must not come here.
        """
        (outs, ins), rows = weight.shape, rows.contiguous()
        product = torch.empty((len(rows), outs), dtype=torch.float32)
        self._functions[weight.dtype](
            weight.data_ptr(),
            rows.data_ptr(),
            product.data_ptr(),
            len(rows),
            ins,
            outs,
            torch.get_num_threads(),
        )
        return product


@dataclass(frozen=True)
class Compilation:
    """What came of it: the products, or None, and why in a few words."""

    products: CompiledProducts | None
    reason: str


@functools.cache
def compilation() -> Compilation:
    """Of this process. Takes a second when it is first asked for, and leaves nothing on disk.

    Only for processors with AVX512-BF16 and no AMX: elsewhere torch's own are as fast as memory, or
    nothing was measured by us.
    """
    units = torch.cpu.get_capabilities()
    if units.get("amx_bf16"):
        return Compilation(None, "oneDNN's, for AMX")
    if not units.get("avx512_bf16"):
        return Compilation(None, "torch's, for a processor without AVX512-BF16")
    return compile_products()


def compile_products() -> Compilation:
    """By the compiler in the environment variable CC, or by `cc`. Never raises: a machine without a
    compiler, or with one that can't, has torch's products.
    """
    if not sys.platform.startswith("linux"):
        return Compilation(None, f"torch's, on {sys.platform}")
    named = os.environ.get("CC", "").strip() or "cc"
    try:
        compiler = shlex.split(named)
    except ValueError as error:
        return Compilation(None, f"torch's: CC={named!r} is no command: {error}")
    if shutil.which(compiler[0]) is None:
        return Compilation(
            None, f"torch's: no C compiler, {compiler[0]!r}, with which they would be faster"
        )
    try:
        products = CompiledProducts(_built(compiler))
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        return Compilation(None, f"torch's: {compiler[0]!r} failed: {said[0]}")
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        return Compilation(None, f"torch's: those of {compiler[0]!r} can't be loaded: {error}")
    if not _are_right(products):
        return Compilation(None, f"torch's: those of {compiler[0]!r} are wrong")
    return Compilation(products, f"compiled by {compiler[0]!r}")


def _built(compiler: list[str]) -> ctypes.CDLL:
    """Linked without OpenMP, so that it takes torch's, with the threads that are there already."""
    with tempfile.TemporaryDirectory() as folder:
        unlinked, library = (str(Path(folder) / name) for name in ("products.o", "products.so"))
        for command in (
            [*compiler, *OPTIONS, "-fopenmp", "-c", str(SOURCE), "-o", unlinked],
            [*compiler, "-shared", unlinked, "-o", library],
        ):
            subprocess.run(
                command,
                check=True,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=SECONDS,
            )
        return ctypes.CDLL(library)


def _are_right(products: CompiledProducts) -> bool:
    """For all numbers of rows, and outputs that are no multiple of those computed at once; in whole
    numbers, so that nothing is rounded.
    """
    columns, numbers = 2 * STEP, torch.arange(-127, 128)
    for rows in range(1, MOST + 1):
        for dtype in TYPES:
            x = numbers[torch.arange(rows * columns) * 7 % 255].view(rows, columns)
            weight = numbers[torch.arange(11 * columns) * 4 % 255].view(11, columns)
            found = products(x.to(torch.bfloat16), weight.to(dtype))
            if not torch.equal(found.long(), x @ weight.mT):
                return False
    return True
