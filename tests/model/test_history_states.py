"""States of separable mixing: against a float64 loop, in parts, and after events are forgotten or come late."""

from __future__ import annotations

import copy
import dataclasses
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import silu

from vista.arrays import offsets_of
from vista.config.checks import Decay, Mixing
from vista.errors import ConfigError
from vista.log.histories import Histories, concatenated
from vista.model import inference
from vista.model.history_states import (
    RANGES_PER_PASS,
    SLICE_LEN,
    GrowingStates,
    embed,
    history_states,
    insert_events,
    merge_histories,
    range_states,
    reach,
    remove_events,
)
from vista.model.summarizer import DRIFT_LIMIT, SummaryState, exchange, merge_states
from vista.model.vista_model import VistaModel

DAY = 86_400_000
SHAPES = {
    "plain": {"conv_width": 1, "has_time": False},
    "convolution and gaps": {"conv_width": 3},
    "decay by time": {"conv_width": 3, "decay": Decay.time, "decay_horizons": [0.5, 10.0]},
    "decay by position": {"conv_width": 2, "decay": Decay.position, "decay_horizons": [0.0, 9.0]},
    "event features": {"conv_width": 3, "num_tail_features": 0},
}


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of events that were embedded at once, pass by pass."""
    numbers: list[int] = []

    def counted(model: VistaModel, histories: Histories, start: np.ndarray | None = None) -> tuple[Tensor, ...]:
        numbers.append(histories.num_events)
        return embed(model, histories, start)

    monkeypatch.setattr("vista.model.history_states.embed", counted)
    return numbers


def loop(model: VistaModel, history: Histories) -> tuple[Tensor, Tensor]:
    """(z [L, H, D, D], n [H]) in float64, each event computed from itself and the `reach` events before it."""
    exact = copy.deepcopy(model).double()
    layers, heads = exact.summarizer.layers, model.config.num_heads
    z = torch.zeros(model.stage1.num_layers, heads, 8, 8, dtype=torch.float64)
    n = torch.zeros(heads, dtype=torch.float64)
    times = history.timestamp if model.config.decay is not Decay.position else np.arange(history.num_events)
    unit = DAY if model.config.decay is Decay.time else 1
    tau = torch.tensor([t * unit if t else np.inf for t in model.config.decay_horizons or [0.0] * heads])
    with torch.no_grad():
        for event in range(history.num_events):
            near = history.slice(0, max(0, event - reach(model)), event + 1)
            vectors, inside, _ = embed(exact, near)
            x = exact.summarizer.tokens(vectors, inside)[-1:]
            weight = torch.exp(-float(times[-1] - times[event]) / tau.double())
            n += weight
            for index, layer in enumerate(layers):
                key, value = (part.view(heads, 8) for part in layer.key_value(layer.norm(x))[0].chunk(2))
                z[index] += weight[:, None, None] * silu(key)[:, :, None] * value[:, None, :]
                x = layer.feed_forward(x)
    return z, n


def assert_same(one: SummaryState, other: SummaryState, tolerance: float = 2e-6) -> None:
    """Equal within rounding, relative to the largest entry of each matrix."""
    assert torch.equal(one.clock, other.clock) and torch.equal(one.num_events, other.num_events)
    scale = other.z.abs().amax((-1, -2), keepdim=True).clamp(min=1e-12)
    assert ((one.z - other.z).abs() <= tolerance * scale + 1e-7).all(), ((one.z - other.z).abs() / scale).max()
    torch.testing.assert_close(one.n, other.n, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_state_is_the_sum_of_the_terms_of_its_events(make: SimpleNamespace, shape: str) -> None:
    model = make.model(seed=1, **SHAPES[shape])
    packed = make.histories([0, 1, 2, 40, 7], 2)
    states = history_states(model, packed)
    for row in range(packed.num_users):
        z, n = loop(model, packed.slice(row))
        torch.testing.assert_close(states.z[row].double(), z, rtol=1e-5, atol=1e-5 * max(1.0, float(z.abs().max())))
        torch.testing.assert_close(states.n[row].double(), n, rtol=1e-5, atol=1e-6)
    assert states.num_events.tolist() == [0, 1, 2, 40, 7] and not states.removed.any()


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 30), max_size=5), seed=st.integers(0, 99))
def test_appending_in_parts_equals_one_pass(make: SimpleNamespace, shape: str, cuts: list[int], seed: int) -> None:
    model = make.model(seed=2, **SHAPES[shape])
    history = make.histories([30], seed)
    state = history_states(model, make.histories([0]))
    bounds = [0, *sorted(cuts), 30]
    for begin, end in pairwise(bounds):
        context = min(reach(model), begin)
        new = range_states(
            model, history.slice(0, begin - context, end), np.array([context]), np.array([begin - context])
        )
        state = merge_states(state, new, model.summarizer.decay_rate)
    assert_same(state, history_states(model, history))


@pytest.mark.parametrize("most_users", [4, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_growing_states_read_new_events_alone(
    make: SimpleNamespace, shape: str, most_users: int, held: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users whose state does not fit are summarized from all their events."""
    model = make.model(seed=3, **SHAPES[shape])
    whole = make.histories([40, 9, 0, 25], 7)
    state_bytes = 4 * history_states(model, whole).z[0].numel()
    monkeypatch.setattr("vista.model.history_states.MOST_STATE_BYTES", most_users * state_bytes)
    growing = GrowingStates(model, 9)
    rows = np.array([2, 3, 5, 8])
    for asked, stops in (([0, 1, 3], [30, 9, 0]), ([0, 1, 2, 3], [30, 9, 0, 20]), ([0, 3], [40, 25])):
        stop = np.zeros(4, np.int64)
        stop[asked] = stops
        parts = whole.select(np.zeros(4, np.int64), stop)
        histories = concatenated([parts.slice(row) for row in asked])
        histories = dataclasses.replace(histories, offsets=offsets_of(np.array(stops)))
        expected = inference.summarize(model, histories)
        held.clear()
        torch.testing.assert_close(growing.summarize(rows[asked], histories), expected, atol=1e-5, rtol=1e-4)
    # The last call brought 10 and 5 new events.
    assert most_users == 2 or sum(held) <= 15 + 2 * reach(model)


