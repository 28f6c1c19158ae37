"""The processor and the memory of this machine, what this process may use of them, and sockets to listen on."""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from vista.errors import ConfigError

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 60
"""Version 1 writes a number near 2^63 for no limit."""


def cpu_name() -> str | None:
    """The processor's name according to Linux; None on other systems, and if Linux does not report it, as on Arm."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def usable_cores() -> int:
    """The number of cores on which this process may run (`taskset`), or of all cores if the system cannot tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_bytes() -> int | None:
    """Memory that new processes can use, including caches that the system gives up; None if the system does not say."""
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def private_bytes() -> int:
    """Resident memory of this process, without mapped files; 0 if the system does not say, or no file can be opened."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def cpu_quota(root: Path = _ROOT, own: Path = _OWN) -> float | None:
    """Cores' worth of time that this process's control group may use (Linux); None without a limit."""
    quotas = []
    for folder in _control_groups(root, own, "cpu"):
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
            quotas += [] if quota == "max" else [int(quota) / int(period)]
        elif (folder / "cpu.cfs_quota_us").exists():
            quota_us = int((folder / "cpu.cfs_quota_us").read_text())
            quotas += [] if quota_us < 0 else [quota_us / int((folder / "cpu.cfs_period_us").read_text())]
    return min(quotas, default=None)


def memory_limit_bytes(root: Path = _ROOT, own: Path = _OWN) -> int | None:
    """Memory that this process's control group may use (Linux); None without a limit."""
    limits = []
    for folder in _control_groups(root, own, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = (folder / name).read_text().strip() if (folder / name).exists() else "max"
            limits += [] if text == "max" or int(text) >= _NO_LIMIT else [int(text)]
    return min(limits, default=None)


def _control_groups(root: Path, own: Path, controller: str) -> Iterator[Path]:
    """Folders of the group and of all groups above it, each of which may set a limit."""
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root  # Version 1 has a folder per controller.
        group = Path(path.lstrip("/"))
        yield from (top / part for part in (group, *group.parents))


def bound_socket(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A socket that is bound to an address; it does not listen yet, so no client connects too early.

    Args:
        host: address of this machine.
        port: 0 for any free one.
        shared: whether further sockets of this user may be bound to the address; the kernel distributes connections
            among those that listen.

    Raises:
        ConfigError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(
            f"host: {host} is not an address of this machine ({error.strerror}); use 127.0.0.1, or 0.0.0.0 for all "
            "addresses"
        ) from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        key = "host" if error.errno == errno.EADDRNOTAVAIL else "port"
        raise ConfigError(
            f"{key}: cannot listen on {host}:{port} ({error.strerror}); choose another {key}, or end the process that "
            "uses it"
        ) from error
    return bound


LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:[0-9]*)?")


def names_host(header: bytes, hosts: Sequence[str] = LOCAL_HOSTS) -> bool:
    """Whether the value of the header Host is one of some names, with any port; IPv6 addresses are in brackets.

    A service that relies on its address, because only this machine can reach it, must check this: a browser of this
    machine also shows web pages of others. If the name of such a page resolves to this machine (DNS rebinding), the
    page may read the answers, and only the header Host, which every browser sends, tells its requests from others.
    """
    found = _HOST.fullmatch(header.decode("latin-1").lower())
    return found is not None and found[1] in hosts


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine can connect to a socket."""
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


_GPU_FILES = "/dev/nvidiactl", "/dev/nvmap", "/dev/kfd", "/dev/dxg"
"""Of NVIDIA's drivers, also on Tegra, of ROCm, and of WSL."""


def may_have_gpu() -> bool:
    """Whether torch could find a GPU: not where no driver has made a device file. Asking torch takes a second."""
    return os.name == "nt" or any(map(os.path.exists, _GPU_FILES))


LARGEST_ADAPTED_BYTES = (32 << 20) - (64 << 10)
"""Just under the largest block that glibc's thresholds adapt to (DEFAULT_MMAP_THRESHOLD_MAX)."""


def reuse_freed_memory() -> None:
    """Let glibc keep about 64 MB of freed memory for later tensors. Without glibc this does nothing.

    glibc returns large blocks to the system until a block of that size has been freed once; from then on it keeps
    twice as much. This frees the largest block that glibc adapts to, whose pages are never touched. Without it, a
    request pays a page fault for every 4 KB of its buffers. Unlike `vista.device.keep_freed_memory`, this suits a
    process that belongs to the caller.
    """
    library = ctypes.CDLL(None)
    library.malloc.argtypes, library.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    library.free.argtypes = [ctypes.c_void_p]
    library.free(library.malloc(LARGEST_ADAPTED_BYTES))
