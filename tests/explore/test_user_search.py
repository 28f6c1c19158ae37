"""Users are found by id or its beginning, at the size of a million users too."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vista.explore.explore_workspace import Workspace
from vista.explore.user_search import UserSearch
from vista.log.vocabulary import Vocabulary


@given(
    ids=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-200, 200), min_size=1, max_size=50),
    text=st.integers(-999, 999).map(str) | st.sampled_from(["", "-", "01", "x", "9" * 19, "9" * 30, "-0", " 7 "]),
)
@example(ids=[0], text="-0")
def test_integer_ids_are_found_by_their_digits(ids: list[int], text: str) -> None:
    users = Vocabulary.from_ids(ids)
    found = UserSearch(users).matches(text, limit=1000)
    wanted = text.strip()
    assert found == sorted(user for user in set(ids) if wanted and str(user).startswith(wanted) and wanted != "-")


@given(ids=st.lists(st.text("abé", min_size=0, max_size=4), min_size=1, max_size=40), text=st.text("abé", max_size=3))
def test_text_ids_are_found_by_their_beginning(ids: list[str], text: str) -> None:
    found = UserSearch(Vocabulary.from_ids(ids)).matches(text, limit=1000)
    assert sorted(found) == sorted(user for user in set(ids) if text and user.startswith(text))
    assert text not in ids or not text or found[0] == text


def test_a_million_users_give_few_matches() -> None:
    users = Vocabulary("int", np.arange(1, 1_000_001))
    search = UserSearch(users, np.arange(1_000_000))
    assert search.matches("12", limit=5) == [12, 120, 121, 122, 123] and len(search) == 1_000_000
    heavy = {search.heavy_user(np.random.default_rng(seed)) for seed in range(20)}
    assert len(heavy) > 10 and min(heavy) > 990_000  # type: ignore[type-var]


def test_removed_users_are_not_found() -> None:
    users = Vocabulary.from_ids([10, 11, 12]).without_ids(np.array([1]))
    search = UserSearch(users, np.array([1, 99, 2]))
    assert search.matches("1") == [10, 12] and len(search) == 2
    assert {search.heavy_user(np.random.default_rng(seed)) for seed in range(9)} == {10, 12}
    assert UserSearch(Vocabulary.empty("int")).heavy_user(np.random.default_rng(0)) is None


@pytest.mark.parametrize(("text", "user"), [("103", 103), (" 103 ", 103), ("abc", None), ("", None), ("5", 5)])
def test_a_text_that_is_an_id(text: str, user: int | None) -> None:
    assert UserSearch(Vocabulary.from_ids([103])).exact(text) == user


def test_without_a_log_users_come_from_the_store(workspace: Workspace) -> None:
    from_log, from_store = UserSearch.of(workspace.log, None), UserSearch.of(None, workspace.scorer)
    assert from_store.matches("1", 99) == from_log.matches("1", 99) == list(range(100, 116))
    assert from_store.heavy_user(np.random.default_rng(0)) in range(100, 116)
