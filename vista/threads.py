"""How many CPU threads, why, and how they wait for one another. Importing this module does not load torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vista.machine import cpu_quota, usable_cores

NUM_THREADS = "OMP_NUM_THREADS"
WAIT_POLICY = "OMP_WAIT_POLICY"
ACTIVATIONS_PER_THREAD = 1 << 16
"""Smallest share of a thread in the activations [tokens, dim] of a batch. torch splits elementwise operators into
shares of at least 32,768. A second thread takes 16 % off the critical path of a training step of 131,072 activations
and 5 to 10 % off one of 65,536, but adds 12 to 20 % to smaller ones (docs/research-log.md)."""

_from_user = NUM_THREADS in os.environ
_spins = False
_number: int | None = None
"""Threads that were chosen in this process; None if none were."""


def prepare_openmp() -> None:
    """Set how OpenMP's threads wait and, under a quota, how many there are: here and in processes started from here.

    OpenMP reads these variables when it is loaded, so this must run before torch is imported. A variable that is
    already set stays. By default, threads that have finished their share of an operator spin for milliseconds, because
    the next operator may come soon. If other processes use the cores too, this spinning takes the time of the thread
    that still has work. libgomp, which torch's wheels for Linux bring, then needs no other variable to let them sleep.
    """
    global _spins
    _spins = "torch" in sys.modules and WAIT_POLICY not in os.environ
    os.environ.setdefault(WAIT_POLICY, "passive")
    if (quota := _threads_of_quota()) is not None:
        os.environ.setdefault(NUM_THREADS, str(quota))


@dataclass(frozen=True, slots=True)
class ThreadChoice:
    """A number of threads, and why it was chosen."""

    number: int
    reason: str

    def __str__(self) -> str:
        if self.number == 1:
            return f"1 thread ({self.reason})"
        return f"{self.number} threads ({self.reason}, {waiting()})"


def choose_threads(asked: int, most: int, activations: int | None = None) -> ThreadChoice:
    """How many threads compute, and why.

    Args:
        asked: the setting num_threads; 0 leaves the choice to this function.
        most: number of torch's threads, `torch.get_num_threads()`; this function does not raise it.
        activations: size of the work, elements of a batch's [tokens, dim]; None if it is large.
    """
    if asked > 0:
        return ThreadChoice(asked, "num_threads")
    if _from_user:
        return ThreadChoice(most, f"{NUM_THREADS}={os.environ.get(NUM_THREADS, '')}")
    number, reason = most, "one per core" if most == usable_cores() else "torch's setting"
    quota = _threads_of_quota()
    if quota is not None and quota <= most:
        number, reason = quota, f"a quota of {cpu_quota():g} cores"
    if activations is not None and activations // ACTIVATIONS_PER_THREAD < number:
        number = max(activations // ACTIVATIONS_PER_THREAD, 1)
        reason = f"batches of {activations:,} activations are small" if number < most else reason
    return ThreadChoice(number, reason)


def num_threads() -> int:
    """Threads that compute scores: torch's if it is loaded, otherwise as many as it would take."""
    if (torch := sys.modules.get("torch")) is not None:
        number: int = torch.get_num_threads()
        return number
    if _number is not None:
        return _number
    asked = os.environ.get(NUM_THREADS, "")
    return int(asked) if asked.isdecimal() and int(asked) else usable_cores()


def set_num_threads(number: int) -> None:
    """Set what `num_threads` gives, also for torch: now if it is loaded, else when `adopt_num_threads` is called."""
    global _number
    _number = number
    adopt_num_threads()


def adopt_num_threads() -> None:
    """Give torch the number of threads that was chosen before it was loaded, if one was."""
    if _number is not None and (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(_number)


@contextmanager
def thread_settings(asked: int) -> Iterator[ThreadChoice]:
    """Choose the number of threads in a block, and restore it afterwards, since the process belongs to the caller."""
    global _number
    before, number = num_threads(), _number
    chosen = choose_threads(asked, before)
    try:
        set_num_threads(chosen.number)
        yield chosen
    finally:
        set_num_threads(before)
        _number = number  # a torch that is loaded later is the caller's


def waiting() -> str:
    """What threads do while they wait for others."""
    if _spins:
        return "idle ones spin: torch was imported before vista"
    policy = os.environ.get(WAIT_POLICY, "")
    return "idle ones sleep" if policy.lower() == "passive" else f"{WAIT_POLICY}={policy}"


def _threads_of_quota() -> int | None:
    """Whole cores of this process's CPU quota, at least 1; None if the quota does not restrict it."""
    quota = cpu_quota()
    return None if quota is None or quota >= usable_cores() else max(int(quota), 1)
