"""What the KV cache tells `generate` of itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import random_gemma
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.generation import utils

from gemma2_stream.kv import CACHE_NAME, KVCache, SteppedCache

MAKE: dict[str, Callable[[torch.nn.Module], Cache]] = {
    "of rows that join": lambda model: KVCache(),
    "of a lone row": lambda model: SteppedCache(config=model.config),
    "transformers' own": lambda model: DynamicCache(config=model.config),
}


@pytest.mark.skipif(
    not hasattr(utils, "DeferredStopCheck"),
    reason="transformers asks at once on every device before 5.24: install that, or a later one",
)
@pytest.mark.parametrize("name", MAKE)
def test_generate_asks_at_once_whether_it_is_over(name: str) -> None:
    """On Apple's GPUs too, where it goes one step further with other caches, whose last token it
    takes back; ours have given that to a row already.
    """
    model = random_gemma()
    cache = MAKE[name](model)
    with torch.no_grad():
        model(torch.tensor([[2, 3, 4]]), use_cache=True, **{CACHE_NAME: cache})
    deferred = utils.DeferredStopCheck.is_supported(torch.device("mps"), cache, True, False)
    assert deferred == (name == "transformers' own")
    assert not cache.is_compileable
