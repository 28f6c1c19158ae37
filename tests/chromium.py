"""The browser of tests that open a page."""

from __future__ import annotations

import os

import pytest

from scripts.benchmarks.explore_visit import browser_program


def require_chromium() -> str:
    """Path of Chromium. Skip the test without one; in continuous integration, it fails instead."""
    program = browser_program()
    if program is None:
        reason = "needs Chromium (on Debian: apt-get install chromium)"
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    return program
