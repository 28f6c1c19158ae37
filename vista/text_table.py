"""Text and tables that fit the terminal, and numbers with two significant digits and a unit."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Iterable, Sequence

LEAST_WIDTH = 20
MOST_WIDTH = 130
"""Of lines of text, which are hard to read if they are longer."""
GAP = 2
LEAST_SECOND = 30
"""Width of the second of two columns, at least. If a terminal has less, each row is wrapped as one text."""


def terminal_width(piped: int = 110) -> int:
    """Columns of the terminal, or of the environment variable COLUMNS; `piped` if there is neither."""
    return max(shutil.get_terminal_size((piped, 24)).columns, LEAST_WIDTH)


def fitted(line: str, indent: int = 2) -> str:
    """A line, wrapped if it is wider than the terminal; programs that read it from a pipe get it in one piece."""
    width = terminal_width(piped=len(line))
    return line if len(line) <= width else wrapped(line, width, " " * indent)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """A table with aligned columns, or where it is wider than `width` its title and one block of lines per row.

    Args:
        header: names of the columns. The first column names the row, and is aligned to the left; its name is the title.
        rows: cells as text; empty ones are left out of blocks.
        width: that of the terminal, if None; programs that read from a pipe get aligned columns.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    widest = sum(widths) + GAP * (len(widths) - 1)
    width = terminal_width(piped=widest) if width is None else width
    if widest <= width:
        return "\n".join(_aligned(row, widths) for row in (header, *rows))
    title = [wrapped(header[0], width, "  ")] if header[0] else []
    return "\n".join([*title, *(_block(header, row, width) for row in rows)])


def two_columns(rows: Iterable[tuple[str, str]], column: int, *, cut: bool = False) -> str:
    """Two columns, the second wrapped. A long first cell gets a line of its own.

    Args:
        rows: first and second cells.
        column: where the second column begins, unless the terminal is too narrow for two columns.
        cut: cut second cells after one line instead, and end them with an ellipsis.
    """
    width = min(terminal_width(), MOST_WIDTH)
    if cut:
        rows = [
            (left, textwrap.shorten(right, max(width - column - 2, LEAST_SECOND), placeholder=" …"))
            for left, right in rows
        ]
    if width - column - 2 < LEAST_SECOND:
        return "\n".join(hanging(f"  {left}  {right}".rstrip(), 6) for left, right in rows)
    lines = []
    for left, right in rows:
        first, *others = textwrap.wrap(right, width - column - 2, break_on_hyphens=False) or [""]
        head = f"  {left}"
        if len(head) >= column:
            lines.append(head)
            head = ""
        lines.append(f"{head:<{column}}{first}".rstrip())
        lines += [" " * column + line for line in others]
    return "\n".join(lines)


def hanging(text: str, indent: int) -> str:
    """Text in lines that fit the terminal; lines after the first are indented by so many spaces."""
    return wrapped(text, min(terminal_width(), MOST_WIDTH), " " * indent)


def wrapped(text: str, width: int, indent: str = "") -> str:
    """Text in lines of at most `width` characters; lines after the first are indented."""
    lines = textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join(lines)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
    return (" " * GAP).join(cells).rstrip()


def _block(header: Sequence[str], row: Sequence[str], width: int) -> str:
    shown = [(name, cell) for name, cell in zip(header[1:], row[1:], strict=True) if cell]
    lines = [wrapped(row[0], width, "  ")]
    lines += [wrapped(f"  {name}: {cell}", width, "    ") for name, cell in shown]
    return "\n".join(lines)


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
    if rounded(seconds) >= 2 * 86_400:
        return f"{plain(seconds / 86_400)} days"
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
