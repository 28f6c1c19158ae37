"""Which variant a user gets: fixed values, shares, and independence of experiments."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import run_python
from vista.serve.user_split import UserSplit

HALVES = {"control": 0.5, "larger": 0.5}
EXPECTED = ["control", "larger", "control", "larger", "control", "larger"]
"""For the users of the first two tests."""


def test_fixed_assignments() -> None:
    """They never change: analyses of past experiments rely on them."""
    split = UserSplit(HALVES, "spring")
    assert [split.variant(user) for user in (1, 2, 3, "anna", "ben", "ümit")] == EXPECTED


def test_the_same_in_another_process() -> None:
    code = (
        "from vista.serve.user_split import UserSplit\n"
        "split = UserSplit({'control': 0.5, 'larger': 0.5}, 'spring')\n"
        "print([split.variant(user) for user in (1, 2, 3, 'anna', 'ben', 'ümit')])"
    )
    done = run_python(code)
    assert done.stdout.strip() == str(EXPECTED), done.stderr


def test_integers_are_the_same_users_as_their_texts() -> None:
    split = UserSplit(HALVES, "spring")
    assert all(split.variant(user) == split.variant(str(user)) for user in range(100))


def test_shares() -> None:
    split = UserSplit({"a": 0.7, "b": 0.0, "c": 0.3}, "x")
    given = [split.variant(user) for user in range(20_000)]
    assert "b" not in given
    assert given.count("c") / len(given) == pytest.approx(0.3, abs=0.02)  # six standard deviations


def test_experiments_are_independent() -> None:
    one, other = (
        np.array([UserSplit(HALVES, name).variant(user) == "larger" for user in range(20_000)])
        for name in ("spring", "summer")
    )
    assert (one & other).mean() == pytest.approx(0.25, abs=0.02)


def test_a_growing_share_only_adds_users() -> None:
    small, large = UserSplit({"control": 0.9, "larger": 0.1}, "x"), UserSplit({"control": 0.6, "larger": 0.4}, "x")
    for user in range(2000):
        assert small.variant(user) == "control" or large.variant(user) == "larger"
