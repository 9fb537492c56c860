"""The chat in the browser, used in a real one: headless Chromium on Chainlit's page.

The server runs in a thread here, so that a test can hold the model at a step. The tests that need a
browser are skipped where there is none, and say how to get it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from socket import create_server
from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from tiny import Forwards

import gemma2_stream
from gemma2_stream import ChatGemma2, Gemma2Engine, Request, SamplingParams
from gemma2_stream.cli import main

if TYPE_CHECKING:
    import asyncio

    from playwright.sync_api import Browser, BrowserContext, Page

ROOT = Path(gemma2_stream.__file__).parent.parent
CHROMIUM = os.environ.get("GEMMA2_STREAM_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip

ARTEFACTS = ROOT / "artefacts"  # screenshots; git does not keep them
QUESTION, OTHER = "Who are you?", "What is a token?"
ANSWER = '[data-step-type="assistant_message"]'

Forwarded = Callable[[Gemma2Engine], Forwards]
Serve = Callable[..., str]
Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The room, with Chainlit's folder furnished; there is one in a process."""
    if find_spec("chainlit") is None:
        pytest.skip("no Chainlit: pip install -e '.[ui]'")
    from gemma2_stream.ui import server

    server.furnish(tmp_path_factory.mktemp("chainlit"))
    return server


@pytest.fixture
def serve(server: Any, demo_engine: Gemma2Engine) -> Iterator[Serve]:
    """`serve(chat)`: the address at which it is served until the test ends."""
    running = []

    def start(chat: ChatGemma2 | None = None) -> str:
        app = server.page(chat or ChatGemma2(engine=demo_engine))
        listening = create_server(("127.0.0.1", 0))
        made = server.server(app)
        thread = threading.Thread(target=lambda: made.run(sockets=[listening]))
        thread.start()
        running.append((made, thread, listening))
        return f"http://127.0.0.1:{listening.getsockname()[1]}"

    yield start
    for made, thread, listening in running:
        made.should_exit = True
        thread.join(60)
        listening.close()
        assert not thread.is_alive()
    demo_engine.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="no Playwright: pip install -e '.[test]'"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium: make chromium, or name it in GEMMA2_STREAM_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, serve: Serve) -> Iterator[Open]:
    """`open_page(url)`: a page in a browser of its own, which may ask nothing of other hosts."""
    contexts: list[BrowserContext] = []
    asked: list[tuple[str, str]] = []

    def new(url: str | None = None, language: str = "en-US", scheme: Any = "light") -> Page:
        address = url or serve()
        size: Any = {"width": 900, "height": 660}
        context = browser.new_context(locale=language, color_scheme=scheme, viewport=size)
        context.set_default_timeout(100_000)  # the clock only ends what hangs
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append((address, request.url)))
        page.goto(address)
        page.locator("#starters button:enabled").first.wait_for()
        return page

    yield new
    for context in contexts:
        context.close()
    assert len(asked) >= 5
    assert [url for address, url in asked if not url.startswith(address)] == []


def answers(page: Page) -> list[str]:
    return page.locator(f"{ANSWER} .prose").all_inner_texts()


def ask(page: Page, question: str) -> None:
    page.locator("#chat-input").click()
    page.keyboard.insert_text(question)
    page.locator("#chat-submit:enabled").click()


def statistics(page: Page, number: int = 1) -> str:
    """The line under the `number`th answer, once it is there."""
    line = page.locator(".statistics").nth(number - 1)
    line.wait_for()
    return line.inner_text()


def text_longer_than(page: Page, length: int) -> str:
    """The text of the last answer, as soon as it has more characters."""
    script = f"""length => {{
        const text = [...document.querySelectorAll('{ANSWER} .prose')].at(-1)?.innerText
        return text?.length > length && text
    }}"""
    return str(page.wait_for_function(script, arg=length).json_value())


def answering() -> asyncio.Task[None]:
    """The server's task that makes the one answer that is in the making."""
    from chainlit.session import ws_sessions_id

    tasks = [session.current_task for session in ws_sessions_id.values()]
    (task,) = [task for task in tasks if task is not None and not task.done()]
    return task


def photograph(page: Page, name: str) -> None:
    """The conversation from its beginning, as artefacts/`name`.png."""
    page.locator('[data-step-type="user_message"]').first.scroll_into_view_if_needed()
    page.screenshot(path=ARTEFACTS / f"{name}.png")


