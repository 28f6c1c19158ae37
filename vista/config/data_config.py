"""Configuration of the log that is read, its split, and the cutting of batches."""

from __future__ import annotations

from dataclasses import dataclass

from vista.config.checks import check_types, require, require_counts, require_finite
from vista.config.choices import (
    Counting,
    Split,
)

PLACES = ("path", "item_categories")
"""Keys of DataConfig that say where something lies: they may change, and belong into no table."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which log is read, how it is split, and how batches are cut from it."""

    path: str = "data/log"
    """Folder of the EventLog."""
    split: Split = Split.leave_last_out
    validation_from: str | None = None
    """split=time: ISO date or time (UTC), or integer milliseconds; labels from here on are not trained on."""
    test_from: str | None = None
    """split=time: labels from here on are test labels."""
    exclude_seen: bool = True
    """Whether validation and evaluation leave items of the visible history out of a ranking (but never the label):
    false where users come back to items."""
    item_categories: str | None = None
    """model.search=hard: Parquet or CSV file with a column `item` of ids and one of categories; read when training
    starts, and kept in the model."""
    category_column: str = "category"
    """Its column of categories."""
    chunk_len: int = 16384
    """Longest stretch of one history in one training batch, in events; longer ones are cut into several."""
    tokens_per_batch: int = 8192
    """Events a batch holds at most (a single longer chunk makes a batch of its own)."""
    label_spacing: int = 32
    """W: label positions that share one summary and one tail, hence the spacing of cuts. They see tail_len - W + 1 to
    tail_len events of the tail. Larger is faster."""
    windows_per_chunk: int = 0
    """Windows of W label positions drawn from a chunk a pass; 0 means all, so every event is a label once."""
    num_cuts: int = 2
    """Cuts a chunk a pass in bidirectional mixing (separable mixing has one every W events)."""
    staleness_events: float = 32.0
    """Mean extra age of a summary, in events, of the stale part of the windows: exponential, and then rounded up to
    whole windows of label_spacing."""
    staleness_share: float = 0.25
    """Share of the windows that read an older summary than their own. For separable mixing: in bidirectional mixing a
    window reads the newest of the chunk's few cuts, which is stale by itself."""
    unknown_share: float = 0.0
    """Share of the events whose item training shows as the unknown one: in histories, neither as a label nor as what is
    to be reconstructed. It keeps models from learning histories by heart, where passes are many. For vista, sasrec and
    hstu; refused by the others."""
    num_negatives: int = 1024
    """Negatives of the sampled softmax, shared by a batch."""
    negative_power: float = 0.0
    """Negatives are drawn in proportion to frequency ** power; 0 is uniform."""
    frequencies: Counting = Counting.exact
    """What negative_power and optim.logq_strength know of frequencies: exact counts, or a sketch of bounded size."""
    reconstruction_len: int = 64
    """Events of the window that the decoder reconstructs before a sampled cut."""

    def __post_init__(self) -> None:
        check_types(self, "data.")
        counts = ("chunk_len", "tokens_per_batch", "label_spacing", "num_cuts", "num_negatives", "reconstruction_len")
        require_counts(self, "data.", counts)
        require_counts(self, "data.", ("windows_per_chunk",), least=0)
        require_finite(self, "data.", ("staleness_events", "negative_power"))
        share = self.staleness_share
        require(0 <= share <= 1, "data.staleness_share", f"must lie in [0, 1], got {share}")
        share = self.unknown_share
        require(0 <= share < 1, "data.unknown_share", f"must lie in [0, 1), got {share}")
        in_time = self.split is Split.time
        message = (
            "is needed with data.split=time"
            if in_time
            else "is read with data.split=time alone; set that too, or this to null"
        )
        for key in ("validation_from", "test_from"):
            require((getattr(self, key) is not None) == in_time, f"data.{key}", message)
