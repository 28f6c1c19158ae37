"""Versions of Python and of packages, compared with what vista requires."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vista.config.serve_config import DoctorConfig
from vista.doctor.finding import Finding
from vista.doctor.verdict import Verdict
from vista.install_command import DISTRIBUTION, install_command
from vista.version import __version__

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
    "sketches": "data.frequencies=count_min",
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
