"""`gemma2-stream info`: what would be used."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

from .. import __version__
from .options import HUB, LOADING, SAMPLING, Parser, add_model, add_sampling, given

if TYPE_CHECKING:
    from pathlib import Path

    from ..engine import Gemma2Engine

_UNSET = {"max_new_tokens": "all that the context holds"} | dict.fromkeys(
    ("seed", "stop", "timeout"), "none"
)


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gemma2-stream info",
        description="Tell versions, device and checkpoint, and what a question with the same "
        "options would use. Downloads nothing and loads no weights.",
    )
    add_sampling(parser)
    add_model(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace, out: IO[str]) -> int:
    for name, value in _facts(args):
        print(f"{name:<20}{value}", file=out, flush=True)
    return 0


def _facts(args: argparse.Namespace) -> Iterator[tuple[str, object]]:
    """What `info` prints, line by line; where the checkpoint is missing, up to there."""
    import dataclasses
    import platform
    from importlib import metadata

    yield "gemma2_stream", __version__
    yield "python", platform.python_version()
    for package in ("torch", "transformers", "langchain-core"):
        yield package, metadata.version(package)

    from .. import hub
    from ..compiled import compilation
    from ..llm import Gemma2LLM
    from ..loading import device_kind, pick_device_map, pick_dtype, pick_preset
    from ..presets import bytes_each

    llm = Gemma2LLM(**given(args, *LOADING, *SAMPLING))
    device_map = llm.device_map or pick_device_map()
    dtype = pick_dtype(llm.dtype, device_map)
    yield "device", _device(device_map)
    yield "dtype", dtype
    yield "model", llm.model
    folder = hub.resolve(local_files_only=True, **given(args, *HUB))
    yield "checkpoint", folder.absolute()
    choice = pick_preset(llm.preset, folder, dtype, device_map)
    yield "preset", f"{choice.preset} ({choice.reason})"
    if device_kind(device_map) == "cpu" and dtype == "bfloat16" and choice.preset != "exact":
        yield "products", compilation().reason
    with _without_weights(folder) as engine:
        count = engine.model.num_parameters()
        each = bytes_each(choice, device=device_kind(device_map), dtype=dtype)
        yield "parameters", f"{count:,} ({count * each / 1e9:.2f} GB in memory)"
        yield "attention", engine.model.config._attn_implementation
        yield "context_length", engine.context_length
        asked = Gemma2LLM(engine=engine, **given(args, *SAMPLING))
        for name, value in dataclasses.asdict(asked.sampling_params).items():
            yield name, _UNSET[name] if value in (None, ()) else value


def _device(device_map: str) -> str:
    import torch

    if device_map == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    if device_map != "auto":
        return device_map
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"auto ({', '.join(names) or 'no GPU'})"


def _without_weights(folder: Path) -> Gemma2Engine:
    """An engine that can tell everything about the checkpoint but run it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from ..attention import prefer_grouped
    from ..engine import Gemma2Engine
    from ..errors import CheckpointError

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        prefer_grouped(model)
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{str(folder)!r} holds no model that can run: {error}") from error
    return Gemma2Engine(model, tokenizer, name=str(folder))
