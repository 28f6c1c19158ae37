"""States of separable mixing: sums over events that append, merge and forget (docs/explanation/design.md).

Letters: N histories, L layers, H heads, D head dim.

A state is what a set of events wrote, seen from one time (`clock`): z = sum_s w_s phi(k_s) v_s^T with
w_s = exp(-(clock - t_s) / tau). So the state of a union of disjoint sets is the sum of their states, once both are seen
from the same time. `vista.model.history_states` computes the states of histories.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DRIFT_LIMIT = 0.999
"""A state must be recomputed if this share of all the weight that it ever held, seen from now, was removed."""
LARGEST_EXPONENT = 60.0
"""Largest exponent of the growth when a state is seen from an earlier time. Beyond it a state is past DRIFT_LIMIT."""


@dataclass(frozen=True, slots=True)
class SummaryState:
    """The states of N histories (separable mixing)."""

    z: Tensor
    """float32 [N, L, H, D, D]."""
    n: Tensor
    """float32 [N, H] sum of the events' weights."""
    removed: Tensor
    """float32 [N, H] weight removed since the state was last computed from events."""
    clock: Tensor
    """int64 [N] time that weights are seen from, that of the newest event (0 for an empty history)."""
    num_events: Tensor
    """int64 [N]."""

    @classmethod
    def empty(
        cls, count: int, num_layers: int, num_heads: int, head_dim: int, device: torch.device | str
    ) -> SummaryState:
        """The state of `count` empty histories: zeros."""
        n = torch.zeros(count, num_heads, device=device)
        z = torch.zeros(count, num_layers, num_heads, head_dim, head_dim, device=device)
        clock = torch.zeros(count, dtype=torch.int64, device=device)
        return cls(z, n, torch.zeros_like(n), clock, torch.zeros_like(clock))

    def __getitem__(self, rows: Tensor | slice) -> SummaryState:
        return SummaryState(self.z[rows], self.n[rows], self.removed[rows], self.clock[rows], self.num_events[rows])

    def seen_from(self, clock: Tensor, decay_rate: Tensor) -> SummaryState:
        """The same events seen from another time, by one multiplication.

        Args:
            clock: int64 [N].
            decay_rate: float64 [H], 1 / tau.
        """
        age = torch.where(self.num_events > 0, clock - self.clock, 0)
        exponent = (-age.unsqueeze(-1).double() * decay_rate).clamp(max=LARGEST_EXPONENT)
        factor = torch.exp(exponent).to(self.n.dtype)
        return SummaryState(
            self.z * factor[:, None, :, None, None], self.n * factor, self.removed * factor, clock, self.num_events
        )

    def total(self) -> SummaryState:
        """The sum of N states of disjoint events that are all seen from one time (N = 1 in the result)."""
        return SummaryState(
            self.z.sum(0, keepdim=True),
            self.n.sum(0, keepdim=True),
            self.removed.sum(0, keepdim=True),
            self.clock[:1],
            self.num_events.sum(0, keepdim=True),
        )

    def needs_recomputation(self) -> Tensor:
        """bool [N]: whether, in some head, so much weight was removed that subtraction has lost too many digits."""
        total: Tensor = self.removed + self.n.clamp(min=0)
        return (self.removed > DRIFT_LIMIT * total).any(-1)


def merge_states(a: SummaryState, b: SummaryState, decay_rate: Tensor) -> SummaryState:
    """State of the union of disjoint events, seen from the later of the two times.

    With a reach r > 0 (convolution, gaps), the terms of `b` must have been computed with the r events before them.
    """
    clock = torch.where(
        a.num_events == 0, b.clock, torch.where(b.num_events == 0, a.clock, torch.maximum(a.clock, b.clock))
    )
    a, b = a.seen_from(clock, decay_rate), b.seen_from(clock, decay_rate)
    return SummaryState(a.z + b.z, a.n + b.n, a.removed + b.removed, clock, a.num_events + b.num_events)


def exchange(
    state: SummaryState, old: SummaryState, new: SummaryState, newest: Tensor, decay_rate: Tensor
) -> SummaryState:
    """Replace the terms of some events, to forget events or to insert late ones.

    Args:
        state: of the whole history.
        old: terms of the forgotten events and of the up to r events after them (late events: of the latter only).
        new: terms of those followers without the forgotten events (late events: with them, and of the late events).
        newest: int64 [N] time of the newest event afterwards, which the result is seen from (0 if none remains).
        decay_rate: float64 [H].
    """
    clock = torch.where(new.num_events > 0, torch.maximum(state.clock, new.clock), state.clock)
    state, old, new = (part.seen_from(clock, decay_rate) for part in (state, old, new))
    left = SummaryState(
        state.z - old.z + new.z,
        state.n - old.n + new.n,
        state.removed + old.n,
        clock,
        state.num_events - old.num_events + new.num_events,
    )
    gone = left.num_events == 0
    left = left.seen_from(torch.where(gone, left.clock, newest), decay_rate)
    # Filled rather than multiplied by 0: rounding may leave infinities behind.
    return SummaryState(
        left.z.masked_fill(gone[:, None, None, None, None], 0),
        left.n.masked_fill(gone[:, None], 0),
        left.removed.masked_fill(gone[:, None], 0),
        torch.where(gone, 0, left.clock),
        left.num_events,
    )
