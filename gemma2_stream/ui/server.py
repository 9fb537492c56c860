"""Serves `application` from a folder of ours, so that nothing is read from or left where one works.

Knows Chainlit's files and its server. Chainlit has one of each in a process, and so have we.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import webbrowser
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gemma2_stream.errors import ParameterError

from . import texts

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from gemma2_stream import ChatGemma2

HERE = Path(__file__).parent
POLICY = (
    "default-src 'self'; connect-src 'self' ws: wss:; img-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval'"
)
"""What the page may load: nothing from other hosts, also when an answer holds an image's link."""


def serve(chat: ChatGemma2, *, host: str = "127.0.0.1", port: int = 8000, browser: bool) -> None:
    """Serve the chat until Ctrl-C, which raises KeyboardInterrupt; `browser` opens it too.

    Port 0 takes a free one. Raises ParameterError without the extra, OSError for an address that
    cannot be had, and what `chat.engine` raises when it loads.
    """
    if find_spec("chainlit") is None:
        raise ParameterError(
            "the chat in the browser needs Chainlit: pip install 'gemma2-stream[ui]'"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.create_server((host, port), family=family) as listening,
        tempfile.TemporaryDirectory(prefix="gemma2-stream-") as folder,
    ):
        chat.engine  # noqa: B018  # loads, or says what is wrong, before anything is asked
        furnish(Path(folder))
        app = page(chat)
        name = f"[{host}]" if ":" in host else host
        url = f"http://{name}:{listening.getsockname()[1]}"
        print(f"The chat is at {url}; Ctrl-C ends it.", file=sys.stderr, flush=True)
        if browser:
            webbrowser.open(url)
        server(app).run(sockets=[listening])


def server(app: ASGIApp) -> Any:
    """The uvicorn server that runs `app`."""
    import uvicorn

    # Chainlit's own start and end belong to its command line, and end the process.
    return uvicorn.Server(
        uvicorn.Config(app, lifespan="off", log_level="warning", timeout_graceful_shutdown=5)
    )


def furnish(folder: Path) -> None:
    """Have Chainlit, which nobody may have imported yet, read from and write to `folder` only.

    In it are settings, our files and texts, and Chainlit's page without links to other hosts.
    """
    os.environ["CHAINLIT_APP_ROOT"] = str(folder)
    os.environ["CHAINLIT_ENV_FILE"] = os.devnull  # not the .env where one works
    spec = find_spec("chainlit")
    assert spec is not None
    chainlit = Path(str(spec.origin)).parent
    shutil.copytree(HERE / "public", folder / "public")
    settings = folder / ".chainlit"
    (settings / "translations").mkdir(parents=True)
    config = (HERE / "config.toml").read_text(encoding="utf-8")
    (settings / "config.toml").write_text(config, encoding="utf-8")
    for own in texts.FOLDER.glob("*.json"):
        theirs = json.loads((chainlit / "translations" / own.name).read_text(encoding="utf-8"))
        merged = json.dumps(_merged(theirs, texts.read(own.stem)["page"]))
        (settings / "translations" / own.name).write_text(merged, encoding="utf-8")
    build = folder / "build"
    shutil.copytree(chainlit / "frontend" / "dist", build, ignore=shutil.ignore_patterns("*.map"))
    index = build / "index.html"
    html = index.read_text(encoding="utf-8")
    index.write_text(re.sub(r"<link[^>]*https://[^>]*>", "", html), encoding="utf-8")


def page(chat: ChatGemma2) -> ASGIApp:
    """The page as an ASGI app, once `furnish` was called; one in a process, for the last `chat`."""
    logging.getLogger("chainlit").setLevel(logging.ERROR)  # it warns of each text it lacks
    import chainlit

    # Whatever DATABASE_URL or LITERAL_API_KEY say: nothing that is said here leaves.
    chainlit.data_layer(lambda: None)
    import_module(".application", __package__).application(chat)
    from chainlit.server import app

    return _Guard(app)


def _merged(theirs: Any, ours: Any) -> Any:
    if not isinstance(ours, dict):
        return ours
    return theirs | {name: _merged(theirs.get(name, {}), value) for name, value in ours.items()}


class _Guard:
    """Serves its own page only: others get no answer, and it loads nothing from others."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.responses import PlainTextResponse

        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            refusal = PlainTextResponse("another page must not talk to the model", 403)
            await refusal(scope, receive, send)
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        await self._app(scope, receive, send_with_policy)
