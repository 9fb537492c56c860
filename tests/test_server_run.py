"""What a server admits, how it ends, what it logs, and the command that starts it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import HELLO, Serving, read_until, request, serving
from tiny import DEMO

from gemma2_stream import Gemma2Engine, ParameterError
from gemma2_stream.cli import main
from gemma2_stream.server import Keys, Settings, create_app, run
from gemma2_stream.server.metrics import Metrics
from gemma2_stream.server.requests import ChatRequest
from gemma2_stream.testing import FakeEngine

ROOT = DEMO.parent.parent

# Keys --------------------------------------------------------------------------------------------


def test_keys() -> None:
    with serving(FakeEngine(["Hello"] * 2), keys=Keys(["first-key", "second-key"])) as server:
        for good in ("Bearer first-key", "bearer second-key"):
            server.client.headers["Authorization"] = good
            assert server.chat().status_code == 200
        for bad in ("", "Bearer", "Bearer first", "Basic first-key", "first-key", "Bearer é"):
            server.client.headers["Authorization"] = bad
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
                answer = server.client.get(path)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "invalid_api_key"
            assert server.client.get("/health").status_code == 200
    assert "key" not in server.log.getvalue().replace("monkey", "")


def test_a_key_is_asked_for_before_the_body() -> None:
    with serving(FakeEngine([]), keys=Keys(["key"])) as server, server.connect() as client:
        client.sendall(request()[:200])  # the rest never comes
        assert read_until(client, b"}}").startswith(b"HTTP/1.1 401")


def test_keys_come_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text("third\n\n fourth \n")
    monkeypatch.setenv("GEMMA2_STREAM_API_KEYS", "first, second,")
    given = ("first", "second", "third", "fourth", "")
    for file, good in ((None, given[:2]), (str(tmp_path / "keys"), given[2:4])):
        keys = Keys.read(file)
        assert tuple(key for key in given if keys.admit(f"Bearer {key}".encode())) == good
    monkeypatch.delenv("GEMMA2_STREAM_API_KEYS")
    assert Keys.read().admit(b"")


def test_keys_are_shown_nowhere() -> None:
    settings = Settings(keys=Keys(["secret-key"]))
    assert "secret" not in f"{settings!r}{settings.keys!r}{vars(settings.keys)}"


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", "new\nline"])
def test_a_key_that_cannot_be_sent_is_refused(key: str) -> None:
    with pytest.raises(ParameterError, match="key 2 of 2") as caught:
        Keys(["good", key])
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_others_are_not_let_in_without_a_key(host: str) -> None:
    with pytest.raises(ParameterError, match="--allow-public-without-key"):
        run.check_address(host, Settings())
    run.check_address(host, Settings(), public_without_key=True)
    run.check_address(host, Settings(keys=Keys(["key"])))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_needs_no_key(host: str) -> None:
    run.check_address(host, Settings())


# Limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 0), ("max_choices", 1.5), ("max_seconds", 0), ("max_body_bytes", True)],
)
def test_a_limit_that_is_none_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=f"{name}={value}"):
        Settings(**{name: value})


def test_limits(demo_engine: Gemma2Engine) -> None:
    with serving(demo_engine, max_tokens=3, max_prompt_tokens=20, max_choices=2) as server:
        assert server.chat().json()["usage"]["completion_tokens"] <= 3
        for asked, said in [
            ({"max_tokens": 4}, "at most 3"),
            ({"max_completion_tokens": 4}, "at most 3"),
            ({"n": 3}, "more than the 2"),
            ({"messages": [{"role": "user", "content": "word " * 30}]}, "at most 20"),
        ]:
            answer = server.chat(**asked)
            assert answer.status_code == 400
            assert said in answer.json()["error"]["message"]
        # 16, the endpoint's own default, is nothing that the client has asked for.
        body = {"model": "served", "prompt": "Once"}
        assert server.client.post("/v1/completions", json=body).status_code == 200


def test_other_pages_may_ask_only_if_told() -> None:
    def asked_from(server: Serving, origin: str) -> httpx.Response:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        return server.client.options("/v1/chat/completions", headers=headers)

    with serving(FakeEngine([])) as server:
        assert "access-control-allow-origin" not in asked_from(server, "https://a.example").headers
    with serving(FakeEngine([]), cors_origins=("https://a.example",), keys=Keys(["k"])) as server:
        allowed = asked_from(server, "https://a.example")
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        assert "access-control-allow-origin" not in asked_from(server, "https://b.example").headers


# The end -----------------------------------------------------------------------------------------


def test_what_has_begun_is_finished() -> None:
    gate = threading.Event()
    engine = FakeEngine([["Hel", gate, "lo"]])
    with serving(engine) as server, server.connect() as client:
        client.sendall(request(stream=True))
        read_until(client, b"Hel")
        server.server.should_exit = True
        while not any("Waiting" in line["event"] for line in server.said()):
            pass
        with pytest.raises(ConnectionRefusedError):
            server.connect()
        gate.set()
        rest = read_until(client)
    assert b"lo" in rest
    assert rest.rstrip(b"0\r\n").endswith(b"data: [DONE]")


@pytest.fixture
def silenced() -> Iterator[None]:
    """As another server of this process leaves uvicorn's log, Gradio's for one."""
    logger = logging.getLogger("uvicorn.error")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


def test_another_server_does_not_silence_its_log(silenced: None) -> None:
    with serving(FakeEngine([["Hello"]])) as server:
        pass
    assert any("Shutting down" in line["event"] for line in server.said())


def test_but_not_for_ever() -> None:
    engine = FakeEngine([["Hel", threading.Event()]])
    with serving(engine, drain_seconds=1) as server, server.connect() as client:
        client.sendall(request(stream=True))
        read_until(client, b"Hel")
        server.server.should_exit = True
        assert b"[DONE]" not in read_until(client)
        while engine.calls[0].finish_reason is None:  # the model sees it at its next step
            pass
    assert engine.calls[0].finish_reason == "cancelled"


# The log -----------------------------------------------------------------------------------------


def test_the_log_tells_all_but_the_text() -> None:
    with serving(FakeEngine(["a secret answer"])) as server:
        server.chat(messages=[{"role": "user", "content": "a secret question"}], user="secret")
        server.client.get("/secret?secret=1")
        server.chat(secret=1)
    (line, other, refused) = [line for line in server.said() if line["event"] == "request"]
    assert line["path"] == "/v1/chat/completions"
    assert line["status"] == 200
    assert line["finish_reasons"] == ["stop"]
    assert line["completion_tokens"] == 2
    assert line["seconds"] >= line["first_token_seconds"] >= 0
    assert (other["path"], other["status"]) == ("other", 404)
    assert refused["error"] == "RequestValidationError"
    assert "secret" not in server.log.getvalue()


# The command -------------------------------------------------------------------------------------


@contextlib.contextmanager
def command(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`gemma2-stream serve demo` with `options` in a process of its own, and its URL."""
    words = [sys.executable, "-m", "gemma2_stream", "serve", str(DEMO), "--port", "0"]
    process = subprocess.Popen(
        [*words, *options],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
        },  # two would wait for each other on a busy machine
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        found = (re.search(r"running on (http://[\d.]+:\d+)", line) for line in process.stderr)
        address = next(filter(None, found))[1]
        yield process, f"{address}/v1/chat/completions"
    finally:
        process.kill()
        process.communicate()


