"""What a stored summary recalls: the decoder ranks a user's events among equally popular items new to the user.

The decoder predicts the events of a window one by one, from the summary and the window's earlier events. The earlier
events alone say much about the next one, so the decoder is also given another user's summary. Only the difference
counts as recall. Letters: U users, T events of windows, N negatives, S seeds, M model dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Float32s, Floats, Int, offsets_of
from vista.errors import ConfigError
from vista.examples.item_statistics import item_counts
from vista.log.event_log import EventLog
from vista.log.histories import Histories, history_gaps, ranges
from vista.log.splits import split_until, visible_counts
from vista.model.history_states import covered_lengths
from vista.model.vista_model import VistaModel
from vista.progress_bar import progress_bar
from vista.scorer import Scorer
from vista.text_table import text_table

AGES = (0, 32, 128, 512, 2048, 8192)
"""Lower ends of the bands of age, in events before the summary's cut; the last band has no upper end."""
WINDOW = 32
"""Most events in a window; there is one window per user and band."""
NUM_NEGATIVES = 100
NUM_NEIGHBORS = 50
"""Negatives are drawn from this many items that are next more popular than the event's, and as many less popular."""
USERS_PER_BATCH = 64


@dataclass(frozen=True, slots=True)
class RecallReport:
    """Share of the negatives that a true event beats (0.5 is chance), one entry per band of `AGES`; NaN if empty."""

    own: Floats
    """With the user's own summary."""
    other: Floats
    """With another user's."""
    num_events: Int

    def metrics(self) -> dict[str, float]:
        """Scalars for a row of results, "recall/0-31" and so on: the difference of `own` and `other`."""
        return {f"recall/{band}": float(gap) for band, gap in zip(bands(), self.own - self.other, strict=True)}

    def __str__(self) -> str:
        rows = [
            [band, f"{own:.4f}", f"{other:.4f}", f"{own - other:.4f}", f"{count:,}"]
            for band, own, other, count in zip(bands(), self.own, self.other, self.num_events, strict=True)
        ]
        return text_table(["age in events", "own", "other", "recall", "events"], rows)


def bands() -> list[str]:
    """Names of the bands of age: "0-31", …, "8192+"."""
    return [*(f"{low}-{high - 1}" for low, high in pairwise(AGES)), f"{AGES[-1]}+"]


@torch.inference_mode()
def measure_recall(scorer: Scorer, log: EventLog, *, max_users: int = 2000, seed: int = 0) -> RecallReport:
    """Measure the summaries of a scorer's store over the events of `log` that they cover.

    Args:
        max_users: most users to measure, drawn at random from those with events.
        seed: draws users, windows and negatives.

    Raises:
        ConfigError: if the model has no summaries, or fewer than two users have a record.
    """
    model = scorer.model
    if model.decoder is None:
        raise ConfigError("recall: this model has no summaries (model.num_seeds=0); set recall=false")
    rng = np.random.default_rng(seed)
    users = np.flatnonzero(log.lengths > 0)
    users = np.sort(rng.choice(users, min(max_users, len(users)), replace=False))
    stored = scorer.store.get_many(log.users.ids(users))
    covered = covered_lengths(model, stored.event_count)
    known = stored.found & (covered > 0)
    if known.sum() < 2:
        raise ConfigError(f"{scorer.store.path}: fewer than two users of {log.path} have a record; refresh the store")
    users, summary = users[known], stored.summary[known]
    count = np.minimum(covered[known], log.lengths[users])
    items = RecallItems(model, log)
    # The other user of a row is the next one; of the last row, the first.
    return _measured(model, log, items, users, count, summary, np.roll(summary, -1, axis=0), rng)


@torch.inference_mode()
def recall_of_user(
    scorer: Scorer, log: EventLog, items: RecallItems, user: int, *, num_windows: int = 32, seed: int = 0
) -> RecallReport | None:
    """Measure the summary of one user, with several windows per band; None if there is no summary to measure.

    Args:
        items: of the scorer's model and of `log`; keep it for further users.
        user: row of the log.
        num_windows: windows per band, each compared with the summary of another random user.
        seed: draws windows, negatives, and the other users.
    """
    model, rng = scorer.model, np.random.default_rng(seed)
    stored = scorer.store.get_many(log.users.ids([user]))
    covered = np.minimum(covered_lengths(model, stored.event_count), log.lengths[user])
    if model.decoder is None or not stored.found[0] or covered[0] == 0:
        return None
    # Some of the drawn users may have no record, and one may be this user.
    drawn = rng.permutation(log.num_users)[: 4 * num_windows]
    drawn = drawn[(drawn != user) & log.users.has_ids(drawn)]
    others = scorer.store.get_many(log.users.ids(drawn))
    theirs = others.summary[others.found][:num_windows]
    if not len(theirs):
        return None
    repeated = np.full(len(theirs), user)
    own = np.repeat(stored.summary, len(theirs), axis=0)
    return _measured(model, log, items, repeated, np.full(len(theirs), covered[0]), own, theirs, rng)


