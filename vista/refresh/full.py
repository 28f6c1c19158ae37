"""Full refresh: summarize every user into a new generation and publish it; resumable after an interruption.

It begins with how summaries become records and states, which all refreshes share.
`BatchEncoder` is the part that any number of processes can share.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config.checks import Mixing, Precision, StateDtype
from vista.config.store_config import RefreshOptions
from vista.counters.counters import CounterTable
from vista.device import choose_precision
from vista.errors import ConfigError, RecordError
from vista.log.event_log import EventLog
from vista.log.histories import NO_TIMESTAMP, Histories, RowFeatures, token_groups
from vista.log.splits import Until, parse_until, visible_counts
from vista.model import inference
from vista.model.history_states import GrowingStates, history_states, separable_summarizer
from vista.model.inference import LogUsers
from vista.model.item_feature_table import largest_keys
from vista.model.summarizer import SummaryState
from vista.model.vista_model import VistaModel
from vista.progress_bar import progress_bar
from vista.refresh.log_reading import LogItems, check_log, item_values
from vista.store.item_values import ItemValues
from vista.store.keys import user_id, user_keys
from vista.store.layout import Shard, StoreUrl, open_private, shard_to_write
from vista.store.manifest import Manifest, start_of_run
from vista.store.record import CounterLayout, RecordSpec, Tail, TailColumn, UserColumn
from vista.store.record_encoding import encode_records
from vista.store.state_record import StateArrays, StateSpec, UserSummaries, encode_states
from vista.store.writer import StoreWriter

if TYPE_CHECKING:
    from vista.refresh.ray_engine import RayEngine

logger = logging.getLogger(__name__)
MAX_FAILED_SHARE, MAX_FAILED_USERS = 0.01, 10
"""A run stops if more users fail than both limits allow, or if all of them fail."""
NAMED_FAILURES = 20
"""A report names at most this many failed users."""

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
    features: Callable[[Int], RowFeatures]
    """Features of users (rows of the log) with the model's codes."""
    precision: Precision
    """Of the summarizer."""
    tokens_per_batch: int
    """Events that are read and summarized at once."""
    growing: GrowingStates | None = None
    """States of earlier refreshes, to which the new events are added; None computes all states from the log."""

    @classmethod
    def of(
        cls,
        model: VistaModel,
        log: EventLog,
        precision: Precision,
        tokens_per_batch: int,
        features: Callable[[Int], RowFeatures] | None = None,
    ) -> BatchEncoder:
        """The encoder of a model and a log that it can read (`check_log`); by default, it reads all users' features."""
        features = features or LogUsers(model.user_features, log).features
        frozen = model.with_frozen("summarizer", precision)
        return cls(frozen, log, LogItems.of(model, log), features, precision, tokens_per_batch)

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
            sums = sums_of_histories(self.model, model_rows)
            if with_states:
                state = state_of(self.model, model_rows)
                summary = read_summaries(self.model, state)
            else:
                state = state_without_summary(histories.lengths)
                grown = None if self.growing is None else self.growing.summarize(users, model_rows)
                summary = (inference.summarize(self.model, model_rows) if grown is None else grown).cpu().numpy()
            states = to_arrays(state, self.log.last_segment, digests, sums)
        with clock.stage("encode"):
            keys, features = user_keys(self.log.users.ids(users)), self.features(users).columns
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


def has_states(model: VistaModel) -> bool:
    """Whether new events can be added to what the model keeps of earlier ones.

    Models with bidirectional mixing have no states. Neither do models with a history limit, because each new event
    pushes an old one out. Without a summarizer, states hold counters and sums of item vectors alone.
    """
    if model.summarizer is None:
        return model.stage1.counters is not None or model.stage1.pooled_dim > 0
    return model.stage1.mixing is Mixing.separable and model.stage1.history_limit == 0