def read(chat: ChatGemma2, *messages: Any) -> str:
    """What the statistics say when the model was given `messages`."""
    return f"{chat.get_num_tokens_from_messages(list(messages))} read"


def confirm(page: Page, **settings: str) -> None:
    """Fill in the page's settings, by their ids, and close them."""
    page.locator("#chat-settings-open-modal").click()
    for name, value in settings.items():
        page.locator(f"#chat-settings #{name}").fill(value)
    page.locator("#confirm").click()
    page.locator("#chat-settings").wait_for(state="detached")


# Answers ---------------------------------------------------------------------------------------


def test_an_answer_grows_while_it_is_made(
    open_page: Open, demo_engine: Gemma2Engine, forwards: Forwarded
) -> None:
    """The model is held at three steps, and the page shows what it has made by then."""
    whole = ChatGemma2(engine=demo_engine).invoke(QUESTION).text
    watch = forwards(demo_engine)
    steps = [4, 8, 12]
    gates = [watch.gate(step) for step in steps]
    page = open_page()
    ask(page, QUESTION)
    states = [""]
    for step, (reached, release) in zip(steps, gates, strict=True):
        assert reached.wait(60)
        states.append(text_longer_than(page, len(states[-1])))
        assert watch.count == step
        release.set()
    statistics(page)
    states.append(text_longer_than(page, len(states[-1])))
    assert len({*states}) == 5
    assert states[-1] == whole
    assert all(whole.startswith(state) for state in states)


def test_stop_stops_the_model_and_keeps_what_it_said(
    open_page: Open, demo_engine: Gemma2Engine, forwards: Forwarded
) -> None:
    chat = ChatGemma2(engine=demo_engine)
    watch = forwards(demo_engine)
    reached, release = watch.gate(8)
    page = open_page()
    ask(page, QUESTION)
    assert reached.wait(60)
    partial = text_longer_than(page, 5)
    page.locator("#stop-button").click()
    assert statistics(page).startswith("Stopped · ")
    release.set()
    demo_engine.join()
    assert watch.count <= 9  # the step that it was in, and one more
    assert page.locator(ANSWER).count() == 1  # and nothing of Chainlit's own
    partial = text_longer_than(page, len(partial) - 1)
    ask(page, OTHER)
    turns = HumanMessage(QUESTION), AIMessage(partial), HumanMessage(OTHER)
    assert read(chat, *turns) in statistics(page, 2)


def test_a_question_that_is_stopped_before_the_first_word_is_taken_back(
    open_page: Open, demo_engine: Gemma2Engine, forwards: Forwarded
) -> None:
    watch = forwards(demo_engine)
    reached, release = watch.gate(1)
    page = open_page()
    ask(page, QUESTION)
    assert reached.wait(60)
    page.locator("#stop-button").click()
    page.locator("#stop-button").wait_for(state="detached")
    release.set()
    ask(page, OTHER)
    assert read(ChatGemma2(engine=demo_engine), HumanMessage(OTHER)) in statistics(page)
    assert page.locator(ANSWER).count() == 1


def test_a_conversation_is_remembered(open_page: Open, demo_engine: Gemma2Engine) -> None:
    chat = ChatGemma2(engine=demo_engine)
    first = chat.invoke(QUESTION)
    page = open_page()
    ask(page, QUESTION)
    line = statistics(page)
    assert line.startswith(f"{first.usage_metadata['output_tokens']} tokens · ")
    assert "a second" in line
    ask(page, OTHER)
    line = statistics(page, 2)
    assert read(chat, HumanMessage(QUESTION), first, HumanMessage(OTHER)) in line
    assert int(re.search(r"(\d+) of them cached", line)[1]) > 0  # type: ignore[index]


def test_settings_are_honoured(open_page: Open, demo_engine: Gemma2Engine) -> None:
    page = open_page()
    ask(page, QUESTION)
    statistics(page)
    page.locator("#new-chat-button").click()
    page.locator("#confirm").click()
    page.locator("#welcome-screen").wait_for()
    confirm(page, system="Be brief.", length="3")
    ask(page, QUESTION)
    line = statistics(page)
    asked = SystemMessage("Be brief."), HumanMessage(QUESTION)
    assert line.startswith("Cut at its length · 3 tokens · ")
    assert read(ChatGemma2(engine=demo_engine), *asked) in line


