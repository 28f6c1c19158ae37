"""A new generation of a store: its manifest, and the loop that fills and publishes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from pathlib import Path

from vista.config.choices import Codec, StateDtype
from vista.config.store_config import RefreshOptions
from vista.model.item_feature_table import largest_keys
from vista.model.vista_model import VistaModel
from vista.refresh.refresh_progress import RefreshProgress
from vista.refresh.refresh_report import RefreshReport
from vista.refresh.stage_clock import StageClock
from vista.refresh.user_records import UserRecords
from vista.store.format.counter_layout import CounterLayout
from vista.store.format.tail_column import TailColumn
from vista.store.format.user_column import UserColumn
from vista.store.manifest import Manifest
from vista.store.remote.store_url import StoreUrl
from vista.store.writer import StoreWriter

EncodeBatches = Callable[[Iterable[slice], StoreWriter, StageClock], Generator[UserRecords, None, None]]
"""Encodes slices of the run's users, in their order."""


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
    shape = (config.num_state_layers, config.num_heads, config.dim // config.num_heads)
    has_sums = state is not StateDtype.none and model.summarizer is not None
    counted, counters = model.counter_spec, None
    if counted is not None:
        counters = CounterLayout.of(counted, largest_keys(counted, model.schema, len(model.items))).to_dict()
    return Manifest(
        created_at=time.time_ns() // 1_000_000 if created_at is None else created_at,
        summarizer_id=model.summarizer_id().hex(),
        num_tokens=config.num_seeds + config.num_state_rows,
        dim=config.dim,
        codec=codec.value,
        tail_len=config.tail_len,
        until=until,
        applied_segment=applied_segment,
        log_digest=log_digest,
        state_dtype=state.value,
        state_shape=shape if has_sums else (0, 0, 0),
        counters=counters,
        user_columns=[column.to_dict() for column in user_columns(model)],
        tail_columns=[TailColumn(*column).to_dict() for column in model.schema.tail_sizes.items()],
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
