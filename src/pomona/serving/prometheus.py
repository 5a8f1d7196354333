"""Metrics for Prometheus. Counts only: nothing of a photo or of a client."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics import Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0)
"""Upper bounds of the latency's buckets: an answer takes 4 to 10 ms and waits up to a second."""


class Metrics:
    """The service's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry, buckets=SECONDS)
        labels = ("route", "method", "status")
        self._requests = counter("pomona_requests", "Requests.", labels)
        self._seconds = histogram("pomona_request_seconds", "Time of a request.", ("route",))
        self._queue = gauge("pomona_queue_photos", "Photos that wait.")
        unanswered = "Photos and requests without an answer."
        self._rejected = counter("pomona_rejected", unanswered, ("code",))
        self._answers = counter("pomona_answers", "Photos that got this label.", ("label",))
        self._unknown = counter("pomona_unknown", "Photos of none of the labels.")
        self._model = gauge("pomona_model_info", "The model that answers.", ("version",))

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def rejected(self, code: str) -> None:
        """Count a request or a photo that got no answer."""
        self._rejected.labels(code).inc()

    def answers(self, rows: Iterable[dict[str, Any]]) -> None:
        """Count answers by label."""
        for row in rows:
            if row["error"] is not None:
                self.rejected(row["error"])
            elif row.get("unknown"):
                self._unknown.inc()
            elif label := row.get("label"):
                self._answers.labels(label).inc()

    def watch_queue(self, length: Callable[[], int]) -> None:
        """Call ``length`` for the queue's length whenever metrics are read."""
        self._queue.set_function(length)

    def model(self, version: str) -> None:
        """Set which model answers."""
        self._model.clear()
        self._model.labels(version).set(1)

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)
