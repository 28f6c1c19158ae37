"""A training batch: packed events, the cuts at which summaries are read, and windows of label positions.

It is cut from chunks. Letters: B chunks, T packed events, NS segments between cuts, NC cuts, NW windows, W positions
per window, L tail length, I impressions per window, J negatives, NA anchors, P labels and S counted items per anchor, G
fields of counters, F values per key, J pooled vectors, r dimensions of an item space, Z statistics of items, NR
reconstructed stretches, R distinct item rows, S seeds of stored summaries, M model dim.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Float32s, Int
from vista.config.checks import Decay
from vista.examples.item_spaces import PooledHistories
from vista.examples.item_statistics import HistoryCounters

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from vista.model.features import EncodedRows


Part = TypeVar("Part", bound="DataclassInstance")


# Chunks: packed stretches of users' histories, from which training batches are cut. Letters: N impressions.


@dataclass(frozen=True, slots=True)
class ChunkImpressions:
    """Labeled impressions of all chunks, sorted by chunk and position."""

    chunk: Int
    """int64 [N]."""
    position: Int
    """int64 [N] events of the chunk strictly before the impression."""
    item: Int
    """int64 [N] model item rows."""
    gap: Int
    """int64 [N] log buckets of the time since the newest event before the impression."""
    label: NDArray[np.float32]
    """float32 [N, num_tasks]."""
    mask: NDArray[np.bool_]
    """bool [N, num_tasks]: True where a task's label is known."""
    time: Int
    """int64 [N] ms."""
    features: EncodedRows | None = None
    """[N + 1] of their requests; the last row is that of a request without features. None for a model that reads
    none."""
    examined: NDArray[np.float32] | None = None
    """float32 [N, num_tasks] probabilities that the user looked at the item; None without `optim.examined_tasks`."""
    measured: NDArray[np.float32] | None = None
    """float32 [N, Z + num_tasks] statistics and label rates of the items (`BatchImpressions.inputs`); None without
    pooled vectors."""

    def select(self, index: Int) -> ChunkImpressions:
        """Some of the impressions, without features and what is measured of items."""
        return ChunkImpressions(
            self.chunk[index],
            self.position[index],
            self.item[index],
            self.gap[index],
            self.label[index],
            self.mask[index],
            self.time[index],
            examined=None if self.examined is None else self.examined[index],
        )


@dataclass(frozen=True, slots=True)
class ChunkTimeline:
    """The events of each chunk and, as its trail, those after it that training may see. Only anchors read it. The trail
    holds labels only: it is never part of a chunk's own events."""

    item: Int
    """int64 [N] model item rows; 0 is the unknown item."""
    time: Int
    """int64 [N] ms, or positions in a log without times."""
    offsets: Int
    """int64 [B+1]."""
    weight: Float32s | None = None
    """float32 [N] of the events as labels; None is 1."""
    active: Int | None = None
    """int64 [n] places of the events that are labels, ascending; None if all are."""


@dataclass(frozen=True, slots=True)
class ChunkHistories:
    """The whole histories of the chunks' users, which counters and pooled vectors cover, and where the chunks lie."""

    counters: HistoryCounters | None
    """None without counters."""
    pooled: PooledHistories | None
    """None without pooled vectors."""
    history: Int
    """int64 [B] the history of each chunk."""
    start: Int
    """int64 [B] events of the history before the chunk's first event."""
    covered: Int | None
    """int64 [B] events of the history that a stored record covers; None if records end where summaries are cut."""


@dataclass(slots=True)
class Chunks:
    """Stretches of histories, end to end, oldest event first within a chunk."""

    user: Int
    """int64 [B] user rows of the log."""
    item: Int
    """int64 [T] model item rows; 0 is the unknown item."""
    action: Int
    """int64 [T]."""
    rating: NDArray[np.float32] | None
    """float32 [T]."""
    gap: Int
    """int64 [T] log buckets of the time since the event before."""
    clock: Int
    """int64 [T] from `decay_clock`."""
    offsets: Int
    """int64 [B+1]."""
    impressions: ChunkImpressions
    timeline: ChunkTimeline | None = None
    """What anchors ask about; None draws no anchors."""
    lead: Int | None = None
    """int64 [B]: with stored summaries, the first events of each chunk that serve as context only."""
    summary: NDArray[np.float32] | None = None
    """float32 [B, S, M] stored summaries; None computes them from the batch's own events."""
    weight: Float32s | None = None
    """float32 [T] of the events as next-item labels (`EventRewards`); None is 1."""
    is_active: NDArray[np.bool_] | None = None
    """bool [T]: the event may be a next-item label (`EventLog.active`); None if all may."""
    histories: ChunkHistories | None = None
    """None without counters and pooled vectors."""
    features: EncodedRows | None = None
    """[T] of the events; None for a model that reads none."""
    user_features: EncodedRows | None = None
    """[B + 1] of the users; the last row is that of an unknown user. None for a model that reads none."""

    @property
    def num_context(self) -> Int:
        """int64 [B] first events of each chunk that serve as context only."""
        return np.zeros(len(self.offsets) - 1, np.int64) if self.lead is None else self.lead


