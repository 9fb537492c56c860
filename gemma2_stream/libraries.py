"""Libraries made of C for this processor, and kept for the next process.

Knows a C compiler and a folder, and nothing of what is computed.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

OPTIONS = ("-O3", "-march=native", "-fPIC", "-fopenmp")
SECONDS = 60


class WrongLibraryError(Exception):
    """A new library is not what it should be."""


def load(
    source: Path, compiler: list[str], is_right: Callable[[ctypes.CDLL], bool]
) -> tuple[ctypes.CDLL, str]:
    """The library of `source` and the files beside it: the one that is kept, or a new one, which is
    kept then; and where, or why it is not, in a few words.

    Either is tried by `is_right` first, and what is kept and wrong is made anew. Raises
    WrongLibraryError, subprocess.SubprocessError if the compiler can't, and OSError if what it made
    can't be loaded.
    """
    name = f"{source.stem}-{_fingerprint(source, compiler)}.so"
    kept = None
    try:
        kept = _own_folder() / name
        where = f"kept in {str(kept.parent)!r}"
    except OSError as error:
        where = f"not kept: {error}"
    if kept is not None and _is_whole(kept):
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(str(kept))
            if is_right(library):
                return library, where
    with tempfile.TemporaryDirectory() as folder:
        made = _built(source, compiler, Path(folder))
        library = ctypes.CDLL(str(made))
        if not is_right(library):
            raise WrongLibraryError
        if kept is not None:
            try:
                _keep(made, kept)
            except OSError as error:
                where = f"not kept: {error}"
    return library, where


def _fingerprint(source: Path, compiler: list[str]) -> str:
    """Of all that the library depends on. What a compiler defines by itself tells its version, and
    the units of the processor that it compiles for.
    """
    defined = _run([*compiler, *OPTIONS, "-dM", "-E", "-x", "c", os.devnull])
    files = sorted([*source.parent.glob("*.c"), *source.parent.glob("*.h")])
    contents = [path.read_bytes() for path in files]
    parts = [repr([*compiler, *OPTIONS]).encode(), defined.encode(), *contents]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _own_folder() -> Path:
    """Where caches of a user are: https://specifications.freedesktop.org/basedir/latest/

    Raises OSError where there is none, and where others may write: what is there will be run.
    """
    caches = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    if not caches.is_absolute():
        raise FileNotFoundError(f"{str(caches)!r} is no absolute path: set XDG_CACHE_HOME to one")
    folder = caches / "gemma2_stream"
    caches.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(
            f"others may write to {str(folder)!r}: `chmod go-w` it, or set XDG_CACHE_HOME to a "
            "folder of your own"
        )
    return folder


def _built(source: Path, compiler: list[str], folder: Path) -> Path:
    """Linked without OpenMP, so that it takes torch's, with the threads that are there already."""
    unlinked, library = folder / "unlinked.o", folder / "library.so"
    _run([*compiler, *OPTIONS, "-c", str(source), "-o", str(unlinked)])
    _run([*compiler, "-shared", str(unlinked), "-o", str(library)])
    return library


def _run(command: list[str]) -> str:
    return subprocess.run(
        command,
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=SECONDS,
    ).stdout


def _keep(library: Path, place: Path) -> None:
    """With its digest behind it, which no loader looks at; whole or not at all, whoever else keeps
    the same at that moment.
    """
    contents = library.read_bytes()
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        whole = Path(folder) / place.name
        whole.write_bytes(contents + hashlib.sha256(contents).digest())
        os.replace(whole, place)


def _is_whole(place: Path) -> bool:
    """Whether it is there, as it was kept: to load a part of a library ends the process."""
    try:
        contents = place.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(contents[:-size]).digest() == contents[-size:]
