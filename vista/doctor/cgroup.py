"""Limits of the control group that this process is in, such as those of a container (Linux)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 60
"""Version 1 writes a number near 2^63 for no limit."""


def cpu_quota(root: Path = _ROOT, own: Path = _OWN) -> float | None:
    """Cores' worth of time that the group may use; None without a limit."""
    quotas = []
    for folder in _folders(root, own, "cpu"):
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
            quotas += [] if quota == "max" else [int(quota) / int(period)]
        elif (folder / "cpu.cfs_quota_us").exists():
            quota_us = int((folder / "cpu.cfs_quota_us").read_text())
            quotas += [] if quota_us < 0 else [quota_us / int((folder / "cpu.cfs_period_us").read_text())]
    return min(quotas, default=None)


def memory_limit_bytes(root: Path = _ROOT, own: Path = _OWN) -> int | None:
    """Memory that the group may use; None without a limit."""
    limits = []
    for folder in _folders(root, own, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = (folder / name).read_text().strip() if (folder / name).exists() else "max"
            limits += [] if text == "max" or int(text) >= _NO_LIMIT else [int(text)]
    return min(limits, default=None)


def _folders(root: Path, own: Path, controller: str) -> Iterator[Path]:
    """Folders of the group and of all groups above it, each of which may set a limit."""
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root  # Version 1 has a folder per controller.
        group = Path(path.lstrip("/"))
        yield from (top / part for part in (group, *group.parents))