def test_the_temperature_is_honoured(
    open_page: Open, serve: Serve, demo_engine: Gemma2Engine
) -> None:
    """With a seed, so that the answer is known."""
    page = open_page(serve(ChatGemma2(engine=demo_engine, temperature=2, seed=1)))
    ask(page, QUESTION)
    statistics(page)
    hot = ChatGemma2(engine=demo_engine, temperature=2, seed=1).invoke(QUESTION).text
    assert hot != ChatGemma2(engine=demo_engine).invoke(QUESTION).text
    assert text_longer_than(page, 0) == hot
    page.locator("#chat-settings-open-modal").click()
    page.locator("#chat-settings [role=slider]").press("Home")
    page.locator("#confirm").click()
    ask(page, OTHER)
    statistics(page, 2)
    turns = [HumanMessage(QUESTION), AIMessage(hot), HumanMessage(OTHER)]
    assert text_longer_than(page, 0) == ChatGemma2(engine=demo_engine).invoke(turns).text


# More than one, and again ------------------------------------------------------------------------


def test_two_pages_do_not_mix(
    open_page: Open, serve: Serve, demo_engine: Gemma2Engine, forwards: Forwarded
) -> None:
    """The second asks while the first is in the middle of its answer."""
    chat = ChatGemma2(engine=demo_engine)
    expected = [chat.invoke(question).text for question in (QUESTION, OTHER)]
    reached, release = forwards(demo_engine).gate(6)
    url = serve()
    first, second = open_page(url), open_page(url)
    ask(first, QUESTION)
    assert reached.wait(60)
    ask(second, OTHER)
    release.set()
    lines = [statistics(page) for page in (first, second)]
    assert [answers(page) for page in (first, second)] == [[text] for text in expected]
    for line, question in zip(lines, (QUESTION, OTHER), strict=True):
        assert read(chat, HumanMessage(question)) in line
    ask(second, QUESTION)
    turns = HumanMessage(OTHER), AIMessage(expected[1]), HumanMessage(QUESTION)
    assert read(chat, *turns) in statistics(second, 2)


def test_a_page_that_is_reloaded_stops_the_model_and_goes_on(
    open_page: Open, demo_engine: Gemma2Engine, forwards: Forwarded
) -> None:
    watch = forwards(demo_engine)
    reached, release = watch.gate(8)
    page = open_page()
    ask(page, QUESTION)
    assert reached.wait(60)
    task = answering()
    page.reload()
    page.locator("#starters button:enabled").first.wait_for()
    while not task.done():  # the server may hear of the old page after the new one
        time.sleep(0.01)
    release.set()
    demo_engine.join()
    assert watch.count <= 9
    ask(page, OTHER)
    assert read(ChatGemma2(engine=demo_engine), HumanMessage(OTHER)) in statistics(page)


# Errors ------------------------------------------------------------------------------------------


def test_what_the_model_raises_is_a_message(
    open_page: Open, demo_engine: Gemma2Engine, forwards: Forwarded
) -> None:
    """In the page's language, below what was said, and the next question is answered."""
    watch = forwards(demo_engine)
    watch.fail_at[8] = RuntimeError("the forward broke")
    page = open_page()
    ask(page, QUESTION)
    frame = "This could not be answered. RuntimeError: the forward broke"
    page.get_by_text(frame, exact=True).wait_for()
    page.locator("#stop-button").wait_for(state="detached")
    assert len(answers(page)[0]) > 5
    ask(page, OTHER)
    statistics(page, 2)
    assert (
        answers(page)[-1]
        == ChatGemma2(engine=demo_engine)
        .invoke([HumanMessage(QUESTION), AIMessage(answers(page)[0]), HumanMessage(OTHER)])
        .text
    )


def test_a_busy_engine_is_a_message(
    open_page: Open, serve: Serve, demo_engine: Gemma2Engine, forwards: Forwarded
) -> None:
    """Which says so and what to do, and is no part of the conversation."""
    model, tokenizer = demo_engine.model, demo_engine.tokenizer
    with Gemma2Engine(model, tokenizer, name="busy", max_rows=1, max_waiting=1) as engine:
        chat = ChatGemma2(engine=engine)
        reached, release = forwards(engine).gate(3)
        request = Request(tuple(engine.encode(QUESTION)), SamplingParams(max_new_tokens=5))
        running = engine.submit([request])
        assert reached.wait(60)
        waiting = engine.submit([request])
        page = open_page(serve(chat))
        ask(page, QUESTION)
        page.get_by_text("This could not be answered. EngineBusyError: ").wait_for()
        release.set()
        for stream in (running, waiting):
            assert list(stream)
        ask(page, OTHER)
        assert read(chat, HumanMessage(OTHER)) in statistics(page)


