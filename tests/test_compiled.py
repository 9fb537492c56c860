"""Products that are compiled when a model is loaded, and machines where they can't be."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matrices import error
from torch import nn

from gemma2_stream.compiled import (
    MOST,
    SOURCE,
    TYPES,
    CompiledProducts,
    compilation,
    compile_products,
)
from gemma2_stream.products import hasten, with_compiler

UNITS = torch.cpu.get_capabilities()
ABLE = bool(UNITS.get("avx512_bf16")) and shutil.which("cc") is not None

needs_units = pytest.mark.skipif(
    not ABLE, reason="products.c needs a processor with AVX512-BF16, and a C compiler, cc"
)


@pytest.fixture(scope="module")
def products() -> CompiledProducts:
    found = compile_products()
    assert found.products is not None, found.reason
    assert found.reason == "compiled by 'cc'"
    return found.products


def weights(outs: int, ins: int, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, (outs, ins), dtype=dtype)
    return torch.randn(outs, ins).to(dtype)


@needs_units
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [*range(1, 9), 13, MOST])
@pytest.mark.parametrize(("outs", "ins"), [(1, 32), (3, 64), (96, 96), (101, 2048)])
def test_a_product_is_the_product(
    products: CompiledProducts, rows: int, outs: int, ins: int, dtype: torch.dtype
) -> None:
    """Nothing is rounded on the way but in float32."""
    weight, x = weights(outs, ins, dtype), torch.randn(rows, ins).bfloat16()
    assert products.takes(x, weight)
    found = products(x, weight)
    assert (found.shape, found.dtype) == ((rows, outs), torch.float32)
    assert error(found, x.double() @ weight.double().mT) < 1e-5


@needs_units
def test_infinity_and_nan_stay(products: CompiledProducts) -> None:
    x = torch.ones(3, 64).bfloat16()
    x[0, 0], x[1, 0] = torch.inf, torch.nan
    found = products(x, torch.ones(5, 64).bfloat16())
    assert found[0].isinf().all()
    assert found[1].isnan().all()
    assert (found[2] == 64).all()


@needs_units
def test_rows_may_have_any_strides(products: CompiledProducts) -> None:
    weight, wide = weights(20, 64, torch.bfloat16), torch.randn(3, 128).bfloat16()
    assert torch.equal(products(wide[:, ::2], weight), products(wide[:, ::2].contiguous(), weight))


@needs_units
def test_what_it_does_not_take_is_told(products: CompiledProducts) -> None:
    weight, x = weights(20, 64, torch.bfloat16), torch.randn(3, 64).bfloat16()
    assert products.takes(x, weight)
    assert not products.takes(x[:0], weight)
    assert not products.takes(x[:1].expand(MOST + 1, -1), weight)
    assert not products.takes(x.float(), weight)
    assert not products.takes(x, weight.float())
    assert not products.takes(x[:, :48], weight[:, :48].contiguous())
    assert not products.takes(x[:, :32], weight[:, :32])
    assert not products.takes(x[:, :32], weight)
    assert not products.takes(x.to("meta"), weight)
    assert not products.takes(x, weight.to("meta"))


@needs_units
def test_rows_that_do_not_fit_are_torch_s_error() -> None:
    """And no read beyond what is there."""
    module = nn.Linear(64, 20, bias=False, dtype=torch.bfloat16)
    hasten(module, with_compiler)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        module(torch.randn(3, 32).bfloat16())


ONE_OPENMP = """
import os, torch
from gemma2_stream.compiled import compile_products

def threads(): return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
made = compile_products()
x, weight = torch.randn(1, 4096).bfloat16(), torch.randn(4096, 4096).bfloat16()
weight.float().sum()
before = threads()
for _ in range(3):
    made.products(x, weight)
print(before, threads())
"""


@needs_units
def test_its_threads_are_torch_s() -> None:
    """Those of a second OpenMP would spin beside them, and take half of the processors."""
    done = subprocess.run([sys.executable, "-c", ONE_OPENMP], capture_output=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before >= 3
    assert after == before


@needs_units
def test_it_leaves_nothing_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert compile_products().products is not None
    assert list(tmp_path.iterdir()) == []


# Where it can't be ---------------------------------------------------------------------------


def compiler(folder: Path, script: str) -> str:
    """A compiler in `folder` that does what `script` says."""
    path = folder / "own cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return f"'{path}'"


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="compiled on Linux only")


@linux
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'no such option' >&2; echo more >&2; exit 1", "failed: no such option"),
        ("exit 3", "failed: exit status 3"),
        ("exit 0", "can't be loaded: "),
        ('for last; do :; done; echo "no library" > "$last"', "can't be loaded: "),
    ],
)
def test_a_compiler_that_cannot_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path, script))
    found = compile_products()
    assert found.products is None
    assert found.reason.startswith("torch's: ")
    assert reason in found.reason
    assert "\n" not in found.reason


@needs_units
def test_a_compiler_that_gets_it_wrong_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last output of those that are no multiple of four is left out."""
    wrong, line = tmp_path / "wrong.c", "at < end; at += wide"
    source = SOURCE.read_text("utf-8")
    assert source.count(line) == 1
    wrong.write_text(source.replace(line, "at < end - (wide == 1); at += wide"))
    script = f'exec cc $(echo "$@" | sed "s|{SOURCE}|{wrong}|")'
    monkeypatch.setenv("CC", compiler(tmp_path, script))
    found = compile_products()
    assert found.products is None
    assert found.reason.endswith(" are wrong")


@linux
def test_no_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    found = compile_products()
    assert found.products is None
    assert found.reason == (
        "torch's: no C compiler, 'no-such-compiler', with which they would be faster"
    )


@linux
@pytest.mark.parametrize(
    ("named", "reason"), [("cc 'x", 'CC="cc \'x" is no command'), ("''", "no C compiler, ''")]
)
def test_a_compiler_that_is_no_command_is_told(
    monkeypatch: pytest.MonkeyPatch, named: str, reason: str
) -> None:
    monkeypatch.setenv("CC", named)
    found = compile_products()
    assert found.products is None
    assert reason in found.reason


@needs_units
@pytest.mark.parametrize("named", ["", "  "])
def test_a_blank_name_is_none(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv("CC", named)
    assert compile_products().reason == "compiled by 'cc'"


def test_only_some_processors_compile() -> None:
    found = compilation()
    if UNITS.get("amx_bf16"):
        assert (found.products, found.reason) == (None, "oneDNN's, for AMX")
    elif not UNITS.get("avx512_bf16"):
        assert found.products is None
        assert "AVX512-BF16" in found.reason
    else:
        assert (found.products is not None) == ABLE
    assert compilation() is found
