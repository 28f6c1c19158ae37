"""The commands `vista simulate`, `vista prepare`, `vista log …`, and `vista store …`.

Those of stores run for a store, or for all of its shards on this machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vista.config import (
    LogCompactConfig,
    LogEraseConfig,
    LogForgetConfig,
    LogStatsConfig,
    LogVerifyConfig,
    PrepareConfig,
    StoreCompactConfig,
    StoreCopyConfig,
    StoreEraseConfig,
    StoreExportConfig,
    StoreGetConfig,
    StoreImportConfig,
    StoreMergeConfig,
    StoreRollbackConfig,
    StoreStatsConfig,
    StoreVerifyConfig,
)
from vista.errors import ConfigError, LogFormatError, StoreError, UnknownUserError

if TYPE_CHECKING:
    from vista.log.compaction import CompactionReport
    from vista.log.deletions import DeletionReport
    from vista.log.ingest.prepare import PrepareReport
    from vista.log.inspection import LogStats, LogVerification
    from vista.refresh import RefreshReport
    from vista.store.admin import PublishReport
    from vista.store.backend import Generation
    from vista.store.record_reading import RawRecords


def run_store_stats(config: StoreStatsConfig) -> str:
    """`vista store stats`; errors as of `store_stats`."""
    from vista.store.admin import store_stats
    from vista.store.layout import stores_in

    return _lines(store_stats(root) for root in stores_in(config.store))


def run_store_verify(config: StoreVerifyConfig) -> str:
    """`vista store verify`."""
    from vista.store.admin import verify_store
    from vista.store.layout import stores_in
    from vista.store.record_encoding import read_key

    key = read_key(config.authentication_key_file)
    reports = [verify_store(root, key=key) for root in stores_in(config.store)]
    if any(report.num_problems for report in reports):
        raise StoreError(_lines(reports))
    return _lines(reports)


def run_store_compact(config: StoreCompactConfig) -> str:
    """`vista store compact`; errors as of `compact_store`."""
    from vista.store.admin import compact_store
    from vista.store.layout import stores_in
    from vista.store.record_encoding import read_key

    key = read_key(config.authentication_key_file)
    return _lines(compact_store(root, key=key) for root in stores_in(config.store))


def run_store_rollback(config: StoreRollbackConfig) -> str:
    """`vista store rollback`; errors as of `roll_back`."""
    from vista.store.admin import roll_back
    from vista.store.layout import stores_in
    from vista.store.record_encoding import read_key

    return _lines(roll_back(*stores_in(config.store), to=config.to, key=read_key(config.authentication_key_file)))


def run_store_export(config: StoreExportConfig) -> str:
    """`vista store export`; writes one file per shard of a sharded store. Errors as of `export_store`."""
    from vista.store.layout import shards_in, stores_in
    from vista.store.parquet import export_store
    from vista.store.record_encoding import read_key

    key, out, stores = read_key(config.authentication_key_file), Path(config.out), stores_in(config.store)
    sharded = bool(shards_in(config.store))
    files = [out.with_name(f"{out.stem}.{Path(str(root)).name}{out.suffix}") if sharded else out for root in stores]
    reports = [export_store(root, file, key=key) for root, file in zip(stores, files, strict=True)]
    return _lines(
        f"{report.num_records:,} records of generation {report.generation} in {report.path}: "
        f"{report.size_bytes:,} bytes"
        for report in reports
    )


def run_store_import(config: StoreImportConfig) -> PublishReport:
    """`vista store import`; errors as of `import_store`."""
    from vista.store.parquet import import_store
    from vista.store.record_encoding import read_key

    key = read_key(config.authentication_key_file)
    return import_store(config.file, config.store, key=key, shared_with_group=config.shared_with_group)


def run_store_copy(config: StoreCopyConfig) -> str:
    """`vista store copy`; shards are published once all are copied. Errors as of `copy_generation`."""
    from vista.store.admin import copy_generation
    from vista.store.layout import shards_in, stores_in
    from vista.store.record_encoding import read_key

    if not config.to:
        raise ConfigError(
            "to: name the folder or the URL of the target store, such as to=/srv/stores/mine or to=redis://host/mine"
        )
    key, sharded = read_key(config.authentication_key_file), bool(shards_in(config.store))

    def copy(publish: bool) -> str:
        return _lines(
            copy_generation(
                root,
                Path(config.to) / Path(str(root)).name if sharded else config.to,
                generation=config.generation,
                publish=publish,
                key=key,
                shared_with_group=config.shared_with_group,
            )
            for root in stores_in(config.store)
        )

    unpublished = copy(publish=False) if sharded or not config.publish else ""
    return copy(publish=True) if config.publish else unpublished


def run_store_merge(config: StoreMergeConfig) -> RefreshReport:
    """`vista store merge`; errors as of `merge`."""
    from vista.device import announce, cpu_settings, keep_freed_memory, resolve_device
    from vista.log.event_log import EventLog
    from vista.model.vista_model import VistaModel
    from vista.refresh import RefreshOptions, merge
    from vista.store.record_encoding import read_key

    if not config.parts:
        raise ConfigError("parts: name the stores to merge, such as parts=[stores/a,stores/b]")
    if len(config.data) not in (1, len(config.parts)):
        raise ConfigError(
            f"data: names {len(config.data)} logs for {len(config.parts)} parts; name one log, or one per part"
        )
    keep_freed_memory()
    with cpu_settings(config.num_threads) as threads:
        device = resolve_device(config.device)
        announce(device, threads)
        model, key = VistaModel.from_pretrained(config.model, device), read_key(config.authentication_key_file)
        logs = [EventLog.open(path) for path in config.data]
        parts = list(zip(config.parts, logs * (len(config.parts) if len(logs) == 1 else 1), strict=True))
        options = RefreshOptions(verify_log=config.verify_log, shared_with_group=config.shared_with_group)
        return merge(model, parts, config.store, options=options, key=key)


def run_store_erase(config: StoreEraseConfig) -> str:
    """`vista store erase`: from the store or each user's shard, and from the log if one is named."""
    from vista.log.deletions import erase_users, rows_to_erase
    from vista.log.event_log import EventLog
    from vista.log.vocabulary import ids_of_words
    from vista.store.layout import StoreUrl, store_address, users_by_store
    from vista.store.reader import user_kind
    from vista.store.writer import erase

    if not config.users:
        raise ConfigError("users: name at least one user, such as users=[101]")
    users: Sequence[Any] = ids_of_words(config.users, "users", user_kind(config.store))
    if config.data is not None:
        rows_to_erase(EventLog.open(config.data), users)  # If the log refuses a user, the store must keep the user.
    count = sum(erase(root, own) for root, own in users_by_store(config.store, users))
    store = store_address(config.store)
    done = f"{count} of {len(users)} users had a record; readers miss them from now on"
    if isinstance(store, StoreUrl):
        lines = [f"{store}: {done}"]
    else:
        rest = f"Their bytes stay in free pages until `vista store compact store={config.store}`"
        lines = [f"{config.store}: {done}. {rest}"]
    if count < len(users):
        lines.append(
            f"Check the ids: {len(users) - count} users had no record. No refresh will write any of the {len(users)}"
        )
    if config.data is not None:
        lines.append(str(erase_users(config.data, users)))
    return "\n".join(lines)


