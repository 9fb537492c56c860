"""A Ray cluster on loopback for a test, and an engine for its replicas that does what it is asked.

Ray's driver is a process of its own, which takes its orders as lines of JSON: its threads, sockets
and warnings are not the test's, and it can be put into a network namespace.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

from gemma2_stream import Engine, Request, SamplingParams
from gemma2_stream.server import Settings
from gemma2_stream.stream import TokenStream
from gemma2_stream.testing import FakeEngine, Step

ROOT = Path(__file__).parent.parent

# The engine ----------------------------------------------------------------------------------


class Told:
    """Says its process id. Asked for "Hello until FILE", it waits in the middle for that file, and
    "ended" is how those ended, as JSON. After "break" it fails every request. It holds its streams,
    so that none ends because nobody does.
    """

    name = "told"
    defaults = SamplingParams()

    def __init__(self) -> None:
        self._plain = FakeEngine([])
        self._waited: list[FakeEngine] = []
        self._streams: list[TokenStream] = []
        self._broken = False

    def encode(self, prompt: Any, *, raw: bool = False) -> list[int]:
        return self._plain.encode(prompt, raw=raw)

    def tokenize(self, text: str) -> list[int]:
        return self._plain.tokenize(text)

    def submit(self, requests: Sequence[Request]) -> TokenStream:
        (request,) = requests
        asked = "".join(map(chr, request.prompt_ids)).split("<end_of_turn>")[0]
        self._broken = self._broken or "break" in asked
        if self._broken:
            raise RuntimeError("broken, as told")
        one = FakeEngine([self._answer(asked)])
        if "until" in asked:
            self._waited.append(one)
        self._streams.append(one.submit(requests))
        return self._streams[-1]

    def _answer(self, asked: str) -> str | list[Step]:
        if "ended" in asked:
            return json.dumps([one.calls[0].finish_reason for one in self._waited])
        if "until" in asked:
            return ["Hel", _There(asked.split("until ")[1]), "lo"]
        return str(os.getpid())

    def submit_each(self, requests: Sequence[Request]) -> list[TokenStream]:
        return [self.submit([request]) for request in requests]

    def close(self) -> None:
        for one in self._waited:
            one.close()


class _There(threading.Event):
    """A gate between processes: it opens when there is a file."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self._file = Path(file)

    def wait(self, timeout: float | None = None) -> bool:
        time.sleep(timeout or 0)
        return self._file.exists()


def told(version: int = 0) -> tuple[Engine, Settings]:
    """What a replica is made of; another `version` is another deployment."""
    return Told(), Settings(model="served")


# The driver ----------------------------------------------------------------------------------


class _Driver:
    """What can be ordered; each method in the driver's process."""

    def start(self, port: int, two_nodes: bool = False) -> None:
        import ray
        from ray import serve

        if two_nodes:
            from ray.cluster_utils import Cluster

            self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
            self.other = self.cluster.add_node(num_cpus=2)
            ray.init(self.cluster.address)
        else:
            ray.init(
                num_cpus=8,
                include_dashboard=False,
                object_store_memory=100 * 2**20,
                _node_ip_address="127.0.0.1",
            )
        options = {"host": "127.0.0.1", "port": port, "location": "EveryNode"}
        with contextlib.suppress(TimeoutError):  # of a minute, which a busy machine may need
            serve.start(http_options=options)
        while {*serve.status().proxies.values()} != {"HEALTHY"}:
            time.sleep(0.1)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=None)

    def told(self, version: int = 0, **options: Any) -> None:
        from ray import serve

        from gemma2_stream.server.ray import Gemma2

        target = Gemma2.options(**options).bind(functools.partial(told, version))
        serve.run(target, name="told", route_prefix="/told")

    def demo(self, **arguments: Any) -> None:
        from ray import serve

        from gemma2_stream.server.ray import Arguments, app

        serve.run(app(Arguments(**arguments)), name="demo", route_prefix="/demo")

    def replicas(self) -> int:
        """How many of `told` take requests."""
        from ray import serve

        states = serve.status().applications["told"].deployments["Gemma2"].replica_states
        return int(states.get("RUNNING", 0))

    def is_here(self, pid: str) -> bool:
        """Whether that is a process of the first node, on which the driver is."""
        (raylet,) = self.cluster.head_node.all_processes["raylet"]
        return psutil.Process(int(pid)).ppid() == raylet.process.pid

    def remove_the_other_node(self) -> None:
        """And wait for the end of its processes, which outlive it a little and go on answering."""
        (raylet,) = self.other.all_processes["raylet"]
        processes = psutil.Process(raylet.process.pid).children(recursive=True)
        self.cluster.remove_node(self.other, allow_graceful=False)
        while any(map(_lives, processes)):
            time.sleep(0.1)

    def answer(self, words: str, session: str) -> str:
        """From where the cluster is, which may be a namespace of its own."""
        return answer(self.client, words, session)

    def begin(self, session: str, file: str) -> None:
        """A stream whose end is `ended`."""
        body = asked(f"Hello until {file}", stream=True)
        headers = {"x-session-id": session}
        begun = threading.Event()

        def read() -> list[str]:
            said = []
            try:
                with self.client.stream(
                    "POST", "/told/v1/chat/completions", json=body, headers=headers
                ) as stream:
                    for line in stream.iter_lines():
                        said.append(line)
                        begun.set()
            except httpx.HTTPError as error:
                said.append(type(error).__name__)
            return said

        self.going = ThreadPoolExecutor().submit(read)
        begun.wait()

    def ended(self) -> list[str]:
        """The lines of that stream, and what broke it."""
        return self.going.result()

    def stop(self) -> None:
        import ray
        from ray import serve

        self.client.close()
        serve.shutdown()
        ray.shutdown()
        if hasattr(self, "cluster"):
            self.cluster.shutdown()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main() -> None:
    """Follow orders on stdin until it ends; Ray's own words go to stderr."""
    told_back, driver = os.fdopen(os.dup(1), "w"), _Driver()
    os.dup2(2, 1)
    for line in sys.stdin:
        name, values, named = json.loads(line)
        found = getattr(driver, name)(*values, **named)
        print(json.dumps([found]), file=told_back, flush=True)


