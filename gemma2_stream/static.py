"""One place for keys and values, and what `generate` compiles for it, before anyone waits.

Knows transformers and torch; nothing of requests.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from transformers import GenerationConfig, StaticCache

from .errors import ParameterError
from .generation import path_of
from .kv import CACHE_NAME

# A step is compiled for the length it finds, anew for any other, then recorded, then replayed.
_STEPS = 6


def static_cache_for(model: Any) -> StaticCache:
    """Room for the whole context of `model`: any other length would be compiled for anew, in the
    middle of an answer.

    Raises ParameterError for weights in places that `generate` compiles nothing for.
    """
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if "disk" in places or {"cpu"} < places:
        raise ParameterError(
            f"{path_of(model)!r} lies in part outside the GPU ({', '.join(sorted(places))}), and "
            "nothing is compiled then: leave out static_cache, which is preset='speed' on a GPU"
        )
    length = model.config.get_text_config().max_position_embeddings
    return StaticCache(config=model.config, max_cache_len=length)


def compile_ahead(model: Any, cache: StaticCache, config: GenerationConfig) -> None:
    """Have `generate` make the few tokens for which it compiles all that a later step runs: those
    before the sliding window is full, and those after. On the thread that will ask for them, whose
    CUDA graphs they are. Three graphs, of half a minute each on the one GPU that we tried.

    Raises ParameterError where nothing can be compiled.
    """
    config = copy.deepcopy(config)
    config.eos_token_id, config.max_new_tokens = None, _STEPS
    device = model.get_input_embeddings().weight.device
    layers: list[Any] = cache.layers
    longest = max(layer.max_cache_len for layer in layers)
    windows = {layer.max_cache_len for layer in layers if layer.is_sliding} - {longest}
    try:
        for length in sorted({1, *(min(window, longest - _STEPS) for window in windows)}):
            ids = torch.ones(1, length, dtype=torch.long, device=device)
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                **{CACHE_NAME: cache},
            )
            cache.reset()  # type: ignore[no-untyped-call]
    except TorchDynamoException as error:
        # What a backend raises has its own words in a later line.
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise ParameterError(
            f"{path_of(model)!r} can't be compiled for static_cache, which is preset='speed' on a "
            f"GPU: {reason}. Install triton and a C compiler, or leave it out"
        ) from error
