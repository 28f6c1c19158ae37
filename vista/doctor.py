"""`vista doctor`: whether a machine has what vista needs, and what will be slow, with a fix for each problem.

Each check yields findings on one subject. It imports what it needs when it runs, because that may be missing. The
contents of files are not read, which takes long: `vista log verify` and `vista store verify` do that.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vista.config.checks import Mixing, StateDtype
from vista.config.model_config import ModelConfig
from vista.config.serve_config import DoctorConfig
from vista.errors import CheckpointError, VistaError
from vista.installation import DISTRIBUTION, __version__, install_command
from vista.machine import cpu_name, cpu_quota, free_bytes, memory_limit_bytes, usable_cores
from vista.text_table import duration, size
from vista.threads import ThreadChoice, choose_threads

if TYPE_CHECKING:
    from vista.store.layout import StoreUrl
    from vista.store.manifest import Manifest


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


def _judged(name: str, value: str, is_fine: bool, advice: str) -> Finding:
    """A finding that is fine, or else limited."""
    return Finding(name, value) if is_fine else Finding(name, value, Verdict.limited, advice)


@dataclass(frozen=True, slots=True)
class Section:
    """The findings of a check."""

    title: str
    findings: list[Finding]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What all checks found."""

    sections: list[Section]

    def having(self, verdict: Verdict) -> list[Finding]:
        """The findings of a verdict, in order."""
        return [finding for section in self.sections for finding in section.findings if finding.verdict is verdict]


def diagnose(config: DoctorConfig) -> Diagnosis:
    """Run all checks. If one fails, its error is added to what it had found, and the others still run."""
    sections = []
    for title, check in CHECKS.items():
        found: list[Finding] = []
        try:
            for finding in check(config):
                found.append(finding)
        except VistaError as error:
            found.append(Finding(title.lower(), "cannot be used", Verdict.broken, str(error)))
        except Exception as error:
            advice = f"this check failed: {type(error).__name__}: {error}"
            if isinstance(error, ModuleNotFoundError):
                advice = f"this check needs {error.name}, which is not installed"
            found.append(Finding(title.lower(), "unknown", Verdict.broken, advice))
        if found:
            sections.append(Section(title, found))
    return Diagnosis(sections)


EXTRAS = {
    "data": "source tables and Parquet files",
    "serve": "vista serve",
    "faiss": "vista index, vista items tokenize",
    "kafka": "vista watch source=kafka://...",
    "redis": "stores on a Valkey or Redis server",
    "text": "vista items embed",
    "onnx": "vista export format=onnx",
    "ray": "vista refresh ray.num_actors=N",
    "baselines": "vista evaluate baselines=trained",
    "tensorboard": "vista train tracking=tensorboard",
    "mlflow": "vista train tracking=mlflow",
    "wandb": "vista train tracking=wandb",
    "optuna": "vista sweep trials=N",
    "explore": "vista explore",
    "plots": "charts of the research tables",
    "torchrec": "model.table=torchrec",
}
"""What each extra is for. Those for developers (dev, docs) are left out."""
COMPILERS = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
_MODULES = {
    "confluent-kafka": "confluent_kafka",
    "faiss-cpu": "faiss",
    "fbgemm-gpu-cpu": "fbgemm_gpu",
    "hydra-core": "hydra",
    "mlflow-skinny": "mlflow",
    "scikit-learn": "sklearn",
}
"""Module of a distribution whose name is not the module's."""


def module_of(name: str) -> str:
    """The module that a distribution installs."""
    return _MODULES.get(name, name.replace("-", "_"))


def check_core(config: DoctorConfig) -> Iterator[Finding]:
    """vista, Python, and every package that vista always needs, which are imported."""
    yield Finding("vista", f"{__version__} in {Path(__file__).parents[1]}")
    try:
        requires_python = distribution(DISTRIBUTION).metadata["Requires-Python"]
    except PackageNotFoundError:
        advice = f"{DISTRIBUTION} is not installed, so no version was compared; install it with: {install_command()}"
        yield Finding("installation", "none", Verdict.limited, advice)
        return
    required = SpecifierSet(requires_python)
    yield _compared("Python", platform.python_version(), required, "install vista with another one")
    for requirement in _requirements(""):
        yield _imported(requirement)


