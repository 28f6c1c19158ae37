"""What a report does not measure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from vista.report.html_page import PageSection

ALWAYS = (
    "other seeds: each run was trained once, and the intervals do not include differences between training runs",
    "the effect on users: past clicks depend on what was shown to them",
    "differences between groups of users, and how much rankings follow popularity (vista evaluate popularity=true)",
    "concurrent requests, and a service over HTTP",
)


def limits_section(reasons: Sequence[str]) -> PageSection:
    """A list of what is missing.

    Args:
        reasons: what is missing from this report in particular, each with its reason.
    """
    entries = "".join(f"<li>{escape(each)}</li>" for each in (*reasons, *ALWAYS))
    return PageSection("What was not measured", "This report does not cover:", [f"<ul>{entries}</ul>"])
