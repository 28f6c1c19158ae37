"""A training batch: packed events, the cuts at which summaries are read, and windows of label positions.

Letters: B chunks, T packed events, NS segments between cuts, NC cuts, NW windows, W positions per window, L tail
length, I impressions per window, C columns and D dense inputs of features, J negatives, NA anchors, P labels and S
counted items per anchor, G fields of counters, F values per key, NR reconstructed stretches, R distinct item rows, S
seeds of stored summaries, M model dim.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Part = TypeVar("Part", bound="DataclassInstance")


@dataclass(frozen=True, slots=True)
class BatchEvents:
    """The events of all chunks, end to end, oldest first within a chunk."""

    item: Tensor
    """int64 [T] indices into `Batch.rows`."""
    action: Tensor
    """int64 [T]."""
    rating: Tensor | None
    """float32 [T]."""
    gap: Tensor
    """int64 [T] log buckets of the time since the event before."""
    clock: Tensor
    """int64 [T] milliseconds or positions that decay is measured by."""
    offsets: Tensor
    """int64 [B+1]: chunk i holds the events [offsets[i], offsets[i+1])."""
    hidden: Tensor | None
    """bool [T]: True where training shows the event's item as unknown (`data.unknown_share`); None hides no item."""
    entry: Tensor | None = None
    """int64 [T, C], like `dense` from `RowFeatureReader.encode`: features of the events. None without them."""
    dense: Tensor | None = None
    """float32 [T, D]."""


@dataclass(frozen=True, slots=True)
class BatchCuts:
    """The cuts at which summaries are read. A batch with stored summaries has no cuts."""

    segment_offsets: Tensor
    """int64 [NS+1]: the packed events between consecutive cuts."""
    chunk_offsets: Tensor
    """int64 [B+1]: chunk i holds the segments [chunk_offsets[i], chunk_offsets[i+1])."""
    segment: Tensor
    """int64 [NC]: the segment that ends at the cut; -1 is the cut before a chunk's first event."""
    start: Tensor
    """int64 [NC]: packed index of the first event that the cut's summary covers."""
    stop: Tensor
    """int64 [NC]: packed index after the last one."""


@dataclass(frozen=True, slots=True)
class BatchUsers:
    """Features of the chunks' users, from `RowFeatureReader.encode`."""

    entry: Tensor
    """int64 [B, C]."""
    dense: Tensor
    """float32 [B, D]."""


@dataclass(frozen=True, slots=True)
class BatchWindows:
    """What each window of label positions reads."""

    chunk: Tensor
    """int64 [NW]."""
    cut: Tensor
    """int64 [NW]: the cut whose summary the window reads; with stored summaries, the chunk."""
    tail_index: Tensor
    """int64 [NW, L] packed events, oldest first, right-aligned; -1 before the chunk's first event, and after its last
    one."""


@dataclass(frozen=True, slots=True)
class BatchLabels:
    """The next item at each position of each window."""

    item: Tensor
    """int64 [NW, W] indices into `Batch.rows`; -1 where a position has no label."""
    gap: Tensor
    """int64 [NW, W] log buckets of the time from the newest visible event to the label."""


@dataclass(frozen=True, slots=True)
class BatchNegatives:
    """Negatives that all labels of the batch share."""

    item: Tensor
    """int64 [J] indices into `Batch.rows`, sorted."""
    log_weight: Tensor
    """float32 [J]: log of (times drawn / (draws * probability)), the logQ correction."""


@dataclass(frozen=True, slots=True)
class BatchImpressions:
    """Labeled impressions of each window, padded to the window with the most."""

    item: Tensor
    """int64 [NW, I] indices into `Batch.rows`; padding has an empty mask."""
    position: Tensor
    """int64 [NW, I] position in the window, 0..W-1."""
    gap: Tensor
    """int64 [NW, I] log buckets of the time from the newest visible event to the impression."""
    label: Tensor
    """float32 [NW, I, num_tasks]."""
    mask: Tensor
    """bool [NW, I, num_tasks]: True where a task's label is known."""
    codes: Tensor | None = None
    """uint8 [NW, I, G * F + 1] from `UserCounters.of_pairs`: the user's counters of each item and of its categories, 0
    where they are not counted. None without counters."""
    entry: Tensor | None = None
    """int64 [NW, I, C], like `dense` from `RowFeatureReader.encode`: features of the requests. None without them."""
    dense: Tensor | None = None
    """float32 [NW, I, D]."""


@dataclass(frozen=True, slots=True)
class BatchCounters:
    """Counted items of anchors."""

    item: Tensor
    """int64 [NA, S] indices into `Batch.rows`, distinct within an anchor; -1 pads. S is at least 1."""
    codes: Tensor
    """uint8 [NA, S, G * F] from `UserCounters.of_counted_items`; 0 in the padding."""
    num_events: Tensor
    """int64 [NA] events that the counters cover."""


@dataclass(frozen=True, slots=True)
class BatchAnchors:
    """Questions about what follows (`vista.examples.anchors`), sorted by chunk."""

    window: Tensor
    """int64 [NA]: the window whose summary and tail the anchor reads."""
    position: Tensor
    """int64 [NA] position in the window, 0..W-1."""
    gap: Tensor
    """int64 [NA] log buckets of the time from the newest visible event to the request."""
    item: Tensor
    """int64 [NA, P] distinct labels, indices into `Batch.rows`; -1 pads."""
    next_item: Tensor
    """int64 [NA] the next item, an index into `Batch.rows`; -1 if it is unknown."""
    counters: BatchCounters | None
    """Counted items of the users; None without counters."""
    mean_labels: float
    """Mean number of labels per anchor in training."""


@dataclass(frozen=True, slots=True)
class BatchReconstruction:
    """Stretches of events that the decoder reconstructs from summaries."""

    cut: Tensor
    """int64 [NR]: the cut whose summary the decoder reads."""
    start: Tensor
    """int64 [NR]: packed index of the first event to reconstruct."""
    length: Tensor
    """int64 [NR] events."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One training batch. All item fields are indices into `rows`."""

    user: Tensor
    """int64 [B] user rows of the log, for error messages."""
    rows: Tensor
    """int64 [R] distinct model item rows of the batch, sorted."""
    events: BatchEvents
    cuts: BatchCuts
    windows: BatchWindows
    labels: BatchLabels
    negatives: BatchNegatives
    impressions: BatchImpressions
    reconstruction: BatchReconstruction
    anchors: BatchAnchors | None = None
    """None without the window loss."""
    user_features: BatchUsers | None = None
    """None for a model that reads none."""
    logit_adjustment: Tensor | None = None
    """float32 [R], added during training to an item's logits as label and as negative (`optim.logq_strength`)."""
    stored_summary: Tensor | None = None
    """float32 [B, S, M] summaries of the chunks, read from a store."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by dotted name, such as "labels.item"."""
        return _tensors(self)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with all tensors on `device`."""
        return _moved(self, device)


def _tensors(part: DataclassInstance) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            named[field.name] = value
        elif is_dataclass(value) and not isinstance(value, type):
            named |= {f"{field.name}.{name}": tensor for name, tensor in _tensors(value).items()}
    return named


def _moved(part: Part, device: torch.device | str) -> Part:
    moved: dict[str, Any] = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            moved[field.name] = value.to(device)
        elif is_dataclass(value) and not isinstance(value, type):
            moved[field.name] = _moved(value, device)
    return replace(part, **moved)
