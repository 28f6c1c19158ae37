"""A request, as the model reads it. B users, S seeds, M model dim."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Int, offsets_of
from vista.counters.counter_codes import CounterCodes, ItemKeys, cells_of, decode_values
from vista.counters.counter_table import UserCounters
from vista.errors import shown
from vista.log.histories import LATEST_MS, YEAR_1971_MS, RowFeatures
from vista.model.features import EncodedRows, RowFeatureReader
from vista.model.inference import PaddedTail
from vista.model.ranking_model import RankingModel
from vista.model.vista_model import VistaModel
from vista.store.record import StoredBatch
from vista.store.record_spec import Tail

# Counters of a request's users, as of the request, and where they hold candidates.
#
# Letters: B users, E counted items of all users together, G fields, F values per key (`CounterSpec`), C candidates, n
# counted pairs of user and candidate.


@dataclass(frozen=True, slots=True)
class RequestCounters(UserCounters):
    """Counters of B users with E counted items, and where to find them."""

    cells: tuple[Int, ...]
    """int64 [E] user and key as one number, ascending, of items and of each category."""

    @classmethod
    def of(
        cls, keys: ItemKeys, stored: StoredBatch, tail: Tail, is_fresh: NDArray[np.bool_], now: Int | None
    ) -> RequestCounters:
        """The stored counters, with the fresh events of the tail added, which the records do not cover.

        Training and evaluation on raw histories advance counters by the same function
        (`vista.examples.chunks`).

        Args:
            keys: of the model.
            stored: of a store with counters; users without a record have none.
            tail: of the request, with items as model rows. Fresh events that are no longer in it are not counted.
            is_fresh: bool [T] its events that the records do not cover.
            now: int64 [B] ms, or None if unknown.
        """
        fresh = np.flatnonzero(is_fresh)
        offsets = np.searchsorted(fresh, tail.offsets)
        codes, *categories = [
            counted.advanced(now, key, tail.times[fresh], offsets)
            for counted, key in zip(stored.counters, keys.of(tail.items[fresh].astype(np.int64)), strict=True)
        ]
        return cls._made_of(codes, stored.event_count + np.diff(offsets), tuple(categories), keys)

    @classmethod
    def _made_of(
        cls, codes: CounterCodes, num_events: Int, categories: tuple[CounterCodes, ...], keys: ItemKeys
    ) -> RequestCounters:
        cells = tuple(cells_of(one.owner, one.key) for one in (codes, *categories))
        return cls(codes, num_events, categories, keys, cells)

    def select(self, users: slice | Int) -> RequestCounters:
        """Counters of some of the users, or of all of them in another order."""
        index = np.arange(len(self.num_events))[users]
        categories = tuple(one.select(index) for one in self.categories)
        return self._made_of(self.codes.select(index), self.num_events[index], categories, self.keys)

    def find(self, users: slice, rows: Tensor | None, columns: slice) -> tuple[Int, Int, Int]:
        """The counted items in a rectangle of users and columns: user and column within it, and place in `codes`.

        Args:
            users: some of the B users.
            rows: int64 model rows of the candidates, [C] or [B, C]; None for the rows 0 to V.
            columns: some of the candidates.

        Returns:
            int64 [n] each.
        """
        cell = self.cells[0]
        first, stop = self.codes.offsets[[users.start, users.stop]].tolist()
        if rows is None:
            key = self.codes.key[first:stop].astype(np.int64)
            found = np.flatnonzero((key >= columns.start) & (key < columns.stop))
            return (cell[first:stop][found] >> 32) - users.start, key[found] - columns.start, found + first
        row = _rectangle(rows, users, columns)
        wanted = cells_of(np.arange(users.start, users.stop)[:, None], row)
        if first == stop:
            return (np.zeros(0, np.int64),) * 3
        place = np.minimum(np.searchsorted(cell, wanted), len(cell) - 1)
        user, column = np.nonzero(cell[place] == wanted)
        return user, column, place[user, column]

    def counted_pairs(self, users: slice, rows: Tensor | None, columns: slice) -> tuple[Int, Int, NDArray[np.uint8]]:
        """The candidates in a rectangle of which the item or a category is counted: user and column within it, int64
        [n] each, and their codes uint8 [n, G * F + 1] (`of_pairs`). Arguments are those of `find`."""
        if not self.categories:
            user, column, place = self.find(users, rows, columns)
            return user, column, self._with_event_counts(self.codes.codes[place], users.start + user)
        if rows is None:
            row = np.arange(columns.start, min(columns.stop, self.keys.category.shape[1]))
        else:
            row = _rectangle(rows, users, columns)
        count = users.stop - users.start
        row = np.broadcast_to(row, (count, row.shape[-1])).ravel()
        owner = np.repeat(np.arange(users.start, users.stop), len(row) // count)
        fields = zip((self.codes, *self.categories), self.cells, self.keys.of(row), strict=True)
        codes = np.concatenate([one.at_cells(cells, cells_of(owner, key)) for one, cells, key in fields], 1)
        found = np.flatnonzero(codes[:, :: self.codes.spec.num_columns].any(1))
        user, column = np.divmod(found, len(row) // count)
        return user, column, self._with_event_counts(codes[found], owner[found])

    def of_items(self, rows: Int) -> NDArray[np.uint8]:
        """Codes uint8 [C, G * F + 1] of candidates int64 [C] for the first user (`of_pairs`)."""
        return self.of_pairs(np.zeros_like(rows), rows)

    def counts(self, rows: Int) -> NDArray[np.float32]:
        """The decoded values of candidates for the first user, float32 [C, G * F]; NaN where a field does not count
        them."""
        spec, codes = self.codes.spec, self.of_items(rows)[:, :-1]
        by_field = codes.reshape(-1, spec.num_columns)
        values = decode_values(spec, by_field).astype(np.float32)
        values[by_field[:, 0] == 0] = np.nan
        return values.reshape(codes.shape)


def _rectangle(rows: Tensor, users: slice, columns: slice) -> Int:
    """Rows of candidates, [C] or [B, C], of some users and columns: int64 [columns] or [users, columns]."""
    part: Int = (rows[columns] if rows.ndim == 1 else rows[users, columns]).cpu().numpy()
    return part


# Checks of what callers pass to the scorer: ids, candidates, and times.
#
# B users, C candidates, N ragged values.

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


# Features of requests: how a caller passes them, and what the model reads of each pair of a user and a candidate.
#
# B users, C candidates of each, or N ragged candidates of all of them.


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
        return self.rows.select(np.minimum(index, len(self.rows.entry) - 1).ravel())

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
    values, num_users = {}, len(rows.entry)
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
        if shape != (candidates[-1],) or not np.array_equal(array_of(offsets, f"request: {name}"), candidates):
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
    if isinstance(values, (Tensor, np.ndarray)):
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
    is_many = isinstance(values, (Sequence, Tensor, np.ndarray)) and not isinstance(values, (str, bytes))
    return is_many and getattr(values, "ndim", 1) > 0


@dataclass(frozen=True, slots=True)
class Request:
    """Summaries, tails, times and features of B users' requests."""

    summary: Tensor
    """float32 [B, S, M]."""
    tail: PaddedTail
    now: Int | None
    """[B] ms, or None if unknown."""
    missing: NDArray[np.bool_]
    """[B] users without a usable record, whose summary is that of an empty history."""
    generation: int = 0
    """Number of the store's generation from which the records come; 0 if there are none."""
    counters: RequestCounters | None = None
    """Of the B users; None without counters."""
    features: PairFeatures | None = None
    """Of the B requests; None if all are missing."""
    users: EncodedRows | None = None
    """Features of the B users; None if all are missing."""

    def __len__(self) -> int:
        return len(self.missing)

    def with_features(self, model: VistaModel, given: Any, candidates: int | Int | None) -> Request:
        """The same request with the features that a caller passes, of the request and of the users.

        Arguments and errors are those of `PairFeatures`. A name that both have belongs to the request.
        """
        of_request, own, users = model.request_features, model.user_features, self.users
        if isinstance(given, Mapping) and own is not None and users is not None:
            known = {} if of_request is None else of_request.values
            of_user = {name: values for name, values in given.items() if name in own.values and name not in known}
            users = of_users(own, users, of_user) if of_user else users
            given = {name: values for name, values in given.items() if name not in of_user}
        return replace(self, users=users, features=PairFeatures.of(of_request, given, len(self), candidates))

    def select(self, users: slice | Int) -> Request:
        """Some of the users, or all of them in another order."""
        now = None if self.now is None else self.now[users]
        counters = None if self.counters is None else self.counters.select(users)
        features = None if self.features is None else self.features.select(users)
        own = None if self.users is None else self.users.select(users)
        summary, tail, missing = self.summary[users], self.tail.select(users), self.missing[users]
        return Request(summary, tail, now, missing, self.generation, counters, features, own)
