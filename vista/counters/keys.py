"""What counters count: items, categories of items, and their products with the calendar, the item before, or an action.

A field of counters is a product of parts, such as `topic*weekday`. A key is a number that stands for its values; 0
stands for nothing. The key of a candidate is the one that an event would have if the user had the candidate at the time
of the request. So one function makes the keys of events and of candidates, in training, refresh, serving, and exported
graphs: its operators are those that NumPy arrays and tensors share.

A part such as `action:wrong` does not change the number: events of other actions have key 0, and candidates the key of
the other parts. So the counters of a candidate tell how often the user had it with this action.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config.model_config import ACTION, CALENDAR, ITEM, PREVIOUS, counted_categories, is_action, parts_of
from vista.counters.counters import CounterCodes, CounterSpec, encode_event_counts
from vista.log.histories import DAY_MS

MAX_KEY = 2**31 - 1
"""A record holds a key in at most 31 bits. Larger products are taken modulo this prime, so that two keys of one user
are the same number once in two billion pairs."""
ITEM_FACTOR = 1_220_703_125
"""What parts before an item are multiplied by. Unlike the number of items, it stays if items are added to a model."""


def keys_of(
    fields: Iterable[str],
    categories: Mapping[str, Any],
    sizes: Mapping[str, int],
    item: Any,
    time: Any,
    previous: Any,
    actions: Sequence[str] = (),
    action: Any = None,
) -> list[Any]:
    """Keys of events or candidates in each field, int64 [n] from 0 to `MAX_KEY`; 0 where a part has no value.

    Args:
        fields: of a spec.
        categories, sizes, actions: as of `ItemKeys`.
        item, time, previous: as of `ItemKeys.of`, or tensors; their shapes may also broadcast.
        action: codes of the actions of events; None for candidates.
    """
    parts = {part for field in fields for part in parts_of(field)}
    codes = {ITEM: item, PREVIOUS: previous}
    codes |= {part: calendar_code(part, time) for part in CALENDAR if part in parts}
    codes |= {name: values[item] for name, values in categories.items()}
    if action is not None:
        codes |= {f"{ACTION}:{name}": action == code for code, name in enumerate(actions)}
    return [key_of(field, codes, sizes) for field in fields]


def key_of(field: str, codes: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
    """`keys_of` for one field, from codes int64 [n] of its parts, from 1 on; 0 for no value. Codes of an action are 1
    for events with it, and 0 for others; without codes, all have it."""
    first, *others = _numbered(field)
    key = codes[first] if first else codes[ITEM] * 0 + 1
    for part in parts_of(field):
        if is_action(part) and part in codes:
            key = key * codes[part]
    for part in others:
        code = codes[part]
        product = ((key - 1) * _factor(part, sizes) + code - 1) % MAX_KEY + 1
        key = product * (key > 0) * (code > 0)
    return key


def largest_key(field: str, num_items: int, sizes: Mapping[str, int]) -> int:
    """The largest key that a field can have in a model of `num_items` items."""
    first, *others = _numbered(field)
    largest = 1 if not first else num_items if first in (ITEM, PREVIOUS) else CALENDAR.get(first) or sizes[first]
    for part in others:
        largest = min(largest * _factor(part, sizes), MAX_KEY)
    return largest


def values_of(field: str, key: Int, num_items: int, sizes: Mapping[str, int]) -> dict[str, Int] | None:
    """The inverse of `key_of` for keys of at least 1: codes int64 [n] by part, without an action; None if keys of the
    field are hashed.

    Args:
        key: int64 [n].
        num_items, sizes: as of `largest_key`.
    """
    first, *others = _numbered(field)
    if any(part in (ITEM, PREVIOUS) for part in others) or largest_key(field, num_items, sizes) == MAX_KEY:
        return None
    codes, rest = {}, key.astype(np.int64) - 1
    for part in reversed(others):
        rest, code = np.divmod(rest, _factor(part, sizes))
        codes[part] = code + 1
    return {first: rest + 1, **codes} if first else {}


def _numbered(field: str) -> list[str]:
    """The parts of a field that its keys tell apart; one empty part if there are none."""
    return [part for part in parts_of(field) if not is_action(part)] or [""]


def _factor(part: str, sizes: Mapping[str, int]) -> int:
    return ITEM_FACTOR if part in (ITEM, PREVIOUS) else CALENDAR.get(part) or sizes[part]


def calendar_code(part: str, time: Any) -> Any:
    """The month (1 is January) or the weekday (1 is Monday) in UTC of times in ms, int64: an array or a tensor."""
    days = time // DAY_MS
    if part == "weekday":
        return (days + 3) % 7 + 1  # 1970 began with a Thursday
    # Months from March on, so that a leap day is the last day of a year; 719,468 days before 1970, 400 years began.
    day = (days + 719_468) % 146_097
    year = (day - day // 1_460 + day // 36_524 - day // 146_096) // 365
    day_of_year = day - (365 * year + year // 4 - year // 100)
    return ((5 * day_of_year + 2) // 153 + 2) % 12 + 1


def newest_items(item: NDArray[Any], offsets: Int) -> Int:
    """The item of the newest event of each of N packed histories, int64 [N]; 0 for an empty history."""
    if not len(item):
        return np.zeros(len(offsets) - 1, np.int64)
    return np.where(offsets[1:] > offsets[:-1], item[np.maximum(offsets[1:] - 1, 0)], 0).astype(np.int64)


@dataclass(frozen=True, slots=True)
class ItemKeys:
    """The keys of a model's items in each of the G fields of a spec, whose first field is `item`. R model rows."""

    spec: CounterSpec
    num_rows: int
    """R."""
    categories: Mapping[str, NDArray[np.int64]]
    """[R] by name of a counted category: the code of each model row, from 1 on; 0 for an item without a value."""
    sizes: Mapping[str, int]
    """Number of values of each of these categories."""
    actions: Sequence[str] = ()
    """Names of the actions of events, in the order of their codes."""

    def of(self, item: Int, time: Int, previous: Int, action: NDArray[Any] | None = None) -> list[Int]:
        """Keys in each field, int64 [n]; first the items themselves.

        Args:
            item: int64 [n] model rows of events, or of candidates.
            time: int64 [n] ms of the events, or of the requests; ignored without parts of the calendar.
            previous: int64 [n] model rows of the events before, or of the newest events before the requests.
            action: int [n] codes of the events' actions; None for candidates.
        """
        return keys_of(self.spec.fields, self.categories, self.sizes, item, time, previous, self.actions, action)

    def of_events(
        self, item: NDArray[Any], action: NDArray[Any], time: Int, offsets: Int, before: Int | None = None
    ) -> list[Int]:
        """Keys of T packed events in each field, int64 [T].

        Args:
            item: int [T] model rows of N histories; action: int [T] codes; time: int64 [T] ms; offsets: int64 [N + 1].
            before: int64 [N] items of the events that the first ones follow, 0 for none; None if they follow none.
        """
        previous = np.zeros(len(item), np.int64)
        previous[1:] = item[:-1]
        has_events = np.diff(offsets) > 0
        previous[offsets[:-1][has_events]] = 0 if before is None else before[has_events]
        return self.of(item.astype(np.int64), np.asarray(time), previous, np.asarray(action))

    @classmethod
    def of_spec(
        cls, spec: CounterSpec, num_rows: int, sizes: Mapping[str, int], actions: Sequence[str] = ()
    ) -> ItemKeys:
        """Keys of items without values of any category."""
        names = counted_categories(spec.fields)
        return cls(spec, num_rows, {name: np.zeros(num_rows, np.int64) for name in names}, sizes, actions)