def check_extras(config: DoctorConfig) -> Iterator[Finding]:
    """The packages of each extra, which are only looked for, because importing all of them takes long."""
    for extra, purpose in EXTRAS.items():
        install = install_command(extra)
        versions, problems = [], []
        missing = 0
        own = _requirements(extra)
        for requirement in own:
            try:
                is_found = find_spec(module_of(requirement.name)) is not None
            except ModuleNotFoundError:
                is_found = False
            except (ImportError, ValueError) as error:
                problems.append(f"{requirement.name} cannot be found ({error})")
                continue
            if not is_found:
                missing += 1
                problems.append(f"{requirement.name} is missing")
                continue
            found = _version(requirement.name)
            versions.append(f"{requirement.name} {found or 'of unknown version'}")
            if found is not None and not requirement.specifier.contains(found, prereleases=True):
                problems.append(f"{requirement.name} {found} is not {requirement.specifier}")
        if missing == len(own):
            yield Finding(extra, f"not installed ({purpose}): {install}")
        elif problems:
            yield Finding(extra, "; ".join(problems), Verdict.limited, f"{purpose} may not work: {install}")
        else:
            yield Finding(extra, ", ".join(versions))
    compiler = next((path for name in COMPILERS if name and (path := shutil.which(name))), None)
    needs = "none; vista export format=aotinductor needs one, and so did the C++ library when vista was installed"
    yield Finding("C++ compiler", compiler or needs)


def _requirements(extra: str) -> list[Requirement]:
    """What an extra requires on this platform beyond the core, or with "" what the core does."""
    listed = [Requirement(line) for line in distribution(DISTRIBUTION).requires or []]
    core = [one for one in listed if one.marker is None or one.marker.evaluate({"extra": ""})]
    if not extra:
        return core
    names = {one.name for one in core}
    return [
        one
        for one in listed
        if one.marker is not None and one.name not in names and one.marker.evaluate({"extra": extra})
    ]


def _imported(requirement: Requirement) -> Finding:
    name = requirement.name
    install = f"pip install '{name}{requirement.specifier}'"
    try:
        import_module(module_of(name))
    except Exception as error:  # an OSError for a library that is missing, or whatever a broken package raises
        reason = f"{type(error).__name__}: {error}"
        return Finding(name, "cannot be imported", Verdict.broken, f"{reason}; {install}")
    return _compared(name, _version(name), requirement.specifier, install)


def _compared(name: str, found: str | None, required: SpecifierSet, remedy: str) -> Finding:
    if found is None:
        return Finding(name, f"of unknown version (requires {required})")
    if required.contains(found, prereleases=True):
        return Finding(name, f"{found} (requires {required})")
    return Finding(name, found, Verdict.broken, f"vista requires {required}: {remedy}")