def state_of(model: VistaModel, histories: Histories) -> SummaryState:
    """States of histories with items as rows of the model; without numbers if the model has no summarizer."""
    if model.summarizer is None:
        return state_without_summary(histories.lengths)
    return history_states(model, histories)


def state_without_summary(num_events: Int) -> SummaryState:
    """States without sums, which cover `num_events` [N] events: of a model without a summarizer, or not stored."""
    state = SummaryState.empty(len(num_events), 0, 0, 0, "cpu")
    return replace(state, num_events=torch.from_numpy(num_events))


@dataclass(frozen=True, slots=True)
class HistorySums:
    """What is added up over all events of N users, whichever of them summaries cover."""

    counters: tuple[CounterTable, ...]
    """Exact counters, one table per field; empty for a model without counters."""
    pooled: NDArray[np.float64]
    """[N, r] sums of the vectors of items (`vista.examples.item_spaces`); r is 0 for a model without pooled vectors."""


def sums_of_histories(model: VistaModel, histories: Histories) -> HistorySums:
    """The sums of whole histories, whose items are rows of the model."""
    tables: tuple[CounterTable, ...] = ()
    if (keys := model.item_keys) is not None:
        of_fields = keys.of_events(histories.item, histories.action, histories.timestamp, histories.offsets)
        tables = tuple(CounterTable.of(keys.spec, key, histories.timestamp, histories.offsets) for key in of_fields)
    return HistorySums(tables, inference.pooled_sums(model, histories.item, histories.action, histories.offsets))


def to_arrays(
    state: SummaryState, applied_segment: int, history_digest: NDArray[np.uint64], sums: HistorySums
) -> StateArrays:
    """Convert states of the model to those of the store.

    Args:
        state: the states of N users.
        applied_segment: newest segment of the log that they cover.
        history_digest: [N] digests of the whole histories.
        sums: of the N users.
    """
    z, n, removed, clock, num_events = (
        getattr(state, name).cpu().numpy() for name in ("z", "n", "removed", "clock", "num_events")
    )
    applied = np.full(len(n), applied_segment, np.int64)
    return StateArrays(z, n, removed, clock, num_events, applied, history_digest, sums.pooled, sums.counters)


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
        states: of the whole histories, with their digests and `HistorySums`; without `z` if it is not stored.
        features: of the users, with the model's codes, [N] by name.
    """
    return UserSummaries(
        keys=keys,
        summary=np.concatenate([summary, inference.pooled_rows(model, states.pooled, event_count)], 1),
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


EncodeBatches = Callable[[Iterable[slice], StoreWriter, StageClock], Generator[UserRecords, None, None]]
"""Encodes slices of the run's users, in their order."""


