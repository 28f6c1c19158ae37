"""A request, as the model reads it: records of users, merged with what the caller passes and with checked arguments.

B users, C candidates, N ragged values, S seeds, M model dim. Of counters: E counted items of all users together, G
fields, F values per key (`CounterSpec`), n counted pairs of user and candidate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Int, id_array, is_tensor, offsets_of
from vista.counters.counters import CounterCodes, cells_of, decode_values
from vista.counters.keys import ItemKeys, UserCounters, newest_items
from vista.errors import shown
from vista.examples.item_spaces import pooled_vectors, weighted
from vista.log.histories import DAY_MS, LATEST_MS, YEAR_1971_MS, RowColumn
from vista.model.features import EncodedRows
from vista.model.serving_model import PaddedTail, Readings, ServingModel
from vista.scorer.request_features import PairFeatures, of_users
from vista.store.reader import StoredBatch
from vista.store.record import Tail
from vista.store.record_reading import StoredRecord

Tally = Callable[..., None]
"""Adds to counters of `ScorerStats` by name."""
Integers = NDArray[Any]
Bools = NDArray[np.bool_]
UNITS = {"seconds": 1e3, "microseconds": 1e-3, "nanoseconds": 1e-6}
"""Factors to milliseconds."""
MAX_IDS = 1 << 24
"""Most users, and most candidates, per call."""
MAX_SCORES = 1 << 28
"""Most pairs of a user and a candidate per call; their scores take 1 GiB per task."""
NOW = -(1 << 62)
"""A number that is not a time, for requests for which no time is given (`current_times`)."""
MOST_IDLE_MS = 30 * DAY_MS
"""Most time from a user's newest event to a request for which no time is given."""
MAX_TAIL_EVENTS = 1 << 20
"""Most events in the tail of a call. Merging them takes up to 200 MB."""


@dataclass(frozen=True, slots=True)
class Request:
    """Summaries, tails, times and features of B users' requests."""

    summary: Float32s
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
    pooled: Float32s | None = None
    """float32 [B, J, r] from `pooled_vectors`; None for a model without."""
    features: PairFeatures | None = None
    """Of the B requests; None if all are missing."""
    users: EncodedRows | None = None
    """Features of the B users; None if all are missing."""
    adapter: Float32s | None = None
    """Values of an `Adapter`; None answers with the model as it is."""

    def __len__(self) -> int:
        return len(self.missing)

    def with_features(self, model: ServingModel, given: Any, candidates: int | Int | None) -> Request:
        """The same request with the features that a caller passes, of the request and of the users.

        Arguments and errors are those of `PairFeatures`. A name that both have belongs to the request.
        """
        of_request, own, users = model.request_features, model.user_features, self.users
        if isinstance(given, Mapping) and own is not None and users is not None:
            known = {} if of_request is None else of_request.values
            of_user = {name: values for name, values in given.items() if name in own.values and name not in known}
            users = of_users(own, users, of_user) if of_user else users
            given = {name: values for name, values in given.items() if name not in of_user}
        if given is None and of_request is None:
            return self
        return replace(self, users=users, features=PairFeatures.of(of_request, given, len(self), candidates))

    def select(self, users: slice | Int) -> Request:
        """Some of the users, or all of them in another order."""
        now = None if self.now is None else self.now[users]
        counters = None if self.counters is None else self.counters.select(users)
        features = None if self.features is None else self.features.select(users)
        own = None if self.users is None else self.users.select(users)
        pooled = None if self.pooled is None else self.pooled[users]
        summary, tail, missing = self.summary[users], self.tail.select(users), self.missing[users]
        return Request(summary, tail, now, missing, self.generation, counters, pooled, features, own, self.adapter)


@dataclass(frozen=True, slots=True)
class UserRecord:
    """A request of one user, whose record is scored as it is stored."""

    stored: StoredRecord
    now: int | None
    """Ms; None if unknown."""
    adapter: Float32s | None
    """Values of an `Adapter`."""


