"""Text files: their lines, headers, and values as text."""

from __future__ import annotations

import csv
import gzip
import hashlib
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from vista.errors import DataError
from vista.installation import require_module
from vista.log.ingest.file_scan import EXTRA, ROW

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

MAX_LINE_BYTES = 1 << 20
"""Longest line of a text file, its header included."""
MAX_COLUMNS = 4096


def open_binary(file: Path) -> IO[bytes]:
    """Open a text file, decompressed if its name ends in .gz."""
    return cast(IO[bytes], gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb"))


def digest_of(file: Path, *, check_lines: bool) -> tuple[int, str]:
    """Size and hex SHA-256 of a file; refuses a line that is too long, which the parser would hold in memory."""
    sha, size, line_start = hashlib.sha256(), 0, 0
    with file.open("rb") as handle:
        while block := handle.read(MAX_LINE_BYTES):  # so a line within a block is not too long
            sha.update(block)
            if check_lines:
                first, last = block.find(b"\n"), block.rfind(b"\n")
                if size + (first if first >= 0 else len(block)) - line_start > MAX_LINE_BYTES:
                    raise _too_long(file, _newlines(file, line_start) + 1)
                if last >= 0:
                    line_start = size + last + 1
            size += len(block)
    return size, sha.hexdigest()


def _too_long(file: Path, line: int) -> DataError:
    return DataError(
        f"{file}: line {line} is longer than {MAX_LINE_BYTES:,} bytes; check that its lines end in a newline"
    )


def _newlines(file: Path, size: int) -> int:
    """Number of line ends in the first bytes of a file."""
    count = 0
    with file.open("rb") as handle:
        while size > 0 and (block := handle.read(min(size, MAX_LINE_BYTES))):
            count += block.count(b"\n")
            size -= len(block)
    return count


def scan_text(
    file: Path | BytesIO,
    layout: Sequence[str | None],
    separator: str,
    quote: str | None,
    header_lines: int,
) -> pl.LazyFrame:
    """Read all values as text. `layout` names the fields of a line: "" skips a field, None requires it to be empty."""
    schema = {f"field_{index}": pl.String for index in range(len(layout) + 1)}
    lazy = pl.scan_csv(
        file,
        has_header=False,
        skip_lines=header_lines,
        schema=schema,
        separator=separator,
        quote_char=quote,
        truncate_ragged_lines=True,
        missing_columns="insert",
        extra_columns="ignore",
        row_index_name=ROW,
        row_index_offset=1,
        glob=False,
    )
    empty = [f"field_{index}" for index, name in enumerate(layout) if name is None]
    chosen = [pl.col(f"field_{index}").alias(name) for index, name in enumerate(layout) if name]
    return lazy.select(ROW, *chosen, pl.coalesce(*empty, f"field_{len(layout)}").alias(EXTRA))


def as_utf8(file: Path) -> Path | BytesIO:
    """A small text file, or, if it is not UTF-8, its content decoded as Latin-1 and encoded as UTF-8."""
    content = file.read_bytes()
    try:
        content.decode()
        return file
    except UnicodeDecodeError:
        return BytesIO(content.decode("latin-1").encode())


def first_line(file: Path, encoding: str = "utf-8-sig") -> str:
    """The first line of a text file, without its end."""
    try:
        with open_binary(file) as handle:
            content = handle.readline(MAX_LINE_BYTES + 1)
            line = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: the header is not UTF-8 text ({error}); convert the file to UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: the header cannot be read ({error}); write the file again") from error
    if len(content) > MAX_LINE_BYTES:
        raise _too_long(file, 1)
    return line.rstrip("\r\n")


def read_header(file: Path, separator: str, quote: str | None) -> list[str]:
    """Column names in the first line of a text file."""
    line = first_line(file)
    names = line.split(separator)
    if quote is not None:
        try:
            names = next(csv.reader([line], delimiter=separator, quotechar=quote), [])
        except csv.Error as error:
            raise DataError(f"{file}: the header cannot be read ({error}); correct its quotes") from error
    if not any(names):
        raise DataError(f"{file}: the first line is blank; write the column names there")
    if len(names) > MAX_COLUMNS:
        raise DataError(
            f"{file}: has {len(names):,} columns, but at most {MAX_COLUMNS:,} are possible; check the separator"
        )
    return names
