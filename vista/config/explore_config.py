"""Configuration of `vista explore`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import check_types, require, require_counts


@dataclass(kw_only=True, slots=True)
class ExploreConfig:
    """A web page that shows users, rankings with explanations, the store, runs, and results."""

    model: str | None = None
    """Folder of the exported model. If model and store are null, the page shows the output of `make demo` in demo/."""
    store: str | None = None
    """Folder of the model's summary store, or its URL, such as redis://host:6379/mine."""
    data: str | None = None
    """Folder of the EventLog. null uses the log that the model was trained on, if it still exists."""
    runs: list[str] = field(default_factory=list)
    """Run folders to show under Training, or folders of run folders. An empty list shows the model's own run."""
    results: str = "docs/results"
    """Folder of result tables: files of `python -m scripts.experiments.reproduce` (.jsonl), and of `vista evaluate
    out=...` (.json)."""
    other_model: str | None = None
    """A second model, to compare with the first one. null compares stores of the same model."""
    other_store: str | None = None
    """The store of the second model, or another store of the first one, such as one that ends before the test labels.
    null reads the second model's summaries from `store`."""
    authentication_key_file: str | None = None
    """File with the key that authenticates records: 32 bytes, or 64 hex digits. null uses the environment variable
    VISTA_AUTHENTICATION_KEY, or no key if that is unset."""
    port: int = 8501
    """TCP port to listen on, for connections from this machine only. 0 chooses a free port, which the log names."""
    open_browser: bool = True
    """Open the page in a browser, if this machine has one and a display."""

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("port",), least=0, most=65_535)
        both = (self.model is None) == (self.store is None)
        require(both, "model, store", "name both, since a store belongs to the model that wrote it, or neither")
