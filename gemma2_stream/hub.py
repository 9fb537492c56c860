"""From a model id to a folder with a complete, verified checkpoint; knows no torch, no LangChain.

    resolve("demo")                          the checkpoint inside this package
    resolve("./my-gemma")                    a folder
    resolve("LLM-Research/gemma-2-9b-it")    ModelScope: the owners LLM-Research and AI-ModelScope
    resolve("google/gemma-2-9b-it")          Hugging Face: every other owner
    resolve("me/mine", source="modelscope")  the hub that `source` names

The hubs themselves are in `hub_clients`, what a complete checkpoint is in `snapshot`.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from pathlib import Path

from . import snapshot
from .errors import (
    DownloadError,
    Gemma2StreamError,
    ModelNotFoundError,
    ParameterError,
)
from .hub_clients import HUBS, Hub

MODELSCOPE_OWNERS = frozenset({"LLM-Research", "AI-ModelScope"})
_KNOWN = tuple(f"gemma-2-{size}{kind}" for size in ("2b", "9b", "27b") for kind in ("-it", ""))
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_PATH = re.compile(r"[./~]|[A-Za-z]:|.*\\")


def resolve(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    source: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    refresh: bool = False,
    token: str | None = None,
    max_retries: int = 0,
    weights: bool = True,
) -> Path:
    """Return a folder that holds a complete checkpoint, downloading what is missing.

    `token` goes to the hub's own host only; a transfer that breaks off is taken up again up to
    `max_retries` times. Without `weights`, all but these is fetched. Raises ModelNotFoundError,
    ModelAccessError, DownloadError, CheckpointError or ParameterError.

    What was verified once is returned without a request, so a branch that has moved on is fetched
    only with `refresh=True`, as `gemma2-stream download` does.
    """
    model = os.fspath(model)
    if source is not None and source not in HUBS:
        raise ParameterError(f"source={source!r} is no hub: use {' or '.join(map(repr, HUBS))}.")
    if model == "demo":
        return Path(__file__).parent / "demo"
    if _PATH.match(model) or (model and Path(model).is_dir()):
        return _folder(model, weights)
    if not _ID.fullmatch(model):
        raise _unknown(model)
    hub = HUBS[source or _home(model)](model, revision, cache_dir)
    hub.token, hub.weights = token, weights
    offline = local_files_only or hub.offline
    for _ in range(max_retries):
        with contextlib.suppress(DownloadError):
            return _explained(hub, offline, refresh)
    return _explained(hub, offline, refresh)


def _explained(hub: Hub, offline: bool, refresh: bool) -> Path:
    try:
        return _fetch(hub, offline, refresh)
    except Gemma2StreamError:
        raise
    except hub.failures as error:
        raise hub.explain(error) from error


def _fetch(hub: Hub, offline: bool, refresh: bool) -> Path:
    folder = hub.cached()
    sealed = folder and snapshot.is_sealed(folder, hub.revision, weights=hub.weights)
    if folder is not None and not refresh and sealed:
        return folder
    if offline:
        return _offline(hub, folder)
    return snapshot.check(hub.download(), weights=hub.weights)


def _offline(hub: Hub, folder: Path | None) -> Path:
    lacking = ["everything"] if folder is None else snapshot.missing(folder, weights=hub.weights)
    if folder is not None and not lacking:
        return folder
    raise DownloadError(
        f"{hub.model!r} is not complete in {str(hub.cache)!r} (missing: {', '.join(lacking)}), and "
        "offline mode forbids to fetch it. Run `gemma2-stream download` once where there is a "
        "network, without local_files_only, HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, or copy that "
        "folder from a machine that has it."
    )


def _folder(model: str, weights: bool) -> Path:
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"There is no folder {model!r}. Give the folder that holds config.json, or an id such "
            "as 'LLM-Research/gemma-2-9b-it'."
        )
    return snapshot.check(folder, weights=weights)


def _home(model: str) -> str:
    return "modelscope" if model.partition("/")[0] in MODELSCOPE_OWNERS else "huggingface"


def _unknown(model: str) -> ModelNotFoundError:
    near = difflib.get_close_matches(model.lower(), _KNOWN, n=1)
    hint = f" Did you mean 'LLM-Research/{near[0]}' or 'google/{near[0]}'?" if near else ""
    return ModelNotFoundError(
        f"{model!r} is no model.{hint} A model is 'demo', a folder, a ModelScope id such as "
        "'LLM-Research/gemma-2-9b-it', or a Hugging Face id such as 'google/gemma-2-9b-it'."
    )
