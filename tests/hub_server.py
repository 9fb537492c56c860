"""A hub on loopback that speaks both wire formats, for tests of the real clients.

    with Hub({"config.json": b"{}"}) as hub:
        hub.cut["model.safetensors"] = 1000       close after 1,000 bytes, and then be down for it
        hub.down.add("model.safetensors")         answer 503 for this file
        hub.busy["model.safetensors"] = 2         answer 503 for it, so many times
    hub.spoil.add("model.safetensors")        send other bytes than those listed
        hub.status = 401                          answer everything so
        hub.page = b"<html>"                      answer everything with a page
        hub.gated = True                          refuse the files (ModelScope: the listing)
        hub.cdn = "http://localhost:1234"         redirect the bytes of large files there
        hub.commits = ["a" * 40, "b" * 40]        the branch moves on after the first look
        hub.xet = True                            offer large files by Xet too, which is not here
        hub.silent = True                         accept, and close without an answer

`hub.requests` holds what was asked for, with headers.
"""

from __future__ import annotations

import hashlib
import json
import re
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
REVISIONS = {"main", "master", "v1", COMMIT}
MODELS = {"google/gemma-2-2b-it", "LLM-Research/gemma-2-2b-it"}
LARGE = (".safetensors", "tokenizer.json")  # what real repositories keep in LFS


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Message

    @property
    def file(self) -> str:
        """The file whose bytes are asked for, or an empty string."""
        query = parse_qs(urlsplit(self.path).query)
        return query.get("FilePath", [unquote(self.path.rpartition("/")[2])])[0]


