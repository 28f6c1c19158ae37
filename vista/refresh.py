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
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from vista.config import Codec, RefreshConfig
from vista.data.event_log import EventLog
from vista.data.histories import Histories
from vista.data.splits import Until, parse_until, visible_counts
from vista.device import announce, resolve_device, set_threads
from vista.model import inference
from vista.model.recommender import Recommender
from vista.store import NO_TIMESTAMP, StoreWriter, Tail, encode_records, user_keys
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
            f"generation {self.generation} of {self.store}: {self.num_users} users{resumed}, {self.num_events} events in "
            f"{self.seconds:.1f} s: {done / max(self.seconds, 1e-9):,.0f} users/s ({stages})"
        )


def refresh_from_config(config: RefreshConfig) -> RefreshReport:
    """`vista refresh`."""
    set_threads(config.num_threads)
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
        progress=config.progress,
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
    progress: bool = False,
) -> RefreshReport:
    """Write the summaries of all users with at least one visible event, and publish them as one generation.

    An interrupted refresh goes on where it stopped if model, log, `until` and codec are the same; else it starts anew.

    Args:
        model: in eval mode.
        log: items the model never saw are unknown to it.
        store: its folder, made if absent.
        until: events that summaries may see: None (all), "leave-last-out", "leave-last-two-out", an ISO time, or ms.
        codec: how rows are stored.
        tokens_per_batch: events summarized at once (a longer history makes a batch of its own).
        users_per_batch: users of one durable transaction.
        progress: show a progress bar.

    Raises:
        StoreLockedError, StoreError, RecordError: the generation before stays in service.
    """
    limit = until if isinstance(until, Until) else parse_until(until)
    counts = visible_counts(log, limit)
    users = np.flatnonzero(counts)
    began = time.perf_counter()
    clock = _Clock()
    item_rows = model.item_rows(log.items.ids(np.arange(log.num_items)))
    keys_of_items = item_keys(log.items.ids(np.arange(log.num_items)))
    with StoreWriter.open(
        store,
        summarizer_id=model.summarizer_id(),
        num_tokens=model.config.num_seeds,
        dim=model.config.dim,
        codec=codec,
        tail_len=model.config.tail_len,
        until=str(limit),
        applied_segment=log.last_segment,
        total_users=len(users),
        run_digest=_run_digest(log, counts),
    ) as writer:
        resumed_at, events = writer.cursor, 0
        bar = tqdm(total=len(users), initial=resumed_at, desc="refresh", unit="user", disable=not progress)
        with bar:
            for begin in range(resumed_at, len(users), users_per_batch):
                batch = users[begin : begin + users_per_batch]
                with clock("read"):
                    histories = log.gather(batch, counts[batch])
                    rows = dataclasses.replace(histories, item=item_rows[histories.item])
                with clock("summarize"):
                    summary = _summarize(model, rows, tokens_per_batch)
                with clock("encode"):
                    digests = history_digests(
                        keys_of_items[histories.item],
                        np.asarray(histories.timestamp),
                        np.asarray(histories.action),
                        histories.offsets,
                    )
                    keys = user_keys(log.users.ids(batch))
                    records = encode_records(
                        keys,
                        summary,
                        _tail(rows, model.config.tail_len),
                        spec=writer.spec,
                        event_count=rows.lengths,
                        last_event_ts=_last_times(rows),
                        history_digest=digests,
                    )
                with clock("write"):
                    writer.put_batch(keys, records, begin + len(batch))
                events += histories.num_events
                bar.update(len(batch))
        with clock("publish"):
            writer.publish(len(users))
        generation = writer.generation
    seconds = time.perf_counter() - began
    return RefreshReport(str(store), generation, len(users), resumed_at, events, seconds, clock.shares(seconds))


def _summarize(model: Recommender, histories: Histories, tokens_per_batch: int) -> NDArray[np.float32]:
    parts, begin, lengths = [], 0, histories.lengths
    while begin < histories.num_users:
        end, tokens = begin + 1, int(lengths[begin])
        while end < histories.num_users and tokens + lengths[end] <= tokens_per_batch:
            tokens += int(lengths[end])
            end += 1
        parts.append(inference.summarize(model, histories.select_users(begin, end)))
        begin = end
    summary: NDArray[np.float32] = torch.cat(parts).cpu().numpy()
    return summary


def _tail(rows: Histories, tail_len: int) -> Tail:
    last = rows.select(np.maximum(rows.lengths - tail_len, 0), rows.lengths)
    return Tail(last.item.astype(np.int32), np.asarray(last.timestamp), np.asarray(last.action), last.offsets)


def _last_times(rows: Histories) -> Int:
    if rows.num_events == 0:
        return np.full(rows.num_users, NO_TIMESTAMP, np.int64)
    times = np.asarray(rows.timestamp)[np.maximum(rows.offsets[1:] - 1, 0)]
    return np.where(rows.lengths > 0, times, NO_TIMESTAMP)


def _run_digest(log: EventLog, counts: Int) -> str:
    """Digest of what is read and in which order: a cursor of another log or another `until` means nothing here."""
    digest = hashlib.sha256(json.dumps(log.manifests, sort_keys=True, default=str).encode())
    digest.update(counts.tobytes())
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
