"""Forgotten and late events: the state afterwards equals the state of the changed history."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vista.config.choices import Decay, Mixing
from vista.errors import ConfigError
from vista.log.histories import Histories
from vista.model import history_states as states_module
from vista.model.history_states import RANGES_PER_PASS, SLICE_LEN, embed, history_states, range_states, reach
from vista.model.state_updates import insert_events, merge_histories, remove_events
from vista.model.summary_state import DRIFT_LIMIT, SummaryState, exchange

DAY = 86_400_000
SHAPES = {
    "plain sums": {"conv_width": 1, "has_time": False},
    "gaps": {"conv_width": 1},
    "event features": {"conv_width": 3, "num_tail_features": 1},
    "convolution": {"conv_width": 3, "has_time": False},
    "convolution, gaps and decay": {"conv_width": 3, "decay": Decay.time, "decay_horizons": [2.0, 30.0]},
}
LENGTH = 24
positions = st.sets(st.integers(0, LENGTH - 1)).map(sorted)


def without(history: Histories, gone: list[int]) -> Histories:
    kept = np.setdiff1d(np.arange(history.num_events), gone)
    return history.at(kept, np.array([0, len(kept)], np.int64))


def assert_equal_within_rounding(state: SummaryState, exact: SummaryState, before: SummaryState) -> None:
    """Equal within float32 rounding of the subtracted sums, which the drift rule bounds relative to the rest."""
    assert torch.equal(state.clock, exact.clock) and torch.equal(state.num_events, exact.num_events)
    amax = (-1, -2)
    scale = torch.maximum(exact.z.abs().amax(amax), before.z.abs().amax(amax))[..., None, None]
    assert ((state.z - exact.z).abs() <= 3e-6 * scale).all(), ((state.z - exact.z).abs() / scale).max()
    assert ((state.n - exact.n).abs() <= 3e-6 * torch.maximum(exact.n, before.n)).all()


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=40, deadline=None)
@given(gone=positions, seed=st.integers(0, 99))
@example(gone=[0], seed=1)
@example(gone=[LENGTH - 1], seed=1)
@example(gone=[3, 4, 6, 9, 13], seed=1)
@example(gone=list(range(1, LENGTH)), seed=1)
@example(gone=list(range(LENGTH)), seed=1)
def test_forgetting_equals_recomputation(make: SimpleNamespace, shape: str, gone: list[int], seed: int) -> None:
    model = make.model(seed=1, **SHAPES[shape])
    history = make.histories([LENGTH], seed)
    state = history_states(model, history)
    exact = history_states(model, without(history, gone))
    left = remove_events(model, state, history, gone)
    assert model.summarizer is not None
    before = state.seen_from(exact.clock, model.summarizer.decay_rate) if len(gone) < LENGTH else state
    assert_equal_within_rounding(left, exact, before)
    if len(gone) == LENGTH:
        assert not any(getattr(left, name).any() for name in ("z", "n", "removed", "clock", "num_events"))


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=40, deadline=None)
@given(late=positions, seed=st.integers(0, 99))
@example(late=[0], seed=1)
@example(late=[LENGTH - 2, LENGTH - 1], seed=1)
@example(late=list(range(LENGTH)), seed=1)
def test_late_events_equal_recomputation(make: SimpleNamespace, shape: str, late: list[int], seed: int) -> None:
    model = make.model(seed=2, **SHAPES[shape])
    history = make.histories([LENGTH], seed)
    state = history_states(model, without(history, late))
    exact = history_states(model, history)
    complete = insert_events(model, state, history, np.array(late, np.int64))
    assert_equal_within_rounding(complete, exact, exact)


def test_forgetting_reads_only_the_neighborhood(make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is proportional to the number of forgotten events, not to the length of the history."""
    model = make.model(seed=3)
    history = make.histories([3000], 4)
    state = history_states(model, history)
    r = reach(model)
    assert r == 3
    held: list[int] = []

    def counted(model: object, histories: Histories, start: object = None) -> object:
        held.append(histories.num_events)
        return embed(model, histories, start)

    monkeypatch.setattr(states_module, "embed", counted)
    left = remove_events(model, state, history, [100, 2000])
    assert sum(held) == 2 * (1 + 2 * r) + 2 * (2 * r)
    assert_equal_within_rounding(left, history_states(model, without(history, [100, 2000])), state)


