"""Training batches of bounded size, made from a log. Batch i of epoch e depends only on (seed, e, i).

So a resumed run needs only its position in the data, and makes the same batches, bit for bit.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from vista.arrays import Float32s, Int, offsets_of
from vista.config import DataConfig, OptimConfig, TrainConfig
from vista.config.checks import Architecture, planned, require
from vista.config.log_config import POSITION, PROPENSITY
from vista.counters.keys import ItemKeys
from vista.errors import ConfigError, DataError
from vista.examples.batch import (
    Batch,
    BatchStatistics,
    ChunkHistories,
    ChunkImpressions,
    Chunks,
    ChunkTimeline,
    decay_clock,
)
from vista.examples.cuts import CutPlan, cut_batch
from vista.examples.item_spaces import ItemRates, ItemSpaces, LabelResiduals
from vista.examples.item_statistics import HistoryCounters, ItemStatistics, WholeHistories, item_frequency
from vista.examples.rewards import EventRewards
from vista.examples.transitions import TransitionCounts
from vista.log.event_keys import Impressions
from vista.log.event_log import EventLog
from vista.log.histories import RowFeatures, gap_bucket, history_gaps, ranges, token_groups
from vista.log.splits import EVENTS_PER_BLOCK, Until, split_until, visible_counts

if TYPE_CHECKING:
    from vista.model.features import EncodedRows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredSummaries:
    """The summaries of a log's users. Labels begin where the records end, and histories are not read again."""

    since: int
    """ms: the records cover the events before it."""
    read: Callable[[NDArray[np.int64]], NDArray[np.float32]]
    """User rows int64 [B] -> summaries [B, S, M]."""


# The labeled impressions that training may use. Letters: N impressions, B chunks.


@dataclass(frozen=True, slots=True)
class VisibleRows:
    """Impressions that training may see, in the log's order; int64 [N] each."""

    row: Int
    """Rows of the log's impressions."""
    user: Int
    """Rows of the log."""
    position: Int
    """Events of the user strictly before the impression."""
    before: Int
    """Time of the newest of these (ms); arbitrary if there is none."""
    hidden: Int
    """Time from which events are hidden (ms); the largest int64 if none are."""

    def select(self, index: Int) -> VisibleRows:
        """Some of the rows."""
        return VisibleRows(*(part[index] for part in (self.row, self.user, self.position, self.before, self.hidden)))


def visible_rows(log: EventLog, table: Impressions, counts: Int, data: DataConfig, since: int | None) -> VisibleRows:
    """The impressions of the training part, with or without a known label.

    Args:
        table: the log's impressions.
        counts: int64 [num_users] events of each user that training may use.
        since: leave out the impressions before this time (ms).
    """
    # An impression between the last visible event and a hidden one may show the hidden label itself.
    hides = counts < log.lengths
    until = split_until(data, "train")
    timestamp = np.asarray(table.timestamp)
    user = np.repeat(np.arange(log.num_users), np.diff(table.offsets))
    position = np.zeros(len(timestamp), np.int64)
    before = np.zeros(len(timestamp), np.int64)
    hidden = np.full(len(timestamp), np.iinfo(np.int64).max if until.before is None else until.before)
    shown = np.flatnonzero(np.diff(table.offsets))
    for part in token_groups(log.lengths[shown], EVENTS_PER_BLOCK):
        users = shown[part]
        events = log.gather(users, features=False)
        begins, times_of_all = events.offsets.tolist(), np.asarray(events.timestamp)
        low_high = table.offsets[users].tolist(), table.offsets[users + 1].tolist()
        for low, high, (begin, end), seen in zip(*low_high, pairwise(begins), counts[users].tolist(), strict=True):
            times = times_of_all[begin:end]
            at = times.searchsorted(timestamp[low:high], side="left")
            position[low:high] = at
            before[low:high] = times[np.maximum(at - 1, 0)] if begin < end else timestamp[low:high]
            if until.before is None and seen < end - begin:
                hidden[low:high] = times[seen]
    visible = position <= counts[user]
    if until.before is not None:
        visible &= timestamp < until.before
    else:
        visible &= (position < counts[user]) | ~hides[user]
    if since is not None:
        visible &= timestamp >= since
    kept = np.flatnonzero(visible)
    return VisibleRows(kept, user[kept], position[kept], before[kept], hidden[kept])


