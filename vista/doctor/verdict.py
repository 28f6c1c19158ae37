"""What a finding means."""

from __future__ import annotations

from enum import Enum


class Verdict(Enum):
    """What a finding means."""

    fine = "fine"
    limited = "limited"
    """Something works, but slowly or only up to a limit."""
    broken = "broken"
    """Something does not work."""
