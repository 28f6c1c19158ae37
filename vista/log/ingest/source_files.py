"""Text files: their lines, headers, and values as text."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from vista.errors import DataError, shown
from vista.installation import require_module

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

ROW, EXTRA = "row", "extra"


@dataclass(frozen=True, slots=True)
class FileScan:
    """The rows of a file as a lazy frame.

    frame: columns with raw values, ROW, and (of a text file) EXTRA; columns: their names to those in the file; is_text:
    whether values are text to parse; time_form: what times are, as in `TimeUnit`.
    """

    frame: pl.LazyFrame
    columns: Mapping[str, str]
    is_text: bool
    time_form: str | None = None


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


_QUOTED = re.compile(rb'(.?)"[^"]*(?:""[^"]*)*"(.?)', re.DOTALL)


def text_fault(file: Path, reason: str) -> str | None:
    """The first line that is not UTF-8, or with a quote within a field or not closed, and what to do; None without.
    `reason`: why Polars cannot read the file. If it is about neither, nothing is read."""
    has_bad_quote = "not properly escaped" in reason or "CSV malformed" in reason
    if not has_bad_quote and "utf-8" not in reason:
        return None
    record, begin, is_open = bytearray(), 0, False
    with open_binary(file) as handle:
        for number, line in enumerate(handle, 1):
            try:
                line.decode()
            except UnicodeDecodeError as bad:
                place = shown(line[max(bad.start - 10, 0) : bad.end + 10])
                return f"line {number}: {place} is not UTF-8; convert the file to UTF-8"
            if not has_bad_quote:
                continue
            record += line
            begin = begin or number
            is_open ^= line.count(b'"') % 2 == 1
            # Only the separator, which no letter or digit is, may be next to a quoted field.
            sides = set() if is_open else {*chain(*_QUOTED.findall(record.rstrip(b"\r\n")))} - {b""}
            if len(sides) > 1 or any(side.isalnum() for side in sides) or len(record) > MAX_LINE_BYTES:
                break
            if not is_open:
                record, begin = bytearray(), 0
    problem = "has a quote within a field, or one that is not closed; correct the separator or the quotes"
    return f"line {begin} {problem}" if begin else None


MORE_FIELDS = 8
"""Fields that are read beyond the last column. Polars skips the rest of a line, and lines with it after a quote."""


def scan_text(
    file: Path | BytesIO, layout: Sequence[str | None], separator: str, quote: str | None, header_lines: int
) -> pl.LazyFrame:
    """Read all values as text. `layout` names the fields of a line: "" skips a field, None requires it to be empty."""
    schema = {f"field_{index}": pl.String for index in range(len(layout) + MORE_FIELDS)}
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
    return lazy.select(ROW, *chosen, pl.coalesce(*empty, *list(schema)[len(layout) :]).alias(EXTRA))


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


def read_header(file: Path, separator: str) -> list[str]:
    """Column names in the first line of a text file."""
    try:
        names = next(csv.reader([first_line(file)], delimiter=separator), [])
    except csv.Error as error:
        raise DataError(f"{file}: the header cannot be read ({error}); correct its quotes") from error
    if not any(names):
        raise DataError(f"{file}: the first line is blank; write the column names there")
    if len(names) > MAX_COLUMNS:
        raise DataError(
            f"{file}: has {len(names):,} columns, but at most {MAX_COLUMNS:,} are possible; check the separator"
        )
    return names


_KEYS = {
    "label": "labels",
    "probability": "probabilities",
    "category": "categories",
    "number": "numbers",
    "vector": "vectors",
}
"""Keys of the configuration by the role of a column, where they differ."""


def check_columns(path: str, columns: Mapping[str, str], present: Iterable[str], table: str, remedy: str = "") -> None:
    """Refuse a table that does not have each of these columns once.

    Args:
        columns: canonical names to those of the table.
        present: the table's columns.
        remedy: what to do; by default, to set the key of the column.

    Raises:
        DataError: naming the column, with the remedy.
    """
    names = list(present)
    for canonical, own in columns.items():
        if names.count(own) != 1:
            raise DataError(
                f"{path}: column {own!r} {'is missing' if own not in names else 'occurs twice'}, the file has: "
                f"{', '.join(names)}; {remedy or _key_to_set(canonical, names, table)}"
            )


def _key_to_set(canonical: str, names: Sequence[str], table: str) -> str:
    key = _KEYS.get(canonical.split(":")[0], canonical)
    # Commands name columns of a table of items by different keys.
    is_feature_of_item = table == "items" and ":" in canonical
    return (
        ("name one of these" if is_feature_of_item else f"name the right one with {table}.{key}=...")
        + (f", or set {table}.separator=..." if len(names) == 1 else "")
        + (", or leave it out for a log without times" if canonical == "timestamp" and table == "events" else "")
    )


def to_polars(frame: Any, columns: Iterable[str] | None = None) -> pl.DataFrame:
    """Convert columns of a frame to Polars. NaT, NA, and None of pandas become null; NaN stays NaN.

    Args:
        frame: a Polars DataFrame or LazyFrame, a pandas DataFrame, or a mapping of name to array or list.
        columns: columns to convert; None converts all.

    Raises:
        TypeError: if `frame` is of another type.
        DataError: if a column is missing or mixes types, or columns differ in length.
    """
    if isinstance(frame, pl.LazyFrame):
        frame = frame.collect()
    is_pandas = type(frame).__module__.split(".")[0] == "pandas"
    if not isinstance(frame, pl.DataFrame | Mapping) and not is_pandas:
        raise TypeError(f"frame must be a pandas or Polars DataFrame or a mapping of columns, got {type(frame)}")
    present = list(frame) if isinstance(frame, Mapping) else list(frame.columns)
    wanted = present if columns is None else [name for name in present if name in set(columns)]
    missing = [name for name in columns or () if name not in present]
    if missing:
        named = ", ".join(map(str, present))
        raise DataError(
            f"column {missing[0]!r} is missing, the frame has: {named}; name the right one, as in "
            "SourceColumns(user=...)"
        )
    if isinstance(frame, pl.DataFrame):
        return frame.select(wanted)
    for name in wanted:
        if wanted.count(name) > 1:
            raise DataError(f"column {name!r} occurs twice in the frame; drop one")
    lengths = {name: len(frame[name]) for name in wanted}
    if len(set(lengths.values())) > 1:
        raise DataError(f"columns differ in length: {lengths}; give every column one value per row")
    return pl.DataFrame([_series(str(name), frame[name], is_pandas) for name in wanted])


def _series(name: str, values: Any, is_pandas: bool) -> pl.Series:
    if isinstance(values, pl.Series):
        return values.alias(name)
    try:
        if not is_pandas:
            return pl.Series(name, values)
        if getattr(values.dtype, "tz", None) is not None:
            values = values.dt.tz_convert("UTC").dt.tz_localize(None)
        if isinstance(values.dtype, np.dtype) and values.dtype.kind in "iufb":
            return pl.Series(name, values.to_numpy())
        if isinstance(values.dtype, np.dtype) and values.dtype.kind == "M":
            return pl.Series(name, values.to_numpy().astype("datetime64[ms]"))
        cells = values.astype(object).where(values.notna(), None).tolist()
        return pl.Series(name, [cell.tolist() if isinstance(cell, np.ndarray) else cell for cell in cells])
    except (TypeError, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"column {name!r} mixes types ({str(error).splitlines()[0]}); convert it to one, such as text"
        ) from error


def scan_json_lines(file: Path, fields: Sequence[str], table: str, remedy: str) -> pl.LazyFrame:
    """Read fields of all objects as text. A line that is not an object has no fields.

    Args:
        table: events | items, for messages.
        remedy: what to do about a file whose first object lacks a field.

    Returns:
        ROW and the fields; a list is JSON text, and null is missing.

    Raises:
        DataError: if the first line is not an object, or lacks a field.
    """
    try:
        first = json.loads(first_line(file))
    except json.JSONDecodeError:
        first = None
    if not isinstance(first, dict):
        raise DataError(f"{file}: line 1 is not a JSON object; {remedy}")
    check_columns(str(file), {field: field for field in fields}, first, table, remedy)
    # A control character separates the columns, because JSON has none outside of line ends.
    lines = scan_text(file, ["line"], "\x1f", None, 0)
    return lines.select(ROW, *(pl.col("line").str.json_path_match(f"$.{field}").alias(field) for field in fields))
