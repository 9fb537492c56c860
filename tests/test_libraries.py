"""Libraries that are compiled once, and what becomes of those that were kept."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma2_stream.libraries import OPTIONS, WrongLibraryError, load

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None,
    reason="compiled on Linux only, with a C compiler, cc",
)

SOURCE = "int answer(void) { return 42; }\n"

# `loading()` says where the library is, and with how many commands it was made.
Loading = Callable[[], tuple[str, int]]


def is_right(library: ctypes.CDLL) -> bool:
    return bool(library.answer() == 42)


@pytest.fixture
def loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loading:
    """Of a source, with a compiler and a place for what is kept, all in `tmp_path`."""
    source, log, path = tmp_path / "source" / "all.c", tmp_path / "log", tmp_path / "compiler"
    source.parent.mkdir()
    source.write_text(SOURCE)
    path.write_text(f'#!/bin/sh\necho "$@" >> \'{log}\'\nexec cc "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))

    def told() -> tuple[str, int]:
        log.write_text("")
        library, where = load(source, [str(path)], is_right)
        assert library.answer() == 42
        return where, sum(" -o " in line for line in log.read_text().splitlines())

    return told


def kept(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "caches" / "gemma2_stream").iterdir()
    return path


def sealed(contents: bytes) -> bytes:
    """As it is kept, with its digest."""
    return contents + hashlib.sha256(contents).digest()


def shared(folder: Path, source: str) -> bytes:
    """The library of `source`."""
    (folder / "other.c").write_text(source)
    command = ["cc", *OPTIONS, "-shared", folder / "other.c", "-o", folder / "other.so"]
    subprocess.run(command, check=True)
    return (folder / "other.so").read_bytes()


def test_it_is_compiled_once(tmp_path: Path, loading: Loading) -> None:
    folder = tmp_path / "caches" / "gemma2_stream"
    where = f"kept in {str(folder)!r}"
    assert loading() == (where, 2)
    assert folder.stat().st_mode & 0o777 == 0o700
    made = kept(tmp_path).stat()
    assert loading() == (where, 0)
    assert kept(tmp_path).stat().st_ino == made.st_ino


def test_another_compiler_has_its_own(tmp_path: Path, loading: Loading) -> None:
    """As after an update: the command is the same, and its version is another."""
    loading()
    path = tmp_path / "compiler"
    path.write_text(path.read_text().replace("exec cc", "exec cc -D__VERSION__=2"))
    assert loading()[1] == 2
    assert len(list((tmp_path / "caches" / "gemma2_stream").iterdir())) == 2
    assert loading()[1] == 0


@pytest.mark.parametrize("name", ["all.c", "beside.c", "beside.h"])
def test_another_source_has_its_own(tmp_path: Path, loading: Loading, name: str) -> None:
    loading()
    (tmp_path / "source" / name).write_text(f"{SOURCE}/* and more */")
    assert loading()[1] == 2
    assert len(list((tmp_path / "caches" / "gemma2_stream").iterdir())) == 2
    assert loading()[1] == 0


@pytest.mark.parametrize("change", ["cut off", "no library", "empty", "nothing", "other numbers"])
def test_what_is_kept_and_wrong_is_made_anew(tmp_path: Path, loading: Loading, change: str) -> None:
    where, _ = loading()
    place = kept(tmp_path)
    whole = place.read_bytes()
    changed = {
        "cut off": whole[: len(whole) // 2],
        "no library": sealed(b"no library"),
        "empty": b"",
        "nothing": sealed(shared(tmp_path, "int nothing;")),
        "other numbers": sealed(shared(tmp_path, SOURCE.replace("42", "41"))),
    }[change]
    place.unlink()  # or what is loaded already would change
    place.write_bytes(changed)
    assert loading() == (where, 2)
    assert kept(tmp_path) == place
    anew = place.read_bytes()
    assert anew != changed
    assert anew == sealed(anew[: -hashlib.sha256().digest_size])


def test_what_is_wrong_from_the_start_is_not_kept(tmp_path: Path, loading: Loading) -> None:
    (tmp_path / "source" / "all.c").write_text(SOURCE.replace("42", "41"))
    with pytest.raises(WrongLibraryError):
        loading()
    assert list((tmp_path / "caches" / "gemma2_stream").iterdir()) == []


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_where_others_may_write_nothing_is_kept_or_loaded(
    tmp_path: Path, loading: Loading, mode: int
) -> None:
    where, _ = loading()
    place = kept(tmp_path)
    place.parent.chmod(mode)
    told = (
        f"not kept: others may write to {str(place.parent)!r}: `chmod go-w` it, or set "
        "XDG_CACHE_HOME to a folder of your own"
    )
    assert loading() == (told, 2)
    place.unlink()
    assert loading() == (told, 2)
    assert list(place.parent.iterdir()) == []
    place.parent.chmod(0o755)
    assert loading() == (where, 2)


def test_a_place_that_cannot_be_had_is_told(
    tmp_path: Path, loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    where = "not kept: 'relative' is no absolute path: set XDG_CACHE_HOME to one"
    assert loading() == (where, 2)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert loading()[0].startswith("not kept: [Errno ")


def test_a_place_that_takes_nothing_is_told(tmp_path: Path, loading: Loading) -> None:
    """Here there is a folder where the library would go."""
    loading()
    place = kept(tmp_path)
    place.unlink()
    place.mkdir()
    (place / "file").touch()
    where, commands = loading()
    assert commands == 2
    assert where.startswith("not kept: [Errno ")
    assert kept(tmp_path) == place


def test_it_is_kept_at_home(
    tmp_path: Path, loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    place = tmp_path / "home" / ".cache" / "gemma2_stream"
    assert loading() == (f"kept in {str(place)!r}", 2)
    assert len(list(place.iterdir())) == 1