def test_serve(tmp_path: Path) -> None:
    """Keys from a file, an answer, and SIGTERM in the middle of another."""
    (tmp_path / "keys").write_text("first\n\nsecond\n")
    options = ("--api-key-file", str(tmp_path / "keys"), "--name", "called")
    options += ("--max-tokens", "400", "--max-prompt-tokens", "50", "--max-body-bytes", "20000")
    with command(*options, "--cors-origin", "https://a.example") as (process, url):
        asked: dict[str, Any] = {"model": "called", "messages": HELLO, "stream": True}
        headers = {"Authorization": "Bearer second", "Origin": "https://a.example"}
        for more, status, said in (
            ({"max_tokens": 401}, 400, "at most 400"),
            ({"messages": [{"role": "user", "content": "word " * 60}]}, 400, "at most 50"),
            ({"user": "x" * 20_000}, 413, "20,000 bytes"),
        ):
            refused = httpx.post(url, json=asked | more, headers=headers, timeout=60)
            assert refused.status_code == status
            assert said in refused.text
            assert refused.headers["access-control-allow-origin"] == "https://a.example"
        with httpx.stream("POST", url, json=asked, headers=headers, timeout=60) as streamed:
            lines = streamed.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(60) in (0, -signal.SIGTERM)
        out, err = process.communicate()
    assert out == ""
    assert "Traceback" not in err
    assert "second" not in err.replace("seconds", "")


