"""Batch refresh: every user's summary and tail into a new generation of the store, resumable after any kill.

EventLog -> model rows -> summaries [B, K, d] -> records -> one durable transaction a batch -> published generation
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vista.choices import Codec, Decay, Precision
from vista.config import RefreshConfig
from vista.data.event_log import EventLog
from vista.data.histories import Histories, token_groups
from vista.data.splits import Until, parse_until, visible_counts
from vista.device import announce, autocast, choose_precision, cpu_settings, resolve_device
from vista.errors import ConfigError
from vista.model import inference
from vista.model.ranking_model import RankingModel
from vista.model.recommender import Recommender
from vista.store import NO_TIMESTAMP, StoreWriter, Tail, encode_records, user_keys
from vista.store.authentication import read_key
from vista.store.digest import history_digests, item_keys

logger = logging.getLogger(__name__)
Int = NDArray[np.int64]
STAGES = ("read", "summarize", "encode", "write", "publish")


@dataclass(frozen=True, slots=True)
class RefreshReport:
    """What a refresh did. `shares` are the stages' parts of the time, which add up to 1."""

    store: str
    generation: int
    num_users: int
    resumed_at: int
    """Users that an earlier, interrupted run had written."""
    num_events: int
    """Events read in this run."""
    seconds: float
    shares: dict[str, float]

    def __str__(self) -> str:
        done = self.num_users - self.resumed_at
        stages = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        resumed = f" ({self.resumed_at} of them by an earlier run)" if self.resumed_at else ""
        return (
            f"generation {self.generation} of {self.store}: {self.num_users} users{resumed}, {self.num_events} events "
            f"in {self.seconds:.1f} s: {done / max(self.seconds, 1e-9):,.0f} users/s ({stages})"
        )


def refresh_from_config(config: RefreshConfig) -> RefreshReport:
    """`vista refresh`."""
    with cpu_settings(config.num_threads):
        device = resolve_device(config.device)
        announce(device)
        return refresh(
            Recommender.from_pretrained(config.model, device),
            EventLog.open(config.data),
            config.store,
            until=config.until,
            codec=config.codec,
            tokens_per_batch=config.tokens_per_batch,
            users_per_batch=config.users_per_batch,
            precision=config.precision,
            progress=config.progress,
            key=read_key(config.authentication_key_file),
            shared_with_group=config.shared_with_group,
        )


def refresh(
    model: Recommender,
    log: EventLog,
    store: str | Path,
    *,
    until: str | int | Until | None = None,
    codec: Codec = Codec.int8,
    tokens_per_batch: int = 65_536,
    users_per_batch: int = 512,
    precision: Precision = Precision.float32,
    progress: bool = False,
    created_at: int | None = None,
    key: bytes | None = None,
    shared_with_group: bool = False,
) -> RefreshReport:
    """Write the summaries of all users with at least one visible event, and publish them as one generation.

    An interrupted refresh goes on where it stopped if model, log, `until`, codec and precision are the same; else it
    starts anew.

    Args:
        model: it is left in eval mode.
        log: items the model never saw are unknown to it.
        store: its folder, made if absent.
        until: events that summaries may see: None (all), "leave-last-out", "leave-last-two-out", an ISO time, or ms.
        codec: how rows are stored.
        tokens_per_batch: events summarized at once (a longer history makes a batch of its own).
        users_per_batch: users of one durable transaction.
        precision: of matrix products; `auto` is bfloat16 where the device multiplies it.
        progress: show a progress bar.
        created_at: ms, the start of the run that records state; by default now. A resumed run keeps its own.
        key: 32 bytes, to authenticate the records with.
        shared_with_group: let the group of the store's folder read it.

    Raises:
        ConfigError: the model cannot read this log, or `until` is no moment of it.
        StoreLockedError, StoreError, RecordError: the generation before stays in service.
    """
    limit = until if isinstance(until, Until) else parse_until(until)
    check_log(model, log)
    model.eval()
    precision = choose_precision(precision, model.device)
    counts = visible_counts(log, limit)
    users = np.flatnonzero(counts)
    began = time.perf_counter()
    clock = _Clock()
    items = _Items.of(model, log)
    with StoreWriter.open(
        store,
        summarizer_id=model.summarizer_id(),
        num_tokens=model.config.num_seeds,
        dim=model.config.dim,
        codec=codec,
        tail_len=model.config.tail_len,
        until=str(limit) if limit.before is None else limit.before,
        applied_segment=log.last_segment,
        total_users=len(users),
        run_digest=_run_digest(log, counts, precision),
        created_at=created_at,
        key=key,
        shared_with_group=shared_with_group,
    ) as writer:
        resumed_at, events = writer.cursor, 0
        bar = tqdm(total=len(users), initial=resumed_at, desc="refresh", unit="user", disable=not progress)
        with bar:
            for begin in range(resumed_at, len(users), users_per_batch):
                batch = users[begin : begin + users_per_batch]
                keys: list[bytes] = []
                records: list[bytes] = []
                for part in token_groups(counts[batch], tokens_per_batch):
                    rows = batch[part]
                    with clock("read"):
                        histories = log.gather(rows, counts[rows])
                        model_rows = dataclasses.replace(histories, item=items.rows[histories.item])
                    with clock("summarize"), autocast(precision, model.device):
                        summary = inference.summarize(model, model_rows).cpu().numpy()
                    with clock("encode"):
                        part_keys = user_keys(log.users.ids(rows))
                        keys += part_keys
                        records += encode_records(
                            part_keys,
                            summary,
                            _tail(model_rows, model.config.tail_len),
                            spec=writer.spec,
                            event_count=histories.lengths,
                            last_event_ts=_last_times(histories),
                            history_digest=history_digests(
                                items.keys[histories.item],
                                np.asarray(histories.timestamp),
                                np.asarray(histories.action),
                                histories.offsets,
                            ),
                        )
                    events += histories.num_events
                with clock("write"):
                    writer.put_batch(keys, records, begin + len(batch))
                bar.update(len(batch))
        with clock("publish"):
            writer.publish(len(users))
        generation = writer.generation
    seconds = time.perf_counter() - began
    return RefreshReport(str(store), generation, len(users), resumed_at, events, seconds, clock.shares(seconds))


