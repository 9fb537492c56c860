"""Products that are compiled when a model is loaded, and machines where they can't be."""

from __future__ import annotations

import math
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from matrices import error, no_grad  # noqa: F401  # a fixture
from torch import nn
from torch.nn import functional
from transformers.models.gemma2.modeling_gemma2 import apply_rotary_pos_emb

from gemma2_stream.compiled import SOURCE, compilation, compile_kernels
from gemma2_stream.kernels import MOST, TYPES, Kernels
from gemma2_stream.products import hasten, with_compiler

UNITS = torch.cpu.get_capabilities()
ABLE = bool(UNITS.get("avx512_bf16")) and shutil.which("cc") is not None

needs_units = pytest.mark.skipif(
    not ABLE, reason="layer.c needs a processor with AVX512-BF16, and a C compiler, cc"
)


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder, where what is compiled is kept."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def kernels(caches: Path) -> Kernels:
    found = compile_kernels()
    assert found.kernels is not None, found.reason
    assert found.reason == f"compiled by 'cc', kept in {str(caches / 'gemma2_stream')!r}"
    return found.kernels


def weights(outs: int, ins: int, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, (outs, ins), dtype=dtype)
    return torch.randn(outs, ins).to(dtype)


@needs_units
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [*range(1, 9), 13, 25, MOST])
@pytest.mark.parametrize(("outs", "ins"), [(1, 32), (3, 64), (96, 96), (101, 2048)])
def test_a_product_is_the_product(
    kernels: Kernels, rows: int, outs: int, ins: int, dtype: torch.dtype
) -> None:
    """Nothing is rounded on the way but in float32."""
    weight, x = weights(outs, ins, dtype), torch.randn(rows, ins).bfloat16()
    assert kernels.takes(x, weight)
    found = kernels.product(x, weight, dtype=torch.float32)
    assert (found.shape, found.dtype) == ((rows, outs), torch.float32)
    assert error(found, x.double() @ weight.double().mT) < 1e-5


@needs_units
def test_infinity_and_nan_stay(kernels: Kernels) -> None:
    x = torch.ones(3, 64).bfloat16()
    x[0, 0], x[1, 0] = torch.inf, torch.nan
    found = kernels.product(x, torch.ones(5, 64).bfloat16())
    assert found[0].isinf().all()
    assert found[1].isnan().all()
    assert (found[2] == 64).all()


@needs_units
def test_rows_may_have_any_strides(kernels: Kernels) -> None:
    weight, wide = weights(20, 64, torch.bfloat16), torch.randn(3, 128).bfloat16()
    apart = wide[:, ::2]
    assert torch.equal(kernels.product(apart, weight), kernels.product(apart.contiguous(), weight))


@needs_units
def test_what_it_does_not_take_is_told(kernels: Kernels) -> None:
    weight, x = weights(20, 64, torch.bfloat16), torch.randn(3, 64).bfloat16()
    assert kernels.takes(x, weight)
    assert not kernels.takes(x[:0], weight)
    for dtype in TYPES:
        assert kernels.takes(x[:1].expand(MOST, -1), weight.to(dtype))
        assert not kernels.takes(x[:1].expand(MOST + 1, -1), weight.to(dtype))
    assert not kernels.takes(x.float(), weight)
    assert not kernels.takes(x, weight.float())
    assert not kernels.takes(x[:, :48], weight[:, :48].contiguous())
    assert not kernels.takes(x[:, :32], weight[:, :32])
    assert not kernels.takes(x[:, :32], weight)
    assert not kernels.takes(x.to("meta"), weight)
    assert not kernels.takes(x, weight.to("meta"))


@needs_units
def test_a_default_device_is_none_of_its_business(kernels: Kernels) -> None:
    weight, x = weights(20, 64, torch.bfloat16), torch.randn(3, 64).bfloat16()
    expected = kernels.product(x, weight, dtype=torch.float32)
    gate = expected[:, :16].contiguous()
    gated = kernels.gated(gate, gate)
    with torch.device("meta"):
        assert torch.equal(kernels.product(x, weight, dtype=torch.float32), expected)
        assert torch.equal(kernels.gated(gate, gate), gated)


