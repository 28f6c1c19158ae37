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
from vista.model.ranking_model import UNKNOWN_ITEM

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


def request_times(now: Any, num_users: int) -> Int | None:
    """int64 [B] ms of one time or of [B]; None stays None."""
    if now is None:
        return None
    times = np.asarray(now.cpu() if isinstance(now, Tensor) else now)
    if times.dtype.kind not in "iu":
        raise TypeError(f"now: needs integer milliseconds, got {times.dtype}")
    if times.shape not in ((), (num_users,)):
        raise ValueError(f"now: needs one time, or one of each of {num_users} users, got shape {times.shape}")
    return np.broadcast_to(times.astype(np.int64), (num_users,))


def check_times(name: str, times: Int, newest: int) -> None:
    """Refuse what cannot be milliseconds since 1970; `newest`: the newest event of the records, in ms.

    Raises:
        ValueError: a time is negative, after 2100, or before 1971 where the records are not.
    """
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
    offsets = np.asarray(given.cpu() if isinstance(given, Tensor) else given)
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