# Languages, looks, and other hosts ---------------------------------------------------------------


def test_chinese_and_dark(open_page: Open, demo_engine: Gemma2Engine, forwards: Forwarded) -> None:
    page = open_page(language="zh-CN", scheme="dark")
    assert page.evaluate("document.documentElement.className") == "dark"
    assert page.get_by_placeholder("问问 Gemma 2").is_visible()
    page.locator("#starters button").first.click()
    assert re.fullmatch(
        r"\d+ 个 token · 每秒 [\d.]+ 个 · 读入 \d+ 个 · 其中缓存 \d+ 个", statistics(page)
    )
    assert answers(page) == [ChatGemma2(engine=demo_engine).invoke("你是谁？").text]
    ask(page, "什么是 token？")
    statistics(page, 2)
    photograph(page, "chinese-dark")
    page.locator("#chat-settings-open-modal").click()
    settings = page.locator("#chat-settings").inner_text()
    for words in ("设置", "系统提示", "温度", "回答长度", "确认"):
        assert words in settings
    # "Close" is for screen readers, and Chainlit has no translation of it.
    assert {*re.findall("[A-Za-z]+", settings)} == {"token", "Close"}
    page.keyboard.press("Escape")
    forwards(demo_engine).fail_at[3] = RuntimeError("坏了")
    ask(page, "怎么流式输出？")
    page.get_by_text("这个问题没能回答。RuntimeError：坏了", exact=True).wait_for()


def test_english_and_light(open_page: Open) -> None:
    page = open_page()
    assert page.title() == "Gemma 2"
    assert page.evaluate("document.documentElement.className") == "light"
    assert not re.search("[\u4e00-\u9fff]", page.locator("body").inner_text())
    assert page.locator("#starters button").count() == 3
    page.locator("#starters button").first.click()
    statistics(page)
    ask(page, OTHER)
    statistics(page, 2)
    photograph(page, "english-light")


def test_an_image_in_an_answer_is_not_fetched(browser: Browser, serve: Serve) -> None:
    """It would tell another host what was said."""
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(serve())
        script = """address => {
            blocked = ""
            document.addEventListener("securitypolicyviolation", e => blocked = e.blockedURI)
            new Image().src = address
        }"""
        page.evaluate(script, "http://other.invalid/?said")
        page.wait_for_function("blocked == 'http://other.invalid/?said'")


def test_another_page_may_not_talk_to_the_model(serve: Serve) -> None:
    url = serve()
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Origin": url})) as response:
        assert response.status == 200
    foreign = urllib.request.Request(url, headers={"Origin": "http://other.invalid"})
    with pytest.raises(urllib.error.HTTPError, match="403") as refused:
        urllib.request.urlopen(foreign)
    refused.value.close()


# The command -------------------------------------------------------------------------------------


def test_the_command_serves_until_ctrl_c_and_leaves_nothing(server: Any, tmp_path: Path) -> None:
    """Not where it was called, which may hold another's Chainlit files, and not in the folder for
    temporary files.
    """
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CHAINLIT")}
    mine = {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    mine["LITERAL_API_KEY"] = "someone's"  # Chainlit would send the conversations there
    with subprocess.Popen(
        [sys.executable, "-m", "gemma2_stream", "ui", "--port", "0", "--no-browser"],
        cwd=here,
        env=kept | mine,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        said = ""
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", said)):
            said += (line := process.stderr.readline())
            assert line, said
        with urllib.request.urlopen(f"{found[0]}/project/settings") as response:
            assert b'"dataPersistence":false' in response.read()
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in said + rest
    assert list(here.iterdir()) == list(temporary.iterdir()) == []


def test_without_the_extra_the_command_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "chainlit", None)  # as if it were not installed
    assert main(["ui"]) == 2
    assert capsys.readouterr().err == (
        "gemma2-stream: the chat in the browser needs Chainlit: pip install 'gemma2-stream[ui]'\n"
    )


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_what_is_no_port_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", f"--port={port}"]) == 2
    assert f"{port!r} is not a port" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("chainlit") is None, reason="no Chainlit: pip install -e '.[ui]'")
def test_a_port_that_is_taken_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["ui", "--port", str(port), "--no-browser"]) == 1
    assert re.fullmatch(rf"gemma2-stream: .*in use.*{port}.*\n", capsys.readouterr().err)
