"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass

from vista.doctor.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a diagnosis."""

    name: str
    value: str
    verdict: Verdict = Verdict.fine
    advice: str = ""
    """What it means and what to do; empty if it is fine."""
