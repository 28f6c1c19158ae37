"""From the log to the bytes of the store: how a model reads a log, and how summaries become records and states.

`BatchEncoder` is the part of a full refresh that any number of processes can share.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config.checks import Decay, Mixing, Precision
from vista.counters.counters import CounterTable, ItemKeys
from vista.errors import ConfigError, RecordError
from vista.log.event_log import EventLog
from vista.log.features import declared_columns
from vista.log.histories import NO_TIMESTAMP, ColumnValues, Histories, token_groups
from vista.log.segment import features_of
from vista.log.segment_files import USERS
from vista.model import inference
from vista.model.features import FeatureSpec, Recode
from vista.model.history_states import covered_events, history_states, separable_summarizer
from vista.model.inference import LogUsers
from vista.model.ranking_model import UNKNOWN_ITEM, RankingModel
from vista.model.summarizer import SummaryState
from vista.model.vista_model import VistaModel
from vista.store.keys import history_digests, item_keys, user_id, user_keys
from vista.store.record import encode_records
from vista.store.record_spec import RecordSpec, Tail
from vista.store.state_record import StateArrays, StateSpec, UserSummaries, encode_states

logger = logging.getLogger(__name__)

Tables = tuple[CounterTable, ...]
"""One table of exact counters per field; empty for a model without counters."""

STAGES = ("read", "summarize", "encode", "wait", "write", "publish")
"""In a refresh with Ray, `wait` is the time until the actors return the next batch, and the first three are theirs."""


class StageClock:
    """Adds up the seconds that are spent in each of `STAGES`."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Context whose time counts toward a stage."""
        entered = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - entered


@dataclass(frozen=True, slots=True)
class BatchEncoder:
    """Reads the histories of a batch of users and encodes their records and states."""

    model: VistaModel
    """With a frozen summarizer."""
    log: EventLog
    items: LogItems
    features: LogUsers
    precision: Precision
    """Of the summarizer."""
    tokens_per_batch: int
    """Events that are read and summarized at once."""

    @classmethod
    def of(cls, model: VistaModel, log: EventLog, precision: Precision, tokens_per_batch: int) -> BatchEncoder:
        """The encoder of a model and a log that it can read (`check_log`)."""
        frozen = model.with_frozen("summarizer", precision)
        users = LogUsers(model.user_features, log)
        return cls(frozen, log, LogItems.of(model, log), users, precision, tokens_per_batch)

    def encode(
        self, users: Int, counts: Int, spec: RecordSpec, state_spec: StateSpec | None, clock: StageClock
    ) -> UserRecords:
        """Summarize users and encode the results. The bytes depend only on the arguments and the number of threads.

        Args:
            users: int64 [N] rows of the log.
            counts: int64 [N], how many of each user's events are summarized, oldest first.
            spec: what each record must hold.
            state_spec: what each state must hold; None to make no states.
            clock: gets the time of each stage.
        """
        encoded = UserRecords()
        for part in token_groups(counts, self.tokens_per_batch):
            summaries = self._summarize(users[part], counts[part], state_spec is not None, clock)
            with clock.stage("encode"):
                encoded.extend(encode_users(summaries, spec, state_spec))
        return encoded

    def _summarize(self, users: Int, counts: Int, with_states: bool, clock: StageClock) -> UserSummaries:
        with clock.stage("read"):
            histories = self.log.gather(users, counts)
            model_rows, digests = self.items.model_rows(histories), self.items.digests(histories)
        with clock.stage("summarize"):
            tables = count_histories(self.model.item_keys, model_rows)
            if with_states:
                state = state_of(self.model, model_rows)
                summary = read_summaries(self.model, state)
            else:
                state = state_without_summary(histories.lengths)
                summary = inference.summarize(self.model, model_rows).cpu().numpy()
            states = to_arrays(state, self.log.last_segment, digests, tables)
        with clock.stage("encode"):
            keys, features = user_keys(self.log.users.ids(users)), self.features.features(users).columns
            return user_summaries(self.model, keys, model_rows, histories.lengths, summary, states, features)


@dataclass(slots=True)
class UserRecords:
    """What one batch writes: a key, a record and, if the store keeps states, a state per user."""

    keys: list[bytes] = field(default_factory=list)
    records: list[bytes] = field(default_factory=list)
    states: list[bytes] = field(default_factory=list)
    num_events: int = 0
    """Events that were summarized, with those of users that failed."""
    failures: dict[str, str] = field(default_factory=dict)
    """Users whose summary cannot be stored, with the reason; they have no record."""

    def extend(self, other: UserRecords) -> None:
        """Append the records of another batch."""
        self.keys.extend(other.keys)
        self.records.extend(other.records)
        self.states.extend(other.states)
        self.num_events += other.num_events
        self.failures.update(other.failures)


