"""Full refresh: summarize every user into a new generation and publish it; resumable after an interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterable
from pathlib import Path

import numpy as np

from vista.arrays import Int
from vista.config.choices import Precision, StateDtype
from vista.config.store_config import RefreshOptions
from vista.device import choose_precision
from vista.errors import ConfigError
from vista.log.event_log import EventLog
from vista.log.splits import Until, parse_until, visible_counts
from vista.model.vista_model import VistaModel
from vista.refresh.batch_encoder import BatchEncoder
from vista.refresh.log_items import check_log
from vista.refresh.new_generation import new_manifest, write_generation
from vista.refresh.refresh_engine import LocalEngine, RefreshEngine
from vista.refresh.refresh_report import RefreshReport
from vista.refresh.stage_clock import StageClock
from vista.refresh.states import has_states
from vista.refresh.user_records import UserRecords
from vista.store.format.keys import user_keys
from vista.store.remote.store_url import StoreUrl
from vista.store.shards import Shard, shard_to_write
from vista.store.writer import StoreWriter


def refresh(
    model: VistaModel,
    log: EventLog,
    store: str | Path | StoreUrl,
    *,
    until: str | int | Until | None = None,
    options: RefreshOptions | None = None,
    shard: Shard | None = None,
    engine: RefreshEngine | None = None,
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
        engine: what encodes the batches: by default this process; `vista.refresh.ray_engine.RayEngine` uses others. A
            run can resume with another one. The bytes of the store are the same if both compute with the same number
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
    encoder, encoding = BatchEncoder.of(model, log, precision, options.tokens_per_batch), engine or LocalEngine()

    def encode_batches(
        batches: Iterable[slice], writer: StoreWriter, clock: StageClock
    ) -> Generator[UserRecords, None, None]:
        with_counts = ((users[batch], counts[users[batch]]) for batch in batches)
        return encoding.encode(encoder, with_counts, writer.spec, writer.state_spec, clock)

    return write_generation(target, manifest, "full", encode_batches, options=options, key=key)


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
