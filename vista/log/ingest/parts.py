"""First half of ingest: sources become parsed and checked parts on disk; bad rows are reported or set aside.

A part is an uncompressed Arrow IPC file in the staging folder, which later stages memory-map. Sources are streamed:
memory holds only Polars' buffers, and the numbers of bad rows with their reasons.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vista.config.choices import OnBadRows
from vista.errors import DataError, shown
from vista.installation import require_module
from vista.log.feature_owner import OWNERS
from vista.log.ingest.category_encoder import CategoryEncoder, refuse_many_values
from vista.log.ingest.file_scan import EXTRA, ROW
from vista.log.ingest.row_rules import BLANK, PROBLEM, RowRule, parse
from vista.log.ingest.scanned_source import ScannedSource, unreadable
from vista.log.ingest.sources import FileSource, Source

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

ORDER = "order"
"""Column of the input order over all parts: the number of the part times 2^32, plus the row."""
QUARANTINE_COLUMNS = ("table", "file", "row", "column", "value", "reason", "record")


@dataclass(frozen=True, slots=True)
class Part:
    """A parsed source.

    file: all its rows, good and bad; num_rows: number of good rows; num_bad: number of bad rows; quarantine: CSV file
    of the bad rows, or None; values: of events and impressions, by canonical column of a category, the file of the
    values whose codes the rows have (category_encoder.py); is_filtered: whether good rows were left out of `file`.
    """

    source: Source
    file: Path
    num_rows: int
    num_bad: int
    quarantine: Path | None
    values: Mapping[str, Path] = field(default_factory=dict)
    is_filtered: bool = False

    def good(self) -> pl.LazyFrame:
        """The good rows."""
        return pl.scan_ipc(self.file).filter(pl.col(PROBLEM) == 0).drop(PROBLEM)


def read_part(
    source: Source, kinds: Mapping[str, str], table: str, folder: Path, number: int, on_bad_rows: OnBadRows
) -> Part:
    """Stream one source into `folder`; a file is read by its parser.

    Args:
        kinds: kinds of ids, "int" or "str", of "user" and "item".
        number: number of the part within its table, which orders equal times.

    Raises:
        DataError: if the file cannot be read or has no rows; with on_bad_rows=raise, for the first bad row.
    """
    if isinstance(source, FileSource):
        result, _ = source.parser.call(
            "read_part",
            source.path,
            kinds=dict(kinds),
            table=table,
            folder=str(folder.absolute()),
            number=number,
            on_bad_rows=on_bad_rows.value,
        )
        quarantine = None if result["quarantine"] is None else Path(result["quarantine"])
        values = {column: Path(file) for column, file in result["values"].items()}
        return Part(source, Path(result["file"]), result["num_rows"], result["num_bad"], quarantine, values)
    assert isinstance(source, ScannedSource)
    frame, rules = parse(source, kinds, table)
    file = folder / f"{table}-{number:06d}.arrow"
    order = (pl.lit(number, pl.Int64) * 2**32 + pl.col(ROW).cast(pl.Int64)).alias(ORDER)
    categories = [name for name in source.columns if table not in OWNERS and name.startswith("category:")]
    encoder = CategoryEncoder(categories)
    try:
        refuse_many_values(frame, categories, source, table)
        encoder.encoded(frame).with_columns(order).drop(ROW).sink_ipc(file, maintain_order=False)
        # The problem codes that occur, without reading the rows: two bytes per row.
        values = encoder.save_values(file.with_suffix(""))
        codes = pl.scan_ipc(file).group_by(PROBLEM).agg(pl.len(), pl.col(ORDER).min()).collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError) as error:
        raise unreadable(source, error) from error
    counts = {code: (count, order) for code, count, order in codes.rows()}
    num_good = counts.get(0, (0, 0))[0]
    bad = {code: entry for code, entry in counts.items() if code not in (0, BLANK)}
    num_bad = sum(count for count, _ in bad.values())
    if not num_good and not num_bad:
        raise DataError(f"{source.path}: has no rows; leave it out, or write it again")
    quarantine = None
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
        quarantine = folder / f"{table}-{number:06d}.csv"
        _set_aside(source, rules, table, pl.scan_ipc(file), quarantine)
    return Part(source, file, num_good, num_bad, quarantine, values)


def write_quarantine(parts: Sequence[Part], target: Path) -> None:
    """Join the parts' bad rows into one CSV with a header."""
    with target.open("wb") as out:
        out.write((",".join(QUARANTINE_COLUMNS) + "\n").encode())
        for part in parts:
            if part.quarantine is not None:
                with part.quarantine.open("rb") as handle:
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
    return f"{source.path}: {item_in}row {row}, {_place(source, rule)}: {given} {rule.reason}; {rule.remedy}"


def _place(source: Source, rule: RowRule) -> str:
    if rule.column == EXTRA:
        return "beyond the last column"
    return f"column {source.columns[rule.column]!r}"


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
