"""The server in replicas: the same answers, each conversation in its place, and the end of each."""

from __future__ import annotations

import asyncio
import functools
import json
import re
import shlex
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from tiny import DEMO, Forwards

from gemma2_stream import ChatGemma2, Gemma2Engine, ParameterError, Request, SamplingParams

pytest.importorskip("ray", reason="pip install 'gemma2-stream[ray]' adds Ray")

from ray.serve import Application
from ray_cluster import RayCluster, answer, asked, cluster, owners

from gemma2_stream.server.ray import Arguments, Gemma2, app, check

# The cluster is up in half a minute on an idle machine, and in several on a busy one.
pytestmark = pytest.mark.timeout(400)

KEY = "a-key-of-this-test"
ROOT = DEMO.parent.parent


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(KEY)
    with cluster() as running:
        running.demo(model="demo", name="served", api_key_file=str(keys), max_tokens=200)
        running.told(num_replicas=2, health_check_period_s=1, max_ongoing_requests=4)
        yield running


@pytest.fixture
def client(ray_cluster: RayCluster) -> Iterator[httpx.Client]:
    """Without a time limit: Ray holds requests back while there is no replica."""
    with httpx.Client(base_url=ray_cluster.url, timeout=None) as made:
        yield made


@pytest.fixture
def demo(ray_cluster: RayCluster) -> Iterator[openai.OpenAI]:
    url = f"{ray_cluster.url}/demo/v1"
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as made:
        yield made


def pids(client: httpx.Client) -> set[str]:
    """The processes that answer; all, but for a chance of one in a million."""
    return {answer(client, "who", f"session {number}") for number in range(24)}


def example() -> Any:
    return yaml.safe_load((ROOT / "examples" / "serve.yaml").read_text("utf-8"))


# Answers -----------------------------------------------------------------------------------------


def test_a_stream_is_what_the_engine_says(demo: openai.OpenAI) -> None:
    with demo.chat.completions.create(**asked("你是谁", stream=True)) as stream:
        choices = [chunk.choices[0] for chunk in stream]
    said = ChatGemma2("demo").invoke("你是谁").content
    assert "".join(choice.delta.content or "" for choice in choices) == said
    assert choices[-1].finish_reason == "stop"
    assert sum(bool(choice.delta.content) for choice in choices) > 10


def test_keys_are_those_of_the_file(client: httpx.Client) -> None:
    assert client.get("/demo/v1/models").status_code == 401
    assert client.get("/demo/health").status_code == 200
    bearer = {"Authorization": f"Bearer {KEY}"}
    assert client.get("/demo/v1/models", headers=bearer).json()["data"][0]["id"] == "served"


def test_who_goes_stops_the_row(client: httpx.Client, tmp_path: Path) -> None:
    body = asked(f"Hello until {tmp_path / 'open'}", stream=True)
    headers = {"x-session-id": "goes"}
    with client.stream("POST", "/told/v1/chat/completions", json=body, headers=headers) as going:
        lines = going.iter_lines()  # which is garbage only after this, and ends the stream then
        next(line for line in lines if "Hel" in line)
        assert json.loads(answer(client, "ended", "goes")) == [None]
    while "requests_answering 0.0" not in client.get("/told/metrics", headers=headers).text:
        pass
    (tmp_path / "open").touch()  # who was not stopped would go on to the end
    while (ended := json.loads(answer(client, "ended", "goes"))) == [None]:
        pass
    assert ended == ["cancelled"]


# Where -------------------------------------------------------------------------------------------


def test_a_session_stays_where_it_is(client: httpx.Client) -> None:
    owners(functools.partial(answer, client))
    by_session = [{answer(client, "who", str(n)) for _ in range(2)} for n in range(24)]
    assert all(len(pids) == 1 for pids in by_session)
    assert len(set.union(*by_session)) == 2


