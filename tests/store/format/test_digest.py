"""History digests: equal to xxhash, additive, sensitive to every field."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import xxhash

from vista.store.format.digest import _CHUNK, event_digests, history_digests, item_keys


def events(count: int, seed: int = 0):
    random = np.random.default_rng(seed)
    keys = random.integers(0, 1 << 64, count, dtype=np.uint64)
    times = random.integers(-(1 << 63), (1 << 63) - 1, count)
    return keys, times, random.integers(0, 256, count).astype(np.uint8)


@pytest.mark.parametrize("count", [0, 1, _CHUNK - 1, _CHUNK, _CHUNK + 1])
def test_equals_xxhash_over_the_17_bytes(count):
    keys, times, actions = events(count)
    expected = [
        xxhash.xxh3_64_intdigest(struct.pack("<QqB", *event))
        for event in zip(keys.tolist(), times.tolist(), actions.tolist(), strict=True)
    ]
    assert event_digests(keys, times, actions).tolist() == expected


def test_extreme_values_equal_xxhash():
    edges = [0, 1, (1 << 32) - 1, 1 << 32, (1 << 64) - 1]
    for key in edges:
        for time in (-(1 << 63), -1, 0, (1 << 63) - 1):
            for action in (0, 255):
                digests = event_digests(
                    np.array([key], dtype=np.uint64), np.array([time]), np.array([action], dtype=np.uint8)
                )
                assert int(digests[0]) == xxhash.xxh3_64_intdigest(struct.pack("<QqB", key, time, action))


def test_pinned_value():
    times, actions = np.array([1000, 2000]), np.array([0, 1], dtype=np.uint8)
    digest = history_digests(item_keys([7, 8]), times, actions, np.array([0, 2]))
    first, second = struct.pack("<qqB", 7, 1000, 0), struct.pack("<qqB", 8, 2000, 1)
    assert digest.tolist() == [(xxhash.xxh3_64_intdigest(first) + xxhash.xxh3_64_intdigest(second)) % (1 << 64)]


def test_digests_are_sums_independent_of_order():
    keys, times, actions = events(50)
    offsets = np.array([0, 0, 20, 20, 50, 50])
    digests = history_digests(keys, times, actions, offsets)
    assert digests[[0, 2, 4]].tolist() == [0, 0, 0]
    whole = history_digests(keys, times, actions, np.array([0, 50]))
    assert (int(digests[1]) + int(digests[3])) % (1 << 64) == int(whole[0])
    order = np.random.default_rng(1).permutation(50)
    shuffled = history_digests(keys[order], times[order], actions[order], np.array([0, 50]))
    assert shuffled.tolist() == whole.tolist()


def test_any_changed_field_changes_the_digest():
    keys, times, actions = events(3)
    before = event_digests(keys, times, actions)
    assert (before != event_digests(keys + np.uint64(1), times, actions)).all()
    assert (before != event_digests(keys, times ^ 1, actions)).all()
    assert (before != event_digests(keys, times, actions ^ 1)).all()


def test_item_keys():
    assert item_keys([-1, 2]).tolist() == [(1 << 64) - 1, 2]
    assert item_keys(["é"]).tolist() == [xxhash.xxh3_64_intdigest("é".encode())]
    assert item_keys(np.array(["a", "b"])).tolist() == item_keys(np.array(["a", "b"], dtype=object)).tolist()
    assert len(item_keys([])) == 0
    for bad in ([1.5], np.array([None], dtype=object), [b"a"]):
        with pytest.raises(TypeError, match="integers or strings"):
            item_keys(bad)


def test_lengths_must_match():
    with pytest.raises(ValueError, match="differ in length"):
        event_digests(np.zeros(2, np.uint64), np.zeros(1, np.int64), np.zeros(2, np.uint8))
