"""A folder to an engine: what is shared, what is honoured, and what is no checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import DEMO, random_gemma
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from gemma2_stream import (
    CheckpointError,
    Gemma2Engine,
    ModelNotFoundError,
    ParameterError,
    Request,
    SamplingParams,
)
from gemma2_stream.loading import (
    ATTENTIONS,
    DTYPES,
    PRESETS,
    LoadSpec,
    bitsandbytes_config,
    device_kind,
    shared_engine,
)
from gemma2_stream.products import neighbours

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>"]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random Gemma 2 weights and a tokenizer of bytes, as transformers saves them."""
    folder = tmp_path_factory.mktemp("saved")
    tokens = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], byte_fallback=True))
    backend.add_special_tokens(CONTROL)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    random_gemma(vocab=300).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of one's own, to break or to load for the first time."""
    return Path(shutil.copytree(saved, tmp_path / "my model"))


@pytest.fixture
def engine_of() -> Iterator[Callable[..., Gemma2Engine]]:
    """`engine_of(model, ...)` is `shared_engine(LoadSpec(model=model, ...))`, closed at the end."""
    engines: list[Gemma2Engine] = []

    def load(model: object, **spec: Any) -> Gemma2Engine:
        engines.append(shared_engine(LoadSpec(model=str(model), **spec)))
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


@pytest.mark.parametrize(
    ("name", "value", "known"),
    [
        ("dtype", "fp16", DTYPES),
        ("dtype", "torch.bfloat16", DTYPES),
        ("dtype", "", DTYPES),
        ("attn_implementation", "flash", ATTENTIONS),
        ("preset", "fast", PRESETS),
    ],
)
def test_an_unknown_choice_is_refused(name: str, value: str, known: tuple[str, ...]) -> None:
    """Before anything is loaded, with the name, the value and every choice."""
    with pytest.raises(ParameterError) as raised:
        LoadSpec(**{name: value})
    assert f"{name}={value!r}" in str(raised.value)
    assert all(repr(choice) in str(raised.value) for choice in known)


def test_every_known_choice_is_accepted() -> None:
    """And so is None, which leaves it to us."""
    for name, known in [
        ("dtype", DTYPES),
        ("attn_implementation", ATTENTIONS),
        ("preset", PRESETS),
    ]:
        for value in (None, *known):
            assert getattr(LoadSpec(**{name: value}), name) == value


