"""The processor's name and the cores that a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import run_python
from vista.machine import cpu_name, usable_cores


def test_cores_are_those_on_which_the_process_may_run() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system cannot bind a process to cores")
    own = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{own}}})\nfrom vista.machine import usable_cores; print(usable_cores())"
    )
    assert run_python(code).stdout == "1\n"


def test_the_name_is_that_of_linux() -> None:
    name, path = cpu_name(), Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    assert (name is None) == ("\nmodel name" not in text)
    assert name is None or (name and f": {name}\n" in text)
