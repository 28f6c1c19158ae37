"""Configuration of `vista serve`."""

from __future__ import annotations

from dataclasses import dataclass

from vista.config.checks import MAX_THREADS, check_types, require, require_counts, require_finite
from vista.config.choices import OnMissing, Precision

OF_ONE_MODEL = {
    "model": "runs/vista/best",
    "store": "stores/vista",
    "index": None,
    "task": None,
    "project_per_request": False,
}
"""Keys that a file of several models can set for each model, and their defaults."""


@dataclass(kw_only=True, slots=True)
class ServeConfig:
    """Answer requests over HTTP from a model and a store, until SIGTERM or Ctrl-C."""

    model: str = "runs/vista/best"
    """Folder of the exported model. If another model is exported there, it goes into service once its summaries are
    published."""
    store: str = "stores/vista"
    """Folder of the summary store, or its URL, such as redis://host:6379/mine."""
    index: str | None = None
    """Folder of the index that `vista index` wrote for this model, for /v1/retrieve. null serves without an index."""
    models: str | None = None
    """YAML file that names several models with their stores, and how users are split among them. It replaces model,
    store, index, task, and project_per_request."""
    authentication_key_file: str | None = None
    """File with the key that authenticates records: 32 bytes, or 64 hex digits. null uses the environment variable
    VISTA_AUTHENTICATION_KEY, or no key if that is unset."""
    host: str = "127.0.0.1"
    """Address to listen on. The default accepts connections from this machine only; 0.0.0.0 accepts them from
    everywhere."""
    port: int = 8000
    """TCP port to listen on. 0 chooses a free port, which the log names."""
    token_file: str | None = None
    """File with the token that clients must send, as `Authorization: Bearer TOKEN`; each line of the file is a valid
    token. null uses the environment variable VISTA_SERVE_TOKEN, or no token if that is unset."""
    workers: int = 1
    """Number of processes that share the port, at most one per core. A worker that dies is replaced."""
    task: str | None = None
    """Task that score and rank use. null uses the first labeled task, or next if there are none."""
    on_missing: OnMissing = OnMissing.empty
    """What an unknown user or item gets: the summary of an empty history (empty), a null score (nan), or an error with
    status 404 (raise)."""
    max_age_s: float | None = None
    """Treat users as unknown if both their record and the last refresh of the store are older than this, in seconds.
    null sets no limit."""
    project_per_request: bool = False
    """Compute projections of candidates in each request instead of mapping the exported ones. This needs less memory,
    but more time."""
    precision: Precision = Precision.float32
    """Data type of matrix products: float32, bfloat16, or auto."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N. auto uses a GPU if there is one."""
    num_threads: int = 1
    """Number of torch's CPU threads per worker."""
    scoring_threads: int = 1
    """Number of requests that a worker computes at the same time. More than one helps if requests wait for a store on
    another machine."""
    reload_s: float = 30.0
    """Number of seconds between checks for a new generation of the store and a new model."""
    deadline_s: float = 1.0
    """Number of seconds after which a request gets status 504. A client can ask for less with the header
    Vista-Timeout-Ms."""
    max_waiting: int = 64
    """Maximum number of requests per worker that are waiting or being computed. Further ones get status 429."""
    max_connections: int = 500
    """Maximum number of open connections per worker. Further ones get status 503. Each connection needs a file
    descriptor (`ulimit -n`)."""
    max_body_bytes: int = 4 << 20
    """Maximum size of the body of a request. Larger requests get status 413. The bodies of all unanswered requests of a
    worker can take 16 times as much; beyond that, requests get status 429."""
    max_candidates: int = 10_000
    """Maximum number of pairs of a user and a candidate per request. If the model has more items, requests to rank must
    name candidates; use retrieve to search the whole catalog."""
    max_users: int = 256
    """Maximum number of users per request."""
    stop_s: float = 10.0
    """Number of seconds that running requests have to finish after SIGTERM."""

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("port",), least=0, most=65_535)
        require_counts(self, "", ("workers", "scoring_threads"), most=MAX_THREADS)
        require_counts(self, "", ("num_threads",), least=0, most=MAX_THREADS)
        require_counts(self, "", ("max_waiting", "max_connections", "max_body_bytes"))
        require_counts(self, "", ("max_candidates", "max_users"))
        require_finite(self, "", ("max_age_s", "reload_s", "deadline_s", "stop_s"), positive=True, most=1e6)
        for key, default in OF_ONE_MODEL.items():
            require(
                self.models is None or getattr(self, key) == default,
                key,
                f"only applies without models={self.models}; leave it out, or set it in that file",
            )
        require(bool(self.host), "host", "must be an address, such as 127.0.0.1 or 0.0.0.0")