@dataclass(frozen=True, slots=True)
class RequestCounters(UserCounters):
    """Counters of B users with E counted items, and where to find them."""

    cells: tuple[Int, ...]
    """int64 [E] user and key as one number, ascending, of items and of each other field."""

    @classmethod
    def of(
        cls, keys: ItemKeys, stored: StoredBatch, tail: Tail, is_fresh: NDArray[np.bool_], now: Int | None
    ) -> RequestCounters:
        """The stored counters, with the fresh events of the tail added, which the records do not cover.

        Training and evaluation on raw histories advance counters by the same function
        (`vista.examples.item_statistics`).

        Args:
            keys: of the model.
            stored: of a store with counters; users without a record have none.
            tail: of the request, with items as model rows. Fresh events that are no longer in it are not counted.
            is_fresh: bool [T] its events that the records do not cover.
            now: int64 [B] ms, or None if unknown.
        """
        fresh, newest = np.flatnonzero(is_fresh), newest_items(tail.items, tail.offsets)
        if not len(fresh):
            codes, *others = [one.decayed(now) for one in stored.counters]
            return cls._made_of(codes, stored.event_count, tuple(others), keys, newest)
        offsets = np.searchsorted(fresh, tail.offsets)
        keys_of_tail = keys.of_events(tail.items, tail.actions, tail.times, tail.offsets)
        of_fields = zip(stored.counters, keys_of_tail, strict=True)
        codes, *others = [one.advanced(now, key[fresh], tail.times[fresh], offsets) for one, key in of_fields]
        return cls._made_of(codes, stored.event_count + np.diff(offsets), tuple(others), keys, newest)

    @classmethod
    def _made_of(
        cls, codes: CounterCodes, num_events: Int, others: tuple[CounterCodes, ...], keys: ItemKeys, newest: Int
    ) -> RequestCounters:
        cells = tuple(cells_of(one.owner, one.key) for one in (codes, *others))
        return cls(codes, num_events, others, keys, newest, cells)

    def select(self, users: slice | Int) -> RequestCounters:
        """Counters of some of the users, or of all of them in another order."""
        index = np.arange(len(self.num_events))[users]
        others = tuple(one.select(index) for one in self.others)
        return self._made_of(self.codes.select(index), self.num_events[index], others, self.keys, self.newest[index])

    def find(self, users: slice, rows: Int | None, columns: slice) -> tuple[Int, Int, Int]:
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
        if first == stop:
            return (np.zeros(0, np.int64),) * 3
        count = users.stop - users.start
        owner = np.repeat(np.arange(users.start, users.stop), row.shape[-1])
        found, place = self.places(owner, np.broadcast_to(row, (count, row.shape[-1])).ravel())
        user, column = np.divmod(found, row.shape[-1])
        return user, column, place

    def places(self, user: Int, row: Int) -> tuple[Int, Int]:
        """Which of some pairs of user and model row, int64 [N] each, have a counted item, int64 [n], and its place in
        `codes`, int64 [n]."""
        cell, wanted = self.cells[0], cells_of(user, row)
        if not len(cell):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        place = np.minimum(np.searchsorted(cell, wanted), len(cell) - 1)
        found = np.flatnonzero(cell[place] == wanted)
        return found, place[found]

    def codes_of_pairs(self, user: Int, row: Int) -> tuple[Int, NDArray[np.uint8]]:
        """Which of some pairs of user and model row, int64 [N] each, are counted in any field, int64 [n], and their
        codes uint8 [n, G * F + 1] (`of_pairs`)."""
        if not self.others:
            found, place = self.places(user, row)
            return found, self._with_event_counts(self.codes.codes[place], user[found])
        fields = zip((self.codes, *self.others), self.cells, self._keys_of(user, row), strict=True)
        codes = np.concatenate([one.at_cells(cells, cells_of(user, key)) for one, cells, key in fields], 1)
        found = np.flatnonzero(codes[:, :: self.codes.spec.num_columns].any(1))
        return found, self._with_event_counts(codes[found], user[found])

    def counted_pairs(self, users: slice, rows: Int | None, columns: slice) -> tuple[Int, Int, NDArray[np.uint8]]:
        """The candidates in a rectangle of which the key in any field is counted: user and column within it, int64 [n]
        each, and their codes uint8 [n, G * F + 1] (`of_pairs`). Arguments are those of `find`."""
        if not self.others:
            user, column, place = self.find(users, rows, columns)
            return user, column, self._with_event_counts(self.codes.codes[place], users.start + user)
        if rows is None:
            row = np.arange(columns.start, min(columns.stop, self.keys.num_rows))
        else:
            row = _rectangle(rows, users, columns)
        count = users.stop - users.start
        row = np.broadcast_to(row, (count, row.shape[-1])).ravel()
        owner = np.repeat(np.arange(users.start, users.stop), len(row) // count)
        found, codes = self.codes_of_pairs(owner, row)
        user, column = np.divmod(found, len(row) // count)
        return user, column, codes

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


def request_pooled(
    model: ServingModel, stored: StoredBatch, tail: Tail, is_fresh: Bools, padded: PaddedTail
) -> Float32s | None:
    """Pooled vectors of requests, float32 [B, J, r]; None for a model without.

    Args:
        stored: records, of which the last row holds the mean over their events; users without a record have no events.
        tail, is_fresh: as of `RequestCounters.of`; padded: the same tail.
    """
    if not (width := model.config.space_dim):
        return None
    space: Float32s = model.weights["item_space"]
    weights = model.weights.get("item_space_weights")
    sums = stored.summary[:, -1, :width].astype(np.float64) * stored.event_count[:, None]
    if np.count_nonzero(is_fresh):
        owner = np.repeat(np.arange(len(sums)), np.diff(tail.offsets))
        items, actions = tail.items[is_fresh], tail.actions[is_fresh]
        np.add.at(sums, owner[is_fresh], weighted(space[items], None if weights is None else weights[items, actions]))
    return pooled_vectors(space, sums, padded.item, None if weights is None else weights[padded.item, padded.action])


def _rectangle(rows: Int, users: slice, columns: slice) -> Int:
    """Rows of candidates, [C] or [B, C], of some users and columns: int64 [columns] or [users, columns]."""
    return rows[columns] if rows.ndim == 1 else rows[users, columns]


def with_fresh_events(model: Readings, stored: StoredBatch, tail: Tail, *, refuse: bool) -> tuple[Tail, Bools, Bools]:
    """Merge the stored tails of a batch with a caller's tail, whose items are raw ids.

    Args:
        model: the model in service.
        stored: of B users.
        tail: of the same users.
        refuse: raise if the code of an action or a time is impossible; otherwise keep that user's stored tail.

    Returns:
        The merged tails, which of their events are fresh, [N], and which users' events were impossible, [B].

    Raises:
        ValueError, TypeError: a part of the tail is invalid; the message names it.
    """
    num_users, actions = len(stored.found), model.schema.actions
    checked = checked_tail(tail, num_users, actions)
    lengths = np.diff(checked.offsets)
    no_action = (checked.actions < 0) | (checked.actions >= len(actions))
    late = np.zeros(len(checked.times), np.bool_)
    if model.schema.has_time:
        late = impossible_times(checked.times, np.repeat(stored.last_event_ts, lengths))
    if refuse and no_action.any():
        raise ValueError(
            f"tail.actions: codes must lie in [0, {len(actions)}), got {checked.actions[no_action.argmax()]}"
        )
    if refuse and late.any():
        raise not_a_time("tail.times", checked.times[late][0])
    bad = np.zeros(num_users, np.bool_)
    bad[np.repeat(np.arange(num_users), lengths)[no_action | late]] = True
    kept = ~np.repeat(bad, lengths)
    ids = checked.items[kept]
    rows = model.history_rows(item_rows(model, ids, "tail.items"))
    offsets = offsets_of(np.where(bad, 0, lengths))
    features = {name: column[kept] for name, column in _model_features(model, checked).items()}
    fresh = Tail(rows.astype(np.int32), checked.times[kept], checked.actions[kept].astype(np.uint8), offsets, features)
    names = np.unique(ids, return_inverse=True)[1]
    return *merge_tails(stored.tail, stored.event_count, fresh, model.config.tail_len, names), bad


def merge_tails(
    stored: Tail, event_count: Int, fresh: Tail, tail_len: int, names: Integers | None = None
) -> tuple[Tail, Bools]:
    """The union of two packed tails of the same users, oldest first, limited to the newest `tail_len` events, and which
    of these are fresh, bool [N].

    Callers may send events that the record covers, or send events twice: a fresh event counts once, and not at all if
    the record covers it. That is so if the stored tail holds it (same time, item and action). The tail does not show
    covered events before its own. If there are some, all fresh events at the time of the tail's oldest event, or
    earlier, are taken for covered: of a basket with one time and more items than the tail, it holds only a part.
    Events with equal times keep their order, stored ones first. The features of an event are not part of its identity:
    those of the event that is kept count.

    Args:
        stored, fresh: with items as model rows, and features with the model's codes. The result has those of `fresh`.
        event_count: int64 [B] events that the records cover.
        tail_len: events to keep per user.
        names: [N] numbers that tell the fresh events' items apart, including unknown items, which share a row; None if
            the rows do.
    """
    num_users = len(stored.offsets) - 1
    user = np.concatenate([np.repeat(np.arange(num_users), np.diff(t.offsets)) for t in (stored, fresh)])
    item = np.concatenate([stored.items, fresh.items])
    time = np.concatenate([stored.times, fresh.times])
    action = np.concatenate([stored.actions, fresh.actions])
    place = np.arange(len(user))
    is_fresh = place >= len(stored.items)
    name = np.concatenate([np.full(len(stored.items), -1), fresh.items if names is None else names])
    double = is_fresh & _repeats(user, time, action, item, is_fresh)  # of a stored event
    double |= is_fresh & _repeats(user, time, action, np.where(is_fresh, name, -1 - place), place)  # of a fresh one
    double |= is_fresh & _may_precede(stored, event_count, user, time)
    order = np.lexsort((place, time, user))
    order = order[~double[order]]
    counts = np.bincount(user[order], minlength=num_users)
    ends = np.cumsum(counts)
    from_end = np.repeat(ends, counts) - np.arange(len(order))
    order = order[from_end <= tail_len]
    offsets = offsets_of(np.minimum(counts, tail_len))
    features = {name: np.concatenate([stored.features[name], fresh.features[name]])[order] for name in fresh.features}
    return Tail(item[order], time[order], action[order], offsets, features), is_fresh[order]


def checked_tail(tail: Tail, num_users: int, actions: Sequence[str]) -> Tail:
    """Convert a caller's tail to NumPy arrays: raw item ids, and int64 for everything else except features.

    Args:
        tail: of the users.
        num_users: B.
        actions: those of the model by code, which replaces a name.

    Raises:
        ValueError, TypeError: a part of the tail is invalid for `num_users` users; the message names it.
    """
    if not isinstance(tail, Tail):
        raise TypeError(f"tail: must be a Tail(items, times, actions, offsets), got a {type(tail).__name__}")
    if not isinstance(tail.features, Mapping):
        raise TypeError(f"tail.features: must be a mapping of names to values, got a {type(tail.features).__name__}")
    require_most(length_of(tail.items), MAX_TAIL_EVENTS, "tail.items", "events")
    arrays = {
        "items": array_of(tail.items, "tail.items"),
        "times": integers(tail.times, "tail.times", "integer milliseconds"),
        "actions": _action_codes(tail.actions, actions),
        "offsets": integers(tail.offsets, "tail.offsets"),
    }
    for name, array in arrays.items():
        if array.ndim != 1:
            raise ValueError(f"tail.{name}: must be one-dimensional, got shape {array.shape}")
    count = len(arrays["items"])
    for name in ("times", "actions"):
        if len(arrays[name]) != count:
            raise ValueError(f"tail.{name}: holds {len(arrays[name])} values for {count} items")
    offsets = arrays["offsets"]
    if len(offsets) != num_users + 1 or offsets[0] != 0 or offsets[-1] != count or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"tail.offsets: must be {num_users + 1} values that rise from 0 to {count}, got {len(offsets)} values that "
            f"start with {offsets.tolist()[:6]}"
        )
    features = {name: _column(name, values) for name, values in tail.features.items()}
    return Tail(arrays["items"], arrays["times"], arrays["actions"], offsets, features)


def _action_codes(given: Any, actions: Sequence[str]) -> Int:
    """A caller's actions as codes. None stands for the action of a model that has only one.

    Raises:
        ValueError: a name is not one of the model's actions: the caller's mistake, whichever user it is for.
    """
    array = array_of(given, "tail.actions")
    if array.dtype.kind not in "UO" or not all(one is None or isinstance(one, str) for one in array.flat):
        return integers(array, "tail.actions")
    codes: dict[str | None, int] = {name: code for code, name in enumerate(actions)}
    if len(actions) <= 1:
        codes[None] = 0
    for name in array.flat:
        if name not in codes:
            given_name = None if name is None else str(name)
            raise ValueError(
                f"tail.actions: {shown(given_name)} is not one of this model's actions, {shown(list(actions))}"
            )
    return np.array([codes[one] for one in array.flat], np.int64).reshape(array.shape)


def _column(name: Any, values: Any) -> Any:
    """A caller's values of a feature, with a length."""
    if isinstance(values, (list, tuple)):
        return values
    array = array_of(values, f"tail.features: {name!r}")
    if array.ndim != 1:
        raise ValueError(f"tail.features: {name!r} must be a list of values, or one-dimensional, got {shown(values)}")
    return array


def _model_features(model: Readings, tail: Tail) -> Mapping[str, RowColumn]:
    """Features of a caller's events, with the model's codes, in the columns that stage 2 reads.

    Callers may also name the columns that only stage 1 reads.

    Raises:
        ValueError: a column is unknown to the model, or has other values than its kind.
    """
    if model.event_features is None:
        for name in tail.features:
            raise ValueError(f"tail.features: {shown(name)} is not a feature that this model reads; it reads none")
        return {}
    try:
        parsed = model.event_features.parse(tail.features, len(tail.items)).columns
    except ValueError as error:
        raise ValueError(f"tail.features: {error}") from None
    return {name: parsed[name] for name in model.schema.tail_sizes}


def _may_precede(stored: Tail, event_count: Int, user: Integers, time: Integers) -> Bools:
    """Which events may be covered ones that the stored tails have no room for, bool [N]."""
    lengths = np.diff(stored.offsets)
    is_cut = (lengths > 0) & (event_count > lengths)
    oldest = np.zeros(len(lengths), np.int64)
    oldest[is_cut] = stored.times[stored.offsets[:-1][is_cut]]
    found: Bools = is_cut[user] & (time <= oldest[user])
    return found


def _repeats(user: Integers, time: Integers, action: Integers, item: Integers, order: Integers) -> Bools:
    """Which events repeat an event of the same user, time, action and item with a smaller `order`, bool [N]."""
    index = np.lexsort((order, action, item, time, user))
    same = np.zeros(len(user), np.bool_)
    if len(user) > 1:
        a, b = index[:-1], index[1:]
        same[1:] = (user[a] == user[b]) & (time[a] == time[b]) & (item[a] == item[b]) & (action[a] == action[b])
    start = np.maximum.accumulate(np.where(same, 0, np.arange(len(user))))
    repeats = np.zeros(len(user), np.bool_)
    repeats[index] = order[index] > order[index[start]]
    return repeats


def no_tally(**_: int) -> None:
    """A `Tally` that adds to nothing."""


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
    if is_tensor(values):
        return values.cpu().numpy()
    if hasattr(values, "to_numpy"):  # a column of pandas or Polars
        return values.to_numpy()
    if not isinstance(values, (Sequence, np.ndarray)) or isinstance(values, (str, bytes)):
        raise TypeError(f"{name}: must be a list or an array of ids, got {values!r}")
    return values


def array_of(values: Any, name: str) -> NDArray[Any]:
    """Convert an argument to an array; a ValueError names it if its rows differ in length."""
    try:
        return id_array(values.cpu() if is_tensor(values) else values)
    except ValueError:
        raise ValueError(f"{name}: the rows differ in length") from None


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


def item_rows(model: Readings, ids: Any, name: str) -> Int:
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
    if type(now) is int and -(1 << 63) <= now < 1 << 63:  # as most callers pass it
        return np.full(num_users, now, np.int64)
    times = integers(now, "now", "integer milliseconds")
    if times.shape not in ((), (num_users,)):
        raise ValueError(f"now: must be one time, or one for each of {num_users} users, got shape {times.shape}")
    return np.full(num_users, times)


def current_times(newest: Int) -> Int:
    """When requests come for which no time is given, in ms: the current time, but at most MOST_IDLE_MS after the user's
    newest event, so that answers about a log that ended long ago stay useful.

    This is what `vista score`, the service, and the page ask if no time is named.

    Args:
        newest: int64 [B] ms of the users' newest events; 0 or less without an event.
    """
    now = time.time_ns() // 1_000_000
    times: Int = np.where(newest > 0, np.minimum(now, newest + MOST_IDLE_MS), now)
    return times


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
