"""Numbers with two significant digits and a unit that people read."""

from __future__ import annotations

import math

from vista.planning.arrival_rate import DAY_S

_BYTES = ("B", "KB", "MB", "GB", "TB", "PB", "EB", "ZB")
_COUNTS = ("", " thousand", " million", " billion", " trillion", " quadrillion")
_TIMES = (("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("min", 60.0), ("h", 3600.0))


def rounded(value: float) -> float:
    """A number with two significant digits."""
    return 0.0 if value == 0 else round(value, 1 - math.floor(math.log10(abs(value))))


def plain(value: float) -> str:
    """Two significant digits, without an exponent: 0.16, 4.5, 12,000."""
    two = rounded(value)
    text = f"{two:,.{max(0, 1 - math.floor(math.log10(abs(two)))) if two else 0}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def count(value: float) -> str:
    """A number of things: 950, 12 thousand, 1.5 million."""
    if rounded(value) < 10_000:
        return plain(value)
    step = _step(value, len(_COUNTS))
    return f"{plain(value / 1e3**step)}{_COUNTS[step]}"


def cores(number: int) -> str:
    """A number of cores: 1 core, 730 cores."""
    return f"{count(number)} core{'' if number == 1 else 's'}"


def hours(core_seconds: float) -> str:
    """Work: 0.38 core hours, 6,600 core hours."""
    return f"{count(core_seconds / 3600)} core hours"


def size(num_bytes: float) -> str:
    """Bytes in decimal units: 35 KB, 1.2 TB."""
    step = _step(num_bytes, len(_BYTES))
    return f"{plain(num_bytes / 1e3**step)} {_BYTES[step]}"


def duration(seconds: float | None) -> str:
    """A time: 15 ms, 40 s, 12 min, 1.5 h, 3 days; None is more than a day."""
    if seconds is None:
        return "more than a day"
    if seconds == 0:
        return "0 s"
    if rounded(seconds) >= 2 * DAY_S:
        return f"{plain(seconds / DAY_S)} days"
    fitting = [unit for unit in _TIMES if rounded(seconds) >= unit[1]]
    name, unit_s = fitting[-1] if fitting else _TIMES[0]
    return f"{plain(seconds / unit_s)} {name}"


def _step(value: float, most: int) -> int:
    """How often a number is divided by 1,000 before it is shown."""
    step = 0
    while step < most - 1 and rounded(value) >= 1e3:
        value /= 1e3
        step += 1
    return step
