"""Rules for the values of a source: columns are parsed, and each rule tells which rows are bad and why.

user, item: int64 or text, one kind for the whole log; floats must be whole numbers. Bad: missing or empty; for integer
    ids, other text, leading zeros (007 and 7 would be the same id), or beyond int64; text longer than 500 bytes.
timestamp: numbers in the given unit, text in ISO 8601 or in a strptime format (times.py), or dates and datetimes (UTC
    unless they have a zone). Bad: missing, other text, NaN, before 1970, after 2100.
rating: finite float; sequence: int64. Bad: missing, text, NaN, infinite.
action: text, or numbers that are used as names. Bad: missing.
label:*: 0, 1, or missing (or NaN), which means unknown. probability:*: in [0, 1], or missing. Bad: anything else.
category:*: text, of items also lists of text. number:*: finite float, or missing (or NaN). Bad: text, infinite. Of
    impressions, number:position is a whole number from 1, and number:propensity in (0, 1]. Bad: anything else.
vector:*: lists of finite floats, as many as in the file's first vector, or missing (or empty, or only NaN). Bad:
    anything else.

Integers in us and ns are truncated to milliseconds. A float timestamp is scaled in float64 and rounded to the nearest
millisecond. Blank lines of a text file are skipped, but they count in row numbers.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vista.config.checks import OnBadRows
from vista.config.log_config import POSITION, PROPENSITY
from vista.errors import ConfigError, DataError, shown
from vista.installation import require_module
from vista.log.features import code_type
from vista.log.histories import LATEST_MS
from vista.log.ingest.source_files import EXTRA, ROW
from vista.log.ingest.sources import FileSource, ScannedSource, Source, collected, unreadable
from vista.log.ingest.times import ms_of_text
from vista.log.segment_files import OWNERS
from vista.log.vocabulary import Vocabulary

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")


MAX_ID_BYTES = 500
BLANK = 65_535
"""Problem code of a blank line."""
PROBLEM = "problem"
_MS_PER_UNIT = {"s": 1000.0, "ms": 1.0, "us": 1e-3, "ns": 1e-6}
TIME_UNITS = (*_MS_PER_UNIT, "iso")


@dataclass(frozen=True, slots=True)
class RowRule:
    """A reason for which a value is bad, and the remedy."""

    column: str
    bad: pl.Expr
    reason: str
    remedy: str


def id_kind(source: Source, column: str, wanted: str) -> str:
    """The kind of a source's ids, "int" or "str": as configured, or from the column's type or the first text value.
    `wanted`: auto | int | str."""
    if wanted != "auto":
        return wanted
    if isinstance(source, FileSource):
        kind: str = source.parser.call("id_kind", source.path, table=source.table, column=column)[0]
        return kind
    assert isinstance(source, ScannedSource)
    dtype = source.frame.collect_schema()[column]
    if dtype.is_integer() or dtype.is_float():
        return "int"
    if not source.is_text:
        return "str"
    first = collected(source, source.frame.select(column).filter(pl.col(column).is_not_null()).head(1))
    return "int" if first.height and first[column].str.contains(r"^-?(0|[1-9][0-9]{0,18})$")[0] else "str"


def parse(source: ScannedSource, kinds: Mapping[str, str], table: str) -> tuple[pl.LazyFrame, list[RowRule]]:
    """Lazily parse and check all values of a source.

    Args:
        kinds: kinds of ids, "int" or "str", of "user" and "item".
        table: events | impressions | items | users, for messages.

    Returns:
        (the typed rows, the rules). Columns as in `sources`: ids int64 or str, timestamp int64 ms, rating float32,
        action str, sequence int64, labels uint8, probabilities float32, categories str (of items
        lists of str), numbers float32, vectors lists of float32, `row`, and `problem` uint16: 0, BLANK, or the 1-based
        index of the first rule that a row breaks.

    Raises:
        ConfigError: if times have no unit.
        DataError: if a column has an impossible type.
    """
    schema = source.frame.collect_schema()
    typed: dict[str, pl.Expr] = {}
    rules: list[RowRule] = []
    for column in source.columns:
        dtype = schema[column]
        role = column.split(":")[0]
        if role in ("category", "number", "vector"):
            if table not in OWNERS:
                _check_row_feature(column, role, dtype, source, table)
            typed[column], of_column = _feature(column, role, dtype, source, table)
            rules += of_column
            continue
        wrong = dtype.is_nested() or dtype.is_decimal() or dtype in (pl.Binary, pl.Object, pl.Duration, pl.Time)
        wrong |= role != "timestamp" and dtype.is_temporal()
        wrong |= role in ("user", "item", "timestamp", "sequence") and dtype == pl.Boolean
        if wrong:
            raise DataError(
                f"{source.path}: column {source.columns[column]!r} has type {dtype} and cannot be {_article(role)}; "
                "convert it"
            )
        if role in kinds:
            typed[column], of_column = _ids(column, dtype, kinds[role], table)
        elif role == "timestamp":
            typed[column], of_column = _timestamp(column, dtype, source, table)
        elif role == "action":
            typed[column] = pl.col(column).cast(pl.String)
            of_column = [RowRule(column, pl.col(column).is_null(), "is missing", "give every event an action")]
        else:
            typed[column], of_column = _number(column, role)
        rules += of_column
    if source.is_text:
        extra = pl.col(EXTRA).is_not_null()
        rules.insert(0, RowRule(EXTRA, extra, "is one field too many", "quote text that contains the separator"))
    if len(rules) >= BLANK:
        raise ConfigError(
            f"{table}.labels: too many labels ({len(rules)} rules, at most {BLANK - 1} are possible); name fewer"
        )
    codes = (pl.when(rule.bad).then(pl.lit(code, pl.UInt16)) for code, rule in enumerate(rules, 1))
    problem = pl.coalesce(*codes, pl.lit(0, pl.UInt16))
    if source.is_text:
        blank = pl.all_horizontal(pl.col(*source.columns, EXTRA).is_null())
        problem = pl.when(blank).then(pl.lit(BLANK, pl.UInt16)).otherwise(problem)
    columns = [expression.alias(name) for name, expression in typed.items()]
    return source.frame.select(ROW, *columns, problem.alias(PROBLEM)), rules


def _article(role: str) -> str:
    """The name of a role with its article."""
    return f"{'an' if role[0] in 'ai' else 'a'} {role}"


def _ids(column: str, dtype: pl.DataType, kind: str, table: str) -> tuple[pl.Expr, list[RowRule]]:
    raw = pl.col(column)
    key = f"{'events' if table in OWNERS else table}.ids"
    missing = RowRule(column, raw.is_null(), "is missing", f"give every row {_article(column)} id")
    if kind == "str":
        text = raw.cast(pl.String)
        return text, [
            RowRule(column, text.fill_null("") == "", "is missing", missing.remedy),
            RowRule(
                column, text.str.len_bytes() > MAX_ID_BYTES, "is too long", f"ids may have at most {MAX_ID_BYTES} bytes"
            ),
        ]
    if dtype.is_integer():
        number = raw.cast(pl.Int64, strict=False)
        return number, [missing, RowRule(column, number.is_null(), "does not fit into int64", f"set {key}=str")]
    if dtype.is_float():
        whole = (raw == raw.floor()) & (raw.abs() < 2.0**53)
        return raw.cast(pl.Int64, strict=False), [
            RowRule(column, raw.is_null() | raw.is_nan(), "is missing", missing.remedy),
            RowRule(column, whole.not_(), "is not a whole number", "write integers or text"),
        ]
    text = raw.cast(pl.String)
    number = text.cast(pl.Int64, strict=False)
    zeros = (text.str.starts_with("0") & (text != "0")) | text.str.starts_with("-0") | text.str.starts_with("+")
    return number, [
        RowRule(column, text.fill_null("") == "", "is missing", missing.remedy),
        RowRule(column, number.is_null(), "is not an integer id", f"correct it, or set {key}=str"),
        RowRule(column, zeros, "is not a plain integer", f"remove leading zeros and signs, or set {key}=str"),
    ]


def _timestamp(column: str, dtype: pl.DataType, source: Source, table: str) -> tuple[pl.Expr, list[RowRule]]:
    unit, raw, rules = _time_form(column, dtype, source, table), pl.col(column), list[RowRule]()
    default = f"correct it, or check {table}.time_{'format' if '%' in unit else 'unit'} (now {source.time_form})"

    def refuse(bad: pl.Expr, reason: str, remedy: str = default) -> None:
        rules.append(RowRule(column, bad, reason, remedy))

    refuse(raw.is_null(), "is missing", f"give every row a time, or set {table}.timestamp=null")
    factor = _MS_PER_UNIT.get(unit, 1.0)
    if dtype in (pl.Datetime, pl.Date):
        ms = given = (raw.cast(pl.Datetime("ms")) if dtype == pl.Date else raw).dt.timestamp("ms")
    elif unit == "iso":
        ms = given = ms_of_text(raw, unit)
        refuse(ms.is_null(), "is not an ISO 8601 time", "write 2024-05-01T12:00:00Z or 2024-05-01")
    elif "%" in unit:
        ms = given = ms_of_text(raw, unit)
        refuse(ms.is_null(), "is not a time in this format")
    else:
        whole = raw.cast(pl.Int64, strict=False)
        truncated = whole * int(factor) if factor >= 1 else whole // round(1 / factor)
        if dtype.is_integer():
            ms, given = truncated, whole
            refuse(whole.is_null(), "is after 2100")
        else:
            given = raw.cast(pl.Float64, strict=False)
            ms = (given * factor).round(0, mode="half_to_even").cast(pl.Int64, strict=False)
            if not dtype.is_float():  # integers in text are scaled as integers, exactly
                ms = pl.coalesce(truncated, ms)
            refuse(given.is_null(), "is not a number")
            refuse(given.is_nan(), "is not a number")
    # Compared in the source's unit, so that scaling cannot overflow before the check.
    refuse(given < 0, "is negative (before 1970)")
    refuse(given >= LATEST_MS / factor, "is after 2100")
    return ms, rules


def _time_form(column: str, dtype: pl.DataType, source: Source, table: str) -> str:
    """What a column of times is: a unit, iso, or a strptime format; dates and datetimes have "iso"."""
    key, unit, name = f"{table}.time_unit", source.time_form, source.columns[column]
    if unit is not None and "%" in unit:
        key = f"{table}.time_format"
    elif unit is not None and unit not in TIME_UNITS:
        raise ConfigError(f"{key}: unknown unit {unit!r}; use one of {', '.join(TIME_UNITS)}")
    if dtype in (pl.Datetime, pl.Date):
        if unit not in (None, "iso"):
            raise ConfigError(f"{key}={unit}: column {name!r} has type {dtype}; set {table}.time_unit=iso")
        return "iso"
    if unit is None:
        raise ConfigError(
            f"{key}: set the unit of column {name!r} of {source.path} ({', '.join(TIME_UNITS)}), or "
            f"{table}.time_format of its text, such as '%d.%m.%Y %H:%M'; seconds that are read as milliseconds would "
            "silently corrupt the log"
        )
    if (unit == "iso" or "%" in unit) and dtype != pl.String:
        raise ConfigError(
            f"{key}={unit}: column {name!r} of {source.path} has type {dtype}, not text; set {table}.time_unit"
        )
    return unit


def _number(column: str, role: str) -> tuple[pl.Expr, list[RowRule]]:
    raw = pl.col(column)
    name = column.split(":")[-1]
    if role == "sequence":
        number = raw.cast(pl.Int64, strict=False)
        return number, [
            RowRule(column, raw.is_null(), "is missing", "give every row a sequence number, or leave the column out"),
            RowRule(column, number.is_null(), "is not an integer", "correct it, or leave the column out"),
        ]
    real = raw.cast(pl.Float64, strict=False)
    if role == "rating":
        return real.cast(pl.Float32), [
            RowRule(column, raw.is_null(), "is missing", "correct it, or set rating=null to leave ratings out"),
            RowRule(column, real.is_null(), "is not a number", "correct it"),
            RowRule(column, real.cast(pl.Float32).is_finite().not_(), "is not a finite number", "correct it"),
        ]
    text_rule = RowRule(column, real.is_null() & raw.is_not_null(), "is not a number", "correct it")
    real = real.fill_nan(None)
    if role == "label":
        bad = (real != 0) & (real != 1)
        rules = [text_rule, RowRule(column, bad, "is not a label", f"write 0, 1, or nothing for {name}")]
        return pl.when(bad.not_()).then(real).cast(pl.UInt8), rules
    outside = real.is_between(0, 1).not_()
    return real.cast(pl.Float32), [
        text_rule,
        RowRule(column, outside, "is not a probability", "write a number in [0, 1]"),
    ]


def entries_of(dtype: Any) -> tuple[bool, pl.DataType]:
    """Whether a type is a list, and the type of its entries, or else the type itself."""
    is_list = isinstance(dtype, pl.List) or (isinstance(dtype, pl.Array) and len(dtype.shape) == 1)
    return is_list, dtype.inner if is_list else dtype


def is_text_type(dtype: pl.DataType) -> bool:
    """Whether values can only be names; a column of Null has none."""
    return dtype in (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Null)


def can_be(kind: str, dtype: pl.DataType, *, has_lists: bool) -> bool:
    """Whether a column of a type can be a category, number, or vector; `has_lists` allows lists, as items have them."""
    is_list, inner = entries_of(dtype)
    if is_list and not has_lists:
        return False
    if kind == "category":
        return is_text_type(inner) or inner.is_integer()
    if kind == "number":
        return not is_list and (inner.is_numeric() or inner in (pl.Boolean, pl.String, pl.Null))
    return inner == pl.Null or (is_list and inner.is_numeric()) or (not is_list and inner == pl.String)


def _check_row_feature(column: str, kind: str, dtype: pl.DataType, source: Source, table: str) -> None:
    """Refuse a column of events or impressions whose type cannot be a category, or a number."""
    if can_be(kind, dtype, has_lists=False):
        return
    key, other = ("categories", "numbers") if kind == "category" else ("numbers", "categories")
    remedy = (
        f"name it under {table}.{other}" if dtype.is_float() or dtype in (pl.Categorical, pl.Enum) else "convert it"
    )
    raise DataError(
        f"{source.path}: column {source.columns[column]!r} has type {dtype} and cannot be a {kind}; {remedy}, or leave "
        f"it out of {table}.{key}"
    )


def _feature(
    column: str, kind: str, dtype: pl.DataType, source: ScannedSource, table: str
) -> tuple[pl.Expr, list[RowRule]]:
    raw = pl.col(column)
    if kind == "category" and table not in OWNERS:
        return raw.cast(pl.String), []
    if kind == "category":
        return raw.cast(pl.List(pl.String)) if dtype.is_nested() else pl.concat_list(raw.cast(pl.String)), []
    if kind == "number":
        real = raw.cast(pl.Float64, strict=False)
        number = real.cast(pl.Float32)
        finite = RowRule(column, number.is_infinite(), "is not a finite number", "correct it, or leave it empty")
        number = number.fill_null(np.nan) if table not in OWNERS else number.fill_nan(None)
        if table == "impressions" and column in (f"number:{POSITION}", f"number:{PROPENSITY}"):
            return number, [_place_rule(column, number)]
        if dtype.is_numeric():
            return number, [finite]
        is_text = real.is_null() & (raw.cast(pl.String).fill_null("") != "")
        remedy = f"correct it, or name the column under {table}.categories"
        return number, [RowRule(column, is_text, "is not a number", remedy), finite]
    entries = raw.cast(pl.List(pl.Float64), strict=False).cast(pl.List(pl.Float32))
    # An empty vector has only NaN, too.
    is_missing = entries.list.eval(pl.element().is_nan().fill_null(False)).list.all()
    vector = pl.when(is_missing.not_()).then(entries)
    length = _first_length(source, vector.list.len())
    wrong = vector.list.eval(pl.element().is_finite().fill_null(False)).list.all().not_()
    return vector, [
        RowRule(column, wrong, "has an entry that is not a finite number", "correct it, or leave the vector empty"),
        RowRule(
            column,
            vector.list.len() != length,
            f"is not a vector of {length} numbers like the first one",
            "write vectors of one length",
        ),
    ]


def _place_rule(column: str, number: pl.Expr) -> RowRule:
    """The rule for positions in lists, or for the probabilities that users look at them."""
    if column == f"number:{POSITION}":
        good, reason = (number >= 1) & (number == number.floor()) & number.is_finite(), "is not a position"
        remedy = "write 1, 2, ..."
    else:
        good, reason = (number > 0) & (number <= 1), "is not a propensity"
        remedy = "write the probability, above 0 and at most 1, that the user looked at the item"
    return RowRule(column, (good & number.is_not_nan()).fill_null(False).not_(), reason, remedy)


def _first_length(source: ScannedSource, lengths: pl.Expr) -> int:
    """The length of the first vector that is not missing; 0 if there is none."""
    first = collected(source, source.frame.select(length=lengths).drop_nulls().head(1))
    return int(first["length"][0]) if first.height else 0


VALUE = "value"
"""Column of a file of values, whose rows are the codes of a part."""
_FIRST_ROWS, _MORE_ROWS = 100_000, 2_000_000
"""Rows that are looked at for a column with far too many values: all columns first, then those with many values."""
MARGIN = 1.25
"""Estimates of the number of values are closer than this factor."""


def refuse_many_values(rows: pl.LazyFrame, columns: Sequence[str], source: Source, table: str) -> None:
    """Refuse a category with far too many values in the first rows, before all values are held in memory.

    Args:
        rows: with the text of categories.
        source: of the rows.
        table: for the error.

    Raises:
        DataError: naming the column.
    """
    for num_rows, limit in ((_FIRST_ROWS, _FIRST_ROWS // 2), (_MORE_ROWS, source.max_values * MARGIN)):
        if columns:
            counts = rows.head(num_rows).select(pl.col(columns).approx_n_unique()).collect(engine="streaming")
            columns = [column for column, count in counts.row(0, named=True).items() if count > limit]
    for column in columns:
        raise too_many_values(source, table, column.partition(":")[2], f"about {counts[column][0]:,} or more")


def too_many_values(source: Source, table: str, name: str, count: str) -> DataError:
    """The error for a category with this number of values."""
    return DataError(
        f"{source.path}: with column {name!r} the log would have {count} distinct values, but a category may have at "
        f"most {source.max_values:,}; leave it out, merge rare values, or, for a category that the model hashes "
        f"(model.hashed_features), raise {table}.max_values"
    )


ORDER = "order"
"""Column of the input order over all parts: the number of the part times 2^32, plus the row."""
QUARANTINE_COLUMNS = ("table", "file", "row", "column", "value", "reason", "record")


@dataclass(frozen=True, slots=True)
class Part:
    """A parsed source, as an uncompressed Arrow IPC file that later stages memory-map.

    Args:
        file: all its rows, good and bad. Next to it is a CSV file of the bad rows, if there are any, and of events and
            impressions a file of the values of each category, whose codes the rows have.
        num_rows: number of good rows.
        num_bad: number of bad rows.
        is_filtered: whether good rows were left out of `file`.
    """

    source: Source
    file: Path
    num_rows: int
    num_bad: int
    is_filtered: bool = False

    def good(self) -> pl.LazyFrame:
        """The good rows."""
        return pl.scan_ipc(self.file).filter(pl.col(PROBLEM) == 0).drop(PROBLEM)


def values_file(part: Path, source: Source, column: str) -> Path:
    """The file of the values of a category, next to the file of a part."""
    return part.with_name(f"{part.stem}-{list(source.columns).index(column)}.arrow")


def read_part(
    source: Source, kinds: Mapping[str, str], table: str, folder: Path, number: int, on_bad_rows: OnBadRows
) -> Part:
    """Stream one source into `folder`; a file is read by its parser.

    Memory holds only Polars' buffers, and the numbers of bad rows with their reasons.

    Args:
        kinds: kinds of ids, "int" or "str", of "user" and "item".
        number: number of the part within its table, which orders equal times.

    Raises:
        DataError: if the file cannot be read or has no rows; with on_bad_rows=raise, for the first bad row.
    """
    file = folder.absolute() / f"{table}-{number:06d}.arrow"
    if isinstance(source, FileSource):
        settings = {"kinds": dict(kinds), "folder": str(file.parent), "on_bad_rows": on_bad_rows.value}
        counts, _ = source.parser.call(
            "read_part", source.path, table=table, number=number, time_form=source.time_form, **settings
        )
        return Part(source, file, *counts)
    assert isinstance(source, ScannedSource)
    frame, rules = parse(source, kinds, table)
    order = (pl.lit(number, pl.Int64) * 2**32 + pl.col(ROW).cast(pl.Int64)).alias(ORDER)
    categories = [name for name in source.columns if table not in OWNERS and name.startswith("category:")]
    # Codes take the place of text, in the order in which threads meet the values.
    known = {column: pl.Categories.random() for column in categories}
    codes_of = {column: pl.Categorical(values) for column, values in known.items()}
    held = [pl.Series([], dtype=dtype) for dtype in codes_of.values()]  # Polars forgets the values of unused types
    try:
        refuse_many_values(frame, categories, source, table)
        encoded = frame.with_columns(pl.col(column).cast(dtype).to_physical() for column, dtype in codes_of.items())
        encoded.with_columns(order).drop(ROW).sink_ipc(file, maintain_order=False)
        for column, values in known.items():
            values.to_series().alias(VALUE).to_frame().write_ipc(values_file(file, source, column))
        del held
        # The problem codes that occur, without reading the rows: two bytes per row.
        codes = pl.scan_ipc(file).group_by(PROBLEM).agg(pl.len(), pl.col(ORDER).min()).collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError) as error:
        raise unreadable(source, error) from error
    counts = {code: (count, order) for code, count, order in codes.rows()}
    num_good = counts.get(0, (0, 0))[0]
    bad = {code: entry for code, entry in counts.items() if code not in (0, BLANK)}
    num_bad = sum(count for count, _ in bad.values())
    if not num_good and not num_bad:
        raise DataError(f"{source.path}: has no rows; leave it out, or write it again")
    if bad:
        first = min(order for _, order in bad.values()) % 2**32
        message = _report(source, rules, pl.scan_ipc(file), first)
        if on_bad_rows is OnBadRows.error:
            more = f" (bad rows: {num_bad})" if num_bad > 1 else ""
            remedy = "correct it" if table in OWNERS else "on_bad_rows=quarantine sets bad rows aside instead"
            raise DataError(f"{message}; {remedy}{more}")
        if not num_good:
            raise DataError(
                f"{message}; no row of the file is valid (bad rows: {num_bad}), so check the names of its columns"
            )
        _set_aside(source, rules, table, pl.scan_ipc(file), file.with_suffix(".csv"))
    return Part(source, file, num_good, num_bad)


def write_quarantine(parts: Sequence[Part], target: Path) -> None:
    """Join the parts' bad rows into one CSV with a header."""
    with target.open("wb") as out:
        out.write((",".join(QUARANTINE_COLUMNS) + "\n").encode())
        for part in parts:
            if part.num_bad:
                with part.file.with_suffix(".csv").open("rb") as handle:
                    shutil.copyfileobj(handle, out)