def run_store_get(config: StoreGetConfig) -> str:
    """`vista store get`: header fields, the tail, and the summary's shape and norms, as text."""
    from vista.log.vocabulary import ids_of_words
    from vista.store.backend import open_backend
    from vista.store.keys import user_key
    from vista.store.layout import users_by_store
    from vista.store.reader import user_kind
    from vista.store.record_encoding import read_key
    from vista.store.record_reading import read_records

    if config.user is None:
        raise ConfigError("user: name a user, such as user=42")
    ((root, (user,)),) = users_by_store(config.store, ids_of_words([config.user], "user", user_kind(config.store)))
    store, key = open_backend(root), user_key(user)
    with store.open(store.current(), read_key(config.authentication_key_file)) as reader:
        value = reader.value(key)
        if value is None:
            raise UnknownUserError(
                f"user {user!r} has no record in {root}, generation {reader.manifest.generation}; check the id, or "
                "refresh the store if the user is new"
            )
        return _record_text(user, read_records([value], [key], reader.spec), reader, config.model)


def _lines(reports: Iterable[object]) -> str:
    return "\n".join(map(str, reports))


def _record_text(user: int | str, raw: RawRecords, reader: Generation, model: str | None) -> str:
    import numpy as np

    from vista.store.manifest import OF_SEVERAL_LOGS

    header, manifest = raw.headers[0], reader.manifest
    segment = header["applied_segment"]
    summary = raw.summary[0]
    norms = np.linalg.norm(summary.astype(np.float64), axis=1)
    items: list[Any] = [f"row {row}" for row in raw.tail.items.tolist()]
    features = raw.tail.features
    if model is not None:
        items, features = _named(model, raw, reader)
    names = ", ".join(["item", "time", "action code", *features])
    fields = {
        "generation": f"{header['generation']}, until {manifest.until or 'the end of the log'}",
        "summarizer": bytes(header["summarizer_id"]).hex(),
        "created at": _time(int(header["created_at"])),
        "events covered": f"{header['event_count']}, the newest at {_time(int(header['last_event_ts']))}",
        "log segment": "none: merged from several logs" if segment == OF_SEVERAL_LOGS else segment,
        "history digest": f"{header['history_digest']:016x}",
        "authenticated": "yes" if reader.spec.key is not None else "no",
        "summary": f"{summary.shape[0]} x {summary.shape[1]} {manifest.codec}",
        "payload": f"{header['payload_length']} bytes",
        "norms of rows": " ".join(f"{norm:.3f}" for norm in norms.tolist()) or "none",
        **({"features": _features(raw)} if raw.features else {}),
        **({"counted keys": _counted(raw)} if raw.counters else {}),
        "tail": f"{len(items)} events, oldest first ({names})",
    }
    lines = [f"user {user!r}", *(f"  {name + ':':<19}{value}" for name, value in fields.items())]
    times = map(_time, raw.tail.times.tolist())
    columns = [items, times, raw.tail.actions.tolist(), *(column.tolist() for column in features.values())]
    return "\n".join([*lines, *("    " + "  ".join(map(str, event)) for event in zip(*columns, strict=True))])


