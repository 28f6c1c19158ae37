"""Timing of several calls in alternation."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call of one contestant, over the rounds."""

    median_s: float
    p99_s: float
    spread_s: float
    """Interquartile range."""
    samples_s: tuple[float, ...]


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    warmup: int = 2,
    min_sample_s: float = 0.005,
    max_seconds: float = 60.0,
    synchronize: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time contestants in alternation, so that a slow phase of the machine affects all of them.

    Each round runs every contestant once and reverses the order of the previous round. A contestant faster than
    min_sample_s is called several times per sample, so its p99 is one of means. The garbage collector is off meanwhile.

    Args:
        contestants: name -> call.
        rounds: samples per contestant; fewer, but at least 3, once max_seconds have passed.
        warmup: uncounted calls of each contestant beforehand, at least 1.
        synchronize: waits for the device, such as torch.cuda.synchronize; called before each reading of the clock.
        clock: in seconds; time.thread_time for calls of one thread on a machine that others use too.
    """
    wait = synchronize or (lambda: None)
    calls: dict[str, int] = {}
    for name, call in contestants.items():
        fastest = min(_sample(call, 1, wait, clock) for _ in range(warmup))
        calls[name] = max(1, math.ceil(min_sample_s / max(fastest, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    collecting, start = gc.isenabled(), time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for done in range(rounds):
            if done >= 3 and time.perf_counter() - start > max_seconds:
                break
            for name in order:
                samples[name].append(_sample(contestants[name], calls[name], wait, clock))
            order.reverse()
    finally:
        if collecting:
            gc.enable()
    return {name: timing_of(values) for name, values in samples.items()}


def timing_of(samples_s: Sequence[float]) -> Timing:
    """Median, 99th percentile and interquartile range of samples that were taken elsewhere, such as epochs."""
    low, median, high, p99 = np.percentile(samples_s, [25, 50, 75, 99]).tolist()
    return Timing(median, p99, high - low, tuple(samples_s))


def _sample(call: Callable[[], object], calls: int, wait: Callable[[], object], clock: Callable[[], float]) -> float:
    wait()
    start = clock()
    for _ in range(calls):
        call()
    wait()
    return (clock() - start) / calls