PLACE_STEPS = 50
"""Steps in which weights of positions are estimated."""
MOST_POSITIONS = 100
"""Later positions have the weight of the last one."""
LEAST_WEIGHT = 0.01
"""Smaller weights of positions are raised to this value."""


@dataclass(frozen=True, slots=True)
class Examination:
    """How likely users looked at impressions, which position bias is corrected by."""

    is_examined: NDArray[np.bool_]
    """[num_tasks] the tasks of `optim.examined_tasks`."""
    weights: Float32s | None
    """[1 + MOST_POSITIONS] by position, where the first has weight 1; None where impressions have propensities."""

    @classmethod
    def of(cls, log: EventLog, asked: list[str], data: DataConfig, tasks: list[str]) -> Examination | None:
        """That of some tasks; None if `asked`, those of `optim.examined_tasks`, is empty.

        Raises:
            ConfigError: if a task is not trained, or impressions have neither propensities nor positions.
        """
        table, key = log.impressions, "optim.examined_tasks"
        if not asked:
            return None
        for name in asked:
            require(name in tasks, key, f"{name!r} is not a trained task; these are: {', '.join(tasks) or 'none'}")
        assert table is not None  # it has tasks
        is_examined, columns = np.isin(tasks, asked), table.features.columns
        name = PROPENSITY if PROPENSITY in columns else POSITION
        lacks = f"{log.path} has neither {PROPENSITY!r} nor {POSITION!r} among the numbers of impressions; add one"
        require(name in columns, key, lacks)
        num_missing = int(np.isnan(columns[name]).sum())
        require(num_missing == 0, key, f"{num_missing:,} impressions of {log.path} have no {name!r}; prepare it again")
        if name == PROPENSITY:
            return cls(is_examined, None)
        counts = visible_counts(log, split_until(data, "train"))
        visible = visible_rows(log, table, counts, data, None)
        task = table.tasks.index(asked[0])
        rows = visible.row[table.known(visible.row, visible.hidden)[:, task]]
        weights = position_weights(columns[POSITION][rows], table.item[rows], np.asarray(table.label)[rows, task] == 1)
        return cls(is_examined, weights)

    def of_rows(self, features: RowFeatures) -> Float32s:
        """Probabilities float32 [N, num_tasks] that users looked at impressions; 1 for tasks that are not corrected."""
        if self.weights is None:
            looks = features.columns[PROPENSITY]
        else:
            looks = self.weights[np.clip(features.columns[POSITION], 1, MOST_POSITIONS).astype(np.int64)]
        return np.where(self.is_examined, looks[:, None], 1).astype(np.float32)


def position_weights(position: NDArray[Any], item: NDArray[Any], clicked: NDArray[np.bool_]) -> Float32s:
    """Relative probabilities that users look at positions, float32 [1 + MOST_POSITIONS]; the first position has 1.

    Clicks are modeled as a rate per item times a weight per position, which are fitted in turn, so each item is
    compared with itself. The weights are biased if users prefer what is at the top beyond what the items' rates tell.

    Args:
        position: [N] from 1; item: int [N]; clicked: [N].
    """
    place = np.clip(position, 1, MOST_POSITIONS).astype(np.int64)
    weights = np.ones(1 + MOST_POSITIONS)
    of_items, of_places = np.bincount(item, clicked), np.bincount(place, clicked, len(weights))
    for _ in range(PLACE_STEPS):
        rate = of_items / np.maximum(np.bincount(item, weights[place]), 1e-9)
        weights = (of_places + 1) / (np.bincount(place, rate[item], len(weights)) + 1)
        weights /= weights[1]
    weights[place.max(initial=1) :] = weights[place.max(initial=1)]
    return np.clip(weights, LEAST_WEIGHT, 1).astype(np.float32)


