"""All checks of `vista doctor`, and what they found."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from vista.config.serve_config import DoctorConfig
from vista.doctor.finding import Finding
from vista.doctor.verdict import Verdict
from vista.errors import VistaError

CHECKS = {
    "Packages": ("installed_packages", "check_core"),
    "Extras": ("installed_packages", "check_extras"),
    "Processor": ("processor_checks", "check_processor"),
    "Threads": ("processor_checks", "check_threads"),
    "Memory": ("memory_checks", "check_memory"),
    "GPU": ("gpu_checks", "check_gpus"),
    "Disk": ("disk_checks", "check_disks"),
    "Limits": ("process_limits", "check_limits"),
    "Model": ("model_checks", "check_model"),
    "Store": ("store_checks", "check_store"),
    "Log": ("log_checks", "check_log"),
}
"""Module and function of each check. They are imported by `examine`, because what a module imports may be missing."""


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
        module, function = CHECKS[title]
        for finding in getattr(import_module(f"vista.doctor.{module}"), function)(config):
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
