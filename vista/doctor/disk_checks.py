"""The disks of stores, models, and logs: free space, kind of file system, and speed of fsync."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from vista.config.serve_config import DoctorConfig
from vista.doctor.file_system import existing_folder, file_system_of, median_sync_s
from vista.doctor.finding import Finding
from vista.doctor.verdict import Verdict
from vista.planning.plan_text import duration, size

NETWORK = ("9p", "afs", "ceph", "cifs", "glusterfs", "lustre", "ncpfs", "nfs", "nfs4", "smb3", "smbfs")
NETWORK_FUSE = ("fuse.ceph", "fuse.gcsfuse", "fuse.glusterfs", "fuse.goofys", "fuse.rclone", "fuse.s3fs", "fuse.sshfs")
"""Kinds of file systems on which LMDB's locks or maps do not work, at least not between machines."""
LEAST_FREE_BYTES = 1e9
SLOW_SYNC_S = 0.01
PUBLISH_SYNCS = 25
"""Writes for which a full refresh of one batch waits until its generation is published: 23 with states, counted."""
BATCH_SYNCS = 4
"""Writes for which each batch waits: two per LMDB transaction, of states and of records."""


def check_disks(config: DoctorConfig) -> Iterator[Finding]:
    """Every disk that a command would use: of the store, the model, the log, and the working directory."""
    paths = {"store": config.store, "log": config.data, "model": config.model, "working directory": "."}
    names: dict[int, tuple[Path, list[str]]] = {}
    for name, path in paths.items():
        if path is not None and not _is_url(path):
            folder = existing_folder(Path(path))
            names.setdefault(folder.stat().st_dev, (folder, []))[1].append(name)
    for folder, used_by in names.values():
        yield from check_disk(folder, used_by)


def _is_url(path: str) -> bool:
    from vista.store.remote.store_url import StoreUrl  # needs torch, which may be what is missing

    return path != "." and StoreUrl.matches(path)


def check_disk(folder: Path, used_by: list[str]) -> Iterator[Finding]:
    """One disk.

    Args:
        folder: a folder on it.
        used_by: what is on it; a "store" needs a file system on which LMDB works.
    """
    yield Finding("disk", f"{folder} ({', '.join(used_by)})")
    yield space_finding(shutil.disk_usage(folder).free)
    yield kind_finding(file_system_of(folder), has_store="store" in used_by)
    try:
        yield sync_finding(median_sync_s(folder))
    except OSError as error:
        advice = f"{folder}: {error.strerror}; refresh, train, and prepare cannot write here, but serving can read"
        yield Finding("fsync", "not measured", Verdict.limited, advice)


def space_finding(free_bytes: float) -> Finding:
    """Judge the free space."""
    if free_bytes >= LEAST_FREE_BYTES:
        return Finding("free", size(free_bytes))
    advice = "a full refresh writes a second generation before it removes the first; free some space"
    return Finding("free", size(free_bytes), Verdict.limited, advice)


def kind_finding(kind: str | None, *, has_store: bool) -> Finding:
    """Judge the kind of a file system. A store on a network file system is broken."""
    name = "file system"
    if kind is None:
        return Finding(name, "unknown")
    if kind in NETWORK or kind in NETWORK_FUSE:
        advice = (
            f"LMDB does not work on {kind}: keep stores on a local disk, and copy them between machines with "
            "`vista store copy`; logs and models may stay here"
        )
        return Finding(name, kind, Verdict.broken if has_store else Verdict.limited, advice)
    if kind == "overlay":
        advice = "files here are lost with the container; mount a volume for stores, logs, and runs"
        return Finding(name, kind, Verdict.limited, advice)
    if kind in ("tmpfs", "ramfs"):
        advice = "files are in memory, and are lost when the machine restarts; keep stores, logs, and runs on a disk"
        return Finding(name, kind, Verdict.limited, advice)
    return Finding(name, kind)


def sync_finding(median_s: float) -> Finding:
    """Judge the time of a durable write."""
    wait = f"{duration(BATCH_SYNCS * median_s)} per batch of a refresh, {duration(PUBLISH_SYNCS * median_s)} to publish"
    value = f"{duration(median_s)} for 4 KiB; about {wait}"
    if median_s < SLOW_SYNC_S:
        return Finding("fsync", value)
    advice = (
        "each batch of a refresh, each append to a log, and each publication waits for it; use a local SSD, or larger "
        "and fewer refreshes"
    )
    return Finding("fsync", value, Verdict.limited, advice)
