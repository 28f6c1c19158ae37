"""A visit of `vista explore` in headless Chromium: every tab is opened and used as a person would.

    make demo && python -m scripts.benchmarks.explore_visit

writes the screenshots of the guide, on the demo's data. Needs the extra `explore`, Playwright, and Chromium (`make
test-browser` installs the first two).
"""

from __future__ import annotations

import re
import shutil
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from scripts.benchmarks.serve_load import REPOSITORY, vista_process

TABS = ("User", "Ranking", "What if", "Compare", "Store", "Results")
SIZE = {"width": 1280, "height": 900}
TIMEOUT_S = 300.0
"""Of each step; a shared machine can be many times slower than an idle one."""
FIGURES, MOST_PIXELS = Path("docs/guides/figures"), 1800
"""Folder of the screenshots, and their largest height."""
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
_URL = re.compile(r"on (http://127\.0\.0\.1:\d+/\?access=\S+);")
# Streamlit has these while the script runs, while a part waits for it, or while elements are of an earlier run.
_BUSY = ", ".join(
    [
        "[data-test-script-state]:not([data-test-script-state=notRunning])",
        *(f"[data-testid={name}]" for name in ("stStatusWidget", "stSpinner", "stSkeleton")),
        "[data-stale=true]",
    ]
)
_SETTLE_MS = 500
_STABLE_CHECKS = 3
"""Checks in a row that must find the same page."""


def browser_program() -> str | None:
    """Path of Debian's Chromium, or of another one; None if there is none."""
    return next((found for name in CHROMIUM if (found := shutil.which(name))), None)


@contextmanager
def exploring(*words: str, folder: Path = REPOSITORY) -> Iterator[str]:
    """`vista explore` in a process of its own, in a folder; yields its address. Errors as of `vista_process`."""
    command = ["explore", "port=0", *words]
    with vista_process(command, _URL, folder=folder) as (_, url, _):
        wait_for_server(url)
        yield url


def wait_for_server(url: str) -> None:
    """Wait until the page can be opened.

    Raises:
        SystemExit: it cannot within TIMEOUT_S.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(urljoin(url, "/_stcore/health"), timeout=TIMEOUT_S):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"error: {url} did not answer within {TIMEOUT_S:.0f} s")


@contextmanager
def visiting(url: str) -> Iterator[ExploreVisit]:
    """A browser on a page that is not opened yet."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_program(), args=["--no-sandbox"], timeout=1000 * TIMEOUT_S
        )
        try:
            yield ExploreVisit(browser, url)
        finally:
            browser.close()


class ExploreVisit:
    """What a person does on the page."""

    def __init__(self, browser: Any, url: str) -> None:
        self._browser, self._url = browser, url
        self.page: Any = None

    @contextmanager
    def elsewhere(self, url: str) -> Iterator[ExploreVisit]:
        """Another visit with the same browser."""
        other = ExploreVisit(self._browser, url)
        try:
            yield other
        finally:
            other.close()

    def open(self, query: str = "") -> float:
        """Open the page as a new visitor; returns the seconds from the request to the visible title."""
        self.close()
        self.page = self._browser.new_context(viewport=SIZE).new_page()
        self.page.set_default_timeout(1000 * TIMEOUT_S)
        began = time.perf_counter()
        self.page.goto(self._url + query.replace("?", "&"), wait_until="commit")
        self.page.get_by_role("heading", name="vista explore").wait_for()
        return time.perf_counter() - began

    def close(self) -> None:
        """Close the page, if one is open."""
        if self.page is not None:
            self.page.context.close()
            self.page = None

    def wait_for_tabs(self) -> None:
        """Wait until the tabs and the first chart or table can be used."""
        self.page.get_by_role("tab", name=TABS[0], exact=True).wait_for()
        self.settle()

    def open_tab(self, name: str) -> str:
        """Click a tab; returns the text of the page once nothing is computed."""
        self.page.get_by_role("tab", name=name, exact=True).click()
        self.settle()
        return self.text()

    def click(self, button: str) -> str:
        """Click a button by its label; returns the text of the page afterwards."""
        self.page.get_by_role("button", name=button).first.click()
        self.settle()
        return self.text()

    def choose(self, field: str, option: str) -> str:
        """Choose in a list of the open tab; returns the text of the page afterwards."""
        self.page.get_by_label(field, exact=True).first.click()
        self.page.get_by_role("option", name=option).first.click()
        self.settle()
        return self.text()

    def find_user(self, text: str) -> str:
        """Type into the search and press Enter; returns the text of the page."""
        field = self.page.get_by_label("Find a user")
        field.fill(text)
        field.press("Enter")
        self.settle()
        return self.text()

    def text(self) -> str:
        """All visible text; an error if Streamlit shows an exception."""
        problems = self.page.locator("[data-testid=stException]")
        assert problems.count() == 0, problems.first.inner_text()
        return str(self.page.locator("[data-testid=stApp]").inner_text())

    def settle(self) -> None:
        """Wait until nothing is computed, and the page has not changed for a while."""
        same, before = 0, None
        while same < _STABLE_CHECKS:
            self.page.wait_for_timeout(_SETTLE_MS)
            self.page.wait_for_function(f"!document.querySelector('{_BUSY}')")
            now = self.page.locator("[data-testid=stApp]").inner_html()
            same = same + 1 if now == before else 0
            before = now

    def screenshot(self, file: Path, *, most_pixels: int = SIZE["height"]) -> None:
        """Write a screenshot of the page from its top, at most `most_pixels` high."""
        file.parent.mkdir(parents=True, exist_ok=True)
        if most_pixels > SIZE["height"]:
            height = self.page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
            self.page.set_viewport_size(SIZE | {"height": min(height, most_pixels)})
            self.settle()
        self.page.screenshot(path=str(file), timeout=1000 * TIMEOUT_S)
        if most_pixels > SIZE["height"]:
            self.page.set_viewport_size(SIZE)
            self.settle()


def open_every_tab(visit: ExploreVisit, seen: Callable[[str, str], None]) -> None:
    """Open and use each tab; `seen` is called with the tab's name and text."""
    for name in TABS:
        text = visit.open_tab(name)
        if name == "What if":
            text = visit.click("Add event")
        if name == "Store":
            text = visit.click("Verify the store")
        if name == "Results":
            text = visit.click("Measure")
        seen(name, text)


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