def test_forgetting_many_events_takes_passes_of_bounded_size(
    make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stretch longer than one pass, and more single events than ranges per pass."""
    model = make.model(seed=3)
    history = make.histories([20_000], 4)
    state = history_states(model, history)
    held: list[int] = []

    def counted(model: object, histories: Histories, start: object = None) -> object:
        held.append(histories.num_events)
        return embed(model, histories, start)

    monkeypatch.setattr(states_module, "embed", counted)
    stretch, single = list(range(500, 500 + SLICE_LEN + 100)), list(range(10_000, 20_000, 20))
    assert len(single) > RANGES_PER_PASS
    left = remove_events(model, state, history, stretch + single)
    assert len(held) > 4 and max(held) <= SLICE_LEN + reach(model)
    assert_equal_within_rounding(left, history_states(model, without(history, stretch + single)), state)


@pytest.mark.parametrize(("newest_first", "least"), [(False, 1), (True, 3)])
def test_repeated_forgetting_keeps_its_digits(make: SimpleNamespace, newest_first: bool, least: int) -> None:
    """Events are forgotten until none is left. The error stays small, because the drift rule recomputes in time."""
    model = make.model(seed=4, conv_width=1, decay=Decay.time, decay_horizons=[1.0, 20.0])
    history = make.histories([600], 5)
    state, recomputed = history_states(model, history), 0
    rng = np.random.default_rng(0)
    while history.num_events > 0:
        count = min(7, history.num_events)
        gone = np.sort(rng.choice(history.num_events, count, replace=False))
        if newest_first:
            gone = np.arange(history.num_events - count, history.num_events)
        removed = state.removed
        state = remove_events(model, state, history, gone)
        history = without(history, gone.tolist())
        recomputed += bool(removed.any() and not state.removed.any())
        assert not state.needs_recomputation().any()
        exact = history_states(model, history)
        scale = exact.z.abs().amax((-1, -2), keepdim=True)
        # The rule allows 1000 times the rounding of a float32.
        assert ((state.z - exact.z).abs() <= 1e-3 * scale).all()
    assert recomputed >= least


def test_drift_rule() -> None:
    def state(removed: list[float], n: list[float]) -> bool:
        made = SummaryState.empty(1, 1, 2, 4, "cpu")
        made = SummaryState(made.z, torch.tensor([n]), torch.tensor([removed]), made.clock, made.num_events)
        return bool(made.needs_recomputation()[0])

    assert not state([0, 0], [0, 0])
    assert not state([0, 0], [1e-30, 0])
    assert not state([998, 998], [1, 1])
    assert state([1000, 0], [1, 1]) and state([0, 1000], [1, 1]), "one head is enough"
    assert state([1, 1], [0, 1]) and state([1, 1], [-1e-6, 1]), "rounding can leave a negative weight"
    assert DRIFT_LIMIT == 0.999


def test_forgetting_most_of_the_weight_recomputes(make: SimpleNamespace) -> None:
    """The only event within ten thousand horizons is forgotten, so subtraction leaves no valid digits."""
    model = make.model(seed=5, conv_width=1, has_time=True, decay=Decay.time, decay_horizons=[0.01, 1.0])
    base = make.histories([10], 6)
    times = base.timestamp.copy()
    times[-1] = times[-2] + 100 * DAY
    history = Histories(base.item, times, base.action, base.rating, base.offsets)
    state = history_states(model, history)
    exact = history_states(model, without(history, [9]))
    assert model.summarizer is not None
    # Plain subtraction gives a finite but wrong state, and the drift rule detects it.
    old = range_states(model, history.slice(0, 8, 10), np.array([1]))
    naive = exchange(state, old, model.summarizer.empty_state(1), exact.clock, model.summarizer.decay_rate)
    assert torch.isfinite(naive.z).all() and torch.isfinite(naive.removed).all()
    assert not torch.allclose(naive.z, exact.z, rtol=0.1) and naive.needs_recomputation().all()
    left = remove_events(model, state, history, [9])
    for name in ("z", "n", "removed", "clock", "num_events"):
        assert torch.equal(getattr(left, name), getattr(exact, name))


def test_forgetting_or_inserting_no_events_changes_no_bit(make: SimpleNamespace) -> None:
    model = make.model(seed=6, **SHAPES["convolution, gaps and decay"])
    history = make.histories([LENGTH], 7)
    state = history_states(model, history)
    for changed in (
        remove_events(model, state, history, []),
        insert_events(model, state, history, []),
    ):
        for name in ("z", "n", "removed", "clock", "num_events"):
            assert torch.equal(getattr(changed, name), getattr(state, name))


def test_decay_by_position_allows_appending_only(make: SimpleNamespace) -> None:
    model = make.model(seed=7, decay=Decay.position, decay_horizons=[5.0, 9.0])
    history = make.histories([LENGTH], 8)
    state = history_states(model, history)
    with pytest.raises(ConfigError, match=r"model\.decay=position: forgetting events .* appending only"):
        remove_events(model, state, history, [3])
    with pytest.raises(ConfigError, match=r"model\.decay=position: late events"):
        insert_events(model, state, history, [3])
    with pytest.raises(ConfigError, match=r"model\.decay=position: merging states"):
        merge_histories(model, [state], [history])


def test_bidirectional_models_refuse_to_forget(make: SimpleNamespace) -> None:
    model = make.model(mixing=Mixing.bidirectional)
    state = make.model().summarizer.empty_state(1)
    with pytest.raises(ConfigError, match="only separable mixing has states"):
        remove_events(model, state, make.histories([0]), [])


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ([3, 3], "positions must ascend"),
        ([5, 3], "positions must ascend"),
        ([-1], r"within \[0, 24\)"),
        ([24], r"within \[0, 24\)"),
        ([1.0], "integer positions, got float64"),
        ([[1]], "a vector"),
    ],
)
def test_bad_positions_are_refused(make: SimpleNamespace, gone: list[object], message: str) -> None:
    model = make.model()
    history = make.histories([LENGTH])
    state = history_states(model, history)
    with pytest.raises(ValueError, match=f"gone: .*{message}"):
        remove_events(model, state, history, np.array(gone))


def test_a_state_of_another_history_is_refused(make: SimpleNamespace) -> None:
    model = make.model()
    history, longer = make.histories([LENGTH]), make.histories([LENGTH + 1])
    state: SummaryState = history_states(model, history)
    none: NDArray[np.int64] = np.zeros(0, np.int64)
    with pytest.raises(ValueError, match=r"state: covers \[24\] events, but history has 25"):
        remove_events(model, state, longer, none)
    with pytest.raises(ValueError, match=r"state: covers \[24\] events, but history has 24 \(late: 1"):
        insert_events(model, state, history, [2])