def _measured(
    model: VistaModel,
    log: EventLog,
    items: RecallItems,
    users: Int,
    count: Int,
    own: Float32s,
    other: Float32s,
    rng: np.random.Generator,
) -> RecallReport:
    """The report over U histories, the first `count` [U] events of `users` [U], with two summaries each, [U, S, M]."""
    totals = np.zeros((3, len(AGES)))
    for low in progress_bar(range(0, len(users), USERS_PER_BATCH), desc="recall", unit="batch"):
        part = slice(low, low + USERS_PER_BATCH)
        histories = log.gather(users[part], count[part])
        summaries = [torch.from_numpy(each[part]).to(model.device) for each in (own, other)]
        for band, (age, end) in enumerate(zip(AGES, (*AGES[1:], None), strict=True)):
            windows = _random_windows(histories.lengths, age, end, rng)
            if len(windows[0]):
                won = _share_beaten(model, items, histories, windows, summaries, rng)
                totals[:, band] += [*won.sum(1), won.shape[1]]
    with np.errstate(invalid="ignore"):
        shares = totals[:2] / totals[2]
    return RecallReport(shares[0], shares[1], totals[2].astype(np.int64))


class RecallItems:
    """The items of the model's histories in order of popularity, and the rows that these have for the log's items."""

    def __init__(self, model: VistaModel, log: EventLog) -> None:
        self.rows = model.history_rows(model.rows_of(log.items))  # summaries hold items as histories show them
        counts = np.zeros(1 + model.num_trained_items, np.int64)
        np.add.at(counts, self.rows, item_counts(log, visible_counts(log, split_until(model.data, "train"))))
        self.by_popularity = np.argsort(-counts[1:], kind="stable") + 1
        """int64 [V] model rows, most popular first."""
        self.rank = np.empty(len(counts), np.int64)
        self.rank[self.by_popularity] = np.arange(len(self.by_popularity))

    def alike(self, item: Int, rng: np.random.Generator, num_neighbors: int = NUM_NEIGHBORS) -> Int:
        """Model rows int64 [T, N] of items about as popular as `item` int64 [T] (model rows)."""
        near = min(num_neighbors, max(1, (len(self.by_popularity) - 1) // 2))
        step = rng.integers(1, near + 1, (len(item), NUM_NEGATIVES)) * rng.choice([-1, 1], (len(item), NUM_NEGATIVES))
        rank = self.rank[item][:, None] + step
        last = len(self.by_popularity) - 1
        # A step beyond an end goes the other way.
        rank = np.where((rank < 0) | (rank > last), self.rank[item][:, None] - step, rank)
        alike: Int = self.by_popularity[np.clip(rank, 0, last)]
        return alike


def _random_windows(lengths: Int, age: int, end: int | None, rng: np.random.Generator) -> tuple[Int, Int, Int]:
    """A random window of each history that reaches into the band [age, end) of events before its end.

    Returns:
        int64 [W] each: histories, and the places of the window's first event and after its last one.
    """
    rows = np.flatnonzero(lengths > age)
    stop = lengths[rows] - age
    begin = np.maximum(lengths[rows] - end, 0) if end is not None else stop * 0
    size = np.minimum(stop - begin, WINDOW)
    start = begin + (rng.random(len(rows)) * (stop - begin - size + 1)).astype(np.int64)
    return rows, start, start + size


def _share_beaten(
    model: VistaModel,
    items: RecallItems,
    histories: Histories,
    windows: tuple[Int, Int, Int],
    summaries: list[Tensor],
    rng: np.random.Generator,
) -> Floats:
    """Share of its negatives that each event of the windows beats, by summary: float64 [len(summaries), T].

    Leaves out events with an item that the model does not know, and those whose negatives are all in the history.
    """
    assert model.decoder is not None
    history, start, stop = windows
    lengths = stop - start
    index = ranges(histories.offsets[:-1][history] + start, lengths)
    row = np.repeat(history, lengths)
    item = items.rows[histories.item[index]]
    negatives = items.alike(item, rng)
    num_items = len(items.rank)
    seen = np.repeat(np.arange(histories.num_users), histories.lengths) * num_items + items.rows[histories.item]
    valid = ~np.isin(row[:, None] * num_items + negatives, seen) & (item > 0)[:, None]

    def tensor(values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(model.device)

    has_gap = model.encoder.gap is not None
    gap = history_gaps(np.asarray(histories.timestamp), histories.offsets)[index] if has_gap else item * 0
    action, gaps = tensor(histories.action[index].astype(np.int64)), tensor(gap)
    rating = None if histories.rating is None else tensor(histories.rating[index])
    target = model.encoder(model.item_vectors(tensor(item)), action, gaps, rating)
    # The same events with other items.
    others = model.encoder(
        model.item_vectors(tensor(negatives)),
        action[:, None],
        gaps[:, None],
        None if rating is None else rating[:, None],
    )
    offsets = tensor(offsets_of(lengths))
    age = tensor(histories.lengths[history] - start)
    judged = valid.any(1)
    shares = []
    for summary in summaries:
        predicted = model.decoder(summary[tensor(history)], target, offsets, age)
        own = (predicted[:, None] - target[:, None]).square().sum(-1)
        theirs = (predicted[:, None] - others).square().sum(-1)
        beaten = ((own < theirs).double() + 0.5 * (own == theirs).double()).cpu().numpy()
        shares.append((beaten * valid).sum(1)[judged] / valid.sum(1)[judged])
    return np.stack(shares)