def check_log(model: RankingModel, log: EventLog) -> None:
    """Refuse a log whose events the model would misread.

    Raises:
        ConfigError: its action codes mean something else, or it has no times and the model reads them.
    """
    known = model.schema.actions
    if model.encoder.action is not None and log.actions != known[: len(log.actions)]:
        raise ConfigError(
            f"{log.path}: its actions are {log.actions}, the model was trained on {known}; train anew on this log"
        )
    if model.schema.has_time and not log.has_time and (model.config.use_time or model.config.decay is Decay.time):
        raise ConfigError(f"{log.path}: has no times, which this model reads; train one with model.use_time=false")


@dataclass(frozen=True, slots=True)
class _Items:
    """What becomes of each of the log's items: model row int32 [num_items]; key of the history digest uint64."""

    rows: NDArray[np.int32]
    keys: NDArray[np.uint64]

    @classmethod
    def of(cls, model: Recommender, log: EventLog) -> _Items:
        ids = log.items.ids(np.arange(log.num_items))
        return cls(model.item_rows(ids).astype(np.int32), item_keys(ids))


def _tail(rows: Histories, tail_len: int) -> Tail:
    last = rows.select(np.maximum(rows.lengths - tail_len, 0), rows.lengths)
    return Tail(last.item.astype(np.int32), np.asarray(last.timestamp), np.asarray(last.action), last.offsets)


def _last_times(rows: Histories) -> Int:
    if rows.num_events == 0:
        return np.full(rows.num_users, NO_TIMESTAMP, np.int64)
    times = np.asarray(rows.timestamp)[np.maximum(rows.offsets[1:] - 1, 0)]
    return np.where(rows.lengths > 0, times, NO_TIMESTAMP)


def _run_digest(log: EventLog, counts: Int, precision: Precision) -> str:
    """Digest of what is read, in which order, and how: a cursor of another log, `until` or precision means nothing."""
    digest = hashlib.sha256(json.dumps(log.manifests, sort_keys=True, default=str).encode())
    digest.update(counts.tobytes())
    if precision is not Precision.float32:
        digest.update(precision.value.encode())
    return digest.hexdigest()


class _Clock:
    """Seconds a stage."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._stage, self._began = "", 0.0

    def __call__(self, stage: str) -> _Clock:
        self._stage = stage
        return self

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds[self._stage] += time.perf_counter() - self._began

    def shares(self, total: float) -> dict[str, float]:
        known = {stage: seconds / max(total, 1e-9) for stage, seconds in self.seconds.items()}
        return {**known, "other": 1 - sum(known.values())}