def _features(raw: RawRecords) -> str:
    return ", ".join(f"{name} {values[0]}" for name, values in raw.features.items())


def _counted(raw: RawRecords) -> str:
    """Number of counted keys per field, of one record."""
    spec = raw.counters[0].spec
    return ", ".join(f"{len(one.key)} ({field})" for field, one in zip(spec.fields, raw.counters, strict=True))


def _named(folder: str, raw: RawRecords, reader: Generation) -> tuple[list[Any], Mapping[str, Any]]:
    """Ids of the items of a tail, and the values of its features instead of the model's codes."""
    import numpy as np

    from vista.log.histories import RowFeatures
    from vista.model.vista_model import VistaModel

    model = VistaModel.from_pretrained(folder)
    if model.summarizer_id() != reader.spec.summarizer_id:
        raise ConfigError(
            f"model={folder}: the model's summarizer is {model.summarizer_id().hex()}, but the store's is "
            f"{reader.manifest.summarizer_id}, so their item rows differ; name the model that wrote the store"
        )
    rows = raw.tail.items
    ids = model.items.ids(np.maximum(rows, 1) - 1).tolist() if len(rows) else []
    items = [item if row else "unknown" for row, item in zip(rows.tolist(), ids, strict=True)]
    events = model.event_features
    return items, {} if events is None else RowFeatures(raw.tail.features).named(events.values)


def _time(time_ms: int) -> str:
    """A time in ms with its date; the ordinal of a log without times as it is."""
    from vista.log.histories import LATEST_MS, NO_TIMESTAMP, YEAR_1971_MS

    if time_ms == NO_TIMESTAMP:
        return "none"
    if not YEAR_1971_MS <= time_ms < LATEST_MS:
        return str(time_ms)
    return f"{time_ms} ({datetime.fromtimestamp(time_ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC)"


def run_log_forget(config: LogForgetConfig) -> DeletionReport:
    """`vista log forget`; errors as of `forget_file`."""
    from vista.log.deletions import forget_file

    return forget_file(config.data, config.events, config.time_unit, config.time_format)


def run_log_erase(config: LogEraseConfig) -> DeletionReport:
    """`vista log erase`; errors as of `erase_users`."""
    from vista.log.deletions import erase_users
    from vista.log.event_log import EventLog
    from vista.log.vocabulary import ids_of_words

    users = ids_of_words(config.users, "users", EventLog.open(config.data).users.kind)
    return erase_users(config.data, users)


def run_log_compact(config: LogCompactConfig) -> CompactionReport:
    """`vista log compact`; errors as of `compact_log`."""
    from vista.log.compaction import compact_log

    return compact_log(config.data)


def run_log_verify(config: LogVerifyConfig) -> LogVerification:
    """`vista log verify`."""
    from vista.log.inspection import verify_log

    report = verify_log(config.data)
    if report.damaged:
        raise LogFormatError(str(report))
    return report


def run_log_stats(config: LogStatsConfig) -> LogStats:
    """`vista log stats`."""
    from vista.log.event_log import EventLog
    from vista.log.inspection import LogStats

    log = EventLog.open(config.data)
    log.verify(newer_than=log.last_segment)
    return LogStats.of(log)


def run_prepare(config: PrepareConfig) -> PrepareReport:
    """`vista prepare`; errors as of `prepare`."""
    from vista.log.ingest.source_parser import SourceParser

    with SourceParser() as parser:
        parser.start()
        from vista.log.ingest.prepare import prepare  # imports Polars, while the parser does the same

        return prepare(config, parser=parser)
