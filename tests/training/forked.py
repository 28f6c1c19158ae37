"""Processes that are forked from a server that has imported torch and vista already, which takes seconds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any


def forked(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a function of a module. The server has no threads, unlike the process of the tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.ranks_of_run"])
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def run_in_fork(function: Callable[..., None], *arguments: Any, timeout_s: float = 240) -> None:
    """Run a function of a module to its end."""
    process = forked(function, *arguments)
    process.join(timeout_s)
    process.kill()
    process.join()
    assert process.exitcode == 0, process.exitcode