def encode_users(users: UserSummaries, spec: RecordSpec, state_spec: StateSpec | None) -> UserRecords:
    """Encode records and, if there is a `state_spec`, states. Users whose summary cannot be stored are `failures`."""
    num_events = int(users.event_count.sum())
    try:
        records = encode_records(users, spec)
    except RecordError as error:
        if len(users) == 1:
            return UserRecords(num_events=num_events, failures={str(user_id(users.keys[0])): str(error)})
        encoded = UserRecords()
        for row in range(len(users)):
            encoded.extend(encode_users(users[row], spec, state_spec))
        return encoded
    states = []
    if users.states is not None and state_spec is not None:
        states = encode_states(users.keys, users.states, state_spec)
    return UserRecords(users.keys, records, states, num_events)


@dataclass(frozen=True, slots=True)
class LogItems:
    """What each item of a log becomes: its row in the model, and its key in history digests. Likewise for features."""

    rows: NDArray[np.int32]
    """[num_items] rows of the model; 0 for items it does not know."""
    keys: NDArray[np.uint64]
    """[num_items] keys of `vista.store.keys.item_keys`."""
    recode: Recode
    """Features of events with the model's codes."""

    @classmethod
    def of(cls, model: VistaModel, log: EventLog) -> LogItems:
        """Look up all items of a log. Warns if the model knows fewer than half of them."""
        ids = log.items.ids(np.arange(log.num_items))
        rows = model.history_rows(model.item_rows(ids)).astype(np.int32)
        known = int(np.count_nonzero(rows != UNKNOWN_ITEM))
        # With min_item_events, a model is meant to know few of the items.
        if 2 * known < log.num_items and not (known and model.data.min_item_events):
            logger.warning(
                "%s: the model knows only %d of %d items, and summarizes the others as one unknown item; train a model "
                "on this log",
                log.path,
                known,
                log.num_items,
            )
        return cls(rows, item_keys(ids), model.event_recoder(log.event_features))

    def model_rows(self, histories: Histories) -> Histories:
        """The same histories with items as rows of the model, and features with the model's codes."""
        features = self.recode(histories.features, histories.num_events)
        return replace(histories, item=self.rows[histories.item], features=features)

    def digests(self, histories: Histories) -> NDArray[np.uint64]:
        """History digests, uint64 [B], of histories whose items are rows of the log."""
        times, actions = np.asarray(histories.timestamp), np.asarray(histories.action)
        return history_digests(self.keys[histories.item], times, actions, histories.offsets)


def check_log(model: RankingModel, log: EventLog) -> None:
    """Refuse a log whose events or users the model would misread. Warns about features of them that the log lacks.

    Raises:
        ConfigError: the log's action codes differ from the model's, the model reads times and the log has none, or a
            feature of events or users is of another kind than the model's.
    """
    known = model.schema.actions
    if model.encoder.action is not None and log.actions != known[: len(log.actions)]:
        raise ConfigError(
            f"{log.path}: its actions are {log.actions}, but the model was trained on {known}; train a model "
            "on this log"
        )
    stage1 = model.stage1
    reads_times = stage1.has_gap or stage1.decay is Decay.time or stage1.counters is not None
    if model.schema.has_time and not log.has_time and reads_times:
        raise ConfigError(f"{log.path}: has no times, which this model reads; train a model on this log")
    _check_features(log, "events", model.schema.event_features, _kinds(log.event_features))
    if model.schema.user_features:
        columns = declared_columns(features_of(log.segments, USERS))  # without reading the features of all users
        of_log = {name: parts[0].columns[name].kind for name, parts in columns.items()}
        _check_features(log, "users", model.schema.user_features, of_log)


def check_requests(model: RankingModel, log: EventLog) -> None:
    """Refuse a log whose impressions the model would misread. Warns about features of requests that the log lacks.

    Raises:
        ConfigError: a feature of requests is of another kind than the model's.
    """
    if any(segment.impressions is not None for segment in log.segments):
        _check_features(log, "impressions", model.schema.request_features, _kinds(log.request_features))


def _kinds(values: ColumnValues) -> dict[str, str]:
    return {name: "number" if known is None else "category" for name, known in values.items()}


def _check_features(log: EventLog, table: str, columns: Sequence[FeatureSpec], kinds: Mapping[str, str]) -> None:
    """Compare the columns that a model reads of a table with those of a log, which have these kinds."""
    for column in columns:
        kind = kinds.get(column.name, column.kind)
        if kind != column.kind:
            key = {"number": "numbers", "category": "categories"}[column.kind]
            raise ConfigError(
                f"{log.path}: the feature {column.name!r} of {table} is a {kind}, but a {column.kind} to the model; "
                f"prepare the log with {table}.{key}=[{column.name}], or train a model on this log"
            )
    if lacking := [column.name for column in columns if column.name not in kinds]:
        logger.warning(
            "%s: lacks the features %s of %s, so the model takes them as missing", log.path, ", ".join(lacking), table
        )


