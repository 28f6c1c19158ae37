"""What a check found."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path

from vista.config.serve_config import DoctorConfig
from vista.machine import cpu_name, usable_cores


class Verdict(Enum):
    """What a finding means."""

    fine = "fine"
    limited = "limited"
    """Something works, but slowly or only up to a limit."""
    broken = "broken"
    """Something does not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a diagnosis."""

    name: str
    value: str
    verdict: Verdict = Verdict.fine
    advice: str = ""
    """What it means and what to do; empty if it is fine."""


# Limits of the control group that this process is in, such as those of a container (Linux).

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


# What a folder's file system is, how much space it has, and how long it takes to make a write durable.

WRITE_BYTES = 4096
NUM_WRITES = 50
MOST_S = 1.0
"""Time after which no further write is made, so that a slow disk does not delay the diagnosis."""
_MOUNTS = Path("/proc/self/mountinfo")


def existing_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists; a file's is the one that holds it."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def file_system_of(folder: Path, mounts: Path = _MOUNTS) -> str | None:
    """Kind of the file system that a folder is on, such as ext4 or nfs4; None if the system does not say."""
    place, best, kind = folder.resolve(), -1, None
    for line in mounts.read_text(encoding="utf-8").splitlines() if mounts.exists() else []:
        before, _, after = line.partition(" - ")
        mount = Path(before.split()[4].replace(r"\040", " "))
        # Of mounts on one place, the last one hides the others.
        if place.is_relative_to(mount) and len(mount.parts) >= best:
            best, kind = len(mount.parts), after.split()[0]
    return kind


def sync_seconds(folder: Path) -> list[float]:
    """Times of writes of 4 KiB with fsync, one after another, to a file without a name.

    Raises:
        OSError: nothing can be written there.
    """
    times: list[float] = []
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        while len(times) < NUM_WRITES and sum(times) < MOST_S:
            start = time.perf_counter()
            file.write(bytes(WRITE_BYTES))
            os.fsync(file.fileno())
            times.append(time.perf_counter() - start)
    return times


def median_sync_s(folder: Path) -> float:
    """Median of `sync_seconds`."""
    return statistics.median(sync_seconds(folder))


# The disks of stores, models, and logs: free space, kind of file system, and speed of fsync.

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
    from vista.store.store_url import StoreUrl  # needs torch, which may be what is missing

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
    from vista.text_table import size

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
    from vista.text_table import duration

    wait = f"{duration(BATCH_SYNCS * median_s)} per batch of a refresh, {duration(PUBLISH_SYNCS * median_s)} to publish"
    value = f"{duration(median_s)} for 4 KiB; about {wait}"
    if median_s < SLOW_SYNC_S:
        return Finding("fsync", value)
    advice = (
        "each batch of a refresh, each append to a log, and each publication waits for it; use a local SSD, or larger "
        "and fewer refreshes"
    )
    return Finding("fsync", value, Verdict.limited, advice)


_DRIVER = Path("/proc/driver/nvidia/version")
_DEVICES = (Path("/dev/nvidia0"), Path("/dev/kfd"))
"""Devices of NVIDIA's and AMD's drivers."""


def check_gpus(config: DoctorConfig) -> Iterator[Finding]:
    """torch's build, the driver, and every GPU that torch sees."""
    import torch

    from vista.text_table import size

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else ""
    build = build or (f"ROCm {torch.version.hip}" if torch.version.hip else "")
    yield Finding("torch build", build or "for the CPU only")
    if _DRIVER.exists():
        yield Finding("driver", _DRIVER.read_text(encoding="utf-8").splitlines()[0].removeprefix("NVRM version: "))
    has_device = any(device.exists() for device in _DEVICES) or shutil.which("nvidia-smi") is not None
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(number)
            capability = f"compute capability {gpu.major}.{gpu.minor}"
            yield Finding(f"cuda:{number}", f"{gpu.name}, {size(gpu.total_memory)}, {capability}")
        if find_spec("triton") is None:
            advice = "vista's kernels on GPUs need Triton: pip install triton, or set device=cpu"
            yield Finding("triton", "missing", Verdict.broken, advice)
    elif has_device and build:
        advice = "torch cannot use the GPU; compare the driver with torch's build (nvidia-smi, or rocminfo)"
        yield Finding("GPU", "there is one, but torch does not see it", Verdict.limited, advice)
    elif has_device:
        advice = "torch's build for CPUs does not use the GPU; install a build for GPUs (https://pytorch.org)"
        yield Finding("GPU", "there is one, but torch cannot use it", Verdict.limited, advice)
    else:
        yield Finding("GPU", "none; device=auto is the CPU")