def test_one_folder_is_one_engine(
    folder: Path, engine_of: Callable[..., Gemma2Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is spelled: absolute, relative, with a slash, roundabout, through a link."""
    engine = engine_of(folder)
    link = folder.parent / "link"
    link.symlink_to(folder, target_is_directory=True)
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    around = f"{folder.parent}/./{folder.name}/../{folder.name}"
    for spelling in (
        f"{folder}/",
        f"./{folder.name}",
        folder.name,
        f"~/{folder.name}",
        around,
        link,
    ):
        assert engine_of(spelling) is engine


def test_a_relative_folder_is_that_of_the_moment(
    saved: Path,
    tmp_path: Path,
    engine_of: Callable[..., Gemma2Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same words in another directory mean another folder."""
    engines = []
    for place in ("one", "other"):
        shutil.copytree(saved, tmp_path / place / "model")
        monkeypatch.chdir(tmp_path / place)
        engines.append(engine_of("./model"))
    names = [str(tmp_path / place / "model") for place in ("one", "other")]
    assert [engine.name for engine in engines] == names


def test_another_dtype_is_another_engine(
    folder: Path, engine_of: Callable[..., Gemma2Engine]
) -> None:
    """And each is what it was asked to be."""
    engines = {dtype: engine_of(folder, dtype=dtype) for dtype in DTYPES[1:]}
    assert len({*engines.values()}) == 3
    for dtype, engine in engines.items():
        assert engine.model.dtype is getattr(torch, dtype)
        assert engine_of(folder, dtype=dtype) is engine


def test_automatic_is_one_of_the_explicit(
    folder: Path, engine_of: Callable[..., Gemma2Engine]
) -> None:
    """No dtype, "auto", and what both come to, share one engine, which is never float16."""
    engine = engine_of(folder)
    dtype = str(engine.model.dtype).removeprefix("torch.")
    assert dtype in ("bfloat16", "float32")
    assert engine_of(folder, dtype="auto") is engine_of(folder, dtype=dtype) is engine


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_attention_is_honoured(
    folder: Path, engine_of: Callable[..., Gemma2Engine], attention: str
) -> None:
    """The model computes with what was asked for."""
    engine = engine_of(folder, attn_implementation=attention)
    assert engine.model.config._attn_implementation == attention


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_attention_that_is_not_to_be_had_is_the_callers_error(folder: Path, attention: str) -> None:
    """Gemma 2 has no sdpa, and flash attention may not be installed: the checkpoint is fine."""
    if attention != "sdpa" and find_spec("flash_attn"):
        pytest.skip("flash attention is installed")
    with pytest.raises(ParameterError) as raised:
        shared_engine(LoadSpec(model=str(folder), attn_implementation=attention))
    assert f"attn_implementation={attention!r}" in str(raised.value)


@pytest.mark.parametrize("device_map", ["cpu", '{"": "cpu"}'])
def test_device_map_is_honoured(
    folder: Path, engine_of: Callable[..., Gemma2Engine], device_map: str
) -> None:
    """A device, or a map written as JSON."""
    assert engine_of(folder, device_map=device_map).device == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="nobody says means the GPU here")
def test_a_device_that_nobody_names_shares_with_what_it_comes_to(
    folder: Path, engine_of: Callable[..., Gemma2Engine]
) -> None:
    """Two specs that come to the same device share one copy of the weights."""
    assert engine_of(folder, device_map="cpu") is engine_of(folder)


def test_attention_that_nobody_names_shares_with_what_it_comes_to(
    folder: Path, engine_of: Callable[..., Gemma2Engine]
) -> None:
    """Naming what would be taken anyway is no reason for a second copy of the weights."""
    engine = engine_of(folder)
    own = engine.model.config._attn_implementation
    assert engine_of(folder, attn_implementation=own) is engine


def classes(engine: Gemma2Engine) -> set[str]:
    """What the engine's products and embeddings are."""
    modules = [*engine.model.modules()]
    return {
        type(m).__name__ for m in modules if isinstance(m, torch.nn.Linear | torch.nn.Embedding)
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_preset_is_honoured(
    folder: Path, engine_of: Callable[..., Gemma2Engine], dtype: str
) -> None:
    """Each is another engine where it makes a difference, and the weights compute in the dtype."""
    place = {"dtype": dtype, "device_map": "cpu"}
    exact, speed, memory = (
        engine_of(folder, preset=preset, **place) for preset in ("exact", "speed", "memory")
    )
    assert classes(exact) == {"Linear", "Gemma2TextScaledWordEmbedding"}
    assert classes(memory) == {"Int8Linear", "Int8Embedding"}
    if dtype == "bfloat16":
        assert classes(speed) >= {"RowLinear", "HeadLinear", "Gemma2TextScaledWordEmbedding"}
        queries, keys, _ = next(neighbours(speed.model))
        assert queries.data_ptr() + queries.nbytes == keys.data_ptr()  # one product
    else:
        assert speed is exact
    for engine in (exact, speed, memory):
        assert engine.dtype == dtype
        request = Request(tuple(engine.encode("hi", raw=True)), SamplingParams(max_new_tokens=5))
        *_, last = engine.submit([request])
        assert last.usage is not None
        assert last.usage.completion_tokens == 5


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_shrunk_weights_let_go_of_the_file(
    folder: Path, engine_of: Callable[..., Gemma2Engine]
) -> None:
    """Or its pages would count as this process's memory."""
    engine_of(folder, preset="memory", dtype="float32", device_map="cpu")
    assert str(folder) not in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="nobody says means the GPU here")
def test_a_preset_that_nobody_names_shares_with_what_it_comes_to(
    folder: Path, engine_of: Callable[..., Gemma2Engine]
) -> None:
    """Weights as small as these run as they are."""
    assert (
        engine_of(folder) is engine_of(folder, preset="auto") is engine_of(folder, preset="exact")
    )


def test_what_a_preset_has_no_room_for_is_refused_before_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU `speed` serves one request at a time; without a GPU all else gets to the weights."""
    there = ModuleType("triton")
    there.__spec__ = type(sys.__spec__)("triton", None)
    monkeypatch.setitem(sys.modules, "triton", there)
    spec: dict[str, Any] = {"model": str(folder), "preset": "speed", "device_map": "cuda:99"}
    for options in ({"max_rows": 8}, {"assistant_model": str(folder)}):
        with pytest.raises(ParameterError, match="leave out one of the two"):
            shared_engine(LoadSpec(**spec, **options))
    with pytest.raises(ParameterError, match="names no device"):
        shared_engine(LoadSpec(**spec, max_waiting=8))


def test_quantized_weights_are_not_quantized_again(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ParameterError, match="preset='memory'"):
        shared_engine(LoadSpec(model=str(folder), preset="memory"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bitsandbytes_is_asked_for_four_bits(dtype: str) -> None:
    """By transformers' documented interface; that it runs needs a GPU."""
    config = bitsandbytes_config(dtype)
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype is getattr(torch, dtype)


@pytest.mark.parametrize(
    ("device_map", "kind"),
    [
        ("cpu", "cpu"),
        ('{"": "cpu"}', "cpu"),
        ("cuda:0", "cuda"),
        ('{"model": 0, "lm_head": "cuda:1"}', "cuda"),
        ("mps", "mps"),
        ('{"model": 0, "lm_head": "cpu"}', '{"model": 0, "lm_head": "cpu"}'),
        ("auto", "cuda" if torch.cuda.is_available() else "cpu"),
        ("{", "{"),
    ],
)
def test_the_kind_of_a_device_map(device_map: str, kind: str) -> None:
    """By which presets are decided: one kind for all weights, or the map itself."""
    assert device_kind(device_map) == kind


def test_a_closed_engine_is_loaded_anew(
    folder: Path, engine_of: Callable[..., Gemma2Engine]
) -> None:
    """Closing frees the weights; the next use finds them on the disk again."""
    first = engine_of(folder)
    first.close()
    second = engine_of(folder)
    assert second is not first
    assert not second.closed
    assert engine_of(folder) is second


def test_eight_threads_load_once(folder: Path, engine_of: Callable[..., Gemma2Engine]) -> None:
    """Concurrent first use is one load, and everyone gets it."""
    start, engines = threading.Barrier(8), []

    def load() -> None:
        start.wait()
        engines.append(engine_of(folder))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(engines) == 8
    assert len({*engines}) == 1


def test_a_loaded_engine_answers(folder: Path, engine_of: Callable[..., Gemma2Engine]) -> None:
    """From the disk to text, with the weights that were saved."""
    engine = engine_of(folder, dtype="float32")
    saved = load_file(folder / "model.safetensors")
    for name, weight in engine.model.named_parameters():
        assert torch.equal(weight.cpu(), saved[name])
    request = Request(tuple(engine.encode("hi", raw=True)), SamplingParams(max_new_tokens=5))
    *_, last = engine.submit([request])
    assert last.usage is not None
    assert last.usage.completion_tokens == 5


LOAD_WITHIN_A_LIMIT = """
import resource, sys
from pathlib import Path
from gemma2_stream import Gemma2LLM
Gemma2LLM("demo", dtype="float32", device_map="cpu").invoke("hi")  # imports all there is to import
status = Path("/proc/self/status").read_text()
used = int(status.partition("VmData:")[2].split()[0]) * 1024
limit = used + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
spec = {"dtype": sys.argv[3], "preset": sys.argv[4], "device_map": "cpu"}
engine = Gemma2LLM(sys.argv[1], **spec).engine
print(sum(p.numel() * p.element_size() for p in engine.model.parameters()))
"""


BLOCKS = 80 << 20  # bytes


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's RLIMIT_DATA")
@pytest.mark.parametrize(
    ("dtype", "preset", "each"),
    [
        pytest.param("float32", "exact", 4, id="float32"),
        pytest.param("bfloat16", "memory", 1, id="memory"),
    ],
)
def test_loading_peaks_at_little_more_than_the_weights(
    folder: Path, dtype: str, preset: str, each: int
) -> None:
    """`each` is bytes a parameter; beside them there may be the file in bfloat16, mapped (the
    kernel may drop it), and blocks of a weight: no second copy of it, whose bytes alone are more.
    """
    config = Gemma2Config.from_pretrained(folder)
    config.hidden_size, config.intermediate_size = 1024, 4096
    with torch.device("meta"):
        model = Gemma2ForCausalLM(config).bfloat16()
    count = model.num_parameters()
    model.to_empty(device="cpu").save_pretrained(folder)
    limit = (2 + each) * count + BLOCKS
    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITHIN_A_LIMIT, folder, str(limit), dtype, preset],
        # What is freed goes back at once, or malloc keeps some, more on a busy machine.
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "PYTHONPATH": str(DEMO.parent.parent),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert count > 50_000_000  # one more copy is 57 MB; without it, 30 to 40 of BLOCKS were used
    assert each <= int(done.stdout) / count < each + 0.01  # norms are not in int8