def has_states(model: VistaModel) -> bool:
    """Whether new events can be added to what the model keeps of earlier ones.

    Models with bidirectional mixing have no states. Neither do models with a history limit, because each new event
    pushes an old one out. Without a summarizer, states hold the counters alone.
    """
    if model.summarizer is None:
        return model.stage1.counters is not None
    return model.stage1.mixing is Mixing.separable and model.stage1.history_limit == 0


def state_of(model: VistaModel, histories: Histories) -> SummaryState:
    """States of histories with items as rows of the model; without numbers if the model has no summarizer.

    They hold the events that a summary covers.
    """
    if model.summarizer is None:
        return state_without_summary(histories.lengths)
    return history_states(model, covered_events(model, histories))


def state_without_summary(num_events: Int) -> SummaryState:
    """States without sums, which cover `num_events` [N] events: of a model without a summarizer, or not stored."""
    state = SummaryState.empty(len(num_events), 0, 0, 0, "cpu")
    return replace(state, num_events=torch.from_numpy(num_events))


def to_arrays(
    state: SummaryState, applied_segment: int, history_digest: NDArray[np.uint64], counters: Tables
) -> StateArrays:
    """Convert states of the model to those of the store.

    Args:
        state: the states of N users.
        applied_segment: newest segment of the log that they cover.
        history_digest: [N] digests of the whole histories.
        counters: of the N users.
    """
    z, n, removed, clock, num_events = (
        getattr(state, name).cpu().numpy() for name in ("z", "n", "removed", "clock", "num_events")
    )
    applied = np.full(len(n), applied_segment, np.int64)
    return StateArrays(z, n, removed, clock, num_events, applied, history_digest, counters)


def from_arrays(arrays: StateArrays, device: torch.device) -> SummaryState:
    """Convert states of the store to those of the model, on a device."""
    columns = (arrays.z, arrays.n, arrays.removed, arrays.clock, arrays.num_events)
    return SummaryState(*(torch.from_numpy(column).to(device) for column in columns))


@torch.inference_mode()
def read_summaries(model: VistaModel, state: SummaryState) -> NDArray[np.float32]:
    """Summaries that the seeds read from states, float32 [N, K, d]."""
    if model.summarizer is None:
        return np.zeros((len(state.num_events), 0, model.config.dim), np.float32)
    summary: NDArray[np.float32] = separable_summarizer(model).read(state.z, state.n).float().cpu().numpy()
    return summary


def count_histories(keys: ItemKeys | None, histories: Histories) -> Tables:
    """Counters of whole histories, whose items are rows of the model."""
    if keys is None:
        return ()
    events = keys.of(histories.item.astype(np.int64))
    return tuple(CounterTable.of(keys.spec, key, histories.timestamp, histories.offsets) for key in events)


def append_events(keys: ItemKeys | None, tables: Sequence[CounterTable], new: Histories) -> Tables:
    """Counters with the events `new` of the same users added, which follow all earlier ones."""
    if keys is None:
        return ()
    events = zip(tables, keys.of(new.item.astype(np.int64)), strict=True)
    return tuple(table.appended(key, new.timestamp, new.offsets) for table, key in events)


def user_summaries(
    model: VistaModel,
    keys: list[bytes],
    newest: Histories,
    event_count: Int,
    summary: NDArray[np.float32],
    states: StateArrays,
    features: Mapping[str, NDArray[Any]],
) -> UserSummaries:
    """Everything that the records and states of N users hold.

    Args:
        model: the one that the summaries are of.
        keys: of the users.
        newest: at least the last `tail_len` events of each user, as `LogItems.model_rows` gives them.
        event_count: [N] length of each history.
        summary: [N, K, d].
        states: of the whole histories, with their digests and counters; without sums if they are not stored.
        features: of the users, with the model's codes, [N] by name.
    """
    return UserSummaries(
        keys=keys,
        summary=summary,
        tail=stored_tail(model, newest),
        event_count=event_count,
        last_event_ts=last_times(newest),
        history_digest=states.history_digest,
        counters=tuple(table.top(table.spec.keys[field]).codes() for field, table in enumerate(states.counters)),
        features=features,
        states=states,
    )


def stored_tail(model: VistaModel, newest: Histories) -> Tail:
    """The last `tail_len` events of histories as `LogItems.model_rows` gives them, in the form of a record."""
    last = newest.select(np.maximum(newest.lengths - model.config.tail_len, 0), newest.lengths)
    features = {name: last.features.columns[name] for name in model.schema.tail_sizes}
    times, actions = np.asarray(last.timestamp), np.asarray(last.action)
    return Tail(last.item.astype(np.int32), times, actions, last.offsets, features)


def last_times(histories: Histories) -> Int:
    """Times of the newest events, int64 [B]; NO_TIMESTAMP for an empty history."""
    if histories.num_events == 0:
        return np.full(histories.num_users, NO_TIMESTAMP, np.int64)
    times = np.asarray(histories.timestamp)[np.maximum(histories.offsets[1:] - 1, 0)]
    return np.where(histories.lengths > 0, times, NO_TIMESTAMP)