# The test's side -----------------------------------------------------------------------------


class RayCluster:
    """`cluster.told(num_replicas=2)` orders the driver; `client` asks the replicas."""

    def __init__(self, driver: subprocess.Popen[str], url: str, log: Path) -> None:
        self.url = url
        self.log = log
        self._driver = driver

    def __getattr__(self, name: str) -> Any:
        if not hasattr(_Driver, name):
            raise AttributeError(name)
        return functools.partial(self._order, name)

    def _order(self, name: str, /, *values: Any, **named: Any) -> Any:
        assert self._driver.stdin is not None
        assert self._driver.stdout is not None
        print(json.dumps([name, values, named]), file=self._driver.stdin, flush=True)
        if not (line := self._driver.stdout.readline()):
            raise AssertionError(f"{name} failed:\n{self.log.read_text()[-10_000:]}")
        return json.loads(line)[0]


@contextlib.contextmanager
def cluster(*within: str, **start: Any) -> Iterator[RayCluster]:
    """A running one, by the command `within`, such as that of a network namespace."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # a short one, for the names of its sockets
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ours = {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "a-token-of-this-test-alone-0123456789",
        "RAY_TMPDIR": str(folder),
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        # On a busy machine a proxy is slow, not broken, and so is a replica that is asked how
        # full it is: sessions would leave it.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "300",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "300",
        "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "300",
        "OMP_NUM_THREADS": "1",
    }
    log = folder / "driver.log"
    with log.open("w") as errors:
        driver = subprocess.Popen(
            [*within, sys.executable, "-c", "import ray_cluster; ray_cluster.main()"],
            env=os.environ | ours,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    with driver:
        running = RayCluster(driver, f"http://127.0.0.1:{port}", log)
        try:
            running.start(port, **start)
            yield running
            running.stop()
        finally:
            driver.stdin.close()
            try:
                driver.wait(30)
            except subprocess.TimeoutExpired:
                driver.kill()
            shutil.rmtree(folder, ignore_errors=True)


def asked(words: str, **more: Any) -> dict[str, Any]:
    """A request's body."""
    return {"model": "served", "messages": [{"role": "user", "content": words}], **more}


def owners(ask: Callable[[str, str], str]) -> dict[str, str]:
    """Of two replicas, by process, a session that each has, as soon as they stay where they are.

    A proxy hears of replicas a little after all else. That one has none of so many sessions is as
    likely as one in a million.
    """
    while True:
        found, again = ({ask("who", str(n)): str(n) for n in range(24)} for _ in range(2))
        if found == again and len(found) == 2:
            return found


def answer(client: httpx.Client, words: str, session: str = "") -> str:
    """What the replica of `session` says, or any."""
    headers = {"x-session-id": session} if session else {}
    response = client.post("/told/v1/chat/completions", json=asked(words), headers=headers)
    response.raise_for_status()
    return str(response.json()["choices"][0]["message"]["content"])