LOAD_AND_COUNT = """
import os, sys, time, torch
torch.set_num_threads(2)
from gemma2_stream.loading import LoadSpec, shared_engine
shared_engine(LoadSpec(device_map="cpu"))  # progress bars have a thread, which stays
before = {*os.listdir("/proc/self/task")}  # some of which may have ended
shared_engine(LoadSpec(model=sys.argv[1], preset="memory", dtype="bfloat16", device_map="cpu"))
until = time.monotonic() + 60  # the kernel's, for a thread that has ended
while (new := {*os.listdir("/proc/self/task")} - before) and time.monotonic() < until:
    time.sleep(0.01)
print(len(new))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc/self/task")
def test_shrinking_the_weights_leaves_no_thread(folder: Path) -> None:
    """Of torch's neither: beside those of the worker there would be more than processors, and then
    all of them sleep between operations.
    """
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_COUNT, folder],
        env={**os.environ, "PYTHONPATH": str(DEMO.parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "0", done.stderr[-2000:]


def test_the_demo_is_the_default(engine_of: Callable[..., Gemma2Engine]) -> None:
    """Without a model it is the checkpoint inside the package, by whichever name."""
    if not (DEMO / "config.json").is_file():
        pytest.skip("this checkout has no demo checkpoint yet")
    assert shared_engine(LoadSpec()) is engine_of("demo") is engine_of(DEMO)


@pytest.mark.parametrize("model", ["./nowhere", "/no/where", "gemma", "", "a/b/c"])
def test_what_is_nowhere_is_not_found(model: str) -> None:
    """The error shows what was asked for."""
    with pytest.raises(ModelNotFoundError) as raised:
        shared_engine(LoadSpec(model=model))
    assert repr(model) in str(raised.value)


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def pickle_only(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lose_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1_000])


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def lose_a_shard(folder: Path) -> None:
    names = [*load_file(folder / "model.safetensors")]
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00002-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "an empty folder": empty,
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "weights in a pickle only": pickle_only,
    "a shard missing": lose_a_shard,
    "a tensor missing": lose_a_tensor,
    "weights cut short": cut_weights,
    "weights that are text": lambda folder: (folder / "model.safetensors").write_text("404"),
    "config that is no JSON": lambda folder: (folder / "config.json").write_text("<html>"),
    "config of a list": lambda folder: (folder / "config.json").write_text("[]"),
    "tokenizer that is no JSON": lambda folder: (folder / "tokenizer.json").write_text("<html>"),
    "unknown architecture": lambda folder: edit(folder / "config.json", model_type="gemma99"),
    "not a language model": lambda folder: edit(folder / "config.json", model_type="vit"),
    "another shape": lambda folder: edit(folder / "config.json", intermediate_size=256),
    "more layers": lambda folder: edit(folder / "config.json", num_hidden_layers=5),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_no_checkpoint_is_refused(folder: Path, damage: str) -> None:
    """Nothing that is missing or broken is guessed or made up: the error shows the folder."""
    DAMAGE[damage](folder)
    with pytest.raises(CheckpointError) as raised:
        shared_engine(LoadSpec(model=str(folder)))
    assert repr(str(folder)) in str(raised.value)


def test_a_repaired_folder_loads(
    saved: Path, folder: Path, engine_of: Callable[..., Gemma2Engine]
) -> None:
    """A failure is not remembered."""
    (folder / "config.json").write_text("<html>")
    with pytest.raises(CheckpointError):
        engine_of(folder)
    shutil.copy(saved / "config.json", folder)
    assert not engine_of(folder).closed


@pytest.mark.parametrize("device_map", ["nonsense", "{", '{"": "nonsense"}', "cuda:99"])
def test_an_impossible_device_map_is_the_callers_error(folder: Path, device_map: str) -> None:
    """The checkpoint is fine, so the error names the parameter and its value."""
    with pytest.raises(ParameterError) as raised:
        shared_engine(LoadSpec(model=str(folder), device_map=device_map))
    assert f"device_map={device_map!r}" in str(raised.value)


MARK = "EXECUTED"
CODE = f"""
from pathlib import Path
Path(__file__).with_name("{MARK}").touch()
Path({{place!r}}).touch()
from transformers import Gemma2Config as Config, Gemma2ForCausalLM as Model
"""


def plant(folder: Path) -> Path:
    """Code in the folder that the configs point at; what appears when it runs."""
    ran = folder.parent / MARK
    (folder / "evil.py").write_text(CODE.format(place=str(ran)))
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit(folder / "config.json", auto_map=auto)
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "evil.Config"]},
        tokenizer_class="Config",
    )
    return ran


def test_code_in_a_checkpoint_is_not_run(
    folder: Path, engine_of: Callable[..., Gemma2Engine]
) -> None:
    """A folder that brings its own classes is loaded with transformers' own, or refused."""
    ran = plant(folder)
    with contextlib.suppress(CheckpointError):
        assert type(engine_of(folder).model).__module__.startswith("transformers.")
    assert not ran.exists()


def test_code_is_not_even_asked_about(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An architecture that only the folder's code knows is refused, and nobody is asked."""
    ran = plant(folder)
    edit(folder / "config.json", model_type="evil")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(str(prompt)) or "y")
    with pytest.raises(CheckpointError) as raised:
        shared_engine(LoadSpec(model=str(folder)))
    assert repr(str(folder)) in str(raised.value)
    assert asked == []
    assert not ran.exists()
    assert capsys.readouterr().out == ""
