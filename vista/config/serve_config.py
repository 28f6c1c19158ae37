"""Configuration of `vista serve`."""

from __future__ import annotations

from dataclasses import dataclass

from vista.config.checks import MAX_THREADS, check_types, require, require_counts, require_finite
from vista.config.choices import OnMissing, Precision


@dataclass(kw_only=True, slots=True)
class ServeConfig:
    """Answer requests over HTTP from a model and a store, until SIGTERM or Ctrl-C."""

    model: str = "runs/vista/best"
    """Folder of the exported model. If another model is exported there, it goes into service once its summaries are
    published."""
    store: str = "stores/vista"
    """Folder of the summary store, or its URL, such as redis://host:6379/mine."""
    authentication_key_file: str | None = None
    """File with the key that authenticates records: 32 bytes, or 64 hex digits. null uses the environment variable
    VISTA_AUTHENTICATION_KEY, or no key if that is unset."""
    host: str = "127.0.0.1"
    """Address to listen on. The default accepts connections from this machine only; 0.0.0.0 accepts them from
    everywhere."""
    port: int = 8000
    """TCP port to listen on. 0 chooses a free port, which the log names."""
    token_file: str | None = None
    """File with the token that clients must send, as `Authorization: Bearer TOKEN`. null uses the environment variable
    VISTA_SERVE_TOKEN, or no token if that is unset."""
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
    max_body_bytes: int = 4 << 20
    """Largest body of a request. Larger ones get status 413."""
    max_candidates: int = 10_000
    """Maximum number of pairs of a user and a candidate per request. This does not limit rank without candidates."""
    max_users: int = 256
    """Maximum number of users per request."""
    stop_s: float = 10.0
    """Number of seconds that running requests have to finish after SIGTERM."""

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("port",), least=0, most=65_535)
        require_counts(self, "", ("workers", "scoring_threads"), most=MAX_THREADS)
        require_counts(self, "", ("num_threads",), least=0, most=MAX_THREADS)
        require_counts(self, "", ("max_waiting", "max_body_bytes", "max_candidates", "max_users"))
        require_finite(self, "", ("max_age_s", "reload_s", "deadline_s", "stop_s"), positive=True, most=1e6)
        require(bool(self.host), "host", "must be an address, such as 127.0.0.1 or 0.0.0.0")
