"""Conversion of frames in memory (pandas, or a mapping of columns) to Polars, without pyarrow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vista.errors import DataError
from vista.installation import require_module

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")


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
