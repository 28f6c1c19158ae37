"""What kills have lost, duplicated, or changed: counted in the table of promises, and failures of their repetition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any

from tests.faults.harness import Trial
from tests.faults.judging import DIFFERENT, DUPLICATED, LOST


def compare(trial: Trial, found: Mapping[Any, Any], *allowed: Mapping[Any, Any]) -> None:
    """Require for each key the value that it has in one of the mappings; a key may be missing if it is missing there.

    Args:
        found: such as the record of each user.
        allowed: such as the records before and after a refresh.
    """
    keys = set().union(found, *allowed)
    lost = {key for key in keys - set(found) if all(key in each for each in allowed)}
    added = {key for key in found if not any(key in each for each in allowed)}
    wrong = {key for key in set(found) - added if not any(key in each and each[key] == found[key] for each in allowed)}
    _fail(trial, {LOST: lost, DUPLICATED: added, DIFFERENT: wrong})


def compare_events(trial: Trial, found: Counter[Any], expected: Counter[Any]) -> None:
    """Require each event as often as expected."""
    _fail(trial, {LOST: (expected - found).elements(), DUPLICATED: (found - expected).elements()})


def _fail(trial: Trial, broken: Mapping[str, Any]) -> None:
    examples: dict[str, list[Hashable]] = {}
    for what, keys in broken.items():
        listed = sorted(keys, key=repr)
        if listed:
            trial.count(what, len(listed))
            examples[f"{len(listed)} {what}"] = listed[:3]
    assert not examples, examples
