"""Full refresh: summarize every user into a new generation and publish it; resumable after an interruption."""

from __future__ import annotations

import hashlib
import json
import time
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
from vista.model.history_states import history_states
from vista.model.vista_model import VistaModel
from vista.refresh.log_items import LogItems, check_log
from vista.refresh.refresh_progress import RefreshProgress
from vista.refresh.refresh_report import RefreshReport
from vista.refresh.states import has_states, read_summaries, to_arrays
from vista.refresh.user_records import UserRecords, UserSummaries, encode_users, last_times, stored_tail, write_batch
from vista.store.format.keys import user_keys
from vista.store.manifest import Manifest
from vista.store.shards import Shard, shard_to_write
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
    items, frozen = LogItems.of(model, log), model.with_frozen("summarizer", precision)
    config = model.config
    keep_states = has_states(model) and limit == Until()
    manifest = Manifest(
        created_at=time.time_ns() // 1_000_000 if created_at is None else created_at,
        summarizer_id=model.summarizer_id().hex(),
        num_tokens=config.num_seeds,
        dim=config.dim,
        codec=options.codec.value,
        tail_len=config.tail_len,
        until=str(limit) if limit.held_out or limit.before is None else limit.before,
        applied_segment=log.last_segment,
        log_digest=log.sources_digest(log.last_segment),
        state_dtype=(options.state if keep_states else StateDtype.none).value,
        state_shape=(config.num_layers, config.num_heads, config.dim // config.num_heads) if keep_states else (0, 0, 0),
        total_users=len(users),
        run_digest=_run_digest(log, counts, precision, shard),
    )
    with StoreWriter.open(store, manifest, key=key, shared_with_group=options.shared_with_group) as writer:
        run = RefreshProgress(store, "full", len(users), writer.cursor, progress=options.progress)
        for begin in range(writer.cursor, len(users), options.users_per_batch):
            batch = users[begin : begin + options.users_per_batch]
            encoded = UserRecords.empty()
            for part in token_groups(counts[batch], options.tokens_per_batch):
                summaries = _summarize(frozen, log, items, batch[part], counts, writer, run)
                with run.stage("encode"):
                    encoded.extend(encode_users(summaries, writer, run))
            write_batch(encoded, writer, run, num_users=len(batch), num_events=int(counts[batch].sum()))
        with run.stage("publish"):
            writer.publish()
        return run.report(writer.generation)


def _summarize(
    model: VistaModel,
    log: EventLog,
    items: LogItems,
    users: Int,
    counts: Int,
    writer: StoreWriter,
    run: RefreshProgress,
) -> UserSummaries:
    """Summaries of users (rows of the log), each of the user's first counts[user] events."""
    with run.stage("read"):
        histories = log.gather(users, counts[users])
        model_rows, digests = items.model_rows(histories), items.digests(histories)
    arrays = None
    with run.stage("summarize"):
        if writer.state_spec is None:
            summary = inference.summarize(model, model_rows).cpu().numpy()
        else:
            states = history_states(model, model_rows)
            summary, arrays = read_summaries(model, states), to_arrays(states, log.last_segment, digests)
    with run.stage("encode"):
        keys, tail = user_keys(log.users.ids(users)), stored_tail(model_rows, model.config.tail_len)
        return UserSummaries(keys, summary, tail, last_times(model_rows), histories.lengths, digests, arrays)


def _run_digest(log: EventLog, counts: Int, precision: Precision, shard: Shard | None) -> str:
    """Digest of what is read, in which order, and how; a cursor is valid only for a run with the same digest."""
    digest = hashlib.sha256(json.dumps(log.manifests, sort_keys=True, default=str).encode())
    digest.update(counts.tobytes())
    if precision is not Precision.float32:
        digest.update(precision.value.encode())
    if shard is not None:
        digest.update(f"{shard.index}/{shard.count}".encode())
    return digest.hexdigest()
