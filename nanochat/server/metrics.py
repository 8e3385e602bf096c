"""What Prometheus reads at /metrics. Each application has a registry of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from nanochat.server.pool import Pool

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    def __init__(self, pool: Pool) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "nanochat_requests", "HTTP requests", ["path", "method", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter("nanochat_prompt_tokens", "Tokens read", registry=self.registry)
        self.generated_tokens = Counter("nanochat_generated_tokens", "Tokens written", registry=self.registry)
        self.first_token = Histogram(
            "nanochat_time_to_first_token_seconds",
            "From the request to its first token",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.per_token = Histogram(
            "nanochat_time_per_token_seconds",
            "Mean over an answer's tokens after the first",
            buckets=TOKEN_SECONDS,
            registry=self.registry,
        )
        self.registry.register(_Gauges(pool))


class _Gauges(Collector):
    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def collect(self) -> Iterator[GaugeMetricFamily]:
        stats = self.pool.stats()
        yield GaugeMetricFamily("nanochat_running", "Answers that an engine has", stats["running"])
        yield GaugeMetricFamily("nanochat_waiting", "Answers in the queue", stats["waiting"])
        yield GaugeMetricFamily("nanochat_open_requests", "Requests not wholly answered", stats["open_requests"])
