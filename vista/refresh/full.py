"""Full refresh: summarize every user into a new generation and publish it; resumable after an interruption."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vista.arrays import Int
from vista.config.checks import Codec, Precision, StateDtype
from vista.config.store_config import RefreshOptions
from vista.device import choose_precision
from vista.errors import ConfigError, RecordError
from vista.log.event_log import EventLog
from vista.log.splits import Until, parse_until, visible_counts
from vista.model.item_feature_table import largest_keys
from vista.model.vista_model import VistaModel
from vista.progress_bar import progress_bar
from vista.refresh.batch_encoder import BatchEncoder, StageClock, UserRecords, check_log, has_states
from vista.store.keys import user_keys
from vista.store.layout import Shard, StoreUrl, open_private, shard_to_write
from vista.store.manifest import Manifest
from vista.store.record import CounterLayout, TailColumn, UserColumn
from vista.store.writer import StoreWriter

if TYPE_CHECKING:
    from vista.refresh.ray_engine import RayEngine

logger = logging.getLogger(__name__)
MAX_FAILED_SHARE, MAX_FAILED_USERS = 0.01, 10
"""A run stops if more users fail than both limits allow, or if all of them fail."""
NAMED_FAILURES = 20
"""A report names at most this many failed users."""

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
            them: not with bidirectional mixing, a history limit, K = 0 without counters, or `until`.
        shard: write only the users of this shard, into the folder `<store>/part-i-of-n`.
        engine: encodes the batches in other processes; None encodes them in this one. A run can resume with another
            engine. The bytes of the store are the same if both compute with the same number
            of threads on the same kind of processor.
        key: 32 bytes, to authenticate the records with.
        created_at: start of the run in ms, which records state; by default now. A resumed run keeps its own.

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
    users = np.flatnonzero(counts)
    if shard is not None:
        users = users[shard.holds(user_keys(log.users.ids(users)))]
    manifest = new_manifest(
        model,
        codec=options.codec,
        state=state,
        until=str(limit) if limit.held_out or limit.before is None else limit.before,
        applied_segment=log.last_segment,
        log_digest=log.sources_digest(log.last_segment),
        total_users=len(users),
        run_digest=_run_digest(log, counts, precision, shard),
        created_at=created_at,
    )
    encoder = BatchEncoder.of(model, log, precision, options.tokens_per_batch)

    def encode_batches(
        batches: Iterable[slice], writer: StoreWriter, clock: StageClock
    ) -> Generator[UserRecords, None, None]:
        with_counts = ((users[batch], counts[users[batch]]) for batch in batches)
        if engine is not None:
            return engine.encode(encoder, with_counts, writer.spec, writer.state_spec, clock)
        return (encoder.encode(*batch, writer.spec, writer.state_spec, clock) for batch in with_counts)

    return write_generation(target, manifest, "full", encode_batches, options=options, key=key)


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
        progress: show the bar.
    """

    def __init__(self, store: Path | StoreUrl, kind: str, total: int, done: int, *, progress: bool) -> None:
        super().__init__()
        self._store = store
        self._kind, self._total = kind, total
        self._began = time.perf_counter()
        self._bar = progress_bar(total=total, initial=done, desc="refresh", unit="user", shown=progress)
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


def new_manifest(
    model: VistaModel,
    *,
    codec: Codec,
    state: StateDtype,
    until: str | int | None,
    applied_segment: int,
    log_digest: str,
    total_users: int,
    run_digest: str,
    created_at: int | None,
) -> Manifest:
    """The manifest of a generation that a model's summaries will fill.

    Args:
        model: the one that makes the summaries.
        state: how states are stored; `StateDtype.none` to keep no states.
        created_at: start of the run in ms; None for now.

    The other arguments are those of `Manifest`.
    """
    config = model.config
    shape = (model.stage1.num_state_layers, config.num_heads, config.dim // config.num_heads)
    has_sums = state is not StateDtype.none and model.summarizer is not None
    counted, counters = model.counter_spec, None
    if counted is not None:
        counters = CounterLayout.of(counted, largest_keys(counted, model.schema, len(model.items))).to_dict()
    return Manifest(
        created_at=time.time_ns() // 1_000_000 if created_at is None else created_at,
        summarizer_id=model.summarizer_id().hex(),
        num_tokens=config.num_seeds + model.stage1.num_state_rows,
        dim=config.dim,
        codec=codec.value,
        tail_len=config.tail_len,
        until=until,
        applied_segment=applied_segment,
        log_digest=log_digest,
        state_dtype=state.value,
        state_shape=shape if has_sums else (0, 0, 0),
        counters=counters,
        user_columns=[asdict(column) for column in user_columns(model)],
        tail_columns=[asdict(TailColumn(*column)) for column in model.schema.tail_sizes.items()],
        total_users=total_users,
        run_digest=run_digest,
    )


def user_columns(model: VistaModel) -> list[UserColumn]:
    """What records of a model hold of users' features."""
    return [] if model.user_features is None else [UserColumn(*column) for column in model.user_features.digests()]


def write_generation(
    store: Path | StoreUrl,
    manifest: Manifest,
    kind: str,
    encode_batches: EncodeBatches,
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
        options: users_per_batch, progress, and shared_with_group.
        key: 32 bytes, to authenticate the records with.

    Raises:
        StoreLockedError, StoreError: the previous generation stays in service.
        RecordError: too many users failed; the previous generation stays in service.
    """
    with StoreWriter.open(store, manifest, key=key, shared_with_group=options.shared_with_group) as writer:
        run = RefreshProgress(store, kind, manifest.total_users, writer.cursor, progress=options.progress)
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
        with run.stage("publish"):
            writer.publish()
        return run.report(writer.generation)


def _stored_state(wanted: StateDtype | None, target: Path | StoreUrl, *, can_keep: bool) -> StateDtype:
    if wanted is None:
        return StateDtype.float32 if can_keep and isinstance(target, Path) else StateDtype.none
    if wanted is not StateDtype.none and not can_keep:
        raise ConfigError(
            f"state={wanted.value}: no incremental refresh can add events to these states, because the model mixes "
            "bidirectionally, has a history limit, or has neither a summary nor counters, or because `until` hides "
            "events; leave it out"
        )
    return wanted


def _run_digest(log: EventLog, counts: Int, precision: Precision, shard: Shard | None) -> str:
    """Digest of what is read, in which order, and how; a cursor is valid only for a run with the same digest."""
    digest = hashlib.sha256(json.dumps(log.manifests, sort_keys=True, default=str).encode())
    digest.update(counts.tobytes())
    if precision is not Precision.float32:
        digest.update(precision.value.encode())
    if shard is not None:
        digest.update(f"{shard.index}/{shard.count}".encode())
    return digest.hexdigest()
