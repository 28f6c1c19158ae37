"""A generation as a Parquet file: for other programs to read, and for a store to be made of it again, bit for bit.

One row a user, in the order of the keys. `record` and `key` are what the store holds; all other columns say the same
readably, and are not read again. Needs Polars: import this module only where it is used.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from vista.errors import StoreError
from vista.files import sync
from vista.log.polars_extra import pl, register_io_source
from vista.store.admin.publish import PublishReport, publish_report
from vista.store.admin.whole_generations import (
    GenerationBuilder,
    GenerationReader,
    Tally,
    next_number,
    open_generation,
    restamp_records,
    settled,
)
from vista.store.format.keys import user_id
from vista.store.format.record import check_records, decode_rows, read_records
from vista.store.generation_files import flip
from vista.store.layout import (
    Manifest,
    environment_path,
    kept_beside_a_new_one,
    read_current,
    remove_leftovers,
)
from vista.store.lmdb.data_file import check_structure
from vista.store.lmdb.locks import locked
from vista.store.lmdb.permissions import GROUP, PRIVATE
from vista.store.shards import check_place
from vista.store.stored_batch import NO_TIMESTAMP
from vista.store.tombstones import Tombstones

FORMAT = "vista store export 1"

_METADATA = "vista"
_GROUP_BYTES = 1 << 24
"""Of a row group, about: what writing and reading hold in memory at once."""


def export_store(root: str | Path, out: str | Path, *, key: bytes | None = None) -> PublishReport:
    """Write the served generation to a Parquet file, which appears whole or not at all.

    Columns: `user` (int64, or string), `event_count`, `last_event_ts` (null for none), `tail_item` (model rows int32),
    `tail_time` int64, `tail_action` uint8, `summary` (K * d float32, decoded), `key` and `record` (bytes).

    Args:
        out: the file; replaced if it is there. Only this account may read it.
        key: of an authenticated store.

    Raises:
        StoreBusyError: a refresh writes the generation without a pause.
        StoreError: nothing is served, a record is damaged, or the file cannot be written.
    """
    root, out = Path(root).absolute(), Path(out).absolute()
    generation = read_current(root)
    return settled(root, generation, lambda: _export(root, generation, out, key))


def _export(root: Path, generation: int, out: Path, key: bytes | None) -> PublishReport:
    check_structure(environment_path(root, generation))
    with open_generation(root, generation, key) as source:
        tally, written, fault = source.tally(), Tally(), []
        schema = _schema(source.manifest.user_kind)

        def frames(*_: Any) -> Iterator[pl.DataFrame]:
            try:
                for keys, records in source.batches():
                    written.add(keys, records)
                    yield _frame(keys, records, source, schema)
            except StoreError as error:  # Polars would make another error of it.
                fault.append(error)

        about: dict[str, Any] = {"format": FORMAT, "manifest": dataclasses.asdict(source.manifest)}
        about |= {"count": tally.count, "records_digest": tally.records_digest}
        text = json.dumps(about)
        partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        try:
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE.file))
            register_io_source(frames, schema=schema).sink_parquet(
                partial,
                metadata={_METADATA: f"{_checksum(text)} {text}"},
                statistics=False,
                row_group_size=_group_rows(source),
            )
            if fault:
                raise fault[0]
            if written != tally:
                raise StoreError(f"{root} was written while it was exported; run the same command again")
            partial.chmod(PRIVATE.file)
            sync(partial)
            partial.replace(out)
            sync(out.parent)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise StoreError(f"{out} cannot be written: {error}; check the path, permissions and free space") from error
        finally:
            with suppress(OSError):
                partial.unlink()
    return PublishReport(out, generation, tally.count, out.stat().st_size)


def import_store(
    file: str | Path, root: str | Path, *, key: bytes | None = None, shared_with_group: bool = False
) -> PublishReport:
    """Make a generation of an exported file and publish it; its records are the exported ones, under a new number.

    Args:
        file: of `export_store`.
        root: the store's folder, made if it is not there. The generation that it served before is kept.
        key: of the store that was exported, if that is authenticated.
        shared_with_group: let the group of the store's folder read it.

    Raises:
        ConfigError: the folder holds another kind of store, undivided or divided in other parts.
        StoreLockedError: another process writes the store.
        StoreError: the file is foreign, truncated, was edited, or is of another key; the folder cannot be written.
        RecordError: a record is damaged; the message names its user. What is served is as before.
    """
    file, root = Path(file).absolute(), Path(root).absolute()
    check_place(root)
    about = _about(file)
    old = Manifest.from_dict(about["manifest"], file)
    old_spec = old.spec(key)
    modes = GROUP if shared_with_group else PRIVATE
    with locked(root, modes):
        remove_leftovers(root)
        tombstones, wanted = Tombstones(root), old.without_states()
        builder = GenerationBuilder(root, dataclasses.replace(wanted, generation=next_number(root)), key, modes)
        read = Tally()
        try:
            for keys, records in _rows(file):
                check_records(records, keys, old_spec)
                read.add(keys, records)
                if any(tombstones.erased(keys)):
                    raise StoreError(
                        f"{file}: holds users who were erased from {root}; export again from a store without"
                    )
                builder.put(keys, restamp_records(keys, records, builder.spec))
            if (read.count, read.records_digest) != (about["count"], about["records_digest"]):
                raise _foreign(file, f"it holds {read.count} records, not the {about['count']} that were exported")
            manifest = builder.finish()
        except BaseException:
            builder.discard()
            raise
        flip(root, manifest.generation, kept_beside_a_new_one(root))
    return publish_report(root, manifest.generation, manifest.count)


def _schema(user_kind: str | None) -> dict[str, Any]:
    return {
        "user": pl.Int64 if user_kind == "int" else pl.String,
        "event_count": pl.Int64,
        "last_event_ts": pl.Int64,
        "tail_item": pl.List(pl.Int32),
        "tail_time": pl.List(pl.Int64),
        "tail_action": pl.List(pl.UInt8),
        "summary": pl.List(pl.Float32),
        "key": pl.Binary,
        "record": pl.Binary,
    }


def _frame(keys: list[bytes], records: list[bytes], source: GenerationReader, schema: dict[str, Any]) -> pl.DataFrame:
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
        "summary": decode_rows(raw, source.spec).reshape(len(keys), -1),
        "key": keys,
        "record": records,
    }
    # Polars makes arrays of lists of one length: hence the cast.
    return pl.DataFrame(
        [pl.Series(name, values, dtype=schema[name]).cast(schema[name]) for name, values in columns.items()]
    )


def _lists(values: NDArray[Any], bounds: NDArray[np.int64]) -> list[NDArray[Any]]:
    return np.split(values, bounds)


def _group_rows(source: GenerationReader) -> int:
    spec = source.spec
    size = 4 * spec.num_tokens * spec.dim + spec.rows_bytes + 26 * source.manifest.tail_len + 256
    return max(1, _GROUP_BYTES // size)


def _about(file: Path) -> dict[str, Any]:
    try:
        metadata = pl.read_parquet_metadata(file)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise _foreign(file, str(error)) from error
    checksum, _, text = metadata.get(_METADATA, "").partition(" ")
    if checksum != _checksum(text):
        raise _foreign(file, "what it says of itself is missing or damaged")
    about: dict[str, Any] = json.loads(text)
    if about["format"] != FORMAT:
        raise _foreign(file, f"it is a {about['format']!r}, this vista reads {FORMAT!r}")
    return about


def _checksum(text: str) -> str:
    digest: str = xxhash.xxh3_64_hexdigest(text.encode())
    return digest


def _rows(file: Path) -> Iterator[tuple[list[bytes], list[bytes]]]:
    try:
        columns = pl.scan_parquet(file, glob=False).select(
            pl.col("key").cast(pl.Binary).alias("key"), pl.col("record").cast(pl.Binary).alias("record")
        )
        for frame in columns.collect_batches(chunk_size=1024, maintain_order=True):
            keys, records = frame["key"].to_list(), frame["record"].to_list()
            if None in keys or None in records:
                raise _foreign(file, "a key or record is missing")
            yield keys, records
    except pl.exceptions.PolarsError as error:
        raise _foreign(file, str(error)) from error


def _foreign(file: Path, reason: str) -> StoreError:
    return StoreError(
        f"{file} is no whole export of a store: {reason}; make it with `vista store export`, and do not edit it"
    )