def test_more_than_the_queue_holds_are_told_to_come_again(
    client: httpx.Client, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    """And whoever was let in is answered."""

    async def ask() -> list[httpx.Response]:
        url, limits = ray_cluster.url, httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as many:
            path, body = "/told/v1/chat/completions", asked(f"Hello until {tmp_path / 'open'}")
            waiting = [asyncio.ensure_future(many.post(path, json=body)) for _ in range(300)]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            (tmp_path / "open").touch()
            return await asyncio.gather(*waiting)

    responses = asyncio.run(ask())
    refused = [each for each in responses if each.status_code == 503]
    assert 0 < len(refused) <= 300 - 128  # some more than 128 are let in, while they are routed
    assert {each.headers["retry-after"] for each in refused} == {"1"}
    assert all("backpressure" in each.text for each in refused)
    for each in responses:
        if each not in refused:
            assert each.json()["choices"][0]["message"]["content"] == "Hello"


# The end of a replica ----------------------------------------------------------------------------


def test_what_was_begun_is_finished_when_replicas_go(
    client: httpx.Client, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    owner = answer(client, "who", "goes on")
    body = asked(f"Hello until {tmp_path / 'open'}", stream=True)
    headers = {"x-session-id": "goes on"}
    with client.stream("POST", "/told/v1/chat/completions", json=body, headers=headers) as going:
        lines = going.iter_lines()
        next(line for line in lines if "Hel" in line)
        options = {"health_check_period_s": 1, "max_ongoing_requests": 4, "num_replicas": 1}
        with ThreadPoolExecutor() as pool:  # it is over when the old replicas are
            deploying = pool.submit(ray_cluster.told, version=1, **options)
            while answer(client, "who", "goes on") == owner:
                pass
            (tmp_path / "open").touch()
            rest = [line for line in lines if line]
            deploying.result()
    assert owner not in pids(client)
    assert any('"lo"' in line for line in rest)
    assert '"finish_reason":"stop"' in rest[-2]
    assert rest[-1] == "data: [DONE]"


def test_a_broken_engine_is_replaced(client: httpx.Client) -> None:
    before = answer(client, "who", "breaks")
    with pytest.raises(httpx.HTTPStatusError, match="500"):
        answer(client, "break", "breaks")
    while True:
        try:
            assert answer(client, "who", "breaks") != before
            break
        except httpx.HTTPError:  # as an engine that is broken, or whose end cuts the answer
            time.sleep(0.1)  # or the question itself would keep Ray busy


# How many ----------------------------------------------------------------------------------------


def test_replicas_come_with_requests_and_go_with_them(
    client: httpx.Client, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    """As examples/serve.yaml has them, but for how soon."""
    scaling = example()["applications"][0]["deployments"][0]["autoscaling_config"]
    soon = {"upscale_delay_s": 0, "downscale_delay_s": 1}
    soon |= {"metrics_interval_s": 0.2, "look_back_period_s": 1}
    ray_cluster.told(version=2, autoscaling_config=scaling | soon)

    def until(number: int) -> None:
        while ray_cluster.replicas() != number:
            time.sleep(0.1)  # or the question itself would keep Ray busy

    until(1)
    path, body = "/told/v1/chat/completions", asked(f"Hello until {tmp_path / 'open'}")
    held = scaling["target_ongoing_requests"] + 1
    with ThreadPoolExecutor(held) as pool:
        waiting = [pool.submit(client.post, path, json=body) for _ in range(held)]
        until(2)
        while len(pids(client)) != 2:  # its proxy hears of it a little later
            pass
        (tmp_path / "open").touch()
        for each in waiting:
            assert each.result().json()["choices"][0]["message"]["content"] == "Hello"
    until(1)
    while len(pids(client)) != 1:
        pass


# What a check finds ------------------------------------------------------------------------------


async def test_a_check_makes_a_token(demo_engine: Gemma2Engine, forwards: Any) -> None:
    watch: Forwards = forwards(demo_engine)
    await check(demo_engine)
    assert watch.count > 0
    watch.fail_at[watch.count + 1] = OSError("broken")
    with pytest.raises(OSError, match="broken"):
        await check(demo_engine)


async def test_a_check_finds_an_engine_that_hangs(demo_engine: Gemma2Engine, forwards: Any) -> None:
    _, release = forwards(demo_engine).gate(1)
    with pytest.raises(RuntimeError, match=r"'demo-float32' made no step in 0\.1 s"):
        await check(demo_engine, 0.1)
    release.set()
    await check(demo_engine)


@pytest.mark.parametrize("max_waiting", [1, 9])
async def test_busy_is_not_broken(demo_engine: Gemma2Engine, max_waiting: int) -> None:
    """Whether a check has to wait in line, or finds no place in it."""
    model, tokenizer = demo_engine.model, demo_engine.tokenizer
    options = {"max_rows": 1, "max_waiting": max_waiting}
    with Gemma2Engine(model, tokenizer, name="busy", **options) as engine:
        one = Request(tuple(engine.encode("Hello")), SamplingParams(temperature=2.0))
        streams = engine.submit_each([one] * 2)
        await anext(streams[0])
        await check(engine, 2)
        for stream in streams:
            stream.close()


# What is asked of Ray ----------------------------------------------------------------------------


def test_arguments_are_as_typed() -> None:
    """`serve run` gives strings."""
    taken = Arguments.model_validate({"max_rows": "4", "allow_public_without_key": "true"})
    assert (taken.max_rows, taken.allow_public_without_key) == (4, True)
    with pytest.raises(ValueError, match="'max_row': did you mean 'max_rows'"):
        Arguments.model_validate({"max_row": 4})
    with pytest.raises(ParameterError, match="max_tokens=0"):
        app(Arguments(max_tokens=0))


def test_nobody_is_let_in_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMMA2_STREAM_API_KEYS", raising=False)
    with pytest.raises(ParameterError, match="allow_public_without_key"):
        Arguments().make()
    monkeypatch.setenv("GEMMA2_STREAM_API_KEYS", "first, second")
    _, settings = Arguments().make()
    assert len(settings.keys) == 2


PAGES = pytest.mark.parametrize("page", ["cluster.md", "cluster.zh-CN.md"])


def told(page: str) -> str:
    return (ROOT / "docs" / page).read_text("utf-8")


@PAGES
def test_the_page_tells_every_argument(page: str) -> None:
    (table,) = [each for each in told(page).split("\n\n") if "\n| `model`" in each]
    rows = [row.split("|")[1] for row in table.splitlines()]
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(Arguments.model_fields)


@PAGES
def test_the_commands_on_the_page_are_those_of_ray(page: str) -> None:
    from ray.scripts.scripts import cli as ray
    from ray.serve.scripts import cli as serve

    blocks = re.findall(r"^```sh\n(.*?)^```$", told(page), re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line.partition(">")[0]) for line in "".join(blocks).splitlines()]
    commands = [line for line in lines if line[0] in ("ray", "serve")]
    assert len(commands) > 5
    for program, name, *words in commands:
        command = {"ray": ray, "serve": serve}[program].commands[name]
        command.parse_args(command.context_class(command, info_name=name), words)
        for word in words:
            assert not word.endswith(".yaml") or (ROOT / word).exists()


@PAGES
def test_the_deployment_on_the_page(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not marked as `python` there, since that is run where there is no Ray."""
    (block,) = re.findall(r"^```py\n(.*?)^```$", told(page), re.MULTILINE | re.DOTALL)
    session: dict[str, Any] = {"__name__": "page"}
    exec(block, session)
    assert isinstance(session["app"], Application)
    monkeypatch.chdir(tmp_path)
    Path("keys.txt").write_text("first\nsecond\n")
    engine, settings = session["make"]()
    assert (engine.name, len(settings.keys)) == (ChatGemma2("demo").engine.name, 2)


def test_the_example_is_valid() -> None:
    from ray.serve.schema import ServeDeploySchema

    (application,) = ServeDeploySchema.model_validate(example()).applications
    assert application.import_path == "gemma2_stream.server.ray:app"
    (deployment,) = application.deployments
    assert deployment.name == Gemma2.name
    assert deployment.graceful_shutdown_timeout_s > Arguments(**application.args).max_seconds
