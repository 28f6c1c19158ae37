"""Thinned curves keep both ends."""

from __future__ import annotations

import pytest

from vista.runs.curve_points import thinned


@pytest.mark.parametrize("count", [0, 1, 2, 399, 400, 401, 799, 801, 100_003])
def test_both_ends_stay(count: int) -> None:
    kept = thinned(range(count), 400)
    assert len(kept) == min(count, 400) and kept == sorted(set(kept))
    assert kept[:1] + kept[-1:] == ([0, count - 1] if count else [])


def test_points_are_chosen_evenly() -> None:
    assert thinned(range(9), 5) == [0, 2, 4, 6, 8]