def test_serve_with_limits() -> None:
    """One connection at a time, and a second for what has not ended when the server does."""
    endless = {"n": 16, "temperature": 100, "seed": 0}  # sixteen do not end in a second
    asked = {"model": "demo", "messages": HELLO, "stream": True, **endless}
    with command("--max-connections", "1", "--drain-seconds", "1") as (process, url):
        with httpx.stream("POST", url, json=asked, timeout=60) as streamed:
            lines = streamed.iter_lines()
            next(lines)
            short = {**asked, "n": 1, "max_tokens": 1}
            assert httpx.post(url, json=short, timeout=60).status_code == 503
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(httpx.TransportError):  # it is cut
                assert "data: [DONE]" not in lines
        assert process.wait(60) in (0, -signal.SIGTERM)


def test_serve_refuses_the_public(capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is loaded."""
    assert main(["serve", "no/such-model", "--host", "0.0.0.0"]) == 2
    assert "--allow-public-without-key" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["max_tokens", "max_prompt_tokens", "max_seconds", "max_body_bytes", "max_rows", "max_waiting"],
)
def test_serve_refuses_a_limit_that_is_none(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "demo", f"--{name.replace('_', '-')}", "0"]) == 2
    assert f"{name}=0" in capsys.readouterr().err


def test_serve_says_what_to_install() -> None:
    code = "import sys; sys.modules['fastapi'] = None; from gemma2_stream.cli import main; "
    code += "sys.exit(main(['serve']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'gemma2-stream[server]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_replicas_say_what_to_install() -> None:
    """And one machine needs no Ray."""
    code = "import sys; sys.modules['ray'] = None; import gemma2_stream.server.run; "
    code += "import gemma2_stream.server.ray"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.endswith("ParameterError: replicas need ray: pip install 'gemma2-stream[ray]'")


@pytest.mark.parametrize("page", ["server.md", "server.zh-CN.md"])
def test_the_page_tells_what_is_there(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Options, fields, paths and metrics: all of them, and no other."""
    told = (ROOT / "docs" / page).read_text("utf-8")
    assert main(["serve", "--help"]) == 0
    options = set(re.findall(r"--[a-z][\w-]+", capsys.readouterr().out))
    assert set(re.findall(r"--[a-z][\w-]+", told)) <= options
    refused = {"logprobs", "top_logprobs", "logit_bias", "frequency_penalty", "presence_penalty"}
    refused |= {"modalities", "service_tier", "store"}
    fields = {*ChatRequest.model_fields, "model"} - refused
    assert {name for name in fields if f"`{name}`" not in told} == {"model"}
    app = create_app(FakeEngine([]))
    paths = {*app.openapi()["paths"], "/openapi.json"}
    rows = [row.split("|")[1] for row in told.splitlines() if row.startswith("| `/")]
    assert set(re.findall(r"`(.+?)`", " ".join(rows))) == paths
    names = {metric.name for metric in Metrics().registry.collect()}
    counted = set(re.findall(r"`(\w+?(?:_total|_seconds|_waiting|_answering))`", told))
    assert {f"gemma2_stream_{name.removesuffix('_total')}" for name in counted} == names


def test_nothing_else_imports_the_server() -> None:
    code = "import sys, gemma2_stream.chat, gemma2_stream.llm, gemma2_stream.cli; "
    code += "print([name for name in ('fastapi', 'uvicorn') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
