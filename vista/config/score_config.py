"""Configuration of `vista score`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import MAX_THREADS, check_types, require, require_counts
from vista.config.choices import OnMissing


@dataclass(kw_only=True, slots=True)
class ScoreConfig:
    """Score candidates for users, rank the whole catalog for them, or retrieve from it."""

    model: str = "runs/vista/best"
    """Folder of the exported model."""
    store: str = "stores/vista"
    """Folder of the summary store, or its URL, such as redis://host:6379/mine."""
    authentication_key_file: str | None = None
    """File with the key that authenticates records: 32 bytes, or 64 hex digits. null uses the environment variable
    VISTA_AUTHENTICATION_KEY, or no key if that is unset."""
    users: list[str] = field(default_factory=list)
    """Ids of the users, at least one."""
    candidates: list[str] = field(default_factory=list)
    """Ids of the items to score. Empty ranks the whole catalog."""
    retrieve: bool = False
    """Rank the candidates that an index finds, instead of the whole catalog."""
    index: str | None = None
    """Folder of the index. null uses the default of `vista index`: the model's folder with .index appended."""
    top_k: int = 10
    """Number of items to list per user if no candidates are given."""
    now: str | None = None
    """Time of the request: ISO date or time (UTC), or integer milliseconds. null if it is unknown."""
    request: list[str] = field(default_factory=list)
    """Features of the request or of the users, each written as name:value, such as [device:phone,hour:14]. If a value
    differs between candidates, give the name once per candidate, in their order, such as [price:2.99,price:3.49].
    Request features that you leave out are treated as missing."""
    on_missing: OnMissing = OnMissing.empty
    """What an unknown user or item gets: the summary of an empty history (empty), NaN scores (nan), or an error
    (raise)."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N. auto uses a GPU if there is one."""
    num_threads: int = 0
    """Number of CPU threads. 0 leaves the choice to PyTorch."""

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("top_k",))
        require(not self.retrieve or not self.candidates, "candidates", "must be empty with retrieve=true")
        require(self.retrieve or self.index is None, "index", "needs retrieve=true")
        require_counts(self, "", ("num_threads",), least=0, most=MAX_THREADS)
