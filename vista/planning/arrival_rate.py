"""How many events arrive at each time of the day."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DAY_S = 86_400
PEAK_S = 20 * 3600
"""Time of the day with the most events."""
_STEP_S = 60


@dataclass(frozen=True, slots=True)
class ArrivalRate:
    """A rate that follows a cosine over the day, with one burst."""

    per_s: float
    """Mean over a day without the burst, per s."""
    peak: float = 1.0
    """Rate at 20:00, divided by the mean."""
    burst: float = 1.0
    """Factor of the rate during the burst."""
    burst_start_s: float = 0.0
    """Start of the burst, in s."""
    burst_s: float = 0.0
    """Length of the burst, in s."""

    def at(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """Events per s at some times, in s."""
        daily = 1 + (self.peak - 1) * np.cos(2 * np.pi * (times - PEAK_S) / DAY_S)
        in_burst = (times >= self.burst_start_s) & (times < self.burst_start_s + self.burst_s)
        rate: NDArray[np.float64] = self.per_s * daily * np.where(in_burst, self.burst, 1.0)
        return rate

    def arrivals(
        self, duration_s: float, most: int, rng: np.random.Generator | None
    ) -> tuple[NDArray[np.float64], float]:
        """Times of arrival in [0, `duration_s`), ascending, and how many events arrive at each of them.

        Args:
            duration_s: length of the time span.
            most: about the largest number of times. If there are more events, several arrive at once, and as many as
                the rate says, because chance hardly changes large numbers.
            rng: draws a Poisson process; None spaces the events as the rate says.
        """
        edges = np.linspace(0, duration_s, max(2, round(duration_s / _STEP_S) + 1))
        middle = (edges[:-1] + edges[1:]) / 2
        expected = np.concatenate([[0.0], np.cumsum(self.at(middle) * np.diff(edges))])
        total = float(expected[-1])
        weight = max(1.0, total / most)
        if rng is not None and weight == 1:
            places = np.sort(rng.random(rng.poisson(total)) * total)
        else:
            count = round(total / weight)
            within = np.full(count, 0.5) if rng is None else rng.random(count)
            places = (np.arange(count) + within) * weight
        return np.interp(places, expected, edges), weight
