"""Screenshots of `vista explore` on the demo's data, for the guide.

    make demo && python -m scripts.explore_figures

Needs the extra `explore`, Playwright, and Chromium (`make test-browser` installs the first two).
"""

from __future__ import annotations

import sys
from pathlib import Path

from scripts.benchmarks.explore_visit import exploring, open_every_tab, visiting

FIGURES = Path("docs/guides/figures")
MOST_PIXELS = 1800
"""Largest height of a screenshot."""


def main() -> int:
    """Write one PNG per tab; returns the exit status."""
    with exploring(*sys.argv[1:]) as url, visiting(url) as visit:
        visit.open()
        visit.wait_for_tabs()

        def keep(name: str, text: str) -> None:
            file = FIGURES / f"explore-{name.lower().replace(' ', '-')}.png"
            visit.screenshot(file, most_pixels=MOST_PIXELS)
            print(f"{file}: {file.stat().st_size // 1000} kB")

        open_every_tab(visit, keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
