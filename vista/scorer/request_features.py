"""Features of requests: how a caller passes them, and what the model reads of each pair of a user and a candidate.

B users, C candidates of each, or N ragged candidates of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vista.arrays import Int, is_tensor, offsets_of
from vista.errors import shown
from vista.log.histories import RowFeatures
from vista.model.features import EncodedRows, RowFeatureReader, require_known


@dataclass(frozen=True, slots=True)
class PairFeatures:
    """Features of the requests of B users: the same for all candidates of a user, or of each candidate."""

    rows: EncodedRows
    """One row per user, or one per candidate of every user."""
    first: Int
    """int64 [B] the row of each user, or of each user's first candidate; those of its other candidates follow."""
    per_candidate: bool

    @classmethod
    def of(
        cls, reader: RowFeatureReader | None, given: Any, num_users: int, candidates: int | Int | None
    ) -> PairFeatures | None:
        """Features of B requests, as a model reads them; None for a model that reads none.

        Args:
            reader: of the model.
            given: by name: one value, [B], or in the form of the candidates, where ragged ones may also have a list per
                user; None gives none.
            num_users: B.
            candidates: C; offsets int64 [B + 1] of ragged candidates; None if the caller names no candidates.

        Raises:
            TypeError, ValueError: a name, a value, or the shape of the values is wrong.
        """
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"request: must be a mapping from names of features to values, got {shown(given)}")
        if reader is None:
            if given:
                raise ValueError("request: this model reads no features of requests; leave the argument out")
            return None
        require_known(given or (), reader.values, "request: ")  # before a value is repeated per user
        of_users: dict[str, Sequence[Any]] = {}
        of_pairs: dict[str, Sequence[Any]] = {}
        for name, values in (given or {}).items():
            flat, per_candidate = _flat(name, values, num_users, candidates)
            (of_pairs if per_candidate else of_users)[name] = flat
        try:
            features = reader.parse(of_users, num_users)
            if not of_pairs:
                return cls(reader.encode(features, num_users), np.arange(num_users), False)
            assert candidates is not None
            offsets = np.arange(num_users + 1) * candidates if isinstance(candidates, int) else candidates
            count = int(offsets[-1])
            pairs = reader.parse(of_pairs, count).columns
            columns = dict(features.select(np.repeat(np.arange(num_users), np.diff(offsets))).columns)
            columns |= {name: pairs[name] for name in of_pairs}
            return cls(reader.encode(RowFeatures(columns), count), offsets[:-1], True)
        except ValueError as error:
            raise ValueError(f"request: {error}") from error

    def select(self, users: slice | Int) -> PairFeatures:
        """Those of some users, or of all of them in another order."""
        return replace(self, first=self.first[users])

    def of_users(self) -> EncodedRows:
        """The rows [B] of the users, which are the same for all their candidates."""
        return self.rows.select(self.first)

    def of_pairs(self, users: slice, start: int, count: int) -> EncodedRows:
        """The rows of `count` candidates of each user, from candidate `start` on; of candidates that a user does not
        have, any rows."""
        index = self.first[users][:, None] + np.arange(start, start + count)
        return self.rows.select(np.minimum(index, len(self.rows) - 1).ravel())

    def of_candidates(self, candidates: Int) -> PairFeatures:
        """Those of one user, for some of its candidates, or all of them in another order."""
        return replace(self, rows=self.rows.select(candidates)) if self.per_candidate else self


def of_users(reader: RowFeatureReader, rows: EncodedRows, given: Mapping[str, Any]) -> EncodedRows:
    """Features of B users, with the values that a caller passes in place of those of their records.

    Args:
        rows: of the records.
        given: by name: one value, or [B].

    Raises:
        TypeError, ValueError: a value, or the shape of the values is wrong.
    """
    values, num_users = {}, len(rows)
    for name, column in given.items():
        shape, flat = _shaped(name, column)
        if shape not in ((), (num_users,)):
            raise ValueError(
                f"request: {shown(name)} has shape {list(shape)}, but must be one value, or [{num_users}] (one per "
                "user), because it is a feature of users"
            )
        values[name] = flat if shape else [*flat] * num_users
    try:
        return reader.with_values(rows, values)
    except ValueError as error:
        raise ValueError(f"request: {error}") from error