@dataclass
class Hub:
    files: dict[str, bytes]
    tls: ssl.SSLContext | None = None
    cut: dict[str, int] = field(default_factory=dict)
    busy: dict[str, int] = field(default_factory=dict)
    down: set[str] = field(default_factory=set)
    spoil: set[str] = field(default_factory=set)
    status: int | None = None
    page: bytes | None = None
    commits: list[str] = field(default_factory=lambda: [COMMIT])
    xet: bool = False
    gated: bool = False
    cdn: str | None = None
    silent: bool = False
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> Hub:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("_", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        poll = {"poll_interval": 0.01}
        threading.Thread(target=self._server.serve_forever, kwargs=poll, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def sha256(self, file: str) -> str:
        return _sha256(self.files[file])

    def asked(self, file: str, method: str = "GET") -> list[Request]:
        return [r for r in self.requests if r.method == method and r.file == file]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_CONNECT(self) -> None:
        """Be a proxy that answers for every host itself: https://huggingface.co ends here."""
        assert self.hub.tls is not None
        self.send_response(200)
        self.end_headers()
        self.connection = self.hub.tls.wrap_socket(self.connection, server_side=True)
        self.setup_streams()
        self.handle_one_request()
        self.connection.close()

    def setup_streams(self) -> None:
        self.rfile = self.connection.makefile("rb")
        self.wfile = self.connection.makefile("wb", 0)

    def do_GET(self) -> None:
        hub = self.hub
        hub.requests.append(Request(self.command, self.path, self.headers))
        if hub.status is not None:
            self._json({"error": "no"}, hub.status)
        elif hub.page is not None:
            self.send_response(200)
            self._send(hub.page, len(hub.page), {"Content-Type": "text/html"})
        elif not hub.silent:
            self._route(urlsplit(self.path).path)

    def _route(self, path: str) -> None:
        routes: tuple[tuple[str, Callable[..., None]], ...] = (
            (r"/api/v1/models/([^/]+/[^/]+)/repo/files", self._modelscope_listing),
            (r"/api/v1/models/[^/]+/[^/]+/repo", self._modelscope_file),
            (r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", self._huggingface_info),
            (r"/api/models/[^/]+/[^/]+/tree/[^/]+", self._huggingface_tree),
            (r"/[^/]+/[^/]+/resolve/([^/]+)/(.+)", self._huggingface_file),
            (r"/cdn/(.+)", self._body),
            (r".*", lambda: self._json({}, 404)),
        )
        for pattern, answer in routes:
            if match := re.fullmatch(pattern, path):
                answer(*map(unquote, match.groups()))
                return

    do_HEAD = do_GET

    def _modelscope_listing(self, model: str) -> None:
        revision = parse_qs(urlsplit(self.path).query)["Revision"][0]
        files = [
            {"Path": n, "Name": n, "Type": "blob", "Size": len(b), "Sha256": _sha256(b)}
            for n, b in self.hub.files.items()
        ]
        known = model in MODELS and revision in REVISIONS
        status = 403 if self.hub.gated else 200 if known else 404
        self._json({"Code": status, "Data": {"Files": files if status == 200 else []}}, status)

    def _modelscope_file(self) -> None:
        self._file(parse_qs(urlsplit(self.path).query)["FilePath"][0], {})

    def _huggingface_info(self, model: str, revision: str) -> None:
        commit = self.hub.commits[0]
        siblings = [{"rfilename": e.pop("path"), **e} for e in self._entries("blobId", "sha256")]
        if model in MODELS and revision in REVISIONS:
            self._json({"id": model, "sha": commit, "siblings": siblings})
            if self.hub.commits[1:]:
                del self.hub.commits[0]
                self.hub.files["config.json"] = self.hub.files["config.json"].upper()
        else:
            lacking = "Revision" if model in MODELS else "Repo"
            self._json({}, 404, {"X-Error-Code": f"{lacking}NotFound"})

    def _huggingface_tree(self) -> None:
        self._json([{"type": "file", **entry} for entry in self._entries("oid", "oid")])

    def _entries(self, git: str, lfs: str) -> list[dict[str, object]]:
        """The two listings of Hugging Face name the same sums differently."""
        entries: list[dict[str, object]] = []
        for name, body in self.hub.files.items():
            entries.append({"path": name, "size": len(body), git: _git_sha1(body)})
            if name.endswith(LARGE):
                sums = {lfs: _sha256(body), "size": len(body), "pointerSize": 130}
                entries[-1] |= {"lfs": sums} | ({"xetHash": _sha256(body)} if self.hub.xet else {})
        return entries

    def _huggingface_file(self, revision: str, name: str) -> None:
        if self.hub.gated:
            self._json({}, 403, {"X-Error-Code": "GatedRepo"})
            return
        body = self.hub.files[name]
        etag = _sha256(body) if name.endswith(LARGE) else _git_sha1(body)
        linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(body))}
        self._file(name, {"ETag": f'"{etag}"', "X-Repo-Commit": revision, **linked})

    def _file(self, name: str, headers: dict[str, str]) -> None:
        if name in self.hub.down:
            self._json({}, 503)
        elif self.command == "GET" and self.hub.busy.get(name):
            self.hub.busy[name] -= 1
            self._json({}, 503)
        elif self.hub.cdn is not None and name.endswith(LARGE):
            self._json({}, 302, {**headers, "Location": f"{self.hub.cdn}/cdn/{name}"})
        else:
            self._body(name, headers)

    def _body(self, name: str, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        body = self.hub.files[name]
        if name in self.hub.spoil:
            body = body[:-1] + bytes([body[-1] ^ 1])
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        span = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        self.send_response(206 if start else 200)
        self._send(body[start : self.hub.cut.get(name)], len(body) - start, {**headers, **span})
        if self.command == "GET" and name in self.hub.cut:
            del self.hub.cut[name]
            self.hub.down.add(name)

    def _json(
        self, content: object, status: int = 200, headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self._send(body, len(body), {"Content-Type": "application/json", **headers})

    def _send(self, body: bytes, length: int, headers: dict[str, str]) -> None:
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _git_sha1(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def checkpoint(weights: int = 1000) -> dict[str, bytes]:
    """What a checkpoint needs: two shards, and what belongs to them."""
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = {"weight_map": {f"layer.{n}": shard for n, shard in enumerate(shards)}}
    return {
        "config.json": b'{"model_type": "gemma2"}',
        "generation_config.json": b'{"top_k": 64}',
        "tokenizer.json": b'{"version": "1.0"}',
        "tokenizer_config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        shards[0]: bytes(range(250)) * (weights // 250),
        shards[1]: b"second" * 100,
    }


def litter() -> dict[str, bytes]:
    """What must never be fetched: pickles, code, second copies, and a way out of the folder."""
    return {
        "README.md": b"#",
        "pytorch_model.bin": b"pickle",
        "modeling_evil.py": b"boom",
        "gemma.gguf": b"again",
        "original/model.safetensors": b"again",
        "consolidated.safetensors": b"again",
        "../../evil.safetensors": b"boom",
        "../../evil.json": b"boom",
    }


SHARD = "model-00001-of-00002.safetensors"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
