"""What `/metrics` says, in a registry of its own."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from nabla_fast.server.engine import Engine

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
# Counter of the engine → what it counts.
_COUNTED = {
    "generated_tokens": "Tokens sampled in rollouts, whether kept or not.",
    "committed_tokens": "Tokens of answers that will not change any more.",
    "model_calls": "The paper's count: one per sampled token, four per gradient, one per reward.",
    "gradient_evaluations": "Forward and backward passes over both models.",
    "reward_calls": "Answers and prefixes that were scored.",
    "rollouts": "Trajectories drawn.",
    "rejections": "Proposals whose reward was not higher.",
    "cache_hits": "Look-ups in the gradient cache that found an entry.",
    "cache_misses": "Look-ups in the gradient cache that found none.",
}


class Metrics:
    """Counters and histograms of the routes, and the engine's own numbers as they are when somebody asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._registry = engine, CollectorRegistry()
        registry = self._registry
        labels = ("route", "method", "status")
        self.requests = Counter("nabla_fast_requests", "HTTP requests.", labels, registry=registry)
        self.seconds = Histogram(
            "nabla_fast_request_seconds",
            "Until the end of the answer.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "nabla_fast_time_to_first_token_seconds", "Until a token is committed.", buckets=_SECONDS, registry=registry
        )
        self.cancelled = Counter("nabla_fast_cancelled_requests", "Requests whose client left.", registry=registry)
        self.timeouts = Counter("nabla_fast_timed_out_requests", "Requests that took too long.", registry=registry)
        registry.register(self)

    def text(self) -> bytes:
        """All of them in the text format of Prometheus."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The engine's own numbers, for the registry."""
        engine = self._engine
        yield GaugeMetricFamily("nabla_fast_requests_waiting", "Requests that wait for room.", engine.waiting)
        yield GaugeMetricFamily("nabla_fast_sequences_running", "Sequences that are decoded.", engine.running)
        yield GaugeMetricFamily("nabla_fast_batches_running", "Batches of equal settings.", engine.batches)
        yield GaugeMetricFamily("nabla_fast_engine_up", "1 while requests are decoded.", float(engine.alive))
        for name, text in _COUNTED.items():
            yield CounterMetricFamily(f"nabla_fast_{name}", text, engine.totals[name])
