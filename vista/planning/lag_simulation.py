"""A discrete-event simulation of how old summaries become, under bursts and failures.

Users are divided among workers (`shard=i/n`), so each worker has a queue of its own. At the start of a refresh, a
worker takes all its events that have arrived. They are in the store when the refresh ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

DAY_S = 86_400
PEAK_S = 20 * 3600
"""Time of the day with the most events."""
_STEP_S = 60
NUM_DAYS = 3
"""Simulated days. The first one is a warm-up, and the burst is in the busiest hour of the second one."""
MOST_WORKERS = 16
"""Workers to simulate. They are alike, so a sample of them is enough."""
MOST_ARRIVALS = 20_000
"""Times of arrival per worker."""
_NORMAL = 1.1
"""A lag of at most this times the longest one without bursts and failures is normal."""


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


@dataclass(frozen=True, slots=True)
class Fleet:
    """The workers that refresh a store incrementally."""

    num_workers: int
    seconds: Callable[[float], float]
    """Time that one worker takes for a refresh with this many new events, in s."""
    interval_s: float
    """Time between the starts of two refreshes; 0 starts the next one as soon as there are events."""
    failures_per_day: float = 0.0
    """Of all workers together."""
    restart_s: float = 0.0
    """Time from a failure to the restart. The interrupted refresh starts over."""


@dataclass(frozen=True, slots=True)
class LagReport:
    """How long events wait until they are in the store, in s, over a day and a half around the burst."""

    median_s: float
    p95_s: float
    p99_s: float
    longest_s: float
    caught_up_s: float | None
    """Time after the burst until lags are normal again; 0 if they always are, None if not within a day."""
    failed_longest_s: float
    """Longest lag of a worker that fails at the end of the burst."""
    failed_caught_up_s: float | None
    """Time from this failure until the worker's lags are normal again; None if not within a day."""
    num_simulated: int
    """Simulated workers."""


def refreshed(
    arrivals: NDArray[np.float64],
    weight: float,
    seconds: Callable[[float], float],
    *,
    interval_s: float = 0.0,
    failures: Sequence[float] = (),
    restart_s: float = 0.0,
    most_per_refresh: int | None = None,
) -> NDArray[np.float64]:
    """When each event of one worker is in the store.

    Args:
        arrivals: [N] times in s, ascending.
        weight: events that arrive at each of these times.
        seconds: time of a refresh by its number of events.
        interval_s: refreshes start at multiples of it, or when the previous one ends, if that is later.
        failures: times, ascending, at which the worker fails; the refresh that it is in has no effect.
        restart_s: time from a failure to the restart.
        most_per_refresh: times of arrival that one refresh takes at most; None for no limit.

    Returns:
        [N] times in s at which the refreshes end.
    """
    ends = np.empty(len(arrivals))
    first, free, due, waiting = 0, 0.0, 0.0, list(failures)
    while first < len(arrivals):
        start = max(free, due, float(arrivals[first]))
        if interval_s and start > max(free, due):  # The ticks before this event found nothing to do.
            start = math.ceil(start / interval_s) * interval_s
        while True:
            last = int(np.searchsorted(arrivals, start, side="right"))
            if most_per_refresh is not None:
                last = min(last, first + most_per_refresh)
            end = start + seconds((last - first) * weight)
            if not waiting or waiting[0] >= end:
                break
            start = max(start, waiting.pop(0) + restart_s)
        ends[first:last] = end
        first, free = last, end
        due = (math.floor(start / interval_s) + 1) * interval_s if interval_s else 0.0
    return ends


def simulate_lag(
    rate: ArrivalRate, fleet: Fleet, *, burst: float = 1.0, burst_s: float = 0.0, seed: int = 0
) -> LagReport:
    """Simulate `NUM_DAYS` days of a fleet with one burst.

    Args:
        rate: of all users, without the burst.
        fleet: the workers.
        burst: factor of the rate during the burst, which is in the middle of the busiest hours of the second day.
        burst_s: length of the burst, in s.
        seed: of arrivals and failures.
    """
    peak_s, duration_s = float(DAY_S + PEAK_S), float(NUM_DAYS * DAY_S)
    burst_end_s = peak_s + burst_s / 2
    own = replace(
        rate, per_s=rate.per_s / fleet.num_workers, burst=burst, burst_s=burst_s, burst_start_s=peak_s - burst_s / 2
    )
    num_simulated = min(fleet.num_workers, MOST_WORKERS)
    failures_per_worker = fleet.failures_per_day * NUM_DAYS / fleet.num_workers
    lags = []
    for generator in np.random.default_rng(seed).spawn(num_simulated):
        arrivals, weight = own.arrivals(duration_s, MOST_ARRIVALS, generator)
        failures = np.sort(generator.uniform(0, duration_s, generator.poisson(failures_per_worker)))
        ends = _ends(arrivals, weight, fleet, failures.tolist())
        lags.append((ends - arrivals)[(arrivals >= DAY_S) & (arrivals < duration_s - DAY_S / 2)])
    lag = np.concatenate(lags)

    calm, weight = replace(own, burst=1.0).arrivals(duration_s, MOST_ARRIVALS, None)
    normal_s = _NORMAL * float(np.max(_ends(calm, weight, fleet) - calm, initial=0.0))
    fluid, weight = own.arrivals(duration_s, MOST_ARRIVALS, None)
    with_burst = _ends(fluid, weight, fleet)
    with_failure = _ends(fluid, weight, fleet, [burst_end_s])
    affected = (with_failure > burst_end_s) & (fluid < duration_s - DAY_S / 2)
    median_s, p95_s, p99_s = np.percentile(lag, [50, 95, 99]) if len(lag) else (0.0, 0.0, 0.0)
    return LagReport(
        median_s=float(median_s),
        p95_s=float(p95_s),
        p99_s=float(p99_s),
        longest_s=float(np.max(lag, initial=0.0)),
        caught_up_s=_caught_up(fluid, with_burst, burst_end_s, normal_s, duration_s),
        failed_longest_s=float(np.max((with_failure - fluid)[affected], initial=0.0)),
        failed_caught_up_s=_caught_up(fluid, with_failure, burst_end_s, normal_s, duration_s),
        num_simulated=num_simulated,
    )


def _ends(
    arrivals: NDArray[np.float64], weight: float, fleet: Fleet, failures: Sequence[float] = ()
) -> NDArray[np.float64]:
    return refreshed(
        arrivals,
        weight,
        fleet.seconds,
        interval_s=fleet.interval_s,
        failures=failures,
        restart_s=fleet.restart_s,
    )


def _caught_up(
    arrivals: NDArray[np.float64], ends: NDArray[np.float64], from_s: float, normal_s: float, until_s: float
) -> float | None:
    """Time from `from_s` until the last event with a longer lag than normal is in the store."""
    late = ends[(ends - arrivals > normal_s) & (ends > from_s)]
    if not len(late):
        return 0.0
    return None if late[-1] >= until_s else float(late[-1]) - from_s
