"""Large weights are moved into large pages, and stay what they were."""

from __future__ import annotations

import mmap
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_model
from torch import nn

from gemma2_stream.pages import LARGE_PAGE, enlarge

SMAPS = Path("/proc/self/smaps")


def advised(tensor: torch.Tensor) -> bool:
    """Whether the kernel was asked for large pages where `tensor` is."""
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", SMAPS.read_text(), flags=re.M)[1:]:
        start, end = (int(number, 16) for number in mapping.split(maxsplit=1)[0].split("-"))
        if start <= tensor.data_ptr() < end:
            flags = mapping.partition("VmFlags:")[2].split()
            return "hg" in flags
    raise AssertionError("the tensor is in no mapping")


DTYPES = [torch.float32, torch.bfloat16, torch.int8]


def two_sizes(dtype: torch.dtype) -> nn.ModuleDict:
    """A large weight that two modules share, and a small one."""
    torch.manual_seed(0)
    large = torch.randint(-100, 100, (1000, LARGE_PAGE // 1000 + 1)).to(dtype)
    first, second, small = (nn.Linear(1, 1, bias=False) for _ in range(3))
    first.weight = second.weight = nn.Parameter(large, requires_grad=False)
    small.weight = nn.Parameter(large[:1].clone(), requires_grad=False)
    return nn.ModuleDict({"first": first, "second": second, "small": small})


@pytest.fixture(params=DTYPES, ids=str)
def model(request: pytest.FixtureRequest) -> nn.ModuleDict:
    return two_sizes(request.param)


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux's /proc/self/smaps")
def test_large_weights_are_in_large_pages() -> None:
    """And small ones are not, as neither was before. In a process of its own: for arrays of 4 MiB
    numpy asks for large pages too, and malloc may give what was theirs to any weight.
    """
    code = """
from test_pages import DTYPES, advised, enlarge, torch, two_sizes
torch.set_num_threads(1)
for dtype in DTYPES:
    model = two_sizes(dtype)
    before = [advised(model[name].weight) for name in ("first", "small")]
    enlarge(model)
    after = [advised(model[name].weight) for name in ("first", "small")]
    assert (before, after) == ([False, False], [True, False]), dtype
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def test_weights_stay_what_they_were(model: nn.ModuleDict) -> None:
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    enlarge(model)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
        assert weight.dtype == before[name].dtype


def test_tied_weights_stay_tied(model: nn.ModuleDict) -> None:
    enlarge(model)
    assert model["first"].weight is model["second"].weight
    model["first"].weight.data[0, 0] = 7  # it can be written, too
    assert model["second"].weight[0, 0] == 7


def test_neighbours_lie_behind_one_another_without_large_pages_too(
    model: nn.ModuleDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere than on Linux nothing else moves."""
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    large, small = model["first"].weight, model["small"].weight
    before = [weight.clone() for weight in (large, small)]
    enlarge(model, [[large, small]])
    assert large.data_ptr() + large.nbytes == small.data_ptr()
    assert all(map(torch.equal, (large, small), before))
    places = large.data_ptr(), small.data_ptr()
    enlarge(model)
    assert (large.data_ptr(), small.data_ptr()) == places


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux's /proc/self/smaps")
def test_the_file_is_let_go(model: nn.ModuleDict, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_model(model, str(file))
    with safe_open(file, "pt") as weights:
        model["first"].weight.data = weights.get_tensor("first.weight")
        model["small"].weight.data = weights.get_tensor("small.weight")
    assert str(file) in SMAPS.read_text()

    enlarge(model)

    assert str(file) not in SMAPS.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's address space limit")
def test_memory_goes_back_with_the_weights() -> None:
    """A hundred moves of 64 MiB in 2 GiB of address space more than there was."""
    code = """
import gc, resource, torch
from pathlib import Path
from torch import nn
from gemma2_stream.pages import enlarge
torch.set_num_threads(1)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**30,) * 2)
for _ in range(100):
    layer = nn.utils.skip_init(nn.Linear, 4096, 4096, bias=False)
    enlarge(layer)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(
    not hasattr(torch.ops.onednn, "qlinear_prepack"), reason="needs a torch that has oneDNN"
)
def test_what_is_packed_stays_where_it_is_and_what_it_is() -> None:
    model = nn.Linear(1, 1, bias=False)
    weight = torch.randint(-100, 100, (2048, 2 * LARGE_PAGE // 2048), dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    model.weight = nn.Parameter(packed, requires_grad=False)
    address = torch.ops.mkldnn.data_ptr(packed)

    enlarge(model)

    assert torch.ops.mkldnn.data_ptr(model.weight) == address
    assert torch.equal(model.weight.to_dense().mT, weight)
