"""The command `vista report`."""

from __future__ import annotations

from vista.config import ReportConfig
from vista.report.report import WrittenReport, write_report


def run_report(config: ReportConfig) -> WrittenReport:
    """`vista report`; errors as of `write_report`."""
    return write_report(config)