def refresh(
    model: VistaModel,
    log: EventLog,
    store: str | Path | StoreUrl,
    *,
    until: str | int | Until | None = None,
    options: RefreshOptions | None = None,
    shard: Shard | None = None,
    engine: RayEngine | None = None,
    key: bytes | None = None,
    created_at: int | None = None,
    users: Int | None = None,
    growing: GrowingStates | None = None,
) -> RefreshReport:
    """Summarize all users with at least one visible event and publish the summaries as one generation.

    An interrupted refresh resumes where it stopped if model, log, `until`, codec, state and precision are unchanged;
    otherwise it starts over.

    Args:
        model: it is left in eval mode.
        log: items outside the model's vocabulary count as unknown items.
        store: the store's folder, made if it does not exist, or its URL.
        until: which events summaries may cover: None (all), "leave-last-out", "leave-last-N-out", an ISO time, ms, or
            "TIME-less-N".
        options: what is stored and how the work is batched. States are kept only where incremental refreshes can use
            them: not with bidirectional mixing, a history limit, `until`, or K = 0 without counters and pooled vectors.
        shard: write only the users of this shard, into the folder `<store>/part-i-of-n`.
        engine: encodes the batches in other processes; None encodes them in this one. A run can resume with another
            engine. The bytes of the store are the same if both compute with the same number
            of threads on the same kind of processor.
        key: 32 bytes, to authenticate the records with.
        created_at: start of the run in ms, which records state; by default now. A resumed run keeps its own.
        users: int64 sorted rows of the log, the users that are asked about; None writes all.
        growing: states of refreshes with an earlier `until`, to which new events are added, of a store without states.

    Raises:
        ConfigError: the model cannot read this log, `until` is not valid for it, the store is sharded and no shard is
            named, or `options.state` asks for states that cannot be kept.
        LogFormatError: a file of the log is damaged.
        StoreLockedError, StoreError, RecordError: the previous generation stays in service.
    """
    options = options or RefreshOptions()
    limit = until if isinstance(until, Until) else parse_until(until)
    check_log(model, log)
    if options.verify_log:
        log.verify()
    target, shard = shard_to_write(store, shard)
    state = _stored_state(options.state, target, can_keep=has_states(model) and limit == Until())
    model.eval()
    precision = choose_precision(options.precision, model.device)
    counts = visible_counts(log, limit)
    users = np.flatnonzero(counts) if users is None else users[counts[users] > 0]
    if shard is not None:
        users = users[shard.holds(user_keys(log.users.ids(users)))]
    manifest = new_manifest(
        model,
        state,
        created_at,
        codec=options.codec.value,
        until=str(limit) if limit.held_out or limit.before is None else limit.before,
        applied_segment=log.last_segment,
        log_digest=log.sources_digest(log.last_segment),
        total_users=len(users),
        run_digest=_run_digest(log, counts, precision, shard, users),
    )
    encoder = replace(BatchEncoder.of(model, log, precision, options.tokens_per_batch), growing=growing)

    def encode_batches(
        batches: Iterable[slice], writer: StoreWriter, clock: StageClock
    ) -> Generator[UserRecords, None, None]:
        with_counts = ((users[batch], counts[users[batch]]) for batch in batches)
        if engine is not None:
            return engine.encode(encoder, with_counts, writer.spec, writer.state_spec, clock)
        return (encoder.encode(*batch, writer.spec, writer.state_spec, clock) for batch in with_counts)

    # Of a sharded store, readers read those of the first shard.
    values = None
    if shard is None or shard.index == 0:
        values = partial(item_values, model, log, encoder.items.all_rows, counts, limit)
    return write_generation(target, manifest, "full", encode_batches, values, options=options, key=key)


@dataclass(frozen=True, slots=True)
class RefreshReport:
    """What a refresh did."""

    store: str
    generation: int
    num_users: int
    """Users that the run covers: all users with events, or those with changes."""
    resumed_at: int
    """How many of these users an earlier, interrupted run had already written."""
    num_events: int
    """Events summarized in this run."""
    seconds: float
    shares: dict[str, float]
    """Share of the time per stage; the shares add up to 1."""
    counts: dict[str, int] = field(default_factory=dict)
    """Users by outcome: written, appended, exchanged, recomputed, removed, erased, unchanged, failed."""
    failures: dict[str, str] = field(default_factory=dict)
    """Some of the users that failed, with the reason; their old records, if any, stay."""
    bytes_per_user: float = 0.0
    """Mean size of the records that this run wrote; 0 if it wrote none."""

    def __str__(self) -> str:
        done = self.num_users - self.resumed_at
        stages = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items() if share)
        resumed = f" ({self.resumed_at} of them by an earlier run)" if self.resumed_at else ""
        size = f", {self.bytes_per_user:,.0f} bytes per user" if self.bytes_per_user else ""
        counts = "".join(f"; {number} {what}" for what, number in self.counts.items() if number)
        failed = "".join(f"\nuser {user} failed: {reason}" for user, reason in self.failures.items())
        return (
            f"generation {self.generation} of {self.store}: {self.num_users} users{resumed}, {self.num_events} events "
            f"in {self.seconds:.1f} s: {done / max(self.seconds, 1e-9):,.0f} users/s ({stages}){size}{counts}{failed}"
        )


