"""What callers of the scorer pass, checked: ids, candidates and times.

Letters: B users, C candidates, N ragged values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vista.log.gaps import LATEST_MS, YEAR_1971_MS
from vista.model.ranking_model import RankingModel

Int = NDArray[np.int64]
UNITS = {"seconds": 1e3, "microseconds": 1e-3, "nanoseconds": 1e-6}
"""To milliseconds."""


def ids_of(values: Any, name: str) -> Any:
    """Ids as the store and the vocabulary take them: a sequence or an array."""
    if isinstance(values, Tensor):
        return values.cpu().numpy()
    if hasattr(values, "to_numpy"):  # a column of pandas or Polars
        return values.to_numpy()
    if not isinstance(values, (Sequence, np.ndarray)) or isinstance(values, (str, bytes)):
        raise TypeError(f"{name}: needs a list or an array of ids, got {values!r}")
    return values


def array_of(values: Any, name: str) -> NDArray[Any]:
    """An argument as an array; ValueError naming it where its rows differ in length."""
    try:
        return np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    except ValueError:
        raise ValueError(f"{name}: rows of different lengths make no array") from None


def integers(values: Any, name: str, what: str = "integers") -> Int:
    """An argument as int64 of any shape; of an empty one the type does not count.

    Raises:
        TypeError: it holds other values than integers; `what` says which are needed.
        ValueError: one is beyond int64.
    """
    array = array_of(values, name)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name}: needs {what}, got {array.dtype}")
    if array.dtype == np.uint64 and array.size and int(array.max()) >= 1 << 63:
        raise ValueError(f"{name}: {array.max()} is beyond int64")
    return array.astype(np.int64)


def item_rows(model: RankingModel, ids: Any, name: str) -> Int:
    """Model rows int64 [N] of raw ids.

    Raises:
        TypeError: naming the argument, where ids are not of the vocabulary's kind.
    """
    try:
        return model.item_rows(ids)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None


def request_times(now: Any, num_users: int) -> Int | None:
    """int64 [B] ms of one time or of [B]; None stays None."""
    if now is None:
        return None
    times = integers(now, "now", "integer milliseconds")
    if times.shape not in ((), (num_users,)):
        raise ValueError(f"now: needs one time, or one of each of {num_users} users, got shape {times.shape}")
    return np.broadcast_to(times, (num_users,))


def impossible_times(times: Int, newest: Int) -> NDArray[np.bool_]:
    """Which times cannot be milliseconds since 1970: negative, after 2100, or before 1971 where the user's own stored
    events are not.

    Args:
        times, newest: int64 [N]; `newest` of the same user's stored events.
    """
    return (times < np.where(newest >= YEAR_1971_MS, YEAR_1971_MS, 0)) | (times >= LATEST_MS)


def no_time(name: str, time: int) -> ValueError:
    """The error for an impossible time."""
    unit = next((unit for unit, factor in UNITS.items() if YEAR_1971_MS <= time * factor < LATEST_MS), None)
    hint = "" if unit is None else f"; it looks like {unit}"
    return ValueError(f"{name}: {time} is no time in milliseconds since 1970, as this model's log has them{hint}")


def split_ragged(candidates: Any) -> tuple[Any, Any]:
    """(values, offsets) of ragged candidates; (candidates, None) of others, a tuple of two ids among them."""
    if isinstance(candidates, tuple) and len(candidates) == 2 and not any(map(np.isscalar, candidates)):
        return candidates
    return candidates, None


def ragged_offsets(values: Int, given: Any, num_users: int) -> Int:
    """Offsets int64 [B+1] of ragged candidates, checked against their values [N]."""
    offsets = array_of(given, "candidates: offsets")
    if values.ndim != 1 or offsets.shape != (num_users + 1,) or offsets.dtype.kind not in "iu":
        raise ValueError(
            f"candidates: ragged values [N] need integer offsets [{num_users + 1}], got shape {values.shape} and "
            f"{offsets.dtype} {offsets.shape}"
        )
    offsets = offsets.astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
        raise ValueError(f"candidates: offsets must rise from 0 to {len(values)}, got {offsets[0]} … {offsets[-1]}")
    return offsets