@pytest.mark.parametrize("shape", SHAPES)
def test_long_histories_in_slices_equal_one_pass_at_constant_memory(
    make: SimpleNamespace, shape: str, held: list[int]
) -> None:
    model = make.model(seed=4, **SHAPES[shape])
    packed = make.histories([3, 100, 0, 16, 15, 31, 1, 500], 5)
    whole = history_states(model, packed)
    summary = inference.summarize(model, packed)
    held.clear()
    assert_same(history_states(model, packed, slice_len=16), whole)
    torch.testing.assert_close(inference.summarize(model, packed, slice_len=16), summary, atol=1e-5, rtol=1e-4)
    assert max(held) <= 16 + reach(model) and len(held) > 40


def test_an_empty_history_has_a_zero_state_and_the_summary_of_the_seeds_alone(make: SimpleNamespace) -> None:
    model = make.model(seed=5, num_layers=3)
    empty = make.histories([0, 0])
    state = history_states(model, empty)
    for part in (state.z, state.n, state.removed, state.clock, state.num_events):
        assert len(part) == 2 and not part.any()
    assert model.summarizer is not None
    with torch.no_grad():
        x = model.summarizer.seeds
        for layer in model.summarizer.layers:
            x = layer.seed_feed_forward(x)  # attention reads an empty state and adds nothing
        alone = model.summarizer.final_norm(x)
    summary = inference.summarize(model, empty)
    torch.testing.assert_close(summary, alone.expand(2, -1, -1), atol=1e-6, rtol=1e-5)
    among = inference.summarize(model, make.histories([5, 0, 9], 1))
    torch.testing.assert_close(among[1], alone, atol=1e-6, rtol=1e-5)
    assert inference.summarize(model, empty.select_users(0, 0)).shape == (0, 3, 16)


def test_moving_the_clock_is_one_multiplication(make: SimpleNamespace) -> None:
    model = make.model(seed=6, **SHAPES["decay by time"])
    assert model.summarizer is not None
    rate = model.summarizer.decay_rate
    history = make.histories([20], 3)
    state = history_states(model, history)
    later = state.clock + 2 * DAY
    moved = state.seen_from(later, rate)
    age = torch.from_numpy(int(later) - history.timestamp).double()
    tau = torch.tensor([0.5, 10.0], dtype=torch.float64) * DAY
    torch.testing.assert_close(moved.n[0].double(), torch.exp(-age[:, None] / tau).sum(0), rtol=1e-5, atol=1e-9)
    factor = torch.exp(-2 * DAY / tau)
    torch.testing.assert_close(moved.z[0].double(), state.z[0].double() * factor[:, None, None], rtol=1e-6, atol=1e-9)
    assert torch.equal(moved.num_events, state.num_events) and torch.equal(moved.clock, later)
    back = moved.seen_from(state.clock, rate)
    torch.testing.assert_close(back.z, state.z, rtol=1e-6, atol=1e-7)
    same = state.seen_from(state.clock, rate)
    assert torch.equal(same.z, state.z) and torch.equal(same.n, state.n)


def test_time_differences_are_taken_as_integers(make: SimpleNamespace) -> None:
    """Unix times in ms would be off by minutes in float32. Here gaps of five seconds must count."""
    model = make.model(seed=7, decay=Decay.time, decay_horizons=[1e-4, 1e-3])
    one = make.histories([2], 3)
    times = np.array([1_700_000_000_000, 1_700_000_005_000])
    history = Histories(one.item, times, one.action, one.rating, one.offsets)
    n = history_states(model, history).n[0].double()
    tau = torch.tensor([1e-4, 1e-3], dtype=torch.float64) * DAY
    torch.testing.assert_close(n, 1 + torch.exp(-5000 / tau), rtol=1e-6, atol=0)


