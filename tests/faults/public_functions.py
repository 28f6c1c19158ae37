"""The functions of the public API, the reasons why some get no hostile argument, and the errors that they document."""

from __future__ import annotations

import builtins
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

from docs.generate_reference import API, MEMBERS

_OF_ARRAYS = "slices arrays in memory, by the rules of NumPy"
_INTERNAL = "takes what only vista itself makes"
_FIELDS = "without arguments, from fields that were checked when the manifest was read (`test_crafted_fields`)"
NOT_CALLED = {
    "Scorer.in_service": "without arguments, from what is open",
    "EventLog.time_range": "without arguments; it reads columns as `gather` does",
    "Histories.slice": _OF_ARRAYS,
    "Histories.select_users": _OF_ARRAYS,
    "Histories.select": _OF_ARRAYS,
    "Histories.at": _OF_ARRAYS,
    "ItemFeatures.select": _OF_ARRAYS,
    "ItemFeatures.described": "without arguments, from arrays in memory",
    "CategoryColumn.recoded": _OF_ARRAYS,
    "CategoryColumn.select": _OF_ARRAYS,
    "CategoryColumn.with_used_values": "without arguments, from arrays in memory",
    "NumberColumn.select": _OF_ARRAYS,
    "VectorColumn.select": _OF_ARRAYS,
    "VistaModel.summarizer_id": "without arguments, from a model in memory",
    "RefreshOptions.require_only": _INTERNAL,
    "Tail.empty": "allocates as many offsets as it is asked for",
    "Tail.concatenated": _OF_ARRAYS,
    "Tail.select": _OF_ARRAYS,
    "Tail.of_user": _OF_ARRAYS,
    "CandidateSet.of": _INTERNAL,
    "Explanation.of": _INTERNAL,
    "StoredBatch.expired": _OF_ARRAYS,
    "StoredBatch.spread": _OF_ARRAYS,
    "StoredBatch.without": _OF_ARRAYS,
    "Manifest.identity": _FIELDS,
    "Manifest.spec": _INTERNAL,
    "Manifest.counter_layout": _FIELDS,
    "Manifest.tail_layout": _FIELDS,
    "Manifest.user_layout": _FIELDS,
    "Manifest.state_spec": _FIELDS,
    "Manifest.without_states": _FIELDS,
    "Manifest.with_records": _INTERNAL,
    "Manifest.to_bytes": _FIELDS,
    "Manifest.from_bytes": "the odd values are in files (`test_crafted_fields`)",
    "Manifest.from_dict": "the odd values are in files (`test_crafted_fields`)",
}
"""Documented functions that need no hostile call -> why."""


def public_functions() -> dict[str, Callable[..., Any]]:
    """The functions and methods of the reference of the Python API, by name."""
    found: dict[str, Callable[..., Any]] = {}
    for one in (one for objects in API.values() for one in objects):
        if inspect.isfunction(one):
            found[one.__name__] = one
        elif inspect.isclass(one):
            members = MEMBERS.get(one, [name for name in vars(one) if not name.startswith("_")])
            functions = {name: own for name in members if _is_function(own := getattr(one, name))}
            found |= {f"{one.__name__}.{name}": function for name, function in functions.items()}
    return found


def _is_function(member: Any) -> bool:
    # `isroutine` also takes a `cached_property`.
    return inspect.isfunction(member) or inspect.ismethod(member)


def documented(function: Callable[..., Any]) -> tuple[type[Exception], ...]:
    """The built-in exceptions that the `Raises` of a docstring names, directly or as those of other `functions`."""
    names: set[str] = set()
    seen, left = set(), [function]
    while left:
        one = left.pop()
        seen.add(one.__qualname__)
        raises = (inspect.getdoc(one) or "").partition("Raises:")[2]
        names |= set(re.findall(r"\b[A-Z]\w*Error\b", raises))
        scope = vars(sys.modules[one.__module__])
        owner = scope.get(one.__qualname__.partition(".")[0])
        others = (getattr(owner, other, None) or scope.get(other) for other in re.findall(r"`(\w+)`", raises))
        left += [other for other in others if inspect.isroutine(other) and other.__qualname__ not in seen]
    return tuple(getattr(builtins, name) for name in sorted(names) if hasattr(builtins, name))