def _version(name: str) -> str | None:
    """Version of an installed distribution; None if its files do not say, as after a build for another processor."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


MANY_SEGMENTS = 100


def check_log(config: DoctorConfig) -> Iterator[Finding]:
    """Segments, users, events, and bytes of the log if one is given.

    Times are left out, because they are spread over all of the file.

    Raises:
        LogFormatError: the log is missing, damaged, or of another format.
    """
    from vista.log.event_log import EventLog

    if config.data is None:
        return
    log = EventLog.open(config.data)
    yield Finding("log", config.data)
    yield Finding("content", f"{log.num_users:,} users, {log.num_items:,} items, {log.num_events:,} events")
    yield segments_finding(len(log.segments))
    files = (file for segment in log.segments for file in segment.path.rglob("*") if file.is_file())
    yield log_size_finding(sum(file.stat().st_size for file in files), free_bytes())


def segments_finding(number: int) -> Finding:
    """Judge the number of segments, over which the events of a user are spread."""
    advice = "each read of a history searches all of them; run `vista log compact`"
    return _judged("segments", str(number), number < MANY_SEGMENTS, advice)


def log_size_finding(num_bytes: int, memory_bytes: int | None) -> Finding:
    """Compare the log with the memory that could cache it."""
    advice = (
        f"only {size(memory_bytes or 0)} of memory are available to cache it, so training and full refreshes read the "
        "disk in every epoch: add memory, or train on a sample of the users"
    )
    return _judged("size", size(num_bytes), memory_bytes is None or num_bytes <= memory_bytes, advice)


def check_model(config: DoctorConfig) -> Iterator[Finding]:
    """Format, sizes, and summarizer of the model if one is given, without reading its weights. Raises CheckpointError
    if the model is missing or damaged, has another format, or lacks a file."""
    from vista.model.saved_model import FORMAT_VERSION, ModelDescription

    if config.model is None:
        return
    folder = Path(config.model)
    description = ModelDescription.read(folder)
    yield Finding("model", str(folder))
    yield Finding("format", str(FORMAT_VERSION))
    sizes = description.config
    seeds = f"{sizes.num_seeds} seeds, " if isinstance(sizes, ModelConfig) else ""
    shape = f"dim {sizes.dim}, {seeds}tails of {sizes.tail_len}"
    yield Finding("architecture", f"{sizes.architecture.value}, {shape}")
    for name, entry in description.files.items():
        path = folder / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != entry.bytes:
            state = "is missing" if actual is None else f"holds {actual} bytes instead of {entry.bytes}"
            raise CheckpointError(f"{path}: {state}; copy the model again, or export it again")
    num_bytes = sum(entry.bytes for entry in description.files.values())
    yield Finding("size", f"{size(num_bytes)} in {len(description.files)} files; contents are not checked here")
    yield Finding("trained items", f"{description.num_trained_items:,}")
    if description.summarizer_id is None:
        advice = f"{sizes.architecture.value} reads the raw history in each request, so it has no store"
        yield Finding("summarizer", "none", Verdict.limited, advice)
        return
    yield Finding("summarizer", description.summarizer_id)
    if sizes.mixing is Mixing.bidirectional:
        advice = (
            "an incremental refresh reads the complete history of each user with new events; train with "
            "model.mixing=separable to read only the new events"
        )
        yield Finding("mixing", sizes.mixing.value, Verdict.limited, advice)


def check_store(config: DoctorConfig) -> Iterator[Finding]:
    """Every shard of the store if one is given, or the store itself; compared with the model and the log if given.
    Raises StoreError or ConfigError if the store is missing, damaged, or cannot be reached."""
    from vista.store.layout import stores_in

    for root in [] if config.store is None else stores_in(config.store):
        yield from _check(root, config.model, config.data)


def _check(root: Path | StoreUrl, model: str | None, log: str | None) -> Iterator[Finding]:
    from vista.store.admin import store_stats

    yield Finding("store", str(root))
    stats = store_stats(root)
    published = next((one for one in stats.generations if one.number == stats.published), None)
    if published is None or published.manifest is None:
        problem = stats.problem if published is None else published.problem
        yield Finding("generation", "none can be served", Verdict.broken, problem)
        return
    manifest = published.manifest
    yield Finding(
        "generation",
        f"{manifest.generation}, {published.num_records:,} records, {manifest.codec} {manifest.num_tokens} x "
        f"{manifest.dim}, until {manifest.until or 'the end of the log'}",
    )
    yield age_finding(stats.now / 1000 - manifest.refreshed_at / 1000)
    if log is not None:
        yield coverage_finding(manifest, log)
    if isinstance(root, Path):
        yield size_finding(published.live_bytes, free_bytes())
    for one in stats.generations:
        if one.manifest is None:
            yield Finding(f"generation {one.number}", "damaged", Verdict.limited, one.problem)
        elif not one.complete:
            value = f"unfinished, {one.num_records:,} users done"
            advice = "a refresh was interrupted; rerun the same command to resume it"
            yield Finding(f"generation {one.number}", value, Verdict.limited, advice)
    if manifest.state_dtype == StateDtype.none.value:
        advice = "an incremental refresh reads complete histories; keep states (a full refresh with state=float32)"
        yield Finding("states", "none", Verdict.limited, advice)
    yield summarizer_finding(manifest, model)


def age_finding(age_s: float) -> Finding:
    """Judge the time since the last finished refresh, which a clock that is wrong makes negative."""
    if age_s < -_CLOCK_TOLERANCE_S:
        advice = (
            "the time of the refresh is in the future, so max_age_s does not work: synchronize the clocks of this "
            "machine and of the one that refreshes (NTP)"
        )
        return Finding("refreshed", f"in {duration(-age_s)}", Verdict.broken, advice)
    return Finding("refreshed", f"{duration(max(age_s, 0.0))} ago")


def coverage_finding(manifest: Manifest, log: str) -> Finding:
    """Whether a store covers all events of the log in a folder."""
    from vista.explore.user_page import Freshness, store_freshness
    from vista.log.event_log import EventLog

    found = store_freshness(manifest, EventLog.open(log))
    return _judged("covers", found.state.value.lower(), found.state is not Freshness.behind, found.reason)


def size_finding(live_bytes: int, memory_bytes: int | None) -> Finding:
    """Compare the records with the memory that could cache them."""
    advice = (
        f"only {size(memory_bytes or 0)} of memory are available to cache it, so requests of other users read the "
        "disk: add memory, divide the store (refresh shard=i/n), or refresh with codec=int4"
    )
    return _judged("size", f"{size(live_bytes)} in use", memory_bytes is None or live_bytes <= memory_bytes, advice)


def summarizer_finding(manifest: Manifest, model: str | None) -> Finding:
    """Compare the summarizer that wrote a store with a model's."""
    from vista.model.saved_model import ModelDescription

    name, wrote = "summarizer", manifest.summarizer_id
    if model is None:
        return Finding(name, f"{wrote} (pass model= to compare it)")
    try:
        own = ModelDescription.read(Path(model)).summarizer_id
    except CheckpointError:  # The model's own check reports it.
        return Finding(name, f"{wrote}; the model cannot be read, so it was not compared")
    if own == wrote:
        return Finding(name, "the model's")
    advice = (
        f"{wrote[:12]}… wrote the store, but the model's is {'none' if own is None else f'{own[:12]}…'}: name the "
        "model that wrote it, or run a full `vista refresh` with this one"
    )
    return Finding(name, "of another model", Verdict.broken, advice)


