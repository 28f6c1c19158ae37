"""The command `vista doctor`."""

from __future__ import annotations

import json
from pathlib import Path

from vista.config import DoctorConfig
from vista.config.conversion import to_dict
from vista.doctor.diagnosis import Diagnosis, diagnose
from vista.doctor.finding import Finding
from vista.doctor.verdict import Verdict
from vista.errors import UnfitSetupError
from vista.files import replace_text, writable_file
from vista.text_table import hanging, two_columns

_MARKS = {Verdict.fine: " ", Verdict.limited: "!", Verdict.broken: "x"}
_LISTS = {Verdict.limited: "! Slow or limited here, and why:", Verdict.broken: "x Broken:"}


def run_doctor(config: DoctorConfig) -> None:
    """`vista doctor`: print the diagnosis, and write it to `out`.

    Raises:
        ConfigError: `out` cannot be written.
        UnfitSetupError: something is broken.
    """
    if config.out is not None:
        writable_file(Path(config.out), "out")
    diagnosis = diagnose(config)
    print(diagnosis_text(diagnosis))
    if config.out is not None:
        replace_text(Path(config.out), json.dumps(to_dict(diagnosis), indent=2) + "\n")
    if broken := diagnosis.having(Verdict.broken):
        names = ", ".join(finding.name for finding in broken)
        raise UnfitSetupError(f"broken: {names}; fix this as described above, then run vista doctor again")


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """All findings in a table, then what is slow and what is broken, each with what to do."""
    parts = []
    for section in diagnosis.sections:
        rows = [(f"{_MARKS[finding.verdict]} {finding.name}", finding.value) for finding in section.findings]
        parts += [section.title, two_columns(rows, 24), ""]
    for verdict, title in _LISTS.items():
        if findings := diagnosis.having(verdict):
            parts += [hanging(title, 2), *(hanging(_line(finding), 4) for finding in findings), ""]
    if not diagnosis.having(Verdict.broken):
        parts.append("Nothing is broken.")
    return "\n".join(parts).rstrip()


def _line(finding: Finding) -> str:
    value, _, _ = finding.value.partition(";")
    return f"  - {finding.name} ({value}): {finding.advice}"