def test_merging_with_the_empty_state_changes_nothing(make: SimpleNamespace) -> None:
    model = make.model(seed=8, **SHAPES["decay by time"])
    state, rate = history_states(model, make.histories([12, 0, 3], 1)), model.summarizer.decay_rate
    empty = model.summarizer.empty_state(3)
    for merged in (merge_states(state, empty, rate), merge_states(empty, state, rate)):
        for name in ("z", "n", "removed", "clock", "num_events"):
            assert torch.equal(getattr(merged, name), getattr(state, name))


def test_only_separable_mixing_has_states(make: SimpleNamespace) -> None:
    for options in ({"mixing": Mixing.bidirectional}, {"num_seeds": 0}):
        with pytest.raises(ConfigError, match=r"model\.mixing: only separable mixing has states"):
            history_states(make.model(**options), make.histories([3]))


CHANGED_SHAPES = {
    "plain sums": {"conv_width": 1, "has_time": False},
    "event features": {"conv_width": 3, "num_tail_features": 1},
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


@pytest.mark.parametrize("shape", CHANGED_SHAPES)
@settings(max_examples=8, deadline=None)
@given(gone=positions, seed=st.integers(0, 99))
@example(gone=[0], seed=1)
@example(gone=[LENGTH - 1], seed=1)
@example(gone=[3, 4, 6, 9, 13], seed=1)
@example(gone=list(range(1, LENGTH)), seed=1)
@example(gone=list(range(LENGTH)), seed=1)
def test_forgetting_equals_recomputation(make: SimpleNamespace, shape: str, gone: list[int], seed: int) -> None:
    model = make.model(seed=1, **CHANGED_SHAPES[shape])
    history = make.histories([LENGTH], seed)
    state = history_states(model, history)
    exact = history_states(model, without(history, gone))
    left = remove_events(model, state, history, gone)
    assert model.summarizer is not None
    before = state.seen_from(exact.clock, model.summarizer.decay_rate) if len(gone) < LENGTH else state
    assert_equal_within_rounding(left, exact, before)
    if len(gone) == LENGTH:
        assert not any(getattr(left, name).any() for name in ("z", "n", "removed", "clock", "num_events"))


@pytest.mark.parametrize("shape", CHANGED_SHAPES)
@settings(max_examples=8, deadline=None)
@given(late=positions, seed=st.integers(0, 99))
@example(late=[0], seed=1)
@example(late=[LENGTH - 2, LENGTH - 1], seed=1)
@example(late=list(range(LENGTH)), seed=1)
def test_late_events_equal_recomputation(make: SimpleNamespace, shape: str, late: list[int], seed: int) -> None:
    model = make.model(seed=2, **CHANGED_SHAPES[shape])
    history = make.histories([LENGTH], seed)
    state = history_states(model, without(history, late))
    exact = history_states(model, history)
    complete = insert_events(model, state, history, np.array(late, np.int64))
    assert_equal_within_rounding(complete, exact, exact)


def test_forgetting_reads_only_the_neighborhood(make: SimpleNamespace, held: list[int]) -> None:
    """The work is proportional to the number of forgotten events, not to the length of the history."""
    model = make.model(seed=3)
    history = make.histories([3000], 4)
    state = history_states(model, history)
    r = reach(model)
    assert r == 3
    held.clear()
    left = remove_events(model, state, history, [100, 2000])
    assert sum(held) == 2 * (1 + 2 * r) + 2 * (2 * r)
    assert_equal_within_rounding(left, history_states(model, without(history, [100, 2000])), state)


def test_forgetting_many_events_takes_passes_of_bounded_size(make: SimpleNamespace, held: list[int]) -> None:
    """A stretch longer than one pass, and more single events than ranges per pass."""
    model = make.model(seed=3)
    history = make.histories([20_000], 4)
    state = history_states(model, history)
    stretch, single = list(range(500, 500 + SLICE_LEN + 100)), list(range(10_000, 20_000, 20))
    assert len(single) > RANGES_PER_PASS
    held.clear()
    left = remove_events(model, state, history, stretch + single)
    assert len(held) > 4 and max(held) <= SLICE_LEN + reach(model)
    assert_equal_within_rounding(left, history_states(model, without(history, stretch + single)), state)


@pytest.mark.parametrize(("newest_first", "least"), [(False, 1), (True, 3)])
def test_repeated_forgetting_keeps_its_digits(make: SimpleNamespace, newest_first: bool, least: int) -> None:
    """Events are forgotten until none is left. The error stays small, because the drift rule recomputes in time."""
    model = make.model(seed=4, conv_width=1, decay=Decay.time, decay_horizons=[1.0, 20.0])
    history = make.histories([300], 5)
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
    model = make.model(seed=6, **CHANGED_SHAPES["convolution, gaps and decay"])
    history = make.histories([LENGTH], 7)
    state = history_states(model, history)
    for changed in (remove_events(model, state, history, []), insert_events(model, state, history, [])):
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


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ([3, 3], "positions must ascend"),
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
