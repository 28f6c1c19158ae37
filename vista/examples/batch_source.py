"""Training batches of bounded size, made from a log. Batch i of epoch e depends only on (seed, e, i).

So a resumed run needs only its position in the data, and makes the same batches, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Int
from vista.config import OptimConfig, TrainConfig
from vista.config.checks import Architecture, planned
from vista.counters.counters import ItemKeys
from vista.errors import ConfigError, DataError
from vista.examples.batch import Batch
from vista.examples.chunks import (
    ChunkCounters,
    ChunkImpressions,
    Chunks,
    ChunkTimeline,
    HistoryCounters,
    VisibleImpressions,
    decay_clock,
)
from vista.examples.cuts import CutPlan, cut_batch
from vista.examples.item_statistics import item_frequency
from vista.log.event_log import EventLog
from vista.log.histories import RowFeatures, history_gaps, ranges, token_groups
from vista.log.splits import Until, split_until, visible_counts


@dataclass(frozen=True, slots=True)
class StoredSummaries:
    """The summaries of a log's users. Labels begin where the records end, and histories are not read again."""

    since: int
    """ms: the records cover the events before it."""
    read: Callable[[NDArray[np.int64]], NDArray[np.float32]]
    """User rows int64 [B] -> summaries [B, S, M]."""


# Negatives of the sampled softmax, shared by a batch, with the correction for the distribution they are drawn from.
#
# The softmax over the catalog is estimated as e^{s+} + sum_j c_j / (J q_j) e^{s_j} over the distinct drawn items j,
# where item j was drawn c_j times in J draws from q (Bengio and Senécal 2008; Yi et al., RecSys 2019: "logQ").


class NegativeSampler:
    """Draws item rows in proportion to frequency ** power. Power 0 is uniform over the items that occur."""

    def __init__(self, item_counts: NDArray[np.int64], *, num_negatives: int, power: float = 0.0) -> None:
        """
        Args:
            item_counts: int64 [V], how often each model row occurs in training; rows with 0 are never drawn. Estimates
                are enough: the correction uses the probabilities of the draws, so errors do not bias it.
            num_negatives: draws per batch.
            power: exponent of the frequencies.

        Raises:
            DataError: if no item occurs.
        """
        self.items = np.flatnonzero(item_counts)
        if len(self.items) == 0:
            raise DataError("no item occurs in training; check that data.validation_from lies after the first events")
        self.num_negatives = num_negatives
        weight = item_counts[self.items].astype(np.float64) ** power
        self.probability = weight / weight.sum()
        self._cumulative = np.cumsum(self.probability)
        self._uniform = power == 0.0

    def draw(self, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Draw the negatives of one batch.

        Returns:
            (items, log_weight): int64 [J] distinct sorted item rows, float32 [J] log of c_j / (draws * q_j). With at
            least as many negatives as items, every item comes once with weight 1, which gives the exact softmax.
        """
        count, total = self.num_negatives, len(self.items)
        if count >= total:
            return self.items, np.zeros(total, np.float32)
        if self._uniform:
            # Without replacement: an item is included with probability count / total.
            picked = np.sort(rng.choice(total, count, replace=False, shuffle=False))
            return self.items[picked], np.full(count, np.log(total / count), np.float32)
        drawn = np.minimum(np.searchsorted(self._cumulative, rng.random(count)), total - 1)
        picked, times = np.unique(drawn, return_counts=True)
        return self.items[picked], np.log(times / (count * self.probability[picked])).astype(np.float32)


MEASURED_BATCHES = 16
"""Batches that the mean number of labels per anchor is measured by."""
EncodeRows: TypeAlias = Callable[[Int], tuple[Int, NDArray[np.float32]]]
"""From rows int64 [N] of a log's impressions or users to `entry` and `dense` of chunks."""
EncodeEvents: TypeAlias = Callable[[RowFeatures, int], tuple[Int, NDArray[np.float32]]]
"""From features of T events of a log to `Chunks.entry` and `dense`."""
NO_NEGATIVES = np.zeros(0, np.int64), np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True)
class ModelReads:
    """How a model reads a log: the rows of its items, what it counts, and the features that it encodes."""

    item_rows: Int
    """int64 [log.num_items], the model row of each of the log's items; 0 is the unknown item."""
    num_known: int | None = None
    """Items that histories and counters know. They show the items of later rows as unknown, while labels, candidates,
    and negatives have them. None knows all."""
    has_features: NDArray[np.bool_] | None = None
    """bool [1 + V], the model rows whose vectors contain features; None is none. Such rows without training events are
    not negatives."""
    keys: ItemKeys | None = None
    """What the model's counters count; None without counters."""
    encode_events: EncodeEvents | None = None
    """Features of the log's events; None if the model reads none."""
    encode_requests: EncodeRows | None = None
    """The same for the requests of the log's impressions."""
    encode_users: EncodeRows | None = None
    """The same for the log's users."""


