"""The processor of this machine, and the number of cores that this process may use."""

from __future__ import annotations

import os
from pathlib import Path


def cpu_name() -> str | None:
    """The processor's name according to Linux; None on other systems, and if Linux does not report it, as on Arm."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def usable_cores() -> int:
    """The number of cores on which this process may run (`taskset`), or of all cores if the system cannot tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