class RefreshProgress(StageClock):
    """Seconds per stage, users by outcome, a progress bar, and `<store>/refresh.jsonl`, which keeps every run's log.

    Args:
        store: the store's folder. Of a store on a server, given by its URL, no log is kept.
        kind: kind of the refresh in the log: full, incremental or merge.
        total: how many users the run covers.
        done: how many of them an earlier, interrupted run had written.
    """

    def __init__(self, store: Path | StoreUrl, kind: str, total: int, done: int) -> None:
        super().__init__()
        self._store = store
        self._kind, self._total = kind, total
        self._began = time.perf_counter()
        self._bar = progress_bar(total=total, initial=done, desc="refresh", unit="user")
        self._done, self._resumed_at, self.num_events = done, done, 0
        self.counts: Counter[str] = Counter()
        self.failures: dict[str, str] = {}
        self._num_records = self._num_bytes = 0

    def encoded(self, records: UserRecords) -> None:
        """Count the sizes of records, and the users that failed.

        Raises:
            RecordError: too many users failed, so the cause is the model or the code, not their events. The message has
                the first one's reason.
        """
        self._num_records += len(records.records)
        self._num_bytes += sum(map(len, records.records))
        for user, reason in records.failures.items():
            self.counts["failed"] += 1
            if len(self.failures) < NAMED_FAILURES:
                self.failures[user] = reason
        failed = self.counts["failed"]
        if failed == self._total > 0 or failed > max(MAX_FAILED_USERS, MAX_FAILED_SHARE * self._total):
            user, reason = next(iter(self.failures.items()))
            raise RecordError(f"{failed} users failed; the first one is {user!r}: {reason}")

    def batch(self, generation: int, num_users: int, num_events: int) -> None:
        """Record that a batch is durable."""
        self._done += num_users
        self.num_events += num_events
        self._bar.update(num_users)
        seconds = time.perf_counter() - self._began
        rate = (self._done - self._resumed_at) / max(seconds, 1e-9)
        if isinstance(self._store, StoreUrl):
            return
        line = {
            "time_ms": time.time_ns() // 1_000_000,
            "kind": self._kind,
            "generation": generation,
            "users": self._done,
            "of": self._total,
            "events": self.num_events,
            "seconds": round(seconds, 3),
            "users_per_s": round(rate, 1),
            "seconds_left": round((self._total - self._done) / max(rate, 1e-9), 1),
            "stages": {name: round(value, 3) for name, value in self.seconds.items()},
        }
        path = self._store / "refresh.jsonl"
        try:
            with open(path, "a", opener=lambda _, flags: open_private(path, flags)) as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # The log is optional: the batch is durable without it.
            logger.warning("%s: %s", path, error.strerror)

    def report(self, generation: int) -> RefreshReport:
        """End the run."""
        self._bar.close()
        seconds = time.perf_counter() - self._began
        shares = {stage: value / max(seconds, 1e-9) for stage, value in self.seconds.items()}
        shares["other"] = 1 - sum(shares.values())
        return RefreshReport(
            str(self._store),
            generation,
            self._total,
            self._resumed_at,
            self.num_events,
            seconds,
            shares,
            dict(self.counts),
            self.failures,
            self._num_bytes / max(self._num_records, 1),
        )


