"""What makes a folder a complete, verified checkpoint; knows no hub and no network."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError, ChecksumError

MARKER = ".gemma2_stream.json"
LIGHT_MARKER = ".gemma2_stream.light.json"
"""Of a folder without weights, which the other must not say is a whole checkpoint."""
# Only names of the top level, so neither `original/` nor `../../evil` can match.
_WANTED = re.compile(
    r"(config|generation_config|chat_template|vocab|model\.safetensors\.index"
    r"|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json"
    r"|tokenizer\.model|merges\.txt|chat_template\.jinja|(?!consolidated)\w[\w.-]*\.safetensors",
    re.ASCII,
)


@dataclass(frozen=True)
class File:
    """A file as its hub lists it; `digest` is a sha256, or git's own sha1 for a small file."""

    name: str
    size: int | None
    digest: str | None


def wanted(model: str, listing: Iterable[File], *, weights: bool = True) -> list[File]:
    """Choose what a checkpoint needs: no pickle, no code, no second copy in another format."""
    files = [file for file in listing if _WANTED.fullmatch(file.name)]
    if not weights:
        return [file for file in files if not file.name.endswith(".safetensors")]
    if not any(file.name.endswith(".safetensors") for file in files):
        raise CheckpointError(
            f"{model!r} holds no *.safetensors weights, and no other format is read: choose a "
            "model in the transformers format, such as 'LLM-Research/gemma-2-9b-it'."
        )
    return files


def missing(folder: Path, *, weights: bool = True) -> list[str]:
    """Name what `folder` lacks to be a checkpoint."""
    if (_read(folder / MARKER) or {}).get("files") == {}:
        return ["the rest of a download that broke off"]
    index = folder / "model.safetensors.index.json"
    names = ["config.json"]
    if weights:
        names += _shards(index) if index.is_file() else ["model.safetensors"]
    if not (folder / "tokenizer.model").is_file():
        names.append("tokenizer.json")
    return [name for name in names if not (folder / name).is_file()]


def check(folder: Path, *, weights: bool = True) -> Path:
    if lacking := missing(folder, weights=weights):
        raise CheckpointError(
            f"{str(folder)!r} is not a complete checkpoint; it lacks {', '.join(lacking)}. "
            "Copy the missing files there, or name the model by its id to have it downloaded."
        )
    return folder


def seal(folder: Path, revision: str, files: Iterable[File], *, weights: bool = True) -> None:
    """Say that `files` were verified, so that the next use need not hash gigabytes again.

    Without files: they are about to change, and half a change is no checkpoint.
    """
    with suppress(OSError):  # a cache that can be read but not written is verified every time
        sizes = {file.name: (folder / file.name).stat().st_size for file in files}
        marker = folder / (MARKER if weights else LIGHT_MARKER)
        _write(marker, {"revision": revision, "files": sizes})


def is_sealed(folder: Path, revision: str, *, weights: bool = True) -> bool:
    if not weights and is_sealed(folder, revision):
        return True
    marker = _read(folder / (MARKER if weights else LIGHT_MARKER)) or {}
    sizes = marker.get("files")
    # A folder is named by its revision, except in ModelScope's old layout: one folder for all.
    if not sizes or not isinstance(sizes, dict):
        return False
    if marker.get("revision") not in (revision, folder.name):
        return False
    return all(_size(folder / name) == size for name, size in sizes.items())


def verify(folder: Path, files: Iterable[File], progress: Callable[[int], object]) -> None:
    """Compare every file with its digest; a damaged one is removed, so that it is fetched again."""
    for file in files:
        if file.digest is None:
            continue
        found = _digest(folder / file.name, file.digest, progress)
        if found != file.digest:
            _discard(folder / file.name)
            raise damaged(file.name, f"expected {file.digest}, found {found}")


def damaged(name: str, detail: str) -> ChecksumError:
    return ChecksumError(
        f"{name!r} arrived damaged ({detail}). It was removed: run the same command again. If it "
        "arrives damaged again, the hub's own copy is, and another endpoint may have a good one."
    )


def _digest(path: Path, like: str, progress: Callable[[int], object]) -> str:
    hasher = hashlib.sha256()
    if len(like) == 40:  # git's sha1 covers a header too
        hasher = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            hasher.update(block)
            progress(len(block))
    return hasher.hexdigest()


def _discard(path: Path) -> None:
    while path.is_symlink():  # Hugging Face's cache: a link in the snapshot, the bytes elsewhere
        target = path.parent / path.readlink()
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def _shards(index: Path) -> list[str]:
    content = _read(index) or {}
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict):
        return [f"a readable {index.name}"]
    return sorted({str(name) for name in weight_map.values()})


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _read(path: Path) -> dict[str, object] | None:
    """Read a JSON object; None where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _write(path: Path, content: dict[str, object]) -> None:
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(content), encoding="utf-8")
    draft.replace(path)
