"""All checks of `vista doctor`, and what they found."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vista.config.choices import Mixing, StateDtype
from vista.config.serve_config import DoctorConfig
from vista.doctor.machine_checks import (
    Finding,
    Verdict,
    check_disks,
    check_gpus,
    check_limits,
    check_memory,
    check_processor,
    check_threads,
    free_bytes,
)
from vista.errors import CheckpointError, VistaError
from vista.installation import DISTRIBUTION, __version__, install_command

if TYPE_CHECKING:
    from vista.model.saved_model import ModelDescription
    from vista.store.manifest import Manifest
    from vista.store.store_url import StoreUrl
    from vista.store.verification import StoreStats


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
    """Run all checks. A check that fails becomes a finding, so the others still run."""
    sections = [examine(title, config) for title in CHECKS]
    return Diagnosis([section for section in sections if section.findings])


def examine(title: str, config: DoctorConfig) -> Section:
    """Run one check. If it fails, its error follows what it had found before."""
    found: list[Finding] = []
    try:
        for finding in CHECKS[title](config):
            found.append(finding)
    except VistaError as error:
        found.append(Finding(title.lower(), "cannot be used", Verdict.broken, str(error)))
    except ModuleNotFoundError as error:
        advice = f"this check needs {error.name}, which is not installed"
        found.append(Finding(title.lower(), "unknown", Verdict.broken, advice))
    except Exception as error:
        advice = f"this check failed: {type(error).__name__}: {error}"
        found.append(Finding(title.lower(), "unknown", Verdict.broken, advice))
    return Section(title, found)


# Versions of Python and of packages, compared with what vista requires.

EXTRAS = {
    "data": "source tables and Parquet files",
    "serve": "vista serve",
    "faiss": "vista index, vista items tokenize",
    "kafka": "vista watch source=kafka://...",
    "redis": "stores on a Valkey or Redis server",
    "text": "vista items embed",
    "onnx": "vista export format=onnx",
    "ray": "vista refresh engine=ray",
    "baselines": "vista evaluate trained_baselines=true",
    "tensorboard": "vista train tracking=tensorboard",
    "mlflow": "vista train tracking=mlflow",
    "wandb": "vista train tracking=wandb",
    "optuna": "vista sweep sampler=tpe",
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
        yield Finding(
            "installation",
            "none",
            Verdict.limited,
            f"{DISTRIBUTION} is not installed, so no version was compared; install it with: {install_command()}",
        )
        return
    yield _compared(
        "Python", platform.python_version(), SpecifierSet(requires_python), "install vista with another one"
    )
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
    yield Finding("C++ compiler", compiler or "none; only vista export format=aotinductor needs one")


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


# An event log: whether it opens, and its size.

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
    if number < MANY_SEGMENTS:
        return Finding("segments", str(number))
    advice = "each read of a history searches all of them; run `vista log compact`"
    return Finding("segments", str(number), Verdict.limited, advice)


def log_size_finding(num_bytes: int, memory_bytes: int | None) -> Finding:
    """Compare the log with the memory that could cache it."""
    from vista.planning.quantities import size

    if memory_bytes is None or num_bytes <= memory_bytes:
        return Finding("size", size(num_bytes))
    advice = (
        f"only {size(memory_bytes)} of memory are available to cache it, so training and full refreshes read the disk "
        "in every epoch: add memory, or train on a sample of the users"
    )
    return Finding("size", size(num_bytes), Verdict.limited, advice)


# An exported model: whether this version reads it, and what it is.


def check_model(config: DoctorConfig) -> Iterator[Finding]:
    """Format, sizes, and summarizer of the model if one is given, without reading its weights.

    Raises:
        CheckpointError: the model is missing or damaged, has another format, or lacks a file.
    """
    from vista.model.saved_model import FORMAT_VERSION, ModelDescription
    from vista.planning.quantities import size

    if config.model is None:
        return
    folder = Path(config.model)
    description = ModelDescription.read(folder)
    yield Finding("model", str(folder))
    yield Finding("format", str(FORMAT_VERSION))
    sizes = description.config
    yield Finding(
        "architecture",
        f"{sizes.architecture.value}, dim {sizes.dim}, {sizes.num_seeds} seeds, tails of {sizes.tail_len}",
    )
    check_sizes(folder, description)
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


def check_sizes(folder: Path, description: ModelDescription) -> None:
    """Compare the sizes of the model's files with those in its description.

    Raises:
        CheckpointError: a file is missing, or has another size.
    """
    for name, entry in description.files.items():
        path = folder / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != entry.bytes:
            state = "is missing" if actual is None else f"holds {actual} bytes instead of {entry.bytes}"
            raise CheckpointError(f"{path}: {state}; copy the model again, or export it again")


# A summary store: what it serves, how old that is, and whether a model's summarizer wrote it.

_CLOCK_TOLERANCE_S = 60.0


def check_store(config: DoctorConfig) -> Iterator[Finding]:
    """Every shard of the store if one is given, or the store itself; compared with the model if one is given.

    Raises:
        StoreError, ConfigError: the store is missing, damaged, or cannot be reached.
    """
    from vista.store.shards import stores_in

    for root in [] if config.store is None else stores_in(config.store):
        yield from _check(root, config.model)


def _check(root: Path | StoreUrl, model: str | None) -> Iterator[Finding]:
    from vista.store.verification import store_stats

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
    if isinstance(root, Path):
        yield size_finding(published.live_bytes, free_bytes())
    yield from _unfinished(stats)
    if manifest.state_dtype == StateDtype.none.value:
        advice = "an incremental refresh reads complete histories; keep states (a full refresh with state=float32)"
        yield Finding("states", "none", Verdict.limited, advice)
    yield summarizer_finding(manifest, model)


def _unfinished(stats: StoreStats) -> Iterator[Finding]:
    for one in stats.generations:
        if one.manifest is None:
            yield Finding(f"generation {one.number}", "damaged", Verdict.limited, one.problem)
        elif not one.complete:
            advice = "a refresh was interrupted; rerun the same command to resume it"
            value = f"unfinished, {one.num_records:,} users done"
            yield Finding(f"generation {one.number}", value, Verdict.limited, advice)


def age_finding(age_s: float) -> Finding:
    """Judge the time since the last finished refresh, which a clock that is wrong makes negative."""
    from vista.planning.quantities import duration

    if age_s < -_CLOCK_TOLERANCE_S:
        advice = (
            "the time of the refresh is in the future, so max_age_s does not work: synchronize the clocks of this "
            "machine and of the one that refreshes (NTP)"
        )
        return Finding("refreshed", f"in {duration(-age_s)}", Verdict.broken, advice)
    return Finding("refreshed", f"{duration(max(age_s, 0.0))} ago")


def size_finding(live_bytes: int, memory_bytes: int | None) -> Finding:
    """Compare the records with the memory that could cache them."""
    from vista.planning.quantities import size

    value = f"{size(live_bytes)} in use"
    if memory_bytes is None or live_bytes <= memory_bytes:
        return Finding("size", value)
    advice = (
        f"only {size(memory_bytes)} of memory are available to cache it, so requests of other users read the disk: add "
        "memory, divide the store (refresh shard=i/n), or refresh with codec=int4"
    )
    return Finding("size", value, Verdict.limited, advice)


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
