"""The columns of a segment, made from sorted rows: action codes, ordinals, labels, and masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vista.errors import DataError
from vista.installation import require_module
from vista.log.ingest.distinct_ids import ITEM_ROW, USER_ROW
from vista.log.ingest.parts import Part
from vista.log.ingest.sources import Source
from vista.log.segment_files import EVENT_COLUMNS, IMPRESSION_COLUMNS

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

NO_ACTION = "event"
"""Name of the action if the source has none."""
MAX_ACTIONS = 256


@dataclass(frozen=True, slots=True)
class TableColumns:
    """The columns of a packed table, and how they are made.

    types: name to (dtype, shape of one row), as TableWriter takes them; of_block: from a sorted block of parsed rows to
    these columns.
    """

    types: Mapping[str, tuple[DTypeLike, tuple[int, ...]]]
    of_block: Callable[[pl.DataFrame], Mapping[str, NDArray[Any]]]


def actions_of(parts: Sequence[Part], known: Sequence[str]) -> list[str]:
    """Action names by code: the known names, then new ones in sorted order."""
    used = {NO_ACTION}
    if "action" in parts[0].source.columns:
        names = pl.concat([part.good().select("action") for part in parts])
        used = set(names.unique().head(100 * MAX_ACTIONS).collect(engine="streaming")["action"].to_list())
    actions = [*known, *sorted(used - set(known))]
    if len(actions) > MAX_ACTIONS:
        column = parts[0].source.columns["action"]
        raise DataError(
            f"{parts[0].source.path}: with column {column!r} the log would have {len(actions)} actions, but at most "
            f"{MAX_ACTIONS} are possible; check that it is the right column, or merge rare actions"
        )
    return actions


def time_range(parts: Sequence[Part]) -> tuple[int | None, int | None]:
    """Oldest and newest timestamp (ms) of the parts; (None, None) without times."""
    if "timestamp" not in parts[0].source.columns:
        return None, None
    times = pl.concat([part.good().select("timestamp") for part in parts])
    low, high = times.select(low=pl.col("timestamp").min(), high=pl.col("timestamp").max()).collect().row(0)
    return low, high


def event_columns(
    source: Source, actions: Sequence[str], next_ordinals: Callable[[], NDArray[np.int64]]
) -> TableColumns:
    """Columns of the events.

    Args:
        source: one of the table's sources; all have the same columns.
        actions: names by code.
        next_ordinals: returns int64 [old users], the first ordinal of each one's new events; called only if the source
            has no times.
    """
    ordinals = np.empty(0, np.int64) if "timestamp" in source.columns else next_ordinals()
    names = [name for name in EVENT_COLUMNS if name != "rating" or "rating" in source.columns]
    code = {name: number for number, name in enumerate(actions)}

    def of_block(block: pl.DataFrame) -> Mapping[str, NDArray[Any]]:
        out: dict[str, NDArray[Any]] = {"item": block[ITEM_ROW].to_numpy()}
        out |= {name: block[name].to_numpy() for name in ("timestamp", "rating") if name in block.columns}
        if "action" in block.columns:
            out["action"] = block["action"].replace_strict(code, return_dtype=pl.UInt8).to_numpy()
        else:
            out["action"] = np.full(block.height, code[NO_ACTION], np.uint8)
        if "timestamp" not in out:
            out["timestamp"] = _ordinals(block[USER_ROW].to_numpy(), ordinals)
        return out

    return TableColumns({name: (EVENT_COLUMNS[name], ()) for name in names}, of_block)


def _ordinals(user_rows: NDArray[np.int64], following: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ordinal of each event in its user's history, which continues at `following` (0 for a new user)."""
    starts = np.flatnonzero(np.diff(user_rows, prepend=-1))
    users = user_rows[starts]
    held = np.zeros(len(users), np.int64)
    held[users < len(following)] = following[users[users < len(following)]]
    return np.arange(len(user_rows)) - np.repeat(starts - held, np.diff(starts, append=len(user_rows)))


def impression_columns(source: Source, tasks: Sequence[str]) -> TableColumns:
    """Columns of the impressions. An unknown label is 0 with mask 0; an unknown probability is NaN."""
    has_probability = any(name.startswith("probability:") for name in source.columns)
    names = [name for name in IMPRESSION_COLUMNS if name != "probability" or has_probability]

    def of_block(block: pl.DataFrame) -> Mapping[str, NDArray[Any]]:
        labels = [block[f"label:{task}"] for task in tasks]
        out = {
            "item": block[ITEM_ROW].to_numpy(),
            "timestamp": block["timestamp"].to_numpy(),
            "label": np.stack([label.fill_null(0).to_numpy() for label in labels], axis=1),
            "mask": np.stack([label.is_not_null().to_numpy() for label in labels], axis=1).astype(np.uint8),
        }
        if has_probability:
            columns = [block[f"probability:{task}"].fill_null(np.nan).to_numpy() for task in tasks]
            out["probability"] = np.stack(columns, axis=1)
        return out

    wide = ("label", "mask", "probability")
    types = {name: (IMPRESSION_COLUMNS[name], (len(tasks),) if name in wide else ()) for name in names}
    return TableColumns(types, of_block)