def _report(source: ScannedSource, rules: Sequence[RowRule], part: pl.LazyFrame, row: int) -> str:
    """What is wrong with a row: file, row, column, value, reason, and remedy; in a table of items also the item."""
    problem = part.filter(pl.col(ORDER) % 2**32 == row).select(PROBLEM).collect(engine="streaming")
    rule = rules[problem[PROBLEM][0] - 1]
    is_feature = "user" not in source.columns and rule.column not in ("item", EXTRA)
    columns = [rule.column, "item"] if is_feature else [rule.column]
    value, *item = source.frame.filter(pl.col(ROW) == row).select(columns).collect(engine="streaming").row(0)
    given = shown(value) if value is not None else "the value"
    item_in = f"item {shown(item[0])} in " if item else ""
    place = "beyond the last column" if rule.column == EXTRA else f"column {source.columns[rule.column]!r}"
    return f"{source.path}: {item_in}row {row}, {place}: {given} {rule.reason}; {rule.remedy}"


def _set_aside(source: ScannedSource, rules: Sequence[RowRule], table: str, part: pl.LazyFrame, target: Path) -> None:
    """Stream a source's bad rows, in input order, into a CSV file without a header."""
    bad = part.filter((pl.col(PROBLEM) > 0) & (pl.col(PROBLEM) != BLANK))
    listed = bad.select((pl.col(ORDER) % 2**32).cast(pl.UInt32).alias(ROW), PROBLEM).collect(engine="streaming")
    schema = source.frame.collect_schema()
    own = {name: source.columns.get(name, name) for name in schema if name != ROW}
    value = pl.lit(None, pl.String)
    for code, rule in enumerate(rules, 1):
        value = pl.when(pl.col(PROBLEM) == code).then(_as_one_text(rule.column, schema[rule.column])).otherwise(value)
    table_of_reasons = pl.LazyFrame(
        {
            PROBLEM: list(range(1, len(rules) + 1)),
            "column": [source.columns.get(rule.column, rule.column) for rule in rules],
            "reason": [f"{rule.reason}; {rule.remedy}" for rule in rules],
        },
        schema_overrides={PROBLEM: pl.UInt16},
    )
    (
        source.frame.join(listed.lazy(), on=ROW, how="inner")
        .join(table_of_reasons, on=PROBLEM, how="left")
        .sort(ROW)
        .select(
            pl.lit(table).alias("table"),
            _as_text(pl.lit(source.path)).alias("file"),
            ROW,
            _as_text(pl.col("column")).alias("column"),
            _as_text(value).alias("value"),
            "reason",
            pl.struct(pl.col(name).alias(alias) for name, alias in own.items()).struct.json_encode().alias("record"),
        )
        .sink_csv(target, include_header=False)
    )


