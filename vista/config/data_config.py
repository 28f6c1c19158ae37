"""Configuration of the data: the log, its split, and how batches are made."""

from __future__ import annotations

from dataclasses import dataclass

from vista.config.checks import (
    MAX_DAYS,
    check_types,
    require,
    require_counts,
    require_finite,
    require_only_with,
    require_share,
)
from vista.config.choices import Counting, Split
from vista.errors import shown

PLACES = ("path", "item_categories")
"""Keys of DataConfig that name a path. They may change between runs and are left out of result tables."""
MAX_HORIZON_EVENTS = 2**16


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which log is read, how it is split, and how batches are made from it."""

    path: str = "data/log"
    """Folder of the EventLog."""
    split: Split = Split.leave_last_out
    """Which labels are test labels: each user's last event, with the one before for validation (leave-last-out), all
    from a given time on (time), or the last share of each user's events, with the share before it for validation
    (share)."""
    validation_from: str | None = None
    """With split=time: labels from this time on are not used for training. ISO date or time (UTC), or integer
    milliseconds. The same time as test_from trains on all events before the test labels. null with any other split."""
    test_from: str | None = None
    """With split=time: labels from this time on are test labels. ISO date or time (UTC), or integer milliseconds. null
    with any other split."""
    gap_minutes: float = 0.0
    """With split=time: number of minutes before the validation labels, and before the test labels, whose events are
    left out: they are not labels, and no model or summary sees them. With impressions, it needs
    optim.task_weight=0."""
    refresh_days: float = 0.0
    """With split=time, for impressions: number of days between two refreshes of the store. Each impression is then
    validated with the summaries of the last refresh before it; the first refresh is just before the validation labels.
    Each refresh costs one pass over the histories per validation. 0 means a single refresh."""
    validation_share: float | None = None
    """With split=share: share of each user's events, in [0, 1), that are validation labels. They come just before the
    test labels. 0 trains on all events before the test labels. null with any other split."""
    test_share: float | None = None
    """With split=share: share of each user's events, in (0, 1), that are test labels: the newest ones, rounded up to
    whole events. null with any other split."""
    exclude_seen: bool | None = None
    """Whether validation and evaluation exclude items of the visible history from rankings (never the label). null
    follows the log: false if users return to items, which is if at least 1 % of the training events repeat an item that
    the user had before."""
    min_item_events: int = 0
    """Number of training events that an item needs to have a row of its own in the model. Other items are unknown to
    the model, both in training and in serving. With init_from, the items of the earlier model keep their rows. 0 gives
    all items of the log a row. Must be 0 with stage=downstream, which has the items of its base."""
    item_categories: str | None = None
    """With model.search=hard: Parquet or CSV file with a column `item` of ids and a column of categories. It is read
    when training starts and kept in the model. null reads the log's item features; null with any other search."""
    category_column: str = "category"
    """With model.search=hard: name of the column of categories in item_categories, or among the log's item features."""
    chunk_len: int = 16384
    """Maximum length, in events, of a stretch of one history in a training batch. Longer histories are cut into several
    chunks."""
    tokens_per_batch: int | None = None
    """Maximum number of events in a batch. A longer chunk is a batch by itself. null: the power of two from
    512 to 8,192 that makes about 400 batches per epoch, or 200 with model.counters."""
    label_spacing: int = 32
    """Window length W: the number of label positions that share one summary and one tail. These positions see between
    tail_len - W + 1 and tail_len events of the tail. Larger is faster."""
    windows_per_chunk: int = 0
    """Number of windows of label_spacing positions that are drawn from each chunk per epoch. Those with questions
    (anchor_spacing) are added. 0 uses all windows, so every event is a label once per epoch; with counters, only
    windows with questions are used."""
    num_cuts: int = 2
    """Number of cuts per chunk and epoch in bidirectional mixing. Separable mixing has a cut every label_spacing
    events."""
    staleness_events: float = 32.0
    """Mean extra age, in events, of the summaries that stale windows read. It is drawn from an exponential distribution
    and rounded up to whole windows."""
    staleness_share: float = 0.25
    """Share of windows, in [0, 1], that read an older summary than their own. Applies to separable mixing; in
    bidirectional mixing a window reads the newest of its chunk's few cuts, which is stale anyway."""
    unknown_share: float = 0.0
    """Share of history events, in [0, 1), whose item is shown as unknown in training; labels and reconstruction targets
    are not affected. It reduces overfitting over many epochs. Applies to vista, sasrec, hstu, and fuxi_linear; must
    be 0 for the others."""
    horizon_events: int = 50
    """With optim.window_weight above 0: number of events after a question whose items are its labels."""
    horizon_days: float = 0.0
    """With optim.window_weight above 0: number of days after a question; only items of events within it are labels, and
    of these events only the first horizon_events. 0 means no limit in time."""
    anchor_spacing: int = 16
    """With optim.window_weight above 0 or model.counters: number of label positions per question. A chunk has one
    question per this many positions, rounded up. With split=time they are uniform in time, otherwise in position."""
    num_negatives: int | None = None
    """Number of negatives of the sampled softmax, shared by all labels of a batch. null: all items of the log, which is
    the exact softmax, but at most 4,096."""
    negative_power: float = 0.0
    """Negatives are drawn with probability proportional to item frequency to this power. 0 draws uniformly."""
    frequencies: Counting = Counting.exact
    """How item frequencies are counted for negative_power, optim.logq_strength, model.counters, and model.popularity:
    exact counts, or a count-min sketch of fixed size."""
    reconstruction_len: int = 64
    """Number of events before a sampled cut that the decoder reconstructs."""

    def __post_init__(self) -> None:
        check_types(self, "data.")
        counts = ("chunk_len", "tokens_per_batch", "label_spacing", "num_cuts", "num_negatives", "reconstruction_len")
        require_counts(self, "data.", (*counts, "anchor_spacing"))
        require_counts(self, "data.", ("windows_per_chunk", "min_item_events"), least=0)
        require_counts(self, "data.", ("horizon_events",), most=MAX_HORIZON_EVENTS)
        require_finite(self, "data.", ("staleness_events", "negative_power"))
        require_finite(self, "data.", ("horizon_days", "refresh_days"), most=MAX_DAYS)
        require_finite(self, "data.", ("gap_minutes",), most=MAX_DAYS * 24 * 60)
        is_timed = self.split is Split.time
        for key in ("gap_minutes", "refresh_days"):
            require(is_timed or not getattr(self, key), f"data.{key}", "only applies with data.split=time; set that")
        require_share(self, "data.", ("staleness_share",))
        require_share(self, "data.", ("unknown_share",), below_one=True)
        for key in ("validation_from", "test_from"):
            require_only_with(getattr(self, key) is not None, is_timed, f"data.{key}", "data.split=time")
        self._check_shares()

    def _check_shares(self) -> None:
        total = 0.0
        for key, may_be_zero in (("validation_share", True), ("test_share", False)):
            share = getattr(self, key)
            require_only_with(share is not None, self.split is Split.share, f"data.{key}", "data.split=share")
            if share is not None:
                good = 0 < share < 1 or (may_be_zero and share == 0)
                interval = "[0, 1)" if may_be_zero else "(0, 1)"
                require(good, f"data.{key}", f"must lie in {interval}, got {shown(share)}")
                total += share
        require(
            total < 1, "data.test_share", f"must leave events to train on, but both shares sum to {total:g}; lower one"
        )
