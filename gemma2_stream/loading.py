"""A folder to a running engine: device, dtype, attention, preset, and one copy of the weights.

Knows transformers and torch, inside functions: importing this module loads neither.
"""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import hub
from .errors import CheckpointError, ParameterError
from .presets import PRESETS, Choice, choose
from .types import ENGINE_OPTIONS, check_options, check_static

if TYPE_CHECKING:
    from .engine import Gemma2Engine

DTYPES = ("auto", "bfloat16", "float32", "float16")
ATTENTIONS = (
    "eager",
    "grouped",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
)
_SPREAD = {"auto", "balanced", "balanced_low_0", "sequential"}  # accelerate's own
_PLACES = _SPREAD | {"disk"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSpec:
    """Everything that decides which weights are loaded, and how they are run. `None` leaves it to
    us.

    Raises ParameterError for a value that is not among those known.
    """

    model: str = "demo"
    revision: str | None = None
    source: str | None = None
    cache_dir: str | None = None
    dtype: str | None = None
    device_map: str | None = None
    attn_implementation: str | None = None
    preset: str | None = None
    assistant_model: str | None = None
    prompt_lookup_num_tokens: int | None = None
    max_rows: int | None = None
    max_waiting: int | None = None
    max_cached_tokens: int | None = None
    prefix_cache_bytes: int | None = None

    def __post_init__(self) -> None:
        _among("dtype", self.dtype, DTYPES)
        _among("attn_implementation", self.attn_implementation, ATTENTIONS)
        _among("preset", self.preset, PRESETS)
        check_options(self.options)

    @property
    def options(self) -> dict[str, int | None]:
        """The engine's own options."""
        return {name: getattr(self, name) for name in ENGINE_OPTIONS}


def _among(name: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise ParameterError(f"{name}={value!r} is not one of {', '.join(map(repr, known))}")


@dataclass(frozen=True, slots=True)
class _Weights:
    """What is loaded, and how."""

    folder: Path
    dtype: str
    device_map: str
    preset: str
    attention: str | None


_by_spec: dict[tuple[LoadSpec, str], Gemma2Engine] = {}
_by_weights: dict[tuple[_Weights, tuple[object, ...]], Gemma2Engine] = {}
_lock = threading.Lock()


def shared_engine(
    spec: LoadSpec, *, token: str | None = None, max_retries: int = 0
) -> Gemma2Engine:
    """The process's engine for `spec`, loaded the first time that it is asked for, and downloaded
    before with `token` and `max_retries` (see `hub.resolve`).

    Two specs that come to the same folder, dtype, device, attention, preset, assistant and options
    share one; when only assistant or options differ, they share the weights. A closed engine is
    loaded anew.

    Raises ModelNotFoundError, ModelAccessError, DownloadError, CheckpointError, or ParameterError
    for what is not to be had.
    """
    # A relative folder is another one in another directory.
    asked = (spec, os.getcwd())
    known = _by_spec.get(asked)  # every request comes this way, so it asks no disk
    if known is not None and not known.closed:
        return known

    def resolved(model: str, revision: str | None) -> Path:
        return hub.resolve(
            model,
            revision=revision,
            source=spec.source,
            cache_dir=spec.cache_dir,
            token=token,
            max_retries=max_retries,
        ).resolve()

    folder = resolved(spec.model, spec.revision)
    # The revision is the model's: another repository has others.
    helper = resolved(spec.assistant_model, None) if spec.assistant_model is not None else None
    # One load at a time: two would fight for the disk and the memory.
    with _lock:
        device_map = spec.device_map or pick_device_map()
        dtype = pick_dtype(spec.dtype, device_map)
        weights = _weights(spec, folder, dtype, device_map)
        # A map names one model's own modules.
        place = pick_device_map() if device_map.startswith("{") else device_map
        guide = None if helper is None else _weights(spec, helper, dtype, place)
        ways = (guide, *spec.options.values())
        engine = _by_weights.get((weights, ways))
        if engine is None or engine.closed:
            engine = _made(weights, guide, spec.options)
            # Also under the attention that it was left to choose.
            for attention in (spec.attn_implementation, engine.attn_implementation):
                _by_weights[replace(weights, attention=attention), ways] = engine
        _by_spec[asked] = engine
    return engine


def pick_device_map() -> str:
    """Where weights go when nobody says: all GPUs there are, Apple's, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return "auto"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pick_dtype(dtype: str | None, device_map: str) -> str:
    """bfloat16 where the device computes in it, else float32; never float16 unasked."""
    if dtype not in (None, "auto"):
        return str(dtype)
    import torch

    if device_map != "cpu" and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device_map != "cpu" and torch.backends.mps.is_available():
        native = True
    else:
        able = torch.cpu.get_capabilities()
        native = any(able.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if native else "float32"


def _weights(spec: LoadSpec, folder: Path, dtype: str, device_map: str) -> _Weights:
    preset = pick_preset(spec.preset, folder, dtype, device_map).preset
    return _Weights(folder, dtype, device_map, preset, spec.attn_implementation)


def _made(
    weights: _Weights, guide: _Weights | None, options: dict[str, int | None]
) -> Gemma2Engine:
    from .engine import Gemma2Engine

    static_cache = weights.preset == "speed" and device_kind(weights.device_map) == "cuda"
    if static_cache:
        check_static(options, None if guide is None else str(guide.folder))
    model, tokenizer = _loaded(weights)
    assistant = None
    if guide is not None:
        assistant, own = _loaded(guide)
        if own.get_vocab() != tokenizer.get_vocab():
            raise ParameterError(
                f"assistant_model={str(guide.folder)!r} has another vocabulary than "
                f"{str(weights.folder)!r}: give a smaller model of the same family, such as "
                "google/gemma-2-2b-it"
            )
    return Gemma2Engine(
        model,
        tokenizer,
        name=str(weights.folder),
        assistant=assistant,
        static_cache=static_cache,
        **options,
    )


def _loaded(weights: _Weights) -> tuple[Any, Any]:
    """The model and the tokenizer, an engine's that has these weights already if there is one."""
    for (known, _), engine in _by_weights.items():
        if known == weights and not engine.closed:
            return engine.model, engine.tokenizer
    # OpenMP keeps threads for every thread that needed some. Once there are more of them than
    # processors, they sleep between operations instead of spinning: int8 prompts took 1.4 times as
    # long, and tokens 1.15. Those of a thread that ends end with it.
    with ThreadPoolExecutor(1, "gemma2_stream-load") as pool:
        return pool.submit(_load, weights).result()


def pick_preset(preset: str | None, folder: Path, dtype: str, device_map: str) -> Choice:
    """What `preset` comes to for the checkpoint in `folder`; reads no weights.

    Raises ParameterError for what cannot be had.
    """
    return choose(
        preset,
        device=device_kind(device_map),
        dtype=dtype,
        size=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        quantized=_is_quantized(folder),
    )


def device_kind(device_map: str) -> str:
    """ "cpu", "cuda", "mps" or the like where all weights are on one kind, else `device_map`."""
    import torch

    try:
        parsed = json.loads(device_map) if device_map.startswith("{") else device_map
    except ValueError:
        return device_map  # refused in its place
    places = parsed.values() if isinstance(parsed, dict) else [parsed]
    spread = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = {
        "cuda" if isinstance(place, int) else spread if place in _SPREAD else place.split(":")[0]
        for place in places
    }
    return kinds.pop() if len(kinds) == 1 else device_map


def _is_quantized(folder: Path) -> bool:
    try:
        return "quantization_config" in json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False  # refused when it is loaded


def _load(weights: _Weights) -> tuple[Any, Any]:
    """The model and the tokenizer, as the preset and the attention that is best want them."""
    from .attention import prefer_grouped
    from .pages import enlarge
    from .products import neighbours

    model, tokenizer = _read(weights)
    if device_kind(weights.device_map) == "cpu":
        prepare(model, weights.preset, weights.dtype)
        enlarge(model, neighbours(model))
    if weights.attention is None:
        prefer_grouped(model)
    return model, tokenizer


def prepare(model: Any, preset: str, dtype: str) -> None:
    """Have a model on the CPU compute as the chosen `preset` says, in `dtype`."""
    import torch

    from .decoder import equip
    from .int8 import shrink
    from .norms import ease
    from .products import hasten

    if preset == "exact":
        return
    if preset == "memory":
        shrink(model, getattr(torch, dtype))
    else:
        hasten(model)
    ease(model)
    equip(model)


def _read(weights: _Weights) -> tuple[Any, Any]:
    """The model and the tokenizer as transformers makes them."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, dtype, device_map = weights.folder, weights.dtype, weights.device_map
    preset, attention = weights.preset, weights.attention
    places = _parsed(device_map)
    in_int8 = preset == "memory" and device_kind(device_map) == "cpu"
    unread = (SafetensorError, StrictDataclassError)
    try:
        if attention is not None:
            _check_attention(folder, attention)
        # trust_remote_code=None, the default, would ask on stdin.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=False,
            output_loading_info=True,
            # Shrunk weights come from mapped ones, which take no memory of their own.
            dtype="auto" if in_int8 else getattr(torch, dtype),
            device_map=places,
            quantization_config=bitsandbytes_config(dtype)
            if preset == "memory" and not in_int8
            else None,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
        )
    except (ParameterError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, *unread) as error:
        raise CheckpointError(
            f"{str(folder)!r} does not load as a causal language model: {error}"
        ) from error
    model, report = loaded
    if absent := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{str(folder)!r} lacks {len(absent)} weights that transformers would make up, such "
            f"as {absent[0]!r}: copy the whole checkpoint there"
        )
    return model, tokenizer


def bitsandbytes_config(dtype: str) -> Any:
    """What takes the least memory by transformers' documentation: NF4, its scales in 8 bits."""
    import torch
    from transformers import BitsAndBytesConfig

    config: Any = BitsAndBytesConfig
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def _parsed(device_map: str) -> Any:
    """accelerate's own names and devices as they are; a JSON object as the map it writes down.

    Raises ParameterError for a device that is not here.
    """
    import torch

    try:
        parsed = json.loads(device_map) if device_map.startswith("{") else device_map
        for place in {*(parsed.values() if isinstance(parsed, dict) else [parsed])} - _PLACES:
            torch.empty(0, device=place)
    except (ValueError, RuntimeError, AssertionError) as error:  # torch asserts that it has CUDA
        raise ParameterError(
            f"device_map={device_map!r} names no device that is here: {error}"
        ) from error
    return parsed


def _check_attention(folder: Path, attention: str) -> None:
    """Raises ParameterError for an attention that this model has not; reads no weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from .attention import register_grouped

    make: Any = AutoModelForCausalLM.from_config  # untyped in transformers
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if attention == "grouped":
        register_grouped()
        if config.model_type != "gemma2":
            raise ParameterError(
                f"attn_implementation='grouped' is Gemma 2's, and {str(folder)!r} is "
                f"{config.model_type!r}: leave it out"
            )
    try:
        with torch.device("meta"):
            make(config, attn_implementation=attention)
    except (ValueError, ImportError) as error:
        raise ParameterError(
            f"attn_implementation={attention!r} is not to be had here: {error}"
        ) from error