class BatchSource:
    """Cuts the visible part of a log into batches. Threads may share it while all of them ask for the same epoch."""

    def __init__(
        self, log: EventLog, reads: ModelReads, config: TrainConfig, stored: StoredSummaries | None = None
    ) -> None:
        """
        Args:
            reads: how the model reads the log.
            stored: summaries from a store; None computes them from the batch's own events.

        Raises:
            ConfigError: if `optim.tasks` names a task that the log lacks, if no label lies after the store's records,
                or if `data.horizon_days` is set and the log has no times.
        """
        self._log, self._reads, self._config, self._stored = log, reads, config, stored
        hides = reads.num_known is not None and reads.num_known < reads.item_rows.max(initial=0)
        self._num_known = reads.num_known if hides else None
        since = stored.since if stored else None
        self.counts = visible_counts(log, split_until(config.data, "train"))
        self._first = visible_counts(log, Until(before=since)) if stored else np.zeros(log.num_users, np.int64)
        """int64 [num_users]: events before a user's first label."""
        self._lead = config.model.tail_len if stored else 0
        frequency = item_frequency(log, reads.item_rows, self.counts, reads.has_features)
        self.frequency = frequency
        """int64 [largest row + 1] training events of each model row."""
        num_negatives = planned(config.data.num_negatives, "data.num_negatives")
        self._sampler = NegativeSampler(frequency, num_negatives=num_negatives)
        self._adjustment = _logit_adjustment(frequency, config.optim.logq_strength)
        tasks = trained_tasks(log, config.optim)
        self._impressions = VisibleImpressions.of(log, reads.item_rows, self.counts, config, tasks, since)
        trains_events = stored is None or config.ranks_items
        self._users = _labeled_users(self._impressions, self.counts - self._first if trains_events else None)
        if stored is not None and not len(self._users):
            raise ConfigError(
                f"store: was refreshed with until={since}, and no label of {log.path} lies between that and "
                f"data.validation_from={config.data.validation_from}; refresh it with an earlier until"
            )
        self._plan = CutPlan.of(config, has_time=log.has_time)
        self._chunk_len = chunk_len(config)
        self.returning_share = 0.5
        """Share of counted items among the labels of anchors that have any, between 0 and 1."""
        self._epoch = -1
        self._chunks: tuple[Int, Int, Int] = (np.zeros(0, np.int64),) * 3
        self._batches: list[Int] = []
        if self._plan.anchors is not None and config.data.horizon_days > 0 and not log.has_time:
            raise ConfigError(f"data.horizon_days: {log.path} has no times; set it to 0 and use data.horizon_events")
        self._measure_labels()

    def num_batches(self, epoch: int) -> int:
        """Batches of an epoch."""
        self._start_epoch(epoch)
        return len(self._batches)

    def batch(self, epoch: int, index: int) -> Batch:
        """The `index`-th batch of an epoch."""
        self._start_epoch(epoch)
        rng = np.random.default_rng([self._config.seed, epoch, index + 1])
        user, start, stop = (part[self._batches[index]] for part in self._chunks)
        # If no items are predicted, negatives would still be gathered, and moved by Adam's momentum.
        negatives, log_weight = self._sampler.draw(rng) if self._config.ranks_items else NO_NEGATIVES
        batch = cut_batch(self._pack(user, start, stop), self._plan, rng, negatives, log_weight)
        if self._num_known is not None:
            batch = _with_hidden(batch, batch.rows[batch.events.item] > self._num_known)
        if self._adjustment is None:
            return batch
        return replace(batch, logit_adjustment=torch.from_numpy(self._adjustment[batch.rows.numpy()]))

    def _start_epoch(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        rng = np.random.default_rng([self._config.seed, epoch, 0])
        users, first = self._users, self._first[self._users]
        user, start, stop = _chunk_histories(users, self.counts[users] - first, self._chunk_len, rng)
        self._chunks = user, start + self._first[user], stop + self._first[user]
        lengths = np.maximum(self._chunks[2] - np.maximum(self._chunks[1] - self._lead, 0), 1)
        order = rng.permutation(len(lengths))
        budget = planned(self._config.data.tokens_per_batch, "data.tokens_per_batch")
        groups = token_groups(lengths[order], budget)
        self._batches = [order[group] for group in groups]
        self._epoch = epoch

    def _measure_labels(self) -> None:
        """Measure labels and counted items by the anchors of the first batches, which every run cuts alike."""
        if self._plan.anchors is None:
            return
        num_anchors = num_labels = num_returns = num_returnable = 0
        for index in range(min(self.num_batches(0), MEASURED_BATCHES)):
            anchors = self.batch(0, index).anchors
            assert anchors is not None
            label = anchors.item if self._config.trains_window else anchors.next_item.unsqueeze(1)
            num_anchors += len(label)
            num_labels += int((label >= 0).sum())
            if anchors.counters is not None:
                counted = anchors.counters.item
                num_returnable += int((label[(counted >= 0).any(1)] >= 0).sum())
                is_return = (label[:, :, None] == counted[:, None, :]).any(2) & (label >= 0)
                num_returns += int(is_return.sum())
        self.returning_share = (num_returns + 1) / (num_returnable + 2)
        mean_labels = num_labels / num_anchors if num_anchors else 1.0
        self._plan = replace(self._plan, anchors=replace(self._plan.anchors, mean_labels=mean_labels))

    def _pack(self, user: Int, start: Int, stop: Int) -> Chunks:
        """The chunks of the events [start, stop) of some users, int64 [B] each, with what a batch reads of them.

        With stored summaries, the `lead` events before them come along as context. With anchors, the timeline also has
        the events after them that anchors may ask about.
        """
        reads, model, anchors = self._reads, self._config.model, self._plan.anchors
        lead = np.minimum(start, self._lead)
        trail = np.minimum(0 if anchors is None else anchors.horizon_events, self.counts[user] - stop)
        timeline = self._log.gather_ranges(user, start - lead, stop + trail)
        events = timeline.select(np.zeros_like(lead), stop - start + lead)
        time = np.asarray(events.timestamp)
        has_gaps = self._log.has_time and model.reads("times")
        asked = None
        if anchors is not None:
            asked = ChunkTimeline(reads.item_rows[timeline.item], np.asarray(timeline.timestamp), timeline.offsets)
        entry, dense = _encoded(reads.encode_events, events.features, events.num_events)
        user_entry, user_dense = _encoded(reads.encode_users, user)
        return Chunks(
            user=user,
            item=reads.item_rows[events.item],
            action=events.action.astype(np.int64),
            rating=None if events.rating is None else np.array(events.rating, np.float32),
            gap=history_gaps(time, events.offsets) if has_gaps else np.zeros(len(time), np.int64),
            clock=decay_clock(model.decay, time),
            offsets=events.offsets,
            impressions=self._impressions_of(user, start, stop, lead),
            timeline=asked,
            lead=lead if self._stored else None,
            summary=self._stored.read(user) if self._stored else None,
            counters=self._counters(user, start - lead, stop),
            entry=entry,
            dense=dense,
            user_entry=user_entry,
            user_dense=user_dense,
        )

    def _impressions_of(self, user: Int, start: Int, stop: Int, lead: Int) -> ChunkImpressions:
        """The impressions of chunks, at positions counted from the first of the `lead` events before each chunk."""
        seen = self._impressions
        low, high = seen.ranges(user, start, stop, self._first[user])
        index = ranges(low, high - low)
        chunk = np.repeat(np.arange(len(user)), high - low)
        position = seen.position[index] - (start - lead)[chunk]
        entry, dense = _encoded(self._reads.encode_requests, seen.row[index])
        return ChunkImpressions(
            chunk=chunk,
            position=position,
            item=seen.item[index],
            gap=np.where(position > 0, seen.gap[index], 0),
            label=seen.label[index],
            mask=seen.mask[index],
            time=seen.time[index],
            entry=entry,
            dense=dense,
        )

    def _counters(self, user: Int, start: Int, stop: Int) -> ChunkCounters | None:
        """Counters of chunks, which hold the events [start, stop) of their users."""
        reads = self._reads
        if reads.keys is None:
            return None
        rows = reads.item_rows
        if self._num_known is not None:
            rows = np.where(rows > self._num_known, 0, rows)
        histories, history = HistoryCounters.of(reads.keys, self._log, rows, user, stop)
        return ChunkCounters(histories, history, start, self._first[user] if self._stored else None)


def _encoded(
    encode: Callable[..., tuple[Int, NDArray[np.float32]]] | None, *rows: object
) -> tuple[Int | None, NDArray[np.float32] | None]:
    """`entry` and `dense` of features; None for a model that reads none."""
    return (None, None) if encode is None else encode(*rows)


def _with_hidden(batch: Batch, hidden: Tensor) -> Batch:
    """A batch that shows the items of some more events, bool [T], as unknown."""
    before = batch.events.hidden
    return replace(batch, events=replace(batch.events, hidden=hidden if before is None else before | hidden))


def chunk_len(config: TrainConfig) -> int:
    """Maximum number of events per chunk: `data.chunk_len`, or fewer if the model encodes whole chunks."""
    model = config.model
    # Only a model that encodes whole chunks is bounded by `history_limit`. A model that only ranks takes the newest
    # events before each impression, so its chunks may be longer.
    if model.architecture.ranks_only or not model.history_limit:
        return config.data.chunk_len
    # The last event of a baseline's chunk is only a label, so that the state after a full history is trained too.
    only_label = int(model.architecture is not Architecture.vista)
    return min(config.data.chunk_len, model.history_limit + only_label)


def _labeled_users(impressions: VisibleImpressions, num_labels: Int | None) -> Int:
    """Rows of the users with impressions, or with events that are labels (None: events are not labels)."""
    # Users without events are included if they have impressions, which train the summary of an empty history.
    labeled = np.diff(impressions.offsets) > 0
    if num_labels is not None:
        labeled |= num_labels > 0
    return np.flatnonzero(labeled)


def _chunk_histories(users: Int, total: Int, limit: int, rng: np.random.Generator) -> tuple[Int, Int, Int]:
    """(user, start, stop) of chunks: histories of more than `limit` events are cut at a random phase."""
    phase = np.where(total > limit, rng.integers(1, limit + 1, len(users)), total)
    pieces = 1 + -(-(total - phase) // limit)
    owner = np.repeat(np.arange(len(users)), pieces)
    index = ranges(0, pieces)
    start = np.where(index == 0, 0, phase[owner] + (index - 1) * limit)
    stop = np.minimum(phase[owner] + index * limit, total[owner])
    return users[owner], start, stop


def _logit_adjustment(frequency: Int, logq_strength: float) -> NDArray[np.float32] | None:
    """(1 - strength) * log p of each model row, where p is its share of the training events; None at strength 1."""
    if logq_strength == 1:
        return None
    log_share: NDArray[np.float64] = np.log(np.maximum(frequency, 1) / frequency.sum())
    return ((1 - logq_strength) * log_share).astype(np.float32)


def events_before(log: EventLog, user: int, times: Int, count: int) -> Int:
    """How many of the first `count` events of a user came strictly before each of `times`."""
    return np.searchsorted(np.asarray(log.slice(user, 0, count).timestamp), times, side="left").astype(np.int64)


def trained_tasks(log: EventLog, optim: OptimConfig) -> list[str]:
    """The labeled tasks that a run trains, in the log's order.

    Raises:
        ConfigError: if `optim.tasks` names one that the log lacks.
    """
    offered = log.impressions.tasks if log.impressions is not None else []
    for name in optim.tasks:
        if name not in offered:
            raise ConfigError(
                f"optim.tasks: {log.path} has no task {name!r}; its tasks are: {', '.join(offered) or 'none'}"
            )
    if optim.task_weight == 0:
        return []
    return [name for name in offered if not optim.tasks or name in optim.tasks]
