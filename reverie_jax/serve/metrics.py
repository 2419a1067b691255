"""What the endpoint counts, in Prometheus' text format."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE

__all__ = ["CONTENT_TYPE", "Metrics"]

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server; each has a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        own: Any = {"registry": self._registry}
        self.requests = Counter("reverie_requests", "Responses by path and HTTP status.", ["path", "status"], **own)
        self.in_flight = Gauge("reverie_requests_in_flight", "Chat completions that are prepared, wait or run.", **own)
        self.waiting = Gauge("reverie_answers_waiting", "Answers that wait for a batch.", **own)
        self.prompt_tokens = Counter("reverie_prompt_tokens", "Tokens of all prompts, one by one.", **own)
        self.prefilled_tokens = Counter(
            "reverie_prefilled_tokens", "Tokens that were prefilled: prompts share what they begin with.", **own
        )
        self.completion_tokens = Counter("reverie_completion_tokens", "Tokens of all answers.", **own)
        self.batch_answers = Histogram(
            "reverie_batch_answers", "Answers in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256), **own
        )
        self.first_token = Histogram(
            "reverie_first_token_seconds", "Time from a request's arrival to its first token.", buckets=_SECONDS, **own
        )
        self.answer = Histogram(
            "reverie_answer_seconds", "Time from a request's arrival to the end of an answer.", buckets=_SECONDS, **own
        )

    def text(self) -> bytes:
        """Return all metrics as Prometheus reads them."""
        return generate_latest(self._registry)