@dataclass(frozen=True, slots=True)
class VisibleImpressions:
    """The impressions of the training part with a known label, sorted by user row and time."""

    shown: ChunkImpressions
    """All of them, where each user is a chunk that holds the whole history."""
    row: Int
    """int64 [N] rows of the log's impressions."""
    offsets: Int
    """int64 [num_users + 1]: user u has the impressions [offsets[u], offsets[u + 1])."""

    @classmethod
    def of(
        cls, log: EventLog, item_rows: Int, counts: Int, config: TrainConfig, tasks: list[str], since: int | None
    ) -> VisibleImpressions:
        """Those of a log.

        Args:
            item_rows: int64 [log.num_items], the model row of each of the log's items.
            counts: int64 [num_users] events of each user that training may use.
            tasks: the labels that are trained.
            since: leave out the impressions before this time (ms).
        """
        if (table := log.impressions) is None:
            none, empty = np.zeros(0, np.int64), np.zeros((0, 0), np.float32)
            shown = ChunkImpressions(none, none, none, none, empty, empty > 0, none)
            return cls(shown, none, np.zeros(log.num_users + 1, np.int64))
        visible = visible_rows(log, table, counts, config.data, since)
        columns = [table.tasks.index(task) for task in tasks]
        mask = table.known(visible.row, visible.hidden)[:, columns]
        kept = visible.select(np.flatnonzero(mask.any(1)))
        time = np.asarray(table.timestamp)[kept.row]
        use_time = log.has_time and config.model.reads("times")
        examination = Examination.of(log, config.optim.examined_tasks, config.data, tasks)
        if examination is not None and examination.weights is not None:
            weights = ", ".join(f"{weight:.2f}" for weight in examination.weights[1:11])
            logger.info("estimated probabilities that users look at positions 1, 2, ...: %s", weights)
        shown = ChunkImpressions(
            chunk=kept.user,
            position=kept.position,
            item=item_rows[table.item[kept.row]],
            gap=np.where(kept.position > 0, gap_bucket(time - kept.before), 0) if use_time else kept.position * 0,
            label=np.asarray(table.label)[kept.row][:, columns].astype(np.float32),
            mask=mask[mask.any(1)],
            time=time,
            examined=None if examination is None else examination.of_rows(table.features.select(kept.row)),
        )
        return cls(shown, kept.row, offsets_of(np.bincount(kept.user, minlength=log.num_users)))

    def ranges(self, user: Int, start: Int, stop: Int, first: Int) -> tuple[Int, Int]:
        """Index ranges of the impressions of chunks: positions in (start, stop], and `first` in a user's first chunk.

        So an impression between two chunks belongs to the earlier one, whose events it may see.

        Args:
            user: int64 [B] users of the chunks, which hold the events [start, stop) of these, int64 [B].
            first: int64 [B] events before a user's first chunk.
        """
        position = self.shown.position
        if len(position) == 0:
            return np.zeros(len(user), np.int64), np.zeros(len(user), np.int64)
        # (user, position) as one sorted key.
        width = int(max(position.max(), stop.max(initial=0))) + 2
        key = self.shown.chunk * width + position
        low = np.searchsorted(key, user * width + np.where(start > first, start, first - 1), side="right")
        high = np.searchsorted(key, user * width + stop, side="right")
        return low, high


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
NO_NEGATIVES = np.zeros(0, np.int64), np.zeros(0, np.float32)