WRITE_BYTES = 4096
NUM_WRITES = 50
MOST_S = 1.0
"""Time after which no further write is made, so that a slow disk does not delay the diagnosis."""
_MOUNTS = Path("/proc/self/mountinfo")
_CLOCK_TOLERANCE_S = 60.0


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
    """Times of writes of 4 KiB with fsync, one after another, to a file without a name. Raises OSError if nothing can
    be written there."""
    times: list[float] = []
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        while len(times) < NUM_WRITES and sum(times) < MOST_S:
            start = time.perf_counter()
            file.write(bytes(WRITE_BYTES))
            os.fsync(file.fileno())
            times.append(time.perf_counter() - start)
    return times


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
    from vista.store.layout import StoreUrl  # needs packages, which may be what is missing

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
        yield sync_finding(statistics.median(sync_seconds(folder)))
    except OSError as error:
        advice = f"{folder}: {error.strerror}; refresh, train, and prepare cannot write here, but serving can read"
        yield Finding("fsync", "not measured", Verdict.limited, advice)


def space_finding(num_bytes: float) -> Finding:
    """Judge the free space."""
    advice = "a full refresh writes a second generation before it removes the first; free some space"
    return _judged("free", size(num_bytes), num_bytes >= LEAST_FREE_BYTES, advice)


def kind_finding(kind: str | None, *, has_store: bool) -> Finding:
    """Judge the kind of a file system. A store on a network file system is broken."""
    if kind in NETWORK or kind in NETWORK_FUSE:
        advice = (
            f"LMDB does not work on {kind}: keep stores on a local disk, and copy them between machines with "
            "`vista store copy`; logs and models may stay here"
        )
        return Finding("file system", str(kind), Verdict.broken if has_store else Verdict.limited, advice)
    advice = ""
    if kind == "overlay":
        advice = "files here are lost with the container; mount a volume for stores, logs, and runs"
    elif kind in ("tmpfs", "ramfs"):
        advice = "files are in memory, and are lost when the machine restarts; keep stores, logs, and runs on a disk"
    return _judged("file system", kind or "unknown", not advice, advice)


def sync_finding(median_s: float) -> Finding:
    """Judge the time of a durable write."""
    wait = f"{duration(BATCH_SYNCS * median_s)} per batch of a refresh, {duration(PUBLISH_SYNCS * median_s)} to publish"
    value = f"{duration(median_s)} for 4 KiB; about {wait}"
    advice = (
        "each batch of a refresh, each append to a log, and each publication waits for it; use a local SSD, or larger "
        "and fewer refreshes"
    )
    return _judged("fsync", value, median_s < SLOW_SYNC_S, advice)


_DRIVER = Path("/proc/driver/nvidia/version")
_DEVICES = (Path("/dev/nvidia0"), Path("/dev/kfd"))
"""Devices of NVIDIA's and AMD's drivers."""


def check_gpus(config: DoctorConfig) -> Iterator[Finding]:
    """torch's build, the driver, and every GPU that torch sees."""
    import torch

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
        advice = (
            "the system may kill a training run, and reads of a larger log or store wait for the disk; stop other "
            "processes, or raise the container's limit"
        )
        yield Finding("usable memory", size(usable), Verdict.limited, advice)


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
    is_unlimited = most == resource.RLIM_INFINITY
    is_fine = is_unlimited or (most >= LEAST_OPEN_FILES and 2 * num_files < most)
    needs = (
        f"the log has {num_files:,} files, which stay open" if num_files else "connections and segments need open files"
    )
    advice = f"{needs}; raise it (ulimit -n {max(2 * num_files, 65_536)})" + (
        ", or run `vista log compact`" if num_files else ""
    )
    return _judged("open files", "unlimited" if is_unlimited else f"at most {most:,}", is_fine, advice)


