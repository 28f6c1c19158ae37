"""The processor of this machine, and the number of cores that this process may use."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from pathlib import Path

from vista.errors import ConfigError


def cpu_name() -> str | None:
    """The processor's name according to Linux; None on other systems, and if Linux does not report it, as on Arm."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def usable_cores() -> int:
    """The number of cores on which this process may run (`taskset`), or of all cores if the system cannot tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# The sockets on which the service listens.


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


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine can connect to a socket."""
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback
