"""Full refresh: summarize every user into a new generation and publish it; resumable after an interruption."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vista.arrays import Int
from vista.config.choices import Precision, StateDtype
from vista.config.refresh_options import RefreshOptions
from vista.device import choose_precision
from vista.log.event_log import EventLog
from vista.log.histories import token_groups
from vista.log.splits import visible_counts
from vista.log.until import Until, parse_until
from vista.model import inference
from vista.model.log_users import LogUsers
from vista.model.vista_model import VistaModel
from vista.refresh.counting import count_histories, stored_codes
from vista.refresh.log_items import LogItems, check_log
from vista.refresh.new_generation import new_manifest, write_generation
from vista.refresh.refresh_progress import RefreshProgress
from vista.refresh.refresh_report import RefreshReport
from vista.refresh.states import has_states, read_summaries, state_of, to_arrays
from vista.refresh.user_records import UserRecords, encode_users, last_times, stored_tail
from vista.store.format.keys import user_keys
from vista.store.shards import Shard, shard_to_write
from vista.store.user_summaries import UserSummaries
from vista.store.writer import StoreWriter


def refresh(
    model: VistaModel,
    log: EventLog,
    store: str | Path,
    *,
    until: str | int | Until | None = None,
    options: RefreshOptions | None = None,
    shard: Shard | None = None,
    key: bytes | None = None,
    created_at: int | None = None,
) -> RefreshReport:
    """Summarize all users with at least one visible event and publish the summaries as one generation.

    An interrupted refresh resumes where it stopped if model, log, `until`, codec, state and precision are unchanged;
    otherwise it starts over.

    Args:
        model: it is left in eval mode.
        log: items outside the model's vocabulary count as unknown items.
        store: the store's folder; made if it does not exist.
        until: which events summaries may cover: None (all), "leave-last-out", "leave-last-N-out", an ISO time, ms, or
            "TIME-less-N".
        options: what is stored and how the work is batched. States are kept only where incremental refreshes can use
            them: not with bidirectional mixing, a history limit, K = 0 or `until`.
        shard: write only the users of this shard, into the folder `<store>/part-i-of-n`.
        key: 32 bytes, to authenticate the records with.
        created_at: start of the run in ms, which records state; by default now. A resumed run keeps its own.

    Raises:
        ConfigError: the model cannot read this log, `until` is not valid for it, or the store is sharded and no shard
            is named.
        LogFormatError: a file of the log is damaged.
        StoreLockedError, StoreError, RecordError: the previous generation stays in service.
    """
    options = options or RefreshOptions()
    limit = until if isinstance(until, Until) else parse_until(until)
    check_log(model, log)
    if options.verify_log:
        log.verify()
    store, shard = shard_to_write(store, shard)
    model.eval()
    precision = choose_precision(options.precision, model.device)
    counts = visible_counts(log, limit)
    users = np.flatnonzero(counts)
    if shard is not None:
        users = users[shard.holds(user_keys(log.users.ids(users)))]
    manifest = new_manifest(
        model,
        codec=options.codec,
        state=options.state if has_states(model) and limit == Until() else StateDtype.none,
        until=str(limit) if limit.held_out or limit.before is None else limit.before,
        applied_segment=log.last_segment,
        log_digest=log.sources_digest(log.last_segment),
        total_users=len(users),
        run_digest=_run_digest(log, counts, precision, shard),
        created_at=created_at,
    )
    frozen = model.with_frozen("summarizer", precision)
    items, features = LogItems.of(model, log), LogUsers(model.user_features, log)
    batches = _FullBatches(frozen, log, items, features, users, counts, options.tokens_per_batch)
    return write_generation(store, manifest, "full", batches.encode, options=options, key=key)


@dataclass(frozen=True, slots=True)
class _FullBatches:
    """Encodes the users of a full refresh, one batch at a time."""

    model: VistaModel
    log: EventLog
    items: LogItems
    features: LogUsers
    users: Int
    """Rows of the log: all users of the run, in its fixed order."""
    counts: Int
    """How many events are summarized for each row of the log, oldest first."""
    tokens_per_batch: int

    def encode(self, batch: slice, writer: StoreWriter, run: RefreshProgress) -> tuple[UserRecords, int]:
        """The records of a slice of the users, and the number of events that were summarized."""
        users, encoded = self.users[batch], UserRecords.empty()
        for part in token_groups(self.counts[users], self.tokens_per_batch):
            summaries = self._summarize(users[part], writer, run)
            with run.stage("encode"):
                encoded.extend(encode_users(summaries, writer, run))
        return encoded, int(self.counts[users].sum())

    def _summarize(self, users: Int, writer: StoreWriter, run: RefreshProgress) -> UserSummaries:
        with run.stage("read"):
            histories = self.log.gather(users, self.counts[users])
            model_rows, digests = self.items.model_rows(histories), self.items.digests(histories)
        arrays = None
        with run.stage("summarize"):
            tables = count_histories(self.model.counter_spec, model_rows)
            if writer.state_spec is None:
                summary = inference.summarize(self.model, model_rows).cpu().numpy()
            else:
                states = state_of(self.model, model_rows)
                summary = read_summaries(self.model, states)
                arrays = to_arrays(states, self.log.last_segment, digests, tables)
        with run.stage("encode"):
            return UserSummaries(
                keys=user_keys(self.log.users.ids(users)),
                summary=summary,
                tail=stored_tail(self.model, model_rows),
                event_count=histories.lengths,
                last_event_ts=last_times(model_rows),
                history_digest=digests,
                counters=stored_codes(tables),
                features=self.features.features(users).columns,
                states=arrays,
            )


def _run_digest(log: EventLog, counts: Int, precision: Precision, shard: Shard | None) -> str:
    """Digest of what is read, in which order, and how; a cursor is valid only for a run with the same digest."""
    digest = hashlib.sha256(json.dumps(log.manifests, sort_keys=True, default=str).encode())
    digest.update(counts.tobytes())
    if precision is not Precision.float32:
        digest.update(precision.value.encode())
    if shard is not None:
        digest.update(f"{shard.index}/{shard.count}".encode())
    return digest.hexdigest()
