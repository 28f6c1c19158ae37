"""The browser of tests that open a page."""

from __future__ import annotations

from scripts.benchmarks.explore_visit import browser_program
from tests.required_program import required


def require_chromium() -> str:
    """Path of Chromium, as `required`."""
    return required(browser_program(), "Chromium", "chromium")
