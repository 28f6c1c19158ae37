"""States on their way between model and store: which models have them, conversion, and the summaries read from them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config.choices import Mixing
from vista.log.histories import Histories
from vista.model.history_states import covered_events, history_states, separable_summarizer
from vista.model.summarizer import SummaryState
from vista.model.vista_model import VistaModel
from vista.refresh.counting import Tables
from vista.store.format.state_record import StateArrays


def has_states(model: VistaModel) -> bool:
    """Whether new events can be added to what the model keeps of earlier ones.

    Models with bidirectional mixing have no states. Neither do models with a history limit, because each new event
    pushes an old one out. Without a summarizer, states hold the counters alone.
    """
    config = model.config
    if model.summarizer is None:
        return bool(config.counters)
    return config.mixing is Mixing.separable and config.history_limit == 0


def state_of(model: VistaModel, histories: Histories) -> SummaryState:
    """States of histories with items as rows of the model; without numbers if the model has no summarizer.

    They hold the events that a summary covers.
    """
    if model.summarizer is None:
        return state_without_summary(histories.lengths)
    return history_states(model, covered_events(model, histories))


def state_without_summary(num_events: Int) -> SummaryState:
    """States of a model without a summarizer, which cover `num_events` [N] events."""
    state = SummaryState.empty(len(num_events), 0, 0, 0, "cpu")
    return replace(state, num_events=torch.from_numpy(num_events))


def to_arrays(
    state: SummaryState, applied_segment: int, history_digest: NDArray[np.uint64], counters: Tables
) -> StateArrays:
    """Convert states of the model to those of the store.

    Args:
        state: the states of N users.
        applied_segment: newest segment of the log that they cover.
        history_digest: [N] digests of the whole histories.
        counters: of the N users.
    """
    z, n, removed, clock, num_events = (
        getattr(state, name).cpu().numpy() for name in ("z", "n", "removed", "clock", "num_events")
    )
    applied = np.full(len(n), applied_segment, np.int64)
    return StateArrays(z, n, removed, clock, num_events, applied, history_digest, counters)


def from_arrays(arrays: StateArrays, device: torch.device) -> SummaryState:
    """Convert states of the store to those of the model, on a device."""
    columns = (arrays.z, arrays.n, arrays.removed, arrays.clock, arrays.num_events)
    return SummaryState(*(torch.from_numpy(column).to(device) for column in columns))


@torch.inference_mode()
def read_summaries(model: VistaModel, state: SummaryState) -> NDArray[np.float32]:
    """Summaries that the seeds read from states, float32 [N, K, d]."""
    if model.summarizer is None:
        return np.zeros((len(state.num_events), 0, model.config.dim), np.float32)
    summary: NDArray[np.float32] = separable_summarizer(model).read(state.z, state.n).float().cpu().numpy()
    return summary
