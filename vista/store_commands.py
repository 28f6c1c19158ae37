"""The commands `vista store …`: from a config to a report."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from vista import config_store
from vista.data.gaps import LATEST_MS, YEAR_1971_MS
from vista.errors import ConfigError, StoreError, UnknownUserError
from vista.model.recommender import Recommender
from vista.store.administration import PublishReport, compact_store, roll_back
from vista.store.authentication import read_key
from vista.store.copying import copy_generation
from vista.store.generation_reader import GenerationReader, open_generation
from vista.store.keys import user_key
from vista.store.layout import read_current
from vista.store.record import NO_TIMESTAMP, RawRecords, decode_rows, read_records
from vista.store.statistics import StoreStats, store_stats
from vista.store.verification import VerifyReport, verify_store


def store_stats_command(config: config_store.StoreStatsConfig) -> StoreStats:
    """`vista store stats`; errors as of `store_stats`."""
    return store_stats(config.store)


def store_verify(config: config_store.StoreVerifyConfig) -> VerifyReport:
    """`vista store verify`.

    Raises:
        StoreError: problems were found; the message lists the first.
    """
    report = verify_store(config.store, key=read_key(config.authentication_key_file))
    if report.num_problems:
        raise StoreError(str(report))
    return report


def store_compact(config: config_store.StoreCompactConfig) -> PublishReport:
    """`vista store compact`; errors as of `compact_store`."""
    return compact_store(config.store, key=read_key(config.authentication_key_file))


def store_rollback(config: config_store.StoreRollbackConfig) -> PublishReport:
    """`vista store rollback`; errors as of `roll_back`."""
    return roll_back(config.store, config.to, key=read_key(config.authentication_key_file))


def store_export(config: config_store.StoreExportConfig) -> str:
    """`vista store export`; errors as of `export_store`."""
    from vista.store.parquet import export_store

    done = export_store(config.store, config.out, key=read_key(config.authentication_key_file))
    return f"{done.num_records:,} records of generation {done.generation} in {done.path}: {done.size_bytes:,} bytes"


def store_import(config: config_store.StoreImportConfig) -> PublishReport:
    """`vista store import`; errors as of `import_store`."""
    from vista.store.parquet import import_store

    key = read_key(config.authentication_key_file)
    return import_store(config.file, config.store, key=key, shared_with_group=config.shared_with_group)


def store_copy(config: config_store.StoreCopyConfig) -> PublishReport:
    """`vista store copy`; errors as of `copy_generation`.

    Raises:
        ConfigError: no folder is named.
    """
    if not config.to:
        raise ConfigError("to: name the folder of the store that serves, such as to=/srv/stores/mine")
    return copy_generation(
        config.store,
        config.to,
        generation=config.generation,
        publish=config.publish,
        key=read_key(config.authentication_key_file),
        shared_with_group=config.shared_with_group,
    )


def store_get(config: config_store.StoreGetConfig) -> str:
    """`vista store get`: header fields, the tail, and the summary's shape and norms, as text.

    Raises:
        ConfigError: no user is named, or the id is text where the store's are integers.
        UnknownUserError: the user has no record.
        StoreError, RecordError: the store or the record is damaged, or of another key.
    """
    if config.user is None:
        raise ConfigError("user: name one, such as user=42")
    root = Path(config.store).absolute()
    with open_generation(root, read_current(root), read_key(config.authentication_key_file)) as reader:
        user: int | str = config.user
        if reader.manifest.user_kind == "int":
            try:
                user = int(config.user)
            except ValueError:
                raise ConfigError(f"user: ids are integers in {root}, got {config.user}") from None
        key = user_key(user)
        raw = reader.environment.read(lambda transaction: _read(transaction, key, reader))
        if raw is None:
            raise UnknownUserError(f"user {user!r} has no record in {root}, generation {reader.manifest.generation}")
        return _record_text(user, raw, reader, config.model)


def _read(transaction: lmdb.Transaction[memoryview], key: bytes, reader: GenerationReader) -> RawRecords | None:
    value = transaction.get(key)
    return None if value is None else read_records([value], [key], reader.spec)


def _record_text(user: int | str, raw: RawRecords, reader: GenerationReader, model: str | None) -> str:
    header, manifest = raw.headers[0], reader.manifest
    summary = decode_rows(raw, reader.spec)[0]
    norms = np.linalg.norm(summary.astype(np.float64), axis=1)
    items: list[Any] = [f"row {row}" for row in raw.tail.items.tolist()]
    if model is not None:
        items = _item_ids(model, raw, reader)
    fields = {
        "generation": f"{header['generation']}, until {manifest.until or 'the end of the log'}",
        "summarizer": bytes(header["summarizer_id"]).hex(),
        "created at": _time(int(header["created_at"])),
        "events seen": f"{header['event_count']}, the newest at {_time(int(header['last_event_ts']))}",
        "log segment": header["applied_segment"],
        "history digest": f"{header['history_digest']:016x}",
        "authenticated": "yes" if reader.spec.key is not None else "no",
        "summary": f"{summary.shape[0]} x {summary.shape[1]} {manifest.codec}",
        "payload": f"{header['payload_length']} bytes",
        "norms of its rows": " ".join(f"{norm:.3f}" for norm in norms.tolist()) or "none",
        "tail": f"{len(items)} events, oldest first (item, time, action code)",
    }
    lines = [f"user {user!r}", *(f"  {name + ':':<19}{value}" for name, value in fields.items())]
    events = zip(items, raw.tail.times.tolist(), raw.tail.actions.tolist(), strict=True)
    return "\n".join([*lines, *(f"    {item}  {_time(time)}  {action}" for item, time, action in events)])


def _item_ids(folder: str, raw: RawRecords, reader: GenerationReader) -> list[Any]:
    model = Recommender.from_pretrained(folder)
    if model.summarizer_id() != reader.spec.summarizer_id:
        raise ConfigError(
            f"model={folder}: its summarizer is {model.summarizer_id().hex()}, the store's is "
            f"{reader.manifest.summarizer_id}; their item rows differ"
        )
    rows = raw.tail.items
    ids = model.items.ids(np.maximum(rows, 1) - 1).tolist() if len(rows) else []
    return [item if row else "unknown" for row, item in zip(rows.tolist(), ids, strict=True)]


def _time(moment: int) -> str:
    """ms as a time; the ordinals of a log without times as they are."""
    if moment == NO_TIMESTAMP:
        return "none"
    if not YEAR_1971_MS <= moment < LATEST_MS:
        return str(moment)
    return f"{moment} ({datetime.fromtimestamp(moment / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC)"
