"""The filter of events between parsing and packing: by action, and by the numbers of events of items and users.

It works out of core: each pass over the parts counts one kind of ids, and memory holds the ids that are left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from typing import TYPE_CHECKING

from vista.config import EventFilterConfig
from vista.errors import ConfigError, DataError, shown
from vista.installation import require_module
from vista.log.ingest.parts import Part
from vista.log.ingest.row_rules import PROBLEM

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

Kept = Mapping[str, pl.DataFrame]
"""By "item" and "user": the ids that are left, in a column of that name; no entry if all are."""


def filtered(parts: Mapping[str, Sequence[Part]], chosen: EventFilterConfig) -> tuple[dict[str, list[Part]], str]:
    """Leave out the events that a filter does not choose, and the impressions of items and users without events.

    The items and users that are left are those of the largest set of events in which each of them has enough. It does
    not depend on the order in which items and users are left out.

    Args:
        parts: by table. The files of events and impressions are written again next to the old ones, which are removed.

    Returns:
        The parts with the rows that are left, and a line for the report; the same parts and "" for a filter that keeps
        everything.

    Raises:
        ConfigError: if actions are named, but the events have none.
        DataError: if no event has a named action, or none is left.
    """
    if "events" not in parts or not (chosen.actions or chosen.counts):
        return {table: list(of_table) for table, of_table in parts.items()}, ""
    events = parts["events"]
    _check_actions(events, chosen.actions)
    kept = _largest_set(events, chosen)
    new = {table: list(of_table) for table, of_table in parts.items()}
    new["events"] = [_rewritten(part, _rows(part, chosen.actions, kept)) for part in events]
    if not any(part.num_rows for part in new["events"]):
        raise DataError(f"{events[0].source.path}: the filter leaves no event; lower filter.min_*")
    tables = ["events"]
    if chosen.counts and "impressions" in parts:
        new["impressions"] = [_rewritten(part, _rows(part, (), kept)) for part in parts["impressions"]]
        tables.append("impressions")
    counts = [f"{_total(new[table]):,} of {_total(parts[table]):,} {table}" for table in tables]
    if "impressions" in new and not _total(new["impressions"]):
        del new["impressions"]
    return new, f"the filter kept {' and '.join(counts)}"


def _check_actions(events: Sequence[Part], wanted: Sequence[str]) -> None:
    if not wanted:
        return
    source = events[0].source
    if "action" not in source.columns:
        raise ConfigError(
            f"filter.actions: the events of {source.path} have no actions; name their column with events.action=..., "
            "or leave this out"
        )
    names = pl.concat([part.good().select("action") for part in events]).unique()
    found = set(names.collect(engine="streaming")["action"].to_list())
    for name in wanted:
        if name not in found:
            raise DataError(
                f"{source.path}: no event has the action {shown(name)} of filter.actions; name some of its actions: "
                f"{', '.join(sorted(found))}"
            )


def _largest_set(events: Sequence[Part], chosen: EventFilterConfig) -> Kept:
    """The items and users that are left: each pass leaves out those with too few events, until all have enough."""
    least = {"item": chosen.min_item_events, "user": chosen.min_user_events}
    counted = [column for column in least if least[column] > 1]
    kept: dict[str, pl.DataFrame] = {}
    for column in cycle(counted):
        rows = pl.concat([_rows(part, chosen.actions, kept).select("user", "item") for part in events])
        enough = rows.group_by(column).len().filter(pl.col("len") >= least[column]).select(column)
        left = enough.collect(engine="streaming")
        is_stable = column in kept and len(left) == len(kept[column])
        kept[column] = left
        if is_stable or len(counted) == 1:
            break
    return kept


def _rows(part: Part, actions: Iterable[str], kept: Kept) -> pl.LazyFrame:
    """The good rows of a part with these actions, items, and users."""
    rows = part.good()
    if names := list(actions):
        rows = rows.filter(pl.col("action").is_in(names))
    for column, ids in kept.items():
        rows = rows.join(ids.lazy(), on=column, how="semi")
    return rows


def _rewritten(part: Part, rows: pl.LazyFrame) -> Part:
    """The part with only these of its good rows."""
    file = part.file.with_name(f"{part.file.stem}-kept.arrow")
    rows.with_columns(pl.lit(0, pl.UInt16).alias(PROBLEM)).sink_ipc(file, maintain_order=False)
    part.file.unlink()
    num_rows = pl.scan_ipc(file).select(pl.len()).collect(engine="streaming").item()
    return replace(part, file=file, num_rows=num_rows, is_filtered=True)


def _total(parts: Sequence[Part]) -> int:
    return sum(part.num_rows for part in parts)
