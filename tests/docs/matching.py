"""Compares printed lines with the lines that a page shows, in which `...` stands for anything.

Within a line, `...` matches any text of that line. A line that is just `...` matches any number of lines.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

ELLIPSIS = "..."


def line_matches(shown: str, printed: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in shown.rstrip().split(ELLIPSIS))
    return re.fullmatch(pattern, printed.rstrip()) is not None


def matches(shown: Sequence[str], printed: Sequence[str]) -> bool:
    """Whether all printed lines are as shown; blank lines at the end do not count."""
    shown, printed = _trimmed(shown), _trimmed(printed)
    reached = {0}
    """How many printed lines the shown ones so far can stand for."""
    for line in shown:
        if line.strip() == ELLIPSIS:
            reached = set(range(min(reached), len(printed) + 1)) if reached else set()
        else:
            reached = {n + 1 for n in reached if n < len(printed) and line_matches(line, printed[n])}
    return len(printed) in reached


def updated(shown: Sequence[str], printed: Sequence[str]) -> list[str]:
    """The shown lines with as few of them replaced by printed ones as it takes to match; `...` stays where it can."""
    if matches(shown, printed):
        return list(shown)
    shown, printed = _trimmed(shown), _trimmed(printed)

    @cache
    def best(i: int, j: int) -> tuple[float, tuple[str, ...]]:
        """Least cost, and lines, from shown line i and printed line j on."""
        if i == len(shown):
            return float(len(printed) - j), tuple(printed[j:])
        any_lines = shown[i].strip() == ELLIPSIS
        cost, lines = best(i + 1, j)
        # An unmatched line costs more to drop than to replace; a `...` can stay and stand for nothing.
        choices = [(cost, (shown[i], *lines)) if any_lines else (cost + 1.5, lines)]
        if j < len(printed):
            cost, lines = best(i, j + 1)
            choices.append((cost, lines) if any_lines else (cost + 1, (printed[j], *lines)))
            if not any_lines:
                cost, lines = best(i + 1, j + 1)
                same = line_matches(shown[i], printed[j])
                choices.append((cost, (shown[i], *lines)) if same else (cost + 1, (printed[j], *lines)))
        return min(choices, key=lambda choice: choice[0])

    return list(best(0, 0)[1])


def _trimmed(lines: Sequence[str]) -> list[str]:
    trimmed = list(lines)
    while trimmed and not trimmed[-1].strip():
        trimmed.pop()
    return trimmed