@needs_units
def test_rows_that_do_not_fit_are_torch_s_error() -> None:
    """And no read beyond what is there."""
    module = nn.Linear(64, 20, bias=False, dtype=torch.bfloat16)
    hasten(module, with_compiler)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        module(torch.randn(3, 32).bfloat16())


@needs_units
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, MOST])
def test_a_product_may_be_scaled_and_rounded(
    kernels: Kernels, rows: int, dtype: torch.dtype
) -> None:
    """Once, so that it is the bfloat16 next to what it would be in float32."""
    weight, x = weights(101, 64, dtype), torch.randn(rows, 64).bfloat16()
    scale = torch.rand(101).bfloat16()
    wide = kernels.product(x, weight, dtype=torch.float32)
    assert torch.equal(kernels.product(x, weight), wide.bfloat16())
    wide *= scale
    assert torch.equal(kernels.product(x, weight, scale, torch.float32), wide)
    assert torch.equal(kernels.product(x, weight, scale), wide.bfloat16())
    assert torch.equal(kernels.product(x, weight, scale.float()), wide.bfloat16())
    assert torch.equal(kernels.product(x, weight, scale.repeat_interleave(2)[::2]), wide.bfloat16())


@needs_units
def test_a_nan_that_is_rounded_stays(kernels: Kernels) -> None:
    x = torch.ones(2, 64).bfloat16()
    x[0, 0], x[1, 0] = torch.nan, -torch.inf
    found = kernels.product(x, torch.ones(5, 64).bfloat16())
    assert found[0].isnan().all()
    assert (found[1] == -torch.inf).all()


@needs_units
@pytest.mark.parametrize("shape", [(32,), (1, 64), (3, 2304), (2, 5, 96), (40, 64), (0, 64)])
def test_a_norm_is_the_norm(kernels: Kernels, shape: tuple[int, ...]) -> None:
    x, weight = (3 * torch.randn(shape)).bfloat16(), torch.randn(shape[-1]).bfloat16()
    assert kernels.takes_norm(x, weight)
    found = kernels.normed(x, weight, 0.1)
    expected = functional.rms_norm(x.double(), shape[-1:], 1 + weight.double(), 0.1)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    assert torch.allclose(found.double(), expected, rtol=2**-8, atol=0)
    residual = torch.randn(shape).bfloat16()
    added = kernels.normed(x, weight, 0.1, residual)
    assert torch.allclose(added.double(), residual + expected, rtol=2**-8, atol=1e-5)
    turned = x.mT.contiguous().mT if x.dim() > 1 else x
    assert torch.equal(kernels.normed(turned, weight, 0.1), found)


@needs_units
def test_what_norms_it_does_not_take_is_told(kernels: Kernels) -> None:
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(64).bfloat16()
    assert not kernels.takes_norm(x.float(), weight)
    assert not kernels.takes_norm(x, weight.float())
    assert not kernels.takes_norm(x[:, :32], weight)
    assert not kernels.takes_norm(x[:, :16], weight[:16])
    assert not kernels.takes_norm(x.to("meta"), weight)
    with torch.enable_grad():
        assert not kernels.takes_norm(x.clone().requires_grad_(), weight)
    assert kernels.takes_norm(x.clone().requires_grad_(), weight)


# Where float32 has no more, all the way to what is beyond bfloat16, and what is no number.
EXTREMES = (0.0, -0.0, 1e-30, 1e-3, 0.5, 3.0, 20.0, 88.0, 1e4, 3e38, torch.inf)


@needs_units
def test_a_gated_product_is_the_gated_product(kernels: Kernels) -> None:
    """Of more numbers than one thread is asked for, too."""
    gate = torch.tensor([*EXTREMES, *(-each for each in EXTREMES)] + [torch.nan] * 10)
    for numbers in (gate, 3 * torch.randn(24, 9216)):
        up = torch.rand(numbers.shape)
        found = kernels.gated(numbers, up)
        wide = numbers.double()
        # The formula of tanh without its cancellation, which shows even there.
        inner = 2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
        expected = wide * inner.sigmoid() * up
        assert (found.shape, found.dtype) == (numbers.shape, torch.bfloat16)
        assert torch.allclose(found.double(), expected, rtol=2**-8, atol=1e-30, equal_nan=True)


