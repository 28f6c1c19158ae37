"""The check that all records of a batch pass, and how its error names the user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.errors import RecordError, UserKeyError
from vista.store.format.keys import user_id


def check_field(ok: NDArray[np.bool_], keys: Sequence[bytes], actual: Any, field: str, expected: Any) -> None:
    """Refuse a batch of B records if a field of one of them is wrong.

    Args:
        ok: [B] whether each record's field is right.
        keys: B user keys.
        actual: [B] what each record holds.
        field: its name in the error.
        expected: [B], or one value for all.

    Raises:
        RecordError: not all are right; the message names the first user and the field.
    """
    if ok.all():
        return
    index = int(np.flatnonzero(~ok)[0])
    if isinstance(expected, np.ndarray):
        expected = expected[index]
    raise RecordError(
        f"the record of {user_of(keys[index])} is corrupt or of another format: {field} is {actual[index]}, expected "
        f"{expected}. Refresh the store again, or publish the previous generation (`vista store rollback`)"
    )


def user_of(key: bytes) -> str:
    """How an error names the user of a key, which may be damaged."""
    try:
        return f"user {user_id(key)!r}"
    except UserKeyError:
        return f"key {key!r}"
