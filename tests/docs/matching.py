"""Compares printed lines with the lines that a page shows, in which `...` stands for anything.

Within a line, `...` matches any text of that line. A line that is just `...` matches any number of lines.

Metrics differ a little between processors and versions of torch. So with a tolerance, a shown number that has a decimal
point stands for any printed number that differs by at most this share of it and has as many decimals. Integers and all
other text must be the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

ELLIPSIS = "..."
_DECIMAL = r"\d+\.\d+"
_PARTS = re.compile(rf"({re.escape(ELLIPSIS)}|{_DECIMAL})")


def line_matches(shown: str, printed: str, tolerance: float = 0.0) -> bool:
    """Whether a printed line is as shown; `tolerance` is a share of each decimal number, such as 0.1."""
    parts, printed = _PARTS.split(shown.rstrip()), printed.rstrip()

    @cache
    def rest_matches(i: int, start: int) -> bool:
        """Whether parts[i:] match printed[start:]."""
        if i == len(parts):
            return start == len(printed)
        if parts[i] == ELLIPSIS:
            return any(rest_matches(i + 1, n) for n in range(start, len(printed) + 1))
        if tolerance and re.fullmatch(_DECIMAL, parts[i]):
            number = re.compile(_DECIMAL).match(printed, start)
            if number is None or not _is_close(parts[i], number[0], tolerance):
                return False
            return rest_matches(i + 1, number.end())
        return printed.startswith(parts[i], start) and rest_matches(i + 1, start + len(parts[i]))

    return rest_matches(0, 0)


def _is_close(shown: str, printed: str, tolerance: float) -> bool:
    decimals = [len(number.partition(".")[2]) for number in (shown, printed)]
    return decimals[0] == decimals[1] and abs(float(printed) - float(shown)) <= tolerance * float(shown)


def matches(shown: Sequence[str], printed: Sequence[str], tolerance: float = 0.0) -> bool:
    """Whether all printed lines are as shown; blank lines at the end do not count."""
    shown, printed = _trimmed(shown), _trimmed(printed)
    reached = {0}
    """How many printed lines the shown ones so far can stand for."""
    for line in shown:
        if line.strip() == ELLIPSIS:
            reached = set(range(min(reached), len(printed) + 1)) if reached else set()
        else:
            reached = {n + 1 for n in reached if n < len(printed) and line_matches(line, printed[n], tolerance)}
    return len(printed) in reached


def updated(shown: Sequence[str], printed: Sequence[str], tolerance: float = 0.0) -> list[str]:
    """The shown lines with as few of them replaced by printed ones as it takes to match; `...` stays where it can."""
    if matches(shown, printed, tolerance):
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
                same = line_matches(shown[i], printed[j], tolerance)
                choices.append((cost, (shown[i], *lines)) if same else (cost + 1, (printed[j], *lines)))
        return min(choices, key=lambda choice: choice[0])

    return list(best(0, 0)[1])


def _trimmed(lines: Sequence[str]) -> list[str]:
    trimmed = list(lines)
    while trimmed and not trimmed[-1].strip():
        trimmed.pop()
    return trimmed
