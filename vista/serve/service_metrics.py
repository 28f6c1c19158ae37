"""What the service counts, in Prometheus' format (`docs/guides/serve.md` lists the names)."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import prometheus_client
import prometheus_client.multiprocess

from vista.scorer import Scorer, ScorerStats
from vista.serve.shared import FOLDER_VARIABLE

SIZES = (0, 10, 100, 500, 1000, 5000, 10_000)
"""Upper bounds of the label `candidates`."""
MILLISECONDS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 100, 200, 500, 1000, 2000)
"""Upper bounds of the histogram's buckets."""
OUTCOMES = {"hits": "hit", "misses": "miss", "stale": "stale", "damaged": "damaged"}


class ServiceMetrics:
    """The metrics of one worker. With several workers, each scrape returns the metrics of all. Thread-safe."""

    def __init__(self) -> None:
        # Without a registry of its own, a second service in one process would find the names taken.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = own = prometheus_client.CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> prometheus_client.Counter:
            return prometheus_client.Counter(name, text, labels, registry=own)

        def gauge(name: str, text: str, *labels: str, mode: Literal["livesum", "livemin"]) -> prometheus_client.Gauge:
            return prometheus_client.Gauge(name, text, labels, registry=own, multiprocess_mode=mode)

        self.seconds = prometheus_client.Histogram(
            "vista_request_seconds",
            "Time from the headers of a request to its answer, by number of candidates.",
            ("endpoint", "model", "candidates"),
            buckets=[bound / 1000 for bound in MILLISECONDS],
            registry=own,
        )
        self.requests = counter("vista_requests", "Requests by status.", "endpoint", "model", "status")
        self.users = counter("vista_users", "Users by whether the store holds a record of them.", "model", "outcome")
        self.candidates = counter("vista_candidates", "Pairs of a user and a candidate.", "model")
        self.unknown = counter("vista_unknown_candidates", "Pairs whose item the model does not know.", "model")
        self.reloads = counter(
            "vista_reloads", "Moves to another generation or model, and failures.", "model", "outcome"
        )
        self.openings = counter("vista_model_openings", "Attempts to open a model, by outcome.", "model", "outcome")
        self.open = gauge("vista_model_open", "Workers in which the model is open.", "model", mode="livesum")
        self.shadowed = counter(
            "vista_shadow_requests", "Requests that were offered to the challenger, by outcome.", "outcome"
        )
        self.refused_connections = counter("vista_refused_connections", "Connections beyond the limit.")
        self.depth = gauge("vista_queue_depth", "Requests that wait or are computed.", mode="livesum")
        self.generation = gauge(
            "vista_generation",
            "Generation of the store in service; the oldest of all workers.",
            "model",
            mode="livemin",
        )
        self.refreshed = gauge(
            "vista_refreshed_timestamp_seconds",
            "When the summaries in service were refreshed; the oldest of all workers.",
            "model",
            mode="livemin",
        )
        self._last: dict[str, ScorerStats] = {}
        """Counts of the scorer at the last update, by name of the open model."""
        self._lock = threading.Lock()
        if FOLDER_VARIABLE not in os.environ:
            prometheus_client.ProcessCollector(registry=own)
            prometheus_client.GCCollector(registry=own)

    def answered(self, endpoint: str, model: str, status: int, seconds: float, num_candidates: int) -> None:
        """Count a request; `model` is empty if the request was refused before a model was chosen."""
        self.requests.labels(endpoint, model, str(status)).inc()
        self.seconds.labels(endpoint, model, _size(num_candidates)).observe(seconds)

    def refused(self, status: int) -> None:
        """Count a request that was refused before it reached an endpoint."""
        self.requests.labels("", "", str(status)).inc()

    def opened(self, model: str, scorer: Scorer) -> None:
        """A model was opened. The counts of its scorer up to now are ignored."""
        with self._lock:
            self._last[model] = scorer.stats()
        self.openings.labels(model, "opened").inc()
        self.open.labels(model).set(1)

    def failed(self, model: str) -> None:
        """A model could not be opened."""
        self.openings.labels(model, "failed").inc()

    def update(self, scorers: Mapping[str, Scorer], depth: int) -> None:
        """Take over what the scorers of open models have counted since the last call."""
        self.depth.set(depth)
        for model, scorer in scorers.items():
            self._count(model, scorer)
            manifest = scorer.manifest
            self.generation.labels(model).set(manifest.generation)
            self.refreshed.labels(model).set(manifest.refreshed_at / 1000)

    def _count(self, model: str, scorer: Scorer) -> None:
        with self._lock:
            stats, last = scorer.stats(), self._last[model]
            self._last[model] = stats
        for name, outcome in OUTCOMES.items():
            self.users.labels(model, outcome).inc(getattr(stats, name) - getattr(last, name))
        self.candidates.labels(model).inc(stats.candidates - last.candidates)
        self.unknown.labels(model).inc(stats.unknown_candidates - last.unknown_candidates)
        self.reloads.labels(model, "moved").inc(stats.reloads - last.reloads)
        self.reloads.labels(model, "failed").inc(stats.failed_reloads - last.failed_reloads)

    def page(self) -> bytes:
        """All numbers as text; of all workers, if there are several."""
        registry = self._registry
        if (folder := os.environ.get(FOLDER_VARIABLE)) is not None:
            registry = prometheus_client.CollectorRegistry()
            registry.register(_AllWorkers(Path(folder)))
        return prometheus_client.generate_latest(registry)


class _AllWorkers(prometheus_client.registry.Collector):
    """The sums of what the workers have written into a folder.

    `MultiProcessCollector` fails on a file without content: a worker that starts creates its files before it fills
    them, and one that is killed in between leaves them empty for good.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[prometheus_client.Metric]:
        """What prometheus_client asks of a collector."""
        files = [str(path) for path in self._folder.glob("*.db") if _num_bytes(path)]
        return prometheus_client.multiprocess.MultiProcessCollector.merge(files)  # type: ignore[no-any-return, no-untyped-call]


def _num_bytes(path: Path) -> int:
    """The size of a file; 0 if it was removed, as those of workers that ended are."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _size(num_candidates: int) -> str:
    """The bound of the smallest bucket that holds a request."""
    return next((str(bound) for bound in SIZES if num_candidates <= bound), "more")
