"""States of separable mixing: against a float64 loop over events, and computed in parts."""

from __future__ import annotations

import copy
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from vista.config.choices import Decay, Mixing
from vista.errors import ConfigError
from vista.log.histories import Histories
from vista.model import history_states as states_module
from vista.model import inference
from vista.model.history_states import embed, history_states, range_states, reach
from vista.model.summary_state import SummaryState, merge_states
from vista.model.vista_model import VistaModel

DAY = 86_400_000
KEY_OF_1 = 1.2784645427610738
"""silu of this is 1."""
SHAPES = {
    "plain": {"conv_width": 1, "has_time": False},
    "gaps": {"conv_width": 1},
    "convolution and gaps": {"conv_width": 3},
    "decay by time": {"conv_width": 3, "decay": Decay.time, "decay_horizons": [0.5, 10.0]},
    "decay by position": {"conv_width": 2, "decay": Decay.position, "decay_horizons": [0.0, 9.0]},
    "event features": {"conv_width": 3, "num_tail_features": 0},
    "interests": {"conv_width": 2, "num_interests": 11},
    "mean token": {"conv_width": 2, "mean_token": True, "decay": Decay.time, "decay_horizons": [0.5, 10.0]},
}


def loop(model: VistaModel, history: Histories) -> tuple[Tensor, Tensor]:
    """(z [L, H, D, D], n [H]) in float64, each event computed from itself and the `reach` events before it."""
    exact = copy.deepcopy(model).double()
    layers, heads = exact.summarizer.layers, model.config.num_heads
    z = torch.zeros(model.config.num_state_layers, heads, 8, 8, dtype=torch.float64)
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
                if index == 0 and model.config.mean_token:
                    key = key.clone()
                    key[:, 0] = KEY_OF_1
                z[index] += weight[:, None, None] * silu(key)[:, :, None] * value[:, None, :]
                x = layer.feed_forward(x)
            if model.config.num_interests and (interest := int(model.item_interest[int(history.item[event])])):
                z[len(layers), (interest - 1) // 8, (interest - 1) % 8, 0] += 1
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
@settings(max_examples=15, deadline=None)
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


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "decay by position"])
@settings(max_examples=15, deadline=None)
@given(middle=st.integers(0, 25), seed=st.integers(0, 99))
def test_halves_of_a_history_merge_to_the_whole(make: SimpleNamespace, shape: str, middle: int, seed: int) -> None:
    model = make.model(seed=3, **SHAPES[shape])
    history = make.histories([25], seed)
    context = min(reach(model), middle)
    first = history_states(model, history.slice(0, 0, middle))
    second = range_states(model, history.slice(0, middle - context, 25), np.array([context]))
    whole = history_states(model, history)
    rate = model.summarizer.decay_rate
    assert_same(merge_states(first, second, rate), whole)
    assert_same(merge_states(second, first, rate), whole)
    if context and 0 < middle < 25:
        without_context = history_states(model, history.slice(0, middle, 25))
        merged = merge_states(first, without_context, rate)
        assert (merged.z - whole.z).abs().max() > 1e-4, "the context of the second half matters"


@pytest.mark.parametrize("shape", SHAPES)
def test_long_histories_in_slices_equal_one_pass_at_constant_memory(
    make: SimpleNamespace, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make.model(seed=4, **SHAPES[shape])
    packed = make.histories([3, 100, 0, 16, 15, 31, 1, 500], 5)
    whole = history_states(model, packed)
    summary = inference.summarize(model, packed)
    held: list[int] = []

    def counted(model: VistaModel, histories: Histories, start: np.ndarray | None = None) -> tuple[Tensor, ...]:
        held.append(histories.num_events)
        return embed(model, histories, start)

    monkeypatch.setattr(states_module, "embed", counted)
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
    assert model.summarizer is not None
    state = history_states(model, make.histories([12, 0, 3], 1))
    empty = model.summarizer.empty_state(3)
    for merged in (
        merge_states(state, empty, model.summarizer.decay_rate),
        merge_states(empty, state, model.summarizer.decay_rate),
    ):
        for name in ("z", "n", "removed", "clock", "num_events"):
            assert torch.equal(getattr(merged, name), getattr(state, name))


def test_only_separable_mixing_has_states(make: SimpleNamespace) -> None:
    for options in ({"mixing": Mixing.bidirectional}, {"num_seeds": 0}):
        with pytest.raises(ConfigError, match=r"model\.mixing: only separable mixing has states"):
            history_states(make.model(**options), make.histories([3]))


def test_states_are_those_that_training_reads(make: SimpleNamespace) -> None:
    """States at the cuts of a chunk, from block sums and a scan, equal the states of the histories up to the cuts."""
    for shape in SHAPES.values():
        model = make.model(seed=9, **shape)
        packed = make.histories([33, 0, 6], 4)
        chunks, _ = make.chunks(packed, 4, decay=model.config.decay)
        batch = make.batch(chunks, make.plan(model), 4)
        assert model.summarizer is not None
        with torch.no_grad():
            events = batch.events
            gap = events.gap if model.encoder.gap is not None else events.gap * 0
            vectors = model.item_table[batch.rows][events.item]
            encoded = model.encoder(vectors, events.action, gap, events.rating, events.entry, events.dense)
            position = torch.from_numpy(np.concatenate([np.arange(n) for n in packed.lengths]))
            tokens = model.summarizer.tokens(encoded, position)
            interest = model.interests(batch.rows[events.item])
            blocks = model.summarizer.segment_states(tokens, events.clock, batch.cuts.segment_offsets, interest)
            states = model.summarizer.prefix_states(blocks, batch.cuts.chunk_offsets)
        offsets = batch.cuts.segment_offsets.tolist()
        owners = np.searchsorted(packed.offsets, offsets[:-1], side="right") - 1
        for row, (owner, stop) in enumerate(zip(owners, offsets[1:], strict=True)):
            whole = history_states(model, packed.slice(owner, 0, stop - packed.offsets[owner]))
            assert states.num_events[row] == whole.num_events[0]
            scale = whole.z.abs().max()
            assert (states.z[row] - whole.z[0]).abs().max() < 2e-6 * scale
            torch.testing.assert_close(states.n[row], whole.n[0], rtol=2e-6, atol=1e-6)
