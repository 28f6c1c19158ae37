"""Outcomes of many small faults in child processes, for tests that try the same thing with thousands of faults."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

from tests.faults.harness import Trial
from tests.faults.nursery import Nursery
from vista.errors import VistaError, shortened

LOST, DUPLICATED, STUCK, UNTYPED, SIGNAL, DIFFERENT, MEMORY, TIME = (
    *("lost", "duplicated", "stuck", "untyped", "signal", "silently different", "over 1 GiB", "over 10 s"),
)
BROKEN = (LOST, DUPLICATED, STUCK, UNTYPED, SIGNAL, DIFFERENT, MEMORY, TIME)
"""Outcomes that break a promise: what was acknowledged is lost, or is there twice; the command cannot be repeated; an
exception that is neither a VistaError nor documented; the process was ended by a signal; a wrong answer; and the two
limits."""
MAX_TEXT = 1_500
MAX_MESSAGE = 10_000
"""Characters of the message of an exception."""


def outcomes(
    nursery: Nursery, job: Callable[..., None], *arguments: Any, numbers: list[int], timeout_s: float
) -> Iterator[tuple[int, str, str]]:
    """Call `job(say, *arguments, numbers)` in a child. It says [outcome, text] for each number.

    Where the child is ended by a signal, another one does the rest.

    Yields:
        Number, outcome and text.
    """
    left = list(numbers)
    while left:
        child = nursery.start(job, *arguments, left).end(timeout_s)
        assert not child.raised, child.raised
        for outcome, text in child.messages:
            yield left.pop(0), outcome, text
        if child.exit_code == 0:
            assert not left, f"no outcome of {left}"
        elif left:
            timed_out = child.exit_code == -signal.SIGALRM
            yield left.pop(0), TIME if timed_out else SIGNAL, f"exit code {child.exit_code}"


def attempt(action: Callable[[], Any], *documented: type[BaseException]) -> tuple[str | None, str, Any]:
    """Do something that a fault may make fail.

    Args:
        documented: exceptions that are allowed besides VistaError.

    Returns:
        The outcome, None if nothing was raised; a text if it breaks a promise; and what the action returned.
    """
    try:
        return None, "", action()
    except (VistaError, *documented) as error:
        length = len(str(error))
        if length < MAX_MESSAGE:
            return "refused", "", None
        return UNTYPED, f"a message of {length} characters", None
    except MemoryError as error:
        return MEMORY, str(error), None
    except BaseException as error:  # Panics of Rust derive from BaseException
        return UNTYPED, f"{type(error).__module__}.{type(error).__name__}: {shortened(str(error), 300)}", None


def judge(trial: Trial, judged: Iterator[tuple[int, str, str]]) -> None:
    """Count all outcomes of a trial, and fail if any of them breaks a promise."""
    failures = []
    for number, outcome, text in judged:
        trial.count(outcome)
        if outcome in BROKEN:
            failures.append(f"{number} {outcome}: {text}")
            trial.broken = number if trial.broken is None else trial.broken
    assert not failures, f"{len(failures)} of {len(trial.numbers)}: " + "; ".join(failures)
