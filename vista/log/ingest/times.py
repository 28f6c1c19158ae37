"""Times that are text: in ISO 8601, or in a strptime format, which the values of a whole column can tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from vista.errors import ConfigError, shell_word, shown
from vista.installation import require_module
from vista.log.histories import LATEST_MS
from vista.log.ingest.source_files import ROW
from vista.log.ingest.sources import FileSource, ScannedSource, Source, collected

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

_ISO_FORMATS = ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d", "%Y-%m-%dT%H:%M")
_SWAPPED = {"%d/%m/%Y": "%m/%d/%Y", "%d-%m-%Y": "%m-%d-%Y", "%d/%m/%y": "%m/%d/%y"}
"""Dates with the day first, and the same with the month first."""
_DATES = (*_SWAPPED, *_SWAPPED.values(), "%d.%m.%Y", "%Y/%m/%d", "%d %b %Y", "%d-%b-%Y", "%b %d, %Y", "%Y%m%d")
_CLOCKS = ("%H:%M", "%H:%M:%S", "%H:%M:%S%.f", "%I:%M %p", "%I:%M:%S %p")
FORMS = ("iso", *(date + clock for date in _DATES for clock in ("", *(f"{s} {c}" for c in _CLOCKS for s in ("", ",")))))
"""What a column of times is tried as, simpler formats first."""
_SAMPLE = 1_000
"""First values that a form must fit once to be tried on all."""


def ms_of_text(text: pl.Expr, form: str) -> pl.Expr:
    """Times as int64 milliseconds since 1970, null where the text is not in the form. `form`: "iso", or a strptime
    format. Times are UTC unless they have an offset (%z)."""
    if form == "iso":
        text = text.str.replace(" ", "T", literal=True)
        zoned = text.str.to_datetime("%+", strict=False, time_unit="ms", time_zone="UTC").dt.timestamp("ms")
        naive = (text.str.to_datetime(f, strict=False, time_unit="ms").dt.timestamp("ms") for f in _ISO_FORMATS)
        return pl.coalesce(*naive, zoned)
    zone = "UTC" if "z" in form else None
    return text.str.to_datetime(form, strict=False, time_unit="ms", time_zone=zone).dt.timestamp("ms")


def fits(text: pl.Expr, form: str) -> pl.Expr:
    """Whether each text is a time from 1970 to 2100 in the form."""
    return ms_of_text(text, form).is_between(0, LATEST_MS, closed="left").fill_null(False)


def swapped(form: str) -> str | None:
    """The format with day and month the other way round; None without a common one."""
    for day_first, month_first in _SWAPPED.items():
        for date, other in ((day_first, month_first), (month_first, day_first)):
            if form.startswith(date):
                return other + form.removeprefix(date)
    return None


class FormCount(NamedTuple):
    """How many values of a column are in a form, with the first one that is not also in the `swapped` form. row: its
    1-based row; 0 if there is none, and value is then the column's first one in this form."""

    form: str
    num_rows: int
    row: int
    value: str


def count_forms(source: ScannedSource) -> list[FormCount] | None:
    """The forms that the column of times is in; None if it is not text. Raises DataError if the file cannot be read."""
    if source.frame.collect_schema()["timestamp"] != pl.String:
        return None
    text = pl.col("timestamp")
    sample = collected(source, source.frame.select(text).drop_nulls().head(_SAMPLE))
    met = sample.select(fits(text, form).any().alias(form) for form in FORMS)
    forms = [form for form in FORMS if met[form][0]]
    rows = pl.col(ROW)
    statistics = list[pl.Expr]()
    for form in forms:
        is_in, other = fits(text, form), swapped(form)
        own = is_in if other is None else is_in & fits(text, other).not_()
        of_form = (is_in.sum(), rows.filter(own).min(), rows.filter(is_in).min())
        statistics += [expression.alias(f"{len(statistics)} {place}") for place, expression in enumerate(of_form)]
    if not forms:
        return []
    found = collected(source, source.frame.select(statistics)).row(0)
    by_form = [(form, *found[3 * place : 3 * place + 3]) for place, form in enumerate(forms)]
    shows = [row or first for _, _, row, first in by_form]
    values = dict(collected(source, source.frame.filter(rows.is_in(shows)).select(rows, text)).rows())
    return [FormCount(form, count, row or 0, values[row or first]) for form, count, row, first in by_form]


@dataclass(frozen=True, slots=True)
class InferredForm:
    """The form of a column of times, and in words why; `why` is empty if no other form fits any value."""

    form: str
    why: str = ""


def infer_form(sources: Sequence[Source], table: str) -> InferredForm | None:
    """The form that the times of a table's files have: the one of the most values.

    Day and month are told apart by all values together, because 01/02/2017 can be both, and 25/02/2017 cannot.

    Returns:
        None if the column is not text, or no known form fits.

    Raises:
        ConfigError: if day and month can be either, or some values have the day first and others the month.
        DataError: if a file cannot be read.
    """
    total: dict[str, int] = {}
    example: dict[str, tuple[str, FormCount]] = {}
    for source in sources:
        if (counts := _counts_of(source, table)) is None:
            return None
        for count in counts:
            total[count.form] = total.get(count.form, 0) + count.num_rows
            if count.form not in example or (count.row and not example[count.form][1].row):
                example[count.form] = source.path, count
    if not total:
        return None
    form = max(total, key=lambda form: (total[form], -FORMS.index(form)))
    other, column = swapped(form), sources[0].columns["timestamp"]
    (path, shows), key = example[form], f"{table}.time_format"
    if other is None:
        return InferredForm(form)
    words = " or ".join(shell_word(key, one) for one in sorted((form, other)))
    if not shows.row:
        raise ConfigError(
            f"{key}: column {column!r} of {path} has times such as {shown(shows.value)}, and no row tells whether the "
            f"day or the month comes first; set {words}"
        )
    if other in example and example[other][1].row:
        other_path, denies = example[other]
        raise ConfigError(
            f"{key}: column {column!r} has the {_first_of(form)} first in row {shows.row} of {path} "
            f"({shown(shows.value)}), but the {_first_of(other)} in row {denies.row} of {other_path} "
            f"({shown(denies.value)}); set {words}, and on_bad_rows=quarantine to set the other rows aside"
        )
    why = (
        f"column {column!r} is read with the {_first_of(form)} first, because row {shows.row} of {path} is "
        f"{shown(shows.value)}; {shell_word(key, form)} confirms it"
    )
    return InferredForm(form, why)


def _first_of(form: str) -> str:
    return "day" if form.startswith("%d") else "month"


def _counts_of(source: Source, table: str) -> list[FormCount] | None:
    """`count_forms` of a source; a file is read by its parser."""
    if isinstance(source, FileSource):
        counts, _ = source.parser.call("count_forms", source.path, table=table)
        return None if counts is None else [FormCount(*count) for count in counts]
    assert isinstance(source, ScannedSource)
    return count_forms(source)
