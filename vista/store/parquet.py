"""Export of a generation to a Parquet file, and its import, bit for bit.

The file has one row per user, in the order of the keys. `record` and `key` are what the store holds. All other columns
repeat their contents in readable form for other programs, and the import ignores them. This module needs Polars, so
import it only where it is used.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from vista.counters.counters import CounterCodes
from vista.errors import DataError, StoreError, shown
from vista.files import check_replaceable, create_file, sync
from vista.installation import require_module
from vista.log.histories import NO_TIMESTAMP
from vista.log.ingest.source_parser import SourceParser
from vista.progress_bar import progress_bar
from vista.store.admin import PublishReport
from vista.store.backend import Folder, settled
from vista.store.folder_generation import FolderGeneration
from vista.store.keys import user_id
from vista.store.layout import GROUP, PRIVATE, Permissions, StoreUrl, check_place, next_number, store_path
from vista.store.manifest import Manifest, Tally
from vista.store.record import check_records
from vista.store.record_encoding import restamp_records
from vista.store.record_reading import read_records

if TYPE_CHECKING:
    import polars as pl
    from polars.io.plugins import register_io_source
else:
    pl = require_module("polars", "data")
    register_io_source = require_module("polars.io.plugins", "data").register_io_source


FORMAT = "vista store export 1"

_METADATA = "vista"
_BATCH_ROWS = 1024
GROUP_BYTES = 1 << 24
"""Default approximate size of a row group, which is what writing and reading hold in memory at once."""


def export_store(
    root: str | Path | StoreUrl, out: str | Path, *, key: bytes | None = None, group_bytes: int = GROUP_BYTES
) -> PublishReport:
    """Write the published generation to a Parquet file, atomically.

    Columns: `user` (int64, or string), `event_count`, `last_event_ts` (null without events), `tail_item` (model rows
    int32), `tail_time` int64, `tail_action` uint8, `summary` (K * d float32, decoded), `key` and `record` (bytes). With
    counters also `counter_field` uint8 (number of the key's field), `counter_key` int32, and `counter_value` (F float32
    per key, decoded). With features of users also `user.NAME`, and with features of the tail's events `tail.NAME`: the
    model's codes of a category int32, -1 if missing, or float32 numbers, NaN if missing.

    Args:
        root: the store's folder.
        out: the file; replaced if it exists. Only this account can read it.
        key: 32 bytes, if the store's records are authenticated.
        group_bytes: approximate size of a row group, in bytes.

    Raises:
        StoreBusyError: a refresh writes the generation without a pause.
        StoreError: nothing is published, a record is damaged, or the file cannot be written.
    """
    store, out = Folder(store_path(root)), store_path(out)
    generation = store.current()
    return settled(store, generation, lambda: _export(store, generation, out, key, group_bytes))


def _export(store: Folder, generation: int, out: Path, key: bytes | None, group_bytes: int) -> PublishReport:
    store.check_structure(generation)
    with store.open(generation, key) as source:
        tally, written, errors = source.tally(), Tally(), []
        schema = _schema(source)

        def frames(*_: Any) -> Iterator[pl.DataFrame]:
            try:
                for keys, records in source.batches():
                    written.add(keys, records)
                    yield _frame(keys, records, source, schema)
            except StoreError as error:  # Polars would replace it by an error of its own.
                errors.append(error)

        about: dict[str, Any] = {"format": FORMAT, "manifest": dataclasses.asdict(source.manifest)}
        about |= {"count": tally.count, "records_digest": tally.records_digest}
        text = json.dumps(about)
        partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        try:
            check_replaceable(out)
            with create_file(partial) as file:
                os.fchmod(file.fileno(), PRIVATE.file)
            register_io_source(frames, schema=schema).sink_parquet(
                partial,
                metadata={_METADATA: f"{_checksum(text)} {text}"},
                statistics=False,
                row_group_size=_group_rows(source, group_bytes),
            )
            if errors:
                raise errors[0]
            if written != tally:
                raise StoreError(f"{store.address} was written while it was exported; rerun the command")
            sync(partial)
            partial.replace(out)
            sync(out.parent)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise StoreError(
                f"{out} cannot be written: {error}; check the path, its permissions and the free space"
            ) from error
        finally:
            with suppress(OSError):
                partial.unlink()
    return PublishReport(out, generation, tally.count, out.stat().st_size)


def import_store(
    file: str | Path,
    root: str | Path,
    *,
    key: bytes | None = None,
    shared_with_group: bool = False,
    parser: SourceParser | None = None,
) -> PublishReport:
    """Publish an exported file as a new generation; the records are the exported ones, with a new number.

    Args:
        file: of `export_store`.
        root: the store's folder, made if it does not exist. The generation published before is kept.
        key: 32 bytes, if the exported records are authenticated.
        shared_with_group: let the group of the store's folder read it.
        parser: reads the file, and stays open for other calls; None starts one.

    Raises:
        ConfigError: the folder holds another kind of store: unsharded, or with another number of shards.
        StoreLockedError: another process writes the store.
        StoreError: the file is not an export, is truncated, was edited, or is of another key; or the folder cannot be
            written. The published generation is unchanged.
        RecordError: a record is damaged; the message names its user. The published generation is unchanged.
    """
    file, root = store_path(file), store_path(root)
    check_place(root)
    with SourceParser() if parser is None else nullcontext(parser) as reader:
        return _import(file, root, key, GROUP if shared_with_group else PRIVATE, reader)


def _import(file: Path, root: Path, key: bytes | None, permissions: Permissions, parser: SourceParser) -> PublishReport:
    about = _about(file, parser)
    old = Manifest.from_dict(about["manifest"], file)
    old_spec = old.spec(key)
    store = Folder(root)
    with store.locked(permissions):
        store.remove_leftovers()
        wanted = dataclasses.replace(old.without_states(), generation=next_number(root), items_digest="")
        builder = store.builder(wanted, key, resume=False)
        read = Tally()
        try:
            with progress_bar(total=old.count, desc="import", unit="user") as bar:
                for keys, records in _rows(file, parser):
                    check_records(records, keys, old_spec)
                    read.add(keys, records)
                    if any(store.erased_users.erased(keys)):
                        raise StoreError(
                            f"{file}: holds users who were erased from {root}; erase them from the exported store too, "
                            "and export it again"
                        )
                    builder.put(keys, restamp_records(keys, records, builder.spec))
                    bar.update(len(keys))
            exported = about.get("count"), about.get("records_digest")
            if (read.count, read.records_digest) != exported:
                raise _not_an_export(
                    file,
                    f"it holds {read.count} records, but {shown(exported[0])} records, or other ones, were exported",
                )
            manifest = builder.finish()
        except BaseException:
            builder.discard()
            raise
        before = store.published_or_none()
        store.publish(manifest.generation, store.numbers() if before is None else [before])
    return PublishReport(root, manifest.generation, manifest.count, store.size_bytes(manifest.generation))


def _schema(source: FolderGeneration) -> dict[str, Any]:
    counted = {"counter_field": pl.UInt8, "counter_key": pl.Int32, "counter_value": pl.Float32}
    return {
        "user": pl.Int64 if source.manifest.user_kind == "int" else pl.String,
        "event_count": pl.Int64,
        "last_event_ts": pl.Int64,
        "tail_item": pl.List(pl.Int32),
        "tail_time": pl.List(pl.Int64),
        "tail_action": pl.List(pl.UInt8),
        **{f"user.{one.name}": pl.Float32 if one.size is None else pl.Int32 for one in source.spec.user_columns},
        **{
            f"tail.{column.name}": pl.List(pl.Float32 if column.size is None else pl.Int32)
            for column in source.spec.tail_columns
        },
        "summary": pl.List(pl.Float32),
        **({} if source.spec.counters is None else {name: pl.List(dtype) for name, dtype in counted.items()}),
        "key": pl.Binary,
        "record": pl.Binary,
    }


def _frame(keys: list[bytes], records: list[bytes], source: FolderGeneration, schema: dict[str, Any]) -> pl.DataFrame:
    raw = read_records(records, keys, source.spec)
    bounds = raw.tail.offsets[1:-1]
    last = raw.headers["last_event_ts"].astype(np.int64)
    users = [user_id(key) for key in keys]
    columns = {
        "user": users if source.manifest.user_kind == "int" else list(map(str, users)),
        "event_count": raw.headers["event_count"].astype(np.int64),
        "last_event_ts": pl.Series(last).replace(NO_TIMESTAMP, None),
        "tail_item": _lists(raw.tail.items, bounds),
        "tail_time": _lists(raw.tail.times, bounds),
        "tail_action": _lists(raw.tail.actions, bounds),
        **{f"user.{name}": values for name, values in raw.features.items()},
        **{f"tail.{name}": _lists(values, bounds) for name, values in raw.tail.features.items()},
        "summary": raw.summary.reshape(len(keys), -1),
        **_counter_columns(raw.counters),
        "key": keys,
        "record": records,
    }
    # The cast is needed because Polars turns lists of equal lengths into arrays.
    return pl.DataFrame(
        [pl.Series(name, values, dtype=schema[name]).cast(schema[name]) for name, values in columns.items()]
    )


def _counter_columns(counters: Sequence[CounterCodes]) -> dict[str, list[NDArray[Any]]]:
    """Columns of the counters, whose fields are one after another for each user; none without counters."""
    if not counters:
        return {}
    order = np.argsort(np.concatenate([one.owner for one in counters]), kind="stable")
    number = np.repeat(np.arange(len(counters), dtype=np.uint8), [len(one.key) for one in counters])
    key, values = np.concatenate([one.key for one in counters]), np.concatenate([one.values() for one in counters])
    bounds = np.add.reduce([one.offsets for one in counters])[1:-1]
    return {
        "counter_field": _lists(number[order], bounds),
        "counter_key": _lists(key[order], bounds),
        "counter_value": _lists(values[order].astype(np.float32).reshape(-1), bounds * values.shape[1]),
    }


def _lists(values: NDArray[Any], bounds: NDArray[np.int64]) -> list[NDArray[Any]]:
    return np.split(values, bounds)


def _group_rows(source: FolderGeneration, group_bytes: int) -> int:
    spec = source.spec
    event_bytes, user_bytes = 26 + 8 * len(spec.tail_columns), 256 + 8 * len(spec.user_columns)
    size = 4 * spec.num_tokens * spec.dim + spec.rows_bytes + event_bytes * source.manifest.tail_len + user_bytes
    if spec.counters is not None:
        size += sum(spec.counters.spec.keys) * (8 + 5 * spec.counters.spec.num_columns)
    return max(1, group_bytes // size)


def _about(file: Path, parser: SourceParser) -> dict[str, Any]:
    checksum, _, text = _call(parser, "metadata", file)[0].get(_METADATA, "").partition(" ")
    if checksum != _checksum(text):
        raise _not_an_export(file, "its metadata are missing or damaged")
    about: dict[str, Any] = json.loads(text)
    if about.get("format") != FORMAT:
        raise _not_an_export(file, f"it is a {shown(about.get('format'))}, but this version of vista reads {FORMAT!r}")
    if not isinstance(about.get("manifest"), dict):
        raise _not_an_export(file, "its metadata have no manifest")
    return about


def _checksum(text: str) -> str:
    digest: str = xxhash.xxh3_64_hexdigest(text.encode())
    return digest


def _rows(file: Path, parser: SourceParser) -> Iterator[tuple[list[bytes], list[bytes]]]:
    _call(parser, "open_batches", file, columns=["key", "record"], rows=_BATCH_ROWS)
    while content := _call(parser, "next_batch", file)[1]:
        frame = pl.read_ipc(BytesIO(content))
        keys, records = frame["key"].to_list(), frame["record"].to_list()
        if None in keys or None in records:
            raise _not_an_export(file, "a key or record is missing")
        yield keys, records


def _call(parser: SourceParser, task: str, file: Path, **arguments: Any) -> tuple[Any, bytes]:
    """`SourceParser.call` of a file that may not be an export."""
    try:
        return parser.call(task, file, **arguments)
    except DataError as error:
        raise _not_an_export(file, str(error).removeprefix(f"{file}: ")) from error


def _not_an_export(file: Path, reason: str) -> StoreError:
    return StoreError(
        f"{file} is not a complete export of a store: {reason}; make it with `vista store export`, and do not edit it"
    )
