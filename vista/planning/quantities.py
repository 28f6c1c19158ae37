"""Numbers with two significant digits and a unit that people read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# How many events arrive at each time of the day.

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


_BYTES = ("B", "KB", "MB", "GB", "TB", "PB", "EB", "ZB")
_COUNTS = ("", " thousand", " million", " billion", " trillion", " quadrillion")
_TIMES = (("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("min", 60.0), ("h", 3600.0))


def rounded(value: float) -> float:
    """A number with two significant digits."""
    return 0.0 if value == 0 else round(value, 1 - math.floor(math.log10(abs(value))))


def plain(value: float) -> str:
    """Two significant digits, without an exponent: 0.16, 4.5, 12,000."""
    two = rounded(value)
    text = f"{two:,.{max(0, 1 - math.floor(math.log10(abs(two)))) if two else 0}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def count(value: float) -> str:
    """A number of things: 950, 12 thousand, 1.5 million."""
    if rounded(value) < 10_000:
        return plain(value)
    step = _step(value, len(_COUNTS))
    return f"{plain(value / 1e3**step)}{_COUNTS[step]}"


def cores(number: int) -> str:
    """A number of cores: 1 core, 730 cores."""
    return f"{count(number)} core{'' if number == 1 else 's'}"


def hours(core_seconds: float) -> str:
    """Work: 0.38 core hours, 6,600 core hours."""
    return f"{count(core_seconds / 3600)} core hours"


def size(num_bytes: float) -> str:
    """Bytes in decimal units: 35 KB, 1.2 TB."""
    step = _step(num_bytes, len(_BYTES))
    return f"{plain(num_bytes / 1e3**step)} {_BYTES[step]}"


def duration(seconds: float | None) -> str:
    """A time: 15 ms, 40 s, 12 min, 1.5 h, 3 days; None is more than a day."""
    if seconds is None:
        return "more than a day"
    if seconds == 0:
        return "0 s"
    if rounded(seconds) >= 2 * DAY_S:
        return f"{plain(seconds / DAY_S)} days"
    fitting = [unit for unit in _TIMES if rounded(seconds) >= unit[1]]
    name, unit_s = fitting[-1] if fitting else _TIMES[0]
    return f"{plain(seconds / unit_s)} {name}"


def _step(value: float, most: int) -> int:
    """How often a number is divided by 1,000 before it is shown."""
    step = 0
    while step < most - 1 and rounded(value) >= 1e3:
        value /= 1e3
        step += 1
    return step