# Memory of the machine and of the control group.

LEAST_BYTES = 2e9
"""Training on a small log takes more than half of this."""


def check_memory(config: DoctorConfig) -> Iterator[Finding]:
    """Judge the available memory and the limit of the control group."""
    from vista.text_table import size

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


# Limits of this process: open files, maps, and address space.

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
    from vista.text_table import size

    if most_bytes == resource.RLIM_INFINITY:
        return Finding("address space", "unlimited")
    from vista.store.lmdb_environment import MAP_SIZE_BYTES  # needs LMDB, which may be what is missing

    if most_bytes > 2 * MAP_SIZE_BYTES:
        return Finding("address space", size(most_bytes))
    advice = "stores cannot reserve address space to grow, so large ones cannot be written; run `ulimit -v unlimited`"
    return Finding("address space", size(most_bytes), Verdict.limited, advice)


# The processor, the cores that this process may use, and the threads that torch uses.

INSTRUCTIONS = ("avx2", "avx512_f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16", "i8mm")
"""Names in torch.cpu.get_capabilities of what matters for products of matrices, on x86 and on ARM."""


def check_processor(config: DoctorConfig) -> Iterator[Finding]:
    """Its name, its instructions, and what vista makes of them."""
    import torch

    from vista_kernels.processor import VARIABLE, processor

    capabilities = torch.cpu.get_capabilities()
    yield Finding("processor", cpu_name() or str(capabilities.get("cpu_name", platform.machine())))
    has = [name for name in INSTRUCTIONS if capabilities.get(name)]
    lacks = [name for name in ("avx2", "avx512_f") if name in capabilities and name not in has]
    yield Finding("instructions", ", ".join(has) or "none that matter")
    if "avx2" in lacks:
        yield Finding(
            "avx2", "missing", Verdict.limited, "matrix products are several times slower; use a newer processor"
        )
    chosen = processor()
    if os.environ.get(VARIABLE):
        yield Finding(
            VARIABLE,
            os.environ[VARIABLE],
            Verdict.limited,
            f"vista imitates another processor, which can be slow; unset {VARIABLE} unless this is a test",
        )
    if chosen.multiplies_bfloat16:
        yield Finding("precision=auto", f"bfloat16 ({chosen.name})")
    else:
        yield Finding(
            "precision=auto",
            f"float32 ({chosen.name})",
            Verdict.limited,
            "without AMX or AMD's avx512_bf16, matrix products use float32, 2 to 7 times slower than bfloat16; "
            "train and refresh wide models on a processor that has one of them",
        )


def check_threads(config: DoctorConfig) -> Iterator[Finding]:
    """Cores that this process may use, and torch's threads."""
    import torch

    cores, quota = usable_cores(), cpu_quota()
    yield Finding("cores", f"{cores} of {os.cpu_count() or cores}")
    yield Finding("quota", "none" if quota is None else f"{quota:g} cores (cgroup)")
    yield Finding("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "not set"))
    yield thread_finding(torch.get_num_threads(), cores if quota is None else min(cores, quota))


def thread_finding(threads: int, cores: float) -> Finding:
    """Compare torch's threads with the cores that this process may use; `cores` need not be whole."""
    most = max(1, int(cores))
    remedy = f"set OMP_NUM_THREADS={most}, or num_threads={most} of a command"
    if threads > cores and threads > 1:
        advice = f"{threads} threads share {cores:g} cores and wait for one another; {remedy}"
        return Finding("torch threads", str(threads), Verdict.limited, advice)
    if 2 * threads <= cores:
        advice = f"training and refresh use {threads} of {most} cores; {remedy}"
        return Finding("torch threads", str(threads), Verdict.limited, advice)
    if most == 1:
        advice = "training and refresh use one core, and vista serve one worker; use a machine with more cores"
        return Finding("torch threads", str(threads), Verdict.limited, advice)
    return Finding("torch threads", str(threads))
