"""Rewrites the outputs that pages and notebooks show: `python -m tests.docs.update_output README.md docs/index.md`.

An output that still matches stays; write `...` again into one that is replaced. Only an output that is shown already
is updated: write an empty ```text block below a python block, or a line `?` below a command, to have it filled in. A
notebook (`docs/notebooks/own-log.ipynb`) gets new outputs if one of them has changed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tests.conftest  # noqa: F401, sets the processor profile that the tests have
from tests.docs.page import matches, read_lines
from tests.docs.run_page import TIME_LIMIT_S, run_page


def update_page(page: Path, *, limit_s: float = TIME_LIMIT_S) -> bool:
    """Run a page in a temporary folder and write its new outputs; return whether anything changed.

    Raises:
        PageError, PageFailed: see `run_page`; the page is then left as it was.
    """
    lines = read_lines(page)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(step, output) for step, output in run_page(page, Path(folder), limit_s=limit_s)]
    for step, printed in reversed(outputs):
        if step.shown is not None and not matches(step.shown, printed, step.tolerance):
            new = [f"{step.indent}{line}".rstrip() for line in "\n".join(printed).rstrip().split("\n")]
            lines[step.shown_start : step.shown_start + len(step.shown)] = new
    text = "".join(f"{line}\n" for line in lines)
    changed = text != page.read_text(encoding="utf-8")
    if changed:
        page.write_text(text, encoding="utf-8")
    return changed


def main(names: Sequence[str]) -> None:
    """Update each page or notebook and say what became of it."""
    for name in names:
        if name.endswith(".ipynb"):
            from tests.docs.run_notebook import update_notebook  # needs the extra `docs`

            changed = update_notebook(Path(name))
        else:
            changed = update_page(Path(name))
        print(f"{name}: {'updated' if changed else 'unchanged'}")


if __name__ == "__main__":
    main(sys.argv[1:])
