"""The features of the user of a record, in columns (docs/reference/file-formats.md). B users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.store.format.field_checks import check_field
from vista.store.format.joined_records import JoinedRecords
from vista.store.format.user_column import UserColumn


def encode_users(features: Mapping[str, Any], columns: Sequence[UserColumn], num_users: int) -> NDArray[np.uint8]:
    """The section of each of B users, [B, bytes].

    Args:
        features: by name, [B] codes or numbers, as in `UserSummaries.features`.
        columns: of the generation.
        num_users: B.

    Raises:
        ValueError: the features are of other columns, or of another number of users.
    """
    names = [column.name for column in columns]
    if sorted(features) != sorted(names) or any(len(values) != num_users for values in features.values()):
        raise ValueError(f"features of users: expected {names} of {num_users} users, got {list(features)}")
    parts = [
        column.stored(features[column.name]).view(np.uint8).reshape(num_users, column.dtype.itemsize)
        for column in columns
    ]
    return np.concatenate([np.zeros((num_users, 0), np.uint8), *parts], axis=1)


def read_users(
    records: JoinedRecords, first: int, columns: Sequence[UserColumn], keys: Sequence[bytes]
) -> dict[str, NDArray[Any]]:
    """The features of B records whose lengths were checked; int32 codes, -1 for a missing one, or float32 numbers [B].

    Args:
        records: B records.
        first: place of the section in each record.
        columns: of the generation.
        keys: the B users' keys, for errors.

    Raises:
        RecordError: a category has a value that the generation does not know, or a number is infinite; the message
            names the user.
    """
    features = {}
    for column in columns:
        last = first + column.dtype.itemsize
        stored = np.ascontiguousarray(records.cut(first, last)).reshape(-1).view(column.dtype)
        name = f"feature {column.name!r} of the user"
        if column.size is None:
            check_field(~np.isinf(stored), keys, stored, name, "a finite number")
        else:
            check_field(stored <= column.size, keys, stored, name, f"at most {column.size}")
        features[column.name] = column.read(stored)
        first = last
    return features
