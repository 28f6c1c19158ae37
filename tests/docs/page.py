"""The blocks of a Markdown page that the tests run, and the output that the page shows for them.

- A ```python block is run as written. A ```text block right below it, with only blank lines between, is its stdout.
- A ```console block has lines `$ command`, each followed by what the command prints. A line that ends in a backslash
  continues on the next one.
- Decimal numbers in an output may differ where its block says by how much: ```text within 10 %.
- A block that must not run says why: ```console no-run: needs a GPU. The allowed reasons are in REASONS.
- Blocks of other languages are not run. Commands of this repository may stand in them only with such a reason.

In an output, `...` matches any text of a line. A line that is just `...` matches any number of lines. Metrics differ a
little between processors and versions of torch. So with a tolerance, a shown number that has a decimal point stands
for any printed number that differs by at most this share of it and has as many decimals. A number with its standard
error, such as `+0.034 ± 0.015`, may also differ by this error. Integers and all other text must be the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path

REASONS = (
    "downloads data",
    "needs a GPU",
    "needs a scheduler",
    "needs a second machine",
    "needs Feast",
    "needs Spark",
    "needs TorchRec",
    "runs for minutes",
    "runs until stopped",
)
"""Why a block may not be run. `runs until stopped`: a service; a test of its own must run it. `needs
Feast` and `needs Spark`: `make test-recipes` runs it. `needs TorchRec`: tests/training/test_sharded_table.py makes
the same runs."""

_COMMAND = re.compile(r"(\$ )?(vista|make|python -m) ")
_UNTESTED = ("", "bash", "sh", "shell", "zsh")
"""Languages in which a page must not hide commands from the tests."""
ELLIPSIS = "..."
_DECIMAL = r"\d+\.\d+"
_WITH_ERROR = rf"[+-]?{_DECIMAL} ± {_DECIMAL}"
_PARTS = re.compile(rf"({re.escape(ELLIPSIS)}|{_WITH_ERROR}|{_DECIMAL})")
_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>[^`]*)$")


class PageError(ValueError):
    """A page breaks the conventions above."""


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block of a page."""

    language: str
    no_run: str | None
    """The reason for not running it."""
    tolerance: float
    """By what share of it a decimal number of the output may differ."""
    start: int
    """Index of the block's first line, below the opening fence, in the page's lines."""
    lines: tuple[str, ...]
    """Without the fence's indentation."""
    indent: str

    @property
    def code(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)

    @property
    def stop(self) -> int:
        """Index of the closing fence."""
        return self.start + len(self.lines)


@dataclass(frozen=True, slots=True)
class Step:
    """Code or a command to run, and the lines of the page that show its output."""

    language: str
    code: str
    start: int
    """Index of the code's first line in the page's lines."""
    shown: tuple[str, ...] | None
    """None where the page shows no output, so there is nothing to compare."""
    shown_start: int = 0
    indent: str = ""
    """Of the shown lines in the page."""
    tolerance: float = 0.0
    """By what share of it a decimal number of the shown lines may differ."""

    @property
    def fails(self) -> bool:
        """A command whose shown output has a line of vista's error messages must fail, every other one succeed."""
        return any(line.startswith("error:") for line in self.shown or ())


