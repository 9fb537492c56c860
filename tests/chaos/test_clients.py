"""Two hundred clients of a real server, of which half vanish: the others notice nothing."""

from __future__ import annotations

import asyncio
import functools
import json
import random
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from census import nothing_left  # noqa: F401  # a fixture, found by being imported
from serving import Serving, request, serving

from gemma2_stream import ChatGemma2, Gemma2Engine

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("nothing_left")]

CLIENTS = 200
QUESTIONS = ("Hello", "你是谁", "What is a token?", "How do I stream?")
KINDS: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 3}]
MOMENTS = ("connected", "asking", "asked", "reading", "reading", "reading")


@dataclass
class Client:
    """One that asks, and stays or goes: at `moment`, after `events`, with a goodbye or without."""

    question: str
    kind: int
    tokens: int
    stream: bool
    moment: str | None
    events: int
    politely: bool

    @property
    def body(self) -> dict[str, Any]:
        messages = [{"role": "user", "content": self.question}]
        asked = {"model": "served", "messages": messages, "max_tokens": self.tokens}
        return {**asked, "stream": self.stream, **KINDS[self.kind]}

    async def stay(self, client: httpx.AsyncClient) -> str:
        """The whole answer."""
        async with client.stream("POST", "/v1/chat/completions", json=self.body) as answer:
            assert answer.status_code == 200
            if not self.stream:
                return str(json.loads(await answer.aread())["choices"][0]["message"]["content"])
            lines = [line async for line in answer.aiter_lines() if line]
        *events, done = [line.removeprefix("data: ") for line in lines]
        assert done == "[DONE]"
        choices = [json.loads(event)["choices"][0] for event in events]
        assert choices[-1]["finish_reason"] in ("stop", "length")
        return "".join(choice["delta"].get("content") or "" for choice in choices)

    async def vanish(self, address: tuple[str, int]) -> None:
        reader, writer = await asyncio.open_connection(*address)
        asked = request(json.dumps(self.body).encode())
        if self.moment != "connected":
            writer.write(asked[: len(asked) // 2] if self.moment == "asking" else asked)
            await writer.drain()
        if self.moment == "reading":
            for _ in range(self.events if self.stream else 0):
                await reader.readline()
        if not self.politely:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()


def drawn(seed: int) -> list[Client]:
    dice = random.Random(seed)
    goes = dice.sample([True, False] * (CLIENTS // 2), CLIENTS)
    return [
        Client(
            question=dice.choice(QUESTIONS),
            kind=dice.randrange(len(KINDS)),
            tokens=dice.choice([4, 25]),
            stream=dice.random() < 0.8,
            moment=dice.choice(MOMENTS) if going else None,
            events=dice.randint(1, 40),
            politely=dice.random() < 0.5,
        )
        for going in goes
    ]


def right_answers(engine: Gemma2Engine, clients: Iterable[Client]) -> list[str | None]:
    """The engine's own to those who stay."""

    @functools.cache
    def right(question: str, kind: int, tokens: int) -> str:
        chat = ChatGemma2(engine=engine, max_new_tokens=tokens, **KINDS[kind])
        return chat.invoke(question).text

    return [None if c.moment else right(c.question, c.kind, c.tokens) for c in clients]


async def all_at_once(clients: list[Client], server: Serving) -> list[str | None]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=100) as http:
        return await asyncio.gather(
            *(c.vanish(server.address) if c.moment else c.stay(http) for c in clients)
        )


@pytest.mark.parametrize("seed", [1])
def test_half_of_the_clients_vanish(seed: int, demo_engine: Gemma2Engine) -> None:
    clients = drawn(seed)
    expected = right_answers(demo_engine, clients)
    assert expected.count(None) == CLIENTS // 2
    with serving(demo_engine) as server:
        assert asyncio.run(all_at_once(clients, server)) == expected
        server.over()
        assert server.metric("requests_waiting") == server.metric("requests_answering") == 0
        asked = [line for line in server.said("/v1/chat/completions") if line["event"] == "request"]
        assert sum(line["status"] == 200 for line in asked) >= CLIENTS // 2
        assert not [line for line in server.said() if line["level"] == "error"]
        assert server.chat(max_tokens=5).status_code == 200
