"""The simulation against closed forms, and how lags change with load, workers, bursts, and failures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vista.planning.lag_simulation import DAY_S, PEAK_S, ArrivalRate, Fleet, refreshed, simulate_lag

RATE = ArrivalRate(per_s=100.0, peak=1.5)
EVENT_S = 0.005
FLEET = Fleet(num_workers=4, seconds=lambda num_events: 0.5 + EVENT_S * num_events, interval_s=60.0)
"""Busy 13 % of the time on average."""


@pytest.mark.parametrize("load", [0.3, 0.8])
def test_one_event_at_a_time_is_a_queue_with_fixed_service_times(load: float) -> None:
    """M/D/1: the mean wait is load x service / (2 (1 - load)), the formula of Pollaczek and Khinchine."""
    arrivals, weight = ArrivalRate(per_s=load).arrivals(200_000, 10**9, np.random.default_rng(1))
    assert weight == 1
    ends = refreshed(arrivals, weight, lambda num_events: 1.0, most_per_refresh=1)
    waits = ends - arrivals - 1
    assert waits.min() >= -1e-6
    assert waits.mean() == pytest.approx(load / (2 * (1 - load)), rel=0.04)


def test_steady_arrivals_give_refreshes_of_one_length() -> None:
    """Without pauses a refresh of T s has the events of T s: T = 0.5 + r e T. An event waits T / 2, and then T."""
    arrivals, weight = ArrivalRate(per_s=100.0).arrivals(2_000, 10**9, None)
    lags = refreshed(arrivals, weight, FLEET.seconds) - arrivals
    length = 0.5 / (1 - 100 * EVENT_S)
    settled = lags[arrivals > 100]
    assert settled.mean() == pytest.approx(1.5 * length, rel=0.01)
    assert (settled.min(), settled.max()) == pytest.approx((length, 2 * length), rel=0.03)


def test_refreshes_start_at_multiples_of_the_interval() -> None:
    """An event waits half an interval on average, and then for the refresh."""
    arrivals, weight = ArrivalRate(per_s=10.0).arrivals(60_000, 10**9, None)
    lags = refreshed(arrivals, weight, FLEET.seconds, interval_s=60) - arrivals
    length = 0.5 + EVENT_S * 10 * 60
    assert lags.mean() == pytest.approx(30 + length, rel=0.01)
    assert lags.max() == pytest.approx(60 + length, rel=0.01)
    late = refreshed(np.array([1.0, 200.0]), 1, lambda num_events: 10.0, interval_s=60)
    assert late.tolist() == [70, 250]  # Nothing to do at 120 and 180.


def test_a_backlog_is_worked_off_at_the_spare_rate() -> None:
    """Fluid limit: a burst of B s at r_b leaves (r_b - 1/e) B events, which take as long at 1/e - r."""
    event_s, rate, burst, burst_s = 0.05, 12.0, 2.5, 3_600.0
    arrivals, weight = ArrivalRate(rate, 1.0, burst, 0.0, burst_s).arrivals(6 * burst_s, 10**9, None)
    lags = refreshed(arrivals, weight, lambda num_events: event_s * num_events, most_per_refresh=100) - arrivals
    backlog = (burst * rate - 1 / event_s) * burst_s
    assert lags.max() == pytest.approx(backlog * event_s, rel=0.02)
    caught_up_s = arrivals[lags > 10][-1] - burst_s
    assert caught_up_s == pytest.approx(backlog / (1 / event_s - rate), rel=0.02)


def test_a_failure_repeats_its_refresh() -> None:
    def ends(*failures: float) -> list[float]:
        arrivals = np.array([0.0, 1.0, 12.0])
        return refreshed(arrivals, 1, lambda num_events: 5.0, failures=failures, restart_s=3).tolist()

    assert ends() == [5, 10, 17]
    assert ends(2.0) == [10, 10, 17]  # The second event joins the refresh that begins again at 5.
    assert ends(2.0, 6.0) == [14, 14, 19]
    assert ends(11.0) == [5, 10, 19]  # It fails without work, and is back at 14.


def test_arrivals_follow_the_rate() -> None:
    rate = ArrivalRate(per_s=2.0, peak=1.5, burst=3.0, burst_start_s=PEAK_S - 1800, burst_s=3600)
    arrivals, weight = rate.arrivals(DAY_S, 10_000, np.random.default_rng(0))
    without_burst = 2.0 * DAY_S
    in_burst = 2 * 2.0 * 1.5 * 3600  # what the burst adds
    assert weight == pytest.approx((without_burst + in_burst) / 10_000, rel=0.01)
    assert len(arrivals) * weight == pytest.approx(without_burst + in_burst, rel=0.05)
    hour = np.histogram(arrivals, 24, (0, DAY_S))[0] * weight / 3600
    assert hour[8] == pytest.approx(1.0, rel=0.2)  # twelve hours before the busiest one
    assert (np.diff(arrivals) >= 0).all()


def test_quiet_fleets_have_the_lag_of_the_interval() -> None:
    lag = simulate_lag(RATE, FLEET)
    assert lag.median_s == pytest.approx(30 + 0.5 + 60 * 25 * EVENT_S, rel=0.2)
    assert lag.longest_s == pytest.approx(60 + 0.5 + 60 * 1.5 * 25 * EVENT_S, rel=0.05)
    assert lag.caught_up_s == 0.0 and lag.num_simulated == 4


def test_the_same_seed_gives_the_same_report() -> None:
    fleet = replace(FLEET, failures_per_day=3.0, restart_s=600.0)
    assert simulate_lag(RATE, fleet, burst=2, burst_s=60, seed=3) == simulate_lag(
        RATE, fleet, burst=2, burst_s=60, seed=3
    )
    assert simulate_lag(RATE, fleet, seed=3) != simulate_lag(RATE, fleet, seed=4)


def test_larger_bursts_give_longer_lags() -> None:
    reports = [simulate_lag(RATE, FLEET, burst=burst, burst_s=3600) for burst in (1, 4, 8, 16)]
    for name in ("p99_s", "longest_s"):
        values = [getattr(report, name) for report in reports]
        assert values == sorted(values) and values[-1] > 5 * values[0]
    caught_up = [report.caught_up_s for report in reports]
    assert caught_up[0] == 0 and caught_up[-1] is not None and caught_up[-1] > 3600


def test_failures_and_longer_restarts_give_longer_lags() -> None:
    reports = [
        simulate_lag(RATE, replace(FLEET, failures_per_day=failures, restart_s=restart_s))
        for failures, restart_s in ((0.0, 600.0), (4.0, 600.0), (40.0, 600.0), (40.0, 3600.0))
    ]
    for name in ("p99_s", "longest_s"):
        values = [getattr(report, name) for report in reports]
        assert values == sorted(values) and values[-1] > 2 * values[0]
    assert [report.failed_longest_s > 600 for report in reports] == [True] * 4
    assert reports[3].failed_longest_s > 3600


def test_a_fleet_that_cannot_catch_up_says_so() -> None:
    """Busy 90 % of the time: after an hour with 16 times the events, the backlog needs days."""
    busy = replace(FLEET, seconds=lambda num_events: 0.9 / 25 * num_events)
    lag = simulate_lag(replace(RATE, peak=1.0), busy, burst=16, burst_s=3600)
    assert lag.caught_up_s is None and lag.longest_s > 12 * 3600