def _flat(name: Any, values: Any, num_users: int, candidates: int | Int | None) -> tuple[Sequence[Any], bool]:
    """Values of one feature, and whether they are one per candidate instead of one per user."""
    if isinstance(candidates, np.ndarray) and _is_ragged(values):
        values, offsets = values if isinstance(values, tuple) else _joined(values)
        shape, flat = _shaped(name, values)
        own_shape, own_offsets = _shaped(name, offsets)
        if shape != (candidates[-1],) or own_shape != candidates.shape or list(own_offsets) != candidates.tolist():
            raise ValueError(
                f"request: {shown(name)} must have as many values as the candidates, {candidates[-1]}, and the same "
                f"number per user, got values of shape {list(shape)}"
            )
        return flat, True
    shape, flat = _shaped(name, values)
    if shape == ():
        return [*flat] * num_users, False
    if shape == (num_users,):
        return flat, False
    if isinstance(candidates, int) and shape == (num_users, candidates):
        return flat, True
    if candidates is None:
        expected = f"one value, or [{num_users}] (one per user); for one value per candidate, pass candidates"
    elif isinstance(candidates, int):
        expected = f"one value, [{num_users}] (one per user), or [{num_users}, {candidates}] (one per candidate)"
    else:
        ragged = f"(values [{candidates[-1]}], offsets [{num_users + 1}])"
        lists = f"{ragged}, or a list per user, as the candidates"
        expected = f"one value, [{num_users}] (one per user), or {lists} (one per candidate)"
    raise ValueError(f"request: {shown(name)} has shape {list(shape)}, but must be {expected}")


def _shaped(name: Any, values: Any) -> tuple[tuple[int, ...], Sequence[Any]]:
    """Shape of the values of one feature, and the values in a row."""
    values = _array(values)
    if np.isscalar(values) or values is None:
        return (), [values]
    if is_tensor(values) or isinstance(values, np.ndarray):
        shape, values = tuple(values.shape), values.reshape(-1).tolist()
    elif isinstance(values, Sequence):
        shape = (len(values),)
    else:
        raise TypeError(
            f"request: {shown(name)} must be one value, one per user, or one per candidate, got {shown(values)}"
        )
    if len(shape) == 1 and len(values) and all(map(_is_row, values)):
        flat, offsets = _joined(values)
        lengths = np.diff(offsets)
        if (lengths != lengths[0]).any():
            raise ValueError(f"request: {shown(name)}: the rows differ in length")
        return (len(lengths), int(lengths[0])), flat
    return shape, values


def _is_ragged(values: Any) -> bool:
    """Whether values are given per user and candidate: as (values, offsets), or as a list per user."""
    if isinstance(values, tuple):
        return len(values) == 2 and _is_row(values[1])
    return isinstance(values, list) and len(values) > 0 and all(map(_is_row, values))


def _joined(rows: Sequence[Any]) -> tuple[list[Any], Int]:
    """Values of all rows, and offsets [rows + 1]."""
    lists = [row if isinstance(row, Sequence) else row.tolist() for row in map(_array, rows)]
    return [value for row in lists for value in row], offsets_of(np.array([len(row) for row in lists], np.int64))


def _array(values: Any) -> Any:
    """Columns of pandas and Polars as arrays; anything else as it is."""
    return values.to_numpy() if hasattr(values, "to_numpy") else values


def _is_row(values: Any) -> bool:
    """Whether a value is several values."""
    values = _array(values)
    is_many = is_tensor(values) or isinstance(values, (Sequence, np.ndarray))
    is_many &= not isinstance(values, (str, bytes))
    return is_many and getattr(values, "ndim", 1) > 0
