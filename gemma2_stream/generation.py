"""What a checkpoint's own generation config says of an answer; knows no torch and no LangChain."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .types import SamplingParams


def defaults_of(config: Any) -> SamplingParams:
    """What a `GenerationConfig` says; what it leaves out is off, and greedy."""
    return SamplingParams(
        max_new_tokens=config.max_new_tokens,
        temperature=(config.temperature or 1.0) if config.do_sample else 0.0,
        top_p=config.top_p or 1.0,
        top_k=config.top_k or 0,
        min_p=config.min_p or 0.0,
        repetition_penalty=config.repetition_penalty or 1.0,
    )


def end_ids(config: Any, tokenizer: Any) -> list[int]:
    """Ids that end a turn: the checkpoint's, the tokenizer's eos, and Gemma's <end_of_turn>."""
    listed = config.eos_token_id
    ids = {tokenizer.eos_token_id, tokenizer.backend_tokenizer.token_to_id("<end_of_turn>")}
    ids |= set(listed) if isinstance(listed, Iterable) else {listed}
    return sorted(ids - {None})


def path_of(model: Any) -> str:
    """Where its checkpoint is, or what it is."""
    return str(model.config._name_or_path or type(model).__name__)
