"""Memory of the machine and of the control group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vista.config.serve_config import DoctorConfig
from vista.doctor.cgroup import memory_limit_bytes
from vista.doctor.finding import Finding
from vista.doctor.verdict import Verdict
from vista.planning.plan_text import size

LEAST_BYTES = 2e9
"""Training on a small log takes more than half of this."""


def check_memory(config: DoctorConfig) -> Iterator[Finding]:
    """Judge the available memory and the limit of the control group."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = memory_limit_bytes()
    free = free_bytes()
    yield Finding("memory", size(total) + ("" if free is None else f", {size(free)} available"))
    yield Finding("limit", "none" if limit is None else f"{size(limit)} (cgroup)")
    usable = min(value for value in (total, limit, free) if value is not None)
    if usable < LEAST_BYTES:
        yield Finding(
            "usable memory",
            size(usable),
            Verdict.limited,
            "the system may kill a training run, and reads of a larger log or store wait for the disk; stop other "
            "processes, or raise the container's limit",
        )


def free_bytes() -> int | None:
    """Memory that new processes can use, including caches that the system gives up; None if the system does not say."""
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
