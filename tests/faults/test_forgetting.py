"""After thousands of appends and forgets, the state stays within the stated drift of a float64 recomputation."""

from __future__ import annotations

import numpy as np
import torch

from tests.faults.harness import Trial, promise
from tests.faults.nursery import Nursery, Say
from vista.config import DataConfig, ModelConfig
from vista.config.choices import Decay
from vista.log.histories import Histories
from vista.log.vocabulary import Vocabulary
from vista.model.history_states import history_states, range_states, reach
from vista.model.schema import Schema
from vista.model.state_updates import remove_events
from vista.model.summary_state import merge_states
from vista.model.vista_model import VistaModel

HOUR = 3_600_000
MAX_DRIFT = 1e-3
"""||Z - Z'|| / ||Z'|| per layer and head, in float32, with up to 99.9 % of the summed events removed."""


def make_model() -> VistaModel:
    """A model with decay, convolution and gaps, which reaches three events back."""
    torch.manual_seed(0)
    config = ModelConfig(
        dim=16, num_heads=2, num_seeds=3, tail_len=5, conv_width=3, decay=Decay.time, decay_horizons=[2.0, 30.0]
    )
    return VistaModel(config, Schema(["view"], True, None, []), Vocabulary.from_ids(np.arange(50)), DataConfig()).eval()


def history_of(events: list[tuple[int, int]]) -> Histories:
    """A history from (time, item) pairs."""
    item = np.array([item for _, item in events], np.int32)
    time = np.array([time for time, _ in events], np.int64)
    return Histories(item, time, np.zeros(len(item), np.uint8), None, np.array([0, len(item)], np.int64))


def exact_z(model: VistaModel, history: Histories) -> torch.Tensor:
    """Z of a history, in float64."""
    double = make_model().double()
    state = history_states(double, history)
    return state.z


def rounds(say: Say, seed: int, count: int) -> list[float]:
    """Append and forget a few events, `count` times; returns the drift, checked every hundred rounds and at the end."""
    rng, model = np.random.default_rng(seed), make_model()
    assert model.summarizer is not None
    now, events = 1_600_000_000_000, []
    state = model.summarizer.empty_state(1)
    drifts = []
    for number in range(count):
        new = int(rng.integers(0, 3)) if len(events) > 5 else 4
        for _ in range(new):
            now += int(rng.exponential(20 * HOUR)) + 1
            events.append((now, int(rng.integers(1, 51))))
        if new:
            context = min(reach(model), len(events) - new)
            terms = range_states(model, history_of(events[-new - context :]), np.array([context]))
            state = merge_states(state, terms, model.summarizer.decay_rate)
        while len(events) > 40 or (events and rng.random() < 0.5):
            gone = np.sort(rng.choice(len(events), min(len(events), int(rng.integers(1, 4))), replace=False))
            state = remove_events(model, state, history_of(events), gone)
            events = [event for place, event in enumerate(events) if place not in set(gone.tolist())]
        if number % 100 == 99 and events:
            exact = exact_z(model, history_of(events))
            norm = exact.flatten(-2).norm(dim=-1)
            drifts.append(float(((state.z.double() - exact).flatten(-2).norm(dim=-1) / norm.clamp(min=1e-12)).max()))
    return [max(drifts), len(events)]


@promise(
    "Forgetting", fault="rounds of append and forget, with decay and convolution", full=10_000, short=500, each=500
)
def test_forgetting(trial: Trial, nursery: Nursery) -> None:
    run_rounds(trial, nursery, 500)


@promise("Forgetting", fault="as many rounds on one state", full=10_000, short=0, each=10_000)
def test_forgetting_on_one_state(trial: Trial, nursery: Nursery) -> None:
    run_rounds(trial, nursery, 10_000)


def run_rounds(trial: Trial, nursery: Nursery, count: int) -> None:
    """Run rounds on one state in a child, and count its drift by magnitude."""
    drift, _ = nursery.start(rounds, trial.number, count).result(timeout_s=1800)
    assert drift <= MAX_DRIFT, f"drifted by {drift:.2e}"
    trial.count(f"drift below 1e{int(np.ceil(np.log10(max(drift, 1e-9))))}", count)
