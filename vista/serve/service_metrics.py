"""What the service counts, in Prometheus' format (`docs/guides/serve.md` lists the names)."""

from __future__ import annotations

import os

from vista.scorer import Scorer
from vista.scorer.scorer_stats import ScorerStats
from vista.serve.serve_extra import prometheus_client
from vista.serve.shared_numbers import FOLDER_VARIABLE

SIZES = (0, 10, 100, 500, 1000, 5000, 10_000)
"""Upper bounds of the label `candidates`."""
MILLISECONDS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 100, 200, 500, 1000, 2000)
"""Upper bounds of the histogram's buckets."""
OUTCOMES = {"hits": "hit", "misses": "miss", "stale": "stale", "bad_users": "damaged"}


class ServiceMetrics:
    """The numbers of one worker. With several workers, each scrape gives those of all.

    Args:
        before: what the scorer counted before the first request.
    """

    def __init__(self, before: ScorerStats) -> None:
        # Without a registry of its own, a second service in one process would find the names taken.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = own = prometheus_client.CollectorRegistry()
        self.seconds = prometheus_client.Histogram(
            "vista_request_seconds",
            "Time from the headers of a request to its answer, by number of candidates.",
            ("endpoint", "candidates"),
            buckets=[bound / 1000 for bound in MILLISECONDS],
            registry=own,
        )
        self.requests = prometheus_client.Counter(
            "vista_requests", "Requests by status.", ("endpoint", "status"), registry=own
        )
        self.users = prometheus_client.Counter(
            "vista_users", "Users by what the store holds of them.", ("outcome",), registry=own
        )
        self.candidates = prometheus_client.Counter(
            "vista_candidates", "Pairs of a user and a candidate.", registry=own
        )
        self.unknown = prometheus_client.Counter(
            "vista_unknown_candidates", "Pairs whose item the model does not know.", registry=own
        )
        self.reloads = prometheus_client.Counter(
            "vista_reloads", "Moves to another generation or model, and failures.", ("outcome",), registry=own
        )
        self.depth = prometheus_client.Gauge(
            "vista_queue_depth",
            "Requests that wait or are computed.",
            registry=own,
            multiprocess_mode="livesum",
        )
        self.generation = prometheus_client.Gauge(
            "vista_generation",
            "Generation of the store in service; the oldest of all workers.",
            registry=own,
            multiprocess_mode="livemin",
        )
        self.refreshed = prometheus_client.Gauge(
            "vista_refreshed_timestamp_seconds",
            "When the summaries in service were refreshed; the oldest of all workers.",
            registry=own,
            multiprocess_mode="livemin",
        )
        self._last = before
        if FOLDER_VARIABLE not in os.environ:
            prometheus_client.ProcessCollector(registry=own)
            prometheus_client.GCCollector(registry=own)

    def answered(self, endpoint: str, status: int, seconds: float, num_candidates: int) -> None:
        """Count a request."""
        self.requests.labels(endpoint, str(status)).inc()
        self.seconds.labels(endpoint, _size(num_candidates)).observe(seconds)

    def update(self, scorer: Scorer, depth: int) -> None:
        """Take over what the scorer has counted since the last call."""
        stats, manifest = scorer.stats(), scorer.manifest
        last, self._last = self._last, stats
        for name, outcome in OUTCOMES.items():
            self.users.labels(outcome).inc(getattr(stats, name) - getattr(last, name))
        self.candidates.inc(stats.candidates - last.candidates)
        self.unknown.inc(stats.unknown_candidates - last.unknown_candidates)
        self.reloads.labels("moved").inc(stats.reloads - last.reloads)
        self.reloads.labels("failed").inc(stats.failed_reloads - last.failed_reloads)
        self.depth.set(depth)
        self.generation.set(manifest.generation)
        self.refreshed.set(manifest.refreshed_at / 1000)

    def page(self) -> bytes:
        """All numbers as text; of all workers, if there are several."""
        registry = self._registry
        if FOLDER_VARIABLE in os.environ:
            registry = prometheus_client.CollectorRegistry()
            prometheus_client.multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return prometheus_client.generate_latest(registry)


def _size(num_candidates: int) -> str:
    """The bound of the smallest bucket that holds a request."""
    return next((str(bound) for bound in SIZES if num_candidates <= bound), "more")