def read_lines(page: Path) -> list[str]:
    return page.read_text(encoding="utf-8").splitlines()


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order.

    Raises:
        PageError: a block is not closed, a word after its language is wrong, or a block that is not run has commands
            and no reason.
    """
    blocks, opened, content = [], None, []
    for index, line in enumerate(read_lines(page)):
        fence = _FENCE.match(line)
        if opened is None:
            if fence:
                opened, content, start = fence, [], index + 1
            continue
        if fence and fence["fence"].startswith(opened["fence"]) and not fence["info"].strip():
            language, no_run, tolerance = _read_info(opened["info"], f"{page}:{start}")
            if language in _UNTESTED and no_run is None and any(_COMMAND.match(line) for line in content):
                raise PageError(f"{page}:{start}: put these commands into a ```console block, which is tested")
            blocks.append(Block(language, no_run, tolerance, start, tuple(content), opened["indent"]))
            opened = None
            continue
        content.append(line.removeprefix(opened["indent"]) if line.strip() else "")
    if opened is not None:
        raise PageError(f"{page}:{start}: the block is not closed")
    return blocks


def _read_info(info: str, place: str) -> tuple[str, str | None, float]:
    """Language, reason for not running, and tolerance."""
    language, _, rest = info.strip().partition(" ")
    rest = rest.strip()
    if not rest:
        return language, None, 0.0
    if percent := re.fullmatch(r"within (\d{1,2}) %", rest):
        return language, None, int(percent[1]) / 100
    reason = rest.removeprefix("no-run").removeprefix(":").strip()
    if reason not in REASONS:
        allowed = f"`no-run: REASON` with one of {', '.join(REASONS)}; or `within 10 %`"
        raise PageError(f"{place}: write {allowed}; got {rest!r}")
    return language, reason, 0.0


def steps_of(page: Path) -> list[Step]:
    """What is to be run, in order.

    Raises:
        PageError: see `blocks_of`; or a console block does not begin with a command.
    """
    steps: list[Step] = []
    blocks, lines = blocks_of(page), read_lines(page)
    for block, following in zip_longest(blocks, blocks[1:]):
        if block.no_run is not None:
            continue
        if block.language == "python":
            step = Step("python", block.code, block.start, None)
            if following is not None and following.language == "text" and following.no_run is None:
                between = lines[block.stop + 1 : following.start - 1]
                if not any(line.strip() for line in between):
                    output = (following.lines, following.start, following.indent, following.tolerance)
                    step = Step("python", block.code, block.start, *output)
            steps.append(step)
        elif block.language == "console":
            steps += _commands_of(block, page)
    return steps


def _commands_of(block: Block, page: Path) -> list[Step]:
    starts = [index for index, line in enumerate(block.lines) if line.startswith("$ ")]
    if not starts or starts[0] != 0:
        raise PageError(f"{page}:{block.start + 1}: a console block begins with a line `$ command`")
    steps = []
    for start, stop in zip(starts, [*starts[1:], len(block.lines)], strict=True):
        first, *rest = block.lines[start:stop]
        command, shown_start = [first.removeprefix("$ ")], start + 1
        while command[-1].endswith("\\") and rest:
            command.append(rest.pop(0).removeprefix("> "))
            shown_start += 1
        while rest and not rest[-1]:
            rest.pop()
        shown = tuple(rest) or None
        code, place = "\n".join(command), block.start + start
        steps.append(Step("console", code, place, shown, block.start + shown_start, block.indent, block.tolerance))
    return steps


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
        if tolerance and i % 2:
            number = re.compile(_WITH_ERROR if "±" in parts[i] else _DECIMAL).match(printed, start)
            if number is None or not _is_close(parts[i], number[0], tolerance):
                return False
            return rest_matches(i + 1, number.end())
        return printed.startswith(parts[i], start) and rest_matches(i + 1, start + len(parts[i]))

    return rest_matches(0, 0)


def _is_close(shown: str, printed: str, tolerance: float) -> bool:
    old, new = shown.split(" ± "), printed.split(" ± ")
    allowed = [tolerance * abs(float(number)) for number in old]
    allowed[0] = max(allowed[0], *map(float, old[1:]), 0.0)
    return all(
        len(a.partition(".")[2]) == len(b.partition(".")[2]) and abs(float(b) - float(a)) <= most
        for a, b, most in zip(old, new, allowed, strict=True)
    )


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


def _trimmed(lines: Sequence[str]) -> list[str]:
    trimmed = list(lines)
    while trimmed and not trimmed[-1].strip():
        trimmed.pop()
    return trimmed
