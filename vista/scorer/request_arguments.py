"""Checks of what callers pass to the scorer: ids, candidates, and times.

B users, C candidates, N ragged values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Int
from vista.log.histories import LATEST_MS, YEAR_1971_MS
from vista.model.ranking_model import RankingModel

UNITS = {"seconds": 1e3, "microseconds": 1e-3, "nanoseconds": 1e-6}
"""Factors to milliseconds."""
MAX_IDS = 1 << 24
"""Most users, and most candidates, per call."""
MAX_SCORES = 1 << 28
"""Most pairs of a user and a candidate per call; their scores take 1 GiB per task."""
MAX_TAIL_EVENTS = 1 << 20
"""Most events in the tail of a call. Merging them takes up to 200 MB."""


def require_most(count: int, most: int, name: str, unit: str = "ids") -> None:
    """Raise a ValueError if an argument is too long."""
    if count > most:
        raise ValueError(f"{name}: {count:,} {unit}, but at most {most:,} per call; make several calls")


def require_max_age(max_age_s: Any) -> None:
    """Raise a TypeError or ValueError unless this is a positive number of seconds, or None."""
    if max_age_s is not None and not isinstance(max_age_s, (int, float)):
        raise TypeError(f"max_age_s: must be a number of seconds, got {max_age_s!r}")
    if max_age_s is not None and not 0 < max_age_s < math.inf:
        raise ValueError(f"max_age_s: must be positive and finite, got {max_age_s}; use None for no limit")


def length_of(values: Any) -> int:
    """Length of an argument before it is converted; 0 if it has none, which leaves its check to the conversion."""
    if not hasattr(values, "__len__") or getattr(values, "ndim", 1) == 0:
        return 0
    return len(values)


def ids_of(values: Any, name: str) -> Any:
    """Ids in the form that the store and the vocabulary accept: a sequence or an array."""
    require_most(length_of(values), MAX_IDS, name)
    if isinstance(values, Tensor):
        return values.cpu().numpy()
    if hasattr(values, "to_numpy"):  # a column of pandas or Polars
        return values.to_numpy()
    if not isinstance(values, (Sequence, np.ndarray)) or isinstance(values, (str, bytes)):
        raise TypeError(f"{name}: must be a list or an array of ids, got {values!r}")
    return values


def array_of(values: Any, name: str) -> NDArray[Any]:
    """Convert an argument to an array; a ValueError names it if its rows differ in length."""
    try:
        return np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    except ValueError:
        raise ValueError(f"{name}: the rows differ in length") from None


def id_array(values: Any, name: str) -> NDArray[Any]:
    """Convert ids to an array, whose texts and integers stay apart: NumPy alone would turn [1, "a"] into texts."""
    array = array_of(values, name)
    if array.dtype.kind == "U" and not isinstance(values, np.ndarray):
        array = np.array(values, object)
    return array


def integers(values: Any, name: str, what: str = "integers") -> Int:
    """Convert an argument of any shape to int64; an empty one may have any type.

    Raises:
        TypeError: it holds values other than integers; `what` says what it must hold.
        ValueError: a value does not fit int64.
    """
    array = array_of(values, name)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name}: must hold {what}, got {array.dtype}")
    if array.dtype == np.uint64 and array.size and int(array.max()) >= 1 << 63:
        raise ValueError(f"{name}: {array.max()} does not fit int64")
    return array.astype(np.int64)


def item_rows(model: RankingModel, ids: Any, name: str) -> Int:
    """Model rows int64 [N] of raw ids.

    Raises:
        TypeError: the ids are not of the vocabulary's type; the message names the argument.
    """
    try:
        return model.item_rows(ids)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None


def request_times(now: Any, num_users: int) -> Int | None:
    """Times of a request in ms, int64 [B], from one time or [B]; None stays None."""
    if now is None:
        return None
    times = integers(now, "now", "integer milliseconds")
    if times.shape not in ((), (num_users,)):
        raise ValueError(f"now: must be one time, or one for each of {num_users} users, got shape {times.shape}")
    return np.broadcast_to(times, (num_users,))


def impossible_times(times: Int, newest: Int) -> NDArray[np.bool_]:
    """Which times cannot be Unix times in milliseconds, bool [N].

    They are negative, after 2100, or before 1971 although the user's stored events are later.

    Args:
        times: int64 [N].
        newest: int64 [N] times of the newest stored events of the same users.
    """
    return (times < np.where(newest >= YEAR_1971_MS, YEAR_1971_MS, 0)) | (times >= LATEST_MS)


def not_a_time(name: str, time: int) -> ValueError:
    """The error for an impossible time."""
    unit = next((unit for unit, factor in UNITS.items() if YEAR_1971_MS <= time * factor < LATEST_MS), None)
    hint = "" if unit is None else f"; it looks like {unit}"
    return ValueError(f"{name}: {time} is not a Unix time in milliseconds, which this model needs{hint}")


def split_ragged(candidates: Any) -> tuple[Any, Any]:
    """(values, offsets) of ragged candidates; (candidates, None) of others, including a tuple of two ids."""
    if isinstance(candidates, tuple) and len(candidates) == 2 and not any(map(np.isscalar, candidates)):
        return candidates
    return candidates, None


def ragged_offsets(values: Int, given: Any, num_users: int) -> Int:
    """Check the offsets of ragged candidates against their values [N]; returns them as int64 [B+1]."""
    offsets = array_of(given, "candidates: offsets")
    if values.ndim != 1 or offsets.shape != (num_users + 1,) or offsets.dtype.kind not in "iu":
        raise ValueError(
            f"candidates: must be values [N] and integer offsets [{num_users + 1}], got values of shape {values.shape} "
            f"and {offsets.dtype} offsets of shape {offsets.shape}"
        )
    offsets = offsets.astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
        raise ValueError(f"candidates: offsets must rise from 0 to {len(values)}, got {offsets[0]} to {offsets[-1]}")
    return offsets
