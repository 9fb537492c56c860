"""What is loaded here for a model that runs elsewhere."""

from __future__ import annotations

from typing import Any

from .. import hub
from ..errors import CheckpointError
from .spec import RemoteSpec


def loaded(spec: RemoteSpec) -> tuple[Any, Any, Any]:
    """The tokenizer, the config and the generation config."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = hub.resolve(
        spec.tokenizer or spec.model,
        revision=spec.revision,
        source=spec.source,
        cache_dir=spec.cache_dir,
        max_retries=spec.max_retries,
        weights=False,
    )
    local: dict[str, Any] = {"local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **local)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **local)
        if (folder / "generation_config.json").is_file():
            return tokenizer, config, GenerationConfig.from_pretrained(folder, **local)
        return tokenizer, config, GenerationConfig.from_model_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{str(folder)!r} holds no tokenizer to read: {error}") from error
