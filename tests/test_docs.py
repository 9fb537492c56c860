"""What docs/ says about the code is so: messages occur, rooms exist, tables are computed anew."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pickle
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import SHARD, Hub, checkpoint
from langchain_core.messages import HumanMessage
from serving import free_port
from tiny import DEMO, Forwards
from transformers import Gemma2Config, Gemma2ForCausalLM
from wire import HEAD, Wire, status

import gemma2_stream
from gemma2_stream import ChatGemma2, Gemma2Engine, Gemma2LLM, Request, SamplingParams
from gemma2_stream.hub import resolve
from gemma2_stream.kv import token_bytes
from gemma2_stream.presets import Choice, bytes_each, choose

ROOT = DEMO.parent.parent
DOCS = ROOT / "docs"
both = pytest.mark.parametrize("suffix", [".md", ".zh-CN.md"], ids=["en", "zh"])


def told(page: str) -> str:
    return (DOCS / page).read_text("utf-8")


# Troubleshooting by error message ----------------------------------------------------------------


class Trouble:
    """Everything that goes wrong on the page goes wrong here; a method a message."""

    def __init__(self, engine: Gemma2Engine, hub: Hub, folder: Path) -> None:
        self.engine, self.hub, self.folder = engine, hub, folder
        self.llm, self.chat = Gemma2LLM(engine=engine), ChatGemma2(engine=engine)

    # Parameters
    def unknown_parameter(self) -> None:
        Gemma2LLM("demo", temprature=0.7)  # type: ignore[call-arg]

    def out_of_range(self) -> None:
        self.llm.invoke("Hi", temperature=-1)

    def no_effect(self) -> None:
        self.llm.invoke("Hi", top_p=0.9)

    def stop_in_a_control_token(self) -> None:
        self.llm.invoke("Hi", stop=["<end_of_turn>\n"])

    def no_such_device(self) -> None:
        _ = Gemma2LLM("demo", device_map="cuda:99").engine

    def no_such_attention(self) -> None:
        _ = Gemma2LLM("demo", attn_implementation="sdpa").engine

    def no_bitsandbytes(self) -> None:
        choose("memory", device="cuda", dtype="bfloat16", size=5_000_000_000)

    def no_such_tool(self) -> None:
        self.chat.bind_tools([get_weather], tool_choice="weather").invoke("Hi")

    def no_engine(self) -> None:
        Gemma2LLM(engine="demo")  # type: ignore[arg-type]

    def weights_that_are_elsewhere(self) -> None:
        Gemma2LLM("m", base_url="http://127.0.0.1:9/v1", device_map="auto")

    def no_address(self) -> None:
        Gemma2LLM("m", base_url="gpus:8000")

    # Prompts
    def image(self) -> None:
        picture = {"type": "image_url", "image_url": {"url": "data:"}}
        self.chat.invoke([HumanMessage([picture])])

    def second_bos(self) -> None:
        self.llm.model_copy(update={"raw": True}).invoke("<bos>Hi<bos>")

    def empty(self) -> None:
        self.chat.invoke([])

    def too_long(self) -> None:
        self.llm.invoke("word " * self.engine.context_length)

    # Schemas
    def unenforceable(self) -> None:
        schema = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
        answer = {"title": "Names", "type": "object", "properties": {"names": schema}}
        self.chat.with_structured_output(answer).invoke("Hi")

    def cut(self) -> None:
        answer = {"title": "Point", "type": "object", "properties": {"x": {"type": "integer"}}}
        answer["required"] = ["x"]
        self.chat.with_structured_output(answer).invoke("Hi", max_new_tokens=2)

    # Weights
    def no_model(self) -> None:
        resolve("gemma-2-9b-it")

    def no_folder(self) -> None:
        resolve("./gemma-2-9b-it")

    def not_on_the_hub(self) -> None:
        self.download("google/gemma-2-9b-it")

    def gated(self) -> None:
        self.hub.gated = True
        self.download()

    def gated_on_modelscope(self) -> None:
        self.hub.gated = True
        self.download("LLM-Research/gemma-2-2b-it")

    def broken_off(self) -> None:
        self.hub.down.add(SHARD)
        self.download()

    def offline(self) -> None:
        resolve("google/gemma-2-2b-it", cache_dir=self.folder / "other", local_files_only=True)

    def damaged(self) -> None:
        self.hub.spoil.add(SHARD)
        self.download()

    def incomplete(self) -> None:
        (self.folder / "half").mkdir()
        (self.folder / "half" / "config.json").write_text("{}")
        resolve(self.folder / "half")

    def unreadable(self) -> None:
        (self.folder / "whole").mkdir()
        for name, body in checkpoint().items():
            (self.folder / "whole" / name).write_bytes(body)
        _ = Gemma2LLM(str(self.folder / "whole")).engine

    # Servers
    def not_served(self) -> None:
        with Wire() as wire:
            Gemma2LLM("gemma", base_url=wire.url, tokenizer="demo").invoke("Hi")

    def wrong_key(self) -> None:
        with Wire(models=status(401, {"error": "Unauthorized"})) as wire:
            wire.model().invoke("Hi")

    def nobody_there(self) -> None:
        with free_port() as port:
            url = f"http://127.0.0.1:{port}/v1"
            Gemma2LLM("m", base_url=url, tokenizer="demo").invoke("Hi")

    def cut_off(self) -> None:
        with Wire([HEAD]) as wire:
            wire.model().invoke("Hi")

    def silent(self) -> None:
        with Wire([HEAD, threading.Event()]) as wire:
            wire.model(read_timeout=0.05).invoke("Hi")

    # Running
    def not_finite(self) -> None:
        model = Gemma2ForCausalLM(self.engine.model.config).eval().half()
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
        with Gemma2Engine(model, self.engine.tokenizer) as engine:
            Gemma2LLM(engine=engine).invoke("Hi", max_new_tokens=5)

    def timed_out(self) -> None:
        self.llm.invoke("Hi", timeout=1e-9)

    def busy(self) -> None:
        model, tokenizer = self.engine.model, self.engine.tokenizer
        self.engine.join()
        watch = Forwards(model)
        reached, _ = watch.gate(1)
        with Gemma2Engine(model, tokenizer, name="demo", max_rows=1, max_waiting=1) as engine:
            request = Request(tuple(engine.encode("Hi")), SamplingParams(max_new_tokens=2))
            streams = [engine.submit([request])]
            reached.wait(60)
            try:
                streams += [engine.submit([request]) for _ in range(2)]
            finally:
                watch.remove()

    def closed(self) -> None:
        engine = Gemma2Engine(self.engine.model, self.engine.tokenizer, name="demo")
        engine.close()
        Gemma2LLM(engine=engine).invoke("Hi")

    def not_picklable(self) -> None:
        pickle.dumps(self.engine)

    def download(self, model: str = "google/gemma-2-2b-it") -> None:
        resolve(model, cache_dir=self.folder)


NAMES = [name for name in vars(Trouble) if not name.startswith("_") and name != "download"]


def get_weather(city: str) -> str:
    """Tell the weather in a city."""
    return city


@pytest.fixture(scope="module")
def messages(demo_engine: Gemma2Engine, tmp_path_factory: Any) -> dict[str, str]:
    """What everything that goes wrong says, by name: `ParameterError: unknown parameter ...`."""
    said = {}
    with pytest.MonkeyPatch.context() as patch:
        for variable in tuple(os.environ):  # nothing of the user's
            if variable.startswith(("HF_", "TRANSFORMERS_")) or variable.upper().endswith("_PROXY"):
                patch.delenv(variable)
        for name in NAMES:
            with Hub(checkpoint()) as hub:
                for variable in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
                    patch.setenv(variable, hub.url)
                patch.setenv("MODELSCOPE_DOWNLOAD_MAX_RETRIES", "0")
                trouble = Trouble(demo_engine, hub, tmp_path_factory.mktemp(name))
                try:
                    getattr(trouble, name)()
                except Exception as error:
                    said[name] = f"{type(error).__name__}: {error}"
    assert set(said) == set(NAMES)
    return {name: " ".join(text.split()) for name, text in said.items()}


def quoted(page: str) -> list[tuple[str, re.Pattern[str]]]:
    """The messages that a page shows, and what matches them: an ellipsis is anything."""
    found = re.findall(r"(?m)^```text\n(\w+: .*?)\n```$", told(page), re.DOTALL)
    shown = [" ".join(message.split()) for message in found]
    return [(m, re.compile(".*?".join(map(re.escape, m.split("…"))))) for m in shown]


@both
def test_every_message_on_the_page_occurs(messages: dict[str, str], suffix: str) -> None:
    """As it stands there, and nothing that occurs here is missing there."""
    pairs = quoted(f"errors{suffix}")
    for shown, pattern in pairs:
        assert any(pattern.fullmatch(text) for text in messages.values()), shown
    for name, text in messages.items():
        assert any(pattern.fullmatch(text) for _, pattern in pairs), (name, text)


@both
def test_every_error_has_a_section_with_a_message(suffix: str) -> None:
    page = told(f"errors{suffix}")
    public = {name for name in gemma2_stream.__all__ if name.endswith("Error")}
    sections = dict(re.findall(r"(?ms)^## (\w+Error)$(.*?)(?=^## )", page))
    assert {*sections} == public - {"Gemma2StreamError"} | {"TypeError"}
    for name, section in sections.items():
        assert f"```text\n{name}: " in section


# The house ---------------------------------------------------------------------------------------


@both
def test_architecture_names_every_room(suffix: str) -> None:
    """Each in one row of a table, with a sentence; and no room that is not there."""
    package = Path(gemma2_stream.__file__).parent
    rooms = {path.name for path in package.glob("*.py")} - {"__main__.py"}
    rooms |= {f"{path.parent.name}/" for path in package.glob("*/__init__.py")} | {"demo/"}
    rows = re.findall(r"(?m)^\| `([\w/.]+)` \| (.+) \|$", told(f"architecture{suffix}"))
    assert [name for name, _ in rows if name not in rooms] == []
    assert sorted(name for name, _ in rows) == sorted(rooms)


def test_the_picture_names_rooms_that_are_there() -> None:
    package = Path(gemma2_stream.__file__).parent
    named = set(re.findall(r"\b(\w+)\.py\b", told("architecture.svg")))
    assert named
    assert named <= {path.stem for path in package.glob("*.py")}


# Which preset on which machine -------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> Any:
    spec = importlib.util.spec_from_file_location("memory_table", ROOT / "tools/memory_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory_table"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("suffix", "language"), [(".md", "en"), (".zh-CN.md", "zh")])
def test_the_tables_of_machines_are_what_is_computed(
    table: Any, suffix: str, language: str
) -> None:
    page = told(f"machines{suffix}")
    assert all(rows in page for rows in table.tables(language))
    assert page == table.written(page, language)


@pytest.mark.parametrize("name", ["2b", "9b", "27b"])
def test_the_sizes_are_those_of_the_architecture(table: Any, name: str) -> None:
    """Counted by transformers, from the same config; keys and values by our cache."""
    size = table.SIZES[name]
    config = Gemma2Config(**dataclasses.asdict(size))
    with torch.device("meta"):
        model = Gemma2ForCausalLM(config)
    assert model.num_parameters() == size.parameters
    token = token_bytes(config, torch.bfloat16)
    assert size.cache(2) == table.CONTEXT * token
    for page in ("speed.md", "speed.zh-CN.md"):
        assert re.search(rf"\b{token // 1024}\b", told(page))


@pytest.mark.parametrize(
    ("kind", "preset", "device", "dtype"),
    [
        ("float32", "exact", "cpu", "float32"),
        ("bfloat16", "speed", "cpu", "bfloat16"),
        ("int8", "memory", "cpu", "bfloat16"),
    ],
)
def test_the_bytes_are_those_that_info_tells(
    table: Any, kind: str, preset: str, device: str, dtype: str
) -> None:
    size = table.SIZES["9b"]
    each = bytes_each(Choice(preset, ""), device=device, dtype=dtype)
    assert table.weights(size, kind) == size.parameters * each
