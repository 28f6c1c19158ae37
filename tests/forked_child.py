"""Calls a function in a forked child.

It does not use `multiprocessing.Pool`, whose parent waits forever for a child that died or hangs.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest

TIMEOUT_S = 60.0


def in_child(function: Callable[[], Any]) -> Any:
    """Result of a function in a forked child; its exception is raised here. A child that hangs is killed."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def call() -> None:
        try:
            sender.send((function(), None))
        except BaseException as error:
            sender.send((None, error))

    child = fork.Process(target=call)
    child.start()
    sender.close()
    try:
        if not receiver.poll(TIMEOUT_S):
            pytest.fail("the child hangs")
        try:
            result, error = receiver.recv()
        except EOFError:
            child.join(TIMEOUT_S)
            pytest.fail(f"the child died with exit code {child.exitcode}")
        child.join(TIMEOUT_S)
    finally:
        child.kill()
        child.join()
    if error is not None:
        raise error
    return result