def maps_finding(most: int, num_files: int) -> Finding:
    """Judge vm.max_map_count: an open log maps the files of its segments into memory."""
    advice = (
        f"the log has {num_files:,} files to map; run `vista log compact`, or raise it "
        f"(sysctl vm.max_map_count={4 * num_files})"
    )
    return _judged("memory maps", f"at most {most:,}", 2 * num_files < most, advice)


def address_space_finding(most_bytes: int) -> Finding:
    """Judge `ulimit -v`: a store reserves address space that it does not use."""
    if most_bytes == resource.RLIM_INFINITY:
        return Finding("address space", "unlimited")
    from vista.store.folder_files import MAP_SIZE_BYTES

    advice = "stores cannot reserve address space to grow, so large ones cannot be written; run `ulimit -v unlimited`"
    return _judged("address space", size(most_bytes), most_bytes > 2 * MAP_SIZE_BYTES, advice)


INSTRUCTIONS = ("avx2", "avx512_f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16", "i8mm")
"""Names in torch.cpu.get_capabilities of what matters for products of matrices, on x86 and on ARM."""


def check_processor(config: DoctorConfig) -> Iterator[Finding]:
    """Its name, its instructions, and what vista makes of them."""
    import torch

    from vista_kernels.cpp_backend.library import LibraryError, load
    from vista_kernels.processor import VARIABLE, processor

    capabilities = torch.cpu.get_capabilities()
    yield Finding("processor", cpu_name() or str(capabilities.get("cpu_name", platform.machine())))
    has = [name for name in INSTRUCTIONS if capabilities.get(name)]
    yield Finding("instructions", ", ".join(has) or "none that matter")
    if capabilities.get("avx2", True) is False:
        advice = "matrix products are several times slower; use a newer processor"
        yield Finding("avx2", "missing", Verdict.limited, advice)
    chosen = processor()
    if os.environ.get(VARIABLE):
        advice = f"vista imitates another processor, which can be slow; unset {VARIABLE} unless this is a test"
        yield Finding(VARIABLE, os.environ[VARIABLE], Verdict.limited, advice)
    precision = "bfloat16" if chosen.multiplies_bfloat16 else "float32"
    advice = (
        "without AMX or AMD's avx512_bf16, matrix products use float32, 2 to 7 times slower than bfloat16; train and "
        "refresh wide models on a processor that has one of them"
    )
    yield _judged("precision=auto", f"{precision} ({chosen.name})", chosen.multiplies_bfloat16, advice)
    try:
        load()
        yield Finding("C++ library", "built; it scores requests")
    except LibraryError as error:
        advice = f"requests on a CPU take 2 to 7 times as long, because torch computes them: {error}"
        yield Finding("C++ library", "none", Verdict.limited, advice)


def check_threads(config: DoctorConfig) -> Iterator[Finding]:
    """Cores that this process may use, and torch's threads."""
    import torch

    cores, quota = usable_cores(), cpu_quota()
    yield Finding("cores", f"{cores} of {os.cpu_count() or cores}")
    yield Finding("quota", "none" if quota is None else f"{quota:g} cores (cgroup)")
    threads = choose_threads(0, torch.get_num_threads())
    yield thread_finding(threads, cores if quota is None else min(cores, quota))


def thread_finding(threads: ThreadChoice, cores: float) -> Finding:
    """Compare the threads of a command with the cores that this process may use; `cores` need not be whole."""
    most, number = max(1, int(cores)), threads.number
    remedy, advice = f"set OMP_NUM_THREADS={most}, or num_threads={most} of a command", ""
    if number > cores and number > 1:
        advice = f"{number} threads share {cores:g} cores and wait for one another; {remedy}"
    elif 2 * number <= cores:
        advice = f"training and refresh use {number} of {most} cores; {remedy}"
    elif most == 1:
        advice = "training and refresh use one core, and vista serve one worker; use a machine with more cores"
    return _judged("threads", str(threads), not advice, advice)


CHECKS: dict[str, Callable[[DoctorConfig], Iterator[Finding]]] = {
    "Packages": check_core,
    "Extras": check_extras,
    "Processor": check_processor,
    "Threads": check_threads,
    "Memory": check_memory,
    "GPU": check_gpus,
    "Disk": check_disks,
    "Limits": check_limits,
    "Model": check_model,
    "Store": check_store,
    "Log": check_log,
}
"""All checks. Each imports what it needs when it runs, because that may be missing."""