def new_manifest(model: VistaModel, state: StateDtype, created_at: int | None, **fields: Any) -> Manifest:
    """The manifest of a generation that a model's summaries will fill.

    Args:
        model: the one that makes the summaries.
        state: how states are stored; `StateDtype.none` to keep no states.
        created_at: start of the run in ms; None for now.
        fields: further fields of the manifest, which the model does not decide.
    """
    config = model.config
    shape = (model.stage1.num_layers, config.num_heads, config.dim // config.num_heads)
    has_sums = state is not StateDtype.none and model.summarizer is not None
    counted, counters = model.counter_spec, None
    if counted is not None:
        counters = CounterLayout.of(counted, largest_keys(counted, model.schema, len(model.items))).to_dict()
    return Manifest(
        created_at=start_of_run(created_at),
        summarizer_id=model.summarizer_id().hex(),
        num_tokens=config.num_rows,
        dim=config.dim,
        tail_len=config.tail_len,
        state_dtype=state.value,
        state_shape=shape if has_sums else (0, 0, 0),
        pooled_dim=0 if state is StateDtype.none else model.stage1.pooled_dim,
        counters=counters,
        user_columns=[asdict(column) for column in user_columns(model)],
        tail_columns=[asdict(TailColumn(*column)) for column in model.schema.tail_sizes.items()],
        **fields,
    )


def user_columns(model: VistaModel) -> list[UserColumn]:
    """What records of a model hold of users' features."""
    return [] if model.user_features is None else [UserColumn(*column) for column in model.user_features.digests()]


def write_generation(
    store: Path | StoreUrl,
    manifest: Manifest,
    kind: str,
    encode_batches: EncodeBatches,
    values: Callable[[], ItemValues | None] | None,
    *,
    options: RefreshOptions,
    key: bytes | None,
) -> RefreshReport:
    """Fill a new generation in durable batches and publish it; an interrupted run resumes.

    Args:
        store: the store's folder or URL.
        manifest: what the generation will be.
        kind: kind of the refresh in its log, full or merge.
        encode_batches: makes the records of each batch of up to `options.users_per_batch` of the run's users.
        values: makes the values of items, after the records; None makes none.
        options: users_per_batch and shared_with_group.
        key: 32 bytes, to authenticate the records with.

    Raises:
        StoreLockedError, StoreError: the previous generation stays in service.
        RecordError: too many users failed; the previous generation stays in service.
    """
    with StoreWriter.open(store, manifest, key=key, shared_with_group=options.shared_with_group) as writer:
        run = RefreshProgress(store, kind, manifest.total_users, writer.cursor)
        total, size = manifest.total_users, options.users_per_batch
        batches = (slice(begin, min(begin + size, total)) for begin in range(writer.cursor, total, size))
        with closing(encode_batches(batches, writer, run)) as batches_of_records:
            for encoded in batches_of_records:
                run.encoded(encoded)
                begin, end = writer.cursor, min(writer.cursor + size, total)
                with run.stage("write"):
                    written = writer.put_batch(encoded.keys, encoded.records, end, encoded.states)
                run.counts["written"] += written
                run.counts["erased"] += len(encoded.keys) - written
                run.batch(writer.generation, end - begin, encoded.num_events)
        with run.stage("read"):
            of_items = None if values is None else values()
        with run.stage("publish"):
            if of_items is not None:
                writer.put_items(of_items.to_bytes())
            writer.publish()
        return run.report(writer.generation)


def _stored_state(wanted: StateDtype | None, target: Path | StoreUrl, *, can_keep: bool) -> StateDtype:
    if wanted is None:
        return StateDtype.float32 if can_keep and isinstance(target, Path) else StateDtype.none
    if wanted is not StateDtype.none and not can_keep:
        raise ConfigError(
            f"state={wanted.value}: no incremental refresh can add events to these states, because the model mixes "
            "bidirectionally, has a history limit, or has neither a summary, counters, nor pooled vectors, or because "
            "`until` hides events; leave it out"
        )
    return wanted


def _run_digest(log: EventLog, counts: Int, precision: Precision, shard: Shard | None, users: Int) -> str:
    """Digest of what is read, in which order, and how; a cursor is valid only for a run with the same digest."""
    digest = hashlib.sha256(json.dumps(log.manifests, sort_keys=True, default=str).encode())
    digest.update(counts.tobytes())
    if len(users) < np.count_nonzero(counts):
        digest.update(users.tobytes())
    if precision is not Precision.float32:
        digest.update(precision.value.encode())
    if shard is not None:
        digest.update(f"{shard.index}/{shard.count}".encode())
    return digest.hexdigest()
