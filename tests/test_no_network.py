import socket

import pytest
from no_network import no_network  # noqa: F401  an autouse fixture


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "example.org"])
def test_the_world_is_out_of_reach(host: str) -> None:
    with pytest.raises(RuntimeError, match="tried to use the network"):
        socket.create_connection((host, 80), timeout=5)


def test_a_packet_is_refused_too() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        pytest.raises(RuntimeError, match="tried to use the network"),
    ):
        udp.sendto(b"?", ("192.0.2.1", 53))


def test_loopback_works() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("localhost", port)), server.accept()[0]:
            pass