def decay_clock(decay: Decay, timestamp: Int) -> Int:
    """int64 [T] that decay is measured by: milliseconds or packed positions. Only differences within a chunk count."""
    return np.arange(len(timestamp), dtype=np.int64) if decay is Decay.position else timestamp


# The batch that is cut from chunks.


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
    features: EncodedRows | None = None
    """[T] of the events; None without them."""


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
    pooled: Tensor | None = None
    """float32 [NW, W, J, FOLDS * r] of the requests (`PooledHistories.at`); None without pooled vectors, or if next
    items are only trained at anchors."""
    weight: Tensor | None = None
    """float32 [NW, W] of the labels in the loss (`EventRewards`); None is 1."""


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
    inputs: Tensor | None = None
    """float32 [NW, I, J + Z + num_tasks]: cosines of the item and the user's pooled vectors, the item's Z statistics as
    of the request, and its rate of each label (`ItemRates`). None without pooled vectors."""
    features: EncodedRows | None = None
    """[NW, I] of the requests; None without them."""
    examined: Tensor | None = None
    """float32 [NW, I, num_tasks] probabilities that the user looked at the item; None without
    `optim.examined_tasks`."""

    @classmethod
    def of_batches(cls, shown: Sequence[BatchImpressions]) -> BatchImpressions:
        """The impressions of some batches that have a label, [N, 1] each, in order, without features. Their items are
        indices into the rows of the batch that they come from."""
        own = [part.mask.any(-1) for part in shown]
        columns: dict[str, Any] = {}
        for name in (field.name for field in fields(cls) if isinstance(getattr(shown[0], field.name), Tensor)):
            kept = [getattr(part, name)[index] for part, index in zip(shown, own, strict=True)]
            columns[name] = torch.cat(kept).unsqueeze(1)
        return cls(**columns)

    def select(self, windows: Tensor) -> BatchImpressions:
        """Those of windows int64 [n]."""
        return _rows(self, windows)


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
    """Questions about what follows (`vista.examples.cuts`), sorted by chunk."""

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
    time: Tensor
    """int64 [NA] of the requests, ms, also of those whose callers do not pass it."""
    counters: BatchCounters | None
    """Counted items of the users; None without counters."""
    mean_labels: float
    """Mean number of labels per anchor in training."""
    transitions: Tensor | None = None
    """float32 [NA, K, R] sums over transitions from the user's newest items to each of the items `Batch.rows`
    (`vista.examples.transitions`). None for a model that reads none."""
    pooled: Tensor | None = None
    """float32 [NA, J, FOLDS * r] of the requests (`PooledHistories.at`); None without pooled vectors."""
    weight: Tensor | None = None
    """float32 [NA, P] of the labels `item` in the loss (`EventRewards`); None is 1."""
    next_weight: Tensor | None = None
    """float32 [NA] of the labels `next_item`; None is 1."""


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """How popular the items of a batch are as of some times (`ItemStatistics.as_of`)."""

    time: Tensor
    """int64 [T'] ms, ascending. An anchor reads the newest that is not later than its request."""
    values: Tensor
    """float32 [T', R, S]."""


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
    statistics: BatchStatistics | None = None
    """Of the items `rows`, at the times of the anchors; None without counters."""
    spaces: Tensor | None = None
    """float32 [R, FOLDS * r] of the items `rows` (`ItemSpaces.of_rows`); None without pooled vectors, or if no items
    are ranked."""
    user_features: EncodedRows | None = None
    """[B] of the chunks' users; None for a model that reads none."""
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


# A rank's part of a training batch: some of its chunks, and all that belongs to them.
#
# All ranks of a job make the same batch and train different chunks of it. So a batch, its negatives, and all its random
# draws do not depend on the number of ranks. Letters: B chunks of the whole batch; others as in `vista.examples.batch`.


def chunk_work(batch: Batch) -> Int:
    """int64 [B]: the events of each chunk, which stage 1 reads, and its label positions, which stage 2 reads."""
    positions = np.bincount(batch.windows.chunk.numpy(), minlength=len(batch.user)) * batch.labels.item.shape[1]
    work: Int = batch.events.offsets.diff().numpy() + positions
    return work


def balanced_parts(work: Int, num_parts: int) -> list[Int]:
    """Divide chunks into parts of about equal work: the largest first, each to the part with the least so far.

    Args:
        work: from `chunk_work`.

    Returns:
        `num_parts` arrays of sorted chunks, int64; some are empty if there are fewer chunks than parts.
    """
    loads, parts = [(0, part) for part in range(num_parts)], [list[int]() for _ in range(num_parts)]
    for chunk in np.argsort(-work, kind="stable").tolist():
        load, part = heapq.heappop(loads)
        parts[part].append(chunk)
        heapq.heappush(loads, (load + int(work[chunk]), part))
    return [np.sort(np.array(part, np.int64)) for part in parts]


