"""Keys of users: bytes, order, round trips and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vista.errors import StoreError, UserKeyError
from vista.store.format.keys import COMPLETE_KEY, CURSOR_KEY, MANIFEST_KEY, MAX_KEY_BYTES, user_id, user_key, user_keys

int64 = st.integers(-(1 << 63), (1 << 63) - 1)


def test_golden_bytes():
    assert user_key(0).hex() == "7569" + "8000000000000000"
    assert user_key(-1).hex() == "7569" + "7fffffffffffffff"
    assert user_key(258).hex() == "7569" + "8000000000000102"
    assert user_key("é1") == b"us\xc3\xa91"


@given(st.lists(int64, max_size=20))
def test_integer_keys_sort_like_their_ids_and_round_trip(ids):
    keys = user_keys(ids)
    assert [user_id(key) for key in sorted(keys)] == sorted(ids)
    assert keys == [user_key(number) for number in ids] == user_keys(np.array(ids, dtype=np.int64))


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=100))
def test_string_keys_round_trip(text):
    assert user_id(user_key(text)) == text


def test_no_user_key_can_be_a_meta_key():
    assert all(not key.startswith(b"u") for key in (CURSOR_KEY, COMPLETE_KEY, MANIFEST_KEY))


def test_other_array_types_give_the_same_keys():
    assert user_keys(np.array([1, 2], dtype=np.uint8)) == user_keys([1, 2]) == user_keys([np.int32(1), 2])
    assert user_keys(np.array(["a", "bc"])) == user_keys(["a", "bc"]) == user_keys(np.array(["a", "bc"], dtype=object))
    assert user_keys([]) == user_keys(np.array([], dtype=np.int64)) == []


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        (["a" * (MAX_KEY_BYTES - 1)], "510 bytes"),
        (["é" * 300], "600 bytes"),
        ([1 << 63], "does not fit int64"),
        ([1, -(1 << 63) - 1], "does not fit int64"),
        (np.array([1 << 63], dtype=np.uint64), "does not fit int64"),
        ([1.5], "float"),
        ([True], "bool"),
        ([b"a"], "bytes"),
        ([None], "NoneType"),
        (["\ud800"], "UTF-8"),
        (np.zeros((1, 1), dtype=np.int64), "one-dimensional"),
    ],
)
def test_invalid_ids_are_refused(ids, named):
    with pytest.raises(UserKeyError, match=named) as error:
        user_keys(ids)
    assert isinstance(error.value, StoreError)


def test_longest_key_is_accepted():
    assert len(user_key("a" * (MAX_KEY_BYTES - 2))) == MAX_KEY_BYTES


@pytest.mark.parametrize("key", [b"", b"u", b"ui123", b"!cursor", b"us\xff"])
def test_other_bytes_have_no_user_id(key):
    with pytest.raises(UserKeyError):
        user_id(key)
