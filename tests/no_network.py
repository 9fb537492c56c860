"""Tests reach this machine only: conftest.py has `from no_network import no_network`.

Sees every socket and name lookup of Python's own, not those of compiled clients such as hf_xet.
"""

import sys
from collections.abc import Iterator

import pytest

_LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname")
_SENDS = ("socket.connect", "socket.sendto")  # connect_ex and sendmsg raise these too
_LOCAL = (None, "", "localhost", "::1")
_guard = {"on": False, "installed": False}


def _refuse(event: str, args: tuple[object, ...]) -> None:
    if not _guard["on"] or event not in _LOOKUPS + _SENDS:
        return
    host = args[0] if event in _LOOKUPS else args[1]
    if event in _SENDS:
        host = host[0] if isinstance(host, tuple) else None  # a Unix socket has a path
    if host not in _LOCAL and not str(host).startswith("127."):
        raise RuntimeError(f"a test tried to use the network: {event} {host!r}")


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    if not _guard["installed"]:
        sys.addaudithook(_refuse)  # cannot be removed, hence the switch
        _guard["installed"] = True
    _guard["on"] = True
    yield
    _guard["on"] = False