@dataclass(frozen=True, slots=True)
class UserCounters:
    """Counters of B users, each as of a request. F values per key."""

    codes: CounterCodes
    """Of the items, advanced to the requests."""
    num_events: Int
    """int64 [B] events that they cover: those of the record, and the newer ones that were added."""
    others: tuple[CounterCodes, ...]
    """The same of the G - 1 fields after `item`."""
    keys: ItemKeys
    newest: Int
    """int64 [B] model rows of the newest events before the requests; 0 for none."""

    def of_pairs(self, user: Int, row: Int) -> NDArray[np.uint8]:
        """The codes that labeled tasks read for n pairs of user (0 .. B - 1) and model row: uint8 [n, G * F + 1].

        F codes of the item's counters, F of those of its key in each other field, and one of the user's number of
        events. Codes of a field are 0 where its key is not counted, and all are if no key is.
        """
        fields = zip((self.codes, *self.others), self._keys_of(user, row), strict=True)
        return self._with_event_counts(np.concatenate([one.lookup(user, key) for one, key in fields], 1), user)

    def of_counted_items(self) -> NDArray[np.uint8]:
        """Codes uint8 [E, G * F] of the E items that `codes` holds, and of their keys in the other fields."""
        if not self.others:
            return self.codes.codes
        owner = self.codes.owner
        keys = self._keys_of(owner, self.codes.key.astype(np.int64))[1:]
        of_others = [one.lookup(owner, key) for one, key in zip(self.others, keys, strict=True)]
        return np.concatenate([self.codes.codes, *of_others], 1)

    def _keys_of(self, user: Int, row: Int) -> list[Int]:
        """Keys in each field of candidates int64 [n] of users int64 [n], as of their requests."""
        return self.keys.of(row, self.codes.clock[user], self.newest[user])

    def _with_event_counts(self, codes: NDArray[np.uint8], user: Int) -> NDArray[np.uint8]:
        """Codes uint8 [n, G * F] of pairs, with the codes of the numbers of events of users int64 [n]: uint8
        [n, G * F + 1]."""
        is_counted = codes[:, :: self.codes.spec.num_columns].any(1)
        both = np.empty((len(codes), codes.shape[1] + 1), np.uint8)
        both[:, :-1], both[:, -1] = codes, np.where(is_counted, encode_event_counts(self.num_events)[user], 0)
        return both