def batch_part(batch: Batch, chunks: Int) -> Batch:
    """The part of a batch with some of its chunks, sorted, at least one. `rows`, `user`, and the negatives stay those
    of the whole batch: its items share one sparse gradient, and its users are left out of the factors that it reads."""
    own, events = torch.from_numpy(chunks), batch.events
    new_chunk = _new_index(own, len(batch.user))
    event, offsets = _ranges(events.offsets, own)
    shift = offsets[:-1] - events.offsets[own]  # of packed events, by chunk of the part

    window = (new_chunk[batch.windows.chunk] >= 0).nonzero().squeeze(-1)
    chunk = new_chunk[batch.windows.chunk[window]]
    cuts, cut, cut_chunk = _cuts(batch, own, window, chunk, shift)
    new_cut = _new_index(cut, len(batch.cuts.segment)) if batch.stored_summary is None else new_chunk
    tail = batch.windows.tail_index[window]
    anchors = batch.anchors
    if anchors is not None:
        new_window = _new_index(window, len(batch.windows.chunk))[anchors.window]
        anchor = (new_window >= 0).nonzero().squeeze(-1)
        anchors = _rows(anchors, anchor, window=new_window[anchor])
    return replace(
        batch,
        events=_rows(events, event, offsets=offsets),
        cuts=cuts,
        windows=BatchWindows(
            chunk,
            new_cut[batch.windows.cut[window]],
            torch.where(tail >= 0, tail + shift[chunk].unsqueeze(1), -1),
        ),
        labels=_rows(batch.labels, window),
        impressions=_rows(batch.impressions, window),
        reconstruction=_reconstruction(batch.reconstruction, new_cut, shift[cut_chunk]),
        anchors=anchors,
        user_features=None if batch.user_features is None else batch.user_features.select(own),
        stored_summary=None if batch.stored_summary is None else batch.stored_summary[own],
    )


def _rows(part: Part, index: Tensor, **others: Any) -> Part:
    """Some rows of all tensors of a part of a batch and of its own parts, except for fields whose values are given."""
    for name in {field.name for field in fields(part)} - others.keys():
        value = getattr(part, name)
        if isinstance(value, Tensor):
            others[name] = value[index]
        elif is_dataclass(value) and not isinstance(value, type):
            others[name] = _rows(value, index)
    return replace(part, **others)


def _cuts(batch: Batch, own: Tensor, window: Tensor, chunk: Tensor, shift: Tensor) -> tuple[BatchCuts, Tensor, Tensor]:
    """Cuts of the part; int64 [NC'] which of the batch's cuts they are; and the chunks of the part that they lie in.
    window: int64 [NW'] windows of the batch; chunk: their chunks of the part."""
    cuts = batch.cuts
    segment, chunk_offsets = _ranges(cuts.chunk_offsets, own)
    lengths = cuts.segment_offsets.diff()[segment]
    # Every cut is read by at least one window.
    cut_chunk = torch.full_like(cuts.segment, -1)
    if batch.stored_summary is None:
        cut_chunk[batch.windows.cut[window]] = chunk
    cut = (cut_chunk >= 0).nonzero().squeeze(-1)
    cut_chunk = cut_chunk[cut]
    of_segments = chunk_offsets[:-1] - cuts.chunk_offsets[own]
    old = cuts.segment[cut]
    kept = BatchCuts(
        segment_offsets=_offsets(lengths),
        chunk_offsets=chunk_offsets,
        segment=torch.where(old >= 0, old + of_segments[cut_chunk], -1),
        start=cuts.start[cut] + shift[cut_chunk],
        stop=cuts.stop[cut] + shift[cut_chunk],
    )
    return kept, cut, cut_chunk


def _reconstruction(part: BatchReconstruction, new_cut: Tensor, shift: Tensor) -> BatchReconstruction:
    """new_cut: int64 [NC] cuts of the part, or -1; shift: int64 [NC'] of packed events, by cut of the part."""
    cut = new_cut[part.cut]
    kept = (cut >= 0).nonzero().squeeze(-1)
    return BatchReconstruction(cut[kept], part.start[kept] + shift[cut[kept]], part.length[kept])


def _ranges(offsets: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Packed indices of the ranges `own`, end to end, and their new offsets."""
    lengths = offsets.diff()[own]
    new = _offsets(lengths)
    return torch.arange(int(new[-1])) + (offsets[own] - new[:-1]).repeat_interleave(lengths), new


def _offsets(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0))


def _new_index(own: Tensor, total: int) -> Tensor:
    """int64 [total]: the place of each index in `own`, or -1."""
    places = torch.full((total,), -1)
    places[own] = torch.arange(len(own))
    return places