def _no_features(*_: object) -> None:
    """The features that a model without any reads."""


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
    residual_task: str | None = None
    """The task whose labels its item space is made of; None for one of events."""
    encode_events: Callable[[RowFeatures, int], EncodedRows | None] = _no_features
    """From features of T events of the log to `Chunks.features`; None for a model that reads none, like the others."""
    encode_requests: Callable[[Int], EncodedRows | None] = _no_features
    """From rows int64 [N] of the log's impressions to `ChunkImpressions.features`."""
    encode_users: Callable[[Int], EncodedRows | None] = _no_features
    """From rows int64 [B] of the log's users to `Chunks.user_features`."""


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
        since = stored.since if stored else None
        tasks = trained_tasks(log, config.optim)

        self.counts = visible_counts(log, split_until(config.data, "train"))
        self._first = visible_counts(log, Until(before=since)) if stored else np.zeros(log.num_users, np.int64)
        """int64 [num_users]: events before a user's first label."""
        self._lead = config.model.tail_len if stored else 0
        self._impressions = VisibleImpressions.of(log, reads.item_rows, self.counts, config, tasks, since)
        # Users without events are included if they have impressions, which train the summary of an empty history.
        has_labels = np.diff(self._impressions.offsets) > 0
        if stored is None or config.ranks_items:
            has_labels |= self.counts > self._first
        self._users = np.flatnonzero(has_labels)
        if stored is not None and not len(self._users):
            raise ConfigError(
                f"store: was refreshed with until={since}, and no label of {log.path} lies between that and "
                f"data.validation_from={config.data.validation_from}; refresh it with an earlier until"
            )

        self.frequency = item_frequency(log, reads.item_rows, self.counts, reads.has_features)
        """int64 [largest row + 1] training events of each model row."""
        self._sampler = NegativeSampler(
            self.frequency, num_negatives=planned(config.data.num_negatives, "data.num_negatives")
        )
        self._adjustment = _logit_adjustment(self.frequency, config.optim.logq_strength)
        largest = int(reads.item_rows.max(initial=0))
        self._num_known = largest if reads.num_known is None else min(reads.num_known, largest)
        self._hides_items = self._num_known < largest
        rows = reads.item_rows
        self._history_rows = np.where(rows > self._num_known, 0, rows) if self._hides_items else rows
        """int64 [log.num_items], the model row of each of the log's items as histories and counters show it."""

        self._plan = CutPlan.of(config, has_time=log.has_time)
        if self._plan.anchors is not None and config.data.horizon_days > 0 and not log.has_time:
            raise ConfigError(f"data.horizon_days: {log.path} has no times; set it to 0 and use data.horizon_events")
        self.spaces: ItemSpaces | None = None
        """Of the model rows; None for a model without pooled vectors."""
        if dim := config.model.space_dim:
            num_rows, residuals = 1 + largest, None  # those of items that histories do not know are 0
            if (task := reads.residual_task) is not None:
                residuals = label_residuals(log, self._history_rows, self.counts, config.data, task)
                require(residuals is not None, "base", f"reads labels of {task!r}, which {log.path} does not tell")
            self.spaces = ItemSpaces(
                log, self._history_rows, self.counts, dim, seed=config.seed, num_rows=num_rows, residuals=residuals
            )
        self.rates: ItemRates | None = None
        """Of the model rows; None for a model without pooled vectors or tasks."""
        if self.spaces is not None and tasks:
            shown = self._impressions.shown
            self.rates = ItemRates(shown.item, shown.label, shown.mask, shown.chunk, 1 + largest, shown.examined)
        self._reads_counts = self._plan.anchors is not None and reads.keys is not None
        """Whether questions about next items read statistics."""
        self.statistics: ItemStatistics | None = None
        """Of the model rows; None for a model that does not read them."""
        if self._reads_counts or self.rates is not None:
            self.statistics = ItemStatistics(log, reads.item_rows, self.counts)
        self.transitions: TransitionCounts | None = None
        """Of the model rows; None for a model that does not read them."""
        if self._reads_counts and (size := config.model.num_transitions):
            self.transitions = TransitionCounts(log, reads.item_rows, self.counts, size)
        self._rewards = EventRewards(log, self.counts, config.optim) if config.optim.reward else None
        self._chunk_len = chunk_len(config)
        self._epoch = -1
        self._chunks: tuple[Int, Int, Int] = (np.zeros(0, np.int64),) * 3
        """Of the epoch, int64 [C] each: user, and the places of the first event and after the last one."""
        self._batches: list[Int] = []
        """Of the epoch: the chunks of each batch."""
        self.returning_share = 0.5
        """Share of counted items among the labels of anchors that have any, between 0 and 1."""
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
        if self._hides_items:
            is_hidden, drawn = batch.rows[batch.events.item] > self._num_known, batch.events.hidden
            is_hidden = is_hidden if drawn is None else drawn | is_hidden
            batch = replace(batch, events=replace(batch.events, hidden=is_hidden))
        if self.spaces is not None and self._config.ranks_items:
            batch = replace(batch, spaces=torch.from_numpy(self.spaces.of_rows(batch.rows.numpy())))
        if self._reads_counts and self.statistics is not None and batch.anchors is not None:
            statistics = self.statistics.as_of(batch.anchors.time.numpy(), batch.rows.numpy())
            batch = replace(batch, statistics=BatchStatistics(*map(torch.from_numpy, statistics)))
        if self.transitions is not None and batch.anchors is not None:
            sums = self.transitions.anchor_sums(batch, start - np.minimum(start, self._lead), self._num_known)
            batch = replace(batch, anchors=replace(batch.anchors, transitions=sums))
        if self._adjustment is not None:
            batch = replace(batch, logit_adjustment=torch.from_numpy(self._adjustment[batch.rows.numpy()]))
        return batch

    def _start_epoch(self, epoch: int) -> None:
        """Divide the histories into chunks, and these into batches, unless the epoch is that of the last call."""
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
        reads, model, stored, anchors = self._reads, self._config.model, self._stored, self._plan.anchors
        lead = np.minimum(start, self._lead)
        end = stop
        if anchors is not None:  # so many active events later
            end = self._log.counts_before_active(self._log.active_counts(stop, user) + anchors.horizon_events, user)
        trail = np.minimum(end, self.counts[user]) - stop
        timeline = self._log.gather_ranges(user, start - lead, stop + trail)
        events = timeline.select(np.zeros_like(lead), stop - start + lead)
        weight = of_timeline = None
        if self._rewards is not None:
            of_timeline = self._rewards.weights(user[timeline.owner], timeline)
            weight = self._rewards.weights(user[events.owner], events)
        time = np.asarray(events.timestamp)
        has_gaps = self._log.has_time and model.reads("times")
        chunks = Chunks(
            user=user,
            item=reads.item_rows[events.item],
            action=events.action.astype(np.int64),
            rating=None if events.rating is None else np.array(events.rating, np.float32),
            gap=history_gaps(time, events.offsets) if has_gaps else np.zeros(len(time), np.int64),
            clock=decay_clock(model.decay, time),
            offsets=events.offsets,
            impressions=self._impressions_of(user, start, stop, lead),
            features=reads.encode_events(events.features, events.num_events),
            user_features=reads.encode_users(user),
            weight=weight,
            is_active=self._log.is_active(events.action),
        )
        if anchors is not None:
            active = np.flatnonzero(self._log.is_active(timeline.action)) if self._log.passive else None
            item, time = reads.item_rows[timeline.item], np.asarray(timeline.timestamp)
            chunks.timeline = ChunkTimeline(item, time, timeline.offsets, of_timeline, active)
        if stored is not None:
            chunks.lead, chunks.summary = lead, stored.read(user)
        if reads.keys is not None or self.spaces is not None:
            whole = WholeHistories.of(self._log, self._history_rows, user, stop)
            counters = pooled = None
            if reads.keys is not None:
                counters = HistoryCounters.of(reads.keys, whole)
            if self.spaces is not None:
                pooled = self.spaces.of_histories(whole)
            covered = self._first[user] if stored else None
            chunks.histories = ChunkHistories(counters, pooled, whole.history, start - lead, covered)
        return chunks

    def _impressions_of(self, user: Int, start: Int, stop: Int, lead: Int) -> ChunkImpressions:
        """The impressions of chunks, at positions counted from the first of the `lead` events before each chunk."""
        visible = self._impressions
        low, high = visible.ranges(user, start, stop, self._first[user])
        index = ranges(low, high - low)
        shown = visible.shown.select(index)
        chunk = np.repeat(np.arange(len(user)), high - low)
        position = shown.position - (start - lead)[chunk]
        gap = np.where(position > 0, shown.gap, 0)
        features, measured = self._reads.encode_requests(visible.row[index]), None
        if self.rates is not None and self.statistics is not None:
            statistics = self.statistics.of_items(shown.time, shown.item)
            measured = np.concatenate([statistics, self.rates.of_items(shown.chunk, shown.item)], 1)
        return replace(shown, chunk=chunk, position=position, gap=gap, features=features, measured=measured)


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
    """The labeled tasks that a run trains, in the log's order. Raises ConfigError if `optim.tasks` names one that the
    log lacks."""
    offered = log.impressions.tasks if log.impressions is not None else []
    for name in optim.tasks:
        if name not in offered:
            raise ConfigError(
                f"optim.tasks: {log.path} has no task {name!r}; its tasks are: {', '.join(offered) or 'none'}"
            )
    if optim.task_weight == 0:
        return []
    return [name for name in offered if not optim.tasks or name in optim.tasks]


