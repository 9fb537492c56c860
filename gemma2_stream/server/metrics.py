"""What `/metrics` tells, in a registry of the server's own."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..types import Usage

# Seconds: from a cached prefix on a GPU to a long prompt on a laptop.
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ours: dict[str, Any] = {"namespace": "gemma2_stream", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered", ["path", "status"], **ours)
        self.prompt = Counter("prompt_tokens", "Tokens read", **ours)
        self.cached = Counter("cached_tokens", "Tokens read that cost no prefill", **ours)
        self.completion = Counter("completion_tokens", "Tokens written", **ours)
        self.waiting = Gauge("requests_waiting", "Requests without a first token yet", **ours)
        self.answering = Gauge("requests_answering", "Requests being answered", **ours)
        self.first_token = Histogram(
            "time_to_first_token_seconds", "Until the first token", buckets=_SECONDS, **ours
        )
        self.seconds = Histogram(
            "request_seconds", "Until the end of an answer", buckets=_SECONDS, **ours
        )


@dataclass(slots=True)
class Record:
    """One request as the log and the metrics see it: no text of prompt or answer."""

    metrics: Metrics
    began: float = field(default_factory=time.monotonic)
    status: int = 0
    path: str = "other"
    first_token: float | None = None
    usage: dict[str, int] = field(default_factory=dict)
    finish_reasons: list[str | None] = field(default_factory=list)
    error: str | None = None
    _waits: bool = False
    _answers: bool = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def submitted(self) -> None:
        self._waits = True
        self.metrics.waiting.inc()

    def begun(self) -> None:
        """The first token has come."""
        self._stop_waiting()
        self._answers = True
        self.metrics.answering.inc()
        self.first_token = self.seconds
        self.metrics.first_token.observe(self.first_token)

    def count(self, usage: Usage) -> None:
        """One row is over."""
        for name in ("prompt", "completion", "cached"):
            tokens = getattr(usage, f"{name}_tokens")
            getattr(self.metrics, name).inc(tokens)
            self.usage[f"{name}_tokens"] = self.usage.get(f"{name}_tokens", 0) + tokens

    def end(self) -> None:
        self._stop_waiting()
        if self._answers:
            self.metrics.answering.dec()
            self.metrics.seconds.observe(self.seconds)
        self.metrics.requests.labels(self.path, str(self.status)).inc()

    def _stop_waiting(self) -> None:
        if self._waits:
            self._waits = False
            self.metrics.waiting.dec()

    def log(self) -> dict[str, object]:
        """What the access log says."""
        first = self.first_token
        said = {
            "status": self.status,
            "seconds": round(self.seconds, 4),
            "first_token_seconds": None if first is None else round(first, 4),
            **self.usage,
            "finish_reasons": self.finish_reasons or None,
            "error": self.error,
        }
        return {name: value for name, value in said.items() if value is not None}
