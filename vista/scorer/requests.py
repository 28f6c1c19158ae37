"""What callers of the scorer pass, checked: ids, candidates and times.

Letters: B users, C candidates, N ragged values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vista.data.gaps import LATEST_MS, YEAR_1971_MS
from vista.model.ranking_model import UNKNOWN_ITEM, RankingModel
from vista.store.batches import StoredBatch

Int = NDArray[np.int64]


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


def check_times(model: RankingModel, name: str, times: Int, stored: StoredBatch) -> None:
    """Refuse what cannot be milliseconds since 1970, where the model's log has times.

    Raises:
        ValueError: a time is negative, after 2100, or before 1971 where the stored events are not.
    """
    if not model.schema.has_time:
        return
    newest = int(stored.last_event_ts.max(initial=0))
    bad = times[(times < (YEAR_1971_MS if newest >= YEAR_1971_MS else 0)) | (times >= LATEST_MS)]
    if len(bad):
        raise ValueError(f"{name}: {bad[0]} is no time in milliseconds since 1970, as this model's log has them")


def split_ragged(candidates: Any) -> tuple[Any, Any]:
    """(values, offsets) of ragged candidates; (candidates, None) of others, a tuple of two ids among them."""
    if isinstance(candidates, tuple) and len(candidates) == 2 and not any(map(np.isscalar, candidates)):
        return candidates
    return candidates, None


def pad_ragged(values: Int, given: Any, num_users: int) -> tuple[Int, NDArray[np.bool_]]:
    """Ragged rows as a grid [B, longest] and which of its cells are filled."""
    offsets = array_of(given, "candidates: offsets")
    if values.ndim != 1 or offsets.shape != (num_users + 1,) or offsets.dtype.kind not in "iu":
        raise ValueError(
            f"candidates: ragged values [N] need integer offsets [{num_users + 1}], got shape {values.shape} and "
            f"{offsets.dtype} {offsets.shape}"
        )
    counts = np.diff(offsets.astype(np.int64))
    if offsets[0] != 0 or offsets[-1] != len(values) or (counts < 0).any():
        raise ValueError(f"candidates: offsets must rise from 0 to {len(values)}, got {offsets[0]} … {offsets[-1]}")
    filled = np.arange(counts.max(initial=0)) < counts[:, None]
    grid = np.full(filled.shape, UNKNOWN_ITEM, np.int64)
    grid[filled] = values
    return grid, filled
