"""Counters of candidates inside a graph, as of the request (`CounterCodes.advanced`).

Letters: B users, E counted keys, L tail length, C candidates, G fields, F values per key (`CounterSpec`), H horizons.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista.counters.counter_codes import (
    EVENTS_RESOLUTION,
    MAX_CODE,
    MAX_EVENTS,
    STEPS_PER_EVENT,
    CounterSpec,
    code_scales,
    decode_values,
)
from vista.log.gaps import NO_TIMESTAMP

_NO_AGE = 1e18
"""Age of a key without events, which no code depends on."""


class GraphCounters(nn.Module):
    """Advances stored counters to the request, adds new events, and looks up candidates. In float64, as vista does."""

    def __init__(self, spec: CounterSpec) -> None:
        super().__init__()
        self.spec = spec
        every = torch.arange(MAX_CODE + 1, dtype=torch.uint8)[:, None].expand(-1, spec.num_columns)
        resolution, largest = (torch.from_numpy(scale) for scale in code_scales(spec))
        self.register_buffer("levels", torch.from_numpy(decode_values(spec, every.numpy())).view(-1, 1))
        self.register_buffer("resolution", resolution)
        self.register_buffer("factor", MAX_CODE / torch.log1p(largest / resolution))
        self.register_buffer("half_lives", torch.from_numpy(spec.half_lives).double())
        self.levels: Tensor
        self.resolution: Tensor
        self.factor: Tensor
        self.half_lives: Tensor

    def forward(
        self,
        candidates: Tensor,
        keys: Tensor,
        codes: Tensor,
        clock: Tensor,
        now: Tensor,
        items: Tensor,
        times: Tensor,
        is_new: Tensor,
    ) -> Tensor:
        """Codes int64 [B, C, F] of candidates in one field as of the request; 0 if they are not counted.

        Args:
            candidates: int64 [B, C] their keys, which are model rows in the field of items.
            keys: int64 [B, E] counted keys, 0 as padding.
            codes: int64 [B, E, F] as stored.
            clock: int64 [B] ms that they refer to.
            now: int64 [B] ms of the requests; NO_TIMESTAMP if unknown.
            items: int64 [B, L] keys of the tail's events, right-aligned.
            times: int64 [B, L] ms.
            is_new: bool [B, L] events that the counters lack.
        """
        newest = torch.where(is_new, times, NO_TIMESTAMP).amax(1)
        now = torch.where(now == NO_TIMESTAMP, torch.maximum(clock, newest), now)
        num_new = is_new.long().sum(1)
        later = num_new[:, None] - is_new.long().cumsum(1)
        column = torch.arange(self.spec.num_columns, device=codes.device)
        old = F.embedding(codes * self.spec.num_columns + column, self.levels).squeeze(-1)
        decay, age = self._passed((now - clock).clamp(min=0), num_new)
        old = torch.cat([old[..., :1], old[..., 1:-1] * decay[:, None], old[..., -1:] + age[:, None, None]], -1)
        decay, age = self._passed((now[:, None] - times).clamp(min=0), later)
        new = torch.cat([torch.ones_like(decay[..., :1]), decay, age.unsqueeze(-1)], -1)
        key, values = torch.cat([keys, torch.where(is_new, items, 0)], 1), torch.cat([old, new], 1)
        same = (candidates.unsqueeze(-1) == key[:, None]) & (key > 0)[:, None]
        sums = same.double() @ values[..., :-1]
        ages = torch.where(same, values[:, None, :, -1], _NO_AGE).amin(-1)
        found = torch.cat([sums, ages.unsqueeze(-1)], -1)
        level = _level(found, self.resolution, self.factor)
        return torch.where(same.any(-1).unsqueeze(-1), level, 0.0).long()

    def with_event_counts(self, codes: Tensor, num_events: Tensor) -> Tensor:
        """The codes of all fields, int64 [B, C, G * F], and those of the users' numbers of events int64 [B]
        (`UserCounters.of_pairs`): int64 [B, C, G * F + 1]."""
        factor = MAX_CODE / math.log1p(MAX_EVENTS / EVENTS_RESOLUTION)
        level = _level(num_events.double(), EVENTS_RESOLUTION, factor).long()
        is_counted = (codes[..., :: self.spec.num_columns] > 0).any(-1)
        of_items = torch.where(is_counted, level.unsqueeze(1), 0)
        return torch.cat([codes, of_items.unsqueeze(-1)], -1)

    def _passed(self, elapsed: Tensor, num_events: Tensor) -> tuple[Tensor, Tensor]:
        """Decay float64 [..., H] and age float64 [...] after ms and events int64 [...] (`CounterSpec`)."""
        spec = self.spec
        steps = [elapsed] * len(spec.days) + [num_events * STEPS_PER_EVENT] * len(spec.events)
        if not steps:
            return elapsed.double().unsqueeze(-1)[..., :0], self._age(elapsed, num_events)
        decay = torch.exp2(-torch.stack(steps, -1).double() / self.half_lives)
        return decay, self._age(elapsed, num_events)

    def _age(self, elapsed: Tensor, num_events: Tensor) -> Tensor:
        return elapsed.double() / 1_000 if self.spec.has_time else num_events.double()


def _level(values: Tensor, resolution: Tensor | float, factor: Tensor | float) -> Tensor:
    """Codes as of `vista.counters.counter_codes`, in the dtype of the values."""
    return (torch.log(values / resolution + 1) * factor).round().clamp(max=MAX_CODE)