def _as_one_text(column: str, dtype: pl.DataType) -> pl.Expr:
    """A value as text; a list as its entries with spaces between them."""
    if dtype.is_nested():
        return pl.col(column).cast(pl.List(pl.String)).list.join(" ", ignore_nulls=True)
    return pl.col(column).cast(pl.String)


def _as_text(cell: pl.Expr) -> pl.Expr:
    """A cell that no spreadsheet takes for a formula: one that begins like a formula gets a leading apostrophe."""
    is_formula = cell.str.contains(r"^[=+\-@\t\r]") & ~cell.str.contains(r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
    return pl.when(is_formula).then(pl.concat_str(pl.lit("'"), cell)).otherwise(cell)


@dataclass(frozen=True, slots=True)
class PartCodes:
    """The codes of all parts, end to end. offsets: by the file of a part, where its codes begin; row_of_code: the row
    of each code in the values of the log, and at the end -1, for rows without a value."""

    offsets: Mapping[Path, int]
    row_of_code: NDArray[np.signedinteger[Any]]

    @classmethod
    def of(cls, table: str, parts: Sequence[Part], name: str, known: Vocabulary) -> tuple[PartCodes, Vocabulary]:
        """The codes of a column, and the values of the log with those of the parts: new ones are added part by part.

        Args:
            table: events | impressions, for the error.
            known: the values of the log without those of the parts.

        Raises:
            DataError: if there are too many.
        """
        column, end = f"category:{name}", 0
        offsets, rows_of_parts = {}, []
        for part in parts:
            values = pl.read_ipc(values_file(part.file, part.source, column))[VALUE]
            offsets[part.file], end = end, end + len(values)
            used = pl.arange(len(values), eager=True)
            if part.num_bad or part.is_filtered:  # other rows had values too
                used = part.good().select(pl.col(column).drop_nulls().unique()).collect(engine="streaming").to_series()
            limit = part.source.max_values
            if len(used) <= limit:
                texts = values.gather(used).fill_null("").to_list()
                known = known.extended([text for text in texts if text])
            if max(len(used), len(known)) > limit:
                raise too_many_values(part.source, table, name, f"{max(len(used), len(known)):,}")
            rows = np.full(len(values), -1, np.int32)
            rows[used.to_numpy()] = known.rows(texts)  # -1 for "", which is missing
            rows_of_parts.append(rows)
        rows_of_parts.append(np.array([-1], np.int32))
        return cls(offsets, np.concatenate(rows_of_parts).astype(code_type(len(known)))), known

    def of_part(self, name: str, part: Part) -> pl.Expr:
        """The codes of the rows of a part, and the last one where they have no value."""
        last = len(self.row_of_code) - 1
        codes = (pl.col(f"category:{name}") + self.offsets[part.file]).fill_null(last)
        # A narrow column is joined and sorted faster.
        return codes.cast(pl.UInt8 if last < 1 << 8 else pl.UInt16 if last < 1 << 16 else pl.UInt32)