@needs_units
def test_capped_logits_are_capped(kernels: Kernels) -> None:
    extremes = torch.tensor([*EXTREMES, *(-each for each in EXTREMES)] + [torch.nan] * 10)
    for logits in (extremes, 30 * torch.randn(3, 4096)):
        expected = 30 * (logits.double() / 30).tanh()
        assert kernels.takes_capping(logits)
        kernels.cap(logits, 30)
        assert torch.allclose(logits.double(), expected, rtol=1e-5, atol=5e-6, equal_nan=True)


@needs_units
def test_what_logits_it_does_not_take_is_told(kernels: Kernels) -> None:
    logits = torch.randn(3, 64)
    assert not kernels.takes_capping(logits.bfloat16())
    assert not kernels.takes_capping(logits.mT)
    assert not kernels.takes_capping(logits[:, :48].contiguous())
    assert not kernels.takes_capping(logits.to("meta"))
    with torch.enable_grad():
        assert not kernels.takes_capping(logits.requires_grad_())


@needs_units
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize(
    ("rows", "new", "size"), [(1, 1, 32), (3, 1, 256), (2, 5, 64), (1, 300, 32)]
)
def test_rotated_states_are_rotated(
    kernels: Kernels, rows: int, new: int, size: int, alike: bool
) -> None:
    heads, groups = 6, 2
    product = torch.randn(rows, new, (heads + 2 * groups) * size).bfloat16()
    angles = torch.rand(1 if alike else rows, new, size // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    queries, keys, values = kernels.rotated(product, cos, sin, heads, groups)
    parts = product.view(rows, new, -1, size).transpose(1, 2).split([heads, groups, groups], 1)
    expected = apply_rotary_pos_emb(*(part.double() for part in (*parts[:2], cos, sin)))
    for found, true in zip((queries, keys), expected, strict=True):
        assert found.shape == true.shape
        assert error(found, true) < 2**-8
    assert torch.equal(values, parts[2])
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        kernels.rotated(product, cos, sin, heads + 1, groups)


HIDES = torch.finfo(torch.bfloat16).min


def masks(rows: int, new: int, tokens: int) -> dict[str, torch.Tensor | None]:
    """Nothing; what is ahead; what is before a row, too; and all of a row, which is padding."""
    ahead = torch.arange(tokens) > torch.arange(tokens - new, tokens)[:, None]
    causal = (ahead * HIDES).bfloat16()[None, None]
    padded = causal.repeat(rows, 1, 1, 1)
    for row in range(rows):
        padded[row, ..., : (tokens - new) * row // rows] = HIDES
    nothing = padded.clone()
    nothing[0] = HIDES
    nothing[-1, :, 0] = -torch.inf
    nothing[-1, :, 0, -1] = 0.5
    return {"none": None, "causal": causal, "padded": padded, "nothing": nothing}


@needs_units
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kind", ["none", "causal", "padded", "nothing"])
@pytest.mark.parametrize(
    ("rows", "heads", "groups", "new", "tokens", "size"),
    [
        (1, 8, 4, 1, 1, 256),
        (1, 8, 4, 1, 140, 256),
        (3, 4, 4, 1, 333, 32),
        (2, 16, 2, 1, 64, 128),
        (2, 6, 2, 5, 67, 64),
        (1, 8, 4, 31, 1001, 256),
        (2, 4, 2, 200, 333, 64),
    ],
)
def test_attention_is_attention(
    kernels: Kernels,
    rows: int,
    heads: int,
    groups: int,
    new: int,
    tokens: int,
    size: int,
    kind: str,
    softcap: float | None,
) -> None:
    """With keys and values that have gaps behind them, in which there is what must not be read."""
    queries = torch.randn(rows, heads, new, size).bfloat16()
    room = torch.randn(2, rows, groups, tokens + 9, size).bfloat16()
    room[..., tokens:, :] = torch.nan
    keys, values = room[..., :tokens, :]
    mask = masks(rows, new, tokens)[kind]
    found = kernels.attended(queries, keys, values, mask, 0.1, softcap)
    shared = [states.double().repeat_interleave(heads // groups, 1) for states in (keys, values)]
    scores = queries.double() @ shared[0].mT * 0.1
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if mask is not None:
        scores += mask
    expected = (scores.softmax(-1) @ shared[1]).transpose(1, 2)
    assert (found.shape, found.dtype) == (expected.shape, torch.bfloat16)
    assert found.isfinite().all()
    if kind == "nothing":  # of padding anything may be said
        found, expected = found[1:], expected[1:]
    if len(found):
        assert error(found, expected) < 0.01
    apart = [torch.stack([states] * 2, -1)[..., 0] for states in (queries, keys, values)]
    again = kernels.attended(apart[0].contiguous(), *apart[1:], mask, 0.1, softcap)
    assert torch.equal(again[1:] if kind == "nothing" else again, found)


@needs_units
def test_attention_that_it_does_not_take_is_told(kernels: Kernels) -> None:
    states, turn = torch.randn(2, 3, 64).bfloat16(), torch.randn(1, 3, 32).bfloat16()
    mask = torch.zeros(2, 1, 3, 9).bfloat16()

    def takes(*changed: torch.Tensor | None) -> bool:
        given = [states, turn, turn, mask]
        given[: len(changed)] = changed
        return kernels.takes_attention(*given)

    assert takes()
    assert takes(states, turn, turn, None)
    assert takes(states, turn, turn, mask[:1])
    assert takes(states, *[turn.expand(2, -1, -1)] * 2)
    assert not takes(states.float())
    assert not takes(states.to("meta"))
    assert not takes(states[:0])
    assert not takes(states, turn.float())
    assert not takes(states, turn, turn.expand(2, -1, -1))
    assert not takes(states, *[turn[..., :16]] * 2)
    assert not takes(states, *[turn[:, :2]] * 2)
    assert not takes(states, turn, turn, mask.float())
    assert not takes(states, turn, turn, mask > 0)
    assert not takes(states, turn, turn, mask[:, :, :2])
    assert not takes(states, turn, turn, mask.expand(-1, 4, -1, -1))
    assert not takes(states, turn, turn, mask[0])
    with torch.enable_grad():
        assert not takes(states.clone().requires_grad_())


@needs_units
def test_a_mask_for_other_tokens_is_torch_s_error(kernels: Kernels) -> None:
    queries, keys = torch.randn(1, 4, 1, 32).bfloat16(), torch.randn(1, 2, 9, 32).bfloat16()
    with pytest.raises(RuntimeError, match="expanded size"):
        kernels.attended(queries, keys, keys, torch.zeros(1, 1, 1, 8).bfloat16(), 1.0, None)


ONE_OPENMP = """
import os, torch
from gemma2_stream.compiled import compile_kernels

def threads(): return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
made = compile_kernels()
x, weight = torch.randn(1, 4096).bfloat16(), torch.randn(4096, 4096).bfloat16()
weight.float().sum()
before = threads()
for _ in range(3):
    made.kernels.product(x, weight)
print(before, threads())
"""


@needs_units
def test_its_threads_are_torch_s() -> None:
    """Those of a second OpenMP would spin beside them, and take half of the processors."""
    done = subprocess.run([sys.executable, "-c", ONE_OPENMP], capture_output=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before >= 3
    assert after == before


OUT_OF_MEMORY = """
import resource, torch
from types import SimpleNamespace
from gemma2_stream.compiled import compile_kernels
from gemma2_stream.kernels import MOST, Layer

kernels, size = compile_kernels().kernels, 32
weights = [torch.ones(outs, size).bfloat16() for outs in (96, 32, 32, 32, 32)]
products, norms = [(weight, None) for weight in weights], [torch.ones(size).bfloat16()] * 4
layer = Layer.of(products, norms, size, 1, 1, size, 1.0, 1.0, 0.0)
queries, states = torch.ones(1, 1, 1, size).bfloat16(), torch.zeros(1, 1, 2**20, size).bfloat16()
room = SimpleNamespace(keys=states, values=states)
turns, new = torch.ones(1, 1, size).bfloat16(), torch.ones(1, 1, size).bfloat16()
many, wide = torch.ones(MOST, 2**19).bfloat16(), torch.ones(2, 2**19, dtype=torch.int8)


def say(what):
    try:
        return what()
    except MemoryError as error:
        print(error)


def attended(tokens):
    return kernels.attended(queries, states[:, :, :tokens], states[:, :, :tokens], None, 1.0, None)


def decoded(past):
    return kernels.decoded([layer] * 2, [room] * 2, "aa", {"a": None}, new, turns, turns, past)


attended(64), decoded(64), kernels.product(many[:, :size], wide[:, :size])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**23,) * 2)
say(lambda: attended(2**20))
say(lambda: decoded(2**20 - 1))
print((kernels.product(many, wide, dtype=torch.float32) == 2**19).all().item())
"""


@needs_units
def test_memory_that_runs_out_is_an_error() -> None:
    """For the scores of a million tokens, 16 MB a thread, alone and in the middle of a layer; and
    16 MB for a block of widened weights, without which a product takes longer.
    """
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, check=True, text=True
    )
    first, second, product = done.stdout.splitlines()
    assert first.startswith("no memory is left for what a layer computes at the side")
    assert (second, product) == (first, "True")


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
    found = compile_kernels()
    assert found.kernels is None
    assert found.reason.startswith("torch's: ")
    assert reason in found.reason
    assert "\n" not in found.reason


@needs_units
@pytest.mark.parametrize(
    ("file", "line", "wrong"),
    [
        # The last output of those that are no multiple of four is left out.
        ("products.c", "at < end; at += wide", "at < end - (wide == 1); at += wide"),
        ("products.c", "outputs = at + WIDE <= end ? WIDE : 1", "outputs = WIDE"),
        ("products.c", "(wide ? wide : ", "(wide ? wide + STEP : "),
        ("norms.c", "mean + eps", "mean + mean"),
        ("norms.c", "1 / softcap", "2 / softcap"),
        ("attention.c", "_mm512_fmsub_ps", "_mm512_fmadd_ps"),
        ("attention.c", "sums + q * size, totals[q]", "sums, totals[q]"),
        ("attention.c", "0, 4, 1, 5, 2, 6, 3, 7", "0, 1, 2, 3, 4, 5, 6, 7"),
        ("attention.c", "first + __builtin_ctz", "first + 1 + __builtin_ctz"),
        ("attention.c", "last + 32 - __builtin_clz", "last + 31 - __builtin_clz"),
        ("layer.c", "past * layers->head_size", "layers->head_size - past"),
        ("layer.c", "projected, states, residual, count", "projected, NULL, residual, count"),
    ],
)
def test_a_compiler_that_gets_it_wrong_is_found_out(
    file: str, line: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in SOURCE.parent.glob("*.[ch]"):
        shutil.copy(source, tmp_path)
    changed = tmp_path / file
    source = changed.read_text("utf-8")
    assert source.count(line) == 1
    changed.write_text(source.replace(line, wrong))
    script = f'exec cc $(echo "$@" | sed "s|{SOURCE.parent}|{tmp_path}|")'
    monkeypatch.setenv("CC", compiler(tmp_path, script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    found = compile_kernels()
    assert found.kernels is None
    assert found.reason.endswith(" are wrong")
    assert list((tmp_path / "caches" / "gemma2_stream").iterdir()) == []


@linux
def test_no_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    found = compile_kernels()
    assert found.kernels is None
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
    found = compile_kernels()
    assert found.kernels is None
    assert reason in found.reason


@needs_units
@pytest.mark.parametrize("named", ["", "  "])
def test_a_blank_name_is_none(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv("CC", named)
    assert compile_kernels().reason.startswith("compiled by 'cc', ")


def test_only_some_processors_compile() -> None:
    found = compilation()
    if UNITS.get("amx_bf16"):
        assert (found.kernels, found.reason) == (None, "oneDNN's, for AMX")
    elif not UNITS.get("avx512_bf16"):
        assert found.kernels is None
        assert "AVX512-BF16" in found.reason
    else:
        assert (found.kernels is not None) == ABLE
    assert compilation() is found


@needs_units
def test_they_are_kept_for_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else is left on disk. What is kept is test_libraries.py's affair."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    found = compile_kernels()
    (kept,) = (tmp_path / "caches" / "gemma2_stream").iterdir()
    assert found.reason == f"compiled by 'cc', kept in {str(kept.parent)!r}"
    assert list(temporary.iterdir()) == []
    made = kept.stat()
    again = compile_kernels()
    assert (again.kernels is not None, again.reason) == (True, found.reason)
    assert kept.stat() == made
