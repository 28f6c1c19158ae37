"""What a CounterSpec accepts, its half-lives, and its form in a manifest."""

import json

import numpy as np
import pytest

from vista.counters.counter_spec import CounterSpec


def test_half_lives_are_whole_ms_and_millionths_of_an_event() -> None:
    spec = CounterSpec(days=(1.0, 30.0), events=(200.0,))
    assert spec.half_lives.tolist() == [59_887_916, 1_796_637_492, 138_629_436]
    assert spec.num_columns == 5


def test_the_weight_of_an_event_falls_exponentially() -> None:
    spec = CounterSpec(days=(30.0,), events=(200.0, 10.0))
    weights = spec.decay(np.array([0, 86_400_000 * 30]), np.array([0, 20]))
    np.testing.assert_allclose(weights, [[1, 1, 1], [np.exp(-1), np.exp(-0.1), np.exp(-2)]], rtol=1e-4)


def test_ages_are_seconds_or_events() -> None:
    elapsed, events = np.array([1_500]), np.array([3])
    assert CounterSpec().age(elapsed, events).tolist() == [1.5]
    assert CounterSpec(days=(), has_time=False).age(elapsed, events).tolist() == [3.0]


@pytest.mark.parametrize(
    "spec",
    [
        CounterSpec(),
        CounterSpec(fields=("item", "brand"), keys=(64, 12), days=(7.0, 30.0), events=()),
        CounterSpec(days=(), has_time=False),
    ],
)
def test_json_round_trip(spec: CounterSpec) -> None:
    assert CounterSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fields": ()}, "fields: must be distinct"),
        ({"fields": ("item", "item"), "keys": (1, 1)}, "fields: must be distinct"),
        ({"keys": (64, 12)}, "keys: expected one number for each of item"),
        ({"keys": (0,)}, "keys: must be from 1 to 65535"),
        ({"days": (0.0,)}, "days: must be from 1/24"),
        ({"days": (float("nan"),)}, "days: must be from 1/24"),
        ({"events": (0.5,)}, "events: must be from 1"),
        ({"days": (1.0,) * 8}, "at most 8 horizons"),
        ({"has_time": False}, "days: must be empty for a log without times"),
    ],
)
def test_bad_values_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CounterSpec(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": ["64"]}, "keys: expected a list"),
        ({"days": [None]}, "days: expected a list"),
        ({"has_time": 1}, "has_time: expected one of True, False"),
        ({"more": 1}, "'more' is unknown"),
    ],
)
def test_a_damaged_manifest_raises_value_error(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CounterSpec.from_dict(CounterSpec().to_dict() | change)
