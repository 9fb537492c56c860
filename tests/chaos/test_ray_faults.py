"""Replicas and machines that die: their streams are cut visibly, all others go on."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

pytest.importorskip("ray", reason="pip install 'gemma2-stream[ray]' adds Ray")

from ray_cluster import answer, asked, cluster, owners

# The cluster is up in half a minute on an idle machine, and in several on a busy one.
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]


def test_a_killed_replica_cuts_its_own_streams_alone(tmp_path: Path) -> None:
    with (
        cluster() as running,
        httpx.Client(base_url=running.url, timeout=None) as client,
        openai.OpenAI(base_url=f"{running.url}/told/v1", api_key="none", max_retries=0) as chat,
    ):
        running.told(num_replicas=2)
        sessions = owners(functools.partial(answer, client))
        (dies, its), (lives, others) = sessions.items()
        body = asked(f"Hello until {tmp_path / 'open'}", stream=True)
        create = chat.chat.completions.create
        with (
            create(**body, extra_headers={"x-session-id": its}) as cut,
            create(**body, extra_headers={"x-session-id": others}) as whole,
        ):
            begun = [[next(stream).choices[0], next(stream).choices[0]] for stream in (cut, whole)]
            assert [said.delta.content for _, said in begun] == ["Hel", "Hel"]
            os.kill(int(dies), signal.SIGKILL)
            with pytest.raises((openai.APIError, httpx.HTTPError)):
                assert [chunk for chunk in cut if chunk.choices[0].finish_reason] == []
            assert answer(client, "who", its) == lives
            (tmp_path / "open").touch()
            rest = [chunk.choices[0] for chunk in whole]
        assert "".join(choice.delta.content or "" for choice in rest) == "lo"
        assert rest[-1].finish_reason == "stop"
        owners(functools.partial(answer, client))  # as soon as it is replaced


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network of its own, where the cluster finds nothing but loopback."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("as root, with iproute2 (apt-get install iproute2), a machine can be removed")
    name = f"gemma2-stream-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"network namespaces are not allowed here: {made.stderr.strip()}")
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def test_a_removed_machine_takes_its_own_streams_alone(namespace: str, tmp_path: Path) -> None:
    with cluster("ip", "netns", "exec", namespace, two_nodes=True) as running:
        running.told(num_replicas=2, max_replicas_per_node=1)
        sessions = owners(running.answer)
        lives, dies = sorted(sessions, key=running.is_here, reverse=True)
        running.begin(sessions[dies], str(tmp_path / "never"))
        running.remove_the_other_node()
        cut = running.ended()
        assert any("Hel" in line for line in cut)
        assert not any('"finish_reason":"' in line or "[DONE]" in line for line in cut)
        assert {running.answer("who", session) for session in sessions.values()} == {lives}
