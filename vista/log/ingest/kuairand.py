"""The log of KuaiRand: every row is a video that was shown, with what the user did."""

from __future__ import annotations

from pathlib import Path

from vista.log.ingest.column_names import check_columns
from vista.log.ingest.public_sets import PUBLIC_SETS, remedy_of_kind
from vista.log.ingest.scanned_source import EXTRA, ROW
from vista.log.ingest.text_files import read_header, scan_text
from vista.log.polars_extra import pl

KUAIRAND = "kuairand"
ACTIONS = ("follow", "forward", "comment", "like", "long_view", "click")
"""The action of an event is the first of these whose flag is set, or else VIEW."""
VIEW = "view"
_FLAGS = {f"is_{action}" if action != "long_view" else action: action for action in ACTIONS}


def kuairand_events(file: Path) -> tuple[pl.LazyFrame, dict[str, str]]:
    """The rows that are events: those with a play time, and without the flag `is_hate`.

    Returns:
        (canonical frame, names of the columns in the file).

    Raises:
        DataError: if the file lacks a column.
    """
    given = PUBLIC_SETS[KUAIRAND].event_columns(file.name)
    columns = {name: given[name] for name in ("user", "item", "timestamp")}
    canonical = {own: name for name, own in columns.items()}
    canonical |= {name: name for name in (*_FLAGS, "play_time_ms", "is_hate")}
    header = read_header(file, ",", '"')
    check_columns(str(file), {name: own for own, name in canonical.items()}, header, "events", remedy_of_kind(KUAIRAND))
    rows = scan_text(file, [canonical.get(name, "") for name in header], ",", '"', 1)
    is_event = pl.col("play_time_ms").ne_missing("0") & pl.col("is_hate").ne_missing("1")
    # A row without flags gets no action, so that a short or blank line does not become an event.
    flagged = [pl.when(pl.col(flag) == "1").then(pl.lit(action)) for flag, action in _FLAGS.items()]
    action = pl.coalesce(*flagged, pl.when(pl.col("is_click").is_not_null()).then(pl.lit(VIEW)))
    frame = rows.filter(is_event).select(ROW, *columns, action.alias("action"), EXTRA)
    return frame, columns | {"action": "is_click"}
