"""Limits of this process: open files, maps, and address space."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

from vista.config.serve_config import DoctorConfig
from vista.doctor.finding import Finding
from vista.doctor.verdict import Verdict
from vista.planning.plan_text import size

LEAST_OPEN_FILES = 1024
_MAPS = Path("/proc/sys/vm/max_map_count")


def check_limits(config: DoctorConfig) -> Iterator[Finding]:
    """What the system allows this process, compared with the files of the log if there is one."""
    num_files = 0
    if config.data is not None:
        num_files = sum(1 for path in Path(config.data).glob("segment-*/**/*") if path.is_file())
    yield open_files_finding(resource.getrlimit(resource.RLIMIT_NOFILE)[0], num_files)
    if _MAPS.exists():
        yield maps_finding(int(_MAPS.read_text()), num_files)
    yield address_space_finding(resource.getrlimit(resource.RLIMIT_AS)[0])


def open_files_finding(most: int, num_files: int) -> Finding:
    """Judge `ulimit -n`: an open log keeps the files of its segments open."""
    name, value = "open files", "unlimited" if most == resource.RLIM_INFINITY else f"at most {most:,}"
    if most == resource.RLIM_INFINITY or (most >= LEAST_OPEN_FILES and 2 * num_files < most):
        return Finding(name, value)
    needs = (
        f"the log has {num_files:,} files, which stay open" if num_files else "connections and segments need open files"
    )
    advice = f"{needs}; raise it (ulimit -n {max(2 * num_files, 65_536)})" + (
        ", or run `vista log compact`" if num_files else ""
    )
    return Finding(name, value, Verdict.limited, advice)


def maps_finding(most: int, num_files: int) -> Finding:
    """Judge vm.max_map_count: an open log maps the files of its segments into memory."""
    if 2 * num_files < most:
        return Finding("memory maps", f"at most {most:,}")
    advice = (
        f"the log has {num_files:,} files to map; run `vista log compact`, or raise it "
        f"(sysctl vm.max_map_count={4 * num_files})"
    )
    return Finding("memory maps", f"at most {most:,}", Verdict.limited, advice)


def address_space_finding(most_bytes: int) -> Finding:
    """Judge `ulimit -v`: a store reserves address space that it does not use."""
    if most_bytes == resource.RLIM_INFINITY:
        return Finding("address space", "unlimited")
    from vista.store.lmdb.data_file import MAP_SIZE_BYTES  # needs LMDB, which may be what is missing

    if most_bytes > 2 * MAP_SIZE_BYTES:
        return Finding("address space", size(most_bytes))
    advice = "stores cannot reserve address space to grow, so large ones cannot be written; run `ulimit -v unlimited`"
    return Finding("address space", size(most_bytes), Verdict.limited, advice)
