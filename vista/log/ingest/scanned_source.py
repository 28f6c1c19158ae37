"""A source whose rows this process can parse: a frame in memory or, in the parser process, a file."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from vista.config import SourceConfig
from vista.errors import DataError, LogWriteError, shown
from vista.installation import require_module
from vista.log.ingest.file_scan import ROW, FileScan
from vista.log.ingest.sources import Source, needed_columns
from vista.log.ingest.text_files import digest_of, open_binary

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScannedSource(Source):
    """A source with its rows.

    frame: canonical columns with raw values, and the columns ROW and (of a text file) EXTRA.
    """

    frame: pl.LazyFrame

    def described(self) -> dict[str, Any]:
        """The fields of a Source, as JSON values."""
        return {field.name: getattr(self, field.name) for field in fields(Source)}


def frame_source(frame: pl.DataFrame, config: SourceConfig, table: str) -> ScannedSource:
    """A frame from `to_polars` as a source. Its digest covers the columns that are used."""
    columns = needed_columns(config)
    used = frame.select(pl.col(own).alias(canonical) for canonical, own in columns.items())
    return replace(source_of_frame(used, columns, table, config.time_unit), max_values=config.max_values)


def file_source(file: Path, scan: FileScan) -> ScannedSource:
    """A file as a source; its digest and its lines are checked by `digest_of`.

    Args:
        scan: its rows, with canonical columns.
    """
    size, digest = digest_of(file, check_lines=scan.is_text and file.suffix != ".gz")
    return ScannedSource(
        path=str(file),
        name=file.name,
        digest=digest,
        size=size,
        columns=dict(scan.columns),
        is_text=scan.is_text,
        time_unit=scan.time_unit,
        frame=scan.frame,
    )


def source_of_frame(
    frame: pl.DataFrame, columns: dict[str, str], table: str, time_unit: str | None = None
) -> ScannedSource:
    """A frame of canonical columns as a source.

    Args:
        columns: canonical names to those that the columns had.
    """
    name, used = f"<{table} frame>", frame.rechunk()
    hasher = _Hasher()
    used.write_ipc(cast(IO[bytes], hasher))
    return ScannedSource(
        path=name,
        name=name,
        digest=hasher.sha.hexdigest(),
        size=hasher.size,
        columns=columns,
        is_text=False,
        time_unit=time_unit,
        frame=used.lazy().with_row_index(ROW, 1),
    )


def unreadable(source: Source, error: Exception) -> DataError:
    """The error for a source that Polars cannot read. For text, it names the first line that is not UTF-8."""
    cause = re.search(r"Original error: ```(.*?)```", str(error), re.DOTALL)
    reason = " ".join((cause[1] if cause else str(error).split("\n\n")[0]).split())
    if "No space left" in reason or "quota exceeded" in reason:
        return LogWriteError(
            f"{source.path}: no disk space left for its rows; free disk space, or choose another folder"
        )
    if "File too large" in reason:
        return DataError(f"{source.path}: has too many rows for a file of its size; write it again, or split it")
    if source.is_text and "utf-8" in reason:
        with open_binary(Path(source.path)) as handle:
            for number, line in enumerate(handle, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as bad:
                    place = shown(line[max(bad.start - 10, 0) : bad.end + 10])
                    return DataError(f"{source.path}: line {number}: {place} is not UTF-8; convert the file to UTF-8")
    return DataError(f"{source.path}: cannot be read: {reason}; check the file, the separator and the quotes")


class _Hasher:
    """A file that only computes the SHA-256 and the size of what is written to it."""

    def __init__(self) -> None:
        self.sha = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.sha.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        return
