"""Full refresh: every user's summary, state and tail into a new generation, resumable after any kill."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vista.config.choices import Codec, Precision, StateDtype
from vista.device import choose_precision
from vista.log.event_log import EventLog
from vista.log.histories import token_groups
from vista.log.splits import Until, parse_until, visible_counts
from vista.model import inference
from vista.model.history_states import history_states
from vista.model.vista_model import VistaModel
from vista.refresh.encode import Encoded, LogItems, check_log, encode_users, has_states, read_summaries, to_arrays
from vista.refresh.refresh_report import RefreshProgress, RefreshReport
from vista.store import StoreWriter, user_keys
from vista.store.shards import Shard, shard_to_write

Int = NDArray[np.int64]


def refresh(
    model: VistaModel,
    log: EventLog,
    store: str | Path,
    *,
    until: str | int | Until | None = None,
    codec: Codec = Codec.int8,
    state: StateDtype = StateDtype.float32,
    tokens_per_batch: int = 65_536,
    users_per_batch: int = 512,
    precision: Precision = Precision.float32,
    shard: Shard | None = None,
    progress: bool = False,
    created_at: int | None = None,
    key: bytes | None = None,
    shared_with_group: bool = False,
) -> RefreshReport:
    """Write the summaries of all users with at least one visible event, and publish them as one generation.

    An interrupted refresh goes on where it stopped if model, log, `until`, codec, state and precision are the same;
    else it starts anew.

    Args:
        model: it is left in eval mode.
        log: items the model never saw are unknown to it.
        store: its folder, made if absent.
        until: events that summaries may see: None (all), "leave-last-out", "leave-last-N-out", an ISO time, ms, or
            "TIME-less-N".
        codec: how rows are stored.
        state: how states are kept for incremental refreshes. None are where the model has none (bidirectional mixing, a
            history limit, K = 0), nor with `until`: such a store never goes on.
        tokens_per_batch: events summarized at once (a longer history makes a batch of its own).
        users_per_batch: users of one durable transaction.
        precision: of matrix products; `auto` is bfloat16 where the device multiplies it.
        shard: write only the users of this part, into `<store>/part-i-of-n`.
        progress: show a progress bar.
        created_at: ms, the start of the run that records state; by default now. A resumed run keeps its own.
        key: 32 bytes, to authenticate the records with.
        shared_with_group: let the group of the store's folder read it.

    Raises:
        ConfigError: the model cannot read this log, `until` is no moment of it, or the store is divided and no shard
            named.
        StoreLockedError, StoreError, RecordError: the generation before stays in service.
    """
    limit = until if isinstance(until, Until) else parse_until(until)
    check_log(model, log)
    store, shard = shard_to_write(store, shard)
    model.eval()
    precision = choose_precision(precision, model.device)
    counts = visible_counts(log, limit)
    users = np.flatnonzero(counts)
    if shard is not None:
        users = users[shard.holds(user_keys(log.users.ids(users)))]
    items, frozen = LogItems.of(model, log), model.with_frozen("summarizer", precision)
    keep = has_states(model) and limit == Until()
    config = model.config
    with StoreWriter.open(
        store,
        summarizer_id=model.summarizer_id(),
        num_tokens=config.num_seeds,
        dim=config.dim,
        codec=codec,
        tail_len=config.tail_len,
        until=str(limit) if limit.held_out or limit.before is None else limit.before,
        applied_segment=log.last_segment,
        log_digest=log.sources_digest(log.last_segment),
        state_dtype=state if keep else StateDtype.none,
        state_shape=(config.num_layers, config.num_heads, config.dim // config.num_heads) if keep else (0, 0, 0),
        total_users=len(users),
        run_digest=_run_digest(log, counts, precision, shard),
        created_at=created_at,
        key=key,
        shared_with_group=shared_with_group,
    ) as writer:
        run = RefreshProgress(store, "full", len(users), writer.cursor, progress=progress)
        for begin in range(writer.cursor, len(users), users_per_batch):
            batch = users[begin : begin + users_per_batch]
            encoded = Encoded([], [], [])
            for part in token_groups(counts[batch], tokens_per_batch):
                rows = batch[part]
                with run.stage("read"):
                    histories = log.gather(rows, counts[rows])
                    model_rows, digests = items.model_rows(histories), items.digests(histories)
                arrays = None
                with run.stage("summarize"):
                    if writer.state_spec is None:
                        summary = inference.summarize(frozen, model_rows).cpu().numpy()
                    else:
                        states = history_states(frozen, model_rows)
                        summary, arrays = read_summaries(frozen, states), to_arrays(states, log.last_segment, digests)
                with run.stage("encode"):
                    encoded.extend(
                        encode_users(
                            user_keys(log.users.ids(rows)),
                            summary,
                            model_rows,
                            histories.lengths,
                            digests,
                            arrays,
                            tail_len=config.tail_len,
                            spec=writer.spec,
                            state_spec=writer.state_spec,
                            run=run,
                        )
                    )
            run.check_failures()
            with run.stage("write"):
                written = writer.put_batch(encoded.keys, encoded.records, begin + len(batch), encoded.states)
            run.counts["written"] += written
            run.counts["erased"] += len(encoded.keys) - written
            run.batch(writer.generation, len(batch), int(counts[batch].sum()))
        with run.stage("publish"):
            writer.publish()
        return run.report(store, writer.generation)


def _run_digest(log: EventLog, counts: Int, precision: Precision, shard: Shard | None) -> str:
    """Digest of what is read, in which order, and how: a cursor of another log, `until` or precision means nothing."""
    digest = hashlib.sha256(json.dumps(log.manifests, sort_keys=True, default=str).encode())
    digest.update(counts.tobytes())
    if precision is not Precision.float32:
        digest.update(precision.value.encode())
    if shard is not None:
        digest.update(f"{shard.index}/{shard.count}".encode())
    return digest.hexdigest()