TOLD = 0.5
"""Least share of the variance of labels that actions must explain to tell them."""


def label_residuals(log: EventLog, item_rows: Int, counts: Int, data: DataConfig, task: str) -> LabelResiduals | None:
    """The labels of a task in the training part; None if actions do not tell them.

    An impression leads to the next event of the user, if that is of the same item.

    Args:
        item_rows: int64 [log.num_items], the model row of each of the log's items.
        counts: int64 [num_users] events of each user that training may use.
    """
    if (table := log.impressions) is None or task not in table.tasks:
        return None
    column, visible = table.tasks.index(task), visible_rows(log, table, counts, data, None)
    shown = visible.select(np.flatnonzero(table.known(visible.row, visible.hidden)[:, column]))
    item, label = np.asarray(table.item)[shown.row], np.asarray(table.label)[shown.row, column].astype(np.float64)
    followed = np.flatnonzero(shown.position < counts[shown.user])
    start = shown.position[followed]
    events = log.gather_ranges(shown.user[followed], start, start + 1, features=False)
    is_same = events.item == item[followed]
    told, action, size = label[followed[is_same]], np.asarray(events.action)[is_same], len(log.actions)
    count = np.bincount(action, minlength=size)
    of_action = np.where(count > 0, np.bincount(action, told, size) / np.maximum(count, 1), np.nan)
    if not len(told) or np.square(told - of_action[action]).mean() >= (1 - TOLD) * told.var():
        return None
    return LabelResiduals(shown.user, item_rows[item], label, of_action)


# Builds the batches of an epoch in a thread while steps run.

NUM_AHEAD = 2
"""Batches in memory besides that of the current step: one that is ready, and one that is being built. If building a
batch takes longer than a step, as for the first batch of a long history, the next step uses the one that is ready."""


class BatchPrefetcher:
    """An iterator over the batches of an epoch. One thread builds them in order, at most NUM_AHEAD ahead.

    The batches are those of `BatchSource.batch`, bit for bit. If building a batch fails, `next` raises the
    error of the thread, with its type and traceback, at that batch. Use this as a context manager, which ends the
    thread; until then, do not ask the source for another epoch.

    A thread is enough. Steps release the interpreter's lock in every operation of torch, and building releases it in
    NumPy and while it reads the log. A process would need its own copy of the source, and seconds to start.
    """

    def __init__(self, source: BatchSource, epoch: int, first: int) -> None:
        """
        Args:
            first: index of the first batch.
        """
        self._source, self._epoch = source, epoch
        self._left = iter(range(first, source.num_batches(epoch)))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vista-batches")
        self._ahead: deque[Future[Batch]] = deque()

    def __enter__(self) -> BatchPrefetcher:
        for _ in range(NUM_AHEAD):
            self._build_next()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop the batches that no step has asked for, and wait for the one that is being built."""
        self._thread.shutdown(cancel_futures=True)

    def __iter__(self) -> BatchPrefetcher:
        return self

    def __next__(self) -> Batch:
        if not self._ahead:
            raise StopIteration
        batch = self._ahead.popleft().result()
        self._build_next()
        return batch

    def _build_next(self) -> None:
        if (index := next(self._left, None)) is not None:
            self._ahead.append(self._thread.submit(self._source.batch, self._epoch, index))
